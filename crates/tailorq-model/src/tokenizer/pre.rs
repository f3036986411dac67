//! How byte-level BPE tokenizers cut text before merging, by the name that GGUF files give it.
//!
//! A GGUF file says only `tokenizer.ggml.pre = "qwen2"`; the patterns are those of the `tokenizer.json` that the
//! models were published with.

use serde_json::{Value, json};

/// What a `tokenizer.ggml.pre` stands for.
pub(super) struct PreTokenizer {
    /// The names.
    names: &'static [&'static str],
    /// How text is cut.
    cut: Cut,
    /// Text is normalised to NFC first.
    pub nfc: bool,
    /// A piece that is a token is taken as it is, whatever the merges say.
    pub ignore_merges: bool,
    /// BOS is added unless the file says otherwise.
    pub add_bos: bool,
}

enum Cut {
    /// GPT-2's own pattern, after digits have been cut off one by one if so.
    Gpt2 { single_digits: bool },
    /// Patterns applied one after the other to the pieces so far.
    Patterns(&'static [&'static str]),
}

/// Qwen2: as Llama 3, but digits stand alone.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// What llama.cpp does for files that name no pattern.
const DEFAULT: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

const KNOWN: &[PreTokenizer] = &[
    PreTokenizer {
        names: &["default"],
        cut: Cut::Patterns(&DEFAULT),
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["gpt-2", "gpt2"],
        cut: Cut::Gpt2 { single_digits: false },
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["smollm"],
        cut: Cut::Gpt2 { single_digits: true },
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen"],
        cut: Cut::Patterns(&[QWEN2]),
        nfc: true,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        cut: Cut::Patterns(&[LLAMA3]),
        nfc: false,
        ignore_merges: true,
        add_bos: true,
    },
    PreTokenizer { names: &["tekken"], cut: Cut::Patterns(&[TEKKEN]), nfc: false, ignore_merges: true, add_bos: true },
];

/// The pre-tokenizer called `name`, or a message that lists what exists.
pub(super) fn find(name: &str) -> Result<&'static PreTokenizer, String> {
    KNOWN.iter().find(|p| p.names.contains(&name)).ok_or_else(|| {
        let names: Vec<_> = KNOWN.iter().flat_map(|p| p.names).copied().collect();
        format!(
            "the pre-tokenizer '{name}' is not known (known: {}); use the Hugging Face directory of this model instead",
            names.join(", ")
        )
    })
}

impl PreTokenizer {
    /// The `pre_tokenizer` of a tokenizer.json.
    pub(super) fn to_json(&self) -> Value {
        let byte_level = |use_regex| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        match self.cut {
            Cut::Gpt2 { single_digits: false } => byte_level(true),
            Cut::Gpt2 { single_digits: true } => {
                json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level(true)]})
            }
            Cut::Patterns(patterns) => {
                let split = |p: &&str| json!({"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": false});
                let steps: Vec<_> = patterns.iter().map(split).chain([byte_level(false)]).collect();
                json!({"type": "Sequence", "pretokenizers": steps})
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _, PreTokenizerWrapper};

    fn pieces(name: &str, text: &str) -> Vec<String> {
        let wrapper: PreTokenizerWrapper = serde_json::from_value(find(name).unwrap().to_json()).unwrap();
        let mut string = PreTokenizedString::from(text);
        wrapper.pre_tokenize(&mut string).unwrap();
        string.get_splits(OffsetReferential::Original, OffsetType::Byte).into_iter().map(|s| s.0.to_owned()).collect()
    }

    #[test]
    fn every_pattern_compiles() {
        for known in KNOWN {
            assert!(!pieces(known.names[0], "It's 1234 lines,\n\n  and more…").is_empty(), "{}", known.names[0]);
        }
        assert!(find("chameleon").err().unwrap().contains("llama-bpe"));
    }

    #[test]
    fn digits_are_cut_as_the_models_were_trained() {
        assert_eq!(pieces("smollm", "in 2024"), ["in", "Ġ", "2", "0", "2", "4"]);
        assert_eq!(pieces("qwen2", "in 2024"), ["in", "Ġ", "2", "0", "2", "4"]);
        assert_eq!(pieces("llama-bpe", "in 2024"), ["in", "Ġ", "202", "4"]);
        assert_eq!(pieces("gpt-2", "in 2024"), ["in", "Ġ2024"]);
        assert_eq!(pieces("tekken", "HelloWorld"), ["Hello", "World"]);
    }
}
