//! Many tokens with AVX-512 VNNI: panels of 32 weight rows, unpacked once, times all tokens.
//!
//! A *unit* is four weights of a row that one 32-bit lane multiplies and adds: a word of codes has as many units as planes.
//! In a panel the sixteen rows of a register are its lanes, so that four activations of a token, broadcast from memory,
//! meet sixteen rows at once, sums stay in their lanes over a whole group of activations, and scales of the weights are
//! vectors. Two registers of rows by six tokens are computed at a time.

use super::activations::{GROUP, Order};
use super::avx512::first_lanes;
use super::base::Base;
use super::codes512::{Codes, with_codes};
use super::corrections_many::{self, Corrected};
use crate::cpu::tile::Tile;
use rayon::prelude::*;
use std::arch::x86_64::*;
use tailorq_tensor::{Bits, Layout};

/// Rows of a register.
pub(super) const ROWS: usize = 16;
/// Registers of rows of a panel.
pub(super) const REGISTERS: usize = 2;
/// Rows of a panel.
pub(super) const PANEL: usize = ROWS * REGISTERS;
/// Tokens that are computed at once.
const TOKENS: usize = 6;
/// Units of a group of activations: 8 in every order.
const UNITS: usize = GROUP / 4;

/// Sixteen 32-bit lanes of codes, four a lane, one lane a row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A number for each of sixteen rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct OfRows(pub(super) [f32; ROWS]);

/// Some tokens, quantized, their units one after the other.
#[derive(Default)]
pub(super) struct Tokens {
    n: usize,
    /// Groups of activations in a row.
    groups: usize,
    /// Groups of weights in a row.
    weight_groups: usize,
    /// `[n, groups, UNITS]`, four activations each.
    units: Vec<[i8; 4]>,
    /// `[n, groups]`.
    scales: Vec<f32>,
    /// `[n, weight_groups]`: the sum of a weight group's activations as quantized.
    sums: Vec<f32>,
}

impl Tokens {
    /// Quantizes `x`, `[n, cols]`, as `Quantized` does.
    ///
    /// # Safety
    /// The processor has AVX-512 with VNNI, BW, VL and VBMI.
    pub(super) unsafe fn fill(&mut self, x: &[f32], cols: usize, layout: Layout) {
        let order = Order::of(layout.bits);
        self.n = x.len() / cols;
        self.groups = cols.div_ceil(GROUP);
        self.weight_groups = layout.group.count(cols);
        self.units.resize(self.n * self.groups * UNITS, [0; 4]);
        self.scales.resize(self.n * self.groups, 0.0);
        self.sums.resize(self.n * self.weight_groups, 0.0);
        let group = layout.group.len(cols);
        x.par_chunks_exact(cols)
            .zip(self.units.par_chunks_exact_mut(self.groups * UNITS))
            .zip(self.scales.par_chunks_exact_mut(self.groups))
            .zip(self.sums.par_chunks_exact_mut(self.weight_groups))
            .for_each(|(((x, units), scales), sums)| {
                // SAFETY: panels run only where the processor has the features; the buffers were made for the row.
                unsafe { super::round512::units(x, order, group, units, scales, sums) }
            });
    }
}

/// `y[t, i] = (base + corrections)[first + i] x[t]` for all of `y`, whose rows are all tokens of `x` and which is at most [`PANEL`] wide.
/// What `panel` held before does not matter.
///
/// # Safety
/// The processor has AVX-512 with VNNI, BW, VL and VBMI; the rows exist; the panel was made for `base` and `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
pub(super) unsafe fn rows(
    panel: &mut Panel,
    base: &Base<'_>,
    x: &Tokens,
    corrected: Corrected<'_>,
    first: usize,
    y: &mut Tile<'_>,
) {
    // A panel that is not full repeats its last row.
    let last = y.cols() - 1;
    let rows = std::array::from_fn(|r| first + r.min(last));
    // SAFETY: the processor has the features; the panel has the units and groups that `x` has.
    unsafe {
        with_codes!(false, base, |codes| panel.read(codes, base, &rows));
        if let Some((corrections, plain)) = corrected {
            panel.added.resize(plain.n_padded() * REGISTERS, OfRows([0.0; ROWS]));
            corrections_many::fill(corrections, plain, first..first + y.cols(), &mut panel.added);
        }
        for t in (0..x.n).step_by(TOKENS) {
            match panel.wide.is_empty() {
                true => panel.multiply::<false>(x, t, y),
                false => panel.multiply::<true>(x, t, y),
            }
        }
    }
}

