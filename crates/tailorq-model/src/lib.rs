//! Language models as declarations: configuration, weights, tokenizer, chat template, forward, backward.

pub mod arch;
mod backward;
mod config;
mod decoder;
mod error;
mod forward;
mod kv;
mod load;
mod model;
mod rope;
mod tape;
mod template;
#[doc(hidden)]
pub mod testing;
mod tokenizer;
mod workspace;

pub use arch::{Architecture, Bias, LinearDecl};
pub use backward::{LossGradient, Tap, Target, next_token_targets};
pub use config::{ModelConfig, RopeScaling};
pub use decoder::{Decoder, DecoderError, DecoderSize, Decoders};
pub use error::ModelError;
pub use forward::{Batch, BlockStage};
pub use kv::KvCache;
pub use load::{ModelFiles, OpenTimes, OpenedModel, Select, data_set_files, open};
pub use model::{Block, Linear, Model};
pub use tape::{Spill, Tape, TapeError};
pub use template::{ChatMessage, ChatTemplate};
pub use tokenizer::Tokenizer;
pub use workspace::Workspace;
