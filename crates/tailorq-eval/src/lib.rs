//! Evaluation: what a model can still do, measured. Perplexity and the divergence from a reference model; a task is one
//! file and one line in [`task::ALL`].
//!
//! Nothing here knows how a model was made: an original and a quantized model are scored by the same code.

mod error;
mod online;
mod perplexity;
pub mod sql;
pub mod task;
mod windows;

pub use error::EvalError;
pub use perplexity::{Divergence, Perplexity, PerplexityTask, divergence, perplexity, same_tokens};
pub use task::{Progress, Subject, Task, TaskOptions, TaskResult};
pub use windows::WindowOptions;
