//! What noise on one block's output does to the predictions: the measurement of TAQ-KL.
//!
//! The streams after all blocks are kept from one clean pass, so that a noisy run begins behind the block whose output it
//! disturbs. For `L` blocks that is half the work of `L` whole passes.

use super::judged::{Distance, Judged, Place};
use super::run::SurveySample;
use super::streams::{Streams, output_not_finite};
use crate::QuantError;
use crate::signals::{NoiseStep, add_uniform_noise, noise_rng, range};
use std::ops::{ControlFlow, Range};
use tailorq_kernels::Device;
use tailorq_model::{Model, Spill};
use tailorq_tensor::Matrix;

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
        let samples = self.judged.judgeable(samples);
        let ids: Vec<Vec<u32>> = samples.iter().map(|s| s.ids.clone()).collect();
        let (place, keep) = ((self.device, self.model), (self.tape_bytes, spill));
        let mut streams = Streams::embed(place, &ids, keep)?;
        let places = self.judged.places_of(&streams, &samples);
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
            total += Distance::Divergence.sum((self.device, self.model), (&reference, &residual), places);
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
}
