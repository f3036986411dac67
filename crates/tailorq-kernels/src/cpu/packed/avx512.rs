//! Codes times 8-bit activations with AVX-512 VNNI.
//!
//! One row at batch 1 is 256 weights (2 bits) a step: one load of codes, a mask and three bit-matrix products (or three shifts and
//! four masks, see `codes512.rs`), four `vpdpbusd` with the activations of the step, then the activations' scales and a
//! multiply-add with the weights' scales, which a permutation takes from a register of sixteen. The integer sums begin at the bits
//! of 1.5 * 2^23, so that they are floats without a conversion: the multiply-add with the activations' scale takes that off. Four rows share the activations. The zeros enter once a chunk of sixteen
//! groups through the sums of the activations. What is added to a row in which order depends on neither the other rows nor
//! the other tokens of a block.

use super::activations::{LANES, Lanes, Plane, Quantized};
use super::base::{Base, Tables, ZeroBits};
use super::codes512::{Codes, with_codes};
use super::corrections::{BLOCK, Corrections, Inputs};
use super::corrections512::{self, BlockSums};
use crate::cpu::tile::Tile;
use std::arch::x86_64::*;
use tailorq_tensor::{Bits, ScaleBits, Scales};

/// 1.5 * 2^23: added to the bits of this number, an integer below 2^22 in size is added to its value.
const MAGIC: f32 = 12_582_912.0;

/// Whether this processor has what the kernels use.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512vbmi")
}

/// Whether it has GFNI beside.
pub(super) fn has_gfni() -> bool {
    is_x86_feature_detected!("gfni")
}

/// Corrections of a matrix, and the tokens that they are multiplied with.
type Corrected<'a> = Option<&'a (Corrections<'a>, Inputs<'a>)>;

/// `y[t, i] = (base + corrections)[first + i] x[t]` for all of `y`, whose rows are tokens.
///
/// # Safety
/// The processor is [`available`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
pub(super) unsafe fn rows(
    base: &Base<'_>,
    tables: &Tables,
    x: &Quantized,
    corrected: Corrected<'_>,
    first: usize,
    y: &mut Tile<'_>,
) {
    // SAFETY: the processor has the features of this function, and the slices are as long as a `Base` says.
    unsafe { with_codes!(false, base, |codes| Kernel { codes, base, x, tables }.all(corrected, first, y)) }
}

/// As [`rows`], with GFNI.
///
/// # Safety
/// The processor is [`available`] and has GFNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,gfni,avx2,fma,f16c")]
pub(super) unsafe fn rows_gfni(
    base: &Base<'_>,
    tables: &Tables,
    x: &Quantized,
    corrected: Corrected<'_>,
    first: usize,
    y: &mut Tile<'_>,
) {
    // SAFETY: as in `rows`.
    unsafe { with_codes!(true, base, |codes| Kernel { codes, base, x, tables }.all(corrected, first, y)) }
}

/// Tokens that are taken at once.
const TOKENS: usize = 4;

/// What all blocks of a call share.
struct Kernel<'a, C> {
    codes: C,
    base: &'a Base<'a>,
    x: &'a Quantized,
    tables: &'a Tables,
}

