//! Attention of whole sequences, forward and backward: products by cuBLAS, head by head, with softmax between them.
//!
//! Scores of some queries of all heads are held at once; a long sequence takes several chunks of queries.

use crate::blas::{Operand, Product};
use crate::device::Cuda;
use crate::gpu::{Buffer, Grid, Source, launch};
use std::ops::Range;
use tailorq_kernels::AttentionShape;
use tailorq_tensor::Matrix;

pub(crate) const SOURCE: Source = Source { name: "attention", code: include_str!("kernels/attention.cu") };

/// Scores that are held at once.
const SCORES: usize = 1 << 25;

/// Queries of one sequence and the keys and values they may see.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequence {
    /// `[n, heads * head_dim]`.
    pub(crate) q: u64,
    /// `[past + n, kv_heads * head_dim]`.
    pub(crate) k: u64,
    /// As `k`.
    pub(crate) v: u64,
    /// Queries.
    pub(crate) n: usize,
    /// Keys before the first query.
    pub(crate) past: usize,
}

/// Widths of rows and the like.
#[derive(Clone, Copy)]
struct Sizes {
    shape: AttentionShape,
    width: usize,
    kv_width: usize,
    /// Query heads that read one key head.
    group: usize,
    scale: f32,
}

impl Sizes {
    fn of(shape: AttentionShape) -> Self {
        Sizes {
            shape,
            width: shape.heads * shape.head_dim,
            kv_width: shape.kv_heads * shape.head_dim,
            group: shape.heads / shape.kv_heads,
            scale: 1.0 / (shape.head_dim as f32).sqrt(),
        }
    }

    /// The heads in as few batches as there are: those of one key head together, or one of every key head.
    fn batches(&self) -> Box<dyn Iterator<Item = HeadBatch>> {
        let (group, step) = (self.group, 1);
        if self.shape.kv_heads > group {
            return Box::new(self.across_keys());
        }
        let of = move |k: usize| HeadBatch { n: group, first: k * group, step, key: k, key_step: 0 };
        Box::new((0..self.shape.kv_heads).map(of))
    }

    /// One head of every key head at a time, so that no two of a batch share keys.
    fn across_keys(&self) -> impl Iterator<Item = HeadBatch> + 'static {
        let (n, step) = (self.shape.kv_heads, self.group);
        (0..self.group).map(move |first| HeadBatch { n, first, step, key: 0, key_step: 1 })
    }

    /// Queries of a chunk.
    fn chunk(&self, n_keys: usize) -> usize {
        (SCORES / (self.shape.heads * n_keys).max(1)).max(1)
    }
}

const FLOAT: u64 = 4;

/// Heads whose products are one batch: `n` of them from `first` on, every `step`-th, and their key heads likewise.
#[derive(Clone, Copy)]
struct HeadBatch {
    n: usize,
    first: usize,
    step: usize,
    key: usize,
    key_step: usize,
}

impl HeadBatch {
    /// Rows of queries or of what becomes of them.
    fn of_queries(self, z: &Sizes, at: u64) -> Operand {
        let dim = z.shape.head_dim;
        Operand::new(at + (self.first * dim) as u64 * FLOAT, z.width).step(self.step * dim)
    }

    /// Rows of keys or values.
    fn of_keys(self, z: &Sizes, at: u64) -> Operand {
        let dim = z.shape.head_dim;
        Operand::new(at + (self.key * dim) as u64 * FLOAT, z.kv_width).step(self.key_step * dim)
    }

    /// `[heads, n, keys]`.
    fn of_scores(self, at: u64, n: usize, n_keys: usize) -> Operand {
        Operand::new(at + (self.first * n * n_keys) as u64 * FLOAT, n_keys).step(self.step * n * n_keys)
    }
}

impl Cuda {
    /// `S[heads, n, keys] = alpha A B^T` head by head, where A has the rows of queries and B those of keys.
    fn scores(&self, z: &Sizes, alpha: f32, (a, b): (u64, u64), (n, n_keys): (usize, usize), s: u64) {
        z.batches().for_each(|heads| {
            let job = Product { alpha, batch: heads.n, ..self.f32(n, n_keys, z.shape.head_dim) };
            let (a, b) = (heads.of_queries(z, a), heads.of_keys(z, b));
            self.blas.product(&self.gpu, job, a, b.t(), heads.of_scores(s, n, n_keys));
        });
    }

