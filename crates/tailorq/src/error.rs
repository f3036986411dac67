//! What can stop a run, in words that name the file and the way on.

use crate::task::retention::RetentionReport;
use std::path::PathBuf;
use tailorq_eval::EvalError;
use tailorq_format::FormatError;
use tailorq_model::ModelError;
use tailorq_quant::QuantError;
use tailorq_tensor::PackError;
use thiserror::Error;

/// Errors of the pipeline.
#[derive(Debug, Error)]
pub enum PipelineError {
    /// Opening, tokenizing or rendering failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A file could not be read or written.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A layer could not be quantized.
    #[error(transparent)]
    Quant(#[from] QuantError),
    /// A measurement failed.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// Packed parts do not fit together.
    #[error("{layer}: {source}")]
    Pack {
        /// The layer.
        layer: String,
        /// Why.
        source: PackError,
    },
    /// Embedding or head cannot be packed.
    #[error("tensor {0}")]
    Table(String),
    /// Settings that cannot work.
    #[error("{0}")]
    Settings(String),
    /// The calibration file is unusable.
    #[error("{path}: {problem}")]
    Calibration {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do about it.
        problem: String,
    },
    /// The output directory cannot be used as asked.
    #[error("{path}: {problem}")]
    Output {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong and what to do about it.
        problem: String,
    },
    /// The output directory holds a run with other settings.
    #[error("{path}: was started with other settings ({differences}): repeat those, or use --overwrite")]
    OtherRun {
        /// The directory.
        path: PathBuf,
        /// What differs.
        differences: String,
    },
    /// A recipe does not say what a recipe must, or the inputs are not those it names.
    #[error("{path}: {problem}")]
    Recipe {
        /// The recipe file.
        path: PathBuf,
        /// What is wrong and what to do about it.
        problem: String,
    },
    /// The quantized model is not as good as it had to be.
    #[error(
        "{path}: the quantized model keeps {share:.4} of the original's held-out score, and {min} was asked for: a token of {items} \
         held-out items has a probability of {after:.4} (geometric mean), {before:.4} under the original. Give it more bits (--bits, \
         --bits-per-weight), keep more weights (--method tacq, --keep) or calibrate on more items (--samples). {remains}",
        path = path.display(), share = report.share, min = report.min, items = report.items,
        after = (-report.nll).exp(), before = (-report.original_nll).exp()
    )]
    Retention {
        /// The output directory.
        path: PathBuf,
        /// What was measured.
        report: Box<RetentionReport>,
        /// What became of the model.
        remains: &'static str,
    },
    /// The user asked to stop.
    #[error("stopped; what is finished is kept, run the same command with --resume to go on")]
    Cancelled,
}

/// An I/O error as an output error, with the remedy where there is one.
pub(crate) fn output_error(path: &std::path::Path, error: &std::io::Error) -> PipelineError {
    use std::io::ErrorKind;
    let remedy = match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => ": choose a directory you may write to",
        ErrorKind::StorageFull => ": free space there or choose another --output, then run again with --resume",
        _ => "",
    };
    PipelineError::Output { path: path.to_path_buf(), problem: format!("{error}{remedy}") }
}
