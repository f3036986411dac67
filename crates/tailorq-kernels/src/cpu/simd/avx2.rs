//! Lanes in two AVX registers.
#![allow(clippy::undocumented_unsafe_blocks, reason = "one reason for all of them stands at the token")]

use super::{LANES, Simd};
use half::f16;
use std::arch::x86_64::*;

/// The right to use avx2, fma and f16c.
///
/// Every `unsafe` block below calls an intrinsic that needs no more than these features, which the processor has
/// because the token exists. Loads and stores go through references to arrays of the right size.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The processor has avx2, fma and f16c.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Avx2(())
    }
}

/// Sum of eight lanes: 4 apart, then 2, then 1.
///
/// # Safety
/// The processor has avx2.
#[inline(always)]
pub(crate) unsafe fn sum8(a: __m256) -> f32 {
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

/// `2^a` of eight integers.
///
/// # Safety
/// The processor has avx2.
#[inline(always)]
unsafe fn exp2_integer8(a: __m256) -> __m256 {
    unsafe {
        let biased = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
    }
}

/// The integers in `word >> shifts`, masked, as f32.
///
/// # Safety
/// The processor has avx2.
#[inline(always)]
unsafe fn fields(word: u32, shifts: __m256i, mask: i32) -> __m256i {
    unsafe { _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word as i32), shifts), _mm256_set1_epi32(mask)) }
}

impl Simd for Avx2 {
    type F = [__m256; 2];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        unsafe { [_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))] }
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> Self::F {
        unsafe {
            let at: *const __m128i = from.as_ptr().cast();
            [_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at.add(1)))]
        }
    }
    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Self::F {
        unsafe {
            let all = _mm_loadu_si128(from.as_ptr().cast());
            let upper = _mm_unpackhi_epi64(all, all);
            [_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(upper))]
        }
    }
    #[inline(always)]
    fn store(self, value: Self::F, to: &mut [f32; LANES]) {
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), value[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), value[1]);
        }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn exp2_integer(self, a: Self::F) -> Self::F {
        unsafe { [exp2_integer8(a[0]), exp2_integer8(a[1])] }
    }
    #[inline(always)]
    fn codes2(self, word: u32) -> Self::F {
        unsafe {
            let shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
            [_mm256_cvtepi32_ps(fields(word, shifts, 3)), _mm256_cvtepi32_ps(fields(word >> 16, shifts, 3))]
        }
    }
    #[inline(always)]
    fn codes3(self, word: u32, high: u16) -> Self::F {
        unsafe {
            let shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
            // The high bits lie two to the left, so that shifting by i leaves each at weight 4.
            let places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let high = u32::from(high) << 2;
            let first = _mm256_or_si256(fields(word, shifts, 3), fields(high, places, 4));
            let second = _mm256_or_si256(fields(word >> 16, shifts, 3), fields(high >> 8, places, 4));
            [_mm256_cvtepi32_ps(first), _mm256_cvtepi32_ps(second)]
        }
    }
    #[inline(always)]
    fn codes4(self, words: [u32; 2]) -> Self::F {
        unsafe {
            let shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
            [_mm256_cvtepi32_ps(fields(words[0], shifts, 15)), _mm256_cvtepi32_ps(fields(words[1], shifts, 15))]
        }
    }
    #[inline(always)]
    fn codes8(self, words: [u32; 4]) -> Self::F {
        unsafe {
            let first = _mm_setr_epi32(words[0] as i32, words[1] as i32, 0, 0);
            let second = _mm_setr_epi32(words[2] as i32, words[3] as i32, 0, 0);
            [_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(first)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(second))]
        }
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        unsafe { sum8(_mm256_add_ps(a[0], a[1])) }
    }
}
