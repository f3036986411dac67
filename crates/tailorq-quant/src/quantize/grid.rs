//! Affine grids: scale and zero point of one group of weights, with an optional search for the clipping.
//!
//! The scale is rounded to f16, or to 8 bits, before any code is chosen, so the grid that errors are measured on is the grid that
//! is stored. Every grid contains 0 exactly. Scales of 8 bits are rounded up for the whole range: one that is too small by 5 %
//! leaves the largest weights outside, which at 6 and 8 bits would cost more than all the rest. Those of other candidates are the
//! nearest.

use super::levels::Levels;
use crate::Clip;
use crate::simd::{LANES, Simd, multiply_add, round_within};
use half::f16;
use tailorq_tensor::{Bits, Layout, ScaleBits};
use thiserror::Error;

/// `value = (code - zero) * scale`, for one group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// Finite and not negative; 0 only for a group of zeros.
    pub scale: f16,
    /// The code of 0.
    pub zero: u8,
}

impl Grid {
    /// The code nearest to `weight` (ties to the even multiple of the scale), clamped to the grid.
    pub fn code(&self, bits: Bits, weight: f32) -> u8 {
        let line = Line::new(*self, bits);
        (round_within(weight * line.inverse, line.low, line.high) - line.low) as u8
    }

    /// The value of a code, exact in f32.
    pub fn value(&self, code: u8) -> f32 {
        f32::from(i16::from(code) - i16::from(self.zero)) * self.scale.to_f32()
    }
}

/// A grid as hot loops want it: code `c` stands for the integer `c + low`, integers run from `low` to `high`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line {
    pub(crate) scale: f32,
    /// `1 / scale`, or 0 when the scale is 0, which maps every weight to the code of 0.
    pub(crate) inverse: f32,
    pub(crate) low: f32,
    pub(crate) high: f32,
}

impl Line {
    pub(crate) fn new(grid: Grid, bits: Bits) -> Self {
        let scale = grid.scale.to_f32();
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let zero = f32::from(grid.zero);
        Line { scale, inverse, low: -zero, high: f32::from(bits.max_code()) - zero }
    }

    /// The code nearest to a weight, and its value: on the line, or on the levels scaled by it.
    #[inline(always)]
    pub(crate) fn round(&self, levels: Option<&Levels>, weight: f32) -> (u8, f32) {
        let t = weight * self.inverse;
        match levels {
            None => {
                let q = round_within(t, self.low, self.high);
                ((q - self.low) as u8, q * self.scale)
            }
            Some(levels) => {
                let code = levels.code(t);
                (code, levels.value(code) * self.scale)
            }
        }
    }
}

/// A search over shrunken ranges, `p = 1 - i / steps` while `p > 1 - max_shrink`, and then over grown ones, `p = 1 + i / steps`
/// up to `1 + max_growth`, minimising `sum importance |e|^norm`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipSearch {
    /// Steps in which the full range would shrink to nothing.
    pub steps: u32,
    /// The share of the range that may be cut away, below 1.
    pub max_shrink: f32,
    /// The share of the range that may be added.
    pub max_growth: f32,
    /// Exponent of the error.
    pub norm: f32,
}

impl ClipSearch {
    /// The factors on the range, in the order in which they are tried.
    pub fn factors(self) -> impl Iterator<Item = f32> {
        let candidates = ((self.max_shrink * self.steps as f32) as u32).max(1);
        let grown = (self.max_growth * self.steps as f32) as u32;
        (0..candidates + grown).map(move |i| {
            let step = if i < candidates { -i.cast_signed() } else { (i - candidates + 1).cast_signed() };
            1.0 + step as f32 / self.steps as f32
        })
    }
}

impl Default for ClipSearch {
    /// The search of GPTQ's reference code (Frantar et al. 2022, `quant.py`, option `mse`).
    fn default() -> Self {
        ClipSearch { steps: 100, max_shrink: 0.8, max_growth: 0.0, norm: 2.4 }
    }
}

