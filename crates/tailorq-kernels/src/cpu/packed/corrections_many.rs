//! What corrections add to a panel of rows for many tokens, with AVX-512.
//!
//! Tokens are the lanes here: a corrected weight is multiplied with its input in 128 tokens, whose sums stay in eight registers over all
//! corrections of a row. The activations lie by input for that. What comes out has tokens in its lanes where the panel has rows, so
//! blocks of sixteen by sixteen are turned over on their way into a buffer, from which the panel takes them when it writes its products:
//! nothing is added to memory twice, which is what took half of the time before.

use super::activations::{LANES, Lanes};
use super::corrections::{Columns, Corrections, Tiles};
use super::corrections512::tile_codes;
use super::panel::{OfRows, REGISTERS, ROWS};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::ops::Range;
use tailorq_tensor::{TILE, TileBits};

/// Vectors of tokens whose sums are kept in registers.
const MOST: usize = 8;

/// Some tokens by input: `[cols, n / 16]`, sixteen tokens a vector; those past the last are of no meaning.
pub(super) struct Transposed<'a> {
    cols: usize,
    vectors: usize,
    x: &'a [Lanes],
}

impl<'a> Transposed<'a> {
    /// Transposes `x`, `[n, cols]`, into `buffer`.
    pub(super) fn of(x: &[f32], cols: usize, buffer: &'a mut Vec<Lanes>) -> Self {
        let vectors = (x.len() / cols).div_ceil(LANES);
        buffer.resize(cols * vectors, Lanes([0.0; LANES]));
        // Blocks of inputs, so that what is written stays in the cache until its line is full.
        buffer.par_chunks_mut(TILE * vectors).enumerate().for_each(|(block, to)| {
            for (t, x) in x.chunks_exact(cols).enumerate() {
                for (to, v) in to.chunks_exact_mut(vectors).zip(&x[block * TILE..]) {
                    to[t / LANES].0[t % LANES] = *v;
                }
            }
        });
        Transposed { cols, vectors, x: buffer }
    }

    /// Tokens of whole vectors.
    pub(super) fn n_padded(&self) -> usize {
        self.vectors * LANES
    }
}

/// Corrections of a matrix, and the tokens that they are multiplied with.
pub(super) type Corrected<'a> = Option<(&'a Corrections<'a>, &'a Transposed<'a>)>;

/// `added[t, i] = corrections[first + i] x[t]` for the rows of a panel, `[n_padded, REGISTERS]`; 0 in rows past `rows`.
///
/// # Safety
/// The processor has AVX-512 F, BW and VL; the matrix has the rows, which are at most those of a panel; `added` has as many elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn fill(corrections: &Corrections<'_>, x: &Transposed<'_>, rows: Range<usize>, added: &mut [OfRows]) {
    let mut from = 0;
    while from < x.vectors {
        // SAFETY: the vectors exist; the rest is as the caller says.
        unsafe {
            match x.vectors - from {
                MOST.. => block::<MOST>(corrections, x, from, rows.clone(), added),
                4.. => block::<4>(corrections, x, from, rows.clone(), added),
                2.. => block::<2>(corrections, x, from, rows.clone(), added),
                _ => block::<1>(corrections, x, from, rows.clone(), added),
            }
        }
        from += match x.vectors - from {
            MOST.. => MOST,
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
    }
}

/// `N` vectors of tokens from number `from` on.
#[inline(always)]
unsafe fn block<const N: usize>(
    corrections: &Corrections<'_>,
    x: &Transposed<'_>,
    from: usize,
    rows: Range<usize>,
    added: &mut [OfRows],
) {
    // SAFETY: inlined into a function with the features; rows and vectors exist.
    unsafe {
        for register in 0..REGISTERS {
            let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
            for (row, sums) in rows.clone().skip(register * ROWS).zip(&mut sums) {
                *sums = of_row::<N>(corrections, x, from, row);
            }
            for i in 0..N {
                let mut vectors = [_mm512_setzero_ps(); ROWS];
                for (vector, sums) in vectors.iter_mut().zip(&sums) {
                    *vector = sums[i];
                }
                let first = (from + i) * LANES;
                for (t, of_token) in transposed(vectors).into_iter().enumerate() {
                    _mm512_store_ps(added[(first + t) * REGISTERS + register].0.as_mut_ptr(), of_token);
                }
            }
        }
    }
}

