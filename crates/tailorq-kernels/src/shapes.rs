//! The shape assertions of the operations, the same for every device. A shape that does not fit is a programming error.

use crate::{AttentionShape, AttentionSpan, GradientSums, Heads, HeadsMut, KeyValues, RopeTable};
use std::ops::Range;
use tailorq_tensor::{Matrix, Weight};

/// Tokens of a linear call.
pub(crate) fn linear(x: &[f32], w: &Weight, bias: Option<&[f32]>, rows: &Range<usize>, y: &[f32]) -> usize {
    assert!(rows.start <= rows.end && rows.end <= w.rows(), "linear: rows {rows:?} of {w:?}");
    assert!(bias.is_none_or(|b| b.len() == w.rows()), "linear: one bias for each of the rows of {w:?}");
    let n = match (rows.len(), w.cols()) {
        (0, 0) => 0,
        (0, cols) => x.len() / cols,
        (rows, _) => y.len() / rows,
    };
    assert_eq!(x.len(), n * w.cols(), "linear: x is [n, {}] and y is [n, {}]", w.cols(), rows.len());
    assert_eq!(y.len(), n * rows.len(), "linear: x is [n, {}] and y is [n, {}]", w.cols(), rows.len());
    n
}

/// Tokens of a backward call of a linear.
pub(crate) fn linear_backward(dy: &[f32], w: &Weight, rows: &Range<usize>, dx: &[f32]) -> usize {
    linear(dx, w, None, rows, dy)
}

/// `[out, in]` of a call for weight gradients; `None` when no sum is asked for.
pub(crate) fn weight_gradients(
    dy: &[f32],
    x: &[f32],
    spans: &[Range<usize>],
    sums: &GradientSums<'_>,
) -> Option<(usize, usize)> {
    let all = [&sums.sum, &sums.absolute, &sums.square];
    let mut shapes = all.into_iter().flatten().map(|m: &&mut Matrix| (m.rows(), m.cols()));
    let (rows, cols) = shapes.next()?;
    assert!(shapes.all(|shape| shape == (rows, cols)), "weight_gradients: sums of different shapes");
    let n = spans.iter().map(|s| s.end).max().unwrap_or(0);
    assert!(spans.iter().all(|s| s.start <= s.end), "weight_gradients: spans {spans:?}");
    assert!(dy.len() >= n * rows && x.len() >= n * cols, "weight_gradients: a span ends after the last row");
    assert_eq!(dy.len() * cols, x.len() * rows, "weight_gradients: dy is [n, {rows}] and x is [n, {cols}]");
    Some((rows, cols))
}

/// Width of a chunk of logits of `rows` rows.
pub(crate) fn logits(logits: &[f32], rows: usize) -> usize {
    let width = logits.len() / rows.max(1);
    assert_eq!(logits.len(), width * rows, "logits: {rows} rows of the same width");
    width
}

/// Width of a chunk of logits with a weight and a log-sum for each row.
pub(crate) fn softmax(weights: &[f32], log_sums: &[f64], chunk: &[f32]) -> usize {
    assert_eq!(weights.len(), log_sums.len(), "logits: a weight and a log-sum for every row");
    logits(chunk, weights.len())
}

/// Width of two chunks of logits, each with its log-sums.
pub(crate) fn divergence(
    weights: &[f32],
    (reference, reference_log_sums): (&[f32], &[f64]),
    (logits, log_sums): (&[f32], &[f64]),
    divergences: &[f64],
) -> usize {
    assert_eq!(reference.len(), logits.len(), "divergence: logits of the reference have the same shape");
    assert_eq!(divergences.len(), weights.len(), "divergence: one sum for every row");
    softmax(weights, reference_log_sums, reference);
    softmax(weights, log_sums, logits)
}

/// Checks lengths and ids of an embedding.
pub(crate) fn embed(ids: &[u32], table: &Weight, y: &[f32]) {
    assert_eq!(y.len(), ids.len() * table.cols(), "embed: y is [ids, {}]", table.cols());
    assert!(ids.iter().all(|&id| (id as usize) < table.rows()), "embed: an id is not below {}", table.rows());
}

/// Checks that x and y are the same whole number of rows of `width` elements.
pub(crate) fn rows_of(width: usize, x: &[f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "x and y have the same shape");
    assert!(x.is_empty() || (width > 0 && x.len().is_multiple_of(width)), "{} elements in rows of {width}", x.len());
}

