//! GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after another, and the error of each is
//! spread over the columns still to come so that the layer's output on the calibration data changes least.
//!
//! With `H^-1 = U^T U`, column `j` leaves the error `e = (w_j - q_j) / U_jj`, and the later columns become
//! `w_k - e U_jk`. Rows are independent given `U`, so each task takes some rows through all columns: inside a block of
//! 128 columns one by one, and the rest of the matrix once a block.
//!
//! Three deviations from the reference code. The clip search weighs the error of column `j` with `1 / U_jj^2`, what it will
//! cost, where the reference weighs all alike ([`Clip::Magnitude`] does as the reference). Inputs that were never active have no say in `H`; their weights are rounded,
//! not zeroed, because the task's own prompts may use them where the calibration sample did not. And these inputs do not
//! enter the mean of the diagonal that the damping is a fraction of.

use super::grid::{Grid, GridRule, Line};
use super::rows::{Rows, at_group, check_finite, check_mask, corrected, fit_without, kept_within, quantize_rows};
use super::{LayerStats, Needs, Note, Quantized, Quantizer, Rtn, check_settings};
use crate::simd::{LANES, Simd, multiply_add, round_within};
use crate::{Clip, ElementMask, LayerPlan, LayerSettings, QuantError};
use half::f16;
use std::ops::Range;
use tailorq_kernels::{Device, Strided, StridedMut};
use tailorq_tensor::{Group, Matrix};

/// Columns of a block; groups of columns divide it.
pub(super) const BLOCK: usize = 128;

/// Attempts with ten times the damping before the layer is rounded to nearest.
const DAMPING_RETRIES: usize = 6;

/// The least damping that a retry multiplies, so that a damping of 0 can be raised at all.
const LEAST_DAMPING: f64 = 1e-4;

/// GPTQ with grids fitted as the columns come (natural order) or beforehand (by falling diagonal).
#[derive(Clone, Copy, Debug)]
pub struct Gptq;

impl Quantizer for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn needs(&self) -> Needs {
        Needs { hessian: true, ..Needs::default() }
    }

    fn quantize(
        &self,
        device: &dyn Device,
        weights: &Matrix,
        stats: &LayerStats<'_>,
        plan: &LayerPlan,
    ) -> Result<Quantized, QuantError> {
        let settings = &plan.settings;
        check_settings(settings)?;
        check_mask(weights, plan)?;
        let hessian = stats.hessian.ok_or(QuantError::HessianMissing { quantizer: self.name() })?;
        let cols = weights.cols();
        assert_eq!((hessian.rows(), hessian.cols()), (cols, cols), "the Hessian belongs to another input");
        check_hessian(hessian)?;
        let mut notes = Vec::new();
        let Some(factor) = Factor::new(device, hessian, settings, &mut notes) else {
            let mut rounded = Rtn.quantize(device, weights, stats, plan)?;
            rounded.notes.splice(0..0, notes);
            return Ok(rounded);
        };
        let job = Job::new(device, weights, plan, &factor);
        let (mut quantized, loss) = quantize_rows(weights, plan, notes, |first, n| job.rows(first, n))?;
        // The sum of differences of rounded numbers may end a hair below zero.
        quantized.proxy_loss = Some(loss.max(0.0) / stats.n_tokens.max(1) as f64);
        Ok(quantized)
    }
}

/// Looks at the whole lower triangle: a NaN would otherwise end as codes without any sign of it.
pub(super) fn check_hessian(hessian: &Matrix) -> Result<(), QuantError> {
    for row in 0..hessian.rows() {
        if let Some(col) = hessian.row(row)[..=row].iter().position(|h| !h.is_finite()) {
            return Err(QuantError::HessianNotFinite { row, col });
        }
    }
    Ok(())
}

/// The damped inverse Hessian's factor, in the order in which columns are quantized.
pub(super) struct Factor {
    /// Upper triangular, `H^-1 = U^T U`.
    pub(super) upper: Matrix,
    /// `1 / U_jj`.
    pub(super) inverse_diagonal: Vec<f32>,
    /// Original column of each step; `None` is the natural order.
    order: Option<Vec<usize>>,
    /// By step: the input was never active.
    pub(super) dead: Vec<bool>,
    /// What was added to the diagonal.
    pub(super) added: f64,
}

