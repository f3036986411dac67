//! The scalar device: every operation written as its definition, sums in f64, rounded to f32 once at the end.
//!
//! It is the truth that faster devices are measured against; nothing here is meant to be fast.
#![forbid(unsafe_code)]

mod backward;

use crate::{
    AttentionShape, AttentionSpan, Device, GradientSums, Heads, HeadsMut, LogSumExp, NotPositiveDefinite, Part,
    RopeTable, Strided, StridedMut, shapes,
};
use std::ops::Range;
use tailorq_tensor::{Matrix, Weight};

/// See the module.
pub(crate) struct Reference;

/// Sum of products, in f64 and in order.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

impl Device for Reference {
    fn name(&self) -> String {
        "reference".into()
    }

    fn linear_rows(&self, x: &[f32], w: &Weight, bias: Option<&[f32]>, rows: Range<usize>, y: &mut [f32]) {
        let n = shapes::linear(x, w, bias, &rows, y);
        let cols = w.cols();
        let mut weight = vec![0.0; cols];
        for (i, r) in rows.clone().enumerate() {
            w.reader().read_rows(r, &mut weight);
            for t in 0..n {
                let sum = dot(&x[t * cols..(t + 1) * cols], &weight) + bias.map_or(0.0, |b| f64::from(b[r]));
                y[t * rows.len() + i] = sum as f32;
            }
        }
    }

    fn embed(&self, ids: &[u32], table: &Weight, y: &mut [f32]) {
        shapes::embed(ids, table, y);
        for (&id, row) in ids.iter().zip(y.chunks_exact_mut(table.cols().max(1))) {
            table.reader().read_rows(id as usize, row);
        }
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        shapes::rows_of(weight.len(), x, y);
        let width = weight.len().max(1);
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let scale = 1.0 / (dot(x, x) / width as f64 + f64::from(eps)).sqrt();
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
                *y = (f64::from(x) * scale * f64::from(w)) as f32;
            }
        }
    }

    fn rope(&self, x: &mut [f32], table: &RopeTable, positions: &[u32]) {
        let width = shapes::rope(x, table, positions);
        let half = table.half;
        for (row, &position) in x.chunks_exact_mut(width.max(1)).zip(positions) {
            let at = position as usize * half;
            for head in row.chunks_exact_mut(2 * half) {
                for i in 0..half {
                    let (cos, sin) = (f64::from(table.cos[at + i]), f64::from(table.sin[at + i]));
                    let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
                    head[i] = (a * cos - b * sin) as f32;
                    head[i + half] = (b * cos + a * sin) as f32;
                }
            }
        }
    }

    fn attention(&self, shape: AttentionShape, q: &[f32], spans: &[AttentionSpan<'_>], y: &mut [f32]) {
        shapes::attention(shape, q, spans, y);
        let AttentionShape { heads, kv_heads, head_dim, window } = shape;
        for span in spans {
            for (i, row) in span.rows.clone().enumerate() {
                for head in 0..heads {
                    let at = (row * heads + head) * head_dim;
                    let kv_head = head / (heads / kv_heads);
                    let visible = shapes::visible(span.past + i, window);
                    attend_one(shape, &q[at..at + head_dim], span, kv_head, visible, &mut y[at..at + head_dim]);
                }
            }
        }
    }

    fn swiglu(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "swiglu: gate and up have the same shape");
        for (gate, &up) in gate.iter_mut().zip(up) {
            let g = f64::from(*gate);
            *gate = (g / (1.0 + (-g).exp()) * f64::from(up)) as f32;
        }
    }

    fn add(&self, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "add: x and y have the same shape");
        for (y, &x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }

    fn linear_backward_rows(&self, dy: &[f32], w: &Weight, rows: Range<usize>, dx: &mut [f32]) {
        backward::linear_rows(dy, w, rows, dx);
    }

    fn weight_gradients(&self, dy: &[f32], x: &[f32], spans: &[Range<usize>], sums: GradientSums<'_>) {
        backward::weight_gradients(dy, x, spans, sums);
    }

    fn rms_norm_backward(&self, x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        backward::rms_norm(x, weight, eps, dy, dx);
    }

    fn rope_backward(&self, dx: &mut [f32], table: &RopeTable, positions: &[u32]) {
        backward::rope(dx, table, positions);
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        heads: Heads<'_>,
        spans: &[Range<usize>],
        dy: &[f32],
        gradients: HeadsMut<'_>,
    ) {
        backward::attention(shape, &heads, spans, dy, gradients);
    }

    fn swiglu_backward(&self, dy: &[f32], gate: &mut [f32], up: &mut [f32]) {
        backward::swiglu(dy, gate, up);
    }

    fn log_sum_exp(&self, logits: &[f32], sums: &mut [LogSumExp]) {
        backward::log_sum_exp(logits, sums);
    }

    fn softmax_weighted(&self, weights: &[f32], log_sums: &[f64], logits: &mut [f32]) {
        backward::softmax_weighted(weights, log_sums, logits);
    }

    fn divergence_backward(
        &self,
        weights: &[f32],
        reference: (&[f32], &[f64]),
        logits: (&mut [f32], &[f64]),
        divergences: &mut [f64],
    ) {
        backward::divergence(weights, reference, logits, divergences);
    }

    fn gram(&self, x: &[f32], h: &mut Matrix) {
        let cols = h.cols();
        assert_eq!(h.rows(), cols, "gram: H is square");
        assert!(x.is_empty() || (cols > 0 && x.len().is_multiple_of(cols)), "gram: x is [n, {cols}]");
        for i in 0..cols {
            for j in 0..=i {
                let sum: f64 = x.chunks_exact(cols).map(|row| f64::from(row[i]) * f64::from(row[j])).sum();
                let value = &mut h.row_mut(i)[j];
                *value = (f64::from(*value) + sum) as f32;
            }
        }
    }

    fn inverse_cholesky_upper(&self, h: &mut Matrix) -> Result<(), NotPositiveDefinite> {
        let n = h.cols();
        assert_eq!(h.rows(), n, "inverse_cholesky_upper: H is square");
        let factor = reversed_cholesky(h)?;
        let inverse = invert_lower(n, &factor);
        for i in 0..n {
            for j in 0..n {
                // U = J L^-1 J: row i of U is row n-1-i of L^-1, read backwards.
                h.row_mut(i)[j] = if j < i { 0.0 } else { inverse[(n - 1 - i) * n + (n - 1 - j)] as f32 };
            }
        }
        Ok(())
    }

    fn matmul_sequential(&self, alpha: f32, a: Strided<'_>, b: Strided<'_>, beta: f32, c: StridedMut<'_>) {
        assert_eq!((a.rows, a.cols, b.cols), (c.rows, b.rows, c.cols), "matmul: shapes of A, B and C");
        for i in 0..c.rows {
            for j in 0..c.cols {
                let sum: f64 = (0..a.cols)
                    .map(|l| f64::from(a.data[i * a.stride + l]) * f64::from(b.data[l * b.stride + j]))
                    .sum();
                let value = &mut c.data[i * c.stride + j];
                // As in BLAS, a zero beta does not read C, which may hold anything.
                let kept = if beta == 0.0 { 0.0 } else { f64::from(beta) * f64::from(*value) };
                *value = (kept + f64::from(alpha) * sum) as f32;
            }
        }
    }
}

