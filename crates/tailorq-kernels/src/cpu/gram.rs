//! `H += X^T X` on the lower triangle.

use super::gemm::{View, gemm};
use super::scratch;
use super::tile::{Part, Tile};
use rayon::prelude::*;
use tailorq_tensor::Matrix;

/// Rows and columns of a tile of H.
const TILE: usize = 256;

pub(super) fn gram(x: &[f32], h: &mut Matrix) {
    let cols = h.cols();
    assert_eq!(h.rows(), cols, "gram: H is square");
    assert!(x.is_empty() || (cols > 0 && x.len().is_multiple_of(cols)), "gram: x is [n, {cols}]");
    let n = x.len() / cols.max(1);
    let mut parts = Tile::new(h.data_mut(), cols, cols, cols).grid(TILE, TILE);
    parts.retain(|part| part.col <= part.row);
    parts.into_par_iter().for_each(|part| tile(x, n, cols, part));
}

/// `H_ij += X_i^T X_j`; on the diagonal the lower triangle only.
fn tile(x: &[f32], n: usize, cols: usize, part: Part<'_>) {
    let Part { row, col, tile: mut h } = part;
    if n == 0 {
        return;
    }
    let left = View::new(&x[row..], n, h.rows(), cols).transposed();
    let right = View::new(&x[col..], n, h.cols(), cols);
    if col < row {
        gemm(1.0, left, right, 1.0, &mut h);
        return;
    }
    let size = h.rows();
    scratch::with(size * size, |square| {
        gemm(1.0, left, right, 0.0, &mut Tile::new(square, size, size, size));
        for r in 0..size {
            for (h, s) in h.row_mut(r)[..=r].iter_mut().zip(&square[r * size..]) {
                *h += s;
            }
        }
    });
}
