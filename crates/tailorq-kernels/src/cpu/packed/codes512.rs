//! Words of codes to planes of bytes with AVX-512.
//!
//! With GFNI the shift and the mask of a plane are one instruction: a product of each byte with a matrix of bits.

use super::levels::Levels;
use std::arch::x86_64::*;

/// How the bytes of sixteen words become planes of codes, one a byte.
pub(super) trait Codes: Copy {
    /// Planes of a step.
    const PLANES: usize;
    /// Whether there is a plane of high bits.
    const HIGHS: bool = false;
    /// Whether codes have a second byte.
    const WIDE: bool = false;
    /// Whether they are places in a codebook, whose sums are multiplied with a factor.
    const BOOK: bool = false;
    /// The planes; those past [`Codes::PLANES`] are of no meaning. `highs` are the sixteen u16 of the high plane, if there is one.
    unsafe fn planes(self, words: __m512i, highs: __m512i) -> [__m512i; 4];
    /// The same of eight words.
    unsafe fn half_planes(self, words: __m256i, highs: __m256i) -> [__m256i; 4];
    /// The second bytes, if there are any.
    #[inline(always)]
    unsafe fn wide_planes(self, words: __m512i, _highs: __m512i) -> [__m512i; 4] {
        [words; 4]
    }
    /// The same of eight words.
    #[inline(always)]
    unsafe fn wide_half_planes(self, words: __m256i, _highs: __m256i) -> [__m256i; 4] {
        [words; 4]
    }
}

/// 2 bits; `GFNI` where the processor has it. So below.
#[derive(Clone, Copy)]
pub(super) struct Two<const GFNI: bool>;
/// 3 bits.
#[derive(Clone, Copy)]
pub(super) struct Three<const GFNI: bool>;
/// 4 bits.
#[derive(Clone, Copy)]
pub(super) struct Four<const GFNI: bool>;
/// 6 bits.
#[derive(Clone, Copy)]
pub(super) struct Six<const GFNI: bool>;
/// 8 bits.
#[derive(Clone, Copy)]
pub(super) struct Eight;

/// The matrix that takes `n` bits of a byte from bit `first` on down to its low end. Bit `i` of the result is the parity of the
/// byte and the matrix's row `i`, which is byte `7 - i` of the number.
const fn bits(first: u32, n: u32) -> i64 {
    let (mut matrix, mut i) = (0u64, 0);
    while i < n {
        matrix |= 1 << (first + i) << (8 * (7 - i));
        i += 1;
    }
    matrix as i64
}

impl<const GFNI: bool> Codes for Two<GFNI> {
    const PLANES: usize = 4;
    #[inline(always)]
    unsafe fn planes(self, words: __m512i, _: __m512i) -> [__m512i; 4] {
        // SAFETY: inlined into a function with the features; so below.
        unsafe {
            let mask = _mm512_set1_epi8(3);
            let low = _mm512_and_si512(words, mask);
            if GFNI {
                return [
                    low,
                    _mm512_gf2p8affine_epi64_epi8::<0>(words, _mm512_set1_epi64(bits(2, 2))),
                    _mm512_gf2p8affine_epi64_epi8::<0>(words, _mm512_set1_epi64(bits(4, 2))),
                    _mm512_gf2p8affine_epi64_epi8::<0>(words, _mm512_set1_epi64(bits(6, 2))),
                ];
            }
            [
                low,
                _mm512_and_si512(_mm512_srli_epi16::<2>(words), mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(words), mask),
                _mm512_and_si512(_mm512_srli_epi16::<6>(words), mask),
            ]
        }
    }
    #[inline(always)]
    unsafe fn half_planes(self, words: __m256i, _: __m256i) -> [__m256i; 4] {
        // SAFETY: see `planes`.
        unsafe {
            let mask = _mm256_set1_epi8(3);
            let low = _mm256_and_si256(words, mask);
            if GFNI {
                return [
                    low,
                    _mm256_gf2p8affine_epi64_epi8::<0>(words, _mm256_set1_epi64x(bits(2, 2))),
                    _mm256_gf2p8affine_epi64_epi8::<0>(words, _mm256_set1_epi64x(bits(4, 2))),
                    _mm256_gf2p8affine_epi64_epi8::<0>(words, _mm256_set1_epi64x(bits(6, 2))),
                ];
            }
            [
                low,
                _mm256_and_si256(_mm256_srli_epi16::<2>(words), mask),
                _mm256_and_si256(_mm256_srli_epi16::<4>(words), mask),
                _mm256_and_si256(_mm256_srli_epi16::<6>(words), mask),
            ]
        }
    }
}