impl Factor {
    /// Factors the Hessian, with more and more damping where it has to be; `None` when none of it helped. What happened
    /// beyond the settings is in `notes`.
    pub(super) fn new(
        device: &dyn Device,
        hessian: &Matrix,
        settings: &LayerSettings,
        notes: &mut Vec<Note>,
    ) -> Option<Self> {
        let cols = hessian.cols();
        let diagonal: Vec<f32> = (0..cols).map(|i| hessian.row(i)[i]).collect();
        let n_dead = diagonal.iter().filter(|d| **d == 0.0).count();
        if n_dead > 0 {
            notes.push(Note::DeadColumns { count: n_dead });
        }
        let sum: f64 = diagonal.iter().map(|d| f64::from(*d)).sum();
        let mean = if sum > 0.0 { sum / (cols - n_dead) as f64 } else { 1.0 };
        let order = settings.act_order.then(|| {
            let mut order: Vec<usize> = (0..cols).collect();
            // Stable, so that equal diagonals keep their order.
            order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
            order
        });
        let mut damping = settings.damping;
        for attempt in 0..=DAMPING_RETRIES {
            let mut upper = damped(hessian, order.as_deref(), mean, damping * mean);
            if device.inverse_cholesky_upper(&mut upper).is_ok() {
                let inverse_diagonal: Vec<f32> = (0..cols).map(|j| 1.0 / upper.row(j)[j]).collect();
                // A factor of a matrix at the edge of f32 may overflow without a bad pivot.
                if inverse_diagonal.iter().all(|d| d.is_finite() && *d > 0.0) {
                    let dead = (0..cols).map(|j| diagonal[original(order.as_deref(), j)] == 0.0).collect();
                    return Some(Factor { upper, inverse_diagonal, order, dead, added: damping * mean });
                }
            }
            if attempt < DAMPING_RETRIES {
                let raised = damping.max(LEAST_DAMPING) * 10.0;
                notes.push(Note::DampingRaised { from: damping, to: raised });
                damping = raised;
            }
        }
        notes.push(Note::FellBackToRtn { damping });
        None
    }

    /// `1 / U_jj^2` by original column, brought to a mean of 1: rounding column `j` with the error `e` adds `e^2 / U_jj^2`
    /// to the objective (Frantar et al. 2022, equation 2), once later columns have made up for what they can.
    pub(super) fn importance(&self) -> Vec<f32> {
        let squares = self.inverse_diagonal.iter().map(|d| f64::from(*d).powi(2));
        let mean = squares.clone().sum::<f64>() / self.inverse_diagonal.len().max(1) as f64;
        let mut importance = vec![0.0; self.inverse_diagonal.len()];
        for (j, square) in squares.enumerate() {
            importance[original(self.order.as_deref(), j)] = (square / mean) as f32;
        }
        importance
    }
}

/// The original column of step `j`.
fn original(order: Option<&[usize]>, j: usize) -> usize {
    order.map_or(j, |o| o[j])
}

/// The lower triangle of the Hessian in quantization order, with `added` on the diagonal. Inputs that were never active
/// get the mean diagonal instead: they stay independent of all others, whatever their value, and well scaled.
fn damped(hessian: &Matrix, order: Option<&[usize]>, mean: f64, added: f64) -> Matrix {
    let cols = hessian.cols();
    let mut h = Matrix::zeros(cols, cols);
    for i in 0..cols {
        let row = h.row_mut(i);
        match order {
            None => row[..=i].copy_from_slice(&hessian.row(i)[..=i]),
            Some(order) => {
                for (value, &b) in row.iter_mut().zip(&order[..=i]) {
                    *value = hessian.row(order[i].max(b))[order[i].min(b)];
                }
            }
        }
        let diagonal = if row[i] == 0.0 { mean } else { f64::from(row[i]) };
        row[i] = (diagonal + added) as f32;
    }
    h
}

/// What all tasks of one layer share.
struct Job<'a> {
    device: &'a dyn Device,
    weights: &'a Matrix,
    settings: &'a LayerSettings,
    kept: Option<&'a ElementMask>,
    factor: &'a Factor,
    rule: GridRule,
    /// One factor an input, in the original order, for the clip search; empty without one by the Hessian.
    importance: Vec<f32>,
    group_len: usize,
    /// Grids are fitted on the original weights before any column is rounded.
    static_grids: bool,
    simd: Simd,
}

