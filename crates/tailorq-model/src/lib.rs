//! Language models as declarations: configuration, weights, tokenizer, chat template, forward.

pub mod arch;
mod config;
mod error;
mod forward;
mod kv;
mod load;
mod model;
mod rope;
mod template;
#[doc(hidden)]
pub mod testing;
mod tokenizer;

pub use arch::{Architecture, Bias, LinearDecl};
pub use config::{ModelConfig, RopeScaling};
pub use error::ModelError;
pub use forward::{Batch, BlockStage};
pub use kv::KvCache;
pub use load::{ModelFiles, OpenedModel, open};
pub use model::{Block, Linear, Model};
pub use template::{ChatMessage, ChatTemplate};
pub use tokenizer::Tokenizer;
