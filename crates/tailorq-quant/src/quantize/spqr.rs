//! SpQR (Dettmers et al. 2023, arXiv 2306.03078): groups of 16 inputs whose scales and zeros are themselves rounded to 3 bits,
//! in groups of 16 rows, and single weights at 16 bits where rounding would cost too much; with error feedback. Simulated.
//!
//! A weight is an outlier when its rounding adds more than [`THRESHOLD`] times the mean over columns of
//! `var(W_j) / U_jj^2` to the objective. Grids are fitted without those that are likely to become outliers: whose absence
//! lowers the rounding error of the rest of their group by more than that.
//!
//! Departures from the authors' code: second-order groups hold their minimum and step instead of zero and scale, so that
//! equal statistics survive; a group of (nearly) equal weights has a range from 0 to them, where the code takes -1 to 1 for equal ones; a matrix
//! whose rows are all alike has no outliers; inputs that were never active keep their weights.

use super::feedback::{Feedback, RoundColumn, RowBlock};
use super::grid::ScaleOverflow;
use super::rows::at_group;
use super::simulated::{as_half, check_simulated, factored, rounded_instead, simulate_rows, sparse_bits};
use super::stored::stored_at_half;
use super::{LayerStats, Needs, Quantized, Quantizer};
use crate::simd::round_within;
use crate::{LayerPlan, LayerSettings, QuantError};
use std::ops::Range;
use tailorq_kernels::Device;
use tailorq_tensor::{ElementCorrections, Matrix};

/// Inputs of a group, and rows whose groups share second-order statistics; divides a task's rows and a block's columns.
const GROUP: usize = 16;
/// Width of scales and zeros.
const STATISTIC_BITS: u32 = 3;
/// The authors' outlier threshold.
const THRESHOLD: f64 = 0.2;
/// The share of outliers that the authors' threshold comes to.
const USUAL_OUTLIERS: f64 = 0.01;
/// A range below this share of its distance from 0 is stretched to 0: its zero would be too large to store.
const NARROW: f32 = 0.05;
/// A scale below this counts as this.
const LEAST_SCALE: f32 = 1e-9;

/// Bilevel grids with outliers; of the settings it reads width, damping and the columns' order.
#[derive(Clone, Copy, Debug)]
pub struct SpQr;

impl Quantizer for SpQr {
    fn name(&self) -> &'static str {
        "spqr"
    }

    fn needs(&self) -> Needs {
        Needs { hessian: true, ..Needs::default() }
    }

    fn stores_half(&self) -> bool {
        true
    }

    /// A code for each weight, 3 + 3 bits for each row and group, four 16-bit numbers for each 16 rows and group, the outliers
    /// with their columns, and the columns' order where it is not the natural one.
    fn counted_bits(&self, shape: (usize, usize), settings: &LayerSettings) -> Option<u64> {
        let n_outliers = (USUAL_OUTLIERS * (shape.0 * shape.1) as f64) as u64;
        Some(counted_bits(shape, settings, n_outliers))
    }

    fn quantize(
        &self,
        device: &dyn Device,
        weights: &Matrix,
        stats: &LayerStats<'_>,
        plan: &LayerPlan,
    ) -> Result<Quantized, QuantError> {
        check_simulated(self.name(), weights, plan)?;
        let (mut notes, settings) = (Vec::new(), &plan.settings);
        let (_, factor) = factored(device, self.name(), (weights, stats, settings), &mut notes)?;
        let Some(factor) = factor else { return rounded_instead(device, (weights, stats, plan), notes) };
        let cols = weights.cols();
        let feedback = Feedback::new(device, weights, &factor);
        let threshold = threshold(weights, &feedback);
        let job = Job { feedback, cols, threshold, max_code: f32::from(settings.layout.bits.max_code()) };
        let (values, n_outliers) = simulate_rows(weights, |first, n| job.rows(first, n))?;
        let counted = counted_bits((weights.rows(), cols), settings, n_outliers);
        stored_at_half(device, weights, &values, stats, (notes, Some(counted)))
    }
}

fn counted_bits((rows, cols): (usize, usize), settings: &LayerSettings, n_outliers: u64) -> u64 {
    let n_groups = cols.div_ceil(GROUP);
    let codes = rows * cols * settings.layout.bits.count() as usize;
    let statistics = 2 * STATISTIC_BITS as usize * rows * n_groups + 64 * rows.div_ceil(GROUP) * n_groups;
    let order = if settings.act_order { 8 * ElementCorrections::index_bytes(cols) * cols } else { 0 };
    (codes + statistics + order) as u64 + sparse_bits(rows, cols, n_outliers)
}

