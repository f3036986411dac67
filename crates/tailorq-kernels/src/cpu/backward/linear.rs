//! What linears pass back: `dx += dy W`, and sums over samples of `dy^T x`.

use crate::cpu::gemm::{View, gemm};
use crate::cpu::simd::{Isa, LANES, Simd, per_isa};
use crate::cpu::tile::{Part, Tile};
use crate::cpu::{scratch, unpack};
use crate::{GradientSums, shapes};
use rayon::prelude::*;
use std::ops::Range;
use tailorq_tensor::{Matrix, Weight};

/// Weight rows that are decoded and multiplied at once; with 4864 inputs, 10 MB.
const PANEL: usize = 512;
/// Weight rows that one task decodes.
const DECODED: usize = 16;
/// Rows and columns of a tile of the result.
const TILE: usize = 256;

/// Panel by panel of weight rows, each decoded once however many tokens there are.
pub(in crate::cpu) fn rows(isa: Isa, dy: &[f32], w: &Weight, rows: Range<usize>, dx: &mut [f32]) {
    let n = shapes::linear_backward(dy, w, &rows, dx);
    let (cols, width) = (w.cols(), rows.len());
    if n == 0 || cols == 0 {
        return;
    }
    let mut decoded = Vec::new();
    for start in rows.clone().step_by(PANEL) {
        let depth = PANEL.min(rows.end - start);
        let panel: &[f32] = if let Weight::Dense(m) = w {
            &m.data()[start * cols..(start + depth) * cols]
        } else {
            decoded.resize(depth * cols, 0.0);
            decoded.par_chunks_mut(DECODED * cols).enumerate().for_each(|(i, part)| {
                unpack::read_rows(isa, w, start + i * DECODED, part);
            });
            &decoded
        };
        let first = start - rows.start;
        Tile::new(dx, n, cols, cols).grid(TILE, TILE).into_par_iter().for_each(|Part { row, col, mut tile }| {
            let dy = View::new(&dy[row * width + first..], tile.rows(), depth, width);
            gemm(1.0, dy, View::new(&panel[col..], depth, tile.cols(), cols), 1.0, &mut tile);
        });
    }
}

/// One tile of each sum.
struct Task<'a> {
    row: usize,
    col: usize,
    rows: usize,
    cols: usize,
    sum: Option<Tile<'a>>,
    absolute: Option<Tile<'a>>,
    square: Option<Tile<'a>>,
}

/// Tile by tile: the gradient of a sample lives in a thread's scratch only until it is added.
pub(in crate::cpu) fn weight_gradients(
    isa: Isa,
    dy: &[f32],
    x: &[f32],
    spans: &[Range<usize>],
    sums: GradientSums<'_>,
) {
    let Some((rows, cols)) = shapes::weight_gradients(dy, x, spans, &sums) else { return };
    let grid = |m| parts(m, rows, cols).into_iter();
    let (mut sum, mut absolute, mut square) = (grid(sums.sum), grid(sums.absolute), grid(sums.square));
    let mut tasks = Vec::new();
    for row in (0..rows).step_by(TILE) {
        for col in (0..cols).step_by(TILE) {
            let next = (sum.next(), absolute.next(), square.next());
            let (height, width) = (TILE.min(rows - row), TILE.min(cols - col));
            tasks.push(Task { row, col, rows: height, cols: width, sum: next.0, absolute: next.1, square: next.2 });
        }
    }
    tasks.into_par_iter().for_each(|task| accumulate(isa, (dy, rows), (x, cols), spans, task));
}

/// The tiles of a sum, if it is asked for.
fn parts(m: Option<&mut Matrix>, rows: usize, cols: usize) -> Vec<Tile<'_>> {
    let parts = m.map(|m| Tile::new(m.data_mut(), rows, cols, cols).grid(TILE, TILE));
    parts.unwrap_or_default().into_iter().map(|part| part.tile).collect()
}

/// All samples of one tile, in order.
fn accumulate(
    isa: Isa,
    (dy, out): (&[f32], usize),
    (x, inputs): (&[f32], usize),
    spans: &[Range<usize>],
    mut task: Task<'_>,
) {
    scratch::with(task.rows * task.cols, |gradient| {
        for span in spans.iter().filter(|s| !s.is_empty()) {
            let left = View::new(&dy[span.start * out + task.row..], span.len(), task.rows, out).transposed();
            let right = View::new(&x[span.start * inputs + task.col..], span.len(), task.cols, inputs);
            gemm(1.0, left, right, 0.0, &mut Tile::new(gradient, task.rows, task.cols, task.cols));
            for (r, gradient) in gradient.chunks_exact(task.cols).enumerate() {
                if let Some(sum) = &mut task.sum {
                    add(isa, gradient, sum.row_mut(r));
                }
                if let Some(sum) = &mut task.absolute {
                    add_absolute(isa, gradient, sum.row_mut(r));
                }
                if let Some(sum) = &mut task.square {
                    add_square(isa, gradient, sum.row_mut(r));
                }
            }
        }
    });
}

per_isa! {
    /// `sum += x`.
    fn add(x: &[f32], sum: &mut [f32]) = add_body
}

per_isa! {
    /// `sum += |x|`.
    fn add_absolute(x: &[f32], sum: &mut [f32]) = add_absolute_body
}

per_isa! {
    /// `sum += x^2`.
    fn add_square(x: &[f32], sum: &mut [f32]) = add_square_body
}

#[inline(always)]
fn add_body<S: Simd>(simd: S, x: &[f32], sum: &mut [f32]) {
    fold(simd, x, sum, |sum, x| simd.add(sum, x));
}

#[inline(always)]
fn add_absolute_body<S: Simd>(simd: S, x: &[f32], sum: &mut [f32]) {
    // Lanes have no absolute value: the larger of x and -x is it, and NaN stays NaN in the second place.
    fold(simd, x, sum, |sum, x| simd.add(sum, simd.max(simd.sub(simd.splat(0.0), x), x)));
}

#[inline(always)]
fn add_square_body<S: Simd>(simd: S, x: &[f32], sum: &mut [f32]) {
    fold(simd, x, sum, |sum, x| simd.mul_add(x, x, sum));
}

/// `sum = f(sum, x)`, lane by lane.
#[inline(always)]
fn fold<S: Simd>(simd: S, x: &[f32], sum: &mut [f32], f: impl Fn(S::F, S::F) -> S::F) {
    assert_eq!(x.len(), sum.len(), "sums of gradients: lengths");
    let (chunks, tail) = x.as_chunks::<LANES>();
    let (sums, sum_tail) = sum.as_chunks_mut::<LANES>();
    for (x, sum) in chunks.iter().zip(sums) {
        simd.store(f(simd.load(sum), simd.load(x)), sum);
    }
    if !tail.is_empty() {
        let value = f(simd.load_partial(sum_tail, 0.0), simd.load_partial(tail, 0.0));
        simd.store_partial(value, sum_tail);
    }
}
