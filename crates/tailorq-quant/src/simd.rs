//! Which vector instructions the hot loops of this crate are compiled for.
//!
//! Each hot loop is one generic function, inlined into a wrapper per instruction set, so that the compiler vectorizes the
//! same arithmetic at each width. AVX2 and AVX-512 give the same bits: both fuse multiply and add, and sums run over
//! [`LANES`] fixed partial sums. The portable version rounds twice where those fuse.

/// Partial sums of a reduction, whatever the width of a vector.
pub(crate) const LANES: usize = 16;

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Simd {
    /// AVX-512 F.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 with FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What the target has at least.
    Portable,
}

impl Simd {
    /// The best that this processor has.
    pub(crate) fn detect() -> Simd {
        #[cfg(target_arch = "x86_64")]
        {
            let fused = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if fused && is_x86_feature_detected!("avx512f") {
                return Simd::Avx512;
            }
            if fused {
                return Simd::Avx2;
            }
        }
        Simd::Portable
    }
}

/// `a * b + c`, fused or not: without the instruction, `mul_add` is a slow library call.
#[inline(always)]
pub(crate) fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Clamps and rounds half to even; `low` and `high` are integers, so clamping first gives the same. NaN becomes `low`.
#[inline(always)]
pub(crate) fn round_within(t: f32, low: f32, high: f32) -> f32 {
    // Comparisons in this form compile to single max and min instructions.
    let t = if t > low { t } else { low };
    let t = if t < high { t } else { high };
    // Adding 1.5 * 2^23 leaves no bits below one: the hardware's own rounding does the work.
    const MAGIC: f32 = 12_582_912.0;
    (t + MAGIC) - MAGIC
}