    /// `Y = S B` head by head: rows of queries from rows of keys.
    fn mix(&self, z: &Sizes, s: u64, b: u64, (n, n_keys): (usize, usize), y: u64) {
        z.batches().for_each(|heads| {
            let job = Product { batch: heads.n, ..self.f32(n, z.shape.head_dim, n_keys) };
            let (s, b) = (heads.of_scores(s, n, n_keys), heads.of_keys(z, b));
            self.blas.product(&self.gpu, job, s, b, heads.of_queries(z, y));
        });
    }

    /// `K += S^T A` head by head: rows of keys from rows of queries. Heads that share keys add up, one after another.
    fn collect(&self, z: &Sizes, s: u64, a: u64, (n, n_keys): (usize, usize), k: u64) {
        z.across_keys().for_each(|heads| {
            let job = Product { beta: 1.0, batch: heads.n, ..self.f32(n_keys, z.shape.head_dim, n) };
            let (s, a) = (heads.of_scores(s, n, n_keys), heads.of_queries(z, a));
            self.blas.product(&self.gpu, job, s.t(), a, heads.of_keys(z, k));
        });
    }

    fn f32(&self, m: usize, n: usize, k: usize) -> Product {
        Product::f32(m, n, k, self.math)
    }

    /// Probabilities of queries `rows` of a sequence: `[heads, rows, keys]`, and the number of keys.
    fn probabilities(&self, z: &Sizes, sequence: &Sequence, rows: &Range<usize>) -> (Buffer, usize) {
        let (n, n_keys) = (rows.len(), sequence.past + rows.end);
        let scores = self.gpu.allocate(z.shape.heads * n * n_keys * FLOAT as usize);
        let q = sequence.q + (rows.start * z.width) as u64 * FLOAT;
        self.scores(z, z.scale, (q, sequence.k), (n, n_keys), scores.ptr());
        let grid = Grid { blocks: (n as u32, z.shape.heads as u32, 1), threads: 128, shared: 0 };
        let past = sequence.past + rows.start;
        let window = z.shape.window.map_or(0, |w| w.min(i32::MAX as usize) as i32);
        launch!(self.gpu, &SOURCE, "causal_softmax", grid, scores.ptr(), n as i32, n_keys as i32, past as i32, window);
        (scores, n_keys)
    }

    /// Attention of one sequence into its rows at `y`.
    pub(crate) fn attend(&self, shape: AttentionShape, sequence: &Sequence, y: u64) {
        let z = Sizes::of(shape);
        let step = z.chunk(sequence.past + sequence.n);
        for start in (0..sequence.n).step_by(step) {
            let rows = start..(start + step).min(sequence.n);
            let (p, n_keys) = self.probabilities(&z, sequence, &rows);
            let y = y + (start * z.width) as u64 * FLOAT;
            self.mix(&z, p.ptr(), sequence.v, (rows.len(), n_keys), y);
        }
    }

    /// The gradients of one fresh sequence; those of keys and values are added to what is there.
    fn attend_backward(&self, shape: AttentionShape, sequence: &Sequence, dy: u64, [dq, dk, dv]: [u64; 3]) {
        let z = Sizes::of(shape);
        let step = z.chunk(sequence.n);
        for start in (0..sequence.n).step_by(step) {
            let rows = start..(start + step).min(sequence.n);
            let (p, n_keys) = self.probabilities(&z, sequence, &rows);
            let (n, at) = (rows.len(), (start * z.width) as u64 * FLOAT);
            self.collect(&z, p.ptr(), dy + at, (n, n_keys), dv);
            let dp = self.gpu.allocate(p.bytes());
            self.scores(&z, 1.0, (dy + at, sequence.v), (n, n_keys), dp.ptr());
            let grid = Grid::rows(shape.heads * n, 128);
            launch!(self.gpu, &SOURCE, "softmax_backward", grid, p.ptr(), dp.ptr(), n_keys as i32, z.scale);
            self.mix(&z, dp.ptr(), sequence.k, (n, n_keys), dq + at);
            self.collect(&z, dp.ptr(), sequence.q + at, (n, n_keys), dk);
        }
    }