/// Width of a row of a rotary embedding call.
pub(crate) fn rope(x: &[f32], table: &RopeTable, positions: &[u32]) -> usize {
    assert_eq!(table.cos.len(), table.sin.len(), "rope: as many sines as cosines");
    if positions.is_empty() {
        assert!(x.is_empty(), "rope: one position a row");
        return 0;
    }
    let width = x.len() / positions.len();
    assert_eq!(x.len(), width * positions.len(), "rope: one position a row");
    assert!(
        if table.half == 0 { width == 0 } else { width.is_multiple_of(2 * table.half) },
        "rope: rows of {width} are not whole heads of {}",
        2 * table.half
    );
    let known = table.cos.len() / table.half.max(1);
    assert!(positions.iter().all(|&p| (p as usize) < known), "rope: a position is not below {known}");
    width
}

/// Checks the shapes of an attention call, and that the spans are disjoint.
pub(crate) fn attention(shape: AttentionShape, q: &[f32], spans: &[AttentionSpan<'_>], y: &[f32]) {
    assert!(shape.heads > 0 && shape.kv_heads > 0 && shape.head_dim > 0, "attention: no heads in {shape:?}");
    assert!(shape.heads.is_multiple_of(shape.kv_heads), "attention: kv_heads does not divide heads in {shape:?}");
    let width = shape.heads * shape.head_dim;
    rows_of(width, q, y);
    assert!(are_disjoint(spans), "attention: spans overlap");
    let n_rows = q.len() / width;
    for AttentionSpan { rows, source, past } in spans {
        assert!(rows.is_empty() || rows.end <= n_rows, "attention: a span ends after the last row");
        let fits = source.fits(shape, past + rows.len());
        assert!(fits, "attention: keys and values of span {rows:?} with {past} before");
    }
}

/// Whether no row lies in two spans. Empty spans have no rows, wherever they lie.
fn are_disjoint(spans: &[AttentionSpan<'_>]) -> bool {
    fn in_order<'a>(mut ranges: impl Iterator<Item = &'a Range<usize>>) -> bool {
        let mut end = 0;
        ranges.all(|rows| rows.start >= std::mem::replace(&mut end, rows.end))
    }
    let covered = || spans.iter().map(|s| &s.rows).filter(|rows| !rows.is_empty());
    // Spans mostly come in order, and then nothing is allocated.
    if covered().is_sorted_by_key(|rows| rows.start) {
        return in_order(covered());
    }
    let mut sorted: Vec<_> = covered().collect();
    sorted.sort_by_key(|rows| rows.start);
    in_order(sorted.into_iter())
}

/// Checks the shapes of a backward attention call, and that the spans are disjoint; the rows.
pub(crate) fn attention_backward(
    shape: AttentionShape,
    heads: &Heads<'_>,
    spans: &[Range<usize>],
    dy: &[f32],
    gradients: &HeadsMut<'_>,
) -> usize {
    let kv_width = shape.kv_heads * shape.head_dim;
    let keys_of = |rows: &Range<usize>| &heads.k[rows.start * kv_width..rows.end * kv_width];
    let values_of = |rows: &Range<usize>| &heads.v[rows.start * kv_width..rows.end * kv_width];
    let as_forward: Vec<_> = spans
        .iter()
        .map(|rows| {
            let source = KeyValues::Rows { keys: keys_of(rows), values: values_of(rows) };
            AttentionSpan { rows: rows.clone(), source, past: 0 }
        })
        .collect();
    attention(shape, heads.q, &as_forward, dy);
    let n = heads.q.len() / (shape.heads * shape.head_dim);
    assert_eq!(heads.k.len(), n * kv_width, "attention_backward: keys are [n, {kv_width}]");
    assert_eq!(heads.v.len(), n * kv_width, "attention_backward: values are [n, {kv_width}]");
    assert_eq!(gradients.q.len(), heads.q.len(), "attention_backward: gradients of queries");
    assert_eq!(gradients.k.len(), heads.k.len(), "attention_backward: gradients of keys");
    assert_eq!(gradients.v.len(), heads.v.len(), "attention_backward: gradients of values");
    n
}

/// The keys that the query at absolute position `at` sees.
pub(crate) fn visible(at: usize, window: Option<usize>) -> Range<usize> {
    (at + 1).saturating_sub(window.unwrap_or(usize::MAX))..at + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_disjoint_in_any_order_and_around_empty_ones() {
        let source = || KeyValues::Rows { keys: &[], values: &[] };
        let disjoint = |ranges: &[Range<usize>]| {
            let span = |rows: &Range<usize>| AttentionSpan { rows: rows.clone(), source: source(), past: 0 };
            are_disjoint(&ranges.iter().map(span).collect::<Vec<_>>())
        };
        assert!(disjoint(&[]));
        assert!(disjoint(&[0..4, 2..2, 4..9]));
        assert!(disjoint(&[4..9, 2..2, 0..4]));
        assert!(!disjoint(&[0..4, 2..2, 3..9]));
        assert!(!disjoint(&[3..9, 2..2, 0..4]));
        assert!(!disjoint(&[0..9, 3..4, 5..6]));
    }
}
