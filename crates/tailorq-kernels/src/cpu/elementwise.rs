//! Operations on single elements and rows.

use crate::{RopeTable, shapes};
use rayon::prelude::*;
use tailorq_tensor::Weight;

/// Elements a task.
const CHUNK: usize = 1 << 14;

/// Whole rows of `width` elements that make about one chunk.
fn rows_per_task(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}

pub(super) fn embed(ids: &[u32], table: &Weight, y: &mut [f32]) {
    shapes::embed(ids, table, y);
    for (&id, row) in ids.iter().zip(y.chunks_exact_mut(table.cols().max(1))) {
        table.reader().read_rows(id as usize, row);
    }
}

pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    shapes::rows_of(weight.len(), x, y);
    let width = weight.len().max(1);
    let task = rows_per_task(width) * width;
    y.par_chunks_mut(task).zip(x.par_chunks(task)).for_each(|(y, x)| {
        for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let mean = x.iter().map(|x| x * x).sum::<f32>() / width as f32;
            let scale = 1.0 / (mean + eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * scale * w;
            }
        }
    });
}

pub(super) fn rope(x: &mut [f32], table: &RopeTable, positions: &[u32]) {
    let width = shapes::rope(x, table, positions);
    if width == 0 {
        return;
    }
    let half = table.half;
    let rows = rows_per_task(width);
    x.par_chunks_mut(rows * width).zip(positions.par_chunks(rows)).for_each(|(x, positions)| {
        for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
            let at = position as usize * half;
            let (cos, sin) = (&table.cos[at..at + half], &table.sin[at..at + half]);
            for head in row.chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (first[i], second[i]);
                    first[i] = a * cos[i] - b * sin[i];
                    second[i] = b * cos[i] + a * sin[i];
                }
            }
        }
    });
}

pub(super) fn swiglu(gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "swiglu: gate and up have the same shape");
    gate.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK)).for_each(|(gate, up)| {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + (-*g).exp()) * u;
        }
    });
}

pub(super) fn add(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "add: x and y have the same shape");
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x;
        }
    });
}
