//! What it does to predictions when one unit of the model alone is quantized: measured damage, for TAQO and for plans under
//! a budget.
//!
//! The streams before all blocks are kept from one clean pass, so that a measurement begins with the block in which the unit
//! lies: for `L` blocks, half the work of whole passes.

use super::judged::{Distance, Judged, Place};
use super::run::SurveySample;
use super::streams::{Streams, output_not_finite};
use crate::allocate::UnitId;
use crate::calibrate::{Activations, BlockQuantizer, DriftCorrection, MicroBatch, QuantizedLayer, TokenWeight};
use crate::quantize::Quantizer;
use crate::{LayerPlan, LayerSettings, QuantError};
use std::ops::ControlFlow;
use tailorq_kernels::Device;
use tailorq_model::{Block, Model, Spill};
use tailorq_tensor::{Matrix, Weight};

/// How well a model does its task, by a measure that the caller brings.
pub trait Metric: Sync {
    /// The higher the better. The model differs from the surveyed one in a single block.
    fn score(&self, model: &Model) -> Result<f64, QuantError>;
}

/// What is measured.
#[derive(Clone, Copy)]
pub enum Measure<'a> {
    /// The mean over samples of the divergence of the judged predictions from those of the model as it is, in nats. No label
    /// is read.
    Divergence,
    /// By how much the judged tokens' successors are predicted worse, in nats a token, the mean over samples; 0 where it
    /// is better. With the gold completions for scored tokens this is a task metric on labels.
    Likelihood,
    /// `max(0, base - score)` of any metric (TAQO); every measurement costs what the metric costs.
    Metric(&'a dyn Metric),
}

/// The measurement.
#[derive(Clone, Copy)]
pub struct DamageSurvey<'a> {
    /// Where it runs.
    pub device: &'a dyn Device,
    /// The model.
    pub model: &'a Model,
    /// Makes the weights that are tried. One that reads a Hessian gets that of the samples, before which nothing is quantized.
    pub quantizer: &'a dyn Quantizer,
    /// What is quantized alone.
    pub units: &'a [UnitId],
    /// What each unit is tried as.
    pub formats: &'a [LayerSettings],
    /// Which predictions are compared.
    pub judged: Judged,
    /// What is measured of them.
    pub measure: Measure<'a>,
    /// Bytes of the residual streams held in memory; what is beyond is spilled. All blocks' streams are kept.
    pub tape_bytes: usize,
}

/// The samples behind the clean pass.
struct Clean<'a, 's> {
    streams: Streams<'a, 's>,
    places: Vec<Vec<Place>>,
    n_samples: usize,
}