/// 32 rows of weights, a code a byte: a buffer that takes one panel after the other of the same matrix.
pub(super) struct Panel {
    /// `[groups * UNITS, REGISTERS]`; units past the last word are 0.
    codes: Vec<Line>,
    /// The second bytes of codes that have one, else empty.
    wide: Vec<Line>,
    /// What sums are multiplied with in the end.
    factor: f32,
    /// `[weight_groups, REGISTERS]`.
    scales: Vec<OfRows>,
    /// `[weight_groups, REGISTERS]`: scale times zero.
    offsets: Vec<OfRows>,
    /// Groups of activations in a group of weights.
    ratio: usize,
    /// `[tokens, REGISTERS]`: what corrections add; empty without any.
    added: Vec<OfRows>,
}

impl Panel {
    pub(super) fn new(base: &Base<'_>, x: &Tokens) -> Self {
        let n = x.groups * UNITS * REGISTERS;
        let is_wide = base.levels.is_some_and(|levels| levels.is_wide);
        Panel {
            codes: vec![Line([0; 64]); n],
            wide: vec![Line([0; 64]); if is_wide { n } else { 0 }],
            factor: base.factor(),
            scales: vec![OfRows([0.0; ROWS]); x.weight_groups * REGISTERS],
            offsets: vec![OfRows([0.0; ROWS]); x.weight_groups * REGISTERS],
            ratio: base.layout.group.len(base.cols).div_ceil(GROUP),
            added: Vec::new(),
        }
    }

    #[inline(always)]
    unsafe fn read<C: Codes>(&mut self, codes: C, base: &Base<'_>, rows: &[usize; PANEL]) {
        for (register, rows) in rows.as_chunks::<ROWS>().0.iter().enumerate() {
            for word in 0..base.words_per_row {
                let words: [u32; ROWS] = rows.map(|r| base.words[r * base.words_per_row + word]);
                let highs: [u32; ROWS] = match C::HIGHS {
                    true => rows.map(|r| u32::from(base.highs[r * base.words_per_row + word])),
                    false => [0; ROWS],
                };
                // SAFETY: inlined into a function with the features; arrays of 64 bytes are read and written.
                unsafe {
                    let words = _mm512_loadu_si512(words.as_ptr().cast());
                    let highs = _mm512_loadu_si512(highs.as_ptr().cast());
                    store(&mut self.codes, codes.planes(words, highs), word, register, C::PLANES);
                    if C::WIDE {
                        store(&mut self.wide, codes.wide_planes(words, highs), word, register, C::PLANES);
                    }
                }
            }
            for g in 0..base.groups {
                let (scales, offsets) = (&mut self.scales, &mut self.offsets);
                let at = g * REGISTERS + register;
                for (i, &r) in rows.iter().enumerate() {
                    let scale = base.scale(r, g);
                    scales[at].0[i] = scale;
                    offsets[at].0[i] = scale * base.zero(r, g);
                }
            }
        }
    }