/// What a rounding may add to the objective before it makes an outlier; infinite where nothing tells rows apart.
fn threshold(weights: &Matrix, feedback: &Feedback<'_>) -> f32 {
    let (rows, cols) = (weights.rows(), weights.cols());
    let mut sums = vec![(0.0f64, 0.0f64); cols];
    for r in 0..rows {
        for ((sum, square), &w) in sums.iter_mut().zip(weights.row(r)) {
            (*sum, *square) = (*sum + f64::from(w), *square + f64::from(w) * f64::from(w));
        }
    }
    let n = rows as f64;
    let of_step = |step: usize| {
        let (sum, square) = sums[feedback.column(step)];
        let variance = (square - sum * sum / n).max(0.0) / (n - 1.0);
        variance * f64::from(feedback.factor.inverse_diagonal[step]).powi(2)
    };
    let mean = (0..cols).map(of_step).sum::<f64>() / cols.max(1) as f64;
    // What sums of squares leave of rows that are all alike is not a variance.
    let energy: f64 = sums.iter().map(|s| s.1).sum();
    let spread: f64 = sums.iter().map(|s| (s.1 - s.0 * s.0 / n).max(0.0)).sum();
    if rows < 2 || spread <= 1e-12 * energy { f32::INFINITY } else { (THRESHOLD * mean) as f32 }
}

struct Job<'a> {
    feedback: Feedback<'a>,
    cols: usize,
    threshold: f32,
    max_code: f32,
}

impl Job<'_> {
    /// The values of some rows, and how many of them are outliers.
    fn rows(&self, first: usize, n: usize) -> Result<(Vec<f32>, u64), QuantError> {
        let (mut values, mut n_outliers) = (vec![0.0; n * self.cols], 0);
        let mut rows = self.feedback.start(first, n)?;
        for block in self.feedback.blocks() {
            self.feedback.begin_block(&mut rows, &block);
            let inverse_diagonal = self.feedback.inverse_diagonal(&block);
            for tile in (0..n).step_by(GROUP) {
                let tile = tile..(tile + GROUP).min(n);
                let mut states: Vec<RowBlock> = tile.clone().map(|r| rows.row(r, &block)).collect();
                for start in (0..block.len()).step_by(GROUP) {
                    let group = start..(start + GROUP).min(block.len());
                    let grids =
                        self.tile_grids(&states, group.clone(), inverse_diagonal).map_err(|(r, overflow)| {
                            at_group(first + tile.start + r, (block.start + start) / GROUP)(overflow)
                        })?;
                    for (state, grid) in states.iter_mut().zip(grids) {
                        let threshold = self.threshold;
                        let mut round = WithOutliers { grid, inverse_diagonal, threshold, n_outliers: 0 };
                        self.feedback.columns(&rows, (state, &mut round), group.clone(), &block);
                        n_outliers += round.n_outliers;
                    }
                }
                for (r, state) in tile.zip(&states) {
                    rows.finish_row(r, state);
                    self.feedback.write_values(state, &block, &mut values[r * self.cols..(r + 1) * self.cols]);
                }
            }
            self.feedback.end_block(&mut rows, &block);
        }
        Ok((values, n_outliers))
    }

    /// The grids of one group of columns in up to 16 rows, with their scales and zeros rounded together.
    fn tile_grids(
        &self,
        states: &[RowBlock],
        group: Range<usize>,
        inverse_diagonal: &[f32],
    ) -> Result<Vec<RealGrid>, (usize, ScaleOverflow)> {
        let inverse = &inverse_diagonal[group.clone()];
        let grids: Vec<RealGrid> = states
            .iter()
            .map(|state| {
                let weights =
                    without_likely_outliers(&state.weights[group.clone()], inverse, self.threshold, self.max_code);
                RealGrid::over(weights.iter().copied(), self.max_code)
            })
            .collect();
        if let Some(r) = grids.iter().position(|g| !as_half(g.scale).is_finite()) {
            return Err((r, ScaleOverflow { scale: grids[r].scale }));
        }
        let scales = round_statistics(&grids.iter().map(|g| g.scale).collect::<Vec<_>>());
        let zeros = round_statistics(&grids.iter().map(|g| g.zero).collect::<Vec<_>>());
        let pairs = scales.into_iter().zip(zeros);
        Ok(pairs.map(|(scale, zero)| RealGrid { scale, zero, max_code: self.max_code }).collect())
    }
}

/// `value = scale (code - zero)` with a zero that is no integer.
#[derive(Clone, Copy, Debug)]
struct RealGrid {
    scale: f32,
    zero: f32,
    max_code: f32,
}

