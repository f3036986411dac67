//! The backward operations as their definitions.

use super::dot;
use crate::{AttentionShape, GradientSums, Heads, HeadsMut, LogSumExp, RopeTable, shapes};
use std::ops::Range;
use tailorq_tensor::{Matrix, Weight};

pub(super) fn linear_rows(dy: &[f32], w: &Weight, rows: Range<usize>, dx: &mut [f32]) {
    let n = shapes::linear_backward(dy, w, &rows, dx);
    let cols = w.cols();
    let mut sums: Vec<f64> = dx.iter().map(|&v| f64::from(v)).collect();
    let mut weight = vec![0.0; cols];
    for (i, r) in rows.clone().enumerate() {
        w.reader().read_rows(r, &mut weight);
        for t in 0..n {
            let dy = f64::from(dy[t * rows.len() + i]);
            for (sum, &w) in sums[t * cols..(t + 1) * cols].iter_mut().zip(&weight) {
                *sum += dy * f64::from(w);
            }
        }
    }
    for (dx, sum) in dx.iter_mut().zip(sums) {
        *dx = sum as f32;
    }
}

pub(super) fn weight_gradients(dy: &[f32], x: &[f32], spans: &[Range<usize>], mut sums: GradientSums<'_>) {
    let Some((rows, cols)) = shapes::weight_gradients(dy, x, spans, &sums) else { return };
    let add = |sum: &mut Option<&mut Matrix>, at: (usize, usize), value: f64| {
        if let Some(sum) = sum {
            let element = &mut sum.row_mut(at.0)[at.1];
            *element = (f64::from(*element) + value) as f32;
        }
    };
    for span in spans {
        for (i, j) in (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))) {
            let products = span.clone().map(|t| f64::from(dy[t * rows + i]) * f64::from(x[t * cols + j]));
            let gradient: f64 = products.sum();
            add(&mut sums.sum, (i, j), gradient);
            add(&mut sums.absolute, (i, j), gradient.abs());
            add(&mut sums.square, (i, j), gradient * gradient);
        }
    }
}

/// With `s = 1 / sqrt(mean(x^2) + eps)` and `g = weight * dy`: `dx += s g - s^3 mean(g x) x`.
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    shapes::rows_of(weight.len(), x, dy);
    shapes::rows_of(weight.len(), x, dx);
    let width = weight.len().max(1);
    for ((x, dy), dx) in x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
        let scale = 1.0 / (dot(x, x) / width as f64 + f64::from(eps)).sqrt();
        let g: Vec<f64> = weight.iter().zip(dy).map(|(&w, &dy)| f64::from(w) * f64::from(dy)).collect();
        let mean = g.iter().zip(x).map(|(g, &x)| g * f64::from(x)).sum::<f64>() / width as f64;
        for ((dx, g), &x) in dx.iter_mut().zip(g).zip(x) {
            *dx = (f64::from(*dx) + scale * g - scale.powi(3) * mean * f64::from(x)) as f32;
        }
    }
}

pub(super) fn rope(dx: &mut [f32], table: &RopeTable, positions: &[u32]) {
    let width = shapes::rope(dx, table, positions);
    let half = table.half;
    for (row, &position) in dx.chunks_exact_mut(width.max(1)).zip(positions) {
        let at = position as usize * half;
        for head in row.chunks_exact_mut(2 * half) {
            for i in 0..half {
                let (cos, sin) = (f64::from(table.cos[at + i]), f64::from(table.sin[at + i]));
                let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
                head[i] = (a * cos + b * sin) as f32;
                head[i + half] = (b * cos - a * sin) as f32;
            }
        }
    }
}

pub(super) fn attention(
    shape: AttentionShape,
    heads: &Heads<'_>,
    spans: &[Range<usize>],
    dy: &[f32],
    gradients: HeadsMut<'_>,
) {
    shapes::attention_backward(shape, heads, spans, dy, &gradients);
    let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let mut sums = Sums { q: vec![0.0; heads.q.len()], k: vec![0.0; heads.k.len()], v: vec![0.0; heads.v.len()] };
    for span in spans {
        for (row, head) in span.clone().flat_map(|row| (0..shape.heads).map(move |head| (row, head))) {
            attention_of_one(shape, heads, span.start, (row, head), dy, &mut sums);
        }
        let parts =
            [(&mut *gradients.q, &sums.q, width), (gradients.k, &sums.k, kv_width), (gradients.v, &sums.v, kv_width)];
        for (gradient, sum, width) in parts {
            let rows = span.start * width..span.end * width;
            for (g, &s) in gradient[rows.clone()].iter_mut().zip(&sum[rows]) {
                *g = s as f32;
            }
        }
    }
}

