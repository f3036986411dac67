//! The seam between mathematics and machines.

use crate::kv::KeyValues;
use crate::resident::Resident;
use crate::rounding::{Rounded, RoundingJob};
use std::ops::Range;
use std::sync::Arc;
use tailorq_tensor::{Matrix, Weight};
use thiserror::Error;

/// A Cholesky factorization met a pivot that is not positive.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("matrix is not positive definite (pivot {pivot})")]
pub struct NotPositiveDefinite {
    /// Index of the first such pivot, counted in the order of elimination.
    pub pivot: usize,
}

/// Cosines and sines of rotary embedding, `[positions, head_dim / 2]` each, attention scaling factor included.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// Half of the head size: the number of rotated pairs.
    pub half: usize,
    /// Row `p`: cosine of `p * frequency_i`.
    pub cos: Vec<f32>,
    /// Row `p`: sine of `p * frequency_i`.
    pub sin: Vec<f32>,
}

/// Head counts and sizes of one attention call.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// A query sees only the last `window` keys up to itself, if set.
    pub window: Option<usize>,
}

/// One sequence of a ragged batch: some query rows, and all keys and values up to the last of them.
#[derive(Clone, Debug)]
pub struct AttentionSpan<'a> {
    /// Rows of the query (and output) matrix that belong to this sequence.
    pub rows: Range<usize>,
    /// Keys and values of `past + rows.len()` tokens.
    pub source: KeyValues<'a>,
    /// Keys that precede the first query row: query `rows.start + i` sees keys `0..=past + i`.
    pub past: usize,
}

/// Queries, keys and values of fresh sequences (no cache), one row a token.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    /// `[n, heads * head_dim]`.
    pub q: &'a [f32],
    /// `[n, kv_heads * head_dim]`.
    pub k: &'a [f32],
    /// `[n, kv_heads * head_dim]`.
    pub v: &'a [f32],
}

/// Gradients of [`Heads`], of the same shapes.
#[derive(Debug)]
pub struct HeadsMut<'a> {
    /// `[n, heads * head_dim]`.
    pub q: &'a mut [f32],
    /// `[n, kv_heads * head_dim]`.
    pub k: &'a mut [f32],
    /// `[n, kv_heads * head_dim]`.
    pub v: &'a mut [f32],
}

/// What shall be summed of the gradients `G` (`[out, in]`, one a sample) of a weight. Matrices that are there have the
/// weight's shape.
#[derive(Debug, Default)]
pub struct GradientSums<'a> {
    /// The sum of `G`: the gradient of the samples together.
    pub sum: Option<&'a mut Matrix>,
    /// The sum of `|G|`, element by element.
    pub absolute: Option<&'a mut Matrix>,
    /// The sum of `G^2`, element by element.
    pub square: Option<&'a mut Matrix>,
}

/// The sum of exponentials of what was seen so far of a row: `sum exp(x) = sum * exp(max)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogSumExp {
    /// The largest element.
    pub max: f32,
    /// The sum of `exp(x - max)`.
    pub sum: f64,
}

impl Default for LogSumExp {
    /// Nothing was seen.
    fn default() -> Self {
        LogSumExp { max: f32::NEG_INFINITY, sum: 0.0 }
    }
}

impl LogSumExp {
    /// `ln sum exp(x)`.
    pub fn value(self) -> f64 {
        f64::from(self.max) + self.sum.ln()
    }

    /// Takes in further elements whose largest is `max` and whose `sum exp(x - max)` is `sum`.
    pub fn merge(&mut self, max: f32, sum: f64) {
        let larger = self.max.max(max);
        if larger == f32::NEG_INFINITY {
            // Nothing yet, or only infinitely small elements: their sum is what it was.
            self.sum += sum;
            return;
        }
        let part = |max: f32, sum: f64| if sum == 0.0 { 0.0 } else { sum * f64::from(max - larger).exp() };
        *self = LogSumExp { max: larger, sum: part(self.max, self.sum) + part(max, sum) };
    }
}

/// The operations of a language model and of its quantization. Shapes are checked by assertion: a wrong one is a bug.
pub trait Device: Send + Sync {
    /// For reports: `reference`, `cpu avx512`, ...
    fn name(&self) -> String;

    /// What results depend on beside the inputs, for names of what is kept between runs; `None` for the CPU, where that is
    /// said elsewhere.
    fn signature(&self) -> Option<String> {
        self.resident().map(|_| self.name())
    }

    /// Devices of the same kind beside this one, to which work on other samples may go. Results may depend on their number.
    fn peers(&self) -> &[Arc<dyn Device>] {
        &[]
    }

    /// The operations on matrices in the device's own memory, if it has one.
    fn resident(&self) -> Option<&dyn Resident> {
        None
    }

    /// `y[n, rows.len()] = x[n, in] W[rows]^T (+ bias[rows])`: the chosen output rows of a linear. `bias` has all rows.
    fn linear_rows(&self, x: &[f32], w: &Weight, bias: Option<&[f32]>, rows: Range<usize>, y: &mut [f32]);

    /// `y[n, out] = x[n, in] W^T (+ bias)`.
    fn linear(&self, x: &[f32], w: &Weight, bias: Option<&[f32]>, y: &mut [f32]) {
        self.linear_rows(x, w, bias, 0..w.rows(), y);
    }

    /// `y[i] = table[ids[i]]`. Every id is below the number of rows.
    fn embed(&self, ids: &[u32], table: &Weight, y: &mut [f32]);

