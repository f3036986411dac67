//! Codes times 8-bit activations with AVX2, and with AVX-VNNI beside.
//!
//! The steps of `avx512.rs` in halves of eight lanes. With AVX-VNNI a product instruction adds four products to each lane. Without,
//! `vpmaddubsw` adds pairs of products in 16 bits, which codes of up to 6 bits cannot fill: the planes of a step are added there
//! before one `vpmaddwd` widens them. Codes of 8 bits are split into their low seven bits and their high bit.

use super::activations::{LANES, Quantized};
use super::base::{Base, Tables, ZeroBits};
use super::levels::Levels;
use crate::cpu::simd::sum8;
use crate::cpu::tile::Tile;
use half::f16;
use std::arch::x86_64::*;
use tailorq_tensor::{Bits, ScaleBits, Scales};

/// Lanes of a register.
const HALF: usize = 8;

/// `y[t, i] = base[first + i] x[t]` for all of `y`, whose rows are tokens.
///
/// # Safety
/// The processor has avx2, fma and f16c.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn rows(base: &Base<'_>, tables: &Tables, x: &Quantized, first: usize, y: &mut Tile<'_>) {
    // SAFETY: the processor has the features of this function, and the slices are as long as a `Base` says.
    unsafe { every_width::<false>(base, tables, x, first, y) }
}

/// As [`rows`], with AVX-VNNI.
///
/// # Safety
/// The processor has avxvnni, avx2, fma and f16c.
#[target_feature(enable = "avxvnni,avx2,fma,f16c")]
pub(super) unsafe fn rows_vnni(base: &Base<'_>, tables: &Tables, x: &Quantized, first: usize, y: &mut Tile<'_>) {
    // SAFETY: as in `rows`.
    unsafe { every_width::<true>(base, tables, x, first, y) }
}

#[inline(always)]
unsafe fn every_width<const VNNI: bool>(
    base: &Base<'_>,
    tables: &Tables,
    x: &Quantized,
    first: usize,
    y: &mut Tile<'_>,
) {
    let kernel = Kernel::<VNNI> { base, tables, x };
    // SAFETY: see `rows`.
    unsafe {
        match (base.layout.bits, &base.levels) {
            (Bits::Two, None) => kernel.all(Two, first, y),
            (Bits::Three, None) => kernel.all(Three, first, y),
            (Bits::Four, None) => kernel.all(Four, first, y),
            (Bits::Two, Some(levels)) => kernel.all(Book::new(Two, levels), first, y),
            (Bits::Three, Some(levels)) => kernel.all(Book::new(Three, levels), first, y),
            (Bits::Four, Some(levels)) => kernel.all(Book::new(Four, levels), first, y),
            (Bits::Six, _) => kernel.all(Six, first, y),
            (Bits::Eight, _) => kernel.all(Eight, first, y),
        }
    }
}

/// How eight words meet the activations of their planes.
trait Codes: Copy {
    const PLANES: usize;
    const HIGHS: bool = false;
    /// Planes of codes, one a byte; those past [`Codes::PLANES`] are of no meaning.
    unsafe fn planes(self, words: __m256i, highs: __m256i) -> [__m256i; 4];
    /// Eight sums of the products with the activations at `x`, of which a plane's start 64 bytes after the one before.
    #[inline(always)]
    unsafe fn dots(self, planes: &[__m256i; 4], x: *const u8) -> __m256i {
        // SAFETY: inlined into a function with the features; the caller has the planes. So below.
        unsafe {
            let mut sums = _mm256_setzero_si256();
            for (p, plane) in planes.iter().enumerate().take(Self::PLANES) {
                let x = _mm256_load_si256(x.add(64 * p).cast());
                sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(*plane, x));
            }
            _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
        }
    }
    /// The same with AVX-VNNI.
    #[inline(always)]
    unsafe fn dots_vnni(self, planes: &[__m256i; 4], x: *const u8) -> __m256i {
        // SAFETY: see `dots`.
        unsafe {
            let mut sums = _mm256_setzero_si256();
            for (p, plane) in planes.iter().enumerate().take(Self::PLANES) {
                sums = _mm256_dpbusd_avx_epi32(sums, *plane, _mm256_load_si256(x.add(64 * p).cast()));
            }
            sums
        }
    }
}

