//! Keys and values of one block of one sequence, as attention reads them.
//!
//! They lie in pages of [`KV_PAGE`] tokens, in a page head by head, so that attention reads a head's keys as one stream and
//! growing copies nothing. Copies of a cache share their pages until one of them writes: a prefix that many sequences have in
//! common is stored once. The scalar accessor [`KvBlock::row`] defines what the bytes mean.

use crate::AttentionShape;
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

/// Tokens of a page.
pub const KV_PAGE: usize = 32;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// As they were computed: the reference.
    #[default]
    F32,
    /// Rounded to half precision.
    F16,
    /// Rounded to 8 bits with one half-precision scale for every head and token.
    Q8,
}

impl KvType {
    /// Every type.
    pub const ALL: [KvType; 3] = [KvType::F32, KvType::F16, KvType::Q8];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
            KvType::Q8 => "q8",
        }
    }

    /// Bytes of one head's key (or value) of one token.
    pub fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            KvType::F32 => 4 * head_dim,
            KvType::F16 => 2 * head_dim,
            KvType::Q8 => head_dim + 2,
        }
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KvType {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let known = KvType::ALL.into_iter().find(|t| t.name() == s);
        known.ok_or_else(|| format!("keys and values cannot be stored as '{s}': use f32, f16 or q8"))
    }
}

/// Keys or values of a page: `[kv_heads, KV_PAGE, head_dim]`, scales `[kv_heads, KV_PAGE]`.
#[derive(Clone, Debug)]
enum Rows {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Q8 { codes: Vec<i8>, scales: Vec<f16> },
}

/// Consecutive tokens of one head inside a page, or of plain rows.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Run<'a> {
    /// Token `t` starts at `t * stride`.
    F32 { data: &'a [f32], stride: usize },
    /// `[tokens, head_dim]`.
    F16(&'a [f16]),
    /// `[tokens, head_dim]` and `[tokens]`.
    Q8 { codes: &'a [i8], scales: &'a [f16] },
}

impl Rows {
    fn new(kind: KvType, kv_heads: usize, head_dim: usize) -> Self {
        let n_rows = kv_heads * KV_PAGE;
        match kind {
            KvType::F32 => Rows::F32(vec![0.0; n_rows * head_dim]),
            KvType::F16 => Rows::F16(vec![f16::ZERO; n_rows * head_dim]),
            KvType::Q8 => Rows::Q8 { codes: vec![0; n_rows * head_dim], scales: vec![f16::ZERO; n_rows] },
        }
    }

    /// Stores the row (head, token) number `row`.
    fn set(&mut self, row: usize, values: &[f32]) {
        let at = row * values.len()..(row + 1) * values.len();
        match self {
            Rows::F32(rows) => rows[at].copy_from_slice(values),
            Rows::F16(rows) => rows[at].convert_from_f32_slice(values),
            Rows::Q8 { codes, scales } => scales[row] = quantize(values, &mut codes[at]),
        }
    }

    /// Rows `rows` of one head.
    fn run(&self, rows: Range<usize>, head_dim: usize) -> Run<'_> {
        let at = rows.start * head_dim..rows.end * head_dim;
        match self {
            Rows::F32(data) => Run::F32 { data: &data[at], stride: head_dim },
            Rows::F16(data) => Run::F16(&data[at]),
            Rows::Q8 { codes, scales } => Run::Q8 { codes: &codes[at], scales: &scales[rows] },
        }
    }
}

impl Run<'_> {
    /// The rows as f32, `[tokens, head_dim]`.
    pub(crate) fn read(&self, head_dim: usize, out: &mut [f32]) {
        match *self {
            Run::F32 { data, stride } => {
                for (t, out) in out.chunks_exact_mut(head_dim).enumerate() {
                    out.copy_from_slice(&data[t * stride..t * stride + head_dim]);
                }
            }
            Run::F16(data) => data.convert_to_f32_slice(out),
            Run::Q8 { codes, scales } => {
                let rows = out.chunks_exact_mut(head_dim).zip(codes.chunks_exact(head_dim));
                for ((out, codes), scale) in rows.zip(scales) {
                    let scale = scale.to_f32();
                    for (out, &code) in out.iter_mut().zip(codes) {
                        *out = scale * f32::from(code);
                    }
                }
            }
        }
    }
}

