//! Linears: `y = x W^T + b` for dense, stored and packed weights.

use super::gemm::{View, gemm};
use super::scratch;
use super::tile::{Part, Tile};
use crate::shapes;
use rayon::prelude::*;
use std::ops::Range;
use tailorq_tensor::Weight;

/// Output rows a task.
const PANEL: usize = 256;
/// Tokens a task.
const TOKENS: usize = 1024;

pub(super) fn linear_rows(x: &[f32], w: &Weight, bias: Option<&[f32]>, rows: Range<usize>, y: &mut [f32]) {
    let n = shapes::linear(x, w, bias, &rows, y);
    let parts = Tile::new(y, n, rows.len(), rows.len()).grid(TOKENS, PANEL);
    parts.into_par_iter().for_each(|part| panel(x, w, bias, rows.start, part));
}

/// One tile of the output: some tokens, some output rows.
fn panel(x: &[f32], w: &Weight, bias: Option<&[f32]>, first_row: usize, part: Part<'_>) {
    let Part { row: token, col, mut tile } = part;
    let (cols, n_rows) = (w.cols(), tile.cols());
    let first = first_row + col;
    let x = View::new(&x[token * cols..], tile.rows(), cols, cols);
    if let Weight::Dense(m) = w {
        let panel = View::new(&m.data()[first * cols..], n_rows, cols, cols);
        gemm(1.0, x, panel.transposed(), 0.0, &mut tile);
    } else {
        scratch::with(n_rows * cols, |panel| {
            w.reader().read_rows(first, panel);
            gemm(1.0, x, View::new(panel, n_rows, cols, cols).transposed(), 0.0, &mut tile);
        });
    }
    if let Some(bias) = bias {
        for t in 0..tile.rows() {
            for (y, b) in tile.row_mut(t).iter_mut().zip(&bias[first..]) {
                *y += b;
            }
        }
    }
}
