//! Codebook grids: `value = level[code] * scale`, with levels for a whole matrix and a scale for each group.
//!
//! Rotated weights are nearly Gaussian, and the best 4, 8 or 16 values for a Gaussian are no multiples of a step (Lloyd 1982,
//! Max 1960): at 2 bits they leave 0.1175 of the variance, where a fitted affine grid leaves about 0.13 in groups of 128 and more
//! in longer ones. So one scale a row is enough, and zeros are not needed.
//!
//! The levels begin as those of the unit Gaussian. Then, in turn: groups get the scale with the least squared error, and Lloyd's
//! iterations move the levels to the means of the scaled weights that are nearest to them, each weight counting as much as
//! its error would: by the square of its scale, and by the Hessian's diagonal where there is one. Levels are rounded to f16
//! before any code is chosen, those of 2 bits to multiples of a power of two that make them integers of one byte for the kernels: that
//! adds 0.02 % to the error of a Gaussian, where with 3 and 4 bits it would add 0.2 and 0.9 %.

use super::grid::{Grid, ScaleOverflow};
use super::rows::kept_within;
use crate::ElementMask;
use crate::simd::LANES;
use half::f16;
use rayon::prelude::*;
use tailorq_tensor::{Bits, Layout, Matrix, ScaleBits, SharedBytes};

/// The most levels, those of 4 bits.
const MOST: usize = 16;

/// Positive levels of the best quantizers of a unit Gaussian (Max 1960, table 1), ascending.
const GAUSSIAN_4: [f32; 2] = [0.4528, 1.510];
const GAUSSIAN_8: [f32; 4] = [0.2451, 0.7560, 1.344, 2.152];
const GAUSSIAN_16: [f32; 8] = [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733];

/// Rows that the levels are fitted to: a sample, evenly spread.
const SAMPLE_ROWS: usize = 512;
/// Rows of a task.
const TASK_ROWS: usize = 32;
/// Turns of scales and levels.
const TURNS: usize = 3;
/// Lloyd's iterations of a turn.
const ITERATIONS: usize = 40;
/// Scaled weights from `-RANGE` to `RANGE` are counted in as many bins; others in the first and the last.
const BINS: usize = 2048;
const RANGE: f32 = 8.0;
/// Scales that are tried first, in shares of the group's root mean square.
const TRIED: [f32; 9] = [0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5];
/// Turns of codes and their best scale after that.
const REFINED: usize = 4;

/// The levels of one matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Levels {
    /// Ascending; past the last as the last.
    values: [f32; MOST],
    /// Above `bounds[i]` it is level `i + 1` or a higher one; infinite past the last.
    bounds: [f32; MOST],
    n: usize,
}

impl Levels {
    /// The best levels of a unit Gaussian, for 2, 3 or 4 bits.
    pub fn gaussian(bits: Bits) -> Self {
        let positive: &[f32] = match bits {
            Bits::Two => &GAUSSIAN_4,
            Bits::Three => &GAUSSIAN_8,
            _ => &GAUSSIAN_16,
        };
        let all: Vec<f32> = positive.iter().rev().map(|l| -l).chain(positive.iter().copied()).collect();
        Levels::new(&all)
    }

    /// At most 16 ascending levels, each rounded to f16; four of them, to a multiple of the step that counts their range in a byte.
    fn new(levels: &[f32]) -> Self {
        let n = levels.len();
        let range = levels[n - 1] - levels[0];
        let step = (range / 254.0).log2().ceil().exp2();
        let is_stepped = n == 4 && step.is_normal();
        let round = |l: f32| f16::from_f32(if is_stepped { (l / step).round() * step } else { l }).to_f32();
        let values: [f32; MOST] = std::array::from_fn(|i| round(levels[i.min(n - 1)]));
        let bound = |i: usize| if i + 1 < n { 0.5 * (values[i] + values[i + 1]) } else { f32::INFINITY };
        Levels { values, bounds: std::array::from_fn(bound), n }
    }

    /// The levels, ascending.
    pub fn values(&self) -> &[f32] {
        &self.values[..self.n]
    }

    /// As a packed matrix holds them.
    pub(super) fn stored(&self) -> SharedBytes {
        SharedBytes::from_vec(self.values().iter().map(|l| f16::from_f32(*l)).collect::<Vec<_>>())
    }

    /// The code of the level nearest to `t`, the lower of two.
    #[inline(always)]
    pub(super) fn code(&self, t: f32) -> u8 {
        self.bounds.iter().map(|b| u8::from(t > *b)).sum()
    }

