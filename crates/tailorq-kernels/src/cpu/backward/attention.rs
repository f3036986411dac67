//! Backward of causal attention, with probabilities computed again from queries and keys.
//!
//! Two passes, each over tiles that write disjoint rows. Over queries: the softmax of every row, its log-sum and the
//! mean of its gradient, and from them the gradient of the queries. Over keys: the probabilities once more from the
//! log-sums (as in FlashAttention-2, Dao 2023), and from them the gradients of keys and values, queries in order.

use super::logits::{scaled_exp, sum_exp};
use crate::cpu::dot::dot_body;
use crate::cpu::gemm::{View, gemm};
use crate::cpu::scratch;
use crate::cpu::simd::{Isa, LANES, Simd, per_isa};
use crate::cpu::tile::Tile;
use crate::{AttentionShape, Heads, HeadsMut, shapes};
use rayon::prelude::*;
use std::ops::Range;

/// Rows of a score matrix that a task aims at: query rows times query heads.
const SCORES: usize = 128;
/// Keys a task of the second pass.
const KEYS: usize = 128;

/// What both passes read.
struct Call<'a> {
    isa: Isa,
    shape: AttentionShape,
    heads: Heads<'a>,
    dy: &'a [f32],
}

/// Rows of a span for one key head.
struct Task<'a> {
    span: Range<usize>,
    first: usize,
    kv_head: usize,
    /// The gradient of queries, or of keys.
    a: Tile<'a>,
    /// The statistics of softmax rows (log-sum and mean, side by side), or the gradient of values.
    b: Tile<'a>,
}

pub(in crate::cpu) fn attention(
    isa: Isa,
    shape: AttentionShape,
    heads: Heads<'_>,
    spans: &[Range<usize>],
    dy: &[f32],
    gradients: HeadsMut<'_>,
) {
    let n = shapes::attention_backward(shape, &heads, spans, dy, &gradients);
    let mut spans: Vec<Range<usize>> = spans.iter().filter(|s| !s.is_empty()).cloned().collect();
    spans.sort_by_key(|s| s.start);
    let call = Call { isa, shape, heads, dy };
    let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let mut stats = vec![0.0; n * 2 * shape.heads];
    let of_queries = Tile::new(gradients.q, n, width, width);
    let of_rows = Tile::new(&mut stats, n, 2 * shape.heads, 2 * shape.heads);
    let tasks = tasks(&spans, call.queries(), shape.kv_heads, of_queries, of_rows);
    tasks.into_par_iter().for_each(|task| call.of_queries(task));
    let of_keys = Tile::new(gradients.k, n, kv_width, kv_width);
    let of_values = Tile::new(gradients.v, n, kv_width, kv_width);
    let tasks = self::tasks(&spans, KEYS, shape.kv_heads, of_keys, of_values);
    tasks.into_par_iter().for_each(|task| call.of_keys(task, &stats));
}

/// Cuts the rows of the spans into tasks of `height` rows and one key head; `spans` are in order.
fn tasks<'a>(
    spans: &[Range<usize>],
    height: usize,
    kv_heads: usize,
    mut a: Tile<'a>,
    mut b: Tile<'a>,
) -> Vec<Task<'a>> {
    let (mut tasks, mut done) = (Vec::new(), 0);
    let widths = (a.cols() / kv_heads, b.cols() / kv_heads);
    for span in spans {
        let cut = |tile: Tile<'a>| {
            let (rows, after) = tile.split_rows(span.start - done).1.split_rows(span.len());
            (rows, after)
        };
        let ((a_rows, a_after), (b_rows, b_after)) = (cut(a), cut(b));
        (a, b, done) = (a_after, b_after, span.end);
        let parts = a_rows.grid(height, widths.0).into_iter().zip(b_rows.grid(height, widths.1));
        tasks.extend(parts.map(|(a, b)| Task {
            span: span.clone(),
            first: a.row,
            kv_head: a.col / widths.0,
            a: a.tile,
            b: b.tile,
        }));
    }
    tasks
}