impl<C: Codes> Kernel<'_, C> {
    /// All rows of `y`, block by block, with four tokens at a time.
    #[inline(always)]
    unsafe fn all(&self, corrected: Corrected<'_>, first: usize, y: &mut Tile<'_>) {
        let (n_tokens, n_rows) = (y.rows(), y.cols());
        let mut sums = [[Lanes([0.0; LANES]); BLOCK + 1]; TOKENS];
        // SAFETY: rows and tokens exist.
        unsafe {
            if n_tokens == 1 {
                for at in (0..n_rows).step_by(BLOCK) {
                    self.tokens::<4, 1>(corrected, (first, at), 0, &mut sums, y);
                }
                return;
            }
            for at in (0..n_rows).step_by(BLOCK) {
                let mut t = 0;
                while t + TOKENS <= n_tokens {
                    self.tokens::<2, TOKENS>(corrected, (first, at), t, &mut sums, y);
                    t += TOKENS;
                }
                if t + 2 <= n_tokens {
                    self.tokens::<2, 2>(corrected, (first, at), t, &mut sums, y);
                    t += 2;
                }
                if t < n_tokens {
                    self.tokens::<2, 1>(corrected, (first, at), t, &mut sums, y);
                }
            }
        }
    }

    /// Columns `at..` of `y`, a block of rows from `first + at` on, and `N` tokens from `token` on.
    #[inline(always)]
    unsafe fn tokens<const R: usize, const N: usize>(
        &self,
        corrected: Corrected<'_>,
        (first, at): (usize, usize),
        token: usize,
        sums: &mut [BlockSums; TOKENS],
        y: &mut Tile<'_>,
    ) {
        let n = (y.cols() - at).min(BLOCK);
        let first = first + at;
        // SAFETY: rows and tokens exist, and a block is a multiple of `R`.
        unsafe {
            for i in (0..n).step_by(R) {
                // The last block repeats its last row.
                let rows = std::array::from_fn(|r| first + (i + r).min(n - 1));
                let products = self.block::<R, N>(rows, token);
                for r in 0..R {
                    for t in 0..N {
                        _mm512_store_ps(sums[t][i + r].0.as_mut_ptr(), products[r][t]);
                    }
                }
            }
            for (t, sums) in sums.iter_mut().enumerate().take(N) {
                let y = &mut y.row_mut(token + t)[at..at + n];
                if let Some((corrections, x)) = corrected {
                    corrections512::add(corrections, x.token(token + t), first..first + n, sums);
                }
                add_lanes(sums, y);
            }
        }
    }

    /// The products of `R` rows and of `N` tokens from `token` on, lane by lane.
    #[inline(always)]
    unsafe fn block<const R: usize, const N: usize>(&self, rows: [usize; R], token: usize) -> [[__m512; N]; R] {
        let (base, x) = (self.base, self.x);
        let (steps, per_chunk) = (self.tables.steps, self.tables.per_chunk);
        // SAFETY: every row is in the matrix, so that its words, highs, scales and zeros are; masks keep loads inside a
        // row; the activations have `steps` steps and `chunks` chunks a token.
        unsafe {
            let words = rows.map(|r| base.words.as_ptr().add(r * base.words_per_row));
            let from = Sources {
                words,
                highs: rows.map(|r| base.highs.as_ptr().wrapping_add(r * base.words_per_row)),
                codes: std::array::from_fn(|t| x.codes.as_ptr().add((token + t) * x.steps * C::PLANES)),
                scales: std::array::from_fn(|t| x.scales.as_ptr().add((token + t) * x.steps)),
                ahead: words[0].cast::<i8>().wrapping_add(self.tables.ahead),
            };
            // Steps of sixteen words; one of fewer may follow.
            let whole = base.words_per_row / LANES;
            let rest = first_lanes(base.words_per_row % LANES);
            let mut sums = [[_mm512_setzero_ps(); N]; R];
            for chunk in 0..x.chunks {
                let mut scales = [_mm512_setzero_ps(); R];
                for r in 0..R {
                    scales[r] = self.scales(rows[r], chunk);
                    let offset = _mm512_mul_ps(scales[r], self.zeros(rows[r], chunk));
                    for (t, sum) in sums[r].iter_mut().enumerate() {
                        let of_group = _mm512_load_ps(x.sums.as_ptr().add((token + t) * x.chunks + chunk).cast());
                        *sum = _mm512_fnmadd_ps(offset, of_group, *sum);
                    }
                }
                let (begin, end) = (chunk * per_chunk, steps.min((chunk + 1) * per_chunk));
                for s in begin..end.min(whole) {
                    from.add_step::<C, true>(self.codes, s, u16::MAX, self.lane_groups(s), &scales, &mut sums);
                }
                if end > whole && base.words_per_row % LANES <= LANES / 2 {
                    from.add_half_step(self.codes, whole, rest as u8, self.lane_groups(whole), &scales, &mut sums);
                } else if end > whole {
                    from.add_step::<C, false>(self.codes, whole, rest, self.lane_groups(whole), &scales, &mut sums);
                }
            }
            if C::BOOK {
                let factor = _mm512_set1_ps(base.factor());
                for sum in sums.as_flattened_mut() {
                    *sum = _mm512_mul_ps(*sum, factor);
                }
            }
            sums
        }
    }

    /// Which of the sixteen scales of a chunk each lane of a step takes.
    #[inline(always)]
    unsafe fn lane_groups(&self, s: usize) -> __m512i {
        // SAFETY: the mask is below the length of the table.
        unsafe { _mm512_load_si512(self.tables.groups.of_step.as_ptr().add(s & self.tables.groups.mask).cast()) }
    }

    /// The sixteen scales of a chunk; 0 past the last group.
    #[inline(always)]
    unsafe fn scales(&self, row: usize, chunk: usize) -> __m512 {
        let groups = self.base.groups;
        let (at, mask) = (row * groups + chunk * LANES, first_lanes(groups - chunk * LANES));
        // SAFETY: the mask keeps the load inside the row's scales.
        unsafe {
            let halves = match self.base.scales {
                Scales::Halves(all) => _mm256_maskz_loadu_epi16(mask, all.as_ptr().add(at).cast()),
                Scales::Bytes(all) => {
                    let bytes = _mm_maskz_loadu_epi8(mask, all.as_ptr().add(at).cast());
                    _mm256_slli_epi16::<{ ScaleBits::SHIFT as i32 }>(_mm256_cvtepu8_epi16(bytes))
                }
            };
            _mm512_cvtph_ps(halves)
        }
    }

    /// The sixteen zeros of a chunk; past the last group, of no meaning but finite.
    #[inline(always)]
    unsafe fn zeros(&self, row: usize, chunk: usize) -> __m512 {
        let base = self.base;
        // SAFETY: the mask keeps the load inside the row's zeros.
        unsafe {
            if let Some(middle) = base.middle() {
                return _mm512_set1_ps(middle);
            }
            let bytes = 2 * base.bits();
            let from = base.zeros.as_ptr().add(row * base.zero_bytes + chunk * bytes);
            let mask = first_lanes((base.zero_bytes - chunk * bytes).min(bytes));
            unpack(&self.tables.zeros, _mm_maskz_loadu_epi8(mask, from.cast()))
        }
    }
}