impl<'a> Job<'a> {
    fn new(device: &'a dyn Device, weights: &'a Matrix, plan: &'a LayerPlan, factor: &'a Factor) -> Self {
        let settings = &plan.settings;
        Job {
            device,
            weights,
            settings,
            kept: plan.kept.as_deref(),
            factor,
            rule: GridRule::new(settings.layout, settings.clip),
            importance: if settings.clip == Clip::Hessian { factor.importance() } else { Vec::new() },
            group_len: settings.layout.group.len(weights.cols()),
            // A group that is a whole row starts before anything has changed, so both ways give the same grid.
            static_grids: settings.act_order || settings.layout.group == Group::Row,
            simd: Simd::detect(),
        }
    }

    /// The factors of some inputs for the clip search.
    fn importance(&self, inputs: Range<usize>) -> Option<&[f32]> {
        (!self.importance.is_empty()).then(|| &self.importance[inputs])
    }

    /// Quantizes the rows `first..first + n`.
    fn rows(&self, first: usize, n: usize) -> Result<Rows, QuantError> {
        check_finite(self.weights, first, n)?;
        let cols = self.weights.cols();
        let mut task = Task {
            first,
            n,
            rows: Rows::new(n, cols, self.settings),
            current: self.in_order(first, n),
            kept: self.kept_steps(first, n),
            grids: Vec::new(),
            errors: vec![0.0; n * BLOCK],
            factor_block: vec![0.0; BLOCK * BLOCK],
        };
        if self.static_grids {
            self.fit_static(&mut task)?;
        }
        for start in (0..cols).step_by(BLOCK) {
            let block = start..(start + BLOCK).min(cols);
            self.copy_factor_block(&block, &mut task.factor_block);
            for r in 0..n {
                self.block_of_row(&mut task, r, &block)?;
            }
            self.update_rest(&mut task, &block);
        }
        Ok(task.rows)
    }

    /// A copy of the rows with columns in the order of quantization.
    fn in_order(&self, first: usize, n: usize) -> Vec<f32> {
        let cols = self.weights.cols();
        let rows = &self.weights.data()[first * cols..(first + n) * cols];
        match &self.factor.order {
            None => rows.to_vec(),
            Some(order) => rows.chunks_exact(cols.max(1)).flat_map(|row| order.iter().map(|&c| row[c])).collect(),
        }
    }

    /// By row, ascending: the steps at which kept columns come. Empty when nothing is kept.
    fn kept_steps(&self, first: usize, n: usize) -> Vec<Vec<usize>> {
        let Some(mask) = self.kept else { return Vec::new() };
        let columns = |r: usize| mask.row(first + r).iter().map(|&c| c as usize);
        let Some(order) = &self.factor.order else { return (0..n).map(|r| columns(r).collect()).collect() };
        let mut step_of = vec![0; order.len()];
        order.iter().enumerate().for_each(|(step, &column)| step_of[column] = step);
        let sorted = |r| {
            let mut steps: Vec<usize> = columns(r).map(|c| step_of[c]).collect();
            steps.sort_unstable();
            steps
        };
        (0..n).map(sorted).collect()
    }

    fn fit_static(&self, task: &mut Task) -> Result<(), QuantError> {
        for r in 0..task.n {
            for (g, group) in self.weights.row(task.first + r).chunks(self.group_len).enumerate() {
                let inputs = g * self.group_len..g * self.group_len + group.len();
                let kept = kept_within(self.kept, task.first + r, inputs.clone());
                let grid = fit_without(&self.rule, (group, self.importance(inputs)), kept)
                    .map_err(at_group(task.first + r, g))?;
                task.rows.set_grid(r, g, grid);
                task.grids.push(grid);
            }
        }
        Ok(())
    }

    /// The diagonal block of `U` without its diagonal, zero elsewhere, `[BLOCK, BLOCK]`: the in-block update may then
    /// run over whole vectors, and columns that are done or do not exist see zeros.
    fn copy_factor_block(&self, block: &Range<usize>, out: &mut [f32]) {
        out.fill(0.0);
        for (j, row) in out.chunks_exact_mut(BLOCK).take(block.len()).enumerate() {
            let upper = &self.factor.upper.row(block.start + j)[block.start + j + 1..block.end];
            row[j + 1..block.len()].copy_from_slice(upper);
        }
    }

