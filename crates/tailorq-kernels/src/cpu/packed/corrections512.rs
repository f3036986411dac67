//! The corrections of a block of rows with AVX-512: the flat runs of `corrections.rs` into the lanes of the rows' sums.
//!
//! An element is added to the lane that its column has in a tile, so that neighbours do not wait for each other and the order of
//! additions depends on nothing but the row.

use super::activations::{LANES, Lanes};
use super::avx512::first_lanes;
use super::base::Indices;
use super::corrections::{AHEAD, BLOCK, Columns, Corrections, Elements, Tiles};
use std::arch::x86_64::*;
use std::ops::Range;
use tailorq_tensor::{TILE, TileBits};

/// Sums of a block of rows, lane by lane, and one row for what belongs to none.
pub(super) type BlockSums = [Lanes; BLOCK + 1];

/// Adds the corrections of `rows`, at most [`BLOCK`], times `x`.
///
/// # Safety
/// The processor is [`super::avx512::available`]; the matrix has the rows; `x` is as long as it is wide, filled to a whole tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn add(corrections: &Corrections<'_>, x: &[f32], rows: Range<usize>, sums: &mut BlockSums) {
    // SAFETY: the processor has the features of this function, and corrections were checked when they were made.
    unsafe {
        if let Some(elements) = &corrections.elements {
            add_elements(elements, x, rows.clone(), sums);
        }
        match &corrections.tiles {
            Some(tiles) if tiles.bits == TileBits::Four => add_tiles::<4>(tiles, x, rows, sums),
            Some(tiles) => add_tiles::<8>(tiles, x, rows, sums),
            None => {}
        }
    }
}

#[inline(always)]
unsafe fn add_elements(elements: &Elements<'_>, x: &[f32], rows: Range<usize>, sums: &mut BlockSums) {
    let (first, end) = (elements.starts[rows.start], elements.starts[rows.end]);
    let sums = sums.as_mut_ptr().cast::<f32>();
    let (mut lanes, mut products) = (Indices([0; LANES]), Lanes([0.0; LANES]));
    // SAFETY: inlined into a function with the features. Masks keep loads inside the run; columns lie in `x`, rows are those of the
    // block, and lanes that are off go to the row of none.
    unsafe {
        let (none, start) = (_mm512_set1_epi32((BLOCK * LANES) as i32), _mm512_set1_epi32(rows.start as i32));
        for at in (first..end).step_by(LANES) {
            let mask = first_lanes(end - at);
            let (of, values) = (elements.rows.as_ptr().add(at), elements.values.as_ptr().add(at));
            let cols = match elements.cols {
                Columns::U16(cols) => {
                    prefetch(cols.as_ptr().wrapping_add(at));
                    _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, cols.as_ptr().add(at).cast()))
                }
                Columns::U32(cols) => _mm512_maskz_loadu_epi32(mask, cols.as_ptr().add(at).cast()),
            };
            prefetch(of);
            prefetch(values);
            let x = _mm512_mask_i32gather_ps::<4>(_mm512_setzero_ps(), mask, cols, x.as_ptr());
            let values = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, values.cast()));
            // Volatile, so that single lanes come from memory: taken out of registers, each is three shuffles.
            products.0.as_mut_ptr().cast::<__m512>().write_volatile(_mm512_mul_ps(x, values));
            let row = _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, of.cast())), start);
            let row = _mm512_and_si512(row, _mm512_set1_epi32(BLOCK as i32 - 1));
            let lane = _mm512_and_si512(cols, _mm512_set1_epi32(LANES as i32 - 1));
            let lane = _mm512_or_si512(_mm512_slli_epi32::<4>(row), lane);
            lanes.0.as_mut_ptr().cast::<__m512i>().write_volatile(_mm512_mask_mov_epi32(none, mask, lane));
            for (&lane, product) in lanes.0.iter().zip(&products.0) {
                *sums.add(lane as usize) += product;
            }
        }
    }
}

#[inline(always)]
unsafe fn add_tiles<const BITS: usize>(tiles: &Tiles<'_>, x: &[f32], rows: Range<usize>, sums: &mut BlockSums) {
    let (first, end) = (tiles.map.rank_of_row(rows.start), tiles.map.rank_of_row(rows.end));
    let mut scales = [0.0f32; LANES];
    // SAFETY: inlined into a function with the features. Masks keep loads inside the run; marked tiles lie in `x` and have their codes,
    // and rows are those of the block.
    unsafe {
        for at in (first..end).step_by(LANES) {
            let n = LANES.min(end - at);
            let (places, halves) = (tiles.places.as_ptr().add(at), tiles.scales.as_ptr().add(at));
            prefetch(places);
            prefetch(halves);
            let wide = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), halves.cast()));
            _mm512_storeu_ps(scales.as_mut_ptr(), wide);
            for (i, &scale) in scales.iter().enumerate().take(n) {
                let place = *places.add(i);
                let codes = tiles.codes.as_ptr().add((at + i) * 2 * BITS);
                prefetch(codes);
                let values = _mm512_mul_ps(tile_codes::<BITS>(codes), _mm512_set1_ps(scale));
                let x = _mm512_loadu_ps(x.as_ptr().add(place.tile() * TILE));
                let sum = sums.as_mut_ptr().add(place.row_after(rows.start) % BLOCK).cast::<f32>();
                _mm512_store_ps(sum, _mm512_fmadd_ps(values, x, _mm512_load_ps(sum)));
            }
        }
    }
}

/// Fetches what lies [`AHEAD`] of an address.
#[inline(always)]
unsafe fn prefetch<T>(at: *const T) {
    // SAFETY: a prefetch does nothing to an address that is none.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(AHEAD)) }
}

/// The sixteen codes of a tile.
#[inline(always)]
pub(super) unsafe fn tile_codes<const BITS: usize>(from: *const u8) -> __m512 {
    // SAFETY: inlined into a function with the features; the caller has the bytes.
    unsafe {
        let codes = if BITS == 8 { _mm_loadu_si128(from.cast()) } else { nibbles(from) };
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))
    }
}

/// Sixteen signed half bytes from the eight bytes at `from`.
#[inline(always)]
unsafe fn nibbles(from: *const u8) -> __m128i {
    // SAFETY: inlined into a function with the features; the caller has the bytes.
    unsafe {
        let both = _mm_loadl_epi64(from.cast());
        let low = _mm_and_si128(both, _mm_set1_epi8(15));
        let high = _mm_and_si128(_mm_srli_epi16::<4>(both), _mm_set1_epi8(15));
        let eight = _mm_set1_epi8(8);
        _mm_sub_epi8(_mm_xor_si128(_mm_unpacklo_epi8(low, high), eight), eight)
    }
}
