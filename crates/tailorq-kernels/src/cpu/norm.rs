//! Root mean square normalization.

use super::elementwise::rows_per_task;
use super::simd::{Isa, LANES, Simd, per_isa};
use crate::shapes;
use rayon::prelude::*;

pub(super) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    shapes::rows_of(weight.len(), x, y);
    let width = weight.len().max(1);
    let task = rows_per_task(width) * width;
    y.par_chunks_mut(task).zip(x.par_chunks(task)).for_each(|(y, x)| normalize(isa, x, weight, eps, y));
}

per_isa! {
    /// Some rows of `weight.len()` elements.
    fn normalize(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) = normalize_body
}

#[inline(always)]
fn normalize_body<S: Simd>(simd: S, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let width = weight.len();
    let (weights, weight_tail) = weight.as_chunks::<LANES>();
    for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let mean = super::dot::dot_body(simd, x, x) / width as f32;
        let scale = simd.splat(1.0 / (mean + eps).sqrt());
        let (x, x_tail) = x.as_chunks::<LANES>();
        let (y, y_tail) = y.as_chunks_mut::<LANES>();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weights) {
            simd.store(simd.mul(simd.mul(simd.load(x), scale), simd.load(w)), y);
        }
        if !x_tail.is_empty() {
            let x = simd.mul(simd.load_partial(x_tail, 0.0), scale);
            simd.store_partial(simd.mul(x, simd.load_partial(weight_tail, 0.0)), y_tail);
        }
    }
}
