//! The column loop of one row's part of a block, tile by tile.

use super::super::feedback::BLOCK;
use super::super::grid::{Line, ScaleOverflow};
use super::super::rows::corrected;
use super::settings::Salient;
use crate::simd::{LANES, Simd, multiply_add, round_within};
use half::f16;
use std::ops::Range;
use tailorq_tensor::{TILE, TileBits};

/// Neighbours that share a mean.
pub(super) const RUN: usize = 4;
/// The largest code of a mean and of a weight at 8 bits.
pub(super) const BYTE_MAX: f32 = 127.0;

/// How the weights of some columns are rounded.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rounding {
    /// To the base.
    Base,
    /// To the base as the tile's weights are when its first column comes, and the rest of each, when its own column comes,
    /// to multiples of `scale`. A base code that changed with the weight would leave a rest of up to a whole step, which
    /// the tile's scale does not reach.
    Corrected { scale: f32, max: f32 },
    /// To the mean, as a multiple of `scale`, of four neighbours as they are when the first of them comes.
    Means { scale: f32 },
    /// To a multiple of `scale`, with the base at 0.
    Byte { scale: f32 },
}

/// One row's part of a block on its way.
#[derive(Clone)]
pub(super) struct RowBlock {
    /// Weights with the errors of earlier columns taken in; each stays as it was when its column came.
    pub(super) weights: [f32; BLOCK],
    /// `(w - q) / U_jj`.
    pub(super) errors: [f32; BLOCK],
    /// What they become.
    pub(super) values: [f32; BLOCK],
    /// Of the base.
    pub(super) codes: [u8; BLOCK],
    /// Of tiles with a finer form: one a weight, or one a run at the run's first weight.
    pub(super) tile_codes: [i8; BLOCK],
    /// One a tile.
    pub(super) tile_scales: [f16; BLOCK / TILE],
    /// Weights that stay at 16 bits.
    pub(super) kept: [bool; BLOCK],
    /// Single weights at 8 bits, [`Rounding::Byte`].
    pub(super) bytes: [bool; BLOCK],
    /// What is added to a kept weight, or to one at 8 bits.
    pub(super) element_codes: [f16; BLOCK],
}

/// What the loop reads of the factor: the diagonal block of `U` without its diagonal, zero elsewhere, `[BLOCK, BLOCK]`, and
/// `1 / U_jj` of its columns.
#[derive(Clone, Copy)]
pub(super) struct FactorBlock<'a> {
    pub(super) upper: &'a [f32],
    pub(super) inverse_diagonal: &'a [f32],
}

impl RowBlock {
    pub(super) fn new(weights: &[f32]) -> Self {
        let mut state = RowBlock {
            weights: [0.0; BLOCK],
            errors: [0.0; BLOCK],
            values: [0.0; BLOCK],
            codes: [0; BLOCK],
            tile_codes: [0; BLOCK],
            tile_scales: [f16::ZERO; BLOCK / TILE],
            kept: [false; BLOCK],
            bytes: [false; BLOCK],
            element_codes: [f16::ZERO; BLOCK],
        };
        state.weights[..weights.len()].copy_from_slice(weights);
        state
    }

    /// Rounds `columns`, which lie within one tile.
    pub(super) fn columns(
        &mut self,
        simd: Simd,
        columns: Range<usize>,
        how: (Rounding, Line),
        factor: FactorBlock<'_>,
    ) {
        match simd {
            // SAFETY: `Simd::detect` found AVX-512 F, AVX2 and FMA on this processor.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe { columns_avx512(self, columns, how, factor) },
            // SAFETY: `Simd::detect` found AVX2 and FMA on this processor.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => unsafe { columns_avx2(self, columns, how, factor) },
            Simd::Portable => columns_loop::<false>(self, columns, how, factor),
        }
    }

    /// Fixes the base codes of a tile and the scale of its corrections, by the weights as they are now.
    pub(super) fn correct_tile(
        &mut self,
        tile: Range<usize>,
        line: Line,
        bits: TileBits,
    ) -> Result<Rounding, ScaleOverflow> {
        let mut largest = 0.0f32;
        for j in tile.clone() {
            let q = round_within(self.weights[j] * line.inverse, line.low, line.high);
            self.codes[j] = (q - line.low) as u8;
            let rest = (self.weights[j] - q * line.scale).abs();
            largest = if self.kept[j] { largest } else { largest.max(rest) };
        }
        let max = f32::from(bits.max_code());
        let scale = scale_for(largest, max)?;
        self.tile_scales[tile.start / TILE] = scale;
        Ok(Rounding::Corrected { scale: scale.to_f32(), max })
    }

