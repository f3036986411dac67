//! Sequential matrix products, by faer.
//!
//! Always `Par::Seq`: threads come from a fixed partition of the work outside, so that the order of every sum is a function
//! of the shapes alone. faer calls its own x86 kernels, or the crate `gemm` on other processors. On the tiles that we
//! cut it is as fast as `gemm` on large ones and faster on small ones, and it does not depend on how this
//! workspace is optimized, as its kernels are assembly: `cargo test` runs real models at full speed.

use super::tile::Tile;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

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

    fn into_faer(self) -> MatRef<'a, f32> {
        let (row_stride, col_stride) = (self.row_stride as isize, self.col_stride as isize);
        // SAFETY: the elements were checked to lie in the slice, which is borrowed for `'a`; a view never grows after.
        unsafe { MatRef::from_raw_parts(self.data.as_ptr(), self.rows, self.cols, row_stride, col_stride) }
    }

    /// The transposed matrix; nothing moves.
    pub(crate) fn transposed(self) -> Self {
        View { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// `C = beta C + alpha A B` on the calling thread. With `beta == 0` C is not read.
pub(crate) fn gemm(alpha: f32, a: View<'_>, b: View<'_>, beta: f32, c: &mut Tile<'_>) {
    assert_eq!((a.rows, a.cols, b.cols), (c.rows(), b.rows, c.cols()), "matmul: shapes of A, B and C");
    if beta != 1.0 && (beta != 0.0 || a.cols == 0) {
        scale(beta, c);
    }
    if a.cols == 0 {
        return;
    }
    let accumulate = if beta == 0.0 { Accum::Replace } else { Accum::Add };
    // SAFETY: the tile has its elements, one column apart, to itself for as long as `c` is borrowed.
    let into = unsafe { MatMut::from_raw_parts_mut(c.as_mut_ptr(), c.rows(), c.cols(), c.stride() as isize, 1) };
    matmul(into, accumulate, a.into_faer(), b.into_faer(), alpha, Par::Seq);
    clear_upper_halves();
}

/// Marks the upper halves of the vector registers as unused, which faer's assembly leaves undone.
///
/// Otherwise each change between instructions of the old and the new encoding costs tens of cycles on Intel's processors (Ice Lake and later),
/// and decoding a stored weight changes twice at each half-precision scale: that was half of the time of an evaluation.
fn clear_upper_halves() {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx") {
        // SAFETY: the processor has AVX; no value is kept in an upper half across a call.
        unsafe { std::arch::x86_64::_mm256_zeroupper() }
    }
}

/// `C = factor C`; zero whatever C holds when the factor is 0.
fn scale(factor: f32, c: &mut Tile<'_>) {
    for r in 0..c.rows() {
        if factor == 0.0 {
            c.row_mut(r).fill(0.0);
        } else {
            c.row_mut(r).iter_mut().for_each(|value| *value *= factor);
        }
    }
}