    /// Rounds the columns of one block in row `r` of the task, and leaves their errors for the rest of the row.
    fn block_of_row(&self, task: &mut Task, r: usize, block: &Range<usize>) -> Result<(), QuantError> {
        let cols = self.weights.cols();
        let mut state = BlockState::new(&task.current[r * cols..][block.clone()]);
        if let Some(steps) = task.kept.get(r) {
            state.keep(steps, block);
        }
        if self.static_grids {
            let grids = &task.grids[r * self.settings.layout.group.count(cols)..];
            for j in 0..block.len() {
                let column = original(self.factor.order.as_deref(), block.start + j);
                state.set_grid(j..j + 1, Line::new(grids[column / self.group_len], self.settings.layout.bits));
            }
            self.columns(&mut state, 0..block.len(), block, &task.factor_block);
        } else {
            for start in (0..block.len()).step_by(self.group_len) {
                let group = start..(start + self.group_len).min(block.len());
                let group_idx = (block.start + start) / self.group_len;
                // Grids are fitted on the way only in the natural order, where steps are inputs.
                let importance = self.importance(block.start + group.start..block.start + group.end);
                let kept = kept_within(self.kept, task.first + r, block.start + group.start..block.start + group.end);
                let grid: Grid = fit_without(&self.rule, (&state.weights[group.clone()], importance), kept)
                    .map_err(at_group(task.first + r, group_idx))?;
                task.rows.set_grid(r, group_idx, grid);
                state.set_grid(group.clone(), Line::new(grid, self.settings.layout.bits));
                self.columns(&mut state, group, block, &task.factor_block);
            }
        }
        task.errors[r * BLOCK..(r + 1) * BLOCK].copy_from_slice(&state.errors);
        self.settle(task, r, block, &state);
        Ok(())
    }

    fn columns(&self, state: &mut BlockState, columns: Range<usize>, block: &Range<usize>, factor_block: &[f32]) {
        let inverse_diagonal = &self.factor.inverse_diagonal[block.clone()];
        match self.simd {
            // SAFETY: `Simd::detect` found AVX-512 F, AVX2 and FMA on this processor.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe { columns_avx512(state, columns, factor_block, inverse_diagonal) },
            // SAFETY: `Simd::detect` found AVX2 and FMA on this processor.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => unsafe { columns_avx2(state, columns, factor_block, inverse_diagonal) },
            Simd::Portable => columns_loop::<false>(state, columns, factor_block, inverse_diagonal),
        }
    }

    /// Writes the codes to their original columns and adds up energies and loss.
    ///
    /// `W - Q = err U` with the errors as rows, hence `E (H + a I) E^T = err err^T`; what the damping `a` and the dead
    /// inputs contributed is taken off again.
    fn settle(&self, task: &mut Task, r: usize, block: &Range<usize>, state: &BlockState) {
        let order = self.factor.order.as_deref();
        let weights = self.weights.row(task.first + r);
        let (mut weight_energy, mut error_energy, mut loss) = (0.0f64, 0.0f64, 0.0f64);
        let mut corrections = Vec::new();
        let codes = task.rows.codes_mut(r);
        for j in 0..block.len() {
            let column = original(order, block.start + j);
            codes[column] = state.codes[j];
            if state.kept[j] {
                corrections.push((column, state.corrections[j]));
            }
            let weight = f64::from(weights[column]);
            let difference = weight - f64::from(state.values[j]);
            weight_energy += weight * weight;
            error_energy += difference * difference;
            if !self.factor.dead[block.start + j] {
                let error = f64::from(state.errors[j]);
                loss += error * error - self.factor.added * difference * difference;
            }
        }
        corrections.into_iter().for_each(|(column, correction)| task.rows.correct(r, column, correction));
        task.rows.weight_energy += weight_energy;
        task.rows.error_energy += error_energy;
        task.rows.loss += loss;
    }