    /// The level of a code.
    #[inline(always)]
    pub(super) fn value(&self, code: u8) -> f32 {
        self.values[usize::from(code) % MOST]
    }

    /// The scale of a group with the least `sum importance (w - scale level)^2`, one of those that are stored; without a search
    /// the root mean square.
    pub(super) fn fit(
        &self,
        (weights, importance): (&[f32], Option<&[f32]>),
        stored: ScaleBits,
        searches: bool,
    ) -> Result<Grid, ScaleOverflow> {
        let energy: f64 = weights.iter().map(|w| f64::from(*w) * f64::from(*w)).sum();
        let rms = (energy / weights.len().max(1) as f64).sqrt() as f32;
        if rms == 0.0 && energy == 0.0 {
            return Ok(Grid { scale: f16::ZERO, zero: 0 });
        }
        let plain = as_scale(stored, rms)?;
        if !searches {
            return Ok(Grid { scale: plain, zero: 0 });
        }
        let importance = importance.unwrap_or(&[]);
        let sums = |scale: f16| match self.n {
            4 => sums::<4>(self, weights, importance, scale),
            8 => sums::<8>(self, weights, importance, scale),
            _ => sums::<16>(self, weights, importance, scale),
        };
        let mut best = (plain, sums(plain));
        for share in TRIED {
            // One that overflows is no candidate.
            let Ok(scale) = as_scale(stored, rms * share) else { continue };
            let found = sums(scale);
            if found.error < best.1.error {
                best = (scale, found);
            }
        }
        for _ in 0..REFINED {
            // The best scale for the codes as they are; never negative, since codes have the signs of their weights.
            let Sums { cross, energy, .. } = best.1;
            let Ok(scale) = as_scale(stored, (cross / energy) as f32) else { break };
            let found = sums(scale);
            if energy == 0.0 || cross <= 0.0 || found.error >= best.1.error {
                break;
            }
            best = (scale, found);
        }
        Ok(Grid { scale: best.0, zero: 0 })
    }

    /// Levels for a whole matrix, see the module. `importance` is one factor a column; `kept` elements have no say.
    pub(super) fn of_matrix(
        layout: Layout,
        weights: &Matrix,
        kept: Option<&ElementMask>,
        importance: Option<&[f32]>,
    ) -> Result<Self, ScaleOverflow> {
        let group_len = layout.group.len(weights.cols());
        let step = weights.rows().div_ceil(SAMPLE_ROWS).max(1);
        let rows: Vec<usize> = (0..weights.rows()).step_by(step).collect();
        let mut levels = Levels::gaussian(layout.bits);
        for _ in 0..TURNS {
            let tasks: Vec<Result<Histogram, ScaleOverflow>> = rows
                .par_chunks(TASK_ROWS)
                .map(|rows| {
                    let mut counts = Histogram::default();
                    for &r in rows {
                        for (g, group) in weights.row(r).chunks(group_len).enumerate() {
                            let range = g * group_len..g * group_len + group.len();
                            let importance = importance.map(|i| &i[range.clone()]);
                            let kept: Vec<usize> = kept_within(kept, r, range).collect();
                            counts.add((&levels, layout.scales), (group, importance), &kept)?;
                        }
                    }
                    Ok(counts)
                })
                .collect();
            let mut all = Histogram::default();
            for counts in tasks {
                all.merge(&counts?);
            }
            levels = all.lloyd(levels);
        }
        Ok(levels)
    }
}

/// The nearest stored scale that is not 0.
fn as_scale(stored: ScaleBits, exact: f32) -> Result<f16, ScaleOverflow> {
    match stored.nearest(exact) {
        Some(scale) if scale == f16::ZERO => Ok(stored.least()),
        Some(scale) => Ok(scale),
        None => Err(ScaleOverflow { scale: exact }),
    }
}

/// What the weights of a group make with their nearest levels `l` at one scale.
#[derive(Clone, Copy)]
struct Sums {
    /// `sum importance (w - scale l)^2`.
    error: f64,
    /// `sum importance w l`.
    cross: f64,
    /// `sum importance l^2`.
    energy: f64,
}

