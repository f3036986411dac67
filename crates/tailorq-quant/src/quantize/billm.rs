//! BiLLM (Huang et al. 2024, arXiv 2402.04291): one bit a weight. In every block of 128 columns a few salient columns are
//! binarized twice, the second time what the first left; the others are split by size into a concentrated and a sparse part,
//! each binarized by itself. Block-wise error compensation. Simulated.
//!
//! As the authors' code does it, where that is not what the paper says: both searches (how many columns, where to split) take
//! `w^2 / U_jj^2` for the weights they approximate; columns of a block are binarized from the weights at its beginning, and
//! their errors go to later blocks only. Inputs that were never active keep their weights (the code zeroes them), and
//! parameters are f16.

use super::feedback::{BLOCK, Feedback, FeedbackRows};
use super::rows::ROWS_PER_TASK;
use super::simulated::{as_half, check_simulated, factored, rounded_instead};
use super::stored::stored_at_half;
use super::{LayerStats, Needs, Quantized, Quantizer};
use crate::{LayerPlan, LayerSettings, QuantError};
use rayon::prelude::*;
use std::ops::Range;
use tailorq_kernels::Device;
use tailorq_tensor::Matrix;

/// Salient columns of a block are fewer than these.
const MOST_COLUMNS: usize = 50;
/// Splits that are tried: from the 10th to the 90th percentile.
const SPLITS: usize = 81;
/// Mean and size of three parts, one of them twice, 16 bits each: of a row in a block.
const PARAMETER_BITS: usize = 8 * 16;

/// Binarization; of the settings it reads the damping. The width is its own, and the columns' order natural.
#[derive(Clone, Copy, Debug)]
pub struct BiLlm;

impl Quantizer for BiLlm {
    fn name(&self) -> &'static str {
        "billm"
    }

    fn needs(&self) -> Needs {
        Needs { hessian: true, ..Needs::default() }
    }

    fn stores_half(&self) -> bool {
        true
    }

    /// A sign for each weight, a second one in salient columns, in the others a bit for their part; a bitmap of
    /// salient columns; and 8 parameters of 16 bits for each row and block. About 3 a weight.
    fn counted_bits(&self, (rows, cols): (usize, usize), _: &LayerSettings) -> Option<u64> {
        Some((2 * rows * cols + cols + PARAMETER_BITS * rows * cols.div_ceil(BLOCK)) as u64)
    }

    fn quantize(
        &self,
        device: &dyn Device,
        weights: &Matrix,
        stats: &LayerStats<'_>,
        plan: &LayerPlan,
    ) -> Result<Quantized, QuantError> {
        check_simulated(self.name(), weights, plan)?;
        let (mut notes, settings) = (Vec::new(), LayerSettings { act_order: false, ..plan.settings });
        let (_, factor) = factored(device, self.name(), (weights, stats, &settings), &mut notes)?;
        let Some(factor) = factor else { return rounded_instead(device, (weights, stats, plan), notes) };
        let (rows, cols) = (weights.rows(), weights.cols());
        let feedback = Feedback::new(device, weights, &factor);
        let starts: Vec<usize> = (0..rows).step_by(ROWS_PER_TASK).collect();
        let start = |&first: &usize| {
            let n = ROWS_PER_TASK.min(rows - first);
            Ok(Task { rows: feedback.start(first, n)?, values: vec![0.0; n * cols] })
        };
        let mut tasks: Vec<Task> = starts.par_iter().map(start).collect::<Result<_, QuantError>>()?;
        for block in feedback.blocks() {
            let inverse = feedback.inverse_diagonal(&block);
            let parts = Parts::choose(&tasks, &block, inverse);
            tasks.par_iter_mut().for_each(|task| task.binarize(&feedback, &block, &parts));
        }
        let values = tasks.into_iter().flat_map(|t| t.values).collect();
        let counted = self.counted_bits((rows, cols), &plan.settings);
        stored_at_half(device, weights, &Matrix::from_vec(rows, cols, values), stats, (notes, counted))
    }
}

