//! SliM-LLM (Huang et al. 2025, arXiv 2405.14917): every block of 128 columns has one width for all rows, one bit more where
//! weights are salient and one less where they are not, so that the mean stays; then a narrow search for each scale, and
//! error feedback. Simulated.
//!
//! A block's salience is the sum of `w^2 / U_jj^2`. As many blocks lose a bit as gain one; how many is searched with rounding
//! to nearest. The paper minimizes the divergence between softmaxed outputs of the layer; no outputs reach a quantizer here,
//! so it is the mean squared error of the same outputs, `tr(E H E^T)`. With the salience weight of 1 that the authors use,
//! their two-part search of the scale is one sum of `|e|^2.4` over ranges of 0.9 to 1.1 times the group's. One bit is
//! mean +- mean magnitude, as in their code. Inputs that were never active keep their weights.

use super::feedback::{BLOCK, Factor, Feedback, RoundColumn};
use super::grid::{ClipSearch, GridRule, Line};
use super::rows::{ROWS_PER_TASK, at_group};
use super::simulated::{as_half, check_simulated, factored, rounded_instead, simulate_rows};
use super::stored::stored_at_half;
use super::{LayerStats, Needs, Quantized, Quantizer, ScaleOverflow};
use crate::allocate::{Swap, double_pointer};
use crate::simd::round_within;
use crate::{Clip, LayerPlan, LayerSettings, QuantError};
use rayon::prelude::*;
use tailorq_kernels::{Device, Strided, StridedMut};
use tailorq_tensor::{Bits, Group, Layout, Matrix};

/// Steps of 0.002 from 0.9 to 1.1.
const SCALE_SEARCH: ClipSearch = ClipSearch { steps: 500, max_shrink: 0.102, max_growth: 0.1, norm: 2.4 };

/// The width of a block relative to that of the settings, least first.
const SWAPS: [Swap; 3] = [Swap::Down, Swap::Keep, Swap::Up];

/// Column blocks of mixed widths; of the settings it reads the mean width (2 or 3) and the damping. Groups are the blocks.
#[derive(Clone, Copy, Debug)]
pub struct SlimLlm;

impl Quantizer for SlimLlm {
    fn name(&self) -> &'static str {
        "slim-llm"
    }

    fn needs(&self) -> Needs {
        Needs { hessian: true, ..Needs::default() }
    }

    fn stores_half(&self) -> bool {
        true
    }

    /// Block by block: its width for each weight, a scale of 16 bits and a zero of that width for each row (mean and size of 16
    /// bits at one bit), and two bits for the width. As many blocks are narrower as are wider, so all count with the mean.
    fn counted_bits(&self, (rows, cols): (usize, usize), settings: &LayerSettings) -> Option<u64> {
        let bits = settings.layout.bits.count() as usize;
        let n_blocks = cols.div_ceil(BLOCK);
        Some((rows * (cols * bits + n_blocks * (16 + bits)) + 2 * n_blocks) as u64)
    }

    /// Counted bits as predicted, with the widths that the blocks have got.
    fn quantize(
        &self,
        device: &dyn Device,
        weights: &Matrix,
        stats: &LayerStats<'_>,
        plan: &LayerPlan,
    ) -> Result<Quantized, QuantError> {
        check_simulated(self.name(), weights, plan)?;
        let bits = plan.settings.layout.bits;
        if !matches!(bits, Bits::Two | Bits::Three) {
            let problem = format!("slim-llm mixes widths around 2 or 3 bits, not {}", bits.count());
            return Err(QuantError::Settings(problem));
        }
        let (mut notes, settings) = (Vec::new(), LayerSettings { act_order: false, ..plan.settings });
        let (hessian, factor) = factored(device, self.name(), (weights, stats, &settings), &mut notes)?;
        let Some(factor) = factor else { return rounded_instead(device, (weights, stats, plan), notes) };
        let scores = salience(weights, &factor);
        let pairs = Pairs::measure(device, weights, hessian, bits)?;
        let (swaps, _) = double_pointer::<QuantError>(&scores, 1, &mut |swaps| Ok(pairs.loss(swaps)))?;
        let widths: Vec<Width> = swaps.iter().map(|s| Width::new(bits, *s)).collect();
        let job = Job { feedback: Feedback::new(device, weights, &factor), cols: weights.cols(), widths: &widths };
        let (values, _) = simulate_rows(weights, |first, n| Ok((job.rows(first, n)?, 0)))?;
        let blocks = job.feedback.blocks().zip(&widths);
        let (rows, counted) = (weights.rows(), |width: &Width, n: usize| n * width.count() + width.parameter_bits());
        let counted: usize = blocks.map(|(block, width)| rows * counted(width, block.len()) + 2).sum();
        stored_at_half(device, weights, &values, stats, (notes, Some(counted as u64)))
    }
}

