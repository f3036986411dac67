//! The second pass: what corrections of elements and tiles, and the bias, add to the products of the base.

use crate::cpu::linear::add_bias;
use crate::cpu::scratch;
use crate::cpu::simd::{Isa, Simd, per_isa};
use crate::cpu::tile::Tile;
use half::f16;
use rayon::prelude::*;
use tailorq_tensor::{ElementCorrections, PackedMatrix, TILE, TileBits, TileCorrections};

/// Elements whose products are held at once.
const BATCH: usize = 1024;

/// Adds to `y[t, i]` the corrections of row `first + i` times token `t` of `x` (`[tokens, cols]`, as they are), and the bias.
pub(super) fn add(isa: Isa, w: &PackedMatrix, x: &[f32], first: usize, bias: Option<&[f32]>, y: &mut Tile<'_>) {
    for t in 0..y.rows() {
        let x = &x[t * w.cols()..(t + 1) * w.cols()];
        let y = y.row_mut(t);
        if let Some(tiles) = w.tiles() {
            add_tiles(isa, tiles, x, first, y);
        }
        if let Some(elements) = w.elements() {
            add_elements(isa, elements, x, first, y);
        }
    }
    add_bias(y, bias, first);
}

/// The activations of many tokens by input, `[cols, n]`, so that a correction is added to all tokens at once.
pub(super) struct Transposed<'a> {
    n: usize,
    x: &'a [f32],
}

impl<'a> Transposed<'a> {
    /// Transposes `x` (`[n, cols]`) into `buffer` when `w` has corrections.
    pub(super) fn of(w: &PackedMatrix, x: &[f32], buffer: &'a mut Vec<f32>) -> Self {
        let (cols, n) = (w.cols(), x.len() / w.cols());
        if w.tiles().is_none() && w.elements().is_none() {
            return Transposed { n, x: &[] };
        }
        buffer.resize(x.len(), 0.0);
        // Blocks of inputs, so that what is written stays in the cache until its line is full.
        buffer.par_chunks_mut(TILE * n).enumerate().for_each(|(block, to)| {
            for (t, x) in x.chunks_exact(cols).enumerate() {
                for (to, v) in to.chunks_exact_mut(n).zip(&x[block * TILE..]) {
                    to[t] = *v;
                }
            }
        });
        Transposed { n, x: buffer }
    }

    fn input(&self, col: usize) -> &[f32] {
        &self.x[col * self.n..(col + 1) * self.n]
    }
}

/// As [`add`], for many tokens.
pub(super) fn add_many(
    isa: Isa,
    w: &PackedMatrix,
    x: &Transposed<'_>,
    first: usize,
    bias: Option<&[f32]>,
    y: &mut Tile<'_>,
) {
    if !x.x.is_empty() {
        scratch::with(x.n, |sums| {
            for i in 0..y.cols() {
                sums.fill(0.0);
                for t in w.tiles().iter().flat_map(|t| t.row(first + i)) {
                    let scale = t.scale.to_f32();
                    for (k, code) in t.codes.into_iter().enumerate().take(w.cols() - t.tile * TILE) {
                        add_scaled(isa, f32::from(code) * scale, x.input(t.tile * TILE + k), sums);
                    }
                }
                for (col, value) in w.elements().iter().flat_map(|e| e.row(first + i)) {
                    add_scaled(isa, value, x.input(col), sums);
                }
                for (t, sum) in sums.iter().enumerate() {
                    y.row_mut(t)[i] += sum;
                }
            }
        });
    }
    add_bias(y, bias, first);
}

per_isa! {
    fn add_scaled(scale: f32, x: &[f32], y: &mut [f32]) = add_scaled_body
}

#[inline(always)]
fn add_scaled_body<S: Simd>(_simd: S, scale: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += scale * x;
    }
}