/// The corrections of a row times `N` vectors of tokens.
#[inline(always)]
unsafe fn of_row<const N: usize>(
    corrections: &Corrections<'_>,
    x: &Transposed<'_>,
    from: usize,
    row: usize,
) -> [__m512; N] {
    // SAFETY: inlined into a function with the features; columns are those of the matrix, and so of `x`.
    unsafe {
        let x_from = x.x.as_ptr().add(from);
        let mut sums = [_mm512_setzero_ps(); N];
        if let Some(tiles) = &corrections.tiles {
            for at in tiles.map.rank_of_row(row)..tiles.map.rank_of_row(row + 1) {
                let values = tile_values(tiles, at);
                let first = tiles.places[at].tile() * TILE;
                for (k, value) in values.0.iter().enumerate().take(x.cols - first) {
                    add_times(&mut sums, *value, x_from.add((first + k) * x.vectors));
                }
            }
        }
        if let Some(elements) = &corrections.elements {
            for at in elements.starts[row]..elements.starts[row + 1] {
                let col = match elements.cols {
                    Columns::U16(cols) => usize::from(cols[at]),
                    Columns::U32(cols) => cols[at] as usize,
                };
                add_times(&mut sums, elements.values[at].to_f32(), x_from.add(col * x.vectors));
            }
        }
        sums
    }
}

/// The sixteen corrections of a tile.
#[inline(always)]
unsafe fn tile_values(tiles: &Tiles<'_>, at: usize) -> Lanes {
    let mut values = Lanes([0.0; LANES]);
    // SAFETY: inlined into a function with the features; the tile has its codes.
    unsafe {
        let codes = match tiles.bits {
            TileBits::Four => tile_codes::<4>(tiles.codes.as_ptr().add(at * 8)),
            TileBits::Eight => tile_codes::<8>(tiles.codes.as_ptr().add(at * 16)),
        };
        let scale = _mm512_set1_ps(tiles.scales[at].to_f32());
        _mm512_store_ps(values.0.as_mut_ptr(), _mm512_mul_ps(codes, scale));
    }
    values
}

/// `sums += value * x` for vectors that follow each other.
#[inline(always)]
unsafe fn add_times<const N: usize>(sums: &mut [__m512; N], value: f32, x: *const Lanes) {
    // SAFETY: inlined into a function with the features; the caller has the vectors.
    unsafe {
        let value = _mm512_set1_ps(value);
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = _mm512_fmadd_ps(value, _mm512_load_ps(x.add(i).cast()), *sum);
        }
    }
}

/// Columns as rows.
#[inline(always)]
unsafe fn transposed(rows: [__m512; 16]) -> [__m512; 16] {
    // SAFETY: inlined into a function with the features. Loops over constants, no closures: see `add_lanes` in `avx512.rs`.
    unsafe {
        let zero = _mm512_setzero_ps();
        let (mut pairs, mut fours, mut out) = ([zero; 16], [_mm512_setzero_pd(); 16], [zero; 16]);
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        // Lane `l` of vector `4 q + c` has column `4 l + c` of rows `4 q` to `4 q + 3`.
        for q in 0..4 {
            for half in 0..2 {
                let [a, b] = [pairs[4 * q + half], pairs[4 * q + half + 2]];
                fours[4 * q + 2 * half] = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
                fours[4 * q + 2 * half + 1] = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
            }
        }
        for c in 0..4 {
            let [a, b, d, e] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
            let (even, odd) = (_mm512_shuffle_f64x2::<0x88>(a, b), _mm512_shuffle_f64x2::<0xdd>(a, b));
            let (even_2, odd_2) = (_mm512_shuffle_f64x2::<0x88>(d, e), _mm512_shuffle_f64x2::<0xdd>(d, e));
            out[c] = _mm512_castpd_ps(_mm512_shuffle_f64x2::<0x88>(even, even_2));
            out[8 + c] = _mm512_castpd_ps(_mm512_shuffle_f64x2::<0xdd>(even, even_2));
            out[4 + c] = _mm512_castpd_ps(_mm512_shuffle_f64x2::<0x88>(odd, odd_2));
            out[12 + c] = _mm512_castpd_ps(_mm512_shuffle_f64x2::<0xdd>(odd, odd_2));
        }
        out
    }
}
