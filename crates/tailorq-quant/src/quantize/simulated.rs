//! What methods have in common whose values are stored at 16 bits because their own format is not among the layouts.

use super::feedback::{Factor, check_hessian};
use super::rows::{ROWS_PER_TASK, check_finite};
use super::{LayerStats, Note, Quantized, Quantizer, Rtn, check_settings, refuse_transform};
use crate::{LayerPlan, LayerSettings, QuantError};
use half::f16;
use rayon::prelude::*;
use tailorq_kernels::Device;
use tailorq_tensor::{ElementCorrections, Matrix};

/// Refuses weights that are not finite, and settings that a simulated method would pass over in silence.
pub(super) fn check_simulated(name: &str, weights: &Matrix, plan: &LayerPlan) -> Result<(), QuantError> {
    check_settings(&plan.settings)?;
    refuse_transform(name, &plan.settings)?;
    check_finite(weights, 0, weights.rows())?;
    let problem = if plan.kept.is_some() {
        "its format has no place for other kept weights: leave out the circuit"
    } else if plan.settings.layout.symmetric {
        "its format has no symmetric grids: leave out --sym"
    } else if !plan.settings.layout.scales.is_sixteen() {
        "its format says itself how wide its scales are: leave out --scale-bits"
    } else {
        return Ok(());
    };
    Err(QuantError::Settings(format!("{name} is simulated, and {problem}")))
}

/// The Hessian, checked, and its factor; `None` when no damping helped.
pub(super) fn factored<'a>(
    device: &dyn Device,
    name: &'static str,
    (weights, stats, settings): (&Matrix, &LayerStats<'a>, &LayerSettings),
    notes: &mut Vec<Note>,
) -> Result<(&'a Matrix, Option<Factor>), QuantError> {
    let hessian = stats.hessian.ok_or(QuantError::HessianMissing { quantizer: name })?;
    let cols = weights.cols();
    assert_eq!((hessian.rows(), hessian.cols()), (cols, cols), "the Hessian belongs to another input");
    check_hessian(hessian)?;
    Ok((hessian, Factor::new(device, hessian, settings, notes)))
}

/// What is left where there is no factor: rounding to nearest, packed, with the notes that say so.
pub(super) fn rounded_instead(
    device: &dyn Device,
    (weights, stats, plan): (&Matrix, &LayerStats<'_>, &LayerPlan),
    notes: Vec<Note>,
) -> Result<Quantized, QuantError> {
    let mut rounded = Rtn.quantize(device, weights, stats, plan)?;
    rounded.notes.splice(0..0, notes);
    Ok(rounded)
}

/// Cuts the rows into tasks of fixed size and runs them on all threads. A task gets its first row and the number of its rows,
/// and returns their values `[n, cols]` with some count; the counts are added up.
pub(super) fn simulate_rows(
    weights: &Matrix,
    task: impl Fn(usize, usize) -> Result<(Vec<f32>, u64), QuantError> + Sync,
) -> Result<(Matrix, u64), QuantError> {
    let (n_rows, cols) = (weights.rows(), weights.cols());
    let results: Vec<Result<(Vec<f32>, u64), QuantError>> = (0..n_rows.div_ceil(ROWS_PER_TASK))
        .into_par_iter()
        .map(|t| task(t * ROWS_PER_TASK, ROWS_PER_TASK.min(n_rows - t * ROWS_PER_TASK)))
        .collect();
    let (mut values, mut count) = (Vec::with_capacity(n_rows * cols), 0);
    for result in results {
        let (rows, n) = result?;
        values.extend(rows);
        count += n;
    }
    Ok((Matrix::from_vec(n_rows, cols, values), count))
}

/// Bits of `n` single weights at 16 bits beside a `[rows, cols]` matrix: a value and a column each, and a count a row, as
/// [`ElementCorrections`] stores them.
pub(super) fn sparse_bits(rows: usize, cols: usize, n: u64) -> u64 {
    let index = ElementCorrections::index_bytes(cols) as u64;
    8 * (rows as u64 * index + n * (index + 2))
}

/// The nearest f16, as f32: what a parameter of a simulated format becomes in its file.
pub(super) fn as_half(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}
