//! Per matrix the best of several ways to round it, judged by calibration sequences that none of them saw.
//!
//! GPTQ's error feedback trades weights along the directions of its Hessian. Where few tokens with massive activations
//! (attention sinks) hold most of that Hessian, or the sample is small, what looks free on the sample is dear elsewhere. The
//! candidates are rounding to nearest, GPTQ as asked for, GPTQ with a damping ten and a hundred times as large, and GPTQ on a
//! Hessian in which all inputs have one length; the one with the least `tr(E H' E^T)` over the held-out `H'` is taken. Rounding
//! is among them, so the result is never worse than it on that measure. Storage and bits are the same for all.

use super::{Gptq, LayerStats, Needs, Note, Quantized, Quantizer, Rtn, check_settings, proxy_loss};
use crate::{LayerPlan, LayerSettings, QuantError};
use tailorq_kernels::Device;
use tailorq_tensor::Matrix;

/// The least damping that is multiplied, so that none at all gives three candidates too.
const LEAST_DAMPING: f64 = 1e-3;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Best;

impl Quantizer for Best {
    fn name(&self) -> &'static str {
        "best"
    }

    fn needs(&self) -> Needs {
        Needs { hessian: true, held_out: true, ..Needs::default() }
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
        let held = stats.held_out.ok_or(QuantError::HeldOutMissing { quantizer: self.name() })?;
        let judged =
            |quantized: &Quantized| proxy_loss(device, weights, quantized.weight.reader(), held.hessian, held.n_tokens);
        let rounded = Rtn.quantize(device, weights, stats, plan)?;
        let of_rounding = judged(&rounded);
        let (mut best, mut least, mut choice) = (rounded, of_rounding, "rounding to nearest".to_owned());
        for (name, candidate_stats, settings) in candidates(stats, &plan.settings) {
            let candidate = LayerPlan { settings, kept: plan.kept.clone() };
            let quantized = Gptq.quantize(device, weights, &candidate_stats, &candidate)?;
            let loss = judged(&quantized);
            // The earlier one on a tie, and never one whose loss is not a number.
            if loss < least {
                (best, least, choice) = (quantized, loss, name);
            }
        }
        best.notes.push(Note::Chosen { choice, held_out_loss: least, rounding_loss: of_rounding });
        // Losses of one measure, whichever Hessian the winner was made with.
        best.proxy_loss = stats.hessian.map(|h| proxy_loss(device, weights, best.weight.reader(), h, stats.n_tokens));
        Ok(best)
    }
}

/// The ways beside rounding: a name for the report, statistics and settings.
fn candidates<'a>(stats: &LayerStats<'a>, settings: &LayerSettings) -> Vec<(String, LayerStats<'a>, LayerSettings)> {
    let damped = |factor: f64| {
        let least = if factor > 1.0 { LEAST_DAMPING } else { 0.0 };
        let damping = settings.damping.max(least) * factor;
        (format!("GPTQ, damping {damping}"), *stats, LayerSettings { damping, ..*settings })
    };
    let mut all = vec![damped(1.0), damped(10.0), damped(100.0)];
    if let Some(normalised) = stats.normalised {
        let stats = LayerStats { hessian: Some(normalised), ..*stats };
        all.push(("GPTQ, inputs of one length".to_owned(), stats, *settings));
    }
    all
}
