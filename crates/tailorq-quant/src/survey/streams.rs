//! The residual streams of prompts between blocks, kept on a tape.

use crate::QuantError;
use crate::calibrate::micro_batches;
use tailorq_kernels::Device;
use tailorq_model::{Batch, Model, Spill, Tape};
use tailorq_tensor::Matrix;

/// Prompts on their way through a model.
pub(super) struct Streams<'a, 's> {
    device: &'a dyn Device,
    model: &'a Model,
    /// The prompts that hold tokens, in their order.
    pub batches: Vec<Batch>,
    tape: Tape<'a, 's>,
}

impl<'a, 's> Streams<'a, 's> {
    /// Embeds the prompts. Empty ones are passed over; it is an error when none is left.
    pub fn embed(
        (device, model): (&'a dyn Device, &'a Model),
        prompts: &[Vec<u32>],
        (tape_bytes, spill): (usize, Option<&'s mut dyn Spill>),
    ) -> Result<Self, QuantError> {
        let vocab = model.config.vocab;
        if let Some(id) = prompts.iter().flatten().find(|&&id| id as usize >= vocab) {
            return Err(QuantError::Settings(format!("token {id} does not exist: the model has {vocab} words")));
        }
        let batches = micro_batches(prompts);
        if batches.is_empty() {
            return Err(QuantError::NoCalibration);
        }
        let mut streams = Streams { device, model, batches, tape: Tape::new(device, tape_bytes, spill) };
        for i in 0..streams.batches.len() {
            let residual = model.embed(device, &streams.batches[i].ids);
            streams.tape.put(i, &residual)?;
        }
        Ok(streams)
    }

    /// The stream of a batch before a block, which stays (after the last block, for the number of blocks).
    pub fn copy(&mut self, block_idx: usize, batch_idx: usize) -> Result<Matrix, QuantError> {
        Ok(self.tape.copy(block_idx * self.batches.len() + batch_idx)?)
    }

    /// The same, forgotten.
    pub fn take(&mut self, block_idx: usize, batch_idx: usize) -> Result<Matrix, QuantError> {
        Ok(self.tape.take(block_idx * self.batches.len() + batch_idx)?)
    }

    /// Runs a block over all batches and shows each output `[tokens, hidden]` to `see`. Its inputs are forgotten.
    pub fn advance(
        &mut self,
        block_idx: usize,
        see: &mut dyn FnMut(&Batch, &Matrix) -> Result<(), QuantError>,
    ) -> Result<(), QuantError> {
        for i in 0..self.batches.len() {
            let residual = self.take(block_idx, i)?;
            self.pass(block_idx, i, residual, see)?;
        }
        Ok(())
    }

    /// As [`Streams::advance`], with inputs that stay.
    pub fn advance_keeping(
        &mut self,
        block_idx: usize,
        see: &mut dyn FnMut(&Batch, &Matrix) -> Result<(), QuantError>,
    ) -> Result<(), QuantError> {
        for i in 0..self.batches.len() {
            let residual = self.copy(block_idx, i)?;
            self.pass(block_idx, i, residual, see)?;
        }
        Ok(())
    }

    fn pass(
        &mut self,
        block_idx: usize,
        batch_idx: usize,
        mut residual: Matrix,
        see: &mut dyn FnMut(&Batch, &Matrix) -> Result<(), QuantError>,
    ) -> Result<(), QuantError> {
        let batch = &self.batches[batch_idx];
        self.model.forward_block(self.device, &self.model.blocks[block_idx], &batch.spans, &mut residual);
        see(batch, &residual)?;
        Ok(self.tape.put((block_idx + 1) * self.batches.len() + batch_idx, &residual)?)
    }
}

/// The error of a block whose output is not finite. It is named by the last linear that adds to it.
pub(super) fn output_not_finite(block_idx: usize) -> QuantError {
    QuantError::StatisticsNotFinite { layer: tailorq_tensor::LayerId { block_idx, slot: tailorq_tensor::Slot::Down } }
}
