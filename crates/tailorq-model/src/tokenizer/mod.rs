//! Text to tokens and back.

mod gguf;
mod merges;
mod pre;
mod spm;

pub(crate) use gguf::{GgufVocabulary, from_gguf};

use crate::error::ModelError;
use std::path::Path;

/// Tokens that end a turn in chat formats; where a model has one of them as a control token, generation stops there
/// even if its configuration names only another.
const END_OF_TURN: [&str; 4] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_turn|>"];

/// A tokenizer of the `tokenizers` library, with the special tokens that generation needs.
#[derive(Clone)]
pub struct Tokenizer {
    pub(crate) inner: tokenizers::Tokenizer,
    /// Beginning of sequence, if the model has one.
    pub bos: Option<u32>,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
    /// Rows of the embedding: a token beyond them cannot be fed to the model.
    n_embedded: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json`; `bos` and `eos` come from the model's configuration, to `eos` are added the
    /// tokens that end a turn in chat formats.
    pub(crate) fn from_file(path: &Path, bos: Option<u32>, eos: Vec<u32>) -> Result<Self, ModelError> {
        let problem = |problem: String| ModelError::File { path: path.to_owned(), problem };
        let bytes = std::fs::read(path).map_err(|e| problem(format!("cannot be read: {e}")))?;
        merges::check(&bytes).map_err(problem)?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| problem(format!("is not a tokenizer that the tokenizers library reads: {e}")))?;
        Ok(Tokenizer::new(inner, bos, eos))
    }

    fn new(mut inner: tokenizers::Tokenizer, bos: Option<u32>, mut eos: Vec<u32>) -> Self {
        // Truncation and padding of a training pipeline would silently change what is measured.
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        for name in END_OF_TURN {
            let id = inner
                .token_to_id(name)
                .filter(|id| inner.get_added_tokens_decoder().get(id).is_some_and(|t| t.special));
            if let Some(id) = id.filter(|id| !eos.contains(id)) {
                eos.push(id);
            }
        }
        Tokenizer { inner, bos, eos, n_embedded: usize::MAX }
    }

    /// Tokens of `text`. `special` lets the tokenizer add its own (BOS) tokens; special tokens written in the text are
    /// always recognised.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, ModelError> {
        let encoding = self.inner.encode_fast(text, special).map_err(|e| ModelError::Tokenizer(e.to_string()))?;
        let ids = encoding.get_ids();
        match ids.iter().find(|&&id| id as usize >= self.n_embedded) {
            None => Ok(ids.to_vec()),
            Some(&id) => Err(ModelError::Tokenizer(format!(
                "the text has the token '{}' ({id}), but the model's embedding has only {} rows",
                self.token(id).unwrap_or_default(),
                self.n_embedded
            ))),
        }
    }

    /// Tells how many rows the embedding has; special tokens beyond them are forgotten.
    pub(crate) fn limit_to(&mut self, n_embedded: usize) {
        self.n_embedded = n_embedded;
        self.bos = self.bos.filter(|&id| (id as usize) < n_embedded);
        self.eos.retain(|&id| (id as usize) < n_embedded);
    }

    /// Text of tokens. `skip_special` leaves control tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, ModelError> {
        self.inner.decode(ids, skip_special).map_err(|e| ModelError::Tokenizer(e.to_string()))
    }

    /// The text of one token, for special tokens in templates.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The token whose text is `token`.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One more than the largest token id.
    pub fn n_tokens(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
    }

    /// `tokenizer.json`, for the artifact.
    pub fn to_json(&self) -> Result<String, ModelError> {
        self.inner.to_string(false).map_err(|e| ModelError::Tokenizer(e.to_string()))
    }
}
