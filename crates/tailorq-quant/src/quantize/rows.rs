//! Quantized rows on their way into a packed matrix.

use super::grid::{Grid, GridRule, ScaleOverflow};
use super::levels::Levels;
use super::{Note, Quantized};
use crate::{ElementMask, LayerPlan, LayerSettings, QuantError};
use half::f16;
use rayon::prelude::*;
use tailorq_tensor::{ElementCorrections, Matrix, PackError, PackedMatrix};

/// Rows of one task: fixed, so that the work is cut alike for any number of threads.
pub(super) const ROWS_PER_TASK: usize = 64;

/// The result of one task.
pub(super) struct Rows {
    cols: usize,
    n_groups: usize,
    /// `[rows, cols]`.
    pub(super) codes: Vec<u8>,
    scales: Vec<f16>,
    zeros: Vec<u8>,
    /// By row: what is added to the base value of each kept column, ascending.
    corrections: Vec<Vec<(usize, f16)>>,
    /// `|W|_F^2`.
    pub(super) weight_energy: f64,
    /// `|W - Q|_F^2`.
    pub(super) error_energy: f64,
    /// `tr(E H E^T)`, where the method knows it by itself.
    pub(super) loss: f64,
}

impl Rows {
    pub(super) fn new(n_rows: usize, cols: usize, settings: &LayerSettings) -> Self {
        let n_groups = settings.layout.group.count(cols);
        Rows {
            cols,
            n_groups,
            codes: vec![0; n_rows * cols],
            scales: vec![f16::ZERO; n_rows * n_groups],
            zeros: vec![0; n_rows * n_groups],
            corrections: vec![Vec::new(); n_rows],
            weight_energy: 0.0,
            error_energy: 0.0,
            loss: 0.0,
        }
    }

    /// The codes of row `r` (counted within the task).
    pub(super) fn codes_mut(&mut self, r: usize) -> &mut [u8] {
        &mut self.codes[r * self.cols..(r + 1) * self.cols]
    }

    pub(super) fn set_grid(&mut self, r: usize, group: usize, grid: Grid) {
        self.scales[r * self.n_groups + group] = grid.scale;
        self.zeros[r * self.n_groups + group] = grid.zero;
    }

    /// Elements with a correction.
    pub(super) fn n_corrections(&self) -> usize {
        self.corrections.iter().map(Vec::len).sum()
    }

    /// Notes the correction of a kept element; in any order.
    pub(super) fn correct(&mut self, r: usize, col: usize, correction: f16) {
        self.corrections[r].push((col, correction));
    }
}

/// The correction that brings `value`, the nearest point of the grid, to `weight`; and what becomes of the value.
#[inline]
pub(super) fn corrected(weight: f32, value: f32) -> (f16, f32) {
    let correction = f16::from_f32(weight - value);
    (correction, value + correction.to_f32())
}

/// The grid of a group from which the weights at `kept` (places in the group, ascending) are left out: they do not need
/// it, and their outliers would widen it.
pub(super) fn fit_without(
    rule: &GridRule,
    (weights, importance): (&[f32], Option<&[f32]>),
    kept: impl Iterator<Item = usize> + Clone,
) -> Result<Grid, ScaleOverflow> {
    let rest = |values: &[f32]| -> Vec<f32> {
        let mut kept = kept.clone().peekable();
        let is_kept = |i: &usize| kept.next_if_eq(i).is_some();
        let mut is_kept = is_kept;
        values.iter().enumerate().filter(|(i, _)| !is_kept(i)).map(|(_, v)| *v).collect()
    };
    match kept.clone().next() {
        None => rule.fit(weights, importance),
        Some(_) => rule.fit(&rest(weights), importance.map(rest).as_deref()),
    }
}

/// The codebook that the settings ask for; `importance` is one factor a column.
pub(super) fn codebook(
    weights: &Matrix,
    plan: &LayerPlan,
    importance: Option<&[f32]>,
) -> Result<Option<Levels>, QuantError> {
    let layout = plan.settings.layout;
    if !plan.settings.has_codebook() {
        return Ok(None);
    }
    check_finite(weights, 0, weights.rows())?;
    let levels = Levels::of_matrix(layout, weights, plan.kept.as_deref(), importance);
    // Which group it was is found again when it gets its own scale; the levels only need to say that there is one.
    levels.map(Some).map_err(at_group(0, 0))
}