/// `sum w^2 / U_jj^2` of every block.
fn salience(weights: &Matrix, factor: &Factor) -> Vec<f64> {
    let mut sums = vec![0.0; weights.cols().div_ceil(BLOCK)];
    for r in 0..weights.rows() {
        for (c, (w, inverse)) in weights.row(r).iter().zip(&factor.inverse_diagonal).enumerate() {
            sums[c / BLOCK] += f64::from(w * inverse).powi(2);
        }
    }
    sums
}

/// How the weights of a block are coded.
#[derive(Clone, Copy, Debug)]
enum Width {
    One,
    More(Bits),
}

impl Width {
    fn new(bits: Bits, swap: Swap) -> Self {
        match (bits, swap) {
            (Bits::Two, Swap::Down) => Width::One,
            (Bits::Two, Swap::Keep) | (_, Swap::Down) => Width::More(Bits::Two),
            (Bits::Two, Swap::Up) | (_, Swap::Keep) => Width::More(Bits::Three),
            (_, Swap::Up) => Width::More(Bits::Four),
        }
    }

    fn count(self) -> usize {
        match self {
            Width::One => 1,
            Width::More(bits) => bits.count() as usize,
        }
    }

    /// Of one row.
    fn parameter_bits(self) -> usize {
        match self {
            Width::One => 32,
            Width::More(bits) => 16 + bits.count() as usize,
        }
    }

    fn fit(self, weights: &[f32], clip: Option<ClipSearch>) -> Result<Levels, ScaleOverflow> {
        match self {
            Width::One => {
                let mean = |f: &dyn Fn(f32) -> f32| {
                    weights.iter().map(|w| f64::from(f(*w))).sum::<f64>() / weights.len().max(1) as f64
                };
                let (mean, size) = (mean(&|w| w), mean(&f32::abs));
                Ok(Levels::Two(Signs { mean: as_half(mean as f32), size: as_half(size as f32) }))
            }
            Width::More(bits) => {
                let grid =
                    GridRule { clip, ..GridRule::new(Layout::new(bits, Group::Row), Clip::None) }.fit(weights, None)?;
                Ok(Levels::Even(OnLine(Line::new(grid, bits))))
            }
        }
    }
}

/// What a group's weights are rounded to.
enum Levels {
    Two(Signs),
    Even(OnLine),
}

struct Signs {
    mean: f32,
    size: f32,
}

struct OnLine(Line);

impl RoundColumn for Signs {
    #[inline(always)]
    fn round(&mut self, _: usize, weight: f32) -> f32 {
        if weight < self.mean { self.mean - self.size } else { self.mean + self.size }
    }
}

impl RoundColumn for OnLine {
    #[inline(always)]
    fn round(&mut self, _: usize, weight: f32) -> f32 {
        round_within(weight * self.0.inverse, self.0.low, self.0.high) * self.0.scale
    }
}

