//! Codes times 8-bit activations with AVX-512 VNNI.
//!
//! One row at batch 1 is 256 weights (2 bits) a step: one load of codes, three shifts, four masks, four `vpdpbusd` with the
//! activations of the step, then a conversion, the activations' scales and a multiply-add with the weights' scales, which
//! a permutation takes from a register of sixteen. Four rows share the activations. The zeros enter once a chunk of sixteen
//! groups through the sums of the activations. What is added to a row in which order depends on neither the other rows nor
//! the other tokens of a block.

use super::activations::{LANES, Lanes, Plane, Quantized};
use super::base::{Base, LaneGroups, ZeroBits};
use super::corrections::TileView;
use crate::cpu::simd::{Avx512, Simd};
use crate::cpu::tile::Tile;
use std::arch::x86_64::*;
use tailorq_tensor::{Bits, TILE, TileBits};

/// Least bytes ahead of the codes in hand that are fetched into the cache. Rows follow each other in memory, so a block of
/// rows fetches a later block line by line in the order of memory: several rows at once, each a stream of its own, reach
/// little more than half of what the memory gives.
const AHEAD: usize = 4096;

/// Whether this processor has what the kernels use.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512vbmi")
}

/// `y[t, i] = base[first + i] x[t]` for all of `y`, whose rows are tokens.
///
/// # Safety
/// The processor is [`available`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
pub(super) unsafe fn rows(base: &Base<'_>, x: &Quantized, first: usize, y: &mut Tile<'_>) {
    // SAFETY: the processor has the features of this function, and the slices are as long as a `Base` says.
    unsafe {
        match base.layout.bits {
            Bits::Two => all::<Two>(base, x, first, y),
            Bits::Three => all::<Three>(base, x, first, y),
            Bits::Four => all::<Four>(base, x, first, y),
            Bits::Eight => all::<Eight>(base, x, first, y),
            Bits::Six => all::<Six>(base, x, first, y),
        }
    }
}

/// How the bytes of sixteen words become planes of codes, one a byte.
pub(super) trait Codes {
    /// Planes of a step.
    const PLANES: usize;
    /// Whether there is a plane of high bits.
    const HIGHS: bool = false;
    /// The planes; those past [`Codes::PLANES`] are of no meaning. `highs` are the sixteen u16 of the high plane, if there is one.
    unsafe fn planes(words: __m512i, highs: __m512i) -> [__m512i; 4];
    /// The same of eight words.
    unsafe fn half_planes(words: __m256i, highs: __m256i) -> [__m256i; 4];
}

pub(super) struct Two;
pub(super) struct Three;
pub(super) struct Four;
pub(super) struct Six;
pub(super) struct Eight;

impl Codes for Two {
    const PLANES: usize = 4;
    #[inline(always)]
    unsafe fn planes(words: __m512i, _: __m512i) -> [__m512i; 4] {
        // SAFETY: inlined into a function with the features; so below.
        unsafe {
            let mask = _mm512_set1_epi8(3);
            [
                _mm512_and_si512(words, mask),
                _mm512_and_si512(_mm512_srli_epi16::<2>(words), mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(words), mask),
                _mm512_and_si512(_mm512_srli_epi16::<6>(words), mask),
            ]
        }
    }
    #[inline(always)]
    unsafe fn half_planes(words: __m256i, _: __m256i) -> [__m256i; 4] {
        // SAFETY: inlined into a function with the features; so below.
        unsafe {
            let mask = _mm256_set1_epi8(3);
            [
                _mm256_and_si256(words, mask),
                _mm256_and_si256(_mm256_srli_epi16::<2>(words), mask),
                _mm256_and_si256(_mm256_srli_epi16::<4>(words), mask),
                _mm256_and_si256(_mm256_srli_epi16::<6>(words), mask),
            ]
        }
    }
}

