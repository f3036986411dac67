//! Rotary position embedding on pairs `(i, i + half)` (Su et al. 2021, in the layout of Hugging Face checkpoints).

use super::elementwise::rows_per_task;
use super::simd::{Isa, LANES, Simd, per_isa};
use crate::{RopeTable, shapes};
use rayon::prelude::*;

/// Rotates forward, or by the transpose where `back` is set.
pub(super) fn rope(isa: Isa, x: &mut [f32], table: &RopeTable, positions: &[u32], back: bool) {
    let sign = if back { -1.0 } else { 1.0 };
    let width = shapes::rope(x, table, positions);
    if width == 0 {
        return;
    }
    let (half, rows) = (table.half, rows_per_task(width));
    x.par_chunks_mut(rows * width).zip(positions.par_chunks(rows)).for_each(|(x, positions)| {
        for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
            let at = position as usize * half;
            rotate(isa, row, &table.cos[at..at + half], &table.sin[at..at + half], sign);
        }
    });
}

per_isa! {
    /// All heads of one row, by the same angles times `sign`.
    fn rotate(row: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) = rotate_body
}

#[inline(always)]
fn rotate_body<S: Simd>(simd: S, row: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let sign = simd.splat(sign);
    let half = cos.len();
    let (cosines, cos_tail) = cos.as_chunks::<LANES>();
    let (sines, sin_tail) = sin.as_chunks::<LANES>();
    for head in row.chunks_exact_mut(2 * half) {
        let (first, second) = head.split_at_mut(half);
        let (firsts, first_tail) = first.as_chunks_mut::<LANES>();
        let (seconds, second_tail) = second.as_chunks_mut::<LANES>();
        for (((a, b), cos), sin) in firsts.iter_mut().zip(seconds).zip(cosines).zip(sines) {
            let (x, y) = rotate_pair(simd, simd.load(a), simd.load(b), simd.load(cos), simd.mul(simd.load(sin), sign));
            simd.store(x, a);
            simd.store(y, b);
        }
        if !first_tail.is_empty() {
            let part = |from: &[f32]| simd.load_partial(from, 0.0);
            let (x, y) =
                rotate_pair(simd, part(first_tail), part(second_tail), part(cos_tail), simd.mul(part(sin_tail), sign));
            simd.store_partial(x, first_tail);
            simd.store_partial(y, second_tail);
        }
    }
}

#[inline(always)]
fn rotate_pair<S: Simd>(simd: S, a: S::F, b: S::F, cos: S::F, sin: S::F) -> (S::F, S::F) {
    (simd.sub(simd.mul(a, cos), simd.mul(b, sin)), simd.mul_add(b, cos, simd.mul(a, sin)))
}