/// The quadratic form between the rounding errors of all blocks at all three widths, so that every choice of widths costs a
/// sum and not a product of matrices.
struct Pairs {
    n_blocks: usize,
    /// `[3 blocks, 3 blocks]`, the lower triangle by blocks: `sum over rows of e_a^T H_ab e_b`.
    terms: Vec<f64>,
}

impl Pairs {
    fn measure(device: &dyn Device, weights: &Matrix, hessian: &Matrix, bits: Bits) -> Result<Self, QuantError> {
        let n_blocks = weights.cols().div_ceil(BLOCK);
        let n_rows = weights.rows();
        let tasks: Vec<Result<Vec<f64>, QuantError>> = (0..n_rows.div_ceil(ROWS_PER_TASK))
            .into_par_iter()
            .map(|t| {
                let (first, last) = (t * ROWS_PER_TASK, ((t + 1) * ROWS_PER_TASK).min(n_rows));
                Ok(terms(device, hessian, &errors(weights, first..last, bits)?, last - first))
            })
            .collect();
        let mut total = vec![0.0; (3 * n_blocks) * (3 * n_blocks)];
        for terms in tasks {
            total.iter_mut().zip(terms?).for_each(|(t, x)| *t += x);
        }
        Ok(Pairs { n_blocks, terms: total })
    }

    /// `tr(E H E^T)` with these widths.
    fn loss(&self, swaps: &[Swap]) -> f64 {
        let choice = |block: usize| 3 * block + SWAPS.iter().position(|s| *s == swaps[block]).unwrap_or(1);
        let of = |a: usize, b: usize| self.terms[choice(a) * 3 * self.n_blocks + choice(b)];
        (0..self.n_blocks).map(|a| of(a, a) + 2.0 * (0..a).map(|b| of(a, b)).sum::<f64>()).sum()
    }
}

/// By width: the errors `[n, cols]` of some rows when all of their blocks are rounded to it.
fn errors(weights: &Matrix, rows: std::ops::Range<usize>, bits: Bits) -> Result<[Vec<f32>; 3], QuantError> {
    let mut all = [Vec::new(), Vec::new(), Vec::new()];
    for (errors, swap) in all.iter_mut().zip(SWAPS) {
        for r in rows.clone() {
            for (g, group) in weights.row(r).chunks(BLOCK).enumerate() {
                let levels = Width::new(bits, swap).fit(group, None).map_err(at_group(r, g))?;
                match levels {
                    Levels::Two(mut signs) => errors.extend(group.iter().map(|&w| w - signs.round(0, w))),
                    Levels::Even(mut line) => errors.extend(group.iter().map(|&w| w - line.round(0, w))),
                }
            }
        }
    }
    Ok(all)
}

/// See [`Pairs::terms`], of `n` rows.
fn terms(device: &dyn Device, hessian: &Matrix, errors: &[Vec<f32>; 3], n: usize) -> Vec<f64> {
    let cols = hessian.cols();
    let n_blocks = cols.div_ceil(BLOCK);
    let width = |block: usize| BLOCK.min(cols - block * BLOCK);
    let mut out = vec![0.0; (3 * n_blocks) * (3 * n_blocks)];
    let mut product = vec![0.0f32; n * BLOCK];
    for a in 0..n_blocks {
        // The block on the diagonal, whole; those left of it lie whole in the lower triangle.
        let at = |i: usize, j: usize| hessian.row(a * BLOCK + i.max(j))[a * BLOCK + i.min(j)];
        let own: Vec<f32> = (0..width(a).pow(2)).map(|k| at(k / width(a), k % width(a))).collect();
        for (i, left) in errors.iter().enumerate() {
            let left = Strided { data: &left[a * BLOCK..], rows: n, cols: width(a), stride: cols };
            for b in 0..=a {
                let block = if a == b {
                    Strided { data: &own, rows: width(a), cols: width(a), stride: width(a) }
                } else {
                    let data = &hessian.data()[a * BLOCK * cols + b * BLOCK..];
                    Strided { data, rows: width(a), cols: width(b), stride: cols }
                };
                let y = StridedMut { data: &mut product, rows: n, cols: width(b), stride: width(b) };
                device.matmul_sequential(1.0, left, block, 0.0, y);
                for (k, right) in errors.iter().enumerate() {
                    let rows = product.chunks_exact(width(b)).take(n).zip(right.chunks_exact(cols));
                    let dot = |(y, e): (&[f32], &[f32])| -> f64 {
                        let e = &e[b * BLOCK..b * BLOCK + width(b)];
                        y.iter().zip(e).map(|(y, e)| f64::from(*y) * f64::from(*e)).sum()
                    };
                    out[(3 * a + i) * 3 * n_blocks + 3 * b + k] = rows.map(dot).sum();
                }
            }
        }
    }
    out
}

