//! The upper triangular factor of an inverse, `H^-1 = U^T U`, without the inverse.
//!
//! With `J` the reversal of the order of rows, `J H J = R^T R` (upper triangular `R`, Cholesky) gives
//! `H = (J R^T J)(J R J)`, and so `U = J R^-T J`: one factorization and one triangular inverse, `2/3 n^3` operations.
//!
//! Both go by blocks of fixed size: faer factors, inverts and solves with the diagonal blocks, sequentially, and the rest
//! are matrix products that threads share tile by tile.

use super::gemm::{View, gemm};
use super::scratch;
use super::tile::{Part, Tile};
use crate::NotPositiveDefinite;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{self, LltError};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::{MatMut, MatRef, Par};
use rayon::prelude::*;
use tailorq_tensor::Matrix;

/// Rows and columns of a block.
const BLOCK: usize = 128;
/// Columns of a tile.
const TILE: usize = 256;
/// Side of the squares in which the last step mirrors the matrix: two fit the first-level cache.
const MIRROR: usize = 32;

pub(super) fn inverse_cholesky_upper(h: &mut Matrix) -> Result<(), NotPositiveDefinite> {
    let n = h.cols();
    assert_eq!(h.rows(), n, "inverse_cholesky_upper: H is square");
    // The elements in reverse order are J H^T J: what was the lower triangle of H is now the upper one.
    h.data_mut().reverse();
    factor_upper(h.data_mut(), n)?;
    let inverse = invert_upper(h.data(), n);
    mirror(&inverse, h.data_mut(), n);
    Ok(())
}

/// Replaces the upper triangle of a symmetric matrix `A = R^T R` by `R`, block row by block row.
fn factor_upper(a: &mut [f32], n: usize) -> Result<(), NotPositiveDefinite> {
    for k in (0..n).step_by(BLOCK) {
        let size = BLOCK.min(n - k);
        let (done, below) = a.split_at_mut((k + size) * n);
        let rows = Tile::new(&mut done[k * n..], size, n, n);
        let (diagonal, right) = rows.split_cols(k).1.split_cols(size);
        let factor = factor_diagonal(diagonal, k)?;
        right.grid(size, TILE).into_par_iter().for_each(|part| solve(&factor, part.tile));
        let row = &done[k * n..];
        let below = Tile::new(below, n - k - size, n, n).split_cols(k + size).1;
        let mut parts = below.grid(TILE, TILE);
        parts.retain(|part| part.row <= part.col);
        parts.into_par_iter().for_each(|Part { row: i, col: j, mut tile }| {
            let left = View::new(&row[k + size + i..], size, tile.rows(), n).transposed();
            let right = View::new(&row[k + size + j..], size, tile.cols(), n);
            gemm(-1.0, left, right, 1.0, &mut tile);
        });
    }
    Ok(())
}

/// Factors one diagonal block, the `k`-th row of the matrix its first; returns a dense copy, lower triangle zero.
fn factor_diagonal(mut block: Tile<'_>, k: usize) -> Result<Vec<f32>, NotPositiveDefinite> {
    let n = block.rows();
    let mut copy = vec![0.0; n * n];
    for r in 0..n {
        copy[r * n + r..(r + 1) * n].copy_from_slice(&block.row_mut(r)[r..]);
    }
    // An upper triangle by rows is a lower triangle by columns.
    let lower = MatMut::from_column_major_slice_mut(&mut copy, n, n);
    let mut memory = MemBuffer::new(factor::cholesky_in_place_scratch::<f32>(n, Par::Seq, Default::default()));
    let stack = MemStack::new(&mut memory);
    factor::cholesky_in_place(lower, Default::default(), Par::Seq, stack, Default::default())
        .map_err(|LltError::NonPositivePivot { index }| NotPositiveDefinite { pivot: k + index })?;
    for r in 0..n {
        copy[r * n..r * n + r].fill(0.0);
        block.row_mut(r)[r..].copy_from_slice(&copy[r * n + r..(r + 1) * n]);
    }
    Ok(copy)
}

/// `X = R^-T X` for one tile of a block row.
fn solve(r: &[f32], mut x: Tile<'_>) {
    let (rows, cols) = (x.rows(), x.cols());
    let lower = MatRef::from_column_major_slice(r, rows, rows);
    scratch::with(rows * cols, |columns| {
        for i in 0..rows {
            for (j, &value) in x.row_mut(i).iter().enumerate() {
                columns[j * rows + i] = value;
            }
        }
        let right = MatMut::from_column_major_slice_mut(columns, rows, cols);
        solve_lower_triangular_in_place(lower, right, Par::Seq);
        for i in 0..rows {
            for (j, value) in x.row_mut(i).iter_mut().enumerate() {
                *value = columns[j * rows + i];
            }
        }
    });
}

/// The inverse of an upper triangular matrix, its lower triangle zero: from the last block row up,
/// `V_ij = -V_ii sum_{i < l <= j} R_il V_lj`.
fn invert_upper(r: &[f32], n: usize) -> Vec<f32> {
    let mut v = vec![0.0; n * n];
    for i in (0..n).step_by(BLOCK).rev() {
        let size = BLOCK.min(n - i);
        let (above, below) = v.split_at_mut((i + size) * n);
        let rows = Tile::new(&mut above[i * n..], size, n, n);
        let (mut diagonal, right) = rows.split_cols(i).1.split_cols(size);
        let inverse = invert_diagonal(&r[i * n + i..], size, n);
        for (k, row) in inverse.chunks_exact(size).enumerate() {
            diagonal.row_mut(k).copy_from_slice(row);
        }
        right.grid(size, TILE).into_par_iter().for_each(|Part { col, mut tile, .. }| {
            // Rows of V below the diagonal of this tile's last column are zero.
            let (first, cols) = (i + size, tile.cols());
            let depth = col + cols;
            scratch::with(size * cols, |sum| {
                let left = View::new(&r[i * n + first..], size, depth, n);
                let right = View::new(&below[first + col..], depth, cols, n);
                gemm(1.0, left, right, 0.0, &mut Tile::new(sum, size, cols, cols));
                gemm(-1.0, View::new(&inverse, size, size, size), View::new(sum, size, cols, cols), 0.0, &mut tile);
            });
        });
    }
    v
}

/// The inverse of the upper triangular `[size, size]` at the start of `r`, whose rows are `stride` apart.
fn invert_diagonal(r: &[f32], size: usize, stride: usize) -> Vec<f32> {
    let mut block = vec![0.0; size * size];
    for (k, row) in block.chunks_exact_mut(size).enumerate() {
        row[k..].copy_from_slice(&r[k * stride + k..k * stride + size]);
    }
    let mut inverse = vec![0.0; size * size];
    let lower = MatRef::from_column_major_slice(&block, size, size);
    invert_lower_triangular(MatMut::from_column_major_slice_mut(&mut inverse, size, size), lower, Par::Seq);
    for (k, row) in inverse.chunks_exact_mut(size).enumerate() {
        row[..k].fill(0.0);
    }
    inverse
}

/// `to = J from^T J`: element (i, j) is element (n-1-j, n-1-i).
fn mirror(from: &[f32], to: &mut [f32], n: usize) {
    to.par_chunks_mut((MIRROR * n).max(1)).enumerate().for_each(|(block, rows)| {
        let first = block * MIRROR;
        for column in (0..n).step_by(MIRROR) {
            for (i, row) in rows.chunks_exact_mut(n).enumerate() {
                for j in column..(column + MIRROR).min(n) {
                    row[j] = from[(n - 1 - j) * n + (n - 1 - first - i)];
                }
            }
        }
    });
}