    /// By weight of `tile`, after a trial run of the base over it: `e^2 - f^2` with the errors of the base and of the finer
    /// form that the tile would get. `byte_scale` is that of means and bytes.
    pub(super) fn gains(&self, tile: Range<usize>, salient: Salient, bits: TileBits, byte_scale: f32) -> [f32; TILE] {
        let mut gains = [0.0; TILE];
        let error = |j: usize| self.weights[j] - self.values[j];
        let largest = tile.clone().map(|j| error(j).abs()).fold(0.0, f32::max);
        let inverse = |scale: f32| if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let max = f32::from(bits.max_code());
        let fine = scale_for(largest, max).map_or(0.0, f16::to_f32);
        for j in tile.clone() {
            let finer = match salient {
                Salient::Corrections => error(j) - fine * round_within(error(j) * inverse(fine), -max - 1.0, max),
                Salient::EightBit => {
                    let q = round_within(self.weights[j] * inverse(byte_scale), -BYTE_MAX, BYTE_MAX);
                    self.weights[j] - q * byte_scale
                }
                Salient::Mean4 => self.weights[j] - self.mean(run_of(j, &tile)),
            };
            gains[j - tile.start] = error(j) * error(j) - finer * finer;
        }
        gains
    }

    /// The mean of the weights of a run that are not kept.
    #[inline(always)]
    fn mean(&self, run: Range<usize>) -> f32 {
        let (mut sum, mut n) = (0.0f32, 0.0f32);
        for j in run {
            if !self.kept[j] {
                sum += self.weights[j];
                n += 1.0;
            }
        }
        if n > 0.0 { sum / n } else { 0.0 }
    }
}

/// The run of a tile in which column `j` lies.
#[inline(always)]
fn run_of(j: usize, tile: &Range<usize>) -> Range<usize> {
    let start = j - (j - tile.start) % RUN;
    start..(start + RUN).min(tile.end)
}

/// The scale at which `max` steps reach `largest`.
pub(super) fn scale_for(largest: f32, max: f32) -> Result<f16, ScaleOverflow> {
    let exact = largest / max;
    let scale = f16::from_f32(exact);
    if !scale.is_finite() {
        return Err(ScaleOverflow { scale: exact });
    }
    // The smallest f16 instead of none at all.
    Ok(if scale == f16::ZERO && exact > 0.0 { f16::from_bits(1) } else { scale })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn columns_avx512(state: &mut RowBlock, columns: Range<usize>, how: (Rounding, Line), factor: FactorBlock<'_>) {
    columns_loop::<true>(state, columns, how, factor);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn columns_avx2(state: &mut RowBlock, columns: Range<usize>, how: (Rounding, Line), factor: FactorBlock<'_>) {
    columns_loop::<true>(state, columns, how, factor);
}

/// Rounds the columns one after another; each error goes to all later columns of the block at once.
#[inline(always)]
fn columns_loop<const FUSED: bool>(
    state: &mut RowBlock,
    columns: Range<usize>,
    (rounding, line): (Rounding, Line),
    factor: FactorBlock<'_>,
) {
    let inverse = |scale: f32| if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for j in columns.clone() {
        let weight = state.weights[j];
        let mut value = match rounding {
            Rounding::Base => {
                let q = round_within(weight * line.inverse, line.low, line.high);
                state.codes[j] = (q - line.low) as u8;
                q * line.scale
            }
            Rounding::Corrected { scale, max } => {
                let base = (f32::from(state.codes[j]) + line.low) * line.scale;
                let q = round_within((weight - base) * inverse(scale), -max - 1.0, max);
                state.tile_codes[j] = q as i8;
                base + q * scale
            }
            Rounding::Means { scale } => {
                let run = run_of(j, &columns);
                if j == run.start {
                    let q = round_within(state.mean(run.clone()) * inverse(scale), -BYTE_MAX, BYTE_MAX);
                    state.tile_codes[j] = q as i8;
                }
                f32::from(state.tile_codes[run.start]) * scale
            }
            Rounding::Byte { scale } => {
                let q = round_within(weight * inverse(scale), -BYTE_MAX, BYTE_MAX);
                (state.codes[j], state.tile_codes[j]) = (-line.low as u8, q as i8);
                q * scale
            }
        };
        if state.kept[j] {
            (state.element_codes[j], value) = corrected(weight, value);
        } else if state.bytes[j] {
            // The base code of 0, so that the stored number alone is the weight.
            state.codes[j] = -line.low as u8;
            state.element_codes[j] = f16::from_f32(state.byte_value(weight, j));
            value = state.element_codes[j].to_f32();
        }
        let error = (weight - value) * factor.inverse_diagonal[j];
        state.values[j] = value;
        state.errors[j] = error;
        // From the vector that holds column j on: the factor is zero up to j itself.
        let from = j / LANES * LANES;
        for (w, u) in state.weights[from..].iter_mut().zip(&factor.upper[j * BLOCK + from..(j + 1) * BLOCK]) {
            *w = multiply_add::<FUSED>(-error, *u, *w);
        }
    }
}

impl RowBlock {
    /// A single weight on the grid of bytes of its tile's scale.
    #[inline(always)]
    fn byte_value(&self, weight: f32, j: usize) -> f32 {
        let scale = self.tile_scales[j / TILE].to_f32();
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        round_within(weight * inverse, -BYTE_MAX, BYTE_MAX) * scale
    }
}