/// A group needs a scale that the layout cannot hold.
#[derive(Clone, Copy, Debug, Error, PartialEq)]
#[error("a scale of {scale} is above the largest that is stored")]
pub struct ScaleOverflow {
    /// The scale in f32; infinite when the range itself overflows.
    pub scale: f32,
}

/// How grids are fitted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GridRule {
    /// Width of the codes.
    pub bits: Bits,
    /// The zero point is fixed at `2^(bits-1)`; otherwise the range runs from `min(w, 0)` to `max(w, 0)`.
    pub symmetric: bool,
    /// Search for the clipping; `None` takes the extremes.
    pub clip: Option<ClipSearch>,
    /// The levels of a codebook, which groups then only scale; `None` for multiples of the scale.
    pub levels: Option<Levels>,
    /// How scales are stored.
    pub scales: ScaleBits,
}

impl GridRule {
    /// The rule for a layout. With [`Clip::Hessian`] the importances given to [`GridRule::fit`] are those of squared errors.
    pub fn new(layout: Layout, clip: Clip) -> Self {
        let clip = match clip {
            Clip::None => None,
            Clip::Magnitude => Some(ClipSearch::default()),
            Clip::Hessian => Some(ClipSearch { norm: 2.0, ..ClipSearch::default() }),
        };
        GridRule { bits: layout.bits, symmetric: layout.symmetric, clip, levels: None, scales: layout.scales }
    }

    /// The grid for one group of finite weights. `importance`, one factor a weight, weighs the errors of the clip search;
    /// `None` weighs all alike.
    pub fn fit(&self, weights: &[f32], importance: Option<&[f32]>) -> Result<Grid, ScaleOverflow> {
        if let Some(levels) = &self.levels {
            return levels.fit((weights, importance), self.scales, self.clip.is_some());
        }
        let range = self.range(weights);
        let Some(full) = self.grid(range, 1.0)? else {
            let zero = if self.symmetric { self.bits.middle() } else { 0 };
            return Ok(Grid { scale: f16::ZERO, zero });
        };
        let Some(clip) = self.clip else { return Ok(full) };
        let importance = importance.unwrap_or(&[]);
        assert!(importance.is_empty() || importance.len() == weights.len(), "one importance a weight");
        Ok(search(Simd::detect(), self, clip, range, weights, importance, full))
    }

    /// The range `(low, high)` that the unshrunken grid covers; contains 0.
    fn range(&self, weights: &[f32]) -> (f32, f32) {
        let low = weights.iter().fold(0.0f32, |m, &w| if w < m { w } else { m });
        let high = weights.iter().fold(0.0f32, |m, &w| if w > m { w } else { m });
        if self.symmetric {
            let extreme = high.max(-low);
            (-extreme, extreme)
        } else {
            (low, high)
        }
    }

    /// The grid for `shrink` times the range; `None` when the range is empty.
    #[inline(always)]
    fn grid(&self, (low, high): (f32, f32), shrink: f32) -> Result<Option<Grid>, ScaleOverflow> {
        if low == high {
            return Ok(None);
        }
        let max_code = f32::from(self.bits.max_code());
        let exact = shrink * (high - low) / max_code;
        let stored = if shrink == 1.0 { self.scales.above(exact) } else { self.scales.nearest(exact) };
        let mut scale = stored.ok_or(ScaleOverflow { scale: exact })?;
        if scale == f16::ZERO {
            scale = self.scales.least();
        }
        let zero = if self.symmetric {
            self.bits.middle()
        } else {
            round_within(-low * shrink / scale.to_f32(), 0.0, max_code) as u8
        };
        Ok(Some(Grid { scale, zero }))
    }
}