/// Softmax attention of one query head over the `visible` keys of its span.
fn attend_one(
    shape: AttentionShape,
    q: &[f32],
    span: &AttentionSpan<'_>,
    kv_head: usize,
    visible: Range<usize>,
    y: &mut [f32],
) {
    let head_dim = q.len();
    let read = |part| {
        let mut rows = vec![0.0; visible.len() * head_dim];
        span.source.read(part, shape, kv_head, visible.clone(), &mut rows);
        rows
    };
    let (keys, values) = (read(Part::Keys), read(Part::Values));
    let scale = 1.0 / (head_dim as f64).sqrt();
    let scores: Vec<f64> = keys.chunks_exact(head_dim).map(|key| dot(q, key) * scale).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    for (i, y) in y.iter_mut().enumerate() {
        let mixed: f64 = values.chunks_exact(head_dim).zip(&weights).map(|(value, w)| w * f64::from(value[i])).sum();
        *y = (mixed / total) as f32;
    }
}

/// The Cholesky factor `L` (`[n, n]`, lower) of `J H J`, where `J` reverses the order of rows and columns.
fn reversed_cholesky(h: &Matrix) -> Result<Vec<f64>, NotPositiveDefinite> {
    let n = h.cols();
    let mut l = vec![0.0f64; n * n];
    for j in 0..n {
        for i in j..n {
            // Element (i, j) of J H J is element (n-1-i, n-1-j) of H, whose lower triangle holds its mirror image.
            let mut sum = f64::from(h.row(n - 1 - j)[n - 1 - i]);
            for k in 0..j {
                sum -= l[i * n + k] * l[j * n + k];
            }
            if i > j {
                l[i * n + j] = sum / l[j * n + j];
            } else if sum > 0.0 && sum.is_finite() {
                l[j * n + j] = sum.sqrt();
            } else {
                return Err(NotPositiveDefinite { pivot: j });
            }
        }
    }
    Ok(l)
}

/// The inverse of a lower triangular `[n, n]` matrix, by forward substitution.
fn invert_lower(n: usize, l: &[f64]) -> Vec<f64> {
    let mut inverse = vec![0.0f64; n * n];
    for j in 0..n {
        for i in j..n {
            let mut sum = if i == j { 1.0 } else { 0.0 };
            for k in j..i {
                sum -= l[i * n + k] * inverse[k * n + j];
            }
            inverse[i * n + j] = sum / l[i * n + i];
        }
    }
    inverse
}