/// Where the rows and tokens of a block begin.
struct Sources<const R: usize, const N: usize> {
    words: [*const u32; R],
    highs: [*const u16; R],
    codes: [*const Plane; N],
    scales: [*const Lanes; N],
    /// What is fetched while the rows are read.
    ahead: *const i8,
}

impl<const R: usize, const N: usize> Sources<R, N> {
    /// Adds step `s`, of which `mask` marks the words that the rows have (all of them, if `WHOLE`).
    #[inline(always)]
    unsafe fn add_step<C: Codes, const WHOLE: bool>(
        &self,
        unpack: C,
        s: usize,
        mask: u16,
        lane_groups: __m512i,
        scales: &[__m512; R],
        sums: &mut [[__m512; N]; R],
    ) {
        // SAFETY: inlined into a function with the features; the rows have the marked words, the tokens have the step.
        unsafe {
            let magic = _mm512_set1_ps(MAGIC);
            // What takes the magic off: exact, see `activations::scale_of`.
            let mut x_scales = [_mm512_setzero_ps(); N];
            let mut offsets = [_mm512_setzero_ps(); N];
            for t in 0..N {
                x_scales[t] = _mm512_load_ps(self.scales[t].add(s).cast());
                offsets[t] = _mm512_mul_ps(x_scales[t], magic);
            }
            for r in 0..R {
                _mm_prefetch::<_MM_HINT_T0>(self.ahead.wrapping_add((s * R + r) * size_of::<Plane>()));
                let (words, highs) = (self.words[r].add(s * LANES), self.highs[r].wrapping_add(s * LANES));
                let high = match (C::HIGHS, WHOLE) {
                    (false, _) => _mm512_setzero_si512(),
                    (true, true) => _mm512_cvtepu16_epi32(_mm256_loadu_si256(highs.cast())),
                    (true, false) => _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, highs.cast())),
                };
                let words = match WHOLE {
                    true => _mm512_loadu_si512(words.cast()),
                    false => _mm512_maskz_loadu_epi32(mask, words.cast()),
                };
                let planes = unpack.planes(words, high);
                let wide = unpack.wide_planes(words, high);
                let scale = _mm512_permutexvar_ps(lane_groups, scales[r]);
                for (t, sum) in sums[r].iter_mut().enumerate() {
                    let codes = self.codes[t].add(s * C::PLANES);
                    let mut dots = match C::WIDE {
                        true => _mm512_setzero_si512(),
                        false => _mm512_castps_si512(magic),
                    };
                    if C::WIDE {
                        for (p, plane) in wide.iter().enumerate().take(C::PLANES) {
                            dots = _mm512_dpbusd_epi32(dots, *plane, _mm512_load_si512(codes.add(p).cast()));
                        }
                        dots = _mm512_slli_epi32::<8>(dots);
                    }
                    for (p, plane) in planes.iter().enumerate().take(C::PLANES) {
                        dots = _mm512_dpbusd_epi32(dots, *plane, _mm512_load_si512(codes.add(p).cast()));
                    }
                    let values = match C::WIDE {
                        true => _mm512_mul_ps(_mm512_cvtepi32_ps(dots), x_scales[t]),
                        false => _mm512_fmsub_ps(_mm512_castsi512_ps(dots), x_scales[t], offsets[t]),
                    };
                    *sum = _mm512_fmadd_ps(values, scale, *sum);
                }
            }
        }
    }

    /// Adds step `s`, of which the rows have at most eight words, marked by `mask`: with registers of half the width, which
    /// take half the time where a processor does wide instructions in two turns. The sums are those of [`Self::add_step`].
    #[inline(always)]
    unsafe fn add_half_step<C: Codes>(
        &self,
        unpack: C,
        s: usize,
        mask: u8,
        lane_groups: __m512i,
        scales: &[__m512; R],
        sums: &mut [[__m512; N]; R],
    ) {
        // SAFETY: inlined into a function with the features; the rows have the marked words, the tokens have the step.
        unsafe {
            for r in 0..R {
                _mm_prefetch::<_MM_HINT_T0>(self.ahead.wrapping_add((s * R + r) * size_of::<Plane>()));
                let (words, highs) = (self.words[r].add(s * LANES), self.highs[r].wrapping_add(s * LANES));
                let high = match C::HIGHS {
                    false => _mm256_setzero_si256(),
                    true => _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, highs.cast())),
                };
                let words = _mm256_maskz_loadu_epi32(mask, words.cast());
                let (planes, wide) = (unpack.half_planes(words, high), unpack.wide_half_planes(words, high));
                let scale = _mm512_permutexvar_ps(lane_groups, scales[r]);
                for (t, sum) in sums[r].iter_mut().enumerate() {
                    let codes = self.codes[t].add(s * C::PLANES);
                    let magic = _mm256_set1_ps(MAGIC);
                    let mut dots = match C::WIDE {
                        true => _mm256_setzero_si256(),
                        false => _mm256_castps_si256(magic),
                    };
                    if C::WIDE {
                        for (p, plane) in wide.iter().enumerate().take(C::PLANES) {
                            dots = _mm256_dpbusd_epi32(dots, *plane, _mm256_load_si256(codes.add(p).cast()));
                        }
                        dots = _mm256_slli_epi32::<8>(dots);
                    }
                    for (p, plane) in planes.iter().enumerate().take(C::PLANES) {
                        dots = _mm256_dpbusd_epi32(dots, *plane, _mm256_load_si256(codes.add(p).cast()));
                    }
                    let x_scale = _mm256_load_ps(self.scales[t].add(s).cast());
                    let values = match C::WIDE {
                        true => _mm256_mul_ps(_mm256_cvtepi32_ps(dots), x_scale),
                        false => _mm256_fmsub_ps(_mm256_castsi256_ps(dots), x_scale, _mm256_mul_ps(x_scale, magic)),
                    };
                    *sum = _mm512_fmadd_ps(_mm512_zextps256_ps512(values), scale, *sum);
                }
            }
        }
    }
}

