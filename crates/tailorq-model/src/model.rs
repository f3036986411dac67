//! A model: configuration plus weights that still lie where the file put them.

use crate::arch::Architecture;
use crate::config::ModelConfig;
use crate::rope::Rope;
use std::sync::Arc;
use tailorq_kernels::RopeTable;
use tailorq_tensor::{Slot, Weight};

/// A linear `y = x W^T + b`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Checkpoint name without `.weight`: `model.layers.3.mlp.down_proj`.
    pub name: String,
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`, if the architecture has one.
    pub bias: Option<Vec<f32>>,
}

/// A decoder block.
#[derive(Clone, Debug)]
pub struct Block {
    /// RMS norm before attention, `[hidden]`.
    pub attention_norm: Vec<f32>,
    /// RMS norm before the feed-forward, `[hidden]`.
    pub mlp_norm: Vec<f32>,
    /// Norms of each query and key head, `[head_dim]` (qwen3).
    pub qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    /// The seven linears in [`Slot::ALL`] order.
    pub linears: [Linear; 7],
}

impl Block {
    /// The linear of a slot.
    pub fn linear(&self, slot: Slot) -> &Linear {
        &self.linears[slot.index()]
    }

    /// The linear of a slot, to replace its weight.
    pub fn linear_mut(&mut self, slot: Slot) -> &mut Linear {
        &mut self.linears[slot.index()]
    }
}

/// A decoder-only language model. Cheap to clone as long as its weights are stored or packed.
#[derive(Clone, Debug)]
pub struct Model {
    /// Sizes and constants.
    pub config: ModelConfig,
    /// The declaration it was loaded by.
    pub architecture: &'static Architecture,
    /// `[vocab, hidden]`.
    pub embedding: Weight,
    /// The blocks in order.
    pub blocks: Vec<Block>,
    /// Final RMS norm, `[hidden]`.
    pub norm: Vec<f32>,
    /// `[vocab, hidden]`; a clone of the embedding's handle when tied.
    pub head: Weight,
    /// Rotary tables, shared by clones.
    pub(crate) rope: Rope,
}

impl Model {
    /// A model of given parts; their shapes are the caller's promise.
    pub fn new(
        config: ModelConfig,
        architecture: &'static Architecture,
        embedding: Weight,
        blocks: Vec<Block>,
        norm: Vec<f32>,
        head: Weight,
    ) -> Self {
        let rope = Rope::new(&config);
        Model { config, architecture, embedding, blocks, norm, head, rope }
    }

    /// Cosines and sines of rotary embedding for at least so many positions.
    pub fn rope_table(&self, positions: usize) -> Arc<RopeTable> {
        self.rope.table(positions)
    }
}
