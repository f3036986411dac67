//! Text to tokens and back.

use crate::error::ModelError;

/// A tokenizer of the `tokenizers` library, with the special tokens that generation needs.
#[derive(Clone)]
pub struct Tokenizer {
    pub(crate) inner: tokenizers::Tokenizer,
    /// Beginning of sequence, if the model has one.
    pub bos: Option<u32>,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
}

impl Tokenizer {
    /// Tokens of `text`. `special` lets the tokenizer add its own (BOS) tokens; special tokens written in the text are
    /// always recognised.
    pub fn encode(&self, _text: &str, _special: bool) -> Result<Vec<u32>, ModelError> {
        todo!()
    }
    /// Text of tokens. `skip_special` leaves control tokens out.
    pub fn decode(&self, _ids: &[u32], _skip_special: bool) -> Result<String, ModelError> {
        todo!()
    }
    /// The text of one token, for special tokens in templates.
    pub fn token(&self, _id: u32) -> Option<String> {
        todo!()
    }
    /// `tokenizer.json`, for the artifact.
    pub fn to_json(&self) -> Result<String, ModelError> {
        todo!()
    }
}
