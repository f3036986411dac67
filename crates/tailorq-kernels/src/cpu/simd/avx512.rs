//! Lanes in one AVX-512 register.
#![allow(clippy::undocumented_unsafe_blocks, reason = "one reason for all of them stands at the token")]

use super::{LANES, Simd, avx2};
use half::f16;
use std::arch::x86_64::*;

/// The right to use avx512f, avx2, fma and f16c.
///
/// Every `unsafe` block below calls an intrinsic that needs no more than these features, which the processor has
/// because the token exists. Loads and stores go through references to arrays of the right size.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The processor has avx512f, avx2, fma and f16c.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Avx512(())
    }
}

impl Simd for Avx512 {
    type F = __m512;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> Self::F {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }
    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Self::F {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn store(self, value: Self::F, to: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn exp2_integer(self, a: Self::F) -> Self::F {
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    fn codes2(self, word: u32) -> Self::F {
        unsafe {
            let shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let shifted = _mm512_srlv_epi32(_mm512_set1_epi32(word as i32), shifts);
            _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(3)))
        }
    }
    #[inline(always)]
    fn codes3(self, word: u32, high: u16) -> Self::F {
        unsafe {
            let four = _mm512_set1_ps(4.0);
            let low = self.codes2(word);
            _mm512_mask_add_ps(low, high, low, four)
        }
    }
    #[inline(always)]
    fn codes4(self, words: [u32; 2]) -> Self::F {
        unsafe {
            let shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
            let low = _mm512_set1_epi32(words[0] as i32);
            let both = _mm512_mask_set1_epi32(low, 0xff00, words[1] as i32);
            let shifted = _mm512_srlv_epi32(both, shifts);
            _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(15)))
        }
    }
    #[inline(always)]
    fn codes8(self, words: [u32; 4]) -> Self::F {
        unsafe {
            let bytes = _mm_setr_epi32(words[0] as i32, words[1] as i32, words[2] as i32, words[3] as i32);
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
        }
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        unsafe {
            let upper = _mm512_castpd_ps(_mm512_shuffle_f64x2::<0b11_10>(_mm512_castps_pd(a), _mm512_castps_pd(a)));
            avx2::sum8(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_castps512_ps256(upper)))
        }
    }
}