    /// See [`tailorq_kernels::Resident::attention`].
    pub(crate) fn attention_fresh(
        &self,
        shape: AttentionShape,
        [q, k, v]: [&Matrix; 3],
        spans: &[Range<usize>],
    ) -> Matrix {
        let mut y = Matrix::zeros(q.rows(), q.cols());
        let at = self.gpu.address_mut(&mut y);
        let [q, k, v] = [q, k, v].map(|m| self.gpu.address(m));
        for rows in spans.iter().filter(|s| !s.is_empty()) {
            let (sequence, offset) = fresh(shape, [q, k, v], rows);
            self.attend(shape, &sequence, at + offset);
        }
        y
    }

    /// See [`tailorq_kernels::Resident::attention_backward`].
    pub(crate) fn attention_fresh_backward(
        &self,
        shape: AttentionShape,
        heads: [&Matrix; 3],
        spans: &[Range<usize>],
        dy: &Matrix,
    ) -> [Matrix; 3] {
        let mut gradients = heads.map(|m| Matrix::zeros(m.rows(), m.cols()));
        let [dq, dk, dv] = gradients.each_mut().map(|m| self.gpu.address_mut(m));
        let (heads, dy) = (heads.map(|m| self.gpu.address(m)), self.gpu.address(dy));
        for rows in spans.iter().filter(|s| !s.is_empty()) {
            let (sequence, offset) = fresh(shape, heads, rows);
            let kv = (rows.start * shape.kv_heads * shape.head_dim) as u64 * FLOAT;
            self.attend_backward(shape, &sequence, dy + offset, [dq + offset, dk + kv, dv + kv]);
        }
        gradients
    }
}

/// A sequence whose keys and values are its own rows, and where its queries begin.
fn fresh(shape: AttentionShape, [q, k, v]: [u64; 3], rows: &Range<usize>) -> (Sequence, u64) {
    let offset = (rows.start * shape.heads * shape.head_dim) as u64 * FLOAT;
    let kv = (rows.start * shape.kv_heads * shape.head_dim) as u64 * FLOAT;
    (Sequence { q: q + offset, k: k + kv, v: v + kv, n: rows.len(), past: 0 }, offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every head is in one batch, with the key head that it reads; where sums go to key heads, each comes once a batch.
    #[test]
    fn batches_hold_every_head_once() {
        for (heads, kv_heads) in [(1, 1), (4, 4), (4, 2), (6, 2), (14, 2), (9, 3), (8, 1), (32, 8), (32, 32), (12, 6)] {
            let z = Sizes::of(AttentionShape { heads, kv_heads, head_dim: 16, window: None });
            for (batches, spread) in [(z.batches().collect::<Vec<_>>(), false), (z.across_keys().collect(), true)] {
                let mut seen = vec![0; heads];
                for b in batches {
                    let of = |i: usize| (b.first + i * b.step, b.key + i * b.key_step);
                    let mut keys: Vec<usize> = (0..b.n).map(|i| of(i).1).collect();
                    for (head, key) in (0..b.n).map(of) {
                        assert_eq!(key, head / z.group, "{heads} heads, {kv_heads} of keys");
                        seen[head] += 1;
                    }
                    keys.dedup();
                    assert!(!spread || keys.len() == b.n);
                    // Where the operands of the second head begin.
                    let (head, key) = of(1);
                    let second = |o: Operand, at: usize| assert_eq!(o.ptr / FLOAT + o.step as u64, at as u64);
                    if b.n > 1 {
                        second(b.of_queries(&z, 0), head * 16);
                        second(b.of_keys(&z, 0), key * 16);
                        second(b.of_scores(0, 5, 7), head * 35);
                    }
                }
                assert_eq!(seen, vec![1; heads]);
            }
        }
    }
}