/// One partial sum a lane, whatever the width of a vector, so that every instruction set adds alike.
fn sums<const N: usize>(levels: &Levels, weights: &[f32], importance: &[f32], scale: f16) -> Sums {
    let (scale, inverse) = (scale.to_f32(), 1.0 / scale.to_f32());
    let (mut error, mut cross, mut energy) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    let mut add = |w: &[f32; LANES], importance: &[f32; LANES]| {
        for i in 0..LANES {
            let t = w[i] * inverse;
            let mut level = levels.values[0];
            for k in 1..N {
                level = if t > levels.bounds[k - 1] { levels.values[k] } else { level };
            }
            let e = w[i] - scale * level;
            error[i] += importance[i] * e * e;
            cross[i] += importance[i] * w[i] * level;
            energy[i] += importance[i] * level * level;
        }
    };
    for (c, chunk) in weights.chunks(LANES).enumerate() {
        let (mut w, mut factors) = ([0.0; LANES], [0.0; LANES]);
        w[..chunk.len()].copy_from_slice(chunk);
        match importance.get(c * LANES..c * LANES + chunk.len()) {
            Some(importance) if !importance.is_empty() => factors[..chunk.len()].copy_from_slice(importance),
            _ => factors[..chunk.len()].fill(1.0),
        }
        add(&w, &factors);
    }
    let total = |lanes: [f32; LANES]| lanes.iter().map(|l| f64::from(*l)).sum();
    Sums { error: total(error), cross: total(cross), energy: total(energy) }
}

/// Scaled weights by value: how much they count, and their sum weighed by it.
struct Histogram {
    bins: Vec<(f64, f64)>,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { bins: vec![(0.0, 0.0); BINS] }
    }
}

impl Histogram {
    /// Counts a group at the scale that fits the levels best; without its `kept` places.
    fn add(
        &mut self,
        (levels, stored): (&Levels, ScaleBits),
        (weights, importance): (&[f32], Option<&[f32]>),
        kept: &[usize],
    ) -> Result<(), ScaleOverflow> {
        let is_counted = |i: &usize| kept.binary_search(i).is_err();
        let rest = |values: &[f32]| -> Vec<f32> { (0..values.len()).filter(is_counted).map(|i| values[i]).collect() };
        let (weights, importance) = (rest(weights), importance.map(rest));
        let scale = levels.fit((&weights, importance.as_deref()), stored, true)?.scale.to_f32();
        if scale == 0.0 {
            return Ok(());
        }
        for (i, w) in weights.iter().enumerate() {
            let t = w / scale;
            let bin = ((t + RANGE) * (BINS as f32 / (2.0 * RANGE))).clamp(0.0, BINS as f32 - 1.0) as usize;
            let counts = f64::from(scale) * f64::from(scale) * importance.as_ref().map_or(1.0, |f| f64::from(f[i]));
            self.bins[bin].0 += counts;
            self.bins[bin].1 += counts * f64::from(t);
        }
        Ok(())
    }

    fn merge(&mut self, other: &Histogram) {
        for (bin, other) in self.bins.iter_mut().zip(&other.bins) {
            bin.0 += other.0;
            bin.1 += other.1;
        }
    }

