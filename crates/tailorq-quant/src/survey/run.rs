//! The pass over the data.

use super::stats::{BlockStats, Needs};
use crate::QuantError;
use crate::calibrate::micro_batches;
use std::ops::ControlFlow;
use tailorq_kernels::Device;
use tailorq_model::{Batch, BlockStage, Model, Spill, Tape, Target, next_token_targets};
use tailorq_tensor::{InputGroup, LayerId, Matrix};

/// One sequence of the calibration data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SurveySample {
    /// Token ids.
    pub ids: Vec<u32>,
    /// One flag a token: whether its prediction counts (a completion's tokens). `None` for all but the first.
    pub scored: Option<Vec<bool>>,
}

/// What is differentiated: for each sample the mean over its targets.
#[derive(Clone, Copy)]
pub enum Loss<'a> {
    /// Cross-entropy of the next token.
    CrossEntropy,
    /// The Kullback-Leibler divergence from this model's predictions; no labels are read. Its gradient is 0 when the
    /// surveyed model is the reference itself: survey a quantized one.
    Divergence(&'a Model),
}

/// A survey to be run.
#[derive(Clone, Copy)]
pub struct Survey<'a> {
    /// Where it runs; with peers, each takes a share of the samples.
    pub device: &'a dyn Device,
    /// The model, stored, dense or packed.
    pub model: &'a Model,
    /// The loss of each sample.
    pub loss: Loss<'a>,
    /// What to gather.
    pub needs: &'a Needs,
    /// Block inputs (and gradients) held in memory, in bytes, of each device's where it has its own; what is beyond is spilled.
    pub tape_bytes: usize,
}

/// What a survey has to say about the data as a whole.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Samples that counted.
    pub n_samples: usize,
    /// Their tokens.
    pub n_tokens: usize,
    /// Targets of the loss; 0 when no gradient was asked for.
    pub n_targets: usize,
    /// The mean over samples of their losses, in nats a token; `None` when no gradient was asked for.
    pub mean_loss: Option<f64>,
}

/// A micro-batch and its targets.
struct Part {
    batch: Batch,
    targets: Vec<Target>,
}

/// Micro-batches of samples.
fn parts(samples: &[&SurveySample]) -> Vec<Part> {
    let ids: Vec<Vec<u32>> = samples.iter().map(|s| s.ids.clone()).collect();
    let mut rest = samples.iter();
    let part = |batch: Batch| {
        let spans = batch.spans.iter().zip(rest.by_ref());
        let targets = spans.flat_map(|(span, s)| next_token_targets(&s.ids, s.scored.as_deref(), span.start));
        Part { targets: targets.collect(), batch }
    };
    micro_batches(&ids).into_iter().map(part).collect()
}

pub(super) type Sink<'a> = dyn FnMut(BlockStats) -> Result<ControlFlow<()>, QuantError> + 'a;

