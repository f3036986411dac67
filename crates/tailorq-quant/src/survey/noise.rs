//! What noise on one block's output does to the predictions: the measurement of TAQ-KL.
//!
//! The streams after all blocks are kept from one clean pass, so that a noisy run begins behind the block whose output it
//! disturbs. For `L` blocks that is half the work of `L` whole passes.

use super::run::SurveySample;
use super::streams::{Streams, output_not_finite};
use crate::QuantError;
use crate::signals::{NoiseStep, add_uniform_noise, divergence, noise_rng, range};
use rayon::prelude::*;
use std::ops::{ControlFlow, Range};
use tailorq_kernels::Device;
use tailorq_model::{Model, Spill, next_token_targets};
use tailorq_tensor::Matrix;

/// Rows whose logits are held at once, twice: with a vocabulary of 150 000 words, 77 MB.
const ROWS: usize = 64;

/// Which predictions are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Judged {
    /// That of each sample's last token, as in the paper: one number a prompt.
    #[default]
    LastToken,
    /// Those of the scored tokens, averaged over each sample. With the model's own continuations of the prompts for a
    /// completion this still needs no labels, and rests on many more numbers.
    Scored,
}

/// The measurement.
#[derive(Clone, Copy)]
pub struct NoiseSurvey<'a> {
    /// Where it runs.
    pub device: &'a dyn Device,
    /// The model.
    pub model: &'a Model,
    /// Width of the grid whose steps set the size of the noise; 4 in the paper. At least 1.
    pub bits: u32,
    /// Seed of the noise.
    pub seed: u64,
    /// Which predictions are compared.
    pub judged: Judged,
    /// Bytes of the residual streams held in memory; what is beyond is spilled. All blocks' streams are kept.
    pub tape_bytes: usize,
}

/// What was measured of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockNoise {
    /// The mean over samples of largest less smallest element of the output, at the last judged token of each. Not at all of
    /// them: the first token of a sequence can have a hundred times the range of the others.
    pub range: f64,
    /// The width of the noise, from `range`.
    pub step: NoiseStep,
    /// The mean over samples of the divergence of disturbed predictions from clean ones, in nats.
    pub divergence: f64,
}

/// A token whose prediction is judged.
#[derive(Clone, Copy, Debug)]
struct Place {
    row: usize,
    /// Weights of one sample's places sum to 1.
    weight: f64,
    /// Whether it is the sample's last.
    is_last: bool,
}