    /// Lloyd's iterations over the bins, from these levels on. A level that is nearest to nothing stays where it is.
    fn lloyd(&self, levels: Levels) -> Levels {
        let means: Vec<(f64, f64)> = self.bins.iter().filter(|b| b.0 > 0.0).map(|b| (b.0, b.1 / b.0)).collect();
        let mut values: Vec<f64> = levels.values().iter().map(|l| f64::from(*l)).collect();
        for _ in 0..ITERATIONS {
            let mut cells = vec![(0.0, 0.0); values.len()];
            let mut nearest = 0;
            for &(counts, mean) in &means {
                // Bins ascend, and with them the nearest level.
                while nearest + 1 < values.len() && mean > 0.5 * (values[nearest] + values[nearest + 1]) {
                    nearest += 1;
                }
                cells[nearest].0 += counts;
                cells[nearest].1 += counts * mean;
            }
            for (value, cell) in values.iter_mut().zip(&cells).filter(|(_, cell)| cell.0 > 0.0) {
                *value = cell.1 / cell.0;
            }
            // One that stayed may have been passed by its neighbour.
            values.sort_by(f64::total_cmp);
        }
        Levels::new(&values.iter().map(|v| *v as f32).collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_tensor::{Group, Rng};

    fn symmetric(bits: Bits, group: Group) -> Layout {
        Layout { symmetric: true, ..Layout::new(bits, group) }
    }

    fn relative_error(weights: &Matrix, levels: &Levels, group_len: usize, stored: ScaleBits) -> f64 {
        let (mut error, mut energy) = (0.0, 0.0);
        for group in weights.data().chunks(group_len) {
            let scale = levels.fit((group, None), stored, true).unwrap().scale.to_f32();
            for w in group {
                error += f64::from(w - scale * levels.value(levels.code(w / scale))).powi(2);
                energy += f64::from(*w).powi(2);
            }
        }
        error / energy
    }

    /// The errors that the literature gives for a Gaussian, and that fitted levels stay there.
    #[test]
    fn gaussian_weights_leave_the_known_error() {
        let mut rng = Rng::new(1);
        let w = Matrix::from_vec(64, 512, (0..64 * 512).map(|_| 3.0 * rng.normal()).collect());
        for (bits, expected) in [(Bits::Two, 0.1175), (Bits::Three, 0.03454), (Bits::Four, 0.009497)] {
            let layout = |scales| Layout { scales, ..symmetric(bits, Group::Row) };
            let fitted = ScaleBits::ALL.map(|s| (s, Levels::of_matrix(layout(s), &w, None, None).unwrap()));
            for (stored, levels) in fitted.into_iter().chain(ScaleBits::ALL.map(|s| (s, Levels::gaussian(bits)))) {
                let found = relative_error(&w, &levels, 512, stored);
                // A scale of its own for each row of the sample gains a little.
                assert!((0.91..1.01).contains(&(found / expected)), "{bits:?}: {found}, {levels:?}");
            }
        }
    }

    #[test]
    fn levels_follow_weights_that_are_no_gaussian() {
        let mut rng = Rng::new(2);
        let places = [-3.0f32, -1.0, 0.6, 2.0];
        let w: Vec<f32> = (0..32 * 128).map(|_| places[rng.below(4)] + 0.01 * rng.normal()).collect();
        let w = Matrix::from_vec(32, 128, w);
        let fitted = Levels::of_matrix(symmetric(Bits::Two, Group::Inputs(128)), &w, None, None).unwrap();
        let found = relative_error(&w, &fitted, 128, ScaleBits::Sixteen);
        assert!(
            found < 0.002 && found < 0.05 * relative_error(&w, &Levels::gaussian(Bits::Two), 128, ScaleBits::Sixteen),
            "{found}"
        );
    }

    #[test]
    fn codes_are_the_nearest_levels() {
        let levels = Levels::gaussian(Bits::Three);
        for i in -400..400 {
            let t = i as f32 * 0.01;
            let found = (t - levels.value(levels.code(t))).abs();
            let least = levels.values().iter().fold(f32::INFINITY, |m, l| m.min((t - l).abs()));
            assert!(found <= least + 1e-6, "{t}");
        }
        assert_eq!((levels.code(f32::MAX), levels.code(f32::MIN), levels.code(f32::NAN)), (7, 0, 0));
    }

    #[test]
    fn four_levels_are_integers_of_a_byte() {
        for levels in
            [[-1.51, -0.4528, 0.4528, 1.51], [-3.01, -1.0, 0.6, 2.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.5]]
        {
            let found = Levels::new(&levels);
            let range = found.values()[3] - found.values()[0];
            // The largest power of two of which all are multiples, up to the range itself.
            let step =
                (-24..4).map(|e| (e as f32).exp2()).rfind(|s| found.values().iter().all(|l| l % s == 0.0)).unwrap();
            assert!(range / step <= 255.0, "{found:?}");
            assert!(
                found.values().iter().zip(levels).all(|(f, l)| (f - l).abs() <= 0.5 / 127.0 * range.max(0.1)),
                "{found:?}"
            );
        }
    }

    #[test]
    fn awkward_groups_have_scales() {
        let levels = Levels::gaussian(Bits::Two);
        for stored in ScaleBits::ALL {
            let fit = |weights: &[f32]| levels.fit((weights, None), stored, true);
            assert_eq!(fit(&[0.0; 5]).unwrap().scale, f16::ZERO);
            assert_eq!(fit(&[]).unwrap().scale, f16::ZERO);
            assert!(fit(&[1e-9, 1e-12]).unwrap().scale > f16::ZERO);
            assert!(fit(&[1e30]).is_err());
        }
        let zeros = Matrix::zeros(3, 40);
        let found = Levels::of_matrix(symmetric(Bits::Four, Group::Row), &zeros, None, None).unwrap();
        assert_eq!(found, Levels::gaussian(Bits::Four));
    }
}