impl Survey<'_> {
    /// Runs over all samples and hands each finished block to `sink`, which may stop the run with
    /// [`QuantError::Interrupted`]. Samples without a token are passed over, and so are those without a target when
    /// gradients are asked for; it is an error when none is left.
    pub fn run(
        &self,
        samples: &[SurveySample],
        spill: Option<&mut dyn Spill>,
        sink: &mut Sink<'_>,
    ) -> Result<Summary, QuantError> {
        let samples = self.counting(samples)?;
        if self.device.peers().is_empty() || samples.len() == 1 {
            return self.run_alone(&samples, spill, sink);
        }
        super::several::run(self, &samples, spill, sink)
    }

    /// The same on the one device, over samples that all count.
    pub(super) fn run_alone(
        &self,
        samples: &[&SurveySample],
        spill: Option<&mut dyn Spill>,
        sink: &mut Sink<'_>,
    ) -> Result<Summary, QuantError> {
        let parts = parts(samples);
        let mut tape = Tape::new(self.device, self.tape_bytes, spill);
        let count = |f: &dyn Fn(&Part) -> usize| parts.iter().map(f).sum::<usize>();
        let n_samples = count(&|p| p.batch.spans.len());
        let mut summary = Summary { n_samples, n_tokens: count(&|p| p.batch.ids.len()), n_targets: 0, mean_loss: None };
        self.forward(&parts, &mut tape, sink)?;
        if self.needs.gradients() {
            summary.n_targets = count(&|p| p.targets.len());
            summary.mean_loss = Some(self.losses(&parts, &mut tape)? / n_samples as f64);
            self.backward(&parts, &mut tape, sink)?;
        }
        Ok(summary)
    }

    /// The samples that count, if the models know their tokens.
    fn counting<'s>(&self, samples: &'s [SurveySample]) -> Result<Vec<&'s SurveySample>, QuantError> {
        let counts = |s: &&SurveySample| {
            let has_target = !next_token_targets(&s.ids, s.scored.as_deref(), 0).is_empty();
            !s.ids.is_empty() && (has_target || !self.needs.gradients())
        };
        let samples: Vec<&SurveySample> = samples.iter().filter(counts).collect();
        let vocab = self.model.config.vocab;
        if let Some(id) = samples.iter().flat_map(|s| &s.ids).find(|&&id| id as usize >= vocab) {
            return Err(QuantError::Settings(format!("token {id} does not exist: the model has {vocab} words")));
        }
        if let Loss::Divergence(reference) = self.loss
            && reference.config.vocab != vocab
        {
            let other = reference.config.vocab;
            let problem = format!("the reference has {other} words and the model {vocab}: use models of one tokenizer");
            return Err(QuantError::Settings(problem));
        }
        if samples.is_empty() { Err(QuantError::NoCalibration) } else { Ok(samples) }
    }

    fn stage(&self, block_idx: usize) -> BlockStage<'_> {
        BlockStage { model: self.model, block: &self.model.blocks[block_idx], device: self.device }
    }

    /// Where the residual stream before a block lies on the tape (its output for the block after the last).
    fn key(&self, block_idx: usize, part_idx: usize, n_parts: usize) -> usize {
        block_idx * n_parts + part_idx
    }

    /// All blocks over all samples. Without gradients this gathers all there is.
    fn forward(&self, parts: &[Part], tape: &mut Tape<'_, '_>, sink: &mut Sink<'_>) -> Result<(), QuantError> {
        for (i, part) in parts.iter().enumerate() {
            tape.put(self.key(0, i, parts.len()), &self.model.embed(self.device, &part.batch.ids))?;
        }
        let keeps = self.needs.gradients();
        for block_idx in 0..self.model.blocks.len() {
            let stage = self.stage(block_idx);
            let mut stats = BlockStats::new(&stage, block_idx, self.needs);
            for (i, part) in parts.iter().enumerate() {
                let key = self.key(block_idx, i, parts.len());
                let mut residual = if keeps { tape.copy(key)? } else { tape.take(key)? };
                let spans = &part.batch.spans;
                let mut see = |group: InputGroup, x: &Matrix| {
                    if !keeps {
                        stats.add_input(self.device, (group, x), spans, self.needs);
                    }
                };
                let x = stage.attention_input(&residual);
                see(InputGroup::Attention, &x);
                let mixed = stage.attention_mix(&x, spans);
                see(InputGroup::AttentionOutput, &mixed);
                stage.add_attention(&mixed, &mut residual);
                let x = stage.mlp_input(&residual);
                see(InputGroup::Mlp, &x);
                let hidden = stage.mlp_hidden(&x);
                see(InputGroup::MlpOutput, &hidden);
                stage.add_mlp(&hidden, &mut residual);
                tape.put(self.key(block_idx + 1, i, parts.len()), &residual)?;
            }
            if !keeps {
                self.finish(stats, sink)?;
            }
        }
        Ok(())
    }

    /// Replaces the stream after the last block by the gradient of the losses; returns the sum of the samples' losses.
    fn losses(&self, parts: &[Part], tape: &mut Tape<'_, '_>) -> Result<f64, QuantError> {
        let mut total = 0.0;
        for (i, part) in parts.iter().enumerate() {
            let key = self.key(self.model.blocks.len(), i, parts.len());
            let residual = tape.take(key)?;
            let result = match self.loss {
                Loss::CrossEntropy => self.model.cross_entropy_backward(self.device, &residual, &part.targets),
                Loss::Divergence(reference) => {
                    let mut other = reference.embed(self.device, &part.batch.ids);
                    for block in &reference.blocks {
                        reference.forward_block(self.device, block, &part.batch.spans, &mut other);
                    }
                    self.model.divergence_backward(self.device, &residual, (reference, &other), &part.targets)
                }
            };
            total += part.targets.iter().zip(&result.losses).map(|(t, l)| f64::from(t.weight) * l).sum::<f64>();
            if !total.is_finite() {
                return Err(QuantError::LossNotFinite { loss: total });
            }
            tape.put(key, &result.gradient)?;
        }
        Ok(total)
    }

    /// All blocks from the last to the first, each over all samples.
    fn backward(&self, parts: &[Part], tape: &mut Tape<'_, '_>, sink: &mut Sink<'_>) -> Result<(), QuantError> {
        for block_idx in (0..self.model.blocks.len()).rev() {
            let stage = self.stage(block_idx);
            let mut stats = BlockStats::new(&stage, block_idx, self.needs);
            for (i, part) in parts.iter().enumerate() {
                let mut gradient = tape.take(self.key(block_idx + 1, i, parts.len()))?;
                let input = tape.take(self.key(block_idx, i, parts.len()))?;
                let spans = &part.batch.spans;
                stage.backward(&input, spans, &mut gradient, &mut |tap| {
                    stats.add_input(self.device, (tap.group, tap.input), spans, self.needs);
                    stats.add_gradients(self.device, &tap, spans, self.needs);
                });
                // From here on the place of the block's input holds the gradient of that input.
                tape.put(self.key(block_idx, i, parts.len()), &gradient)?;
            }
            self.finish(stats, sink)?;
        }
        Ok(())
    }

    /// Checks a block's statistics and hands them on.
    fn finish(&self, stats: BlockStats, sink: &mut Sink<'_>) -> Result<(), QuantError> {
        if let Some(slot) = stats.not_finite(self.device) {
            return Err(QuantError::StatisticsNotFinite { layer: LayerId { block_idx: stats.block_idx, slot } });
        }
        if sink(stats)?.is_break() { Err(QuantError::Interrupted) } else { Ok(()) }
    }
}