/// Runs the search with the instructions of `simd`. `full` is the grid of the whole range.
fn search(
    simd: Simd,
    rule: &GridRule,
    clip: ClipSearch,
    range: (f32, f32),
    weights: &[f32],
    importance: &[f32],
    full: Grid,
) -> Grid {
    match simd {
        // SAFETY: `Simd::detect` found AVX-512 F, AVX2 and FMA on this processor.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => unsafe { search_avx512(rule, clip, range, weights, importance, full) },
        // SAFETY: `Simd::detect` found AVX2 and FMA on this processor.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { search_avx2(rule, clip, range, weights, importance, full) },
        Simd::Portable => search_loop::<false>(rule, clip, range, weights, importance, full),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn search_avx512(r: &GridRule, c: ClipSearch, range: (f32, f32), w: &[f32], i: &[f32], full: Grid) -> Grid {
    search_loop::<true>(r, c, range, w, i, full)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn search_avx2(r: &GridRule, c: ClipSearch, range: (f32, f32), w: &[f32], i: &[f32], full: Grid) -> Grid {
    search_loop::<true>(r, c, range, w, i, full)
}

#[inline(always)]
fn search_loop<const FUSED: bool>(
    rule: &GridRule,
    clip: ClipSearch,
    range: (f32, f32),
    weights: &[f32],
    importance: &[f32],
    full: Grid,
) -> Grid {
    let (mut best, mut best_penalty, mut last) = (full, f32::INFINITY, None);
    for shrink in clip.factors() {
        // A shrunken grid's scale is stored when the full one's is; that of a grown one may be too large.
        let Ok(Some(grid)) = rule.grid(range, shrink) else { continue };
        // Neighbours often have the same scale of 8 bits, and no grid is better than itself.
        if last.replace(grid) == Some(grid) {
            continue;
        }
        let line = Line::new(grid, rule.bits);
        // Errors are summed in units of the scale, so the bound is brought to these units.
        let unit = power::<FUSED>(line.scale, clip.norm);
        let bound = best_penalty / unit;
        let sum = match (importance.is_empty(), clip.norm == 2.0) {
            (true, false) => penalty::<FUSED, false, false>(weights, weights, line, clip.norm, bound),
            (true, true) => penalty::<FUSED, false, true>(weights, weights, line, clip.norm, bound),
            (false, false) => penalty::<FUSED, true, false>(weights, importance, line, clip.norm, bound),
            (false, true) => penalty::<FUSED, true, true>(weights, importance, line, clip.norm, bound),
        };
        if sum < bound {
            (best, best_penalty) = (grid, sum * unit);
        }
    }
    best
}

/// `sum importance |w / scale - q|^norm` (`norm` is 2 where `SQUARED`), given up (as some value not below `bound`) once it reaches `bound`.
#[inline(always)]
fn penalty<const FUSED: bool, const WEIGHTED: bool, const SQUARED: bool>(
    weights: &[f32],
    importance: &[f32],
    line: Line,
    norm: f32,
    bound: f32,
) -> f32 {
    /// Weights between two looks at the bound.
    const STRIDE: usize = 4 * LANES;
    let mut sums = [0.0f32; LANES];
    for (w, imp) in weights.chunks(STRIDE).zip(importance.chunks(STRIDE)) {
        for (w, imp) in w.chunks(LANES).zip(imp.chunks(LANES)) {
            if let (Ok(w), Ok(imp)) = (w.try_into(), imp.try_into()) {
                add_penalties::<FUSED, WEIGHTED, SQUARED>(w, imp, line, norm, &mut sums);
            } else {
                // Zeros cost nothing on a grid that contains 0.
                let (mut tail, mut tail_imp) = ([0.0f32; LANES], [0.0f32; LANES]);
                tail[..w.len()].copy_from_slice(w);
                tail_imp[..w.len()].copy_from_slice(imp);
                add_penalties::<FUSED, WEIGHTED, SQUARED>(&tail, &tail_imp, line, norm, &mut sums);
            }
        }
        let total = sum_lanes(&sums);
        if total >= bound {
            return total;
        }
    }
    sum_lanes(&sums)
}

#[inline(always)]
fn add_penalties<const FUSED: bool, const WEIGHTED: bool, const SQUARED: bool>(
    weights: &[f32; LANES],
    importance: &[f32; LANES],
    line: Line,
    norm: f32,
    sums: &mut [f32; LANES],
) {
    for i in 0..LANES {
        let t = weights[i] * line.inverse;
        let error = (t - round_within(t, line.low, line.high)).abs();
        let p = if SQUARED { error * error } else { power::<FUSED>(error, norm) };
        sums[i] += if WEIGHTED { p * importance[i] } else { p };
    }
}

#[inline(always)]
fn sum_lanes(sums: &[f32; LANES]) -> f32 {
    let mut sums = *sums;
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            sums[i] += sums[i + n];
        }
        n /= 2;
    }
    sums[0]
}

/// `x^exponent` for `x >= 0` to about 1e-4 relative, without branches; below `2^-25` as if `x` were that.
///
/// `log2` by a polynomial of degree 5 over `[1/sqrt 2, sqrt 2)` and `exp2` by one of degree 3 over `[-1/2, 1/2]`, both
/// minimax fits; the result stays within f32 for the exponents (0 to 4) and errors (below 2^24) that occur here.
#[inline(always)]
fn power<const FUSED: bool>(x: f32, exponent: f32) -> f32 {
    const SMALLEST: f32 = 1.0 / (1 << 25) as f32;
    const HALF_SQRT: u32 = 0x3f35_04f3;
    let x = if x > SMALLEST { x } else { SMALLEST };
    let whole = (x.to_bits().wrapping_sub(HALF_SQRT) as i32) >> 23;
    let f = f32::from_bits(x.to_bits().wrapping_sub((whole as u32) << 23)) - 1.0;
    let mut p = 0.252_660_3;
    p = multiply_add::<FUSED>(p, f, -0.394_575_37);
    p = multiply_add::<FUSED>(p, f, 0.486_686_15);
    p = multiply_add::<FUSED>(p, f, -0.720_241_8);
    p = multiply_add::<FUSED>(p, f, 1.442_578);
    let y = multiply_add::<FUSED>(p, f, whole as f32) * exponent;
    // The sum's low bits hold the rounded integer; shifted into the exponent they multiply by its power of two.
    const MAGIC: f32 = 12_582_912.0;
    let rounded = y + MAGIC;
    let g = y - (rounded - MAGIC);
    let mut e = 0.055_171_67;
    e = multiply_add::<FUSED>(e, g, 0.242_611_12);
    e = multiply_add::<FUSED>(e, g, 0.693_261);
    e = multiply_add::<FUSED>(e, g, 0.999_928_06);
    f32::from_bits(e.to_bits().wrapping_add(rounded.to_bits() << 23))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_tensor::{Group, Rng};

    #[test]
    fn power_is_close() {
        for exponent in [1.0f32, 2.0, 2.4, 3.0, 4.0] {
            for i in 0..40_000 {
                let x = (2.0f32).powf(-24.0 + 34.0 * i as f32 / 40_000.0);
                let exact = f64::from(x).powf(f64::from(exponent));
                for found in [power::<true>(x, exponent), power::<false>(x, exponent)] {
                    let relative = (f64::from(found) / exact - 1.0).abs();
                    assert!(relative < 1.5e-4, "{x}^{exponent}: {found}, off by {relative}");
                }
            }
            assert!(power::<true>(0.0, exponent) <= power::<true>(3e-8, exponent));
        }
    }

    /// All instruction sets of this processor choose the same grids; the portable one may differ by rounding alone.
    #[test]
    fn instruction_sets_agree() {
        let mut rng = Rng::new(5);
        for n in [1usize, 15, 16, 17, 64, 100, 128, 576] {
            let weights: Vec<f32> = (0..n).map(|_| rng.normal()).collect();
            let clip = Some(ClipSearch::default());
            let rule = GridRule { clip, ..GridRule::new(Layout::new(Bits::Three, Group::Row), Clip::None) };
            let (clip, range) = (ClipSearch::default(), rule.range(&weights));
            let full = rule.grid(range, 1.0).unwrap().unwrap();
            let run = |simd| search(simd, &rule, clip, range, &weights, &[], full);
            let portable = run(Simd::Portable);
            #[cfg(target_arch = "x86_64")]
            if Simd::detect() == Simd::Avx512 {
                assert_eq!(run(Simd::Avx512), run(Simd::Avx2), "{n} weights");
            }
            let ratio = run(Simd::detect()).scale.to_f32() / portable.scale.to_f32();
            assert!((0.9..1.1).contains(&ratio), "{n} weights: {ratio}");
        }
    }
}