/// Gradients of queries, keys and values in f64.
struct Sums {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
}

/// Adds what one query of one head gives to all gradients.
fn attention_of_one(
    shape: AttentionShape,
    heads: &Heads<'_>,
    first: usize,
    (row, head): (usize, usize),
    dy: &[f32],
    sums: &mut Sums,
) {
    let AttentionShape { heads: n_heads, kv_heads, head_dim, window } = shape;
    let at = (row * n_heads + head) * head_dim;
    let (q, dy) = (&heads.q[at..at + head_dim], &dy[at..at + head_dim]);
    let key_at = |key: usize| ((first + key) * kv_heads + head / (n_heads / kv_heads)) * head_dim;
    let visible = shapes::visible(row - first, window);
    let scale = 1.0 / (head_dim as f64).sqrt();
    let of = |from: &[f32], with: &[f32]| -> Vec<f64> {
        visible.clone().map(|key| dot(with, &from[key_at(key)..key_at(key) + head_dim])).collect()
    };
    let scores: Vec<f64> = of(heads.k, q).iter().map(|s| s * scale).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    let probabilities: Vec<f64> = scores.iter().map(|s| (s - max).exp() / total).collect();
    let d_probabilities = of(heads.v, dy);
    let mean: f64 = probabilities.iter().zip(&d_probabilities).map(|(p, d)| p * d).sum();
    for ((key, p), d) in visible.clone().zip(probabilities).zip(d_probabilities) {
        let d_score = p * (d - mean) * scale;
        for i in 0..head_dim {
            sums.v[key_at(key) + i] += p * f64::from(dy[i]);
            sums.k[key_at(key) + i] += d_score * f64::from(q[i]);
            sums.q[at + i] += d_score * f64::from(heads.k[key_at(key) + i]);
        }
    }
}

pub(super) fn swiglu(dy: &[f32], gate: &mut [f32], up: &mut [f32]) {
    assert!(dy.len() == gate.len() && dy.len() == up.len(), "swiglu_backward: dy, gate and up have the same shape");
    for ((gate, up), &dy) in gate.iter_mut().zip(up).zip(dy) {
        let (g, u, dy) = (f64::from(*gate), f64::from(*up), f64::from(dy));
        let sigmoid = 1.0 / (1.0 + (-g).exp());
        *gate = (dy * u * sigmoid * (1.0 + g * (1.0 - sigmoid))) as f32;
        *up = (dy * g * sigmoid) as f32;
    }
}

pub(super) fn log_sum_exp(logits: &[f32], sums: &mut [LogSumExp]) {
    let width = shapes::logits(logits, sums.len());
    for (row, sum) in logits.chunks_exact(width.max(1)).zip(sums) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total = row.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).sum();
        sum.merge(max, total);
    }
}

pub(super) fn softmax_weighted(weights: &[f32], log_sums: &[f64], logits: &mut [f32]) {
    let width = shapes::softmax(weights, log_sums, logits);
    for ((row, &weight), log_sum) in logits.chunks_exact_mut(width.max(1)).zip(weights).zip(log_sums) {
        for x in row {
            *x = (f64::from(weight) * (f64::from(*x) - log_sum).exp()) as f32;
        }
    }
}

pub(super) fn divergence(
    weights: &[f32],
    (reference, reference_log_sums): (&[f32], &[f64]),
    (logits, log_sums): (&mut [f32], &[f64]),
    divergences: &mut [f64],
) {
    let width = shapes::divergence(weights, (reference, reference_log_sums), (logits, log_sums), divergences).max(1);
    let rows = logits.chunks_exact_mut(width).zip(reference.chunks_exact(width));
    for (r, (logits, reference)) in rows.enumerate() {
        for (x, &y) in logits.iter_mut().zip(reference) {
            let (ln_p, ln_q) = (f64::from(y) - reference_log_sums[r], f64::from(*x) - log_sums[r]);
            divergences[r] += ln_p.exp() * (ln_p - ln_q);
            *x = (f64::from(weights[r]) * (ln_q.exp() - ln_p.exp())) as f32;
        }
    }
}
