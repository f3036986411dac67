//! AWQ (Lin et al. 2024, arXiv 2306.00978): inputs that are large on the calibration data get finer grids, by scaling their
//! weights up before rounding and dividing the scale out again; then every group's range is clipped where that helps its
//! part of the output. No error feedback. Simulated: the scales are divided out in the stored values.
//!
//! Departures from the authors' code. `sqrt(E x^2)`, which the Hessian's diagonal holds, stands in for `E |x|`. Each linear
//! searches its own scales, by the error of its own output, where the code shares them between linears of one input and
//! looks at the output of the attention or the feed-forward; so no earlier operation could take the scales in, and they are
//! counted. Inputs that were never active are not scaled. Grids contain 0 and have scales in f16, as all grids here.

use super::feedback::check_hessian;
use super::grid::{GridRule, Line};
use super::rows::at_group;
use super::simulated::{as_half, check_simulated, simulate_rows};
use super::stored::stored_at_half;
use super::{LayerStats, Needs, Note, Quantized, Quantizer, proxy_loss};
use crate::simd::round_within;
use crate::{Clip, LayerPlan, LayerSettings, QuantError};
use tailorq_kernels::{Device, Strided, StridedMut};
use tailorq_tensor::{Matrix, Slot};

/// Exponents `i / EXPONENTS`, from 0 on.
const EXPONENTS: usize = 20;
/// Ranges `1 - i / CLIP_STEPS`, down to a half.
const CLIP_STEPS: usize = 20;

/// Scaling by activations; of the settings it reads width and group, and `Clip::None` leaves out the clip search.
#[derive(Clone, Copy, Debug)]
pub struct Awq;

impl Quantizer for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn needs(&self) -> Needs {
        Needs { hessian: true, ..Needs::default() }
    }

    fn stores_half(&self) -> bool {
        true
    }

    /// The packed layout of the settings, and a scale of 16 bits an input.
    fn counted_bits(&self, (rows, cols): (usize, usize), settings: &LayerSettings) -> Option<u64> {
        Some(8 * settings.layout.bytes(rows, cols) as u64 + 16 * cols as u64)
    }

    fn quantize(
        &self,
        device: &dyn Device,
        weights: &Matrix,
        stats: &LayerStats<'_>,
        plan: &LayerPlan,
    ) -> Result<Quantized, QuantError> {
        check_simulated(self.name(), weights, plan)?;
        let hessian = stats.hessian.ok_or(QuantError::HessianMissing { quantizer: self.name() })?;
        let (rows, cols, layout) = (weights.rows(), weights.cols(), plan.settings.layout);
        assert_eq!((hessian.rows(), hessian.cols()), (cols, cols), "the Hessian belongs to another input");
        check_hessian(hessian)?;
        let rule = GridRule::new(layout, Clip::None);
        let group_len = layout.group.len(cols);
        let sizes: Vec<f32> =
            (0..cols).map(|i| (hessian.row(i)[i] / stats.n_tokens.max(1) as f32).max(0.0).sqrt()).collect();
        let mut best: Option<(f64, Vec<f32>)> = None;
        for i in 0..EXPONENTS {
            let job = Job { device, weights, hessian, rule, group_len, scales: scales(&sizes, i), clips: false };
            let loss = proxy_loss(device, weights, &job.run()?, hessian, stats.n_tokens);
            if best.as_ref().is_none_or(|(least, _)| loss < *least) {
                best = Some((loss, job.scales));
            }
        }
        let (_, scales) = best.expect("there is an exponent");
        // A clipped query or key shifts all of its scores together, which no error of one linear shows.
        let clips = plan.settings.clip != Clip::None && !matches!(stats.slot, Some(Slot::Q | Slot::K));
        let values = Job { device, weights, hessian, rule, group_len, scales, clips }.run()?;
        let n_dead = sizes.iter().filter(|s| **s == 0.0).count();
        let notes = if n_dead > 0 { vec![Note::DeadColumns { count: n_dead }] } else { Vec::new() };
        stored_at_half(device, weights, &values, stats, (notes, self.counted_bits((rows, cols), &plan.settings)))
    }
}

/// The scales for one exponent, f16; 1 for inputs that were never active.
fn scales(sizes: &[f32], exponent: usize) -> Vec<f32> {
    let exponent = exponent as f32 / EXPONENTS as f32;
    let raw = |size: f32| size.powf(exponent).max(1e-4);
    let active = || sizes.iter().filter(|s| **s > 0.0).map(|s| raw(*s));
    let (low, high) = active().fold((f32::INFINITY, 0.0f32), |(l, h), s| (l.min(s), h.max(s)));
    let middle = (low * high).sqrt();
    let scale = |size: f32| if size > 0.0 { as_half(raw(size) / middle) } else { 1.0 };
    sizes.iter().map(|&s| scale(s)).map(|s| if s.is_finite() && s > 0.0 { s } else { 1.0 }).collect()
}