/// Rounds a row to codes of 8 bits, whose scale it returns: the largest magnitude over 127, in half precision. A row with
/// an element that is no number gets a scale that is none, so that damage stays visible.
fn quantize(values: &[f32], codes: &mut [i8]) -> f16 {
    let largest = values.iter().fold(0.0f32, |m, v| if v.is_finite() { m.max(v.abs()) } else { f32::NAN.max(m) });
    let is_finite = values.iter().all(|v| v.is_finite());
    let scale = f16::from_f32((largest / 127.0).min(f16::MAX.to_f32()));
    let inverse = if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() };
    for (code, value) in codes.iter_mut().zip(values) {
        // Half precision may have rounded the scale down; the conversion saturates.
        *code = (value * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    if is_finite { scale } else { f16::NAN }
}

#[derive(Clone, Debug)]
struct Page {
    keys: Rows,
    values: Rows,
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Keys, rotated.
    Keys,
    /// Values.
    Values,
}

/// Keys and values of all tokens of one sequence in one block. Cheap to clone.
#[derive(Clone, Debug)]
pub struct KvBlock {
    kind: KvType,
    kv_heads: usize,
    head_dim: usize,
    len: usize,
    pages: Vec<Arc<Page>>,
    /// What a device with a memory of its own keeps in place of pages.
    remote: Option<RemoteTokens>,
}

/// Tokens in the memory of a device, as it keeps them.
#[derive(Clone)]
struct RemoteTokens(Arc<dyn Any + Send + Sync>);

impl fmt::Debug for RemoteTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("on a device")
    }
}

impl KvBlock {
    /// No tokens yet.
    pub fn new(kind: KvType, kv_heads: usize, head_dim: usize) -> Self {
        KvBlock { kind, kv_heads, head_dim, len: 0, pages: Vec::new(), remote: None }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of the keys and values of all tokens held.
    pub fn bytes(&self) -> usize {
        2 * self.kv_heads * self.len * self.kind.row_bytes(self.head_dim)
    }

    /// What the device that holds the tokens knows them by.
    pub fn remote(&self) -> Option<&(dyn Any + Send + Sync)> {
        self.remote.as_ref().map(|r| &*r.0)
    }

    /// The same, to be asked whether another copy of the block shares it.
    pub fn remote_mut(&mut self) -> Option<&mut Arc<dyn Any + Send + Sync>> {
        self.remote.as_mut().map(|r| &mut r.0)
    }

    /// Keeps the tokens on a device, which holds those that are there already.
    pub fn set_remote(&mut self, remote: Arc<dyn Any + Send + Sync>) {
        self.remote = Some(RemoteTokens(remote));
    }

    /// Counts tokens that a device has written.
    pub fn grow(&mut self, tokens: usize) {
        assert!(self.remote.is_some(), "tokens in memory are pushed");
        self.len += tokens;
    }

    /// Makes room for `tokens` tokens in all, so that none of them asks for memory when it comes.
    pub fn reserve(&mut self, tokens: usize) {
        let n_pages = tokens.div_ceil(KV_PAGE);
        self.pages.reserve(n_pages.saturating_sub(self.pages.len()));
        while self.pages.len() < n_pages {
            let rows = || Rows::new(self.kind, self.kv_heads, self.head_dim);
            self.pages.push(Arc::new(Page { keys: rows(), values: rows() }));
        }
    }

    /// Forgets all tokens but the first `len`; keeps what there is when it has fewer. Whole pages behind it are given back.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.pages.truncate(self.len.div_ceil(KV_PAGE));
    }

