//! tailorq as a library: from a checkpoint, calibration text and settings to a quantized artifact.

mod inspect;
mod probe;
mod threads;

pub use inspect::{Inspection, Share, StoredMatrix, inspect};
pub use probe::{ProbeError, check_tokens, probe};
pub use tailorq_kernels::{Device, cpu, reference};
pub use tailorq_model::{ChatMessage, ChatTemplate, Model, ModelError, ModelFiles, OpenedModel, Tokenizer, open};
pub use threads::set_threads;