#[derive(Clone, Copy)]
struct Two;
#[derive(Clone, Copy)]
struct Three;
#[derive(Clone, Copy)]
struct Four;
#[derive(Clone, Copy)]
struct Six;
#[derive(Clone, Copy)]
struct Eight;

impl Codes for Two {
    const PLANES: usize = 4;
    #[inline(always)]
    unsafe fn planes(self, words: __m256i, _: __m256i) -> [__m256i; 4] {
        // SAFETY: see `Codes::dots`.
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
    unsafe fn planes(self, words: __m256i, highs: __m256i) -> [__m256i; 4] {
        // SAFETY: see `Codes::dots`.
        unsafe {
            let h = high_bits(highs);
            let four = _mm256_set1_epi8(4);
            let [a, b, c, d] = Two.planes(words, highs);
            [
                _mm256_or_si256(a, _mm256_and_si256(_mm256_slli_epi16::<2>(h), four)),
                _mm256_or_si256(b, _mm256_and_si256(_mm256_slli_epi16::<1>(h), four)),
                _mm256_or_si256(c, _mm256_and_si256(h, four)),
                _mm256_or_si256(d, _mm256_and_si256(_mm256_srli_epi16::<1>(h), four)),
            ]
        }
    }
}

impl Codes for Four {
    const PLANES: usize = 2;
    #[inline(always)]
    unsafe fn planes(self, words: __m256i, _: __m256i) -> [__m256i; 4] {
        // SAFETY: see `Codes::dots`.
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
    unsafe fn planes(self, words: __m256i, highs: __m256i) -> [__m256i; 4] {
        // SAFETY: see `Codes::dots`.
        unsafe {
            let (h, high) = (high_bits(highs), _mm256_set1_epi8(0x30));
            let [a, b, ..] = Four.planes(words, highs);
            let a = _mm256_or_si256(a, _mm256_and_si256(_mm256_slli_epi16::<4>(h), high));
            let b = _mm256_or_si256(b, _mm256_and_si256(_mm256_slli_epi16::<2>(h), high));
            [a, b, a, b]
        }
    }
}

impl Codes for Eight {
    const PLANES: usize = 1;
    #[inline(always)]
    unsafe fn planes(self, words: __m256i, _: __m256i) -> [__m256i; 4] {
        [words; 4]
    }
    #[inline(always)]
    unsafe fn dots(self, planes: &[__m256i; 4], x: *const u8) -> __m256i {
        // SAFETY: see `Codes::dots`.
        unsafe {
            let low = _mm256_and_si256(planes[0], _mm256_set1_epi8(127));
            let high = _mm256_and_si256(_mm256_srli_epi16::<7>(planes[0]), _mm256_set1_epi8(1));
            let x = _mm256_load_si256(x.cast());
            let low = _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), _mm256_set1_epi16(1));
            let high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), _mm256_set1_epi16(128));
            _mm256_add_epi32(low, high)
        }
    }
}

/// Codes that are places in a codebook.
#[derive(Clone, Copy)]
struct Book<C> {
    codes: C,
    /// Bytes of the integers, twice.
    low: __m256i,
    high: __m256i,
}

impl<C> Book<C> {
    #[inline(always)]
    unsafe fn new(codes: C, levels: &Levels) -> Self {
        // SAFETY: see `Codes::dots`.
        unsafe {
            let low = _mm256_broadcastsi128_si256(_mm_loadu_si128(levels.low.as_ptr().cast()));
            let high = _mm256_broadcastsi128_si256(_mm_loadu_si128(levels.high.as_ptr().cast()));
            Book { codes, low, high }
        }
    }
}