struct Job<'a> {
    feedback: Feedback<'a>,
    cols: usize,
    widths: &'a [Width],
}

impl Job<'_> {
    fn rows(&self, first: usize, n: usize) -> Result<Vec<f32>, QuantError> {
        let mut values = vec![0.0; n * self.cols];
        let mut rows = self.feedback.start(first, n)?;
        for (g, block) in self.feedback.blocks().enumerate() {
            self.feedback.begin_block(&mut rows, &block);
            for r in 0..n {
                let mut row = rows.row(r, &block);
                let levels = self.widths[g].fit(&row.weights[..block.len()], Some(SCALE_SEARCH));
                let all = 0..block.len();
                match levels.map_err(at_group(first + r, g))? {
                    Levels::Two(mut signs) => self.feedback.columns(&rows, (&mut row, &mut signs), all, &block),
                    Levels::Even(mut line) => self.feedback.columns(&rows, (&mut row, &mut line), all, &block),
                }
                rows.finish_row(r, &row);
                self.feedback.write_values(&row, &block, &mut values[r * self.cols..(r + 1) * self.cols]);
            }
            self.feedback.end_block(&mut rows, &block);
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_tensor::Rng;

    /// The sum over pairs of blocks is the quadratic form of the errors that a choice of widths leaves.
    #[test]
    fn pairs_add_up_to_the_loss() {
        let (rows, cols) = (70, 300);
        let mut rng = Rng::new(9);
        let weights = Matrix::from_vec(rows, cols, (0..rows * cols).map(|_| rng.normal()).collect());
        let mut hessian = Matrix::zeros(cols, cols);
        for i in 0..cols {
            (0..=i).for_each(|j| hessian.row_mut(i)[j] = rng.normal() + if i == j { 30.0 } else { 0.0 });
        }
        let device = tailorq_kernels::cpu();
        let pairs = Pairs::measure(device.as_ref(), &weights, &hessian, Bits::Two).unwrap();
        for swaps in [[Swap::Keep; 3], [Swap::Up, Swap::Down, Swap::Keep], [Swap::Down, Swap::Keep, Swap::Up]] {
            let candidates = errors(&weights, 0..rows, Bits::Two).unwrap();
            let mut direct = 0.0;
            for r in 0..rows {
                let of = |c: usize| {
                    let which = SWAPS.iter().position(|s| *s == swaps[c / BLOCK]).unwrap();
                    f64::from(candidates[which][r * cols + c])
                };
                for i in 0..cols {
                    for j in 0..cols {
                        direct += of(i) * of(j) * f64::from(hessian.row(i.max(j))[i.min(j)]);
                    }
                }
            }
            let found = pairs.loss(&swaps);
            assert!((found / direct - 1.0).abs() < 1e-4, "{swaps:?}: {found}, directly {direct}");
        }
    }

    #[test]
    fn one_bit_is_mean_and_mean_magnitude() {
        let Levels::Two(mut signs) = Width::One.fit(&[1.0, -3.0, 5.0, 1.0], None).unwrap() else { panic!() };
        assert_eq!([signs.round(0, 1.0), signs.round(1, 0.5), signs.round(2, 9.0)], [3.5, -1.5, 3.5]);
    }
}
