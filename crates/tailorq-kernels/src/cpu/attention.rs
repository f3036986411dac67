//! Causal softmax attention over ragged spans.
//!
//! A task is a tile of query rows and all query heads that share one key head. Many queries: scores and mixed values
//! are matrix products over the keys that any query of the tile sees. Few queries (decoding): each head is a walk over
//! its keys.

use super::gemm::{View, gemm};
use super::simd::Isa;
use super::tile::Tile;
use super::{dot, exp, scratch};
use crate::{AttentionShape, AttentionSpan, shapes};
use rayon::prelude::*;

/// Rows of the score matrix that a task aims at: query rows times query heads.
const SCORES: usize = 128;
/// Spans of up to this many query rows are walked head by head.
const FEW: usize = 4;

pub(super) fn attention(isa: Isa, shape: AttentionShape, q: &[f32], spans: &[AttentionSpan<'_>], y: &mut [f32]) {
    shapes::attention(shape, q, spans, y);
    let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
    let (width, shared) = (heads * head_dim, heads / kv_heads);
    let queries = (SCORES / shared).max(16);
    let mut tasks = Vec::new();
    let mut rest = Tile::new(y, q.len() / width, width, width);
    let mut done = 0;
    let mut ordered: Vec<&AttentionSpan<'_>> = spans.iter().filter(|s| !s.rows.is_empty()).collect();
    ordered.sort_by_key(|s| s.rows.start);
    for span in ordered {
        let (_, after) = rest.split_rows(span.rows.start - done);
        let (rows, after) = after.split_rows(span.rows.len());
        (rest, done) = (after, span.rows.end);
        let tile_width = if span.rows.len() <= FEW { head_dim } else { shared * head_dim };
        let parts = rows.grid(queries, tile_width);
        tasks.extend(parts.into_iter().map(|part| Task {
            span,
            first: part.row,
            head: part.col / head_dim,
            y: part.tile,
        }));
    }
    tasks.into_par_iter().for_each(|task| {
        if task.span.rows.len() <= FEW {
            walk(isa, shape, q, task);
        } else {
            multiply(isa, shape, q, task);
        }
    });
}

/// A tile of the output: query rows `first..` of a span, for heads from `head` on, as wide as `y`.
struct Task<'a, 's> {
    span: &'s AttentionSpan<'s>,
    first: usize,
    head: usize,
    y: Tile<'a>,
}

impl Task<'_, '_> {
    /// Where the first query of the task starts in the query matrix.
    fn query(&self, shape: AttentionShape) -> usize {
        ((self.span.rows.start + self.first) * shape.heads + self.head) * shape.head_dim
    }

    /// Where the head's part of key `key` starts.
    fn key(&self, shape: AttentionShape, key: usize) -> usize {
        let kv_head = self.head / (shape.heads / shape.kv_heads);
        (key * shape.kv_heads + kv_head) * shape.head_dim
    }
}

/// One head, query by query.
fn walk(isa: Isa, shape: AttentionShape, q: &[f32], mut task: Task<'_, '_>) {
    let AttentionShape { heads, kv_heads, head_dim, window } = shape;
    for i in 0..task.y.rows() {
        let visible = shapes::visible(task.span.past + task.first + i, window);
        let query = task.query(shape) + i * heads * head_dim;
        let (at, stride) = (task.key(shape, visible.start), kv_heads * head_dim);
        scratch::with(visible.len(), |scores| {
            let scale = 1.0 / (head_dim as f32).sqrt();
            dot::dot_rows(isa, &q[query..query + head_dim], &task.span.keys[at..], stride, scale, scores);
            let total = exp::softmax_unscaled(isa, scores);
            dot::mix_rows(isa, scores, &task.span.values[at..], stride, 1.0 / total, task.y.row_mut(i));
        });
    }
}

/// All heads of one key head and a tile of queries by two matrix products.
fn multiply(isa: Isa, shape: AttentionShape, q: &[f32], mut task: Task<'_, '_>) {
    let AttentionShape { heads, kv_heads, head_dim, window } = shape;
    let (rows, tile_width, kv_width) = (task.y.rows(), task.y.cols(), kv_heads * head_dim);
    let shared = tile_width / head_dim;
    // The keys that any query of the tile sees.
    let position = task.span.past + task.first;
    let (start, end) = (shapes::visible(position, window).start, position + rows);
    let (n, n_queries, at) = (end - start, rows * shared, task.key(shape, start));
    let keys = View::new(&task.span.keys[at..], n, head_dim, kv_width);
    let values = View::new(&task.span.values[at..], n, head_dim, kv_width);
    scratch::with(n_queries * (n + head_dim + 1), |buffer| {
        // Rows are (query, head): a row of the tile is `shared` rows of each of these.
        let (scores, buffer) = buffer.split_at_mut(n_queries * n);
        let (mixed, totals) = buffer.split_at_mut(n_queries * head_dim);
        for (i, row) in mixed.chunks_exact_mut(tile_width).enumerate() {
            let query = task.query(shape) + i * heads * head_dim;
            row.copy_from_slice(&q[query..query + tile_width]);
        }
        let queries = View::new(mixed, n_queries, head_dim, head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        gemm(scale, queries, keys.transposed(), 0.0, &mut Tile::new(scores, n_queries, n, n));
        for (i, (row, total)) in scores.chunks_exact_mut(n).zip(totals.iter_mut()).enumerate() {
            let visible = shapes::visible(position + i / shared, window);
            let (low, high) = (visible.start - start, visible.end - start);
            row[..low].fill(0.0);
            row[high..].fill(0.0);
            *total = exp::softmax_unscaled(isa, &mut row[low..high]);
        }
        // The queries have been used: the mixed values take their place.
        let into = &mut Tile::new(mixed, n_queries, head_dim, head_dim);
        gemm(1.0, View::new(scores, n_queries, n, n), values, 0.0, into);
        for (i, (row, totals)) in mixed.chunks_exact(tile_width).zip(totals.chunks_exact(shared)).enumerate() {
            let heads_of_row = task.y.row_mut(i).chunks_exact_mut(head_dim).zip(row.chunks_exact(head_dim));
            for ((y, mixed), total) in heads_of_row.zip(totals) {
                let scale = 1.0 / total;
                for (y, m) in y.iter_mut().zip(mixed) {
                    *y = m * scale;
                }
            }
        }
    });
}
