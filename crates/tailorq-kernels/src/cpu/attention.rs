//! Causal softmax attention over ragged spans.
//!
//! A task is a tile of query rows and all query heads that share one key head. Many queries: scores and mixed values
//! are matrix products over the keys that any query of the tile sees. Few queries: each head is a walk over its keys; where
//! every sequence has one query (decoding), heads that share keys walk together and nothing is asked of the allocator.

use super::gemm::{View, gemm};
use super::simd::Isa;
use super::tile::Tile;
use super::{exp, scratch, walk};
use crate::{AttentionShape, AttentionSpan, Part, shapes};
use rayon::prelude::*;

/// Rows of the score matrix that a task aims at: query rows times query heads.
const SCORES: usize = 128;
/// Spans of up to this many query rows are walked head by head.
const FEW: usize = 4;
/// Keys times elements of heads below which a step is not divided among threads.
const WALK_TASK: usize = 1 << 15;

pub(super) fn attention(isa: Isa, shape: AttentionShape, q: &[f32], spans: &[AttentionSpan<'_>], y: &mut [f32]) {
    shapes::attention(shape, q, spans, y);
    if spans.len() * shape.heads * shape.head_dim == q.len()
        && spans.iter().enumerate().all(|(i, span)| span.rows == (i..i + 1))
    {
        return step(isa, shape, q, spans, y);
    }
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
            few(isa, shape, q, task);
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

    /// The head whose keys and values these are.
    fn kv_head(&self, shape: AttentionShape) -> usize {
        self.head / (shape.heads / shape.kv_heads)
    }
}

/// One query of every sequence.
fn step(isa: Isa, shape: AttentionShape, q: &[f32], spans: &[AttentionSpan<'_>], y: &mut [f32]) {
    let n_walks = spans.len() * walks_of_a_row(shape);
    if n_walks == 0 {
        return;
    }
    let visible = |span: &AttentionSpan<'_>| shapes::visible(span.past, shape.window).len();
    let work = spans.iter().map(visible).sum::<usize>() * shape.heads * shape.head_dim;
    Step { isa, shape, q, spans, least: (WALK_TASK * n_walks / work.max(1)).max(1) }.walks(0, n_walks, y);
}

/// Walks of one row: those of a key head are cut into groups of at most [`walk::HEADS`] heads.
fn walks_of_a_row(shape: AttentionShape) -> usize {
    shape.kv_heads * (shape.heads / shape.kv_heads).div_ceil(walk::HEADS)
}

struct Step<'a> {
    isa: Isa,
    shape: AttentionShape,
    q: &'a [f32],
    spans: &'a [AttentionSpan<'a>],
    /// Walks that are not divided further.
    least: usize,
}

impl Step<'_> {
    /// Where the outputs of a walk start.
    fn start(&self, walk: usize) -> usize {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let shared = heads / kv_heads;
        let groups = shared.div_ceil(walk::HEADS);
        (walk / groups * shared + walk % groups * walk::HEADS) * head_dim
    }

    /// The walks `first..end`, whose outputs are `y`.
    fn walks(&self, first: usize, end: usize, y: &mut [f32]) {
        if end - first > self.least {
            let middle = usize::midpoint(first, end);
            let (low, high) = y.split_at_mut(self.start(middle) - self.start(first));
            rayon::join(|| self.walks(first, middle, low), || self.walks(middle, end, high));
            return;
        }
        let mut rest = y;
        for i in first..end {
            let at = self.start(i)..self.start(i + 1);
            let (y, after) = rest.split_at_mut(at.len());
            rest = after;
            let span = &self.spans[i / walks_of_a_row(self.shape)];
            let head = at.start / self.shape.head_dim % self.shape.heads;
            let kv_head = head / (self.shape.heads / self.shape.kv_heads);
            let visible = shapes::visible(span.past, self.shape.window);
            walk::walk(self.isa, self.shape, &self.q[at], span.source, kv_head, visible, y);
        }
    }
}

/// One head, query by query.
fn few(isa: Isa, shape: AttentionShape, q: &[f32], mut task: Task<'_, '_>) {
    let AttentionShape { heads, head_dim, window, .. } = shape;
    for i in 0..task.y.rows() {
        let visible = shapes::visible(task.span.past + task.first + i, window);
        let query = task.query(shape) + i * heads * head_dim;
        let (q, kv_head) = (&q[query..query + head_dim], task.kv_head(shape));
        walk::walk(isa, shape, q, task.span.source, kv_head, visible, task.y.row_mut(i));
    }
}

/// All heads of one key head and a tile of queries by two matrix products.
fn multiply(isa: Isa, shape: AttentionShape, q: &[f32], mut task: Task<'_, '_>) {
    let AttentionShape { heads, head_dim, window, .. } = shape;
    let (rows, tile_width) = (task.y.rows(), task.y.cols());
    let shared = tile_width / head_dim;
    // The keys that any query of the tile sees.
    let position = task.span.past + task.first;
    let (start, end) = (shapes::visible(position, window).start, position + rows);
    let (n, n_queries) = (end - start, rows * shared);
    scratch::with(n_queries * (n + head_dim + 1) + 2 * n * head_dim, |buffer| {
        // Rows are (query, head): a row of the tile is `shared` rows of each of these.
        let (scores, buffer) = buffer.split_at_mut(n_queries * n);
        let (mixed, buffer) = buffer.split_at_mut(n_queries * head_dim);
        let (totals, buffer) = buffer.split_at_mut(n_queries);
        let (keys, values) = buffer.split_at_mut(n * head_dim);
        for (part, rows) in [(Part::Keys, &mut *keys), (Part::Values, &mut *values)] {
            task.span.source.read(part, shape, task.kv_head(shape), start..end, rows);
        }
        let (keys, values) = (View::new(keys, n, head_dim, head_dim), View::new(values, n, head_dim, head_dim));
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
