//! Whole layers rounded by a device that has its own way of doing it.

use super::feedback::Factor;
use super::grid::GridRule;
use super::{Note, Quantized};
use crate::{LayerPlan, QuantError};
use half::f16;
use tailorq_kernels::{ClipCandidates, Device, ErrorFeedback, KeptElements, Rounded, RoundingJob};
use tailorq_tensor::{ElementCorrections, Matrix, PackedMatrix};

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
    Ok(packed(&job, rounded, notes))
}

/// The parts put together.
fn packed(job: &RoundingJob<'_>, r: Rounded, notes: Vec<Note>) -> Result<(Quantized, f64), QuantError> {
    let (n_rows, cols) = (job.weights.rows(), job.weights.cols());
    let planes = (r.codes, r.codes_high);
    let mut matrix = PackedMatrix::from_planes(n_rows, cols, job.layout, planes, r.scales, &r.zeros)?;
    if let Some(kept) = job.kept {
        let of_row = |ends: &[usize]| {
            let columns = kept.columns[ends[0]..ends[1]].iter().map(|&c| c as usize);
            columns.zip(r.corrections[ends[0]..ends[1]].iter().copied()).collect()
        };
        let rows: Vec<Vec<(usize, f16)>> = kept.starts.windows(2).map(of_row).collect();
        matrix = matrix.with_elements(ElementCorrections::from_rows(cols, &rows)?)?;
    }
    let relative_error = if r.weight_energy > 0.0 { (r.error_energy / r.weight_energy).sqrt() } else { 0.0 };
    let weight = matrix.into();
    Ok((Quantized { weight, proxy_loss: None, relative_error, notes, counted_bits: None }, r.loss))
}