    /// Spreads the errors of a block over all columns behind it.
    fn update_rest(&self, task: &mut Task, block: &Range<usize>) {
        let cols = self.weights.cols();
        let rest = cols - block.end;
        if rest == 0 {
            return;
        }
        let upper = &self.factor.upper.data()[block.start * cols + block.end..];
        self.device.matmul_sequential(
            -1.0,
            Strided { data: &task.errors, rows: task.n, cols: block.len(), stride: BLOCK },
            Strided { data: upper, rows: block.len(), cols: rest, stride: cols },
            1.0,
            StridedMut { data: &mut task.current[block.end..], rows: task.n, cols: rest, stride: cols },
        );
    }
}

/// One task's rows on their way.
struct Task {
    first: usize,
    n: usize,
    rows: Rows,
    /// `[n, cols]` in quantization order: original weights minus the errors spread so far.
    current: Vec<f32>,
    /// See [`Job::kept_steps`].
    kept: Vec<Vec<usize>>,
    /// `[n, groups]` when grids are static.
    grids: Vec<Grid>,
    /// `[n, BLOCK]`: `(w - q) / U_jj` of the block in work.
    errors: Vec<f32>,
    /// See [`Job::copy_factor_block`].
    factor_block: Vec<f32>,
}

/// One row's part of a block.
struct BlockState {
    weights: [f32; BLOCK],
    errors: [f32; BLOCK],
    values: [f32; BLOCK],
    codes: [u8; BLOCK],
    grids: [Line; BLOCK],
    /// Columns whose value stays at 16 bits, and what is added to their base value.
    kept: [bool; BLOCK],
    corrections: [f16; BLOCK],
}

impl BlockState {
    fn new(weights: &[f32]) -> Self {
        let no_grid = Line { scale: 0.0, inverse: 0.0, low: 0.0, high: 0.0 };
        let mut state = BlockState {
            weights: [0.0; BLOCK],
            errors: [0.0; BLOCK],
            values: [0.0; BLOCK],
            codes: [0; BLOCK],
            grids: [no_grid; BLOCK],
            kept: [false; BLOCK],
            corrections: [f16::ZERO; BLOCK],
        };
        state.weights[..weights.len()].copy_from_slice(weights);
        state
    }

    fn set_grid(&mut self, columns: Range<usize>, line: Line) {
        self.grids[columns].fill(line);
    }

    /// Marks those of the row's kept `steps` (ascending) that lie in the block.
    fn keep(&mut self, steps: &[usize], block: &Range<usize>) {
        let from = steps.partition_point(|&s| s < block.start);
        steps[from..].iter().take_while(|&&s| s < block.end).for_each(|&s| self.kept[s - block.start] = true);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn columns_avx512(state: &mut BlockState, columns: Range<usize>, factor_block: &[f32], inverse_diagonal: &[f32]) {
    columns_loop::<true>(state, columns, factor_block, inverse_diagonal);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn columns_avx2(state: &mut BlockState, columns: Range<usize>, factor_block: &[f32], inverse_diagonal: &[f32]) {
    columns_loop::<true>(state, columns, factor_block, inverse_diagonal);
}

/// Rounds `columns` of the block one after another; each error goes to all later columns of the block at once.
#[inline(always)]
fn columns_loop<const FUSED: bool>(
    state: &mut BlockState,
    columns: Range<usize>,
    factor_block: &[f32],
    inverse_diagonal: &[f32],
) {
    for j in columns {
        let (weight, grid) = (state.weights[j], state.grids[j]);
        let q = round_within(weight * grid.inverse, grid.low, grid.high);
        let mut value = q * grid.scale;
        if state.kept[j] {
            // The value as it is now, with the errors of earlier columns taken in, and not the original one: that is
            // what TACQ's authors keep.
            (state.corrections[j], value) = corrected(weight, value);
        }
        let error = (weight - value) * inverse_diagonal[j];
        state.codes[j] = (q - grid.low) as u8;
        state.values[j] = value;
        state.errors[j] = error;
        // From the vector that holds column j on: the factor is zero up to j itself. One flat loop over whole vectors;
        // a loop over vectors with a loop over lanes inside gets vectorized the wrong way round, with gathers.
        let from = j / LANES * LANES;
        for (w, u) in state.weights[from..].iter_mut().zip(&factor_block[j * BLOCK + from..(j + 1) * BLOCK]) {
            *w = multiply_add::<FUSED>(-error, *u, *w);
        }
    }
}
