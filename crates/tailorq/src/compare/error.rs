//! What can stop a comparison.

use crate::error::PipelineError;
use std::path::PathBuf;
use tailorq_eval::EvalError;
use tailorq_format::FormatError;
use tailorq_model::ModelError;
use thiserror::Error;

/// Errors of a comparison.
#[derive(Debug, Error)]
pub enum CompareError {
    /// The experiment file does not say what it must.
    #[error("{path}: {problem}")]
    Experiment {
        /// The file.
        path: PathBuf,
        /// The key, what is wrong with it, and what to write instead.
        problem: String,
    },
    /// The output directory cannot be used.
    #[error("{path}: {problem}")]
    Output {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong and what to do about it.
        problem: String,
    },
    /// Opening the model, or an input of all arms, failed.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// Arms failed; the others are finished and in the results.
    #[error("{} of the arms failed, the results are without them: {}", .0.len(), .0.join("; "))]
    Arms(Vec<String>),
    /// The user asked to stop.
    #[error("stopped; what is finished is kept, run the same command again to go on")]
    Stopped,
}

impl From<ModelError> for CompareError {
    fn from(error: ModelError) -> Self {
        CompareError::Pipeline(error.into())
    }
}

impl From<FormatError> for CompareError {
    fn from(error: FormatError) -> Self {
        CompareError::Pipeline(error.into())
    }
}

impl From<EvalError> for CompareError {
    fn from(error: EvalError) -> Self {
        CompareError::Pipeline(error.into())
    }
}

impl CompareError {
    /// Whether the user asked for it.
    pub(super) fn is_stop(&self) -> bool {
        matches!(
            self,
            CompareError::Stopped
                | CompareError::Pipeline(PipelineError::Cancelled | PipelineError::Eval(EvalError::Interrupted))
        )
    }

    /// An I/O error with the file that it is about.
    pub(super) fn io(path: &std::path::Path, error: &std::io::Error) -> Self {
        CompareError::Pipeline(crate::error::output_error(path, error))
    }
}
