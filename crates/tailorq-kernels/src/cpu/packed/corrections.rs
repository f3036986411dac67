//! The second pass: what corrections of elements and tiles add to the products of the base.
//!
//! A row of 1536 inputs has two corrected tiles of a hundred and five kept elements: a loop over those of one row ends at
//! another turn in each, and what the processor loses by guessing wrongly is more than what the arithmetic takes. So the
//! corrections of a block of rows are one flat run each, whose entries say themselves to which row they belong. Blocks are
//! small, so that the second pass of one runs while the base of the next comes from memory.

use super::activations::Lanes;
use crate::cpu::simd::{Isa, LANES, Simd, per_isa};
use crate::cpu::tile::Tile;
use crate::cpu::unpack::signed_codes;
use half::f16;
use std::ops::Range;
use tailorq_tensor::{ElementCorrections, PackedMatrix, TILE, TileBits, TileMap, TilePlace};

/// Rows whose base and corrections are computed in turn. A power of two below 256, the rows that places tell apart.
pub(super) const BLOCK: usize = 16;

/// How far ahead of a run its parts are fetched: a few blocks of rows, in bytes.
pub(super) const AHEAD: usize = 1024;

/// The corrections of a matrix as plain slices, borrowed once a call.
pub(super) struct Corrections<'a> {
    pub(super) tiles: Option<Tiles<'a>>,
    pub(super) elements: Option<Elements<'a>>,
}

pub(super) struct Tiles<'a> {
    pub(super) map: &'a TileMap,
    pub(super) places: &'a [TilePlace],
    pub(super) bits: TileBits,
    /// `[n, tile_bytes]`.
    pub(super) codes: &'a [u8],
    pub(super) scales: &'a [f16],
}

pub(super) struct Elements<'a> {
    pub(super) starts: &'a [usize],
    pub(super) rows: &'a [u8],
    pub(super) cols: Columns<'a>,
    pub(super) values: &'a [f16],
}

pub(super) enum Columns<'a> {
    U16(&'a [u16]),
    U32(&'a [u32]),
}

impl<'a> Corrections<'a> {
    /// `None` when there are none.
    pub(super) fn of(w: &'a PackedMatrix) -> Option<Self> {
        const CHECKED: &str = "checked when the corrections were made";
        let tiles = w.tiles().map(|tiles| Tiles {
            map: tiles.map(),
            places: tiles.map().places(),
            bits: tiles.bits(),
            codes: &tiles.parts().codes,
            scales: tiles.scales(),
        });
        let elements = w.elements().map(|elements| Elements {
            starts: elements.starts(),
            rows: elements.rows_of(),
            cols: match ElementCorrections::index_bytes(elements.cols()) {
                2 => Columns::U16(elements.parts().cols.cast().expect(CHECKED)),
                _ => Columns::U32(elements.parts().cols.cast().expect(CHECKED)),
            },
            values: elements.parts().values.cast().expect(CHECKED),
        });
        (tiles.is_some() || elements.is_some()).then_some(Corrections { tiles, elements })
    }
}

/// Some tokens as they are, the last tile of each filled with zeros.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    x: &'a [f32],
    /// Elements of a token.
    width: usize,
}

impl<'a> Inputs<'a> {
    /// `x`, `[n, cols]`, or a copy of it in `buffer` where the last tile has to be filled.
    pub(super) fn of(x: &'a [f32], cols: usize, buffer: &'a mut Vec<f32>) -> Self {
        if cols.is_multiple_of(TILE) {
            return Inputs { x, width: cols };
        }
        let width = cols.next_multiple_of(TILE);
        buffer.clear();
        for x in x.chunks_exact(cols) {
            buffer.extend_from_slice(x);
            buffer.resize(buffer.len() + width - cols, 0.0);
        }
        Inputs { x: buffer, width }
    }

    pub(super) fn token(self, t: usize) -> &'a [f32] {
        &self.x[t * self.width..(t + 1) * self.width]
    }
}

/// Sums of a block of rows, lane by lane.
type BlockSums = [Lanes; BLOCK];

/// Adds to `y[t, i]` the corrections of row `first + i` times token `t`, for at most [`BLOCK`] rows.
pub(super) fn add(isa: Isa, corrections: &Corrections<'_>, x: Inputs<'_>, first: usize, y: &mut Tile<'_>) {
    for t in 0..y.rows() {
        add_token(isa, corrections, x.token(t), first, y.row_mut(t));
    }
}

