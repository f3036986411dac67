//! Error feedback: columns are rounded one after another, and the error of each is spread over the columns still to come so
//! that the layer's output on the calibration data changes least (Frantar et al. 2022, arXiv 2210.17323). How a column is
//! rounded is the method's own business.
//!
//! With `H^-1 = U^T U`, column `j` leaves the error `e = (w_j - q_j) / U_jj`, and the later columns become
//! `w_k - e U_jk`. Rows are independent given `U`, so each task takes some rows through all columns: inside a block of
//! 128 columns one by one, and the rest of the matrix once a block.

use super::Note;
use super::rows::check_finite;
use crate::simd::{LANES, Simd, multiply_add};
use crate::{ElementMask, LayerSettings, QuantError};
use std::ops::Range;
use tailorq_kernels::{Device, Strided, StridedMut};
use tailorq_tensor::Matrix;

/// Columns of a block; groups of columns divide it.
pub(super) const BLOCK: usize = 128;

/// Attempts with ten times the damping before the layer is rounded to nearest.
const DAMPING_RETRIES: usize = 6;

/// The least damping that a retry multiplies, so that a damping of 0 can be raised at all.
const LEAST_DAMPING: f64 = 1e-4;

/// Looks at the whole lower triangle: a NaN would otherwise end as codes without any sign of it.
pub(super) fn check_hessian(hessian: &Matrix) -> Result<(), QuantError> {
    for row in 0..hessian.rows() {
        if let Some(col) = hessian.row(row)[..=row].iter().position(|h| !h.is_finite()) {
            return Err(QuantError::HessianNotFinite { row, col });
        }
    }
    Ok(())
}

/// [`check_hessian`] of a matrix that may lie on the device: only one with something wrong is brought into memory, to say what.
pub(super) fn check_hessian_on(device: &dyn Device, hessian: &Matrix) -> Result<(), QuantError> {
    let sound = device.resident().is_some() && device.row_squares(hessian).iter().all(|s| s.is_finite());
    if sound { Ok(()) } else { check_hessian(hessian) }
}

