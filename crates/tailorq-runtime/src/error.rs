//! What can go wrong while a model runs.

use tailorq_model::{DecoderError, ModelError};
use thiserror::Error;

/// Errors of sessions, samplers and generation.
#[derive(Debug, Error)]
pub enum RuntimeError {
    /// There is nothing to continue.
    #[error("the prompt is empty: a model needs at least one token to continue from")]
    EmptyPrompt,
    /// The sequence would grow past the context the model was trained for.
    #[error("{needed} tokens do not fit the model's context of {limit}: shorten the prompt")]
    ContextFull {
        /// Length the sequence would have.
        needed: usize,
        /// Longest sequence of the model.
        limit: usize,
    },
    /// A token id that the model does not have.
    #[error("token {id} at position {position} does not exist: the model's vocabulary has {vocab} entries")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Its place in the sequence.
        position: usize,
        /// Number of tokens the model knows.
        vocab: usize,
    },
    /// A sampling option outside its range.
    #[error("{option} is {value}: {remedy}")]
    BadOption {
        /// Name of the option.
        option: &'static str,
        /// What was given.
        value: f32,
        /// What may be given.
        remedy: &'static str,
    },
    /// The model computed NaN or only infinities.
    #[error("the model's logits hold no usable number (NaN or infinite): its weights are damaged or overflow")]
    BadLogits,
    /// The caller asked to stop in the middle of a prompt.
    #[error("interrupted")]
    Interrupted,
    /// Tokenizing or decoding failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device that decodes by itself could not.
    #[error(transparent)]
    Decoder(#[from] DecoderError),
}
