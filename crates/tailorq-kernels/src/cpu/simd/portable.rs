//! Lanes for processors without AVX2: plain arrays, which the compiler vectorizes with what there is.

use super::{LANES, Simd};
use half::f16;

/// Needs no right: every processor can do this.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// Applies `f` to the lanes of `a` and `b`.
#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type F = [f32; LANES];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; LANES]
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        *from
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> Self::F {
        from.map(f16::to_f32)
    }
    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Self::F {
        from.map(f32::from)
    }
    #[inline(always)]
    fn store(self, value: Self::F, to: &mut [f32; LANES]) {
        *to = value;
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // Two roundings: `f32::mul_add` is a slow library call where there is no instruction for it.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn exp2_integer(self, a: Self::F) -> Self::F {
        a.map(|a| f32::from_bits(((a as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn codes2(self, word: u32) -> Self::F {
        std::array::from_fn(|i| (word >> (2 * i) & 3) as f32)
    }
    #[inline(always)]
    fn codes3(self, word: u32, high: u16) -> Self::F {
        std::array::from_fn(|i| ((word >> (2 * i) & 3) | (u32::from(high) >> i & 1) << 2) as f32)
    }
    #[inline(always)]
    fn codes4(self, words: [u32; 2]) -> Self::F {
        std::array::from_fn(|i| (words[i / 8] >> (4 * (i % 8)) & 15) as f32)
    }
    #[inline(always)]
    fn codes8(self, words: [u32; 4]) -> Self::F {
        std::array::from_fn(|i| (words[i / 4] >> (8 * (i % 4)) & 255) as f32)
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        let eight: [f32; 8] = std::array::from_fn(|i| a[i] + a[i + 8]);
        let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
        (four[0] + four[2]) + (four[1] + four[3])
    }
}
