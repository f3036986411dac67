//! The methods: dense weights in, a packed matrix (or 16-bit values) out. A new method is one file and one line in [`ALL`].
//!
//! Methods whose own format is not among the layouts are *simulated*: the values that their format would give back are
//! stored at 16 bits, rounded to f16, and [`Quantized::counted_bits`] tells what the format would take, all of it.

mod aligned;
mod awq;
mod best;
mod billm;
mod feedback;
mod gptq;
mod grid;
mod keep_half;
mod kept;
mod levels;
mod loss;
mod on_device;
mod pb_llm;
mod rotated;
mod rows;
mod rtn;
mod shared;
mod simulated;
mod slim_llm;
mod spqr;
mod squeezellm;
mod stored;

pub use aligned::{Aligned, AlignedSettings, Saliency, Salient, Scope, Unit};
pub use awq::Awq;
pub use best::Best;
pub use billm::BiLlm;
pub use gptq::Gptq;
pub use grid::{ClipSearch, Grid, GridRule, ScaleOverflow};
pub use keep_half::Half;
pub use levels::Levels;
pub use loss::proxy_loss;
pub use pb_llm::PbLlm;
pub use rtn::Rtn;
pub use shared::{OfHessian, SharedWork};
pub use slim_llm::SlimLlm;
pub use spqr::SpQr;
pub use squeezellm::SqueezeLlm;
pub use stored::QuantizedWeight;

use crate::{LayerPlan, LayerSettings, QuantError};
use serde::{Deserialize, Serialize};
use std::fmt;
use tailorq_kernels::Device;
use tailorq_tensor::{Matrix, Slot};

/// All methods, in the order of help texts.
pub const ALL: &[&dyn Quantizer] = &[
    &Rtn,
    &Gptq,
    &Best,
    &Aligned { by_task: false },
    &Aligned { by_task: true },
    &Half,
    &SlimLlm,
    &SpQr,
    &SqueezeLlm,
    &Awq,
    &BiLlm,
    &PbLlm,
];

/// The method of that name.
pub fn find(name: &str) -> Option<&'static dyn Quantizer> {
    ALL.iter().copied().find(|q| q.name() == name)
}

/// Turns a weight matrix into a quantized one.
pub trait Quantizer: Sync {
    /// Name in recipes and on the command line.
    fn name(&self) -> &'static str;

    /// Which statistics of the inputs [`Quantizer::quantize`] reads.
    fn needs(&self) -> Needs;

    /// Whether the result is stored at 16 bits a weight, whatever the layout of the settings.
    fn stores_half(&self) -> bool {
        false
    }

    /// Whether the settings may ask for an input transform, and for a codebook.
    fn rotates(&self) -> bool {
        false
    }

    /// Of methods with a format of their own that is not stored: [`Quantized::counted_bits`] of a `[rows, cols]` matrix, known
    /// before there is one. Exact but for what only the data decides, where it is the usual: SpQR's outliers, and how the widths
    /// of SliM-LLM lie at a matrix's last columns.
    fn counted_bits(&self, _shape: (usize, usize), _settings: &LayerSettings) -> Option<u64> {
        None
    }

    /// Quantizes `weights` `[out, in]`. Elements that the plan keeps end with their value at 16 bits and have no say in the
    /// grid of the others. Statistics that [`Quantizer::needs`] names are present, or it is an error.
    /// Whatever it does beyond the settings (raised damping, a fallback) is in the notes. The result does not depend on
    /// the number of threads.
    fn quantize(
        &self,
        device: &dyn Device,
        weights: &Matrix,
        stats: &LayerStats<'_>,
        plan: &LayerPlan,
    ) -> Result<Quantized, QuantError>;
}

/// The statistics that a method reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The sum of `x x^T` over the calibration tokens.
    pub hessian: bool,
    /// The sum over calibration samples of the squared gradients of the weights.
    pub square: bool,
    /// A part of the calibration sequences held out of the Hessian, and the Hessian of inputs of one length.
    pub held_out: bool,
}

/// What the held-out sequences say of a layer's inputs.
#[derive(Clone, Copy, Debug)]
pub struct HeldOut<'a> {
    /// Lower triangle of the sum of `x x^T`, `[in, in]`, weighed as the Hessian is.
    pub hessian: &'a Matrix,
    /// Tokens in that sum.
    pub n_tokens: usize,
}

