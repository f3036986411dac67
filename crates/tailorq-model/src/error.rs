//! What can go wrong between a path and a model: every variant names file, tensor and remedy.

use std::path::PathBuf;
use thiserror::Error;

/// Errors of opening, tokenizing and rendering.
#[derive(Debug, Error)]
pub enum ModelError {
    /// A file could not be read as what it should be.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do about it.
        problem: String,
    },
    /// A tensor is missing, has the wrong shape or type, or holds NaN or infinity.
    #[error("{}: tensor '{tensor}' {problem}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in that file.
        tensor: String,
        /// What is wrong, as the rest of a sentence about the tensor, and what to do about it.
        problem: String,
    },
    /// A file is damaged or not what its name says.
    #[error(transparent)]
    Format(#[from] tailorq_format::FormatError),
    /// The architecture is not one that tailorq declares.
    #[error("{}: architecture '{found}' is not supported (supported: {supported})", path.display())]
    UnknownArchitecture {
        /// The file that names it.
        path: PathBuf,
        /// The name found.
        found: String,
        /// The names that exist.
        supported: String,
    },
    /// A hub id could not be resolved.
    #[error("{0}")]
    Hub(String),
    /// Text could not be tokenized.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template failed on these messages.
    #[error("chat template: {0}")]
    Template(String),
}
