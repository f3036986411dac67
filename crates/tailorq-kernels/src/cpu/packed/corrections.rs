//! The second pass: what corrections of elements and tiles, and the bias, add to the products of the base.
//!
//! A row of 1536 inputs has two corrected tiles of a hundred and five kept elements: a loop over those of one row ends at
//! another turn in each, and what the processor loses by guessing wrongly is more than what the arithmetic takes. So the
//! corrections of a block of rows are one flat run each, whose entries say themselves to which row they belong. Blocks are
//! small, so that the second pass of one runs while the base of the next comes from memory.

use super::activations::Lanes;
use crate::cpu::linear::add_bias;
use crate::cpu::scratch;
use crate::cpu::simd::{Isa, LANES, Simd, per_isa};
use crate::cpu::tile::Tile;
use crate::cpu::unpack::signed_codes;
use half::f16;
use rayon::prelude::*;
use std::ops::Range;
use tailorq_tensor::{ElementCorrections, PackedMatrix, TILE, TileBits, TileCorrections};

/// Rows whose base and corrections are computed in turn. A power of two below 256, the rows that places tell apart.
pub(super) const BLOCK: usize = 16;

/// Entries of a run whose scales or values are held at once.
const BATCH: usize = 256;

/// Adds to `y[t, i]` the corrections of row `first + i` times token `t` of `x` (`[tokens, cols]`, as they are), and the bias,
/// for at most [`BLOCK`] rows.
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

per_isa! {
    fn add_tiles(tiles: &TileCorrections, x: &[f32], first: usize, y: &mut [f32]) = add_tiles_body
}

#[inline(always)]
fn add_tiles_body<S: Simd>(simd: S, tiles: &TileCorrections, x: &[f32], first: usize, y: &mut [f32]) {
    match tiles.bits() {
        TileBits::Four => add_tiles_of::<S, 4>(simd, tiles, x, first, y),
        TileBits::Eight => add_tiles_of::<S, 8>(simd, tiles, x, first, y),
    }
}

#[inline(always)]
fn add_tiles_of<S: Simd, const BITS: usize>(simd: S, tiles: &TileCorrections, x: &[f32], first: usize, y: &mut [f32]) {
    let mut sums = [Lanes([0.0; LANES]); BLOCK];
    let map = tiles.map();
    let (mut from, end) = (map.rank_of_row(first), map.rank_of_row(first + y.len()));
    let mut scales = [0.0; BATCH];
    while from < end {
        let run = from..end.min(from + BATCH);
        widen(simd, tiles.scales(), run.clone(), &mut scales);
        let codes = tiles.parts().codes[run.start * 2 * BITS..run.end * 2 * BITS].chunks_exact(2 * BITS);
        from = run.end;
        for ((place, codes), &scale) in map.places()[run].iter().zip(codes).zip(&scales) {
            let sum = &mut sums[place.row_after(first) % BLOCK].0;
            let x = &x[place.tile() * TILE..];
            let x = match x.first_chunk() {
                Some(whole) => simd.load(whole),
                None => simd.load_partial(x, 0.0),
            };
            let values = simd.mul(signed_codes::<S, BITS>(simd, codes), simd.splat(scale));
            simd.store(simd.mul_add(values, x, simd.load(sum)), sum);
        }
    }
    for (y, sum) in y.iter_mut().zip(&sums) {
        *y += simd.sum(simd.load(&sum.0));
    }
}

per_isa! {
    fn add_elements(elements: &ElementCorrections, x: &[f32], first: usize, y: &mut [f32]) = add_elements_body
}

#[inline(always)]
fn add_elements_body<S: Simd>(simd: S, elements: &ElementCorrections, x: &[f32], first: usize, y: &mut [f32]) {
    let (mut from, end) = (elements.starts()[first], elements.starts()[first + y.len()]);
    let mut sums = [0.0; BLOCK];
    let mut values = [0.0; BATCH];
    let cols = &elements.parts().cols;
    while from < end {
        let run = from..end.min(from + BATCH);
        from = run.end;
        widen(
            simd,
            elements.parts().values.cast().expect("checked when the corrections were made"),
            run.clone(),
            &mut values,
        );
        let entries = elements.rows_of()[run.clone()].iter().zip(&values);
        if ElementCorrections::index_bytes(elements.cols()) == 2 {
            let cols: &[u16] = cols.cast().expect("checked when the corrections were made");
            for ((&row, value), &col) in entries.zip(&cols[run]) {
                sums[usize::from(row.wrapping_sub(first as u8)) % BLOCK] += value * x[usize::from(col)];
            }
        } else {
            let cols: &[u32] = cols.cast().expect("checked when the corrections were made");
            for ((&row, value), &col) in entries.zip(&cols[run]) {
                sums[usize::from(row.wrapping_sub(first as u8)) % BLOCK] += value * x[col as usize];
            }
        }
    }
    for (y, sum) in y.iter_mut().zip(&sums) {
        *y += sum;
    }
}

/// `all[run]` as f32 at the beginning of `wide`, whose other elements are of no meaning.
#[inline(always)]
fn widen<S: Simd>(simd: S, all: &[f16], run: Range<usize>, wide: &mut [f32; BATCH]) {
    for (from, wide) in run.step_by(LANES).zip(wide.as_chunks_mut::<LANES>().0) {
        let rest = &all[from..];
        let mut last = [f16::ZERO; LANES];
        let sixteen = match rest.first_chunk() {
            Some(sixteen) => sixteen,
            None => {
                last[..rest.len()].copy_from_slice(rest);
                &last
            }
        };
        simd.store(simd.load_f16(sixteen), wide);
    }
}
