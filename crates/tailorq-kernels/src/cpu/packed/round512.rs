//! Rounding activations with AVX-512: the same codes, scales and orders as the plain code of `activations.rs` and `panel.rs`.

use super::activations::{GROUP, LANES, Lanes, Order, Plane, scale_of};
use super::avx512::first_lanes;
use std::arch::x86_64::*;
use tailorq_tensor::TILE;

/// One row `x` into the order of steps and planes.
///
/// # Safety
/// The processor is [`super::avx512::available`]; the buffers have the steps of the row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
pub(super) unsafe fn steps(
    x: &[f32],
    order: Order,
    group: usize,
    codes: &mut [Plane],
    scales: &mut [Lanes],
    sums: &mut [Lanes],
) {
    sums.fill(Lanes([0.0; LANES]));
    if !x.len().is_multiple_of(order.step()) {
        // The last step has lanes of no inputs.
        let last = codes.len() - order.planes;
        codes[last..].fill(Plane([0; 64]));
        scales[scales.len() - 1] = Lanes([0.0; LANES]);
    }
    let lanes = GROUP / order.lane();
    // SAFETY: the processor has the features of this function.
    unsafe {
        let deal = deal_of(order, true);
        for (g, part) in x.chunks(GROUP).enumerate() {
            let Rounded { codes: halves, scale, sum } = round(part);
            let (step, lane) = (g * GROUP / order.step(), g * GROUP % order.step() / order.lane());
            scales[step].0[lane..lane + lanes].fill(scale);
            let at = g * GROUP / group;
            sums[at / LANES].0[at % LANES] += scale * sum;
            let planes = &mut codes[step * order.planes..(step + 1) * order.planes];
            for (half, natural) in halves.into_iter().enumerate() {
                let dealt = _mm_shuffle_epi8(natural, deal);
                // Bytes of a tile in each plane, and where they begin.
                let (n, first) = (TILE / order.planes, 4 * lane + half * TILE / order.planes);
                let mut bytes = [0i8; TILE];
                _mm_storeu_si128(bytes.as_mut_ptr().cast(), dealt);
                for (plane, bytes) in planes.iter_mut().zip(bytes.chunks_exact(n)) {
                    plane.0[first..first + n].copy_from_slice(bytes);
                }
            }
        }
    }
}

/// One row `x` into the order of units.
///
/// # Safety
/// As for [`steps`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
pub(super) unsafe fn units(
    x: &[f32],
    order: Order,
    group: usize,
    units: &mut [[i8; 4]],
    scales: &mut [f32],
    sums: &mut [f32],
) {
    sums.fill(0.0);
    // SAFETY: the processor has the features of this function; each store is to sixteen bytes of a slice.
    unsafe {
        let deal = deal_of(order, false);
        for (g, (part, units)) in x.chunks(GROUP).zip(units.chunks_exact_mut(GROUP / 4)).enumerate() {
            let Rounded { codes, scale, sum } = round(part);
            scales[g] = scale;
            sums[g * GROUP / group] += scale * sum;
            for (units, natural) in units.chunks_exact_mut(TILE / 4).zip(codes) {
                _mm_storeu_si128(units.as_mut_ptr().cast(), _mm_shuffle_epi8(natural, deal));
            }
        }
    }
}

/// Up to [`GROUP`] rounded activations.
struct Rounded {
    /// In natural order, zeros past the end.
    codes: [__m128i; 2],
    scale: f32,
    /// Of the codes.
    sum: f32,
}

#[inline(always)]
unsafe fn round(x: &[f32]) -> Rounded {
    // SAFETY: inlined into a function with the features; masks keep loads inside the slice.
    unsafe {
        // No closures: the processor's features reach only what is inlined, which `map` may not be.
        let low = _mm512_maskz_loadu_ps(first_lanes(x.len()), x.as_ptr());
        let high = _mm512_maskz_loadu_ps(first_lanes(x.len().saturating_sub(TILE)), x.as_ptr().wrapping_add(TILE));
        let largest = largest(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
        // What is not finite is no number after it was taken from itself, and `max` may pass it over.
        let zero = _mm512_setzero_ps();
        let poisoned = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(_mm512_sub_ps(low, low), zero)
            | _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(_mm512_sub_ps(high, high), zero);
        let poison = if poisoned == 0 { 0.0 } else { f32::NAN };
        // So small that the reciprocal would not be finite: as good as zero.
        let inverse = if largest > 1e-30 { 127.0 / largest } else { 0.0 };
        let factor = _mm512_set1_ps(inverse);
        let low = _mm512_cvtps_epi32(_mm512_mul_ps(low, factor));
        let high = _mm512_cvtps_epi32(_mm512_mul_ps(high, factor));
        let sum = sum_of(_mm512_add_epi32(low, high));
        Rounded {
            codes: [_mm512_cvtepi32_epi8(low), _mm512_cvtepi32_epi8(high)],
            scale: scale_of(if inverse > 0.0 { largest / 127.0 } else { 0.0 } + poison),
            sum: sum as f32,
        }
    }
}

/// The shuffle that puts the sixteen bytes of a tile in the order of planes (all of one, then all of the next), or of units
/// (those of a word together).
#[inline(always)]
unsafe fn deal_of(order: Order, by_plane: bool) -> __m128i {
    let planes = order.planes;
    let words = TILE / order.lane();
    let mut bytes = [0u8; TILE];
    for (at, byte) in bytes.iter_mut().enumerate() {
        let (dword, b) = (at / 4, at % 4);
        let (plane, word) = if by_plane { (dword / words, dword % words) } else { (dword % planes, dword / planes) };
        *byte = (word * order.lane() + planes * b + plane) as u8;
    }
    // SAFETY: see `round`.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline(always)]
unsafe fn largest(v: __m512) -> f32 {
    // SAFETY: see `round`.
    unsafe {
        let eight = _mm256_max_ps(
            _mm512_castps512_ps256(v),
            _mm256_castsi256_ps(_mm512_extracti64x4_epi64::<1>(_mm512_castps_si512(v))),
        );
        let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }
}

#[inline(always)]
unsafe fn sum_of(v: __m512i) -> i32 {
    // SAFETY: see `round`.
    unsafe {
        let eight = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v));
        let four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
        let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
        _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two)))
    }
}