/// The damped inverse Hessian's factor, in the order in which columns are quantized.
pub(super) struct Factor {
    /// Upper triangular, `H^-1 = U^T U`.
    pub(super) upper: Matrix,
    /// `1 / U_jj`.
    pub(super) inverse_diagonal: Vec<f32>,
    /// Original column of each step; `None` is the natural order.
    pub(super) order: Option<Vec<usize>>,
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
        let on_diagonal: Vec<(usize, usize)> = (0..cols).map(|i| (i, i)).collect();
        let diagonal = device.pick(hessian, &on_diagonal);
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
            let added = damping * mean;
            let mut upper = match &order {
                None if device.resident().is_some() => damped_on_device(device, (hessian, &diagonal), mean, added),
                order => damped(hessian, order.as_deref(), mean, added),
            };
            if device.inverse_cholesky_upper(&mut upper).is_ok() {
                let inverse_diagonal: Vec<f32> = device.pick(&upper, &on_diagonal).iter().map(|u| 1.0 / u).collect();
                // A factor of a matrix at the edge of f32 may overflow without a bad pivot.
                if inverse_diagonal.iter().all(|d| d.is_finite() && *d > 0.0) {
                    let dead = (0..cols).map(|j| diagonal[original(order.as_deref(), j)] == 0.0).collect();
                    return Some(Factor { upper, inverse_diagonal, order, dead, added });
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
pub(super) fn original(order: Option<&[usize]>, j: usize) -> usize {
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

/// The same in the natural order, for a matrix that stays where it is.
fn damped_on_device(device: &dyn Device, (hessian, diagonal): (&Matrix, &[f32]), mean: f64, added: f64) -> Matrix {
    let mut h = hessian.clone();
    let raised = |d: f32| (if d == 0.0 { mean } else { f64::from(d) } + added) as f32 - d;
    let on_diagonal: Vec<(usize, usize)> = (0..h.cols()).map(|i| (i, i)).collect();
    device.add_at(&mut h, &on_diagonal, &diagonal.iter().map(|&d| raised(d)).collect::<Vec<_>>());
    h
}

/// Rounds the weights of one row, column by column. A type of its own for each method, so that the loop around it is compiled
/// with the rounding inside.
pub(super) trait RoundColumn {
    /// The value that column `j` of the block ends with; `weight` is what it has become by the errors of earlier columns.
    fn round(&mut self, j: usize, weight: f32) -> f32;
}

/// What all tasks of one layer share.
pub(super) struct Feedback<'a> {
    device: &'a dyn Device,
    weights: &'a Matrix,
    pub(super) factor: &'a Factor,
    simd: Simd,
}

/// One task's rows on their way.
pub(super) struct FeedbackRows {
    /// The first row.
    pub(super) first: usize,
    /// How many.
    pub(super) n: usize,
    cols: usize,
    /// `[n, cols]` in quantization order: original weights minus the errors spread so far.
    current: Vec<f32>,
    /// `[n, BLOCK]`: `(w - q) / U_jj` of the block in work.
    errors: Vec<f32>,
    /// The diagonal block of `U` without its diagonal, zero elsewhere, `[BLOCK, BLOCK]`: the in-block update may then
    /// run over whole vectors, and columns that are done or do not exist see zeros.
    factor_block: Vec<f32>,
}

/// One row's part of a block.
pub(super) struct RowBlock {
    pub(super) weights: [f32; BLOCK],
    pub(super) errors: [f32; BLOCK],
    pub(super) values: [f32; BLOCK],
}

impl FeedbackRows {
    /// Row `r` of the task in this block, as it is before any of its columns is rounded.
    pub(super) fn weights(&self, r: usize, block: &Range<usize>) -> &[f32] {
        &self.current[r * self.cols..][block.clone()]
    }

    /// The same, to work on.
    pub(super) fn row(&self, r: usize, block: &Range<usize>) -> RowBlock {
        let mut row = RowBlock { weights: [0.0; BLOCK], errors: [0.0; BLOCK], values: [0.0; BLOCK] };
        row.weights[..block.len()].copy_from_slice(self.weights(r, block));
        row
    }

    /// Leaves a finished row's errors for [`Feedback::end_block`].
    pub(super) fn finish_row(&mut self, r: usize, row: &RowBlock) {
        self.errors[r * BLOCK..(r + 1) * BLOCK].copy_from_slice(&row.errors);
    }
}

impl<'a> Feedback<'a> {
    pub(super) fn new(device: &'a dyn Device, weights: &'a Matrix, factor: &'a Factor) -> Self {
        Feedback { device, weights, factor, simd: Simd::detect() }
    }

    /// The rows `first..first + n` before anything was rounded.
    pub(super) fn start(&self, first: usize, n: usize) -> Result<FeedbackRows, QuantError> {
        check_finite(self.weights, first, n)?;
        let (cols, current) = (self.weights.cols(), self.in_order(first, n));
        let (errors, factor_block) = (vec![0.0; n * BLOCK], vec![0.0; BLOCK * BLOCK]);
        Ok(FeedbackRows { first, n, cols, current, errors, factor_block })
    }

    /// The blocks of columns, in quantization order.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let cols = self.weights.cols();
        (0..cols).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(cols))
    }

    /// The original column of step `j`.
    pub(super) fn column(&self, j: usize) -> usize {
        original(self.factor.order.as_deref(), j)
    }

    /// `1 / U_jj` of the block's columns.
    pub(super) fn inverse_diagonal(&self, block: &Range<usize>) -> &'a [f32] {
        &self.factor.inverse_diagonal[block.clone()]
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
    pub(super) fn kept_steps(&self, mask: Option<&ElementMask>, first: usize, n: usize) -> Vec<Vec<usize>> {
        let Some(mask) = mask else { return Vec::new() };
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

    /// Makes the rows ready for a block.
    pub(super) fn begin_block(&self, rows: &mut FeedbackRows, block: &Range<usize>) {
        rows.factor_block.fill(0.0);
        for (j, row) in rows.factor_block.chunks_exact_mut(BLOCK).take(block.len()).enumerate() {
            let upper = &self.factor.upper.row(block.start + j)[block.start + j + 1..block.end];
            row[j + 1..block.len()].copy_from_slice(upper);
        }
    }

    /// Rounds some columns of the block one after another; each error goes to all later columns of the block.
    pub(super) fn columns<R: RoundColumn>(
        &self,
        rows: &FeedbackRows,
        (row, round): (&mut RowBlock, &mut R),
        columns: Range<usize>,
        block: &Range<usize>,
    ) {
        let inverse_diagonal = self.inverse_diagonal(block);
        match self.simd {
            // SAFETY: `Simd::detect` found AVX-512 F, AVX2 and FMA on this processor.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe { columns_avx512(row, round, columns, &rows.factor_block, inverse_diagonal) },
            // SAFETY: `Simd::detect` found AVX2 and FMA on this processor.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => unsafe { columns_avx2(row, round, columns, &rows.factor_block, inverse_diagonal) },
            Simd::Portable => columns_loop::<false, R>(row, round, columns, &rows.factor_block, inverse_diagonal),
        }
    }

    /// Spreads the errors of a block over all columns behind it.
    pub(super) fn end_block(&self, rows: &mut FeedbackRows, block: &Range<usize>) {
        let cols = self.weights.cols();
        let rest = cols - block.end;
        if rest == 0 {
            return;
        }
        let upper = &self.factor.upper.data()[block.start * cols + block.end..];
        self.device.matmul_sequential(
            -1.0,
            Strided { data: &rows.errors, rows: rows.n, cols: block.len(), stride: BLOCK },
            Strided { data: upper, rows: block.len(), cols: rest, stride: cols },
            1.0,
            StridedMut { data: &mut rows.current[block.end..], rows: rows.n, cols: rest, stride: cols },
        );
    }

    /// Writes a finished row's values to their original columns of `out`, a row of the matrix.
    pub(super) fn write_values(&self, row: &RowBlock, block: &Range<usize>, out: &mut [f32]) {
        block.clone().zip(&row.values).for_each(|(step, value)| out[self.column(step)] = *value);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn columns_avx512<R: RoundColumn>(
    row: &mut RowBlock,
    round: &mut R,
    columns: Range<usize>,
    u: &[f32],
    inverse: &[f32],
) {
    columns_loop::<true, R>(row, round, columns, u, inverse);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn columns_avx2<R: RoundColumn>(row: &mut RowBlock, round: &mut R, columns: Range<usize>, u: &[f32], inverse: &[f32]) {
    columns_loop::<true, R>(row, round, columns, u, inverse);
}

/// Rounds `columns` of the block one after another; each error goes to all later columns of the block at once.
#[inline(always)]
fn columns_loop<const FUSED: bool, R: RoundColumn>(
    row: &mut RowBlock,
    round: &mut R,
    columns: Range<usize>,
    factor_block: &[f32],
    inverse_diagonal: &[f32],
) {
    for j in columns {
        let weight = row.weights[j];
        let value = round.round(j, weight);
        let error = (weight - value) * inverse_diagonal[j];
        row.values[j] = value;
        row.errors[j] = error;
        // From the vector that holds column j on: the factor is zero up to j itself. One flat loop over whole vectors;
        // a loop over vectors with a loop over lanes inside gets vectorized the wrong way round, with gathers.
        let from = j / LANES * LANES;
        for (w, u) in row.weights[from..].iter_mut().zip(&factor_block[j * BLOCK + from..(j + 1) * BLOCK]) {
            *w = multiply_add::<FUSED>(-error, *u, *w);
        }
    }
}
