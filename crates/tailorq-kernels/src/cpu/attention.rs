//! Causal softmax attention over ragged spans.

use super::gemm::{View, gemm};
use super::scratch;
use super::tile::Tile;
use crate::{AttentionShape, AttentionSpan, shapes};
use rayon::prelude::*;

/// Query rows a task.
const QUERIES: usize = 64;

pub(super) fn attention(shape: AttentionShape, q: &[f32], spans: &[AttentionSpan<'_>], y: &mut [f32]) {
    shapes::attention(shape, q, spans, y);
    let width = shape.heads * shape.head_dim;
    let mut tasks = Vec::new();
    let mut rest = Tile::new(y, q.len() / width, width, width);
    let mut done = 0;
    let mut ordered: Vec<&AttentionSpan<'_>> = spans.iter().filter(|s| !s.rows.is_empty()).collect();
    ordered.sort_by_key(|s| s.rows.start);
    for span in ordered {
        let (_, after) = rest.split_rows(span.rows.start - done);
        let (rows, after) = after.split_rows(span.rows.len());
        (rest, done) = (after, span.rows.end);
        tasks.extend(rows.grid(QUERIES, shape.head_dim).into_iter().map(|part| (span, part)));
    }
    tasks.into_par_iter().for_each(|(span, part)| {
        let head = part.col / shape.head_dim;
        attend(shape, q, span, part.row, head, part.tile);
    });
}

/// One tile of queries of one head: rows `first..` of the span.
fn attend(shape: AttentionShape, q: &[f32], span: &AttentionSpan<'_>, first: usize, head: usize, mut y: Tile<'_>) {
    let AttentionShape { heads, kv_heads, head_dim, window } = shape;
    let (rows, kv_width, kv_head) = (y.rows(), kv_heads * head_dim, head / (heads / kv_heads));
    // The keys that any query of the tile sees.
    let start = shapes::visible(span.past + first, window).start;
    let end = span.past + first + rows;
    let n = end - start;
    let at = start * kv_width + kv_head * head_dim;
    let queries = View::new(
        &q[(span.rows.start + first) * heads * head_dim + head * head_dim..],
        rows,
        head_dim,
        heads * head_dim,
    );
    let keys = View::new(&span.keys[at..], n, head_dim, kv_width);
    let values = View::new(&span.values[at..], n, head_dim, kv_width);
    scratch::with(rows * n, |scores| {
        gemm(1.0 / (head_dim as f32).sqrt(), queries, keys.transposed(), 0.0, &mut Tile::new(scores, rows, n, n));
        for (i, row) in scores.chunks_exact_mut(n).enumerate() {
            let visible = shapes::visible(span.past + first + i, window);
            let (low, high) = (visible.start - start, visible.end - start);
            row[..low].fill(0.0);
            row[high..].fill(0.0);
            softmax(&mut row[low..high]);
        }
        gemm(1.0, View::new(scores, rows, n, n), values, 0.0, &mut y);
    });
}

/// Softmax in place.
fn softmax(row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for v in row.iter_mut() {
        *v = (*v - max).exp();
        total += *v;
    }
    let scale = 1.0 / total;
    for v in row {
        *v *= scale;
    }
}
