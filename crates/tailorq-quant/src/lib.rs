//! The workshop: from a dense weight and what calibration saw of its inputs to a quantized one.
//!
//! `plan` says what each layer shall become, `quantize` holds the methods (one file each, listed in [`quantize::ALL`]),
//! `calibrate` streams calibration sequences through the model block by block, `survey` gathers what they and the task's
//! gradients say of every weight, `signals` turns what was gathered into scores, and `allocate` scores or damages and a
//! budget into a plan. No files and no datasets here: samples
//! come in as token ids and layers go out as [`QuantizedWeight`].

pub mod allocate;
pub mod calibrate;
pub mod circuit;
mod error;
mod plan;
pub mod quantize;
pub mod signals;
mod simd;
pub mod survey;

pub use calibrate::{
    Activations, BlockQuantizer, DriftCorrection, KEPT_INPUT_BYTES, MICRO_BATCH_TOKENS, MicroBatch, QuantizedBlock,
    QuantizedLayer, Squares, TokenEnergies, TokenWeight, advance,
};
pub use circuit::{CircuitSignal, ElementRow, TopElements};
pub use error::QuantError;
pub use plan::{Clip, ElementMask, GridKind, LayerPlan, LayerSettings, TransformSettings};
pub use quantize::{AlignedSettings, HeldOut, LayerStats, Needs, Note, Quantized, QuantizedWeight, Quantizer, find};