/// What calibration saw of a layer's inputs.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerStats<'a> {
    /// Lower triangle (diagonal included) of the sum of `x x^T`, `[in, in]`; the strict upper triangle is not read.
    pub hessian: Option<&'a Matrix>,
    /// Tokens in that sum.
    pub n_tokens: usize,
    /// The sum over samples of `(dL/dW)^2`, `[out, in]`: up to a factor the diagonal of the Fisher information.
    pub square: Option<&'a Matrix>,
    /// Sequences that are not in `hessian`.
    pub held_out: Option<HeldOut<'a>>,
    /// As `hessian`, with all inputs brought to one length.
    pub normalised: Option<&'a Matrix>,
    /// Which linear of its block it is, where that is known.
    pub slot: Option<Slot>,
    /// What was made of the Hessian for another linear that reads the same input.
    pub shared: Option<OfHessian<'a>>,
}

/// A quantized layer.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// What is stored.
    pub weight: QuantizedWeight,
    /// `tr(E H E^T) / n_tokens` with `E = W - Q`: the mean squared error of the layer's output, summed over outputs.
    /// `None` without a Hessian.
    pub proxy_loss: Option<f64>,
    /// `|W - Q|_F / |W|_F`; 0 for a matrix of zeros.
    pub relative_error: f64,
    /// What was done beyond the settings.
    pub notes: Vec<Note>,
    /// Of a simulated method: the bits that its own format would take for the whole matrix, with every scale, bitmap and
    /// index. `None` where the format is the one that is stored.
    pub counted_bits: Option<u64>,
}

/// Something a reader of the report should know about one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Note {
    /// The Hessian could not be factored at damping `from`, so `to` was tried.
    DampingRaised {
        /// Fraction of the mean diagonal that failed.
        from: f64,
        /// Fraction tried next.
        to: f64,
    },
    /// No damping helped: the layer is rounded to nearest.
    FellBackToRtn {
        /// The last damping tried.
        damping: f64,
    },
    /// Which of several ways was taken, and what it and rounding to nearest lose on held-out sequences.
    Chosen {
        /// The way.
        choice: String,
        /// `tr(E H E^T)` a token with it.
        held_out_loss: f64,
        /// The same of rounding to nearest.
        rounding_loss: f64,
    },
    /// The Hessian could not be factored for it: what quantized predecessors did is not made up for.
    DriftIgnored,
    /// Inputs that were zero on all calibration tokens; their weights are rounded to nearest.
    DeadColumns {
        /// How many.
        count: usize,
    },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Note::DampingRaised { from, to } => {
                write!(f, "Hessian not positive definite at damping {from}, raised to {to}")
            }
            Note::FellBackToRtn { damping } => {
                write!(f, "Hessian not positive definite even at damping {damping}: rounded to nearest instead")
            }
            Note::Chosen { choice, held_out_loss, rounding_loss } => {
                write!(
                    f,
                    "chose {choice}: loss {held_out_loss:.4e} on held-out sequences, rounding {rounding_loss:.4e}"
                )
            }
            Note::DriftIgnored => write!(f, "Hessian not positive definite: the drift of the inputs is left as it is"),
            Note::DeadColumns { count } => write!(f, "{count} inputs were never active on the calibration data"),
        }
    }
}

/// Refuses an input transform and codebooks, for methods that have no use for them.
fn refuse_transform(name: &str, settings: &LayerSettings) -> Result<(), QuantError> {
    match settings.transform {
        None if settings.has_codebook() => {
            Err(QuantError::Settings(format!("{name} knows no codebooks: use an affine grid, or rtn or gptq")))
        }
        None => Ok(()),
        Some(_) => {
            Err(QuantError::Settings(format!("{name} knows no input transform: leave it out, or use rtn or gptq")))
        }
    }
}

/// The damping must be a usable number, whichever method reads it.
fn check_settings(settings: &LayerSettings) -> Result<(), QuantError> {
    if settings.has_codebook() && !settings.layout.has_codebooks() {
        Err(QuantError::Settings("codebooks have no zeros: ask for a symmetric layout with them".into()))
    } else if settings.damping.is_finite() && settings.damping >= 0.0 {
        Ok(())
    } else {
        Err(QuantError::Settings(format!(
            "damping is {}: use a finite fraction that is not negative, such as 0.01",
            settings.damping
        )))
    }
}