/// The products of a run of elements, then their sums row by row: the first part has no branch that depends on how many
/// elements a row has.
fn add_elements(isa: Isa, elements: &ElementCorrections, x: &[f32], first: usize, y: &mut [f32]) {
    let starts = &elements.starts()[first..=first + y.len()];
    let parts = elements.parts();
    let values: &[u16] = parts.values.cast().expect("checked when the corrections were made");
    let mut products = [0.0; BATCH];
    let mut row = 0;
    while row < y.len() {
        // As many whole rows as fit, at least one.
        let begin = starts[row];
        let fitting = starts[row + 1..].partition_point(|&end| end - begin <= BATCH);
        let rows = row..row + fitting.max(1);
        let (mut from, end) = (begin, starts[rows.end]);
        if fitting == 0 {
            let mut sum = 0.0;
            while from < end {
                let n = BATCH.min(end - from);
                multiply(isa, elements, values, x, from, &mut products[..n]);
                sum += products[..n].iter().sum::<f32>();
                from += n;
            }
            y[row] += sum;
        } else {
            multiply(isa, elements, values, x, from, &mut products[..end - from]);
            for (y, ends) in y[rows.clone()].iter_mut().zip(starts[rows.start..=rows.end].windows(2)) {
                *y += products[ends[0] - begin..ends[1] - begin].iter().sum::<f32>();
            }
        }
        row = rows.end;
    }
}

/// `products[i] = values[from + i] * x[column of from + i]`.
fn multiply(isa: Isa, elements: &ElementCorrections, values: &[u16], x: &[f32], from: usize, products: &mut [f32]) {
    let (cols, values) = (&elements.parts().cols, &values[from..from + products.len()]);
    if ElementCorrections::index_bytes(elements.cols()) == 2 {
        let cols: &[u16] = cols.cast().expect("checked when the corrections were made");
        let cols = &cols[from..from + products.len()];
        #[cfg(target_arch = "x86_64")]
        if super::has_vnni(isa) {
            assert_eq!(x.len(), elements.cols(), "activations of a row");
            // SAFETY: the processor has the features; columns were checked to be below `cols`, which `x` has.
            return unsafe { super::avx512::multiply_elements(cols, values, x, products) };
        }
        for ((product, &value), &col) in products.iter_mut().zip(values).zip(cols) {
            *product = f16::from_bits(value).to_f32() * x[usize::from(col)];
        }
    } else {
        let cols: &[u32] = cols.cast().expect("checked when the corrections were made");
        for ((product, &value), &col) in products.iter_mut().zip(values).zip(&cols[from..]) {
            *product = f16::from_bits(value).to_f32() * x[col as usize];
        }
    }
}

fn add_tiles(isa: Isa, tiles: &TileCorrections, x: &[f32], first: usize, y: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if super::has_vnni(isa) {
        // SAFETY: the processor has the features, and the rows exist.
        return unsafe { super::avx512::add_tiles(&TileView::of(tiles), x, first, y) };
    }
    for (i, y) in y.iter_mut().enumerate() {
        for t in tiles.row(first + i) {
            let x = &x[t.tile * TILE..];
            let sum: f32 = t.codes.iter().zip(x).map(|(&code, x)| f32::from(code) * x).sum();
            *y += t.scale.to_f32() * sum;
        }
    }
}

/// Tile corrections as plain slices, borrowed once a call.
pub(super) struct TileView<'a> {
    pub(super) map: &'a tailorq_tensor::TileMap,
    /// `[rows, row_bytes]`.
    pub(super) marks: &'a [u8],
    pub(super) row_bytes: usize,
    pub(super) bits: TileBits,
    /// `[n, tile_bytes]`.
    pub(super) codes: &'a [u8],
    /// f16 `[n]`, as bits.
    pub(super) scales: &'a [u16],
}

impl<'a> TileView<'a> {
    fn of(tiles: &'a TileCorrections) -> Self {
        let parts = tiles.parts();
        TileView {
            map: tiles.map(),
            marks: &parts.tilemap,
            row_bytes: tailorq_tensor::TileMap::row_bytes(tiles.cols()),
            bits: tiles.bits(),
            codes: &parts.codes,
            scales: parts.scales.cast().expect("checked when the corrections were made"),
        }
    }
}