impl NoiseSurvey<'_> {
    /// One measurement for each block. Samples without a judged token are passed over, and it is an error when none is left;
    /// `watch` sees the index of every finished block and may stop the run with [`QuantError::Interrupted`]. The result
    /// does not depend on the number of threads.
    pub fn run(
        &self,
        samples: &[SurveySample],
        spill: Option<&mut dyn Spill>,
        watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Vec<BlockNoise>, QuantError> {
        if self.bits == 0 {
            return Err(QuantError::Settings("a grid of 0 bits has no step: use 4".into()));
        }
        let samples: Vec<&SurveySample> = samples.iter().filter(|s| !self.places(s, 0).is_empty()).collect();
        let ids: Vec<Vec<u32>> = samples.iter().map(|s| s.ids.clone()).collect();
        let (place, keep) = ((self.device, self.model), (self.tape_bytes, spill));
        let mut streams = Streams::embed(place, &ids, keep)?;
        let mut rest = samples.iter();
        let of_batch = |spans: &[Range<usize>]| -> Vec<Place> {
            let pairs = spans.iter().zip(rest.by_ref());
            pairs.flat_map(|(span, sample)| self.places(sample, span.start)).collect()
        };
        let spans: Vec<Vec<Range<usize>>> = streams.batches.iter().map(|b| b.spans.clone()).collect();
        let places: Vec<Vec<Place>> = spans.iter().map(|s| s.as_slice()).map(of_batch).collect();
        let ranges = self.clean_pass(&mut streams, &places, samples.len())?;
        let mut found = Vec::new();
        for (block_idx, range) in ranges.into_iter().enumerate() {
            let step = NoiseStep::of(range, self.bits);
            let total = self.noisy_pass(&mut streams, &places, (block_idx, step))?;
            found.push(BlockNoise { range, step, divergence: total / samples.len() as f64 });
            if watch(block_idx).is_break() {
                return Err(QuantError::Interrupted);
            }
        }
        Ok(found)
    }

    /// The judged tokens of a sample that lies from row `first` on.
    fn places(&self, sample: &SurveySample, first: usize) -> Vec<Place> {
        match self.judged {
            Judged::LastToken => {
                let last = sample.ids.len().checked_sub(1);
                last.into_iter().map(|t| Place { row: first + t, weight: 1.0, is_last: true }).collect()
            }
            Judged::Scored => {
                let targets = next_token_targets(&sample.ids, sample.scored.as_deref(), first);
                let n = targets.len();
                let place = |(i, row)| Place { row, weight: 1.0 / n as f64, is_last: i + 1 == n };
                targets.into_iter().map(|t| t.row).enumerate().map(place).collect()
            }
        }
    }

    /// Runs the model as it is, keeps the streams behind all blocks and returns the mean ranges of their outputs.
    fn clean_pass(
        &self,
        streams: &mut Streams<'_, '_>,
        places: &[Vec<Place>],
        n_samples: usize,
    ) -> Result<Vec<f64>, QuantError> {
        let mut ranges = Vec::new();
        for block_idx in 0..self.model.blocks.len() {
            let (mut total, mut batches) = (0.0, places.iter());
            let mut see = |_: &_, output: &Matrix| {
                let places = batches.next().map_or(&[][..], Vec::as_slice);
                total += places.iter().filter(|p| p.is_last).map(|p| range(output.row(p.row))).sum::<f64>();
                if output.data().iter().all(|x| x.is_finite()) { Ok(()) } else { Err(output_not_finite(block_idx)) }
            };
            // Nothing begins behind the embedding.
            if block_idx == 0 {
                streams.advance(block_idx, &mut see)?;
            } else {
                streams.advance_keeping(block_idx, &mut see)?;
            }
            ranges.push(total / n_samples as f64);
        }
        Ok(ranges)
    }

    /// The sum over samples of the divergence that noise behind a block causes.
    fn noisy_pass(
        &self,
        streams: &mut Streams<'_, '_>,
        places: &[Vec<Place>],
        (block_idx, step): (usize, NoiseStep),
    ) -> Result<f64, QuantError> {
        let n_blocks = self.model.blocks.len();
        let (mut total, mut first_sample) = (0.0, 0);
        for (i, places) in places.iter().enumerate() {
            let reference = streams.copy(n_blocks, i)?;
            let mut residual =
                if block_idx + 1 == n_blocks { reference.clone() } else { streams.take(block_idx + 1, i)? };
            let spans = &streams.batches[i].spans;
            self.disturb(
                &mut residual,
                spans,
                |span_idx| noise_rng(self.seed, block_idx, first_sample + span_idx),
                step,
            );
            for block in &self.model.blocks[block_idx + 1..] {
                self.model.forward_block(self.device, block, spans, &mut residual);
            }
            total += self.divergences(&reference, &residual, places);
            first_sample += spans.len();
        }
        if total.is_finite() { Ok(total) } else { Err(QuantError::LossNotFinite { loss: total }) }
    }

    /// Adds noise to all rows, each span's from a generator of its own.
    fn disturb(
        &self,
        residual: &mut Matrix,
        spans: &[Range<usize>],
        rng_of: impl Fn(usize) -> tailorq_tensor::Rng,
        step: NoiseStep,
    ) {
        let width = residual.cols();
        for (span_idx, span) in spans.iter().enumerate() {
            let values = &mut residual.data_mut()[span.start * width..span.end * width];
            add_uniform_noise(&mut rng_of(span_idx), step, values);
        }
    }

    /// The weighted sum of the divergences at these places of two streams behind the last block.
    fn divergences(&self, reference: &Matrix, disturbed: &Matrix, places: &[Place]) -> f64 {
        let logits = |residual: &Matrix, places: &[Place]| {
            let data = places.iter().flat_map(|p| residual.row(p.row)).copied().collect();
            let rows = Matrix::from_vec(places.len(), residual.cols(), data);
            self.model.logits(self.device, &self.model.final_norm(self.device, &rows))
        };
        let mut total = 0.0;
        for places in places.chunks(ROWS) {
            let (clean, noisy) = (logits(reference, places), logits(disturbed, places));
            let rows: Vec<f64> =
                (0..places.len()).into_par_iter().map(|r| divergence(clean.row(r), noisy.row(r))).collect();
            total += places.iter().zip(rows).map(|(p, d)| p.weight * d).sum::<f64>();
        }
        total
    }
}
