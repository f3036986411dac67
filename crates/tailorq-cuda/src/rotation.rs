//! Rotations of rows by an input transform, and the two moves that make a rotation of both sides of a Hessian of them.

use crate::gpu::{Gpu, Grid, Source, launch};
use std::sync::Arc;
use tailorq_tensor::{InputTransform, Matrix};

pub(crate) const SOURCE: Source = Source { name: "rotation", code: include_str!("kernels/rotation.cu") };

/// Threads of a block of a rotation at most.
const THREADS: usize = 512;

/// Rows and columns of a square of [`mirror`].
const SQUARE: usize = 32;

/// Every row becomes its rotation, in the bits of [`InputTransform::forward`].
pub(crate) fn rotate_rows(gpu: &Arc<Gpu>, signs: u64, x: &mut Matrix, transform: &InputTransform) {
    let (width, block) = (transform.width(), transform.block());
    assert_eq!(x.cols(), width, "rows of the transform's width");
    if x.is_empty() {
        return;
    }
    let (rows, whole) = (x.rows(), width / block * block);
    let at = gpu.address_mut(x);
    let pass = |first: usize, signs: u64, n_blocks: usize| {
        let threads = (block / 2).clamp(32, THREADS).next_multiple_of(32) as u32;
        let grid = Grid { blocks: (rows as u32, n_blocks as u32, 1), threads, shared: 4 * block as u32 };
        launch!(gpu, &SOURCE, "rotate", grid, at, signs, width as u64, first as u64, block as i32);
    };
    pass(0, signs, whole / block);
    if whole < width {
        pass(width - block, signs + 4 * whole as u64, 1);
    }
}

/// A square matrix becomes its transpose (`swap`), or what its lower triangle says of a symmetric one.
pub(crate) fn mirror(gpu: &Arc<Gpu>, x: &mut Matrix, swap: bool) {
    let n = x.rows();
    assert_eq!(x.cols(), n, "a square matrix");
    let (at, squares) = (gpu.address_mut(x), n.div_ceil(SQUARE) as u32);
    let grid = Grid { blocks: (squares, squares, 1), threads: 256, shared: 0 };
    launch!(gpu, &SOURCE, "mirror", grid, at, n as u64, i32::from(swap));
}