/// One rounding of the whole matrix.
struct Job<'a> {
    device: &'a dyn Device,
    weights: &'a Matrix,
    hessian: &'a Matrix,
    rule: GridRule,
    group_len: usize,
    scales: Vec<f32>,
    clips: bool,
}

impl Job<'_> {
    fn run(&self) -> Result<Matrix, QuantError> {
        let task = |first, n| Ok((self.rows(first, n)?, 0));
        Ok(simulate_rows(self.weights, task)?.0)
    }

    /// The values `[n, cols]` of some rows, group after group.
    fn rows(&self, first: usize, n: usize) -> Result<Vec<f32>, QuantError> {
        let cols = self.weights.cols();
        let mut values = vec![0.0; n * cols];
        for start in (0..cols).step_by(self.group_len) {
            let width = self.group_len.min(cols - start);
            let (mut best, mut least) = (vec![0.0f32; n * width], vec![f64::INFINITY; n]);
            let hessian = if self.clips { self.group_hessian(start, width) } else { Vec::new() };
            for step in 0..if self.clips { CLIP_STEPS / 2 } else { 1 } {
                let range = 1.0 - step as f32 / CLIP_STEPS as f32;
                let mut rounded = vec![0.0f32; n * width];
                for (r, row) in rounded.chunks_exact_mut(width).enumerate() {
                    let weights = &self.weights.row(first + r)[start..start + width];
                    self.round_group(weights, &self.scales[start..start + width], range, row)
                        .map_err(at_group(first + r, start / self.group_len))?;
                }
                if !self.clips {
                    best = rounded;
                    break;
                }
                let losses = self.group_losses((first, start, width), &rounded, &hessian);
                for (r, loss) in losses.into_iter().enumerate() {
                    if loss < least[r] {
                        least[r] = loss;
                        best[r * width..(r + 1) * width].copy_from_slice(&rounded[r * width..(r + 1) * width]);
                    }
                }
            }
            for (row, best) in values.chunks_exact_mut(cols).zip(best.chunks_exact(width)) {
                row[start..start + width].copy_from_slice(best);
            }
        }
        Ok(values)
    }

    /// Scales, clips to `range` times the largest magnitude, rounds, and divides the scales out again.
    fn round_group(
        &self,
        weights: &[f32],
        scales: &[f32],
        range: f32,
        out: &mut [f32],
    ) -> Result<(), super::ScaleOverflow> {
        for ((o, w), s) in out.iter_mut().zip(weights).zip(scales) {
            *o = w * s;
        }
        let largest = out.iter().fold(0.0f32, |m, w| m.max(w.abs())) * range;
        out.iter_mut().for_each(|w| *w = w.clamp(-largest, largest));
        let line = Line::new(self.rule.fit(out, None)?, self.rule.bits);
        for (o, s) in out.iter_mut().zip(scales) {
            *o = round_within(*o * line.inverse, line.low, line.high) * line.scale / s;
        }
        Ok(())
    }

    /// The whole diagonal block of the Hessian that belongs to a group.
    fn group_hessian(&self, start: usize, width: usize) -> Vec<f32> {
        let of = |i: usize, j: usize| self.hessian.row(start + i.max(j))[start + i.min(j)];
        (0..width * width).map(|k| of(k / width, k % width)).collect()
    }

    /// `e^T H e` of the group's part of every row.
    fn group_losses(&self, (first, start, width): (usize, usize, usize), rounded: &[f32], hessian: &[f32]) -> Vec<f64> {
        let n = rounded.len() / width;
        let error = |k: usize| self.weights.row(first + k / width)[start + k % width] - rounded[k];
        let errors: Vec<f32> = (0..n * width).map(error).collect();
        let mut product = vec![0.0f32; n * width];
        self.device.matmul_sequential(
            1.0,
            Strided { data: &errors, rows: n, cols: width, stride: width },
            Strided { data: hessian, rows: width, cols: width, stride: width },
            0.0,
            StridedMut { data: &mut product, rows: n, cols: width, stride: width },
        );
        let pairs = product.chunks_exact(width).zip(errors.chunks_exact(width));
        pairs.map(|(p, e)| p.iter().zip(e).map(|(p, e)| f64::from(*p) * f64::from(*e)).sum()).collect()
    }
}