/// The kept columns of a row that lie in `range`, counted from its beginning.
pub(super) fn kept_within(
    mask: Option<&ElementMask>,
    row: usize,
    range: std::ops::Range<usize>,
) -> impl Iterator<Item = usize> + Clone + '_ {
    let columns = mask.map_or(&[][..], |m| m.row(row));
    let from = columns.partition_point(|&c| (c as usize) < range.start);
    let to = columns.partition_point(|&c| (c as usize) < range.end);
    columns[from..to].iter().map(move |&c| c as usize - range.start)
}

/// A mask must have the shape of its matrix.
pub(super) fn check_mask(weights: &Matrix, plan: &LayerPlan) -> Result<(), QuantError> {
    let Some(mask) = plan.kept.as_deref() else { return Ok(()) };
    let fits = mask.rows() == weights.rows()
        && (0..mask.rows()).all(|r| mask.row(r).last().is_none_or(|&c| (c as usize) < weights.cols()));
    if fits {
        Ok(())
    } else {
        let (rows, cols) = (weights.rows(), weights.cols());
        Err(QuantError::Settings(format!("the kept elements are not those of a [{rows}, {cols}] matrix")))
    }
}

/// Cuts the rows into tasks, runs them on all threads, and packs the results in order. Of several errors, that of the
/// first rows is reported. The quantized matrix has no proxy loss yet; the sum of the tasks' losses comes beside it.
pub(super) fn quantize_rows(
    weights: &Matrix,
    plan: &LayerPlan,
    (notes, levels): (Vec<Note>, Option<Levels>),
    task: impl Fn(usize, usize) -> Result<Rows, QuantError> + Sync,
) -> Result<(Quantized, f64), QuantError> {
    let n_rows = weights.rows();
    let results: Vec<Result<Rows, QuantError>> = (0..n_rows.div_ceil(ROWS_PER_TASK))
        .into_par_iter()
        .map(|t| task(t * ROWS_PER_TASK, ROWS_PER_TASK.min(n_rows - t * ROWS_PER_TASK)))
        .collect();
    let with_levels = |m: PackedMatrix| match levels {
        Some(levels) => m.with_levels(levels.stored()),
        None => Ok(m),
    };
    assemble(weights, plan, notes, results.into_iter().collect::<Result<_, _>>()?, with_levels)
}

/// Packs the results of all tasks, in order, as [`quantize_rows`] does; `finish` may add to the packed matrix.
pub(super) fn assemble(
    weights: &Matrix,
    plan: &LayerPlan,
    notes: Vec<Note>,
    results: Vec<Rows>,
    finish: impl FnOnce(PackedMatrix) -> Result<PackedMatrix, PackError>,
) -> Result<(Quantized, f64), QuantError> {
    let (n_rows, cols, settings) = (weights.rows(), weights.cols(), &plan.settings);
    let mut all = Rows::new(0, cols, settings);
    for rows in results {
        all.codes.extend_from_slice(&rows.codes);
        all.scales.extend_from_slice(&rows.scales);
        all.zeros.extend_from_slice(&rows.zeros);
        all.corrections.extend(rows.corrections);
        all.weight_energy += rows.weight_energy;
        all.error_energy += rows.error_energy;
        all.loss += rows.loss;
    }
    let zeros = if settings.layout.symmetric { &[] } else { &all.zeros[..] };
    let mut matrix = PackedMatrix::pack(n_rows, cols, settings.layout, &all.codes, &all.scales, zeros)?;
    if plan.kept.is_some() || all.corrections.iter().any(|row| !row.is_empty()) {
        all.corrections.iter_mut().for_each(|row| row.sort_unstable_by_key(|(col, _)| *col));
        matrix = matrix.with_elements(ElementCorrections::from_rows(cols, &all.corrections)?)?;
    }
    let relative_error = if all.weight_energy > 0.0 { (all.error_energy / all.weight_energy).sqrt() } else { 0.0 };
    let matrix = finish(matrix)?;
    Ok((Quantized { weight: matrix.into(), proxy_loss: None, relative_error, notes, counted_bits: None }, all.loss))
}

/// An error that names the first weight of rows `first..first + n` that is NaN or infinite.
pub(super) fn check_finite(weights: &Matrix, first: usize, n: usize) -> Result<(), QuantError> {
    for row in first..first + n {
        let values = weights.row(row);
        if let Some(col) = values.iter().position(|w| !w.is_finite()) {
            return Err(QuantError::NonFiniteWeight { row, col, value: values[col] });
        }
    }
    Ok(())
}

/// Places an overflow of a group's scale.
pub(super) fn at_group(row: usize, group: usize) -> impl Fn(ScaleOverflow) -> QuantError {
    move |overflow| QuantError::ScaleOverflow { row, group, scale: overflow.scale }
}
