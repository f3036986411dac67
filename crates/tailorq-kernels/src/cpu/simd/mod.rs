//! Sixteen f32 lanes, three ways.
//!
//! A kernel is written once, as an inlined generic body over a [`Simd`] token; [`per_isa!`] compiles it for AVX-512, for
//! AVX2 with FMA and for the portable lanes, and chooses at run time. A token of an instruction set exists only where
//! the processor has it, which makes its methods safe. Reductions add lanes in one fixed order (halves onto halves), so
//! AVX-512 and AVX2 give the same bits; the portable lanes differ by the roundings that a fused multiply-add saves.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::{Avx2, sum8};
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

use half::f16;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// An instruction set that this processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 with AVX-VNNI, which only linears with 8-bit activations tell from [`Level::Avx2`].
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// Those that this processor has, the best first.
    pub(crate) fn available() -> Vec<Isa> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            if avx2 && is_x86_feature_detected!("avx512f") {
                all.push(Isa(Level::Avx512));
            }
            if avx2 && is_x86_feature_detected!("avxvnni") {
                all.push(Isa(Level::AvxVnni));
            }
            if avx2 {
                all.push(Isa(Level::Avx2));
            }
        }
        all.push(Isa(Level::Portable));
        all
    }

    pub(crate) fn level(self) -> Level {
        self.0
    }

    /// For reports.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => "avx-vnni",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            Level::Portable => "portable",
        }
    }
}

/// Operations on vectors of sixteen f32, lane by lane. The token stands for the right to use the instructions.
pub(crate) trait Simd: Copy {
    /// Sixteen lanes.
    type F: Copy;

    fn splat(self, value: f32) -> Self::F;
    fn load(self, from: &[f32; LANES]) -> Self::F;
    /// Sixteen half-precision numbers.
    fn load_f16(self, from: &[f16; LANES]) -> Self::F;
    /// Sixteen small integers.
    fn load_i8(self, from: &[i8; LANES]) -> Self::F;
    fn store(self, value: Self::F, to: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a b + c`, rounded once where the processor can.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger; `b` when either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; `b` when either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `2^a` for integers `-126 <= a <= 127`.
    fn exp2_integer(self, a: Self::F) -> Self::F;
    /// Codes of a 2-bit tile.
    fn codes2(self, word: u32) -> Self::F;
    /// Codes of a 3-bit tile.
    fn codes3(self, word: u32, high: u16) -> Self::F;
    /// Codes of a 4-bit tile.
    fn codes4(self, words: [u32; 2]) -> Self::F;
    /// Codes of an 8-bit tile.
    fn codes8(self, words: [u32; 4]) -> Self::F;
    /// Sum of all lanes: lane `i` and `i + 8` first, then 4, 2 and 1 apart.
    fn sum(self, a: Self::F) -> f32;

    /// The first lanes of a short slice, `fill` in the others.
    #[inline(always)]
    fn load_partial(self, from: &[f32], fill: f32) -> Self::F {
        let mut lanes = [fill; LANES];
        lanes[..from.len()].copy_from_slice(from);
        self.load(&lanes)
    }

    /// The first lanes, as many as the short slice has.
    #[inline(always)]
    fn store_partial(self, value: Self::F, to: &mut [f32]) {
        let mut lanes = [0.0; LANES];
        self.store(value, &mut lanes);
        to.copy_from_slice(&lanes[..to.len()]);
    }

    /// The largest lane; NaN lanes may be passed over.
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(a, &mut lanes);
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// Makes `name(isa, args)` that runs the generic body `fn body<S: Simd>(simd: S, args)` compiled for `isa`.
///
/// The body is `#[inline(always)]`, so that it takes on the target features of the function it is inlined into.
macro_rules! per_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:ident) => {
        $(#[$meta])*
        $vis fn $name(isa: $crate::cpu::simd::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2,fma,f16c")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: this function has the features that the token stands for.
                $body(unsafe { $crate::cpu::simd::Avx512::new() }, $($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: this function has the features that the token stands for.
                $body(unsafe { $crate::cpu::simd::Avx2::new() }, $($arg),*)
            }
            match isa.level() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: such an `Isa` is made only where the processor has avx512f, avx2, fma and f16c.
                $crate::cpu::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: such an `Isa` is made only where the processor has avx2, fma and f16c.
                $crate::cpu::simd::Level::AvxVnni | $crate::cpu::simd::Level::Avx2 => unsafe { avx2($($arg),*) },
                $crate::cpu::simd::Level::Portable => $body($crate::cpu::simd::Portable, $($arg),*),
            }
        }
    };
}
pub(crate) use per_isa;

#[cfg(test)]
mod tests;