impl<const GFNI: bool> Codes for Three<GFNI> {
    const PLANES: usize = 4;
    const HIGHS: bool = true;
    #[inline(always)]
    unsafe fn planes(self, words: __m512i, highs: __m512i) -> [__m512i; 4] {
        // SAFETY: see `Two`.
        unsafe {
            // Byte `b` of a lane gets the high bits of its four codes, that of plane `p` at bit `p + 2`.
            let at = _mm512_set1_epi64(i64::from_le_bytes([62, 2, 6, 10, 30, 34, 38, 42]));
            let h = _mm512_multishift_epi64_epi8(at, highs);
            let high = _mm512_set1_epi8(4);
            let [a, b, c, d] = Two::<GFNI>.planes(words, highs);
            // a | (b & c)
            [
                _mm512_ternarylogic_epi32::<0xF8>(a, h, high),
                _mm512_ternarylogic_epi32::<0xF8>(b, _mm512_srli_epi16::<1>(h), high),
                _mm512_ternarylogic_epi32::<0xF8>(c, _mm512_srli_epi16::<2>(h), high),
                _mm512_ternarylogic_epi32::<0xF8>(d, _mm512_srli_epi16::<3>(h), high),
            ]
        }
    }
    #[inline(always)]
    unsafe fn half_planes(self, words: __m256i, highs: __m256i) -> [__m256i; 4] {
        // SAFETY: see `Two`.
        unsafe {
            // Byte `b` of a lane gets the high bits of its four codes, that of plane `p` at bit `p + 2`.
            let at = _mm256_set1_epi64x(i64::from_le_bytes([62, 2, 6, 10, 30, 34, 38, 42]));
            let h = _mm256_multishift_epi64_epi8(at, highs);
            let high = _mm256_set1_epi8(4);
            let [a, b, c, d] = Two::<GFNI>.half_planes(words, highs);
            // a | (b & c)
            [
                _mm256_ternarylogic_epi32::<0xF8>(a, h, high),
                _mm256_ternarylogic_epi32::<0xF8>(b, _mm256_srli_epi16::<1>(h), high),
                _mm256_ternarylogic_epi32::<0xF8>(c, _mm256_srli_epi16::<2>(h), high),
                _mm256_ternarylogic_epi32::<0xF8>(d, _mm256_srli_epi16::<3>(h), high),
            ]
        }
    }
}

impl<const GFNI: bool> Codes for Four<GFNI> {
    const PLANES: usize = 2;
    #[inline(always)]
    unsafe fn planes(self, words: __m512i, _: __m512i) -> [__m512i; 4] {
        // SAFETY: see `Two`.
        unsafe {
            let mask = _mm512_set1_epi8(15);
            let low = _mm512_and_si512(words, mask);
            let high = match GFNI {
                true => _mm512_gf2p8affine_epi64_epi8::<0>(words, _mm512_set1_epi64(bits(4, 4))),
                false => _mm512_and_si512(_mm512_srli_epi16::<4>(words), mask),
            };
            [low, high, low, high]
        }
    }
    #[inline(always)]
    unsafe fn half_planes(self, words: __m256i, _: __m256i) -> [__m256i; 4] {
        // SAFETY: see `Two`.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            let low = _mm256_and_si256(words, mask);
            let high = match GFNI {
                true => _mm256_gf2p8affine_epi64_epi8::<0>(words, _mm256_set1_epi64x(bits(4, 4))),
                false => _mm256_and_si256(_mm256_srli_epi16::<4>(words), mask),
            };
            [low, high, low, high]
        }
    }
}

