//! What can go wrong while quantizing: every message names the layer, the place in it and a remedy.

use crate::allocate::AllocateError;
use tailorq_model::TapeError;
use tailorq_tensor::{LayerId, PackError};
use thiserror::Error;

/// Errors of calibration and quantization.
#[derive(Debug, Error)]
pub enum QuantError {
    /// A weight is NaN or infinite.
    #[error("weight at row {row}, column {col} is {value}: the checkpoint is damaged, fetch it again")]
    NonFiniteWeight {
        /// Output.
        row: usize,
        /// Input.
        col: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// The grid of a group would need a scale that the layout cannot hold.
    #[error(
        "row {row}, group {group} needs a scale of {scale}, above the largest that is stored (65504): use more bits, or check the checkpoint for absurd weights"
    )]
    ScaleOverflow {
        /// Output.
        row: usize,
        /// Group along the input.
        group: usize,
        /// The scale in f32; infinite when the range itself overflows.
        scale: f32,
    },
    /// A value is stored at 16 bits and does not fit.
    #[error("the value at row {row}, column {col} is {value}, beyond half precision ({largest}): quantize this layer")]
    HalfOverflow {
        /// Output.
        row: usize,
        /// Input.
        col: usize,
        /// The value.
        value: f32,
        /// The largest that half precision holds.
        largest: f32,
    },
    /// The method needs squared gradients and got none.
    #[error("{quantizer} needs the squared gradients of the task's loss: give calibration data, or use rtn")]
    SquareMissing {
        /// The method.
        quantizer: &'static str,
    },
    /// The method needs the Hessian of the layer's inputs and got none.
    #[error("{quantizer} needs calibration data (the Hessian of the layer's inputs): give some, or use rtn")]
    HessianMissing {
        /// The method.
        quantizer: &'static str,
    },
    /// The method judges by held-out sequences and got none.
    #[error("{quantizer} holds calibration items out to judge by: give at least two items")]
    HeldOutMissing {
        /// The method.
        quantizer: &'static str,
    },
    /// The Hessian holds NaN or infinity.
    #[error(
        "the Hessian is not finite at ({row}, {col}): activations overflowed on the calibration data; leave out the sequences that cause it, or use rtn"
    )]
    HessianNotFinite {
        /// Row in the lower triangle.
        row: usize,
        /// Column in the lower triangle.
        col: usize,
    },
    /// A setting is out of its range.
    #[error("{0}")]
    Settings(String),
    /// There are no calibration tokens at all.
    #[error("the calibration data holds no tokens: give at least one sequence that is not empty")]
    NoCalibration,
    /// The loss of the calibration data is NaN or infinite.
    #[error(
        "the loss on the calibration data is {loss}: activations overflowed; leave out the sequences that cause it"
    )]
    LossNotFinite {
        /// The loss.
        loss: f64,
    },
    /// Statistics of a layer hold NaN or infinity.
    #[error(
        "statistics of {layer} are not finite: activations or gradients overflowed on the calibration data; leave out the sequences that cause it"
    )]
    StatisticsNotFinite {
        /// The layer.
        layer: LayerId,
    },
    /// Block inputs could not be kept.
    #[error(transparent)]
    Tape(#[from] TapeError),
    /// A task metric that the caller brought could not be measured.
    #[error("the task metric could not be measured: {0}")]
    Metric(String),
    /// There is no plan.
    #[error(transparent)]
    Allocate(#[from] AllocateError),
    /// The caller asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// The result does not form a packed matrix.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// Any of the above, in one layer.
    #[error("{layer} ({tensor}): {source}")]
    Layer {
        /// The layer.
        layer: LayerId,
        /// The tensor's name in the checkpoint.
        tensor: String,
        /// What happened there.
        source: Box<QuantError>,
    },
}