impl RealGrid {
    /// The grid over the extremes of some weights; of (nearly) equal ones, from 0 to them.
    fn over(weights: impl Iterator<Item = f32>, max_code: f32) -> Self {
        let (mut low, mut high) = weights.fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), w| (l.min(w), h.max(w)));
        if low > high {
            (low, high) = (0.0, 0.0);
        }
        if high - low < NARROW * low.abs().max(high.abs()) {
            (low, high) = (low.min(0.0), high.max(0.0));
        }
        let scale = (high - low) / max_code;
        RealGrid { scale, zero: -low / scale.max(LEAST_SCALE), max_code }
    }

    #[inline(always)]
    fn value(&self, weight: f32) -> f32 {
        let code = round_within(weight / self.scale.max(LEAST_SCALE) + self.zero, 0.0, self.max_code);
        self.scale * (code - self.zero)
    }

    fn cost(&self, weight: f32, inverse: f32) -> f32 {
        ((weight - self.value(weight)) * inverse).powi(2)
    }
}

/// The group with weights that are likely to become outliers replaced by the mean of the others.
fn without_likely_outliers(weights: &[f32], inverse: &[f32], threshold: f32, max_code: f32) -> Vec<f32> {
    if threshold.is_infinite() {
        return weights.to_vec();
    }
    let others = |left_out: usize| weights.iter().copied().enumerate().filter(move |(i, _)| *i != left_out);
    let error_without = |left_out: usize| -> f32 {
        let grid = RealGrid::over(others(left_out).map(|(_, w)| w), max_code);
        others(left_out).map(|(i, w)| grid.cost(w, inverse[i])).sum()
    };
    let all = error_without(weights.len());
    let likely: Vec<bool> = (0..weights.len()).map(|i| all - error_without(i) > threshold).collect();
    let n_rest = likely.iter().filter(|l| !**l).count();
    let rest: f32 = weights.iter().zip(&likely).map(|(w, l)| if *l { 0.0 } else { *w }).sum();
    let mean = rest / n_rest.max(1) as f32;
    weights.iter().zip(likely).map(|(w, l)| if l { mean } else { *w }).collect()
}

/// Statistics of up to 16 rows, rounded to [`STATISTIC_BITS`] between their extremes; minimum and step are f16.
fn round_statistics(statistics: &[f32]) -> Vec<f32> {
    let half = |x: f32| as_half(x.clamp(-65504.0, 65504.0));
    let low = half(statistics.iter().copied().fold(f32::INFINITY, f32::min));
    let high = statistics.iter().copied().fold(f32::NEG_INFINITY, f32::max).clamp(-65504.0, 65504.0);
    let max_code = ((1u32 << STATISTIC_BITS) - 1) as f32;
    let step = half((high - low) / max_code);
    let code = |s: f32| if step > 0.0 { round_within((s - low) / step, 0.0, max_code) } else { 0.0 };
    statistics.iter().map(|&s| low + code(s) * step).collect()
}

/// One row's part of a group: rounded, or kept where that costs too much.
struct WithOutliers<'a> {
    grid: RealGrid,
    inverse_diagonal: &'a [f32],
    threshold: f32,
    n_outliers: u64,
}

impl RoundColumn for WithOutliers<'_> {
    #[inline(always)]
    fn round(&mut self, j: usize, weight: f32) -> f32 {
        let value = self.grid.value(weight);
        let error = (weight - value) * self.inverse_diagonal[j];
        if error * error > self.threshold {
            self.n_outliers += 1;
            return as_half(weight);
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_have_eight_values() {
        let rounded = round_statistics(&[1.0, 1.1, 2.0, 3.6, 8.0]);
        assert_eq!(rounded, [1.0, 1.0, 2.0, 4.0, 8.0]);
        assert_eq!(round_statistics(&[0.25; 16]), [0.25; 16]);
        assert!(round_statistics(&[1e9, -1e9]).iter().all(|v| v.is_finite()));
    }

    #[test]
    fn one_far_weight_is_a_likely_outlier() {
        let mut weights: Vec<f32> = (0..16).map(|i| i as f32 / 15.0).collect();
        weights[3] = 9.0;
        let left = without_likely_outliers(&weights, &[1.0; 16], 1.0, 7.0);
        assert!((left[3] - 7.8 / 15.0).abs() < 1e-6, "{left:?}");
        assert_eq!(left[4..], weights[4..]);
        assert_eq!(without_likely_outliers(&weights, &[1.0; 16], 1e9, 7.0), weights);
    }

    #[test]
    fn grids_reach_the_extremes() {
        let grid = RealGrid::over([2.0f32, 3.0, 9.0].into_iter(), 7.0);
        assert_eq!([grid.value(2.0), grid.value(9.0), grid.value(4.2), grid.value(99.0)], [2.0, 9.0, 4.0, 9.0]);
        let equal = RealGrid::over([-0.7f32; 5].into_iter(), 7.0);
        assert!((equal.value(-0.7) + 0.7).abs() < 1e-6);
        assert_eq!(RealGrid::over([0.0f32; 5].into_iter(), 7.0).value(0.0), 0.0);
    }
}
