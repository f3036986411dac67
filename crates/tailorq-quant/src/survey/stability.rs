//! Information and stability of block outputs over prompts: what TAQ-IS reads.

use super::streams::{Streams, output_not_finite};
use crate::QuantError;
use crate::signals::{Moments, Reservoir, Sampling, matrix_entropy, normalize_rows};
use rayon::prelude::*;
use std::ops::ControlFlow;
use tailorq_kernels::Device;
use tailorq_model::{Batch, Model, Spill};
use tailorq_tensor::Matrix;

/// A pass over unlabelled prompts, block by block.
#[derive(Clone, Copy)]
pub struct StabilitySurvey<'a> {
    /// Where it runs.
    pub device: &'a dyn Device,
    /// The model.
    pub model: &'a Model,
    /// Which tokens stand for all in the entropy. Its `without_first` leaves those tokens out of the variance as well.
    pub sampling: Sampling,
    /// Divide the sampled vectors by their root mean square before the entropy, so that massive activations do not fill the
    /// covariance. Not those of the variance, which would then be 1 less a squared mean, much the same for all blocks.
    pub normalize: bool,
    /// Bytes of the residual stream held in memory; what is beyond is spilled.
    pub tape_bytes: usize,
}

/// What a block's outputs look like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockStability {
    /// The matrix entropy of sampled outputs, in nats.
    pub information: f64,
    /// The variance over all elements of all tokens.
    pub variance: f64,
}

impl StabilitySurvey<'_> {
    /// One value for each block. Empty prompts are passed over; `watch` sees the index of every finished block and may stop
    /// the pass with [`QuantError::Interrupted`]. The result does not depend on the number of threads.
    pub fn run(
        &self,
        prompts: &[Vec<u32>],
        spill: Option<&mut dyn Spill>,
        watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Vec<BlockStability>, QuantError> {
        let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
        let reservoir = Reservoir::draw(&lengths, &self.sampling);
        let (place, keep) = ((self.device, self.model), (self.tape_bytes, spill));
        let mut streams = Streams::embed(place, prompts, keep)?;
        if reservoir.tokens().is_empty() {
            return Err(QuantError::NoCalibration);
        }
        let mut found = Vec::new();
        for block_idx in 0..self.model.blocks.len() {
            let mut moments = Moments::default();
            let mut sampled = Matrix::zeros(reservoir.tokens().len(), self.model.config.hidden);
            let mut first = 0;
            streams.advance(block_idx, &mut |batch, output| {
                self.moments_of(batch, output).into_iter().for_each(|m| moments.merge(m));
                reservoir.gather(first, output, &mut sampled);
                first += output.rows();
                Ok(())
            })?;
            if self.normalize {
                normalize_rows(&mut sampled);
            }
            let information = matrix_entropy(&sampled).ok_or_else(|| output_not_finite(block_idx))?;
            let variance = moments.variance().ok_or_else(|| output_not_finite(block_idx))?;
            found.push(BlockStability { information, variance });
            if watch(block_idx).is_break() {
                return Err(QuantError::Interrupted);
            }
        }
        Ok(found)
    }

    /// Sums of every token that counts, in their order.
    fn moments_of(&self, batch: &Batch, output: &Matrix) -> Vec<Moments> {
        let skipped = usize::from(self.sampling.without_first);
        let rows: Vec<usize> = batch.spans.iter().flat_map(|s| s.start + skipped..s.end).collect();
        rows.into_par_iter().map(|t| Moments::of(output.row(t))).collect()
    }
}