impl<const GFNI: bool> Codes for Six<GFNI> {
    const PLANES: usize = 2;
    const HIGHS: bool = true;
    #[inline(always)]
    unsafe fn planes(self, words: __m512i, highs: __m512i) -> [__m512i; 4] {
        // SAFETY: see `Two`.
        unsafe {
            // Byte `b` of a lane gets the high bits of its two codes at bits 4 and 6.
            let at = _mm512_set1_epi64(i64::from_le_bytes([60, 0, 4, 8, 28, 32, 36, 40]));
            let h = _mm512_multishift_epi64_epi8(at, highs);
            let high = _mm512_set1_epi8(0x30);
            let [a, b, ..] = Four::<GFNI>.planes(words, highs);
            // a | (b & c)
            let a = _mm512_ternarylogic_epi32::<0xF8>(a, h, high);
            let b = _mm512_ternarylogic_epi32::<0xF8>(b, _mm512_srli_epi16::<2>(h), high);
            [a, b, a, b]
        }
    }
    #[inline(always)]
    unsafe fn half_planes(self, words: __m256i, highs: __m256i) -> [__m256i; 4] {
        // SAFETY: see `Two`.
        unsafe {
            // Byte `b` of a lane gets the high bits of its two codes at bits 4 and 6.
            let at = _mm256_set1_epi64x(i64::from_le_bytes([60, 0, 4, 8, 28, 32, 36, 40]));
            let h = _mm256_multishift_epi64_epi8(at, highs);
            let high = _mm256_set1_epi8(0x30);
            let [a, b, ..] = Four::<GFNI>.half_planes(words, highs);
            // a | (b & c)
            let a = _mm256_ternarylogic_epi32::<0xF8>(a, h, high);
            let b = _mm256_ternarylogic_epi32::<0xF8>(b, _mm256_srli_epi16::<2>(h), high);
            [a, b, a, b]
        }
    }
}

impl Codes for Eight {
    const PLANES: usize = 1;
    #[inline(always)]
    unsafe fn planes(self, words: __m512i, _: __m512i) -> [__m512i; 4] {
        [words; 4]
    }
    #[inline(always)]
    unsafe fn half_planes(self, words: __m256i, _: __m256i) -> [__m256i; 4] {
        [words; 4]
    }
}

/// Codes that are places in a codebook, whose integers have a second byte if `WIDE`.
#[derive(Clone, Copy)]
pub(super) struct Book<C, const WIDE: bool> {
    codes: C,
    /// Bytes of the integers, four times.
    low: __m512i,
    high: __m512i,
}

impl<C, const WIDE: bool> Book<C, WIDE> {
    #[inline(always)]
    pub(super) unsafe fn new(codes: C, levels: &Levels) -> Self {
        // SAFETY: see `Two`.
        unsafe {
            let low = _mm512_broadcast_i32x4(_mm_loadu_si128(levels.low.as_ptr().cast()));
            let high = _mm512_broadcast_i32x4(_mm_loadu_si128(levels.high.as_ptr().cast()));
            Book { codes, low, high }
        }
    }
}

impl<C: Codes, const WIDE: bool> Codes for Book<C, WIDE> {
    const PLANES: usize = C::PLANES;
    const HIGHS: bool = C::HIGHS;
    const WIDE: bool = WIDE;
    const BOOK: bool = true;
    #[inline(always)]
    unsafe fn planes(self, words: __m512i, highs: __m512i) -> [__m512i; 4] {
        // SAFETY: see `Two`.
        unsafe { look_up(self.low, self.codes.planes(words, highs)) }
    }
    #[inline(always)]
    unsafe fn half_planes(self, words: __m256i, highs: __m256i) -> [__m256i; 4] {
        // SAFETY: see `Two`.
        unsafe { look_up_half(self.low, self.codes.half_planes(words, highs)) }
    }
    #[inline(always)]
    unsafe fn wide_planes(self, words: __m512i, highs: __m512i) -> [__m512i; 4] {
        // SAFETY: see `Two`.
        unsafe { look_up(self.high, self.codes.planes(words, highs)) }
    }
    #[inline(always)]
    unsafe fn wide_half_planes(self, words: __m256i, highs: __m256i) -> [__m256i; 4] {
        // SAFETY: see `Two`.
        unsafe { look_up_half(self.high, self.codes.half_planes(words, highs)) }
    }
}