    /// Adds tokens: `keys` and `values` are `[tokens, kv_heads * head_dim]`.
    pub fn push(&mut self, keys: &[f32], values: &[f32]) {
        let width = self.kv_heads * self.head_dim;
        assert!(keys.len() == values.len() && keys.len().is_multiple_of(width), "push: rows of {width} elements");
        self.reserve(self.len + keys.len() / width);
        for (keys, values) in keys.chunks_exact(width).zip(values.chunks_exact(width)) {
            let (page, token) = (self.len / KV_PAGE, self.len % KV_PAGE);
            // Shared with another sequence: from here on they differ.
            let page = Arc::make_mut(&mut self.pages[page]);
            let heads = keys.chunks_exact(self.head_dim).zip(values.chunks_exact(self.head_dim));
            for (head, (key, value)) in heads.enumerate() {
                page.keys.set(head * KV_PAGE + token, key);
                page.values.set(head * KV_PAGE + token, value);
            }
            self.len += 1;
        }
    }

    /// One head of one token as f32: what the stored bytes mean.
    pub fn row(&self, part: Part, head: usize, token: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.head_dim, "row: one head");
        self.run(part, head, token..token + 1).read(self.head_dim, out);
    }

    /// Tokens of one page.
    fn run(&self, part: Part, head: usize, tokens: Range<usize>) -> Run<'_> {
        assert!(head < self.kv_heads && tokens.end <= self.len, "head {head}, tokens {tokens:?} of {}", self.len);
        let (page, first) = (&self.pages[tokens.start / KV_PAGE], tokens.start % KV_PAGE);
        let rows = head * KV_PAGE + first..head * KV_PAGE + first + tokens.len();
        assert!(first + tokens.len() <= KV_PAGE, "tokens {tokens:?} lie in two pages");
        match part {
            Part::Keys => page.keys.run(rows, self.head_dim),
            Part::Values => page.values.run(rows, self.head_dim),
        }
    }
}

/// Where the keys and values of a sequence are.
#[derive(Clone, Copy, Debug)]
pub enum KeyValues<'a> {
    /// In plain rows: `[past + rows.len(), kv_heads * head_dim]` each.
    Rows {
        /// Keys, rotated.
        keys: &'a [f32],
        /// Values.
        values: &'a [f32],
    },
    /// In a cache of `past + rows.len()` tokens.
    Cache(&'a KvBlock),
}

impl<'a> KeyValues<'a> {
    /// Whether there are `tokens` tokens of this shape.
    pub(crate) fn fits(self, shape: AttentionShape, tokens: usize) -> bool {
        match self {
            KeyValues::Rows { keys, values } => {
                let expected = tokens * shape.kv_heads * shape.head_dim;
                keys.len() == expected && values.len() == expected
            }
            KeyValues::Cache(block) => {
                (block.kv_heads, block.head_dim, block.len) == (shape.kv_heads, shape.head_dim, tokens)
            }
        }
    }

