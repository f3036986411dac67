//! SqueezeLLM (Kim et al. 2024, arXiv 2306.07629): every row has its own table of `2^bits` levels, placed by k-means in which a
//! weight counts by its Fisher information; the most sensitive and the largest weights are left out and stay at 16 bits.
//! No error feedback, no Hessian. Simulated.
//!
//! Departures from the authors' code. The levels are the exact optimum, by dynamic programming over the sorted weights, and not
//! what 50 rounds from a random start find. The largest weights are the 0.4 % of a matrix with the largest magnitude, where
//! the code takes those beyond a multiple of the quartiles that is tuned to the same share.

use super::simulated::{as_half, check_simulated, simulate_rows, sparse_bits};
use super::stored::stored_at_half;
use super::{LayerStats, Needs, Quantized, Quantizer};
use crate::{LayerPlan, LayerSettings, QuantError};
use std::cmp::Ordering;
use tailorq_kernels::Device;
use tailorq_tensor::Matrix;

/// Share of a matrix's weights that stays at 16 bits for its Fisher information.
const SENSITIVE: f64 = 0.0005;
/// Share that stays for its magnitude.
const LARGE: f64 = 0.004;

/// Tables by weighted k-means with sparse outliers; of the settings it reads the width.
#[derive(Clone, Copy, Debug)]
pub struct SqueezeLlm;

impl Quantizer for SqueezeLlm {
    fn name(&self) -> &'static str {
        "squeezellm"
    }

    fn needs(&self) -> Needs {
        Needs { square: true, ..Needs::default() }
    }

    fn stores_half(&self) -> bool {
        true
    }

    /// A code for each weight, `2^bits` levels of 16 bits a row, and the outliers with their columns.
    fn counted_bits(&self, (rows, cols): (usize, usize), settings: &LayerSettings) -> Option<u64> {
        let (n, bits) = (rows * cols, u64::from(settings.layout.bits.count()));
        let n_outliers = share_of(SENSITIVE, n) + share_of(LARGE, n);
        Some(n as u64 * bits + 16 * (rows as u64) * (1 << bits) + sparse_bits(rows, cols, n_outliers as u64))
    }

    fn quantize(
        &self,
        device: &dyn Device,
        weights: &Matrix,
        stats: &LayerStats<'_>,
        plan: &LayerPlan,
    ) -> Result<Quantized, QuantError> {
        check_simulated(self.name(), weights, plan)?;
        let fisher = stats.square.ok_or(QuantError::SquareMissing { quantizer: self.name() })?;
        let (rows, cols) = (weights.rows(), weights.cols());
        assert_eq!((fisher.rows(), fisher.cols()), (rows, cols), "the gradients belong to another layer");
        if let Some(at) = fisher.data().iter().position(|f| !(f.is_finite() && *f >= 0.0)) {
            let (value, row, col) = (fisher.data()[at], at / cols, at % cols);
            let problem = format!("the squared gradient at row {row}, column {col} is {value}: make the survey again");
            return Err(QuantError::Settings(problem));
        }
        let bits = plan.settings.layout.bits.count();
        let is_outlier = outliers(weights, fisher);
        let (values, _) = simulate_rows(weights, |first, n| {
            let rows = (first..first + n)
                .map(|r| quantize_row(weights.row(r), fisher.row(r), &is_outlier[r * cols..(r + 1) * cols], 1 << bits));
            Ok((rows.flatten().collect(), 0))
        })?;
        let counted = self.counted_bits((rows, cols), &plan.settings);
        stored_at_half(device, weights, &values, stats, (Vec::new(), counted))
    }
}

/// So many of `n`.
fn share_of(share: f64, n: usize) -> usize {
    (share * n as f64).floor() as usize
}

/// The weights that stay at 16 bits: those of the largest Fisher information, then the largest of the others.
fn outliers(weights: &Matrix, fisher: &Matrix) -> Vec<bool> {
    let n = weights.data().len();
    let mut is_outlier = vec![false; n];
    let mark = |flags: &mut Vec<bool>, values: &[f32], count: usize| {
        let mut rest: Vec<usize> = (0..n).filter(|&i| !flags[i]).collect();
        let falling = |a: &usize, b: &usize| values[*b].abs().total_cmp(&values[*a].abs()).then(a.cmp(b));
        if count > 0 {
            rest.select_nth_unstable_by(count - 1, falling);
            rest[..count].iter().for_each(|&i| flags[i] = true);
        }
    };
    mark(&mut is_outlier, fisher.data(), share_of(SENSITIVE, n));
    mark(&mut is_outlier, weights.data(), share_of(LARGE, n));
    is_outlier
}

