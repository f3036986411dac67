//! Running calibration sequences through the model, block by block, and keeping what quantizers need.

mod activations;
mod block;
mod drift;
mod hessians;
mod tokens;

pub use activations::{Activations, MICRO_BATCH_TOKENS, MicroBatch};
pub(crate) use activations::{micro_batches, shares};
pub use block::{BlockQuantizer, KEPT_INPUT_BYTES, QuantizedBlock, QuantizedLayer, Squares, TokenEnergies, advance};
pub use drift::DriftCorrection;
pub use tokens::TokenWeight;
pub(crate) use tokens::{add_hessian, energies};
