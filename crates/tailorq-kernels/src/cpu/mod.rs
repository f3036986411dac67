//! The fast CPU device.
//!
//! One file an operation or a family. The rule of all of them: the work is cut into a partition that depends on shapes
//! alone, and each part is computed by one thread from start to end.

mod attention;
mod cholesky;
mod dot;
mod elementwise;
mod exp;
mod gemm;
mod gram;
mod linear;
mod norm;
mod rope;
mod scratch;
mod simd;
mod tile;
mod unpack;

use crate::{AttentionShape, AttentionSpan, Device, NotPositiveDefinite, RopeTable, Strided, StridedMut};
use std::ops::Range;
use tailorq_tensor::{Matrix, Weight};

/// See the module.
pub(crate) struct Cpu {
    isa: simd::Isa,
}

impl Cpu {
    /// One device for each instruction set that this processor has, the best first; there is always one.
    pub(crate) fn variants() -> Vec<Cpu> {
        simd::Isa::available().into_iter().map(|isa| Cpu { isa }).collect()
    }
}

impl Device for Cpu {
    fn name(&self) -> String {
        format!("cpu {}", self.isa.name())
    }

    fn linear_rows(&self, x: &[f32], w: &Weight, bias: Option<&[f32]>, rows: Range<usize>, y: &mut [f32]) {
        linear::linear_rows(self.isa, x, w, bias, rows, y);
    }

    fn embed(&self, ids: &[u32], table: &Weight, y: &mut [f32]) {
        elementwise::embed(self.isa, ids, table, y);
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        norm::rms_norm(self.isa, x, weight, eps, y);
    }

    fn rope(&self, x: &mut [f32], table: &RopeTable, positions: &[u32]) {
        rope::rope(self.isa, x, table, positions);
    }

    fn attention(&self, shape: AttentionShape, q: &[f32], spans: &[AttentionSpan<'_>], y: &mut [f32]) {
        attention::attention(self.isa, shape, q, spans, y);
    }

    fn swiglu(&self, gate: &mut [f32], up: &[f32]) {
        elementwise::swiglu(self.isa, gate, up);
    }

    fn add(&self, x: &[f32], y: &mut [f32]) {
        elementwise::add(x, y);
    }

    fn gram(&self, x: &[f32], h: &mut Matrix) {
        gram::gram(x, h);
    }

    fn inverse_cholesky_upper(&self, h: &mut Matrix) -> Result<(), NotPositiveDefinite> {
        cholesky::inverse_cholesky_upper(h)
    }

    fn matmul_sequential(&self, alpha: f32, a: Strided<'_>, b: Strided<'_>, beta: f32, c: StridedMut<'_>) {
        let a = gemm::View::new(a.data, a.rows, a.cols, a.stride);
        let b = gemm::View::new(b.data, b.rows, b.cols, b.stride);
        gemm::gemm(alpha, a, b, beta, &mut tile::Tile::new(c.data, c.rows, c.cols, c.stride));
    }
}
