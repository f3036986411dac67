//! Linears: `y = x W^T + b` for dense, stored and packed weights.
//!
//! Many tokens: tiles of the output, each one sequential matrix product with a panel of weight rows, read to f32 on the
//! way when they are not dense. Few tokens (decoding): each weight row is read once into the first-level cache and
//! multiplied with every token there.

use super::gemm::{View, gemm};
use super::simd::Isa;
use super::tile::{Part, Tile};
use super::{dot, packed, scratch, unpack};
use crate::{Activations, shapes};
use rayon::prelude::*;
use std::ops::Range;
use tailorq_tensor::Weight;

/// Up to this many tokens are multiplied row by row.
const FEW: usize = 12;
/// Tokens a tile.
const TOKENS: usize = 1024;
/// Weight rows a tile: as many as the products take at once with AVX-512, and so few that the 192 rows of a small model's keys are two
/// tasks and its 576 of other matrices six.
const PANEL: usize = 96;
/// Weight elements a task of the row-by-row path.
const ROW_TASK: usize = 1 << 15;

pub(super) fn linear_rows(
    isa: Isa,
    activations: Activations,
    x: &[f32],
    w: &Weight,
    bias: Option<&[f32]>,
    rows: Range<usize>,
    y: &mut [f32],
) {
    let n = shapes::linear(x, w, bias, &rows, y);
    if let (Activations::Int8, Weight::Packed(w)) = (activations, w)
        && packed::reads(w)
    {
        if n <= FEW {
            return packed::few(isa, x, w, bias, rows, y);
        }
        #[cfg(target_arch = "x86_64")]
        if packed::has_vnni(isa) {
            return packed::many(isa, x, w, bias, rows, y);
        }
    }
    let y = Tile::new(y, n, rows.len(), rows.len());
    if n <= FEW {
        let task = (ROW_TASK / w.cols().max(1)).clamp(4, 512);
        let parts = y.grid(FEW, task);
        parts.into_par_iter().for_each(|part| row_by_row(isa, x, w, bias, rows.start, part));
    } else {
        let parts = y.grid(TOKENS, PANEL);
        parts.into_par_iter().for_each(|part| panel(isa, x, w, bias, rows.start, part));
    }
}

/// One tile of the output by a matrix product.
fn panel(isa: Isa, x: &[f32], w: &Weight, bias: Option<&[f32]>, first_row: usize, part: Part<'_>) {
    let Part { row: token, col, mut tile } = part;
    let (cols, n_rows, first) = (w.cols(), tile.cols(), first_row + col);
    let x = View::new(&x[token * cols..], tile.rows(), cols, cols);
    let mut multiply = |panel: &[f32]| gemm(1.0, x, View::new(panel, n_rows, cols, cols).transposed(), 0.0, &mut tile);
    if let Weight::Dense(m) = w {
        multiply(&m.data()[first * cols..(first + n_rows) * cols]);
    } else {
        scratch::with(n_rows * cols, |panel| {
            unpack::read_rows(isa, w, first, panel);
            multiply(panel);
        });
    }
    add_bias(&mut tile, bias, first);
}

/// Adds the bias, if any, to all tokens of a tile whose first column is output row `first`.
pub(super) fn add_bias(tile: &mut Tile<'_>, bias: Option<&[f32]>, first: usize) {
    let Some(bias) = bias else { return };
    for t in 0..tile.rows() {
        for (y, b) in tile.row_mut(t).iter_mut().zip(&bias[first..]) {
            *y += b;
        }
    }
}

/// Some output rows for all of a few tokens.
fn row_by_row(isa: Isa, x: &[f32], w: &Weight, bias: Option<&[f32]>, first_row: usize, part: Part<'_>) {
    let Part { col, mut tile, .. } = part;
    let cols = w.cols();
    let mut sums = [0.0; FEW];
    let sums = &mut sums[..tile.rows()];
    scratch::with(cols, |buffer| {
        for i in 0..tile.cols() {
            let r = first_row + col + i;
            let row: &[f32] = if let Weight::Dense(m) = w {
                m.row(r)
            } else {
                unpack::read_rows(isa, w, r, buffer);
                buffer
            };
            dot::dot_tokens(isa, x, row, sums);
            let bias = bias.map_or(0.0, |b| b[r]);
            for (t, sum) in sums.iter().enumerate() {
                tile.row_mut(t)[i] = sum + bias;
            }
        }
    });
}
