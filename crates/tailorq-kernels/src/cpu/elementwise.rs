//! Operations on single elements, and reading embeddings.

use super::simd::Isa;
use super::{exp, unpack};
use crate::shapes;
use rayon::prelude::*;
use tailorq_tensor::Weight;

/// Elements a task.
pub(super) const CHUNK: usize = 1 << 14;

/// Whole rows of `width` elements that make about one chunk.
pub(super) fn rows_per_task(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}

pub(super) fn embed(isa: Isa, ids: &[u32], table: &Weight, y: &mut [f32]) {
    shapes::embed(ids, table, y);
    let width = table.cols().max(1);
    ids.par_iter().zip(y.par_chunks_exact_mut(width)).with_min_len(rows_per_task(width)).for_each(|(&id, row)| {
        unpack::read_rows(isa, table, id as usize, row);
    });
}

pub(super) fn swiglu(isa: Isa, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "swiglu: gate and up have the same shape");
    gate.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK)).for_each(|(gate, up)| exp::swiglu(isa, gate, up));
}

/// Bound by memory: what the compiler makes of the loop is as fast as any lanes.
pub(super) fn add(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "add: x and y have the same shape");
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x;
        }
    });
}