/// Some rows on their way.
struct Task {
    rows: FeedbackRows,
    /// `[n, cols]`.
    values: Vec<f32>,
}

impl Task {
    fn binarize(&mut self, feedback: &Feedback<'_>, block: &Range<usize>, parts: &Parts) {
        let inverse = feedback.inverse_diagonal(block);
        let cols = self.values.len() / self.rows.n.max(1);
        for r in 0..self.rows.n {
            let mut row = self.rows.row(r, block);
            let mut scores = Vec::new();
            saliency(&row.weights[..block.len()], inverse, &mut scores);
            let mut places: [Vec<usize>; 3] = Default::default();
            (0..block.len()).for_each(|j| places[parts.of(j, scores[j])].push(j));
            for (part, places) in places.iter().enumerate() {
                let weights: Vec<f64> = places.iter().map(|&j| f64::from(row.weights[j])).collect();
                let order = if part == SALIENT { 2 } else { 1 };
                for (&j, value) in places.iter().zip(binarized(&weights, order)) {
                    row.values[j] = value;
                    row.errors[j] = (row.weights[j] - value) * inverse[j];
                }
            }
            self.rows.finish_row(r, &row);
            feedback.write_values(&row, block, &mut self.values[r * cols..(r + 1) * cols]);
        }
        feedback.end_block(&mut self.rows, block);
    }
}

/// `w^2 / U_jj^2`.
fn saliency(weights: &[f32], inverse: &[f32], out: &mut Vec<f32>) {
    out.clear();
    out.extend(weights.iter().zip(inverse).map(|(w, i)| (w * i).powi(2)));
}

/// The values of a part after `order` rounds of mean +- mean distance, with parameters in f16.
fn binarized(weights: &[f64], order: usize) -> Vec<f32> {
    let mut values = vec![0.0f64; weights.len()];
    let n = weights.len().max(1) as f64;
    for _ in 0..order {
        let rest = || weights.iter().zip(&values).map(|(w, v)| w - v);
        let mean = rest().sum::<f64>() / n;
        let size = rest().map(|x| (x - mean).abs()).sum::<f64>() / n;
        let half = |x: f64| f64::from(as_half(x as f32));
        let signs: Vec<bool> = rest().map(|x| x < mean).collect();
        let steps = signs.iter().map(|below| half(mean) + if *below { -half(size) } else { half(size) });
        values.iter_mut().zip(steps).for_each(|(v, step)| *v += step);
    }
    values.iter().map(|v| *v as f32).collect()
}

/// `sum f(x)`, in eight partial sums that need not wait for each other.
#[inline(always)]
fn sum_of(values: &[f64], f: impl Fn(f64) -> f64) -> f64 {
    let mut sums = [0.0f64; 8];
    let (chunks, rest) = values.as_chunks::<8>();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(s, x)| *s += f(*x));
    }
    rest.iter().fold(sums.iter().sum(), |total, x| total + f(*x))
}

/// What two rounds leave of the sum of squares; overwrites the weights with what is left of each.
fn left_of_two_rounds(weights: &mut [f64]) -> f64 {
    let n = weights.len().max(1) as f64;
    for _ in 0..2 {
        let mean = sum_of(weights, |x| x) / n;
        let size = sum_of(weights, |x| (x - mean).abs()) / n;
        weights.iter_mut().for_each(|x| *x -= if *x < mean { mean - size } else { mean + size });
    }
    sum_of(weights, |x| x * x)
}

const CONCENTRATED: usize = 0;
const SPARSE: usize = 1;
const SALIENT: usize = 2;

/// Which weights of a block are binarized together.
struct Parts {
    salient: Vec<bool>,
    split: f32,
}

impl Parts {
    fn of(&self, j: usize, score: f32) -> usize {
        if self.salient[j] {
            SALIENT
        } else if score < self.split {
            CONCENTRATED
        } else {
            SPARSE
        }
    }

