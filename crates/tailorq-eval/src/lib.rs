//! Evaluation: what a model can still do, measured. Perplexity and the divergence from a reference model; a task is one
//! file and one line in [`task::ALL`].
//!
//! Nothing here knows how a model was made: an original and a quantized model are scored by the same code.

mod answers;
mod cache;
mod calibration;
mod choice;
mod completion;
mod completion_nll;
mod corpus;
mod data;
mod error;
mod fewshot;
mod flips;
mod generation;
mod hub;
mod items;
mod likelihood;
mod llamacpp;
mod mersenne;
mod metric;
mod online;
mod parquet;
mod perplexity;
mod prompt;
mod retention;
mod rolling;
mod scored;
pub mod sql;
pub mod task;
mod wikitext;
mod windows;

pub use answers::{squad_normalized, token_f1};
pub use cache::Cache;
pub use calibration::{CalibrationItems, fingerprint, text_fingerprint};
pub use error::EvalError;
pub use items::ItemRecord;
pub use llamacpp::{LLAMA_CPP_WINDOW, LlamaCppPerplexity, llamacpp_perplexity};
pub use perplexity::{Divergence, Perplexity, divergence, perplexity, same_tokens};
pub use prompt::PromptStyle;
pub use retention::{Retention, ScoredItem, retention};
pub use rolling::{Document, ROLLING_LENGTH, RollingPerplexity, rolling_perplexity};
pub use task::{
    ItemOptions, Progress, Subject, Task, TaskOption, TaskOptions, TaskResult, higher_is_better, partly_read,
};
pub use windows::WindowOptions;