impl<C: Codes> Codes for Book<C> {
    const PLANES: usize = C::PLANES;
    const HIGHS: bool = C::HIGHS;
    #[inline(always)]
    unsafe fn planes(self, words: __m256i, highs: __m256i) -> [__m256i; 4] {
        // SAFETY: see `Codes::dots`.
        unsafe { self.codes.planes(words, highs) }
    }
    /// Both bytes widened to 16 bits before they are multiplied: two of them fill what `vpmaddubsw` has.
    #[inline(always)]
    unsafe fn dots(self, planes: &[__m256i; 4], x: *const u8) -> __m256i {
        // SAFETY: see `Codes::dots`.
        unsafe {
            let (zero, mut sums) = (_mm256_setzero_si256(), [_mm256_setzero_si256(); 2]);
            for (p, plane) in planes.iter().enumerate().take(C::PLANES) {
                let x = _mm256_load_si256(x.add(64 * p).cast());
                let signs = _mm256_cmpgt_epi8(zero, x);
                let (x_low, x_high) = (_mm256_unpacklo_epi8(x, signs), _mm256_unpackhi_epi8(x, signs));
                for (sum, table) in sums.iter_mut().zip([self.low, self.high]) {
                    let bytes = _mm256_shuffle_epi8(table, *plane);
                    let low = _mm256_madd_epi16(_mm256_unpacklo_epi8(bytes, zero), x_low);
                    let high = _mm256_madd_epi16(_mm256_unpackhi_epi8(bytes, zero), x_high);
                    // Two pairs a lane: lanes 0 and 1 of a half come from its low eight bytes.
                    *sum = _mm256_add_epi32(*sum, _mm256_hadd_epi32(low, high));
                }
            }
            _mm256_add_epi32(sums[0], _mm256_slli_epi32::<8>(sums[1]))
        }
    }
    #[inline(always)]
    unsafe fn dots_vnni(self, planes: &[__m256i; 4], x: *const u8) -> __m256i {
        // SAFETY: see `Codes::dots`.
        unsafe {
            let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
            for (p, plane) in planes.iter().enumerate().take(C::PLANES) {
                let x = _mm256_load_si256(x.add(64 * p).cast());
                low = _mm256_dpbusd_avx_epi32(low, _mm256_shuffle_epi8(self.low, *plane), x);
                high = _mm256_dpbusd_avx_epi32(high, _mm256_shuffle_epi8(self.high, *plane), x);
            }
            _mm256_add_epi32(low, _mm256_slli_epi32::<8>(high))
        }
    }
}

/// The high bits of each byte's codes, four of the sixteen of a lane, at the low end of that byte.
#[inline(always)]
unsafe fn high_bits(highs: __m256i) -> __m256i {
    // SAFETY: see `Codes::dots`.
    unsafe {
        let first = _mm256_and_si256(highs, _mm256_set1_epi32(0x000F));
        let second = _mm256_and_si256(_mm256_slli_epi32::<4>(highs), _mm256_set1_epi32(0x0F00));
        let third = _mm256_and_si256(_mm256_slli_epi32::<8>(highs), _mm256_set1_epi32(0x000F_0000));
        let fourth = _mm256_and_si256(_mm256_slli_epi32::<12>(highs), _mm256_set1_epi32(0x0F00_0000));
        _mm256_or_si256(_mm256_or_si256(first, second), _mm256_or_si256(third, fourth))
    }
}

/// What all blocks of a call share.
struct Kernel<'a, const VNNI: bool> {
    base: &'a Base<'a>,
    tables: &'a Tables,
    x: &'a Quantized,
}

