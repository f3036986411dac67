//! Sequential matrix products: a safe door to the crate `gemm`.
//!
//! The crate is only ever called with `Parallelism::None`. Threads come from a fixed partition of the work outside, so
//! the order of every sum is a function of the shapes alone.

use super::tile::Tile;

/// A read-only matrix with any two strides: element `(r, c)` is `data[r * row_stride + c * col_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// Row-major `[rows, cols]` with `stride` elements from row to row.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        let last = if rows == 0 || cols == 0 { Some(0) } else { (rows - 1).checked_mul(stride).map(|at| at + cols) };
        assert!(last.is_some_and(|last| last <= data.len()), "[{rows}, {cols}] by {stride} in {}", data.len());
        View { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transposed matrix; nothing moves.
    pub(crate) fn transposed(self) -> Self {
        View { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// `C = beta C + alpha A B` on the calling thread. With `beta == 0` C is not read.
pub(crate) fn gemm(alpha: f32, a: View<'_>, b: View<'_>, beta: f32, c: &mut Tile<'_>) {
    assert_eq!((a.rows, a.cols, b.cols), (c.rows(), b.rows, c.cols()), "matmul: shapes of A, B and C");
    if c.rows() == 0 || c.cols() == 0 {
        return;
    }
    // SAFETY: both views were checked to lie in their slices and only ever shrink or transpose; the tile has its
    // elements to itself, so that C overlaps neither A nor B; strides of slices fit an isize. In the crate's own terms
    // `alpha` scales the destination and `beta` the product.
    unsafe {
        gemm::gemm(
            c.rows(),
            c.cols(),
            a.cols,
            c.as_mut_ptr(),
            1,
            c.stride() as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