impl Codes for Three {
    const PLANES: usize = 4;
    const HIGHS: bool = true;
    #[inline(always)]
    unsafe fn planes(words: __m512i, highs: __m512i) -> [__m512i; 4] {
        // SAFETY: see `Two`.
        unsafe {
            // Byte `b` of a lane gets the high bits of its four codes, that of plane `p` at bit `p + 2`.
            let at = _mm512_set1_epi64(i64::from_le_bytes([62, 2, 6, 10, 30, 34, 38, 42]));
            let h = _mm512_multishift_epi64_epi8(at, highs);
            let high = _mm512_set1_epi8(4);
            let [a, b, c, d] = Two::planes(words, highs);
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
    unsafe fn half_planes(words: __m256i, highs: __m256i) -> [__m256i; 4] {
        // SAFETY: see `Two`.
        unsafe {
            // Byte `b` of a lane gets the high bits of its four codes, that of plane `p` at bit `p + 2`.
            let at = _mm256_set1_epi64x(i64::from_le_bytes([62, 2, 6, 10, 30, 34, 38, 42]));
            let h = _mm256_multishift_epi64_epi8(at, highs);
            let high = _mm256_set1_epi8(4);
            let [a, b, c, d] = Two::half_planes(words, highs);
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

impl Codes for Four {
    const PLANES: usize = 2;
    #[inline(always)]
    unsafe fn planes(words: __m512i, _: __m512i) -> [__m512i; 4] {
        // SAFETY: see `Two`.
        unsafe {
            let mask = _mm512_set1_epi8(15);
            let low = _mm512_and_si512(words, mask);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(words), mask);
            [low, high, low, high]
        }
    }
    #[inline(always)]
    unsafe fn half_planes(words: __m256i, _: __m256i) -> [__m256i; 4] {
        // SAFETY: see `Two`.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            let low = _mm256_and_si256(words, mask);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(words), mask);
            [low, high, low, high]
        }
    }
}

impl Codes for Six {
    const PLANES: usize = 2;
    const HIGHS: bool = true;
    #[inline(always)]
    unsafe fn planes(words: __m512i, highs: __m512i) -> [__m512i; 4] {
        // SAFETY: see `Two`.
        unsafe {
            // Byte `b` of a lane gets the high bits of its two codes at bits 4 and 6.
            let at = _mm512_set1_epi64(i64::from_le_bytes([60, 0, 4, 8, 28, 32, 36, 40]));
            let h = _mm512_multishift_epi64_epi8(at, highs);
            let high = _mm512_set1_epi8(0x30);
            let [a, b, ..] = Four::planes(words, highs);
            // a | (b & c)
            let a = _mm512_ternarylogic_epi32::<0xF8>(a, h, high);
            let b = _mm512_ternarylogic_epi32::<0xF8>(b, _mm512_srli_epi16::<2>(h), high);
            [a, b, a, b]
        }
    }
    #[inline(always)]
    unsafe fn half_planes(words: __m256i, highs: __m256i) -> [__m256i; 4] {
        // SAFETY: see `Two`.
        unsafe {
            // Byte `b` of a lane gets the high bits of its two codes at bits 4 and 6.
            let at = _mm256_set1_epi64x(i64::from_le_bytes([60, 0, 4, 8, 28, 32, 36, 40]));
            let h = _mm256_multishift_epi64_epi8(at, highs);
            let high = _mm256_set1_epi8(0x30);
            let [a, b, ..] = Four::half_planes(words, highs);
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
    unsafe fn planes(words: __m512i, _: __m512i) -> [__m512i; 4] {
        [words; 4]
    }
    #[inline(always)]
    unsafe fn half_planes(words: __m256i, _: __m256i) -> [__m256i; 4] {
        [words; 4]
    }
}

/// All rows of `y`: four at a time with one token, two at a time with several.
#[inline(always)]
unsafe fn all<C: Codes>(base: &Base<'_>, x: &Quantized, first: usize, y: &mut Tile<'_>) {
    // Divisions here, not once a block: a block of short rows takes no longer than a few of them.
    let kernel = Kernel {
        base,
        x,
        groups: base.lane_groups(),
        zeros: base.zero_bits(),
        steps: base.steps(),
        per_chunk: base.steps_per_chunk(),
        ahead: AHEAD.next_multiple_of(16 * base.words_per_row),
    };
    let (n_tokens, n_rows) = (y.rows(), y.cols());
    // SAFETY: rows and tokens exist.
    unsafe {
        if n_tokens == 1 {
            for i in (0..n_rows).step_by(4) {
                // The last block repeats its last row.
                let rows = std::array::from_fn(|r| first + (i + r).min(n_rows - 1));
                kernel.block::<C, 4, 1>(rows, 0).store(i, 0, y);
            }
            return;
        }
        for i in (0..n_rows).step_by(2) {
            let rows = [first + i, first + (i + 1).min(n_rows - 1)];
            let mut t = 0;
            while t + 4 <= n_tokens {
                kernel.block::<C, 2, 4>(rows, t).store(i, t, y);
                t += 4;
            }
            if t + 2 <= n_tokens {
                kernel.block::<C, 2, 2>(rows, t).store(i, t, y);
                t += 2;
            }
            if t < n_tokens {
                kernel.block::<C, 2, 1>(rows, t).store(i, t, y);
            }
        }
    }
}

/// What all blocks of a call share.
struct Kernel<'a> {
    base: &'a Base<'a>,
    x: &'a Quantized,
    groups: LaneGroups,
    zeros: ZeroBits,
    /// Steps of a row.
    steps: usize,
    /// Steps that read the same sixteen scales.
    per_chunk: usize,
    /// Bytes from a block's first row to what it fetches: whole blocks of four rows.
    ahead: usize,
}

impl Kernel<'_> {
    /// The products of `R` rows and of `N` tokens from `token` on.
    #[inline(always)]
    unsafe fn block<C: Codes, const R: usize, const N: usize>(&self, rows: [usize; R], token: usize) -> Sums<R, N> {
        let (base, x) = (self.base, self.x);
        let (steps, per_chunk) = (self.steps, self.per_chunk);
        // SAFETY: every row is in the matrix, so that its words, highs, scales and zeros are; masks keep loads inside a
        // row; the activations have `steps` steps and `chunks` chunks a token.
        unsafe {
            let words = rows.map(|r| base.words.as_ptr().add(r * base.words_per_row));
            let from = Sources {
                words,
                highs: rows.map(|r| base.highs.as_ptr().wrapping_add(r * base.words_per_row)),
                codes: std::array::from_fn(|t| x.codes.as_ptr().add((token + t) * x.steps * C::PLANES)),
                scales: std::array::from_fn(|t| x.scales.as_ptr().add((token + t) * x.steps)),
                ahead: words[0].cast::<i8>().wrapping_add(self.ahead),
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
                    from.add_step::<C, true>(s, u16::MAX, self.lane_groups(s), &scales, &mut sums);
                }
                if end > whole && base.words_per_row % LANES <= LANES / 2 {
                    from.add_half_step::<C>(whole, rest as u8, self.lane_groups(whole), &scales, &mut sums);
                } else if end > whole {
                    from.add_step::<C, false>(whole, rest, self.lane_groups(whole), &scales, &mut sums);
                }
            }
            // No closure here or in what follows: the processor's features reach only what is inlined, which `map` may not be.
            let mut products = [[0.0; N]; R];
            for (products, sums) in products.iter_mut().zip(sums) {
                for (product, sum) in products.iter_mut().zip(sums) {
                    *product = Avx512::new().sum(sum);
                }
            }
            Sums(products)
        }
    }

    /// Which of the sixteen scales of a chunk each lane of a step takes.
    #[inline(always)]
    unsafe fn lane_groups(&self, s: usize) -> __m512i {
        // SAFETY: the mask is below the length of the table.
        unsafe { _mm512_load_si512(self.groups.of_step.as_ptr().add(s & self.groups.mask).cast()) }
    }

    /// The sixteen scales of a chunk; 0 past the last group.
    #[inline(always)]
    unsafe fn scales(&self, row: usize, chunk: usize) -> __m512 {
        let groups = self.base.groups;
        // SAFETY: the mask keeps the load inside the row's scales.
        unsafe {
            let from = self.base.scales.as_ptr().add(row * groups + chunk * LANES);
            let mask = first_lanes(groups - chunk * LANES);
            _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from.cast()))
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
            unpack(&self.zeros, _mm_maskz_loadu_epi8(mask, from.cast()))
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
        s: usize,
        mask: u16,
        lane_groups: __m512i,
        scales: &[__m512; R],
        sums: &mut [[__m512; N]; R],
    ) {
        // SAFETY: inlined into a function with the features; the rows have the marked words, the tokens have the step.
        unsafe {
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
                let planes = C::planes(words, high);
                let scale = _mm512_permutexvar_ps(lane_groups, scales[r]);
                for (t, sum) in sums[r].iter_mut().enumerate() {
                    let codes = self.codes[t].add(s * C::PLANES);
                    // Two chains of additions where nothing else fills the time that one waits; with more sums they
                    // cost registers.
                    let is_alone = R * N < 4 && C::PLANES > 1;
                    let mut dots = [_mm512_setzero_si512(); 2];
                    for (p, plane) in planes.iter().enumerate().take(C::PLANES) {
                        let x = _mm512_load_si512(codes.add(p).cast());
                        let dots = &mut dots[if is_alone { p % 2 } else { 0 }];
                        *dots = _mm512_dpbusd_epi32(*dots, *plane, x);
                    }
                    let dots = if is_alone { _mm512_add_epi32(dots[0], dots[1]) } else { dots[0] };
                    let x_scale = _mm512_load_ps(self.scales[t].add(s).cast());
                    let values = _mm512_mul_ps(_mm512_cvtepi32_ps(dots), x_scale);
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
                let planes = C::half_planes(_mm256_maskz_loadu_epi32(mask, words.cast()), high);
                let scale = _mm512_permutexvar_ps(lane_groups, scales[r]);
                for (t, sum) in sums[r].iter_mut().enumerate() {
                    let codes = self.codes[t].add(s * C::PLANES);
                    let mut dots = _mm256_setzero_si256();
                    for (p, plane) in planes.iter().enumerate().take(C::PLANES) {
                        dots = _mm256_dpbusd_epi32(dots, *plane, _mm256_load_si256(codes.add(p).cast()));
                    }
                    let x_scale = _mm256_load_ps(self.scales[t].add(s).cast());
                    let values = _mm256_mul_ps(_mm256_cvtepi32_ps(dots), x_scale);
                    *sum = _mm512_fmadd_ps(_mm512_zextps256_ps512(values), scale, *sum);
                }
            }
        }
    }
}

/// Sixteen numbers out of the bit stream of a chunk.
#[inline(always)]
unsafe fn unpack(zeros: &ZeroBits, stream: __m128i) -> __m512 {
    // SAFETY: see `Two`.
    unsafe {
        let bytes = _mm512_load_si512(zeros.bytes.0.as_ptr().cast());
        let lanes = _mm512_permutexvar_epi8(bytes, _mm512_zextsi128_si512(stream));
        let numbers = _mm512_srlv_epi32(lanes, _mm512_load_si512(zeros.shifts.0.as_ptr().cast()));
        _mm512_cvtepi32_ps(_mm512_and_si512(numbers, _mm512_set1_epi32(zeros.mask)))
    }
}

/// The products of a block, `[rows][tokens]`.
struct Sums<const R: usize, const N: usize>([[f32; N]; R]);

impl<const R: usize, const N: usize> Sums<R, N> {
    /// Into rows `token..` and columns `col..` of `y`, as far as it has them.
    #[inline(always)]
    fn store(self, col: usize, token: usize, y: &mut Tile<'_>) {
        for t in 0..N {
            let to = &mut y.row_mut(token + t)[col..];
            for (r, y) in to.iter_mut().take(R).enumerate() {
                *y = self.0[r][t];
            }
        }
    }
}

/// A mask of the first `n` of sixteen lanes.
#[inline(always)]
pub(super) fn first_lanes(n: usize) -> u16 {
    if n >= LANES { u16::MAX } else { (1 << n) - 1 }
}

/// `products[i] = values[i] * x[cols[i]]`, values as bits of f16.
///
/// # Safety
/// The processor is [`available`]; the slices are as long as `products`, every column is below `x.len()`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn multiply_elements(cols: &[u16], values: &[u16], x: &[f32], products: &mut [f32]) {
    for at in (0..products.len()).step_by(LANES) {
        let mask = first_lanes(products.len() - at);
        // SAFETY: masks keep loads and stores inside the slices, and lanes that are off gather nothing.
        unsafe {
            let cols = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, cols.as_ptr().add(at).cast()));
            let x = _mm512_mask_i32gather_ps::<4>(_mm512_setzero_ps(), mask, cols, x.as_ptr().cast());
            let values = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, values.as_ptr().add(at).cast()));
            _mm512_mask_storeu_ps(products.as_mut_ptr().add(at), mask, _mm512_mul_ps(x, values));
        }
    }
}