impl Call<'_> {
    /// Query heads that share a key head.
    fn shared(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// Query rows of a tile.
    fn queries(&self) -> usize {
        (SCORES / self.shared()).max(16)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }

    /// Keys or values of absolute rows, for one key head.
    fn keys<'d>(&self, data: &'d [f32], rows: Range<usize>, kv_head: usize) -> View<'d> {
        let (width, head_dim) = (self.shape.kv_heads * self.shape.head_dim, self.shape.head_dim);
        View::new(&data[rows.start * width + kv_head * head_dim..], rows.len(), head_dim, width)
    }

    /// Copies absolute query rows of the heads that share a key head: `out` is `[rows * shared, head_dim]`.
    fn gather(&self, from: &[f32], rows: Range<usize>, kv_head: usize, out: &mut [f32]) {
        let (width, part) = (self.shape.heads * self.shape.head_dim, self.shared() * self.shape.head_dim);
        for (row, out) in rows.zip(out.chunks_exact_mut(part)) {
            let at = row * width + kv_head * part;
            out.copy_from_slice(&from[at..at + part]);
        }
    }

    /// One tile of queries: gradient of the queries and statistics of their rows.
    fn of_queries(&self, mut task: Task<'_>) {
        let (shared, head_dim, rows) = (self.shared(), self.shape.head_dim, task.a.rows());
        let start = shapes::visible(task.first, self.shape.window).start;
        let (n_queries, n) = (rows * shared, task.first + rows - start);
        let (keys, at) = (task.span.start + start..task.span.start + start + n, task.span.start + task.first);
        scratch::with(2 * n_queries * (n + head_dim), |buffer| {
            let (scores, buffer) = buffer.split_at_mut(n_queries * n);
            let (gradients, buffer) = buffer.split_at_mut(n_queries * n);
            let (queries, dys) = buffer.split_at_mut(n_queries * head_dim);
            self.gather(self.heads.q, at..at + rows, task.kv_head, queries);
            self.gather(self.dy, at..at + rows, task.kv_head, dys);
            let k = self.keys(self.heads.k, keys.clone(), task.kv_head);
            let v = self.keys(self.heads.v, keys, task.kv_head);
            let left = View::new(queries, n_queries, head_dim, head_dim);
            gemm(self.scale(), left, k.transposed(), 0.0, &mut Tile::new(scores, n_queries, n, n));
            let left = View::new(dys, n_queries, head_dim, head_dim);
            gemm(1.0, left, v.transposed(), 0.0, &mut Tile::new(gradients, n_queries, n, n));
            for (i, (p, d)) in scores.chunks_exact_mut(n).zip(gradients.chunks_exact_mut(n)).enumerate() {
                let visible = shapes::visible(task.first + i / shared, self.shape.window);
                let (low, high) = (visible.start - start, visible.end - start);
                d[..low].fill(0.0);
                d[high..].fill(0.0);
                let (p, d) = (&mut p[low..high], &mut d[low..high]);
                let (max, sum) = sum_exp(self.isa, p);
                let log_sum = max + sum.ln();
                scaled_exp(self.isa, p, log_sum, 1.0);
                let mean = mean(self.isa, p, d);
                score_gradient(self.isa, p, d, mean, self.scale());
                let stats = &mut task.b.row_mut(i / shared)[2 * (i % shared)..];
                (stats[0], stats[1]) = (log_sum, mean);
            }
            // The queries have been used: their gradients take their place.
            let d = View::new(gradients, n_queries, n, n);
            gemm(1.0, d, k, 0.0, &mut Tile::new(queries, n_queries, head_dim, head_dim));
            for (i, row) in queries.chunks_exact(shared * head_dim).enumerate() {
                task.a.row_mut(i).copy_from_slice(row);
            }
        });
    }

    /// One tile of keys: gradients of keys and values from all queries that see any of them, in order.
    fn of_keys(&self, mut task: Task<'_>, stats: &[f32]) {
        let (len, n) = (task.span.len(), task.a.rows());
        let last_seen = self.shape.window.map_or(len, |w| (task.first + n - 1).saturating_add(w).min(len));
        let mut beta = 0.0;
        for first in (task.first..last_seen).step_by(self.queries()) {
            let queries = first..(first + self.queries()).min(last_seen);
            self.of_key_tile(&mut task, queries, stats, beta);
            beta = 1.0;
        }
    }

    /// Adds what some queries of the span (or begins with them, where `beta` is 0) give to a tile of keys.
    fn of_key_tile(&self, task: &mut Task<'_>, queries: Range<usize>, stats: &[f32], beta: f32) {
        let (shared, head_dim, n) = (self.shared(), self.shape.head_dim, task.a.rows());
        let n_queries = queries.len() * shared;
        let at = task.span.start + queries.start..task.span.start + queries.end;
        let keys = task.span.start + task.first..task.span.start + task.first + n;
        scratch::with(2 * n_queries * (n + head_dim), |buffer| {
            let (scores, buffer) = buffer.split_at_mut(n_queries * n);
            let (gradients, buffer) = buffer.split_at_mut(n_queries * n);
            let (q, dy) = buffer.split_at_mut(n_queries * head_dim);
            self.gather(self.heads.q, at.clone(), task.kv_head, q);
            self.gather(self.dy, at.clone(), task.kv_head, dy);
            let k = self.keys(self.heads.k, keys.clone(), task.kv_head);
            let v = self.keys(self.heads.v, keys, task.kv_head);
            let (q, dy) = (View::new(q, n_queries, head_dim, head_dim), View::new(dy, n_queries, head_dim, head_dim));
            gemm(self.scale(), q, k.transposed(), 0.0, &mut Tile::new(scores, n_queries, n, n));
            gemm(1.0, dy, v.transposed(), 0.0, &mut Tile::new(gradients, n_queries, n, n));
            for (i, (p, d)) in scores.chunks_exact_mut(n).zip(gradients.chunks_exact_mut(n)).enumerate() {
                let visible = shapes::visible(queries.start + i / shared, self.shape.window);
                let place = |key: usize| key.saturating_sub(task.first).min(n);
                let (low, high) = (place(visible.start), place(visible.end));
                for row in [&mut *p, &mut *d] {
                    row[..low].fill(0.0);
                    row[high.max(low)..].fill(0.0);
                }
                let (p, d) = (&mut p[low..high.max(low)], &mut d[low..high.max(low)]);
                let head = task.kv_head * shared + i % shared;
                let row = 2 * ((at.start + i / shared) * self.shape.heads + head);
                scaled_exp(self.isa, p, stats[row], 1.0);
                score_gradient(self.isa, p, d, stats[row + 1], self.scale());
            }
            let transposed = |data| View::new(data, n_queries, n, n).transposed();
            gemm(1.0, transposed(gradients), q, beta, &mut task.a);
            gemm(1.0, transposed(scores), dy, beta, &mut task.b);
        });
    }
}

per_isa! {
    /// The sum of products.
    fn mean(p: &[f32], d: &[f32]) -> f32 = dot_body
}

per_isa! {
    /// `d = p (d - mean) scale`: from the gradient of probabilities to that of scores.
    fn score_gradient(p: &[f32], d: &mut [f32], mean: f32, scale: f32) = score_gradient_body
}

#[inline(always)]
fn score_gradient_body<S: Simd>(simd: S, p: &[f32], d: &mut [f32], mean: f32, scale: f32) {
    let (mean, scale) = (simd.splat(mean), simd.splat(scale));
    let value = |p, d| simd.mul(simd.mul(p, simd.sub(d, mean)), scale);
    let (ps, p_tail) = p.as_chunks::<LANES>();
    let (ds, d_tail) = d.as_chunks_mut::<LANES>();
    for (p, d) in ps.iter().zip(ds) {
        simd.store(value(simd.load(p), simd.load(d)), d);
    }
    if !d_tail.is_empty() {
        let last = value(simd.load_partial(p_tail, 0.0), simd.load_partial(d_tail, 0.0));
        simd.store_partial(last, d_tail);
    }
}
