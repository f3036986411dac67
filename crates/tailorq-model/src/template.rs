//! Chat templates: Jinja as model makers write it.

use crate::error::ModelError;
use serde::{Deserialize, Serialize};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A compiled chat template with the model's special tokens.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    /// The Jinja source, for the artifact.
    pub source: String,
    /// Text of the BOS token ("" if none).
    pub bos_token: String,
    /// Text of the EOS token ("" if none).
    pub eos_token: String,
}

impl ChatTemplate {
    /// Renders a conversation; `generation_prompt` opens the assistant's turn.
    pub fn render(&self, _messages: &[ChatMessage], _generation_prompt: bool) -> Result<String, ModelError> {
        todo!()
    }
}