impl<const VNNI: bool> Kernel<'_, VNNI> {
    /// All rows of `y`: two at a time with one token, one at a time with several.
    #[inline(always)]
    unsafe fn all<C: Codes>(&self, unpack: C, first: usize, y: &mut Tile<'_>) {
        let (n_tokens, n_rows) = (y.rows(), y.cols());
        // SAFETY: rows and tokens exist.
        unsafe {
            if n_tokens == 1 {
                for i in (0..n_rows).step_by(2) {
                    // The last block repeats its last row.
                    let rows = [first + i, first + (i + 1).min(n_rows - 1)];
                    let sums = self.block::<C, 2, 1>(unpack, rows, 0);
                    for (y, [sum]) in y.row_mut(0)[i..].iter_mut().zip(sums) {
                        *y = sum;
                    }
                }
                return;
            }
            for i in 0..n_rows {
                let mut t = 0;
                while t + 4 <= n_tokens {
                    let [sums] = self.block::<C, 1, 4>(unpack, [first + i], t);
                    for (k, sum) in sums.into_iter().enumerate() {
                        y.row_mut(t + k)[i] = sum;
                    }
                    t += 4;
                }
                for t in t..n_tokens {
                    y.row_mut(t)[i] = self.block::<C, 1, 1>(unpack, [first + i], t)[0][0];
                }
            }
        }
    }

    /// The products of `R` rows and of `N` tokens from `token` on, `[rows][tokens]`.
    #[inline(always)]
    unsafe fn block<C: Codes, const R: usize, const N: usize>(
        &self,
        unpack: C,
        rows: [usize; R],
        token: usize,
    ) -> [[f32; N]; R] {
        let (base, x) = (self.base, self.x);
        let (steps, per_chunk) = (self.tables.steps, self.tables.per_chunk);
        // SAFETY: every row is in the matrix, so that its words, highs, scales and zeros are; what a row lacks of a register
        // is not read; the activations have `steps` steps and `chunks` chunks a token.
        unsafe {
            let ahead = base.words.as_ptr().wrapping_add(rows[0] * base.words_per_row).cast::<i8>();
            let ahead = ahead.wrapping_add(self.tables.ahead);
            let mut sums = [[_mm256_setzero_ps(); N]; R];
            for chunk in 0..x.chunks {
                let mut scales = [[_mm256_setzero_ps(); 2]; R];
                for r in 0..R {
                    scales[r] = self.scales(rows[r], chunk);
                    let zeros = self.zeros(rows[r], chunk);
                    for half in 0..2 {
                        let offset = _mm256_mul_ps(scales[r][half], zeros[half]);
                        for (t, sum) in sums[r].iter_mut().enumerate() {
                            let of_group = &x.sums[(token + t) * x.chunks + chunk].0[half * HALF..];
                            *sum = _mm256_fnmadd_ps(offset, _mm256_load_ps(of_group.as_ptr()), *sum);
                        }
                    }
                }
                for s in chunk * per_chunk..steps.min((chunk + 1) * per_chunk) {
                    let indices = &self.tables.groups.of_step[s & self.tables.groups.mask].0;
                    for half in 0..2 {
                        let at = s * LANES + half * HALF;
                        let n = base.words_per_row.saturating_sub(at).min(HALF);
                        let index = _mm256_load_si256(indices[half * HALF..].as_ptr().cast());
                        for r in 0..R {
                            if half == 0 {
                                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add((s * R + r) * 8 * HALF));
                            }
                            let words = words_at(&base.words[rows[r] * base.words_per_row..], at, n);
                            let highs = if C::HIGHS {
                                highs_at(&base.highs[rows[r] * base.words_per_row..], at, n)
                            } else {
                                _mm256_setzero_si256()
                            };
                            let planes = unpack.planes(words, highs);
                            // The lanes of a half lie in eight aligned groups.
                            let of_half = scales[r][indices[half * HALF] as usize / HALF];
                            let scale = _mm256_permutevar8x32_ps(of_half, index);
                            for (t, sum) in sums[r].iter_mut().enumerate() {
                                let step = (token + t) * x.steps + s;
                                let codes = x.codes.as_ptr().add(step * C::PLANES).cast::<u8>().add(half * 4 * HALF);
                                let dots = match VNNI {
                                    true => _mm256_cvtepi32_ps(unpack.dots_vnni(&planes, codes)),
                                    false => _mm256_cvtepi32_ps(unpack.dots(&planes, codes)),
                                };
                                let x_scale = _mm256_load_ps(x.scales[step].0[half * HALF..].as_ptr());
                                *sum = _mm256_fmadd_ps(_mm256_mul_ps(dots, x_scale), scale, *sum);
                            }
                        }
                    }
                }
            }
            // No closure here or in what follows: the processor's features reach only what is inlined, which `map` may not be.
            let mut products = [[0.0; N]; R];
            for (products, sums) in products.iter_mut().zip(sums) {
                for (product, sum) in products.iter_mut().zip(sums) {
                    *product = sum8(sum) * base.factor();
                }
            }
            products
        }
    }

    /// The sixteen scales of a chunk; 0 past the last group.
    #[inline(always)]
    unsafe fn scales(&self, row: usize, chunk: usize) -> [__m256; 2] {
        let groups = self.base.groups;
        let n = (groups - chunk * LANES).min(LANES);
        let from = row * groups + chunk * LANES;
        // SAFETY: see `Codes::dots`.
        unsafe {
            let [low, high] = match self.base.scales {
                Scales::Halves(all) => {
                    let mut halves = [f16::ZERO; LANES];
                    halves[..n].copy_from_slice(&all[from..from + n]);
                    let (low, high) = halves.split_at(HALF);
                    [_mm_loadu_si128(low.as_ptr().cast()), _mm_loadu_si128(high.as_ptr().cast())]
                }
                Scales::Bytes(all) => {
                    let mut bytes = [0u8; LANES];
                    bytes[..n].copy_from_slice(&all[from..from + n]);
                    let wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes.as_ptr().cast()));
                    let wide = _mm256_slli_epi16::<{ ScaleBits::SHIFT as i32 }>(wide);
                    [_mm256_castsi256_si128(wide), _mm256_extracti128_si256::<1>(wide)]
                }
            };
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }

    /// The sixteen zeros of a chunk; past the last group, of no meaning but finite.
    #[inline(always)]
    unsafe fn zeros(&self, row: usize, chunk: usize) -> [__m256; 2] {
        let base = self.base;
        // SAFETY: see `Codes::dots`.
        unsafe {
            if let Some(middle) = base.middle() {
                return [_mm256_set1_ps(middle); 2];
            }
            let bytes = 2 * base.bits();
            let n = (base.zero_bytes - chunk * bytes).min(bytes);
            let from = row * base.zero_bytes + chunk * bytes;
            let mut stream = [0u8; 16];
            stream[..n].copy_from_slice(&base.zeros[from..from + n]);
            unpack(&self.tables.zeros, _mm_loadu_si128(stream.as_ptr().cast()))
        }
    }
}

