//! A tokenizer from GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

use super::{Tokenizer, pre, spm};
use crate::error::ModelError;
use crate::load::Metadata;
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper};

/// Token types of GGUF files.
mod token_type {
    pub const NORMAL: i64 = 1;
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER_DEFINED: i64 = 4;
    pub const UNUSED: i64 = 5;
    pub const BYTE: i64 = 6;
}

/// What a GGUF file says of its vocabulary.
pub(crate) struct GgufVocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<i64>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    eot: Option<u32>,
    pub unknown: Option<u32>,
    pub padding: Option<u32>,
    add_bos: Option<bool>,
    add_eos: Option<bool>,
}

impl<'a> GgufVocabulary<'a> {
    pub(crate) fn read(meta: &Metadata<'a>) -> Result<Self, ModelError> {
        let Some(tokens) = meta.strings("tokenizer.ggml.tokens")? else {
            return Err(meta.problem(
                "holds no tokenizer (tokenizer.ggml.tokens is missing); use a GGUF file made with its vocabulary, or the \
                 model's Hugging Face directory",
            ));
        };
        let types = meta.ints("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![token_type::NORMAL; tokens.len()]);
        if types.len() != tokens.len() {
            return Err(meta.problem(&format!("has {} tokens but {} token types", tokens.len(), types.len())));
        }
        let id = |key: &str| -> Result<Option<u32>, ModelError> {
            let key = format!("tokenizer.ggml.{key}_token_id");
            let Some(id) = meta.uint(&key)? else { return Ok(None) };
            match u32::try_from(id) {
                Ok(id) if (id as usize) < tokens.len() => Ok(Some(id)),
                // Some converters write -1 (as unsigned) for a token that does not exist.
                _ if id >= u64::from(u32::MAX) => Ok(None),
                _ => Err(meta.problem(&format!("{key} is {id}, but there are only {} tokens", tokens.len()))),
            }
        };
        Ok(GgufVocabulary {
            bos: id("bos")?,
            eos: id("eos")?,
            eot: id("eot")?,
            unknown: id("unknown")?,
            padding: id("padding")?,
            add_bos: meta.bool("tokenizer.ggml.add_bos_token")?,
            add_eos: meta.bool("tokenizer.ggml.add_eos_token")?,
            tokens,
            types,
        })
    }

    /// Text of a token.
    pub(crate) fn text(&self, id: Option<u32>) -> Option<&'a str> {
        self.tokens.get(id? as usize).copied()
    }

    /// Tokens that are never produced by merging and are recognised as a whole.
    fn added(&self) -> Vec<AddedToken> {
        let special = |t: i64| t == token_type::CONTROL || t == token_type::UNKNOWN;
        (self.tokens.iter().zip(&self.types))
            .filter(|(text, t)| !text.is_empty() && (special(**t) || **t == token_type::USER_DEFINED))
            .map(|(text, t)| AddedToken::from(*text, special(*t)).normalized(false))
            .collect()
    }

    /// Ids by text. Unused rows (padding of the embedding) have no text worth finding.
    fn ids(&self) -> Vocab {
        (self.tokens.iter().zip(&self.types).enumerate().rev())
            .filter(|(_, (_, t))| **t != token_type::UNUSED)
            .map(|(i, (text, _))| ((*text).to_owned(), i as u32))
            .collect()
    }
}

/// The tokenizer that a GGUF file describes.
pub(crate) fn from_gguf(meta: &Metadata<'_>, vocabulary: &GgufVocabulary<'_>) -> Result<Tokenizer, ModelError> {
    let parts = match meta.string("tokenizer.ggml.model")?.unwrap_or("gpt2") {
        "gpt2" => byte_level(meta, vocabulary)?,
        "llama" => sentence_piece(meta, vocabulary)?,
        other => {
            return Err(meta.problem(&format!(
                "tokenizer.ggml.model '{other}' is not supported (supported: gpt2, llama); use the Hugging Face directory \
                 of this model instead"
            )));
        }
    };
    let bos = vocabulary.bos.filter(|_| vocabulary.add_bos.unwrap_or(parts.add_bos));
    let eos = vocabulary.eos.filter(|_| vocabulary.add_eos.unwrap_or(false));
    let post = template(vocabulary, bos, eos).unwrap_or(parts.post);
    let mut inner = tokenizers::Tokenizer::new(parts.model);
    inner
        .with_normalizer(parts.normalizer.map(component::<NormalizerWrapper>))
        .map_err(|e| ModelError::Tokenizer(e.to_string()))?;
    inner.with_pre_tokenizer(parts.pre.map(component::<PreTokenizerWrapper>));
    inner.with_decoder(Some(component::<DecoderWrapper>(parts.decoder)));
    if !post.is_null() {
        inner.with_post_processor(Some(component::<PostProcessorWrapper>(post)));
    }
    inner.add_tokens(vocabulary.added()).map_err(|e| ModelError::Tokenizer(e.to_string()))?;
    let mut ends: Vec<u32> = vocabulary.eos.into_iter().collect();
    ends.extend(vocabulary.eot.filter(|id| !ends.contains(id)));
    Ok(Tokenizer::new(inner, vocabulary.bos, ends))
}

