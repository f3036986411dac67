//! Whole layers rounded by a device that has its own way of doing it.

use super::feedback::Factor;
use super::grid::GridRule;
use super::rows::{Rows, assemble};
use super::{Note, Quantized};
use crate::{LayerPlan, QuantError};
use tailorq_kernels::{ClipCandidates, Device, ErrorFeedback, KeptElements, RoundingJob};
use tailorq_tensor::Matrix;

/// Asks the device to round all rows by `rule`, with error feedback where there is a factor. Notes, result and loss are as
/// those of `quantize_rows`. `Err` gives the notes back: the device does not do this, or has found something that the caller's
/// own way will name.
pub(super) fn round_on_device(
    device: &dyn Device,
    (weights, plan): (&Matrix, &LayerPlan),
    (rule, importance): (&GridRule, Option<&[f32]>),
    factor: Option<&Factor>,
    notes: Vec<Note>,
) -> Result<Result<(Quantized, f64), QuantError>, Vec<Note>> {
    let declined = rule.levels.is_some() || factor.is_some_and(|f| f.order.is_some());
    if declined || weights.rows() == 0 || weights.cols() == 0 {
        return Err(notes);
    }
    let factors: Vec<f32> = rule.clip.iter().flat_map(|c| c.factors()).collect();
    let job = RoundingJob {
        weights,
        feedback: factor.map(|f| ErrorFeedback {
            upper: &f.upper,
            inverse_diagonal: &f.inverse_diagonal,
            dead: &f.dead,
            added: f.added,
        }),
        layout: plan.settings.layout,
        clip: rule.clip.map(|clip| ClipCandidates { factors: &factors, norm: clip.norm, importance }),
        kept: plan.kept.as_deref().map(|mask| {
            let (starts, columns) = mask.parts();
            KeptElements { starts, columns }
        }),
    };
    let Some(rounded) = device.round_layer(&job) else { return Err(notes) };
    let rows = Rows::rounded(weights.cols(), rounded, job.kept);
    Ok(assemble(weights, plan, notes, vec![rows], Ok))
}