/// A row with each weight at the nearest level of the row's table, and outliers at 16 bits.
fn quantize_row(weights: &[f32], fisher: &[f32], is_outlier: &[bool], n_levels: usize) -> Vec<f32> {
    let mut points: Vec<(f64, f64)> =
        (0..weights.len()).filter(|&i| !is_outlier[i]).map(|i| (f64::from(weights[i]), f64::from(fisher[i]))).collect();
    // A row without any information counts all of its weights alike.
    if points.iter().all(|p| p.1 == 0.0) {
        points.iter_mut().for_each(|p| p.1 = 1.0);
    }
    let levels: Vec<f32> = weighted_levels(&mut points, n_levels).iter().map(|&l| as_half(l as f32)).collect();
    let pairs = weights.iter().zip(is_outlier);
    pairs.map(|(&w, &outlier)| if outlier { as_half(w) } else { nearest(&levels, w) }).collect()
}

/// The nearest of ascending levels, ties to the lower one.
fn nearest(levels: &[f32], weight: f32) -> f32 {
    let above = levels.partition_point(|&l| l < weight).min(levels.len() - 1);
    let (low, high) = (levels[above.saturating_sub(1)], levels[above]);
    if (weight - low).abs() <= (high - weight).abs() { low } else { high }
}

/// At most `n_levels` ascending levels with the least `sum weight (value - nearest level)^2` over the `(value, weight)` points,
/// exactly: the best partition of the sorted points into intervals, by dynamic programming with divided search (the cost
/// satisfies the quadrangle inequality, so that best cuts do not cross). Sorts the points.
pub(super) fn weighted_levels(points: &mut [(f64, f64)], n_levels: usize) -> Vec<f64> {
    points.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let n = points.len();
    let sums = Sums::new(points);
    let k = n_levels.min(n);
    if k == 0 {
        return vec![0.0];
    }
    // best[j]: the least cost of the first j points with as many levels as the round has; cuts[level][j]: where the last begins.
    let mut best: Vec<f64> = (0..=n).map(|j| sums.cost(0, j)).collect();
    let mut cuts: Vec<Vec<u32>> = vec![vec![0; n + 1]];
    for level in 1..k {
        let (mut next, mut cut) = (vec![f64::INFINITY; n + 1], vec![0u32; n + 1]);
        divide(&sums, &best, (&mut next, &mut cut), (level + 1, n), (level, n));
        best = next;
        cuts.push(cut);
    }
    let (mut levels, mut end) = (Vec::with_capacity(k), n);
    for level in (0..k).rev() {
        let start = cuts[level][end] as usize;
        levels.push(sums.mean(start, end));
        end = start;
    }
    levels.reverse();
    levels.sort_unstable_by(|a, b| a.partial_cmp(b).unwrap_or(Ordering::Equal));
    levels
}

/// Fills `next[from..=to]`, whose best last cuts lie in `low..=high`.
fn divide(
    sums: &Sums,
    best: &[f64],
    (next, cut): (&mut [f64], &mut [u32]),
    (from, to): (usize, usize),
    (low, high): (usize, usize),
) {
    if from > to {
        return;
    }
    let middle = usize::midpoint(from, to);
    let last = high.min(middle - 1);
    for (start, before) in (low..=last).zip(&best[low..=last]) {
        let cost = before + sums.cost(start, middle);
        if cost < next[middle] {
            (next[middle], cut[middle]) = (cost, start as u32);
        }
    }
    let at = cut[middle] as usize;
    divide(sums, best, (next, cut), (from, middle - 1), (low, at.max(low)));
    divide(sums, best, (next, cut), (middle + 1, to), (at.max(low), high));
}

/// Prefix sums of weight, weight times value and weight times square, and of values alone.
struct Sums {
    sums: Vec<[f64; 4]>,
}

impl Sums {
    fn new(points: &[(f64, f64)]) -> Self {
        let mut sums = vec![[0.0; 4]];
        let mut total = [0.0; 4];
        for &(x, w) in points {
            total = [total[0] + w, total[1] + w * x, total[2] + w * x * x, total[3] + x];
            sums.push(total);
        }
        Sums { sums }
    }

