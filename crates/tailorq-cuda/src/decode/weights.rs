//! The weights of a model on a device, and the memory of its keys and values.

use super::DecoderOptions;
use super::layout::Tiles;
use super::matrix::DeviceMatrix;
use crate::error::CudaError;
use crate::gpu::{Buffer, Gpu};
use half::f16;
use rayon::prelude::*;
use std::sync::Arc;
use tailorq_model::{Block, Linear, Model, ModelConfig};
use tailorq_tensor::{Slot, Weight};

/// Queries, keys and values: one product where the matrices agree in layout and transform.
pub(super) enum Attending {
    Together(Box<DeviceMatrix>),
    Apart(Box<[DeviceMatrix; 3]>),
}

/// Gate and up: one product where they agree.
pub(super) enum FeedForward {
    Together(Box<DeviceMatrix>),
    Apart { gate: Box<DeviceMatrix>, up: Box<DeviceMatrix> },
}

/// A block of the model.
pub(super) struct DecoderBlock {
    pub(super) attention_norm: Buffer,
    pub(super) mlp_norm: Buffer,
    pub(super) qk_norm: Option<(Buffer, Buffer)>,
    pub(super) attending: Attending,
    pub(super) output: DeviceMatrix,
    pub(super) feed_forward: FeedForward,
    pub(super) down: DeviceMatrix,
    /// `[sequences, kv_heads, capacity, head_dim]` in half precision, and so are `values`.
    pub(super) keys: Buffer,
    pub(super) values: Buffer,
}

/// See the module.
pub(super) struct Weights {
    /// `[vocab, hidden]` in half precision.
    pub(super) embedding: Buffer,
    pub(super) blocks: Vec<DecoderBlock>,
    pub(super) norm: Buffer,
    pub(super) head: DeviceMatrix,
}

/// A weight with its bias.
type Part<'a> = (&'a Weight, Option<&'a [f32]>);

fn part(linear: &Linear) -> Part<'_> {
    (&linear.weight, linear.bias.as_deref())
}

impl Weights {
    pub(super) fn new(gpu: &Arc<Gpu>, model: &Model, options: DecoderOptions) -> Result<Self, CudaError> {
        let blocks = model.blocks.iter().map(|block| DecoderBlock::new(gpu, &model.config, block, options));
        Ok(Weights {
            embedding: gpu.upload(&embedding(&model.embedding)),
            blocks: blocks.collect::<Result<_, _>>()?,
            norm: gpu.upload(&model.norm),
            head: DeviceMatrix::stacked(gpu, &[(&model.head, None)], options.dense)?,
        })
    }

    /// Bytes of all matrices that a step reads.
    pub(super) fn bytes(&self) -> usize {
        self.blocks.iter().map(DecoderBlock::bytes).sum::<usize>() + self.head.bytes()
    }
}

/// The embedding as half precision.
fn embedding(weight: &Weight) -> Vec<u16> {
    let cols = weight.cols();
    let mut all = vec![0u16; weight.rows() * cols];
    all.par_chunks_mut(cols.max(1)).enumerate().for_each(|(r, out)| {
        let mut row = vec![0.0f32; cols];
        weight.reader().read_rows(r, &mut row);
        for (out, v) in out.iter_mut().zip(row) {
            *out = f16::from_f32(v.clamp(-65504.0, 65504.0)).to_bits();
        }
    });
    all
}

impl DecoderBlock {
    fn new(gpu: &Arc<Gpu>, config: &ModelConfig, block: &Block, options: DecoderOptions) -> Result<Self, CudaError> {
        let dense = options.dense;
        let parts = |slots: &[Slot]| -> Vec<Part<'_>> { slots.iter().map(|&s| part(block.linear(s))).collect() };
        let one = |slot: Slot| DeviceMatrix::stacked(gpu, &[part(block.linear(slot))], dense);
        let agree = |parts: &[Part<'_>]| Tiles::agree(&parts.iter().map(|p| p.0).collect::<Vec<_>>(), dense);
        let heads = parts(&[Slot::Q, Slot::K, Slot::V]);
        let attending = if agree(&heads) {
            Attending::Together(Box::new(DeviceMatrix::stacked(gpu, &heads, dense)?))
        } else {
            Attending::Apart(Box::new([one(Slot::Q)?, one(Slot::K)?, one(Slot::V)?]))
        };
        let pair = [part(block.linear(Slot::Gate)), part(block.linear(Slot::Up))];
        let feed_forward = if agree(&pair) {
            FeedForward::Together(Box::new(DeviceMatrix::paired(gpu, &pair, dense)?))
        } else {
            FeedForward::Apart { gate: Box::new(one(Slot::Gate)?), up: Box::new(one(Slot::Up)?) }
        };
        let cache = 2 * options.batch * config.kv_width() * options.capacity;
        Ok(DecoderBlock {
            attention_norm: gpu.upload(&block.attention_norm),
            mlp_norm: gpu.upload(&block.mlp_norm),
            qk_norm: block.qk_norm.as_ref().map(|(q, k)| (gpu.upload(q), gpu.upload(k))),
            attending,
            output: one(Slot::O)?,
            feed_forward,
            down: one(Slot::Down)?,
            keys: gpu.zeros(cache),
            values: gpu.zeros(cache),
        })
    }

    fn bytes(&self) -> usize {
        let attending: usize = match &self.attending {
            Attending::Together(m) => m.bytes(),
            Attending::Apart(parts) => parts.iter().map(DeviceMatrix::bytes).sum(),
        };
        let feed_forward = match &self.feed_forward {
            FeedForward::Together(m) => m.bytes(),
            FeedForward::Apart { gate, up } => gate.bytes() + up.bytes(),
        };
        attending + self.output.bytes() + feed_forward + self.down.bytes()
    }
}
