//! Attention of single queries: a walk over the keys and values where they lie, in whatever precision.
//!
//! Up to [`HEADS`] query heads that read the same keys walk together, so that a key is loaded and widened once for all of
//! them. Every head adds in the order in which it would alone.

use super::dot::{Stored, dots};
use super::simd::{Isa, LANES, Simd, per_isa};
use super::{exp, scratch};
use crate::AttentionShape;
use crate::kv::{KV_PAGE, KeyValues, Part, Run};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::ops::Range;

/// Query heads that walk together.
pub(super) const HEADS: usize = 4;
/// Elements by which the buffer of scores grows, so that a growing sequence seldom asks for a larger one.
const SCORES_STEP: usize = 1 << 14;

/// Vectors of a row that are summed at once.
const COLUMNS: usize = 2;

/// Attention of up to [`HEADS`] heads of one query, `q` and `y` `[heads, head_dim]`, over the visible tokens of their key head.
pub(super) fn walk(
    isa: Isa,
    shape: AttentionShape,
    q: &[f32],
    source: KeyValues<'_>,
    kv_head: usize,
    visible: Range<usize>,
    y: &mut [f32],
) {
    let (head_dim, n) = (shape.head_dim, visible.len());
    let scale = 1.0 / (head_dim as f32).sqrt();
    let n_scores = q.len() / head_dim * n;
    scratch::with(n_scores.next_multiple_of(SCORES_STEP), |scores| {
        let scores = &mut scores[..n_scores];
        for piece in source.pieces(visible.clone()) {
            let place = Place { head_dim, n: piece.len(), stride: n };
            let out = &mut scores[piece.start - visible.start..];
            score(isa, q, source.run(Part::Keys, shape, kv_head, piece), place, scale, out);
        }
        let mut totals = [1.0; HEADS];
        for (row, total) in scores.chunks_exact_mut(n).zip(&mut totals) {
            *total = exp::softmax_unscaled(isa, row);
        }
        y.fill(0.0);
        for piece in source.pieces(visible.clone()) {
            let place = Place { head_dim, n: piece.len(), stride: n };
            let weights = &mut scores[piece.start - visible.start..];
            mix(isa, weights, source.run(Part::Values, shape, kv_head, piece), place, y);
        }
        for (y, total) in y.chunks_exact_mut(head_dim).zip(totals) {
            let scale = 1.0 / total;
            for y in y {
                *y *= scale;
            }
        }
    });
}

/// `n` tokens of rows of `head_dim`; the scores of head `h` begin `h * stride` elements after those of the first.
#[derive(Clone, Copy)]
struct Place {
    head_dim: usize,
    n: usize,
    stride: usize,
}

/// `out[h, j] = scale * dot(q[h], key j)`.
fn score(isa: Isa, q: &[f32], keys: Run<'_>, place: Place, scale: f32, out: &mut [f32]) {
    match keys {
        Run::F32 { data, stride } => score_f32(isa, q, data, stride, place, scale, out),
        Run::F16(data) => score_f16(isa, q, data, place.head_dim, place, scale, out),
        Run::Q8 { codes, scales } => {
            score_q8(isa, q, codes, place.head_dim, place, scale, out);
            multiply(q.len() / place.head_dim, scales, place, out);
        }
    }
}

/// `y[h] += sum_j weights[h, j] * value j`. The weights are lost.
fn mix(isa: Isa, weights: &mut [f32], values: Run<'_>, place: Place, y: &mut [f32]) {
    match values {
        Run::F32 { data, stride } => mix_f32(isa, weights, data, stride, place, y),
        Run::F16(data) => mix_f16(isa, weights, data, place.head_dim, place, y),
        Run::Q8 { codes, scales } => {
            multiply(y.len() / place.head_dim, scales, place, weights);
            mix_q8(isa, weights, codes, place.head_dim, place, y);
        }
    }
}

/// `scores[h, j] *= scales[j]`.
fn multiply(heads: usize, scales: &[f16], place: Place, scores: &mut [f32]) {
    let mut wide = [0.0; KV_PAGE];
    let wide = &mut wide[..place.n];
    scales.convert_to_f32_slice(wide);
    for h in 0..heads {
        for (score, scale) in scores[h * place.stride..][..place.n].iter_mut().zip(wide.iter()) {
            *score *= scale;
        }
    }
}