/// The sums of the lanes of as many rows as `y` has.
#[inline(always)]
unsafe fn add_lanes(sums: &BlockSums, y: &mut [f32]) {
    for (sums, y) in sums.as_chunks::<4>().0.iter().zip(y.chunks_mut(4)) {
        // SAFETY: inlined into a function with the features; lanes are sixteen aligned floats. No closure: the processor's features
        // reach only what is inlined, which `map` may not be.
        unsafe {
            let mut four = [_mm512_setzero_ps(); 4];
            for (four, sum) in four.iter_mut().zip(sums) {
                *four = _mm512_load_ps(sum.0.as_ptr());
            }
            _mm_mask_storeu_ps(y.as_mut_ptr(), first_lanes(y.len()) as u8, sums4(four));
        }
    }
}

/// The sum of each register: lanes 8 apart first, then 2, 1 and 4 apart.
#[inline(always)]
unsafe fn sums4(v: [__m512; 4]) -> __m128 {
    // SAFETY: inlined into a function with the features.
    unsafe {
        let mut halves = [_mm256_setzero_ps(); 4];
        for (half, v) in halves.iter_mut().zip(v) {
            let high = _mm512_extracti64x4_epi64::<1>(_mm512_castps_si512(v));
            *half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castsi256_ps(high));
        }
        let [a, b, c, d] = halves;
        let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        let low = _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd);
        let high = _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd);
        let abcd = _mm256_add_ps(low, high);
        _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps::<1>(abcd))
    }
}

/// Sixteen numbers out of the bit stream of a chunk.
#[inline(always)]
unsafe fn unpack(zeros: &ZeroBits, stream: __m128i) -> __m512 {
    // SAFETY: see `sums4`.
    unsafe {
        let bytes = _mm512_load_si512(zeros.bytes.0.as_ptr().cast());
        let lanes = _mm512_permutexvar_epi8(bytes, _mm512_zextsi128_si512(stream));
        let numbers = _mm512_srlv_epi32(lanes, _mm512_load_si512(zeros.shifts.0.as_ptr().cast()));
        _mm512_cvtepi32_ps(_mm512_and_si512(numbers, _mm512_set1_epi32(zeros.mask)))
    }
}

/// A mask of the first `n` of sixteen lanes.
#[inline(always)]
pub(super) fn first_lanes(n: usize) -> u16 {
    if n >= LANES { u16::MAX } else { (1 << n) - 1 }
}
