//! The fast CPU device.
//!
//! One file an operation or a family. The rule of all of them: the work is cut into a partition that depends on shapes
//! alone, and each part is computed by one thread from start to end.

mod attention;
mod awake;
mod backward;
mod cholesky;
mod dot;
mod elementwise;
mod exp;
mod gemm;
mod gram;
mod linear;
mod norm;
mod packed;
mod read;
mod rope;
mod scratch;
mod simd;
mod tile;
mod unpack;
mod walk;

pub use awake::awake;

use crate::{
    Activations, AttentionShape, AttentionSpan, Device, GradientSums, Heads, HeadsMut, LogSumExp, NotPositiveDefinite,
    RopeTable, Strided, StridedMut,
};
use std::ops::Range;
use std::sync::Arc;
use tailorq_tensor::{Matrix, Weight};

/// See the module.
pub(crate) struct Cpu {
    isa: simd::Isa,
    activations: Activations,
    peers: Vec<Arc<dyn Device>>,
}

impl Cpu {
    /// One device for each instruction set that this processor has, the best first; there is always one.
    pub(crate) fn variants() -> Vec<Cpu> {
        simd::Isa::available()
            .into_iter()
            .map(|isa| Cpu { isa, activations: Activations::F32, peers: Vec::new() })
            .collect()
    }

    /// The same with activations of another precision.
    pub(crate) fn with(self, activations: Activations) -> Cpu {
        Cpu { activations, ..self }
    }

    /// The same with so many others as its peers.
    pub(crate) fn beside(self, n: usize) -> Cpu {
        let peer =
            |_| Arc::new(Cpu { isa: self.isa, activations: self.activations, peers: Vec::new() }) as Arc<dyn Device>;
        Cpu { peers: (0..n).map(peer).collect(), ..self }
    }
}

/// See [`crate::read_all`].
pub(crate) fn read_all(data: &[f32]) -> u32 {
    read::read_all(simd::Isa::available()[0], data)
}

impl Device for Cpu {
    fn name(&self) -> String {
        match self.activations {
            Activations::F32 => format!("cpu {}", self.isa.name()),
            Activations::Int8 => format!("cpu {}, int8 activations", self.isa.name()),
        }
    }

    fn peers(&self) -> &[Arc<dyn Device>] {
        &self.peers
    }

    fn linear_rows(&self, x: &[f32], w: &Weight, bias: Option<&[f32]>, rows: Range<usize>, y: &mut [f32]) {
        linear::linear_rows(self.isa, self.activations, x, w, bias, rows, y);
    }

    fn embed(&self, ids: &[u32], table: &Weight, y: &mut [f32]) {
        elementwise::embed(self.isa, ids, table, y);
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        norm::rms_norm(self.isa, x, weight, eps, y);
    }

    fn rope(&self, x: &mut [f32], table: &RopeTable, positions: &[u32]) {
        rope::rope(self.isa, x, table, positions, false);
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

    fn linear_backward_rows(&self, dy: &[f32], w: &Weight, rows: Range<usize>, dx: &mut [f32]) {
        backward::linear::rows(self.isa, dy, w, rows, dx);
    }

    fn weight_gradients(&self, dy: &[f32], x: &[f32], spans: &[Range<usize>], sums: GradientSums<'_>) {
        backward::linear::weight_gradients(self.isa, dy, x, spans, sums);
    }

    fn rms_norm_backward(&self, x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        backward::elementwise::rms_norm(self.isa, x, weight, eps, dy, dx);
    }

    fn rope_backward(&self, dx: &mut [f32], table: &RopeTable, positions: &[u32]) {
        rope::rope(self.isa, dx, table, positions, true);
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        heads: Heads<'_>,
        spans: &[Range<usize>],
        dy: &[f32],
        gradients: HeadsMut<'_>,
    ) {
        backward::attention::attention(self.isa, shape, heads, spans, dy, gradients);
    }

    fn swiglu_backward(&self, dy: &[f32], gate: &mut [f32], up: &mut [f32]) {
        backward::elementwise::swiglu(self.isa, dy, gate, up);
    }

    fn log_sum_exp(&self, logits: &[f32], sums: &mut [LogSumExp]) {
        backward::logits::log_sum_exp(self.isa, logits, sums);
    }

    fn softmax_weighted(&self, weights: &[f32], log_sums: &[f64], logits: &mut [f32]) {
        backward::logits::softmax_weighted(self.isa, weights, log_sums, logits);
    }

    fn divergence_backward(
        &self,
        weights: &[f32],
        reference: (&[f32], &[f64]),
        logits: (&mut [f32], &[f64]),
        divergences: &mut [f64],
    ) {
        backward::logits::divergence(self.isa, weights, reference, logits, divergences);
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
