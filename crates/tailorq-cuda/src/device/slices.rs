//! The same operations on slices: up, compute, down. For tests against the reference, and for what is seldom done.

use super::*;
use crate::rounding;
use tailorq_kernels::{Rounded, RoundingJob};

impl Cuda {
    /// Rows of elements `width` wide.
    fn rows_of(&self, x: &[f32], width: usize) -> Matrix {
        self.up(x, x.len() / width.max(1), width)
    }

    /// Lets an operation change `x` on the device.
    fn change(&self, x: &mut [f32], rows: usize, operation: impl FnOnce(&mut Matrix)) {
        let mut m = self.up(x, rows, x.len() / rows.max(1));
        operation(&mut m);
        x.copy_from_slice(m.data());
    }
}

/// Keys or values of a span as rows.
fn cached_rows(source: KeyValues<'_>, part: Part, shape: AttentionShape) -> Vec<f32> {
    match (source, part) {
        (KeyValues::Rows { keys: rows, .. }, Part::Keys) | (KeyValues::Rows { values: rows, .. }, Part::Values) => {
            rows.to_vec()
        }
        (KeyValues::Cache(block), part) => {
            let mut rows = vec![0.0; block.len() * shape.kv_heads * shape.head_dim];
            for (i, row) in rows.chunks_exact_mut(shape.head_dim).enumerate() {
                block.row(part, i % shape.kv_heads, i / shape.kv_heads, row);
            }
            rows
        }
    }
}

impl Device for Cuda {
    fn name(&self) -> String {
        let beside = if self.peers.is_empty() { String::new() } else { format!("{} x ", 1 + self.peers.len()) };
        format!("cuda {beside}{}, {}", self.gpu.name(), self.precision)
    }

    fn peers(&self) -> &[Arc<dyn Device>] {
        &self.peers
    }

    fn resident(&self) -> Option<&dyn Resident> {
        Some(self)
    }

    fn linear_rows(&self, x: &[f32], w: &Weight, bias: Option<&[f32]>, rows: Range<usize>, y: &mut [f32]) {
        let n = if w.cols() == 0 { y.len() / rows.len().max(1) } else { x.len() / w.cols() };
        y.copy_from_slice(Resident::linear(self, &self.up(x, n, w.cols()), w, bias, rows).data());
    }

    fn embed(&self, ids: &[u32], table: &Weight, y: &mut [f32]) {
        y.copy_from_slice(Resident::embed(self, ids, table).data());
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        y.copy_from_slice(Resident::rms_norm(self, &self.rows_of(x, weight.len()), weight, eps).data());
    }

    fn rope(&self, x: &mut [f32], table: &RopeTable, positions: &[u32]) {
        self.change(x, positions.len(), |x| Resident::rope(self, x, table, positions, false));
    }