/// Sixteen numbers out of the bit stream of a chunk.
#[inline(always)]
unsafe fn unpack(zeros: &ZeroBits, stream: __m128i) -> [__m256; 2] {
    // SAFETY: see `Codes::dots`.
    unsafe {
        let stream = _mm256_broadcastsi128_si256(stream);
        let mut halves = [_mm256_setzero_ps(); 2];
        for (half, numbers) in halves.iter_mut().enumerate() {
            let bytes = _mm256_load_si256(zeros.bytes.0[half * HALF..].as_ptr().cast());
            let shifts = _mm256_load_si256(zeros.shifts.0[half * HALF..].as_ptr().cast());
            let shifted = _mm256_srlv_epi32(_mm256_shuffle_epi8(stream, bytes), shifts);
            *numbers = _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(zeros.mask)));
        }
        halves
    }
}

/// Words `at..at + n` of a row, `n` up to eight, and zeros.
#[inline(always)]
unsafe fn words_at(row: &[u32], at: usize, n: usize) -> __m256i {
    // SAFETY: see `Codes::dots`; eight words are read only where the row has them.
    unsafe {
        if n == HALF {
            return _mm256_loadu_si256(row[at..at + HALF].as_ptr().cast());
        }
        let mut words = [0u32; HALF];
        if n > 0 {
            words[..n].copy_from_slice(&row[at..at + n]);
        }
        _mm256_loadu_si256(words.as_ptr().cast())
    }
}

/// High planes `at..at + n` of a row as 32-bit lanes, and zeros.
#[inline(always)]
unsafe fn highs_at(row: &[u16], at: usize, n: usize) -> __m256i {
    // SAFETY: see `words_at`.
    unsafe {
        if n == HALF {
            return _mm256_cvtepu16_epi32(_mm_loadu_si128(row[at..at + HALF].as_ptr().cast()));
        }
        let mut highs = [0u16; HALF];
        if n > 0 {
            highs[..n].copy_from_slice(&row[at..at + n]);
        }
        _mm256_cvtepu16_epi32(_mm_loadu_si128(highs.as_ptr().cast()))
    }
}