impl DamageSurvey<'_> {
    /// The work in forward passes of the whole model over all samples; of a metric's evaluations, beside it, there are as
    /// many as units and formats.
    pub fn n_passes(&self) -> f64 {
        let n_blocks = self.model.blocks.len();
        let from = |unit: &UnitId| n_blocks.saturating_sub(unit.block_idx());
        let measured: usize = match self.measure {
            Measure::Metric(_) => 0,
            _ => self.units.iter().map(from).sum::<usize>() * self.formats.len(),
        };
        1.0 + measured as f64 / n_blocks.max(1) as f64
    }

    /// For each unit its damage in each format; none is below 0. Samples without a judged token are passed over, and it is an
    /// error when none is left; `watch` sees how many measurements are done and may stop the run with
    /// [`QuantError::Interrupted`]. The result does not depend on the number of threads.
    pub fn run(
        &self,
        samples: &[SurveySample],
        spill: Option<&mut dyn Spill>,
        watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<f64>>, QuantError> {
        if matches!(self.measure, Measure::Likelihood) && self.judged == Judged::LastToken {
            let problem = "the likelihood of what comes after the last token is not known: judge scored tokens";
            return Err(QuantError::Settings(problem.into()));
        }
        let mut clean = self.clean_pass(samples, spill)?;
        let base = match self.measure {
            Measure::Metric(metric) => finite(metric.score(self.model)?)?,
            _ => 0.0,
        };
        let mut damages = vec![vec![0.0; self.formats.len()]; self.units.len()];
        let mut n_done = 0;
        for block_idx in 0..self.model.blocks.len() {
            let here: Vec<usize> = (0..self.units.len()).filter(|&u| self.units[u].block_idx() == block_idx).collect();
            if here.is_empty() {
                continue;
            }
            for (f, format) in self.formats.iter().enumerate() {
                let layers = self.quantized(block_idx, *format, &mut clean.streams)?;
                for &u in &here {
                    let block = self.with_unit(self.units[u], &layers);
                    damages[u][f] = match self.measure {
                        Measure::Divergence => self.pass(&mut clean, block_idx, &block, Distance::Divergence)?,
                        Measure::Likelihood => self.pass(&mut clean, block_idx, &block, Distance::Likelihood)?,
                        Measure::Metric(metric) => {
                            let mut model = self.model.clone();
                            model.blocks[block_idx] = block;
                            base - finite(metric.score(&model)?)?
                        }
                    }
                    .max(0.0);
                    n_done += 1;
                    if watch(n_done).is_break() {
                        return Err(QuantError::Interrupted);
                    }
                }
            }
        }
        Ok(damages)
    }

    /// Runs the model as it is and keeps the streams before all blocks and behind the last.
    fn clean_pass<'s>(
        &self,
        samples: &[SurveySample],
        spill: Option<&'s mut dyn Spill>,
    ) -> Result<Clean<'_, 's>, QuantError> {
        let samples = self.judged.judgeable(samples);
        let ids: Vec<Vec<u32>> = samples.iter().map(|s| s.ids.clone()).collect();
        let mut streams = Streams::embed((self.device, self.model), &ids, (self.tape_bytes, spill))?;
        let places = self.judged.places_of(&streams, &samples);
        for block_idx in 0..self.model.blocks.len() {
            streams.advance_keeping(block_idx, &mut |_, output| {
                if output.data().iter().all(|x| x.is_finite()) { Ok(()) } else { Err(output_not_finite(block_idx)) }
            })?;
        }
        Ok(Clean { streams, places, n_samples: samples.len() })
    }

    /// All linears of a block in one format.
    fn quantized(
        &self,
        block_idx: usize,
        format: LayerSettings,
        streams: &mut Streams<'_, '_>,
    ) -> Result<Vec<QuantizedLayer>, QuantError> {
        let quantizer = BlockQuantizer {
            device: self.device,
            model: self.model,
            quantizer: self.quantizer,
            plan_of: &|_| Ok(LayerPlan::from(format)),
            true_sequential: false,
            token_weight: TokenWeight::Uniform,
            token_energies: None,
            squares: None,
            drift: DriftCorrection::default(),
            shrink: 0.0,
        };
        let mut inputs = None;
        if self.quantizer.needs().hessian {
            let mut batches = Vec::new();
            for i in 0..streams.batches.len() {
                let spans = streams.batches[i].spans.clone();
                batches.push(MicroBatch { residual: streams.copy(block_idx, i)?, original: None, spans, place: 0 });
            }
            inputs = Some(Activations { batches });
        }
        Ok(quantizer.quantize_block(block_idx, inputs.as_mut(), &mut |_| ControlFlow::Continue(()))?.layers)
    }

    /// The block with this unit's linears quantized and all others as they are.
    fn with_unit(&self, unit: UnitId, layers: &[QuantizedLayer]) -> Block {
        let mut block = self.model.blocks[unit.block_idx()].clone();
        for layer in layers.iter().filter(|l| unit.contains(l.id)) {
            block.linear_mut(layer.id.slot).weight = Weight::from(layer.weight.clone());
        }
        block
    }

    /// The mean over samples of the distances that this block in the place of the model's own causes.
    fn pass(
        &self,
        clean: &mut Clean<'_, '_>,
        block_idx: usize,
        block: &Block,
        distance: Distance,
    ) -> Result<f64, QuantError> {
        let (device, model, n_blocks) = (self.device, self.model, self.model.blocks.len());
        let mut total = 0.0;
        for (i, places) in clean.places.iter().enumerate() {
            let mut residual: Matrix = clean.streams.copy(block_idx, i)?;
            let spans = &clean.streams.batches[i].spans;
            model.forward_block(device, block, spans, &mut residual);
            for later in &model.blocks[block_idx + 1..] {
                model.forward_block(device, later, spans, &mut residual);
            }
            let reference = clean.streams.copy(n_blocks, i)?;
            total += distance.sum((device, model), (&reference, &residual), places);
        }
        finite(total / clean.n_samples as f64)
    }
}

fn finite(value: f64) -> Result<f64, QuantError> {
    if value.is_finite() { Ok(value) } else { Err(QuantError::LossNotFinite { loss: value }) }
}