/// For each code, which is below 16, that byte of a table of sixteen.
#[inline(always)]
unsafe fn look_up(table: __m512i, planes: [__m512i; 4]) -> [__m512i; 4] {
    let [a, b, c, d] = planes;
    // SAFETY: see `Two`.
    unsafe {
        [
            _mm512_shuffle_epi8(table, a),
            _mm512_shuffle_epi8(table, b),
            _mm512_shuffle_epi8(table, c),
            _mm512_shuffle_epi8(table, d),
        ]
    }
}

#[inline(always)]
unsafe fn look_up_half(table: __m512i, planes: [__m256i; 4]) -> [__m256i; 4] {
    let [a, b, c, d] = planes;
    // SAFETY: see `Two`.
    unsafe {
        let table = _mm512_castsi512_si256(table);
        [
            _mm256_shuffle_epi8(table, a),
            _mm256_shuffle_epi8(table, b),
            _mm256_shuffle_epi8(table, c),
            _mm256_shuffle_epi8(table, d),
        ]
    }
}

/// Calls `$f(codes, args...)` with the codes of a base, in a function with the features.
macro_rules! with_codes {
    ($gfni:expr, $base:expr, |$codes:ident| $call:expr) => {{
        use crate::cpu::packed::codes512::{Book, Eight, Four, Six, Three, Two};
        match ($base.layout.bits, &$base.levels) {
            (Bits::Two, None) => with_codes!(@ $codes, Two::<$gfni>, $call),
            (Bits::Three, None) => with_codes!(@ $codes, Three::<$gfni>, $call),
            (Bits::Four, None) => with_codes!(@ $codes, Four::<$gfni>, $call),
            (Bits::Six, _) => with_codes!(@ $codes, Six::<$gfni>, $call),
            (Bits::Eight, _) => with_codes!(@ $codes, Eight, $call),
            (Bits::Two, Some(l)) if l.is_wide => with_codes!(@ $codes, Book::<_, true>::new(Two::<$gfni>, l), $call),
            (Bits::Two, Some(l)) => with_codes!(@ $codes, Book::<_, false>::new(Two::<$gfni>, l), $call),
            (Bits::Three, Some(l)) if l.is_wide => with_codes!(@ $codes, Book::<_, true>::new(Three::<$gfni>, l), $call),
            (Bits::Three, Some(l)) => with_codes!(@ $codes, Book::<_, false>::new(Three::<$gfni>, l), $call),
            (Bits::Four, Some(l)) if l.is_wide => with_codes!(@ $codes, Book::<_, true>::new(Four::<$gfni>, l), $call),
            (Bits::Four, Some(l)) => with_codes!(@ $codes, Book::<_, false>::new(Four::<$gfni>, l), $call),
        }
    }};
    (@ $codes:ident, $value:expr, $call:expr) => {{
        let $codes = $value;
        $call
    }};
}
pub(super) use with_codes;

#[cfg(test)]
mod tests {
    use super::*;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,gfni")]
    unsafe fn both(words: [u32; 16]) -> [[[u8; 256]; 2]; 2] {
        // SAFETY: the function has the features; arrays of planes are read as bytes.
        unsafe {
            let words = _mm512_loadu_si512(words.as_ptr().cast());
            let bytes = |planes: [__m512i; 4]| std::mem::transmute::<[__m512i; 4], [u8; 256]>(planes);
            let two = [bytes(Two::<false>.planes(words, words)), bytes(Two::<true>.planes(words, words))];
            let four = [bytes(Four::<false>.planes(words, words)), bytes(Four::<true>.planes(words, words))];
            [two, four]
        }
    }

    #[test]
    fn products_with_bits_are_shifts_and_masks() {
        if !(super::super::avx512::available() && super::super::avx512::has_gfni()) {
            return;
        }
        let words = std::array::from_fn(|i| (i as u32).wrapping_mul(0x9E37_79B9) ^ 0x1234_5678);
        // SAFETY: the processor has the features.
        for [shifts, products] in unsafe { both(words) } {
            assert_eq!(shifts, products);
        }
    }
}