per_isa! {
    fn score_f32(q: &[f32], keys: &[f32], stride: usize, place: Place, scale: f32, out: &mut [f32]) = score_body
}
per_isa! {
    fn score_f16(q: &[f32], keys: &[f16], stride: usize, place: Place, scale: f32, out: &mut [f32]) = score_body
}
per_isa! {
    fn score_q8(q: &[f32], keys: &[i8], stride: usize, place: Place, scale: f32, out: &mut [f32]) = score_body
}
per_isa! {
    fn mix_f32(weights: &[f32], values: &[f32], stride: usize, place: Place, y: &mut [f32]) = mix_body
}
per_isa! {
    fn mix_f16(weights: &[f32], values: &[f16], stride: usize, place: Place, y: &mut [f32]) = mix_body
}
per_isa! {
    fn mix_q8(weights: &[f32], values: &[i8], stride: usize, place: Place, y: &mut [f32]) = mix_body
}

#[inline(always)]
fn score_body<S: Simd, T: Stored>(
    simd: S,
    q: &[f32],
    keys: &[T],
    stride: usize,
    place: Place,
    scale: f32,
    out: &mut [f32],
) {
    match q.len() / place.head_dim {
        4 => score_heads::<S, T, 4>(simd, q, keys, stride, place, scale, out),
        3 => score_heads::<S, T, 3>(simd, q, keys, stride, place, scale, out),
        2 => score_heads::<S, T, 2>(simd, q, keys, stride, place, scale, out),
        1 => score_heads::<S, T, 1>(simd, q, keys, stride, place, scale, out),
        n => unreachable!("{n} heads walk together"),
    }
}

#[inline(always)]
fn score_heads<S: Simd, T: Stored, const N: usize>(
    simd: S,
    q: &[f32],
    keys: &[T],
    stride: usize,
    place: Place,
    scale: f32,
    out: &mut [f32],
) {
    let width = place.head_dim;
    let queries: [&[f32]; N] = std::array::from_fn(|h| &q[h * width..(h + 1) * width]);
    for j in 0..place.n {
        let sums = dots(simd, queries, &keys[j * stride..j * stride + width]);
        for (h, sum) in sums.into_iter().enumerate() {
            out[h * place.stride + j] = scale * sum;
        }
    }
}

#[inline(always)]
fn mix_body<S: Simd, T: Stored>(simd: S, weights: &[f32], values: &[T], stride: usize, place: Place, y: &mut [f32]) {
    match y.len() / place.head_dim {
        4 => mix_heads::<S, T, 4>(simd, weights, values, stride, place, y),
        3 => mix_heads::<S, T, 3>(simd, weights, values, stride, place, y),
        2 => mix_heads::<S, T, 2>(simd, weights, values, stride, place, y),
        1 => mix_heads::<S, T, 1>(simd, weights, values, stride, place, y),
        n => unreachable!("{n} heads walk together"),
    }
}

#[inline(always)]
fn mix_heads<S: Simd, T: Stored, const N: usize>(
    simd: S,
    weights: &[f32],
    values: &[T],
    stride: usize,
    place: Place,
    y: &mut [f32],
) {
    let width = place.head_dim;
    let mut at = 0;
    while at + COLUMNS * LANES <= width {
        let mut sums = [[simd.splat(0.0); COLUMNS]; N];
        for h in 0..N {
            let (old, _) = y[h * width + at..h * width + at + COLUMNS * LANES].as_chunks::<LANES>();
            for c in 0..COLUMNS {
                sums[h][c] = simd.load(&old[c]);
            }
        }
        for j in 0..place.n {
            let (row, _) = values[j * stride + at..j * stride + at + COLUMNS * LANES].as_chunks::<LANES>();
            for c in 0..COLUMNS {
                let value = T::load(simd, &row[c]);
                for h in 0..N {
                    sums[h][c] = simd.mul_add(simd.splat(weights[h * place.stride + j]), value, sums[h][c]);
                }
            }
        }
        for h in 0..N {
            let (new, _) = y[h * width + at..h * width + at + COLUMNS * LANES].as_chunks_mut::<LANES>();
            for c in 0..COLUMNS {
                simd.store(sums[h][c], &mut new[c]);
            }
        }
        at += COLUMNS * LANES;
    }
    while at < width {
        let end = width.min(at + LANES);
        for h in 0..N {
            let y = &mut y[h * width + at..h * width + end];
            let mut sum = simd.load_partial(y, 0.0);
            for j in 0..place.n {
                let value = T::load_partial(simd, &values[j * stride + at..j * stride + end]);
                sum = simd.mul_add(simd.splat(weights[h * place.stride + j]), value, sum);
            }
            simd.store_partial(sum, y);
        }
        at = end;
    }
}
