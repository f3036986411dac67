//! The survey: one pass over the calibration data that gathers what scores are made of, for the model as it is.
//!
//! Forward over all samples, block after block, keeping each block's input on a tape; then the loss; then backward, the
//! last block first, each computed again from its input. When a block has seen all samples its statistics go to the
//! caller and are forgotten, so that memory holds the statistics of one block, however many there are. Without
//! anything that asks for gradients the forward pass is all there is, and blocks come first to last.
//!
//! [`StabilitySurvey`] and [`NoiseSurvey`] are passes of their own, over prompts alone: they read the outputs of blocks,
//! for scores of blocks. [`DamageSurvey`] measures what a quantized unit alone does to predictions or to a task's metric.

mod damage;
mod judged;
mod noise;
mod run;
mod several;
mod stability;
mod stats;
mod streams;

pub use crate::calibrate::TokenWeight;
pub use damage::{DamageSurvey, Measure, Metric};
pub use judged::Judged;
pub use noise::{BlockNoise, NoiseSurvey};
pub use run::{Loss, Summary, Survey, SurveySample};
pub use stability::{BlockStability, StabilitySurvey};
pub use stats::{BlockStats, GroupStats, LayerGradients, Needs};