/// The parts of a tokenizer.json.
struct Parts {
    model: BPE,
    normalizer: Option<Value>,
    pre: Option<Value>,
    decoder: Value,
    /// What post-processing is done when no token is added; null for none.
    post: Value,
    /// Whether such tokenizers add BOS unless told otherwise.
    add_bos: bool,
}

fn component<T: serde::de::DeserializeOwned>(json: Value) -> T {
    serde_json::from_value(json).expect("the parts are written in this crate, and a test builds each of them")
}

/// A post-processor that puts BOS before and EOS after a text, or `None` when neither is wanted.
fn template(vocabulary: &GgufVocabulary<'_>, bos: Option<u32>, eos: Option<u32>) -> Option<Value> {
    let special = |id: Option<u32>| Some((id?, vocabulary.text(id)?));
    let (bos, eos) = (special(bos), special(eos));
    if bos.is_none() && eos.is_none() {
        return None;
    }
    let token = |(_, text): &(u32, &str), type_id: u32| json!({"SpecialToken": {"id": text, "type_id": type_id}});
    let sequence = |id: &str, type_id: u32| -> Vec<Value> {
        let text = json!({"Sequence": {"id": id, "type_id": type_id}});
        bos.iter().map(|t| token(t, type_id)).chain([text]).chain(eos.iter().map(|t| token(t, type_id))).collect()
    };
    let tokens: serde_json::Map<String, Value> = (bos.iter().chain(&eos))
        .map(|(id, text)| ((*text).to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    let pair: Vec<Value> = sequence("A", 0).into_iter().chain(sequence("B", 1)).collect();
    Some(json!({"type": "TemplateProcessing", "single": sequence("A", 0), "pair": pair, "special_tokens": tokens}))
}

fn byte_level(meta: &Metadata<'_>, vocabulary: &GgufVocabulary<'_>) -> Result<Parts, ModelError> {
    let name = meta.string("tokenizer.ggml.pre")?.unwrap_or("default");
    let pre = pre::find(name).map_err(|e| meta.problem(&e))?;
    let Some(joined) = meta.strings("tokenizer.ggml.merges")? else {
        return Err(meta.problem("has a byte-level BPE tokenizer without merges (tokenizer.ggml.merges is missing)"));
    };
    let ids = vocabulary.ids();
    let mut merges = Vec::with_capacity(joined.len());
    for pair in joined {
        // A token may begin with the separator, so the first character is never one.
        let first = pair.chars().next().map_or(0, char::len_utf8);
        let parts =
            pair[first..].find(' ').map(|at| (pair[..first + at].to_owned(), pair[first + at + 1..].to_owned()));
        let whole =
            parts.filter(|(a, b)| ids.contains_key(a) && ids.contains_key(b) && ids.contains_key(&format!("{a}{b}")));
        let Some(merge) = whole else {
            let pair = pair.escape_debug();
            return Err(
                meta.problem(&format!("tokenizer.ggml.merges has '{pair}', whose parts or whole are no tokens"))
            );
        };
        merges.push(merge);
    }
    let model = BPE::builder().vocab_and_merges(ids, merges).ignore_merges(pre.ignore_merges);
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    Ok(Parts {
        model: model.build().map_err(|e| meta.problem(&e.to_string()))?,
        normalizer: pre.nfc.then(|| json!({"type": "NFC"})),
        pre: Some(pre.to_json()),
        decoder: byte_level.clone(),
        post: byte_level,
        add_bos: pre.add_bos,
    })
}

fn sentence_piece(meta: &Metadata<'_>, vocabulary: &GgufVocabulary<'_>) -> Result<Parts, ModelError> {
    let scores = meta.floats("tokenizer.ggml.scores")?.unwrap_or_default();
    if scores.len() != vocabulary.tokens.len() {
        let n = vocabulary.tokens.len();
        return Err(meta.problem(&format!("has {n} tokens but {} scores (tokenizer.ggml.scores)", scores.len())));
    }
    let mergeable: Vec<bool> = vocabulary.types.iter().map(|&t| t == token_type::NORMAL).collect();
    let merges = spm::merges_from_scores(&vocabulary.tokens, scores, &mergeable);
    let mut model = BPE::builder()
        .vocab_and_merges(vocabulary.ids(), merges)
        .byte_fallback(vocabulary.types.contains(&token_type::BYTE))
        .fuse_unk(true);
    if let Some(unknown) = vocabulary.text(vocabulary.unknown) {
        model = model.unk_token(unknown.to_owned());
    }
    let prefix = meta.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let normalizers: Vec<Value> =
        prefix.then(|| json!({"type": "Prepend", "prepend": "▁"})).into_iter().chain([replace]).collect();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(Parts {
        model: model.build().map_err(|e| meta.problem(&e.to_string()))?,
        normalizer: Some(json!({"type": "Sequence", "normalizers": normalizers})),
        pre: None,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        post: Value::Null,
        add_bos: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use tailorq_format::GgufFile;
    use tailorq_format::gguf::{Array, Value};
    use tailorq_format::testing::GgufBuilder;
    use tailorq_tensor::SharedBytes;

    fn tokenizer(file: &GgufBuilder) -> Tokenizer {
        let file = GgufFile::parse(Path::new("t.gguf"), SharedBytes::from_vec(file.build())).unwrap();
        let meta = Metadata::new(&file);
        from_gguf(&meta, &GgufVocabulary::read(&meta).unwrap()).unwrap()
    }

    /// Unknown, BOS, EOS, 256 bytes, then pieces with falling scores.
    fn sentence_piece_file() -> GgufBuilder {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
        tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
        let mut types = vec![2, 3, 3];
        types.extend([6; 256]);
        tokens.extend(["\u{2581}a", "ab", "\u{2581}ab", "a", "b", "c", "\u{2581}"].map(String::from));
        types.resize(tokens.len(), 1);
        let scores = (0..tokens.len()).map(|i| -(i as f32)).collect();
        GgufBuilder::new()
            .str("tokenizer.ggml.model", "llama")
            .strings("tokenizer.ggml.tokens", &tokens)
            .i32s("tokenizer.ggml.token_type", &types)
            .value("tokenizer.ggml.scores", Value::Array(Array::F32(scores)))
            .u32("tokenizer.ggml.bos_token_id", 1)
            .u32("tokenizer.ggml.eos_token_id", 2)
            .u32("tokenizer.ggml.unknown_token_id", 0)
    }

    #[test]
    fn sentence_piece_with_bytes_and_prefix() {
        let t = tokenizer(&sentence_piece_file());
        let (a_, ab, ab_, c, space) = (259, 260, 261, 264, 265);
        // The best pair goes first, "\u{2581}a" before "ab", and its piece takes part in the next.
        assert_eq!(t.encode("ab", true).unwrap(), [1, ab_], "a prefix space, BOS, and merges by score");
        assert_eq!(t.encode("cab c", false).unwrap(), [space, c, ab, space, c]);
        // U+00E9 is no piece: its two bytes.
        assert_eq!(t.encode("cé", false).unwrap(), [space, c, 3 + 0xc3, 3 + 0xa9]);
        assert_eq!(t.decode(&[1, a_, 263, space, c, 3 + 0xc3, 3 + 0xa9, 2], true).unwrap(), "ab cé");
        assert_eq!((t.bos, t.eos.as_slice()), (Some(1), &[2][..]));
        let again = tokenizers::Tokenizer::from_bytes(t.to_json().unwrap()).unwrap();
        assert_eq!(again.encode_fast("cab é</s>", true).unwrap().get_ids(), t.encode("cab é</s>", true).unwrap());
    }

    #[test]
    fn bos_and_prefix_can_be_switched_off() {
        let file = sentence_piece_file()
            .bool("tokenizer.ggml.add_bos_token", false)
            .bool("tokenizer.ggml.add_eos_token", true)
            .bool("tokenizer.ggml.add_space_prefix", false);
        assert_eq!(tokenizer(&file).encode("c", true).unwrap(), [264, 2]);
    }

    #[test]
    fn llama_3_adds_bos_by_itself() {
        let file = GgufBuilder::new()
            .str("tokenizer.ggml.model", "gpt2")
            .str("tokenizer.ggml.pre", "llama-bpe")
            .strings("tokenizer.ggml.tokens", &["a", "b", "ab", "<|bos|>", "<|eot_id|>"])
            .i32s("tokenizer.ggml.token_type", &[1, 1, 1, 3, 3])
            .strings("tokenizer.ggml.merges", &["a b"])
            .u32("tokenizer.ggml.bos_token_id", 3);
        let t = tokenizer(&file);
        assert_eq!(t.encode("abb", true).unwrap(), [3, 2, 1]);
        assert_eq!(t.encode("abb", false).unwrap(), [2, 1]);
        assert_eq!(t.eos, [4]);
    }
}