    /// What the points `from..to` cost at their own mean.
    #[inline]
    fn cost(&self, from: usize, to: usize) -> f64 {
        let (a, b) = (&self.sums[from], &self.sums[to]);
        let (w, wx, wxx) = (b[0] - a[0], b[1] - a[1], b[2] - a[2]);
        if w > 0.0 { (wxx - wx * wx / w).max(0.0) } else { 0.0 }
    }

    /// The weighted mean of the points `from..to`; the plain one where nothing has a weight.
    fn mean(&self, from: usize, to: usize) -> f64 {
        let (a, b) = (&self.sums[from], &self.sums[to]);
        let w = b[0] - a[0];
        if w > 0.0 { (b[1] - a[1]) / w } else { (b[3] - a[3]) / (to - from).max(1) as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_tensor::Rng;

    fn cost(points: &[(f64, f64)], levels: &[f64]) -> f64 {
        let nearest = |x: f64| levels.iter().map(|l| (x - l).powi(2)).fold(f64::INFINITY, f64::min);
        points.iter().map(|&(x, w)| w * nearest(x)).sum()
    }

    /// The least cost over all partitions of the sorted points into intervals, one by one.
    fn least(points: &[(f64, f64)], k: usize) -> f64 {
        fn rest(points: &[(f64, f64)], k: usize) -> f64 {
            let alone = |p: &[(f64, f64)]| {
                let w: f64 = p.iter().map(|p| p.1).sum();
                let mean = if w > 0.0 { p.iter().map(|p| p.0 * p.1).sum::<f64>() / w } else { 0.0 };
                p.iter().map(|p| p.1 * (p.0 - mean).powi(2)).sum::<f64>()
            };
            if k == 1 || points.len() <= 1 {
                return alone(points);
            }
            (1..=points.len()).map(|n| alone(&points[..n]) + rest(&points[n..], k - 1)).fold(f64::INFINITY, f64::min)
        }
        rest(points, k)
    }

    #[test]
    fn levels_are_the_best_ones() {
        let mut rng = Rng::new(3);
        for case in 0..40 {
            let n = 1 + case % 11;
            let mut points: Vec<(f64, f64)> = (0..n)
                .map(|_| {
                    (f64::from(rng.normal()), if rng.below(4) == 0 { 0.0 } else { f64::from(rng.normal()).powi(2) })
                })
                .collect();
            if case % 5 == 0 {
                points.iter_mut().for_each(|p| p.0 = p.0.round());
            }
            for k in [1, 2, 4, 8] {
                let levels = weighted_levels(&mut points, k);
                assert!(levels.len() <= k && levels.is_sorted());
                let (found, expected) = (cost(&points, &levels), least(&points, k));
                assert!(found <= expected + 1e-9, "{n} points, {k} levels: {found}, best {expected}");
            }
        }
        assert_eq!(weighted_levels(&mut [], 4), [0.0]);
    }

    #[test]
    fn the_nearest_level() {
        let levels = [-1.0, 0.0, 3.0];
        let found = [-7.0, -0.5, -0.4, 1.5, 1.6, 9.0].map(|w| nearest(&levels, w));
        assert_eq!(found, [-1.0, -1.0, 0.0, 0.0, 3.0, 3.0]);
    }

    #[test]
    fn outliers_are_counted_shares() {
        let mut rng = Rng::new(4);
        let data = |rng: &mut Rng| (0..20_000).map(|_| rng.normal()).collect::<Vec<f32>>();
        let weights = Matrix::from_vec(100, 200, data(&mut rng));
        let fisher = Matrix::from_vec(100, 200, data(&mut rng).iter().map(|g| g * g).collect());
        let is_outlier = outliers(&weights, &fisher);
        assert_eq!(is_outlier.iter().filter(|o| **o).count(), 10 + 80);
        let mut by_fisher: Vec<usize> = (0..20_000).collect();
        by_fisher.sort_by(|a, b| fisher.data()[*b].total_cmp(&fisher.data()[*a]));
        assert!(by_fisher[..10].iter().all(|&i| is_outlier[i]));
        let least = (0..20_000).filter(|i| is_outlier[*i] && !by_fisher[..10].contains(i));
        let least = least.map(|i| weights.data()[i].abs()).fold(f32::INFINITY, f32::min);
        assert!((0..20_000).all(|i| is_outlier[i] || weights.data()[i].abs() <= least));
    }
}