    /// `y = x / sqrt(mean(x^2) + eps) * weight` for every row of `weight.len()` elements. The mean is taken in f32.
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]);

    /// Rotates pairs `(i, i + half)` of every head (head size `2 * half`) of row `t` by the angles of `positions[t]`.
    /// `x` is `[positions.len(), heads * 2 * half]`.
    fn rope(&self, x: &mut [f32], table: &RopeTable, positions: &[u32]);

    /// Causal softmax attention with scale `1 / sqrt(head_dim)`; `q` and `y` are `[n, heads * head_dim]`, the spans
    /// cover disjoint rows. Query head `h` reads key head `h / (heads / kv_heads)`.
    fn attention(&self, shape: AttentionShape, q: &[f32], spans: &[AttentionSpan<'_>], y: &mut [f32]);

    /// `gate = silu(gate) * up`, element by element.
    fn swiglu(&self, gate: &mut [f32], up: &[f32]);

    /// `y += x`.
    fn add(&self, x: &[f32], y: &mut [f32]);

    /// `dx[n, in] += dy[n, rows.len()] W[rows]`: what the chosen output rows of a linear pass back to its input.
    fn linear_backward_rows(&self, dy: &[f32], w: &Weight, rows: Range<usize>, dx: &mut [f32]);

    /// `dx[n, in] += dy[n, out] W`.
    fn linear_backward(&self, dy: &[f32], w: &Weight, dx: &mut [f32]) {
        self.linear_backward_rows(dy, w, 0..w.rows(), dx);
    }

    /// The weight gradients of a linear, one a span of rows (a sample): `G = dy[span]^T x[span]`, each taken into the
    /// sums in the order of the spans. `dy` is `[n, out]`, `x` is `[n, in]`; no gradient is held whole.
    fn weight_gradients(&self, dy: &[f32], x: &[f32], spans: &[Range<usize>], sums: GradientSums<'_>);

    /// `dx += ` the gradient of [`Device::rms_norm`] with respect to its input `x`, where `dy` is that of its output.
    fn rms_norm_backward(&self, x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]);

    /// The transpose of [`Device::rope`], in place: gradients of rotated heads become gradients of plain ones.
    fn rope_backward(&self, dx: &mut [f32], table: &RopeTable, positions: &[u32]);

    /// Gradients of [`Device::attention`] over spans without a past, where `dy` is that of its output. Every row of a
    /// span is replaced in `gradients`; rows of no span keep what they had.
    fn attention_backward(
        &self,
        shape: AttentionShape,
        heads: Heads<'_>,
        spans: &[Range<usize>],
        dy: &[f32],
        gradients: HeadsMut<'_>,
    );

    /// Replaces gate and up (both before [`Device::swiglu`]) by their gradients, where `dy` is that of `silu(gate) * up`.
    fn swiglu_backward(&self, dy: &[f32], gate: &mut [f32], up: &mut [f32]);

    /// Takes a chunk of each row's logits into the row's sum of exponentials. `logits` is `[sums.len(), any width]`.
    fn log_sum_exp(&self, logits: &[f32], sums: &mut [LogSumExp]);

    /// `logits = weights[r] * exp(logits - log_sums[r])`: weighted probabilities, of which cross-entropy's gradient lacks
    /// only the `-weights[r]` at the target. `logits` is `[weights.len(), any width]`, any chunk of the vocabulary.
    fn softmax_weighted(&self, weights: &[f32], log_sums: &[f64], logits: &mut [f32]);

    /// The Kullback-Leibler divergence of a chunk of the vocabulary from the same chunk of a reference, each given as
    /// (logits, log-sums of the rows): with `p` the probabilities of the reference and `q` those of the logits,
    /// `divergences[r] += sum p ln(p / q)` and `logits = weights[r] * (q - p)`, the gradient of the weighted divergence.
    fn divergence_backward(
        &self,
        weights: &[f32],
        reference: (&[f32], &[f64]),
        logits: (&mut [f32], &[f64]),
        divergences: &mut [f64],
    );

    /// `H += X^T X` on the lower triangle (diagonal included) of the `[cols, cols]` matrix `h`; the strict upper triangle is
    /// left as it is. `x` is `[n, h.cols()]`.
    fn gram(&self, x: &[f32], h: &mut Matrix);

    /// Replaces a symmetric positive definite matrix, given by its lower triangle, by the upper triangular `U` with
    /// `H^-1 = U^T U` (the factor that GPTQ calls Hinv after its Cholesky calls); the strict lower triangle becomes 0.
    fn inverse_cholesky_upper(&self, h: &mut Matrix) -> Result<(), NotPositiveDefinite>;

    /// `C[m, n] = beta C + alpha A[m, k] B[k, n]`, row-major, each with its own row stride, on the calling thread alone.
    fn matmul_sequential(&self, alpha: f32, a: Strided<'_>, b: Strided<'_>, beta: f32, c: StridedMut<'_>);

    /// Rounds a whole layer, where the device can and nothing stands against it. `None` when it cannot, and also when weights or
    /// scales are out of range: the quantizer then does it by itself and says what is wrong.
    fn round_layer(&self, _job: &RoundingJob<'_>) -> Option<Rounded> {
        None
    }

    /// `tr(E H E^T)` for `errors` `[n, in]`, where the device can; of `hessian` `[in, in]` the lower triangle is read.
    fn quadratic_loss(&self, _errors: &Matrix, _hessian: &Matrix) -> Option<f64> {
        None
    }
}

/// A row-major matrix inside a slice: row `r` starts at `r * stride`.
#[derive(Clone, Copy, Debug)]
pub struct Strided<'a> {
    /// Elements; at least `(rows - 1) * stride + cols`.
    pub data: &'a [f32],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next; at least `cols`.
    pub stride: usize,
}

/// A mutable [`Strided`].
#[derive(Debug)]
pub struct StridedMut<'a> {
    /// Elements; at least `(rows - 1) * stride + cols`.
    pub data: &'a mut [f32],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next; at least `cols`.
    pub stride: usize,
}
