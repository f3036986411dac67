//! The seam between mathematics and machines.

use std::ops::Range;
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
    /// `[past + rows.len(), kv_heads * head_dim]`.
    pub keys: &'a [f32],
    /// `[past + rows.len(), kv_heads * head_dim]`.
    pub values: &'a [f32],
    /// Keys that precede the first query row: query `rows.start + i` sees keys `0..=past + i`.
    pub past: usize,
}

/// The operations of a language model and of its quantization. Shapes are checked by assertion: a wrong one is a bug.
pub trait Device: Send + Sync {
    /// For reports: `reference`, `cpu avx512`, ...
    fn name(&self) -> String;

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

    /// `H += X^T X` on the lower triangle (diagonal included) of the `[cols, cols]` matrix `h`; the strict upper triangle is
    /// left as it is. `x` is `[n, h.cols()]`.
    fn gram(&self, x: &[f32], h: &mut Matrix);

    /// Replaces a symmetric positive definite matrix, given by its lower triangle, by the upper triangular `U` with
    /// `H^-1 = U^T U` (the factor that GPTQ calls Hinv after its Cholesky calls); the strict lower triangle becomes 0.
    fn inverse_cholesky_upper(&self, h: &mut Matrix) -> Result<(), NotPositiveDefinite>;

    /// `C[m, n] = beta C + alpha A[m, k] B[k, n]`, row-major, each with its own row stride, on the calling thread alone.
    fn matmul_sequential(&self, alpha: f32, a: Strided<'_>, b: Strided<'_>, beta: f32, c: StridedMut<'_>);
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