    fn attention(&self, shape: AttentionShape, q: &[f32], spans: &[AttentionSpan<'_>], y: &mut [f32]) {
        let width = shape.heads * shape.head_dim;
        let queries = self.rows_of(q, width);
        let out = self.up(y, queries.rows(), width);
        let out_at = self.gpu.address(&out);
        for span in spans.iter().filter(|s| !s.rows.is_empty()) {
            let [k, v] = [Part::Keys, Part::Values].map(|part| self.gpu.upload(&cached_rows(span.source, part, shape)));
            let offset = (span.rows.start * width * FLOAT) as u64;
            let q = self.gpu.address(&queries) + offset;
            let n = span.rows.len();
            let sequence = crate::attention::Sequence { q, k: k.ptr(), v: v.ptr(), n, past: span.past };
            self.attend(shape, &sequence, out_at + offset);
        }
        y.copy_from_slice(out.data());
    }

    fn swiglu(&self, gate: &mut [f32], up: &[f32]) {
        let up = self.up(up, 1, up.len());
        self.change(gate, 1, |gate| Resident::swiglu(self, gate, &up));
    }

    fn add(&self, x: &[f32], y: &mut [f32]) {
        let x = self.up(x, 1, x.len());
        self.change(y, 1, |y| Resident::add(self, &x, y));
    }

    fn linear_backward_rows(&self, dy: &[f32], w: &Weight, rows: Range<usize>, dx: &mut [f32]) {
        let n = dx.len() / w.cols().max(1);
        let dy = self.up(dy, n, rows.len());
        let mut sums = self.up(dx, n, w.cols());
        Resident::linear_backward(self, &dy, w, rows, &mut sums);
        dx.copy_from_slice(sums.data());
    }

    fn weight_gradients(&self, dy: &[f32], x: &[f32], spans: &[Range<usize>], sums: GradientSums<'_>) {
        let shape =
            [&sums.sum, &sums.absolute, &sums.square].into_iter().flatten().map(|m| (m.rows(), m.cols())).next();
        let Some((rows, cols)) = shape else { return };
        let (dy, x) = (self.rows_of(dy, rows), self.rows_of(x, cols));
        Resident::weight_gradients(self, &dy, &x, spans, sums);
    }

    fn rms_norm_backward(&self, x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let width = weight.len();
        let (x, dy) = (self.rows_of(x, width), self.rows_of(dy, width));
        self.change(dx, x.rows(), |dx| Resident::rms_norm_backward(self, &x, weight, eps, &dy, dx));
    }

    fn rope_backward(&self, dx: &mut [f32], table: &RopeTable, positions: &[u32]) {
        self.change(dx, positions.len(), |x| Resident::rope(self, x, table, positions, true));
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        heads: Heads<'_>,
        spans: &[Range<usize>],
        dy: &[f32],
        gradients: HeadsMut<'_>,
    ) {
        let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let [q, k, v] = [(heads.q, width), (heads.k, kv_width), (heads.v, kv_width)].map(|(x, w)| self.rows_of(x, w));
        let found = Resident::attention_backward(self, shape, [&q, &k, &v], spans, &self.rows_of(dy, width));
        for (into, from) in [gradients.q, gradients.k, gradients.v].into_iter().zip(found) {
            for span in spans {
                let rows = span.start * from.cols()..span.end * from.cols();
                into[rows.clone()].copy_from_slice(&from.data()[rows]);
            }
        }
    }

    fn swiglu_backward(&self, dy: &[f32], gate: &mut [f32], up: &mut [f32]) {
        let [dy, mut g, mut u] = [dy, gate, up].map(|x| self.up(x, 1, x.len()));
        Resident::swiglu_backward(self, &dy, &mut g, &mut u);
        gate.copy_from_slice(g.data());
        up.copy_from_slice(u.data());
    }

    fn log_sum_exp(&self, logits: &[f32], sums: &mut [LogSumExp]) {
        let width = logits.len() / sums.len().max(1);
        Resident::log_sum_exp(self, &self.up(logits, sums.len(), width), sums);
    }

    fn softmax_weighted(&self, weights: &[f32], log_sums: &[f64], logits: &mut [f32]) {
        self.change(logits, weights.len(), |x| Resident::softmax_weighted(self, weights, log_sums, x));
    }

    fn divergence_backward(
        &self,
        weights: &[f32],
        (reference, reference_sums): (&[f32], &[f64]),
        (logits, log_sums): (&mut [f32], &[f64]),
        divergences: &mut [f64],
    ) {
        let n = weights.len();
        let reference = (&self.up(reference, n, reference.len() / n.max(1)), reference_sums);
        self.change(logits, n, |x| Resident::divergence_backward(self, weights, reference, (x, log_sums), divergences));
    }

    fn gram(&self, x: &[f32], h: &mut Matrix) {
        Resident::gram(self, &self.rows_of(x, h.cols()), h);
    }

    fn inverse_cholesky_upper(&self, h: &mut Matrix) -> Result<(), NotPositiveDefinite> {
        Resident::inverse_cholesky_upper(self, h)
    }

    fn matmul_sequential(&self, alpha: f32, a: Strided<'_>, b: Strided<'_>, beta: f32, c: StridedMut<'_>) {
        self.host.matmul_sequential(alpha, a, b, beta, c);
    }

    fn round_layer(&self, job: &RoundingJob<'_>) -> Option<Rounded> {
        rounding::round_layer(&self.gpu, &self.blas, job)
    }

    fn quadratic_loss(&self, errors: &Matrix, hessian: &Matrix) -> Option<f64> {
        Some(rounding::quadratic_loss(&self.gpu, &self.blas, errors, hessian))
    }
}