    /// Looks at all rows.
    fn choose(tasks: &[Task], block: &Range<usize>, inverse: &[f32]) -> Self {
        let width = block.len();
        let scores: Vec<Vec<f32>> = tasks
            .par_iter()
            .map(|task| {
                let (mut all, mut row) = (Vec::with_capacity(task.rows.n * width), Vec::new());
                for r in 0..task.rows.n {
                    saliency(task.rows.weights(r, block), inverse, &mut row);
                    all.extend_from_slice(&row);
                }
                all
            })
            .collect();
        let mut sums = vec![0.0f64; width];
        scores.iter().flat_map(|s| s.chunks_exact(width)).for_each(|row| {
            sums.iter_mut().zip(row).for_each(|(sum, s)| *sum += f64::from(*s));
        });
        let mut falling: Vec<usize> = (0..width).collect();
        falling.sort_by(|&a, &b| sums[b].total_cmp(&sums[a]));
        let counts = 1..MOST_COLUMNS.min(width).max(2);
        let errors = add_up(&scores, counts.len(), |task, out| column_errors(task, width, &falling, out));
        let n_salient = counts.start + least(&errors);
        let mut salient = vec![false; width];
        falling[..n_salient].iter().for_each(|&j| salient[j] = true);
        let splits = splits(&scores, &salient);
        let errors = add_up(&scores, SPLITS, |task, out| split_errors(task, &salient, &splits, out));
        let split = splits[least(&errors)];
        Parts { salient, split }
    }
}

/// The sums over tasks of what `measure` adds to `n` numbers, in the order of the tasks.
fn add_up(scores: &[Vec<f32>], n: usize, measure: impl Fn(&[f32], &mut [f64]) + Sync) -> Vec<f64> {
    let parts: Vec<Vec<f64>> = scores
        .par_iter()
        .map(|task| {
            let mut sums = vec![0.0; n];
            measure(task, &mut sums);
            sums
        })
        .collect();
    let mut total = vec![0.0; n];
    parts.iter().for_each(|part| total.iter_mut().zip(part).for_each(|(t, x)| *t += x));
    total
}

/// The place of the least number, the first of equal ones.
fn least(errors: &[f64]) -> usize {
    errors.iter().enumerate().fold(0, |best, (i, e)| if *e < errors[best] { i } else { best })
}

/// The error of two rounds on the first 1, 2, ... of `falling` columns and on the others, added to `out`.
fn column_errors(scores: &[f32], width: usize, falling: &[usize], out: &mut [f64]) {
    let mut buffer = vec![0.0f64; width];
    for row in scores.chunks_exact(width) {
        for (i, sum) in out.iter_mut().enumerate() {
            buffer.iter_mut().zip(falling).for_each(|(b, &j)| *b = f64::from(row[j]));
            let (salient, rest) = buffer.split_at_mut((i + 1).min(width));
            *sum += left_of_two_rounds(salient) + left_of_two_rounds(rest);
        }
    }
}

/// The percentiles 10 to 90 of all scores, those of salient columns counting as 0, interpolated.
fn splits(scores: &[Vec<f32>], salient: &[bool]) -> Vec<f32> {
    let rows = scores.iter().flat_map(|s| s.chunks_exact(salient.len()));
    let mut all: Vec<f32> =
        rows.flat_map(|row| row.iter().zip(salient).map(|(s, salient)| if *salient { 0.0 } else { *s })).collect();
    all.sort_unstable_by(f32::total_cmp);
    let last = all.len().saturating_sub(1);
    let quantile = |i: usize| {
        let at = (0.1 + 0.01 * i as f64) * last as f64;
        let (below, part) = (at.floor() as usize, at.fract());
        let [low, high] = [below.min(last), (below + 1).min(last)].map(|k| f64::from(all[k]));
        (low + part * (high - low)) as f32
    };
    if all.is_empty() { vec![0.0; SPLITS] } else { (0..SPLITS).map(quantile).collect() }
}