    /// `tokens` cut where a run has to end.
    pub(crate) fn pieces(self, tokens: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut start = tokens.start;
        std::iter::from_fn(move || {
            let end = match self {
                KeyValues::Rows { .. } => tokens.end,
                KeyValues::Cache(_) => tokens.end.min((start / KV_PAGE + 1) * KV_PAGE),
            };
            let piece = start..end;
            start = end;
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// One piece of one head.
    pub(crate) fn run(self, part: Part, shape: AttentionShape, head: usize, tokens: Range<usize>) -> Run<'a> {
        match (self, part) {
            (KeyValues::Cache(block), part) => block.run(part, head, tokens),
            (KeyValues::Rows { keys: rows, .. }, Part::Keys) | (KeyValues::Rows { values: rows, .. }, Part::Values) => {
                let stride = shape.kv_heads * shape.head_dim;
                Run::F32 { data: &rows[tokens.start * stride + head * shape.head_dim..], stride }
            }
        }
    }

    /// Tokens of one head as f32, `[tokens, head_dim]`.
    pub(crate) fn read(self, part: Part, shape: AttentionShape, head: usize, tokens: Range<usize>, out: &mut [f32]) {
        for piece in self.pieces(tokens.clone()) {
            let at = (piece.start - tokens.start) * shape.head_dim..(piece.end - tokens.start) * shape.head_dim;
            self.run(part, shape, head, piece).read(shape.head_dim, &mut out[at]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: usize = 2;
    const WIDTH: usize = 3;

    fn rows(rng: &mut tailorq_tensor::Rng, n: usize) -> Vec<f32> {
        (0..n * HEADS * WIDTH).map(|_| rng.normal()).collect()
    }

    /// What the blocks hold of (part, head, token), against what was pushed.
    fn check(block: &KvBlock, pushed: [&[f32]; 2], tolerance: f32) {
        assert_eq!(block.len(), pushed[0].len() / (HEADS * WIDTH));
        for (part, rows) in [Part::Keys, Part::Values].into_iter().zip(pushed) {
            for (t, row) in rows.chunks_exact(HEADS * WIDTH).enumerate() {
                for (head, expected) in row.chunks_exact(WIDTH).enumerate() {
                    let mut found = [f32::NAN; WIDTH];
                    block.row(part, head, t, &mut found);
                    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                    for (f, e) in found.iter().zip(expected) {
                        assert!((f - e).abs() <= tolerance * largest, "{part:?} {head} {t}: {found:?} {expected:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_pushed_comes_back_within_its_precision() {
        let mut rng = tailorq_tensor::Rng::new(1);
        for (kind, tolerance) in [(KvType::F32, 0.0), (KvType::F16, 5e-4), (KvType::Q8, 0.5 / 127.0 + 5e-4)] {
            let (keys, values) = (rows(&mut rng, 3 * KV_PAGE + 5), rows(&mut rng, 3 * KV_PAGE + 5));
            let mut block = KvBlock::new(kind, HEADS, WIDTH);
            for (from, to) in [(0, 1), (1, KV_PAGE), (KV_PAGE, 3 * KV_PAGE + 1), (3 * KV_PAGE + 1, 3 * KV_PAGE + 5)] {
                let at = from * HEADS * WIDTH..to * HEADS * WIDTH;
                block.push(&keys[at.clone()], &values[at]);
            }
            check(&block, [&keys, &values], tolerance);
            assert_eq!(block.bytes(), 2 * HEADS * (3 * KV_PAGE + 5) * kind.row_bytes(WIDTH));
        }
    }

    #[test]
    fn copies_share_pages_and_go_apart_where_they_differ() {
        let mut rng = tailorq_tensor::Rng::new(2);
        let (keys, other) = (rows(&mut rng, 2 * KV_PAGE + 3), rows(&mut rng, KV_PAGE));
        let mut block = KvBlock::new(KvType::F32, HEADS, WIDTH);
        block.push(&keys, &keys);
        let mut copy = block.clone();
        assert!(block.pages.iter().zip(&copy.pages).all(|(a, b)| Arc::ptr_eq(a, b)));
        let kept = KV_PAGE + 7;
        copy.truncate(kept);
        copy.push(&other, &other);
        check(&block, [&keys, &keys], 0.0);
        let expected = [&keys[..kept * HEADS * WIDTH], &other].concat();
        check(&copy, [&expected, &expected], 0.0);
        assert!(Arc::ptr_eq(&block.pages[0], &copy.pages[0]) && !Arc::ptr_eq(&block.pages[1], &copy.pages[1]));
        copy.truncate(0);
        assert!(copy.is_empty() && copy.pages.is_empty());
    }

    #[test]
    fn rows_that_eight_bits_cannot_hold() {
        let mut codes = [1; 3];
        assert_eq!((quantize(&[0.0; 3], &mut codes), codes), (f16::ZERO, [0; 3]));
        // A scale that is 0 in half precision.
        assert_eq!((quantize(&[1e-9, 0.0, -1e-9], &mut codes), codes), (f16::ZERO, [0; 3]));
        let scale = quantize(&[f32::MAX, -1.0, 0.0], &mut codes);
        assert!(scale == f16::MAX && codes == [127, 0, 0]);
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(quantize(&[1.0, bad, 2.0], &mut codes).is_nan());
        }
    }
}