    /// Six tokens from `first` on times as many rows as `y` has columns.
    #[inline(always)]
    unsafe fn multiply<const WIDE: bool>(&self, x: &Tokens, first: usize, y: &mut Tile<'_>) {
        let n = y.cols();
        // The last block repeats its last token.
        let tokens: [usize; TOKENS] = std::array::from_fn(|t| (first + t).min(x.n - 1));
        // SAFETY: inlined into a function with the features; tokens, groups and units exist; stores are masked to the columns of `y`.
        unsafe {
            let units = tokens.map(|t| x.units.as_ptr().add(t * x.groups * UNITS));
            let scales = tokens.map(|t| x.scales.as_ptr().add(t * x.groups));
            let sums = tokens.map(|t| x.sums.as_ptr().add(t * x.weight_groups));
            let mut totals = [[_mm512_setzero_ps(); TOKENS]; REGISTERS];
            for wg in 0..x.weight_groups {
                // No closures: the processor's features reach only what is inlined, which `from_fn` may not be.
                let w_scales = [of_rows(&self.scales, wg, 0), of_rows(&self.scales, wg, 1)];
                for g in wg * self.ratio..((wg + 1) * self.ratio).min(x.groups) {
                    let mut dots = [[_mm512_setzero_si512(); TOKENS]; REGISTERS];
                    let mut wide = dots;
                    for u in g * UNITS..(g + 1) * UNITS {
                        let line = self.codes.as_ptr().add(u * REGISTERS);
                        let codes = [_mm512_load_si512(line.cast()), _mm512_load_si512(line.add(1).cast())];
                        let mut seconds = codes;
                        if WIDE {
                            let line = self.wide.as_ptr().add(u * REGISTERS);
                            seconds = [_mm512_load_si512(line.cast()), _mm512_load_si512(line.add(1).cast())];
                        }
                        for t in 0..TOKENS {
                            let x = _mm512_set1_epi32(units[t].add(u).cast::<i32>().read_unaligned());
                            for register in 0..REGISTERS {
                                dots[register][t] = _mm512_dpbusd_epi32(dots[register][t], codes[register], x);
                                if WIDE {
                                    wide[register][t] = _mm512_dpbusd_epi32(wide[register][t], seconds[register], x);
                                }
                            }
                        }
                    }
                    for t in 0..TOKENS {
                        let scale = _mm512_set1_ps(*scales[t].add(g));
                        for register in 0..REGISTERS {
                            let mut dots = dots[register][t];
                            if WIDE {
                                dots = _mm512_add_epi32(dots, _mm512_slli_epi32::<8>(wide[register][t]));
                            }
                            let values = _mm512_mul_ps(_mm512_cvtepi32_ps(dots), scale);
                            totals[register][t] = _mm512_fmadd_ps(values, w_scales[register], totals[register][t]);
                        }
                    }
                }
                for t in 0..TOKENS {
                    let sum = _mm512_set1_ps(*sums[t].add(wg));
                    for (register, totals) in totals.iter_mut().enumerate() {
                        totals[t] = _mm512_fnmadd_ps(of_rows(&self.offsets, wg, register), sum, totals[t]);
                    }
                }
            }
            for t in 0..TOKENS.min(x.n - first) {
                let to = y.row_mut(first + t).as_mut_ptr();
                for (register, totals) in totals.iter().enumerate() {
                    let mask = first_lanes(n.saturating_sub(register * ROWS));
                    let mut products = _mm512_mul_ps(totals[t], _mm512_set1_ps(self.factor));
                    if !self.added.is_empty() {
                        products = _mm512_add_ps(products, of_rows(&self.added, first + t, register));
                    }
                    _mm512_mask_storeu_ps(to.wrapping_add(register * ROWS), mask, products);
                }
            }
        }
    }
}

/// Register `register` of group (or token) `i`.
#[inline(always)]
unsafe fn of_rows(all: &[OfRows], i: usize, register: usize) -> __m512 {
    // SAFETY: inlined into a function with the features; the panel has the group.
    unsafe { _mm512_load_ps(all.as_ptr().add(i * REGISTERS + register).cast()) }
}

/// The planes of word `word` of sixteen rows into their lines.
#[inline(always)]
unsafe fn store(lines: &mut [Line], planes: [__m512i; 4], word: usize, register: usize, n_planes: usize) {
    for (p, plane) in planes.into_iter().enumerate().take(n_planes) {
        let line = &mut lines[(word * n_planes + p) * REGISTERS + register];
        // SAFETY: inlined into a function with the features; a line is 64 aligned bytes.
        unsafe { _mm512_store_si512(line.0.as_mut_ptr().cast(), plane) }
    }
}