/// Adds to `y[i]` the tile corrections of row `first + i` times `x`.
///
/// # Safety
/// The processor is [`available`]; `x` is as long as the matrix is wide and has the rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn add_tiles(tiles: &TileView<'_>, x: &[f32], first: usize, y: &mut [f32]) {
    let mut rank = tiles.map.rank_of_row(first);
    for (i, y) in y.iter_mut().enumerate() {
        let marks = &tiles.marks[(first + i) * tiles.row_bytes..(first + i + 1) * tiles.row_bytes];
        let mut sums = _mm512_setzero_ps();
        let before = rank;
        for (w, bytes) in marks.chunks(8).enumerate() {
            let mut word = match bytes.first_chunk() {
                Some(bytes) => u64::from_le_bytes(*bytes),
                None => bytes.iter().rev().fold(0, |word, &b| word << 8 | u64::from(b)),
            };
            while word != 0 {
                let col = (64 * w + word.trailing_zeros() as usize) * TILE;
                word &= word - 1;
                // SAFETY: a marked tile lies in the row and has its codes and its scale; the mask keeps the load inside `x`.
                unsafe {
                    let codes = match tiles.bits {
                        TileBits::Eight => _mm_loadu_si128(tiles.codes.as_ptr().add(rank * TILE).cast()),
                        TileBits::Four => nibbles(tiles.codes.as_ptr().add(rank * TILE / 2)),
                    };
                    let scale = _mm512_cvtph_ps(_mm256_set1_epi16(*tiles.scales.get_unchecked(rank) as i16));
                    let x = _mm512_maskz_loadu_ps(first_lanes(x.len() - col), x.as_ptr().add(col));
                    let codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
                    sums = _mm512_fmadd_ps(_mm512_mul_ps(codes, scale), x, sums);
                }
                rank += 1;
            }
        }
        if rank > before {
            // SAFETY: see `Two`.
            *y += unsafe { Avx512::new() }.sum(sums);
        }
    }
}

/// Sixteen signed half bytes from the eight bytes at `from`.
#[inline(always)]
unsafe fn nibbles(from: *const u8) -> __m128i {
    // SAFETY: see `Two`; the caller has the bytes.
    unsafe {
        let both = _mm_loadl_epi64(from.cast());
        let low = _mm_and_si128(both, _mm_set1_epi8(15));
        let high = _mm_and_si128(_mm_srli_epi16::<4>(both), _mm_set1_epi8(15));
        let eight = _mm_set1_epi8(8);
        _mm_sub_epi8(_mm_xor_si128(_mm_unpacklo_epi8(low, high), eight), eight)
    }
}
