//! Text of tokens that arrive one by one.

use super::Tokenizer;
use crate::error::ModelError;

/// Tokens after which an unfinished character is given up as broken: no UTF-8 character has more bytes than 4, and no
/// token holds less than one of them.
const MAX_HELD: usize = 8;

/// Turns a stream of tokens into a stream of text; the bytes of an unfinished character are held back.
///
/// A token's text may depend on the token before it (a leading space), so each step decodes the last whole piece
/// together with what came after it and gives out what is new.
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    /// Number of leading `ids` whose text has been given out; they are kept as context.
    given: usize,
}

impl<'a> TokenStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        TokenStream { tokenizer, skip_special, ids: Vec::new(), given: 0 }
    }

    /// Takes the next token and returns the text that has become certain, often "" in the middle of a character.
    pub fn push(&mut self, id: u32) -> Result<String, ModelError> {
        self.ids.push(id);
        let text = self.pending()?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() - self.given < MAX_HELD {
            return Ok(String::new());
        }
        if !text.is_empty() {
            self.ids.drain(..self.given);
            self.given = self.ids.len();
        }
        Ok(text)
    }

    /// What is still held back at the end, broken characters as U+FFFD.
    pub fn finish(mut self) -> Result<String, ModelError> {
        let text = self.pending()?;
        self.ids.clear();
        Ok(text)
    }

    /// Text of the tokens not yet given out.
    fn pending(&self) -> Result<String, ModelError> {
        let before = self.tokenizer.decode(&self.ids[..self.given], self.skip_special)?;
        let mut all = self.tokenizer.decode(&self.ids, self.skip_special)?;
        // Decoders may clean up across tokens; then the longest common beginning is what has been given out.
        let common = all.char_indices().zip(before.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
        Ok(all.split_off(common.unwrap_or(before.len().min(all.len()))))
    }
}