/// The error of one round on either side of every split, added to `out`.
fn split_errors(scores: &[f32], salient: &[bool], splits: &[f32], out: &mut [f64]) {
    let mut sorted = Sorted::default();
    for row in scores.chunks_exact(salient.len()) {
        sorted.fill(row.iter().zip(salient).filter(|(_, salient)| !**salient).map(|(score, _)| *score));
        for (sum, split) in out.iter_mut().zip(splits) {
            let at = sorted.values.partition_point(|score| score < split);
            *sum += sorted.left_of_one_round(0..at) + sorted.left_of_one_round(at..sorted.values.len());
        }
    }
}

/// Ascending numbers with the sums of all beginnings, of values and of squares.
#[derive(Default)]
struct Sorted {
    values: Vec<f32>,
    sums: Vec<(f64, f64)>,
}

impl Sorted {
    fn fill(&mut self, values: impl Iterator<Item = f32>) {
        self.values.clear();
        self.values.extend(values);
        self.values.sort_unstable_by(f32::total_cmp);
        self.sums.clear();
        let mut total = (0.0f64, 0.0f64);
        self.sums.push(total);
        self.sums.extend(self.values.iter().map(|&x| {
            total = (total.0 + f64::from(x), total.1 + f64::from(x) * f64::from(x));
            total
        }));
    }

    /// What one round leaves of a run: `sum (|x - m| - a)^2 = sum (x - m)^2 - n a^2` with the mean `m` and the mean
    /// distance `a` from it.
    fn left_of_one_round(&self, run: Range<usize>) -> f64 {
        if run.is_empty() {
            return 0.0;
        }
        let n = run.len() as f64;
        let ((s0, q0), (s1, q1)) = (self.sums[run.start], self.sums[run.end]);
        let mean = (s1 - s0) / n;
        let below = self.values[run.clone()].partition_point(|&x| f64::from(x) < mean);
        // Distances below the mean and above it add up to the same.
        let distance = 2.0 * (below as f64 * mean - (self.sums[run.start + below].0 - s0)) / n;
        (q1 - q0 - n * mean * mean - n * distance * distance).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binarization_by_hand() {
        assert_eq!(
            binarized(&[1.0, 3.0, 8.0], 1),
            [4.0 - 8.0 / 3.0, 4.0 - 8.0 / 3.0, 4.0 + 8.0 / 3.0]
                .map(|v: f64| { (4.0 + (v - 4.0).signum() * f64::from(as_half(8.0 / 3.0))) as f32 })
        );
        assert_eq!(binarized(&[0.5; 4], 2), [0.5; 4]);
        assert!(binarized(&[], 2).is_empty());
        // Two points are exact after one round, four of two sizes after two.
        assert_eq!(binarized(&[-2.0, 6.0], 1), [-2.0, 6.0]);
        assert_eq!(binarized(&[-5.0, -3.0, 3.0, 5.0], 2), [-5.0, -3.0, 3.0, 5.0]);
        assert!(left_of_two_rounds(&mut [-5.0, -3.0, 3.0, 5.0]) < 1e-12);
        let mut sorted = Sorted::default();
        sorted.fill([5.0, -3.0, 3.0, -5.0, 90.0].into_iter());
        assert!((sorted.left_of_one_round(0..4) - 4.0).abs() < 1e-12);
        assert!((sorted.left_of_one_round(3..5)).abs() < 1e-12 && sorted.left_of_one_round(2..2) == 0.0);
        let long: Vec<f64> = (0..21).map(f64::from).collect();
        assert_eq!(sum_of(&long, |x| 2.0 * x), 420.0);
    }

    #[test]
    fn splits_are_percentiles() {
        let scores = vec![(0..=100).map(|i| i as f32).collect::<Vec<_>>()];
        let found = splits(&scores, &[false; 101]);
        assert_eq!((found.len(), found[0], found[40], found[80]), (81, 10.0, 50.0, 90.0));
    }
}