per_isa! {
    fn add_token(corrections: &Corrections<'_>, x: &[f32], first: usize, y: &mut [f32]) = add_token_body
}

#[inline(always)]
fn add_token_body<S: Simd>(simd: S, corrections: &Corrections<'_>, x: &[f32], first: usize, y: &mut [f32]) {
    if let Some(tiles) = &corrections.tiles {
        let mut sums = [Lanes([0.0; LANES]); BLOCK];
        tiles.add_to(simd, x, first..first + y.len(), &mut sums);
        for (y, sum) in y.iter_mut().zip(&sums) {
            *y += simd.sum(simd.load(&sum.0));
        }
    }
    if let Some(elements) = &corrections.elements {
        elements.add_to(simd, x, first, y);
    }
}

impl Tiles<'_> {
    /// Adds the tiles of some rows times `x` to the sums of these rows.
    #[inline(always)]
    fn add_to<S: Simd>(&self, simd: S, x: &[f32], rows: Range<usize>, sums: &mut BlockSums) {
        match self.bits {
            TileBits::Four => self.add::<S, 4>(simd, x, rows, sums),
            TileBits::Eight => self.add::<S, 8>(simd, x, rows, sums),
        }
    }

    #[inline(always)]
    fn add<S: Simd, const BITS: usize>(&self, simd: S, x: &[f32], rows: Range<usize>, sums: &mut BlockSums) {
        let run = self.map.rank_of_row(rows.start)..self.map.rank_of_row(rows.end);
        let (x, _) = x.as_chunks::<TILE>();
        let codes = &self.codes[run.start * 2 * BITS..run.end * 2 * BITS];
        let scales = Halves::new(self.scales, run.start);
        let mut wide = [0.0; LANES];
        for (i, (place, codes)) in self.places[run].iter().zip(codes.chunks_exact(2 * BITS)).enumerate() {
            if i % LANES == 0 {
                simd.store(simd.load_f16(&scales.sixteen(i)), &mut wide);
            }
            let sum = &mut sums[place.row_after(rows.start) % BLOCK].0;
            let codes = match codes.first_chunk::<LANES>() {
                Some(bytes) => simd.load_i8(&bytes.map(|byte| byte as i8)),
                None => signed_codes::<S, BITS>(simd, codes),
            };
            let values = simd.mul(codes, simd.splat(wide[i % LANES]));
            simd.store(simd.mul_add(values, simd.load(&x[place.tile()]), simd.load(sum)), sum);
        }
    }
}

impl Elements<'_> {
    /// Adds the elements of some rows times `x` to their products.
    #[inline(always)]
    fn add_to<S: Simd>(&self, simd: S, x: &[f32], first: usize, y: &mut [f32]) {
        let run = self.starts[first]..self.starts[first + y.len()];
        let mut sums = [0.0; BLOCK];
        match self.cols {
            Columns::U16(cols) => self.add(simd, cols, x, first, run, &mut sums),
            Columns::U32(cols) => self.add(simd, cols, x, first, run, &mut sums),
        }
        for (y, sum) in y.iter_mut().zip(&sums) {
            *y += sum;
        }
    }

    #[inline(always)]
    fn add<S: Simd, I: Column>(
        &self,
        simd: S,
        cols: &[I],
        x: &[f32],
        first: usize,
        run: Range<usize>,
        sums: &mut [f32; BLOCK],
    ) {
        let values = Halves::new(self.values, run.start);
        let mut wide = [0.0; LANES];
        for (i, (row, col)) in self.rows[run.clone()].iter().zip(&cols[run]).enumerate() {
            if i % LANES == 0 {
                simd.store(simd.load_f16(&values.sixteen(i)), &mut wide);
            }
            sums[usize::from(row.wrapping_sub(first as u8)) % BLOCK] += wide[i % LANES] * x[col.index()];
        }
    }
}

/// A column as stored.
trait Column: Copy {
    fn index(self) -> usize;
}

impl Column for u16 {
    #[inline(always)]
    fn index(self) -> usize {
        usize::from(self)
    }
}

impl Column for u32 {
    #[inline(always)]
    fn index(self) -> usize {
        self as usize
    }
}

/// Half-precision numbers, of which sixteen are read at once.
struct Halves<'a> {
    all: &'a [f16],
    first: usize,
}

impl<'a> Halves<'a> {
    #[inline(always)]
    fn new(all: &'a [f16], first: usize) -> Self {
        Halves { all, first }
    }

    /// Number `i` after the first and what follows it; zeros past the end.
    #[inline(always)]
    fn sixteen(&self, i: usize) -> [f16; LANES] {
        let rest = &self.all[self.first + i..];
        match rest.first_chunk() {
            Some(sixteen) => *sixteen,
            None => std::array::from_fn(|i| rest.get(i).copied().unwrap_or(f16::ZERO)),
        }
    }
}
