//! Round to nearest: every weight to the nearest point of its group's grid.

use super::grid::{GridRule, Line};
use super::on_device::round_on_device;
use super::rotated::in_rotation;
use super::rows::{
    Rows, at_group, check_finite, check_mask, codebook, corrected, fit_without, kept_within, quantize_rows,
};
use super::{LayerStats, Needs, Quantized, Quantizer, check_settings, proxy_loss};
use crate::{LayerPlan, QuantError};
use tailorq_kernels::Device;
use tailorq_tensor::Matrix;

/// Rounding to nearest; needs no calibration.
#[derive(Clone, Copy, Debug)]
pub struct Rtn;

impl Quantizer for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn rotates(&self) -> bool {
        true
    }

    fn quantize(
        &self,
        device: &dyn Device,
        weights: &Matrix,
        stats: &LayerStats<'_>,
        plan: &LayerPlan,
    ) -> Result<Quantized, QuantError> {
        check_settings(&plan.settings)?;
        if let Some(transform) = plan.settings.transform {
            let rotated = |w: &Matrix, s: &LayerStats<'_>, p: &LayerPlan| self.quantize(device, w, s, p);
            return in_rotation(device, (weights, stats, plan), (transform, false), rotated);
        }
        check_mask(weights, plan)?;
        let levels = codebook(weights, plan, None)?;
        let clip = plan.settings.clip.without_hessian();
        let rule = GridRule { levels, ..GridRule::new(plan.settings.layout, clip) };
        let (mut quantized, _) = match round_on_device(device, (weights, plan), (&rule, None), None, Vec::new()) {
            Ok(rounded) => rounded?,
            Err(notes) => {
                let task = |first, n| round_rows(weights, plan, &rule, (first, n));
                quantize_rows(weights, plan, (notes, levels), task)?
            }
        };
        quantized.proxy_loss =
            stats.hessian.map(|h| proxy_loss(device, weights, quantized.weight.reader(), h, stats.n_tokens));
        Ok(quantized)
    }
}

fn round_rows(
    weights: &Matrix,
    plan: &LayerPlan,
    rule: &GridRule,
    (first, n): (usize, usize),
) -> Result<Rows, QuantError> {
    check_finite(weights, first, n)?;
    let (settings, mask, cols) = (&plan.settings, plan.kept.as_deref(), weights.cols());
    let layout = settings.layout;
    let group_len = layout.group.len(cols);
    let mut rows = Rows::new(n, cols, settings);
    for r in 0..n {
        for (g, group) in weights.row(first + r).chunks(group_len).enumerate() {
            let start = g * group_len;
            let kept = kept_within(mask, first + r, start..start + group.len());
            let grid = fit_without(rule, (group, None), kept.clone()).map_err(at_group(first + r, g))?;
            rows.set_grid(r, g, grid);
            let line = Line::new(grid, layout.bits);
            let mut kept = kept.peekable();
            let (mut weight_energy, mut error_energy) = (0.0f64, 0.0f64);
            for (i, &w) in group.iter().enumerate() {
                let (code, mut value) = line.round(rule.levels.as_ref(), w);
                rows.codes_mut(r)[start + i] = code;
                if kept.next_if_eq(&i).is_some() {
                    let (correction, exact) = corrected(w, value);
                    rows.correct(r, start + i, correction);
                    value = exact;
                }
                let error = f64::from(w - value);
                weight_energy += f64::from(w) * f64::from(w);
                error_energy += error * error;
            }
            rows.weight_energy += weight_energy;
            rows.error_energy += error_energy;
        }
    }
    Ok(rows)
}
