//! The forward pass of a decoder, whole or in the stages that a streaming quantizer needs.

use crate::kv::KvCache;
use crate::model::{Block, Model};
use std::ops::Range;
use tailorq_kernels::Device;
use tailorq_tensor::{InputGroup, Matrix};

/// A ragged batch: several sequences laid end to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token ids of all sequences, end to end.
    pub ids: Vec<u32>,
    /// Where each sequence lies in `ids`; ranges are ascending, disjoint and cover all ids.
    pub spans: Vec<Range<usize>>,
}

impl Batch {
    /// Lays sequences end to end.
    pub fn new<'a>(sequences: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let (mut ids, mut spans) = (Vec::new(), Vec::new());
        for sequence in sequences {
            spans.push(ids.len()..ids.len() + sequence.len());
            ids.extend_from_slice(sequence);
        }
        Batch { ids, spans }
    }
}

/// The parts of a block between which a quantizer may replace weights.
///
/// `residual` is the `[tokens, hidden]` stream; for each [`InputGroup`] in order: compute the group's input from what
/// came before, then apply the group's linears. Running all stages equals [`Model::forward_block`], bit for bit.
#[derive(Clone, Copy)]
pub struct BlockStage<'a> {
    /// The model (for sizes and rotary tables).
    pub model: &'a Model,
    /// The block, which may hold replaced weights.
    pub block: &'a Block,
    /// Where it runs.
    pub device: &'a dyn Device,
}

impl BlockStage<'_> {
    /// `norm(residual)`: the input of q, k and v. `[n, hidden]`.
    pub fn attention_input(&self, _residual: &Matrix) -> Matrix {
        todo!()
    }
    /// The mixed heads from the input of q, k and v: the input of o. Positions start at 0 in every span. `[n, heads * head_dim]`.
    pub fn attention_mix(&self, _attention_input: &Matrix, _spans: &[Range<usize>]) -> Matrix {
        todo!()
    }
    /// `residual += o(mixed)`.
    pub fn add_attention(&self, _mixed: &Matrix, _residual: &mut Matrix) {
        todo!()
    }
    /// `norm(residual)`: the input of gate and up. `[n, hidden]`.
    pub fn mlp_input(&self, _residual: &Matrix) -> Matrix {
        todo!()
    }
    /// `silu(gate(x)) * up(x)`: the input of down. `[n, intermediate]`.
    pub fn mlp_hidden(&self, _mlp_input: &Matrix) -> Matrix {
        todo!()
    }
    /// `residual += down(hidden)`.
    pub fn add_mlp(&self, _hidden: &Matrix, _residual: &mut Matrix) {
        todo!()
    }
}

impl Model {
    /// Embeds the tokens: `[ids.len(), hidden]`.
    pub fn embed(&self, _device: &dyn Device, _ids: &[u32]) -> Matrix {
        todo!()
    }

    /// One block over a batch of fresh sequences (positions from 0, no cache), in place.
    pub fn forward_block(&self, _device: &dyn Device, _block: &Block, _spans: &[Range<usize>], _residual: &mut Matrix) {
        todo!()
    }

    /// All blocks and the final norm; appends to each sequence's cache when caches are given (one a span; positions go
    /// on from what a cache holds). Returns `[batch.ids.len(), hidden]`.
    pub fn hidden(&self, _device: &dyn Device, _batch: &Batch, _caches: Option<&mut [KvCache]>) -> Matrix {
        todo!()
    }

    /// Logits of chosen hidden rows in chunks of the vocabulary: calls `visit(words, logits)` with
    /// `logits: [hidden.rows(), words.len()]`, words ascending, a fixed chunk size, so that the logits of a long window are never held whole.
    pub fn for_each_logits(
        &self,
        _device: &dyn Device,
        _hidden: &Matrix,
        _visit: &mut dyn FnMut(Range<usize>, &[f32]),
    ) {
        todo!()
    }

    /// All logits of a few rows: `[hidden.rows(), vocab]`.
    pub fn logits(&self, _device: &dyn Device, _hidden: &Matrix) -> Matrix {
        todo!()
    }

    /// Which activations a group of linears reads, for messages: `attention`, ...
    pub fn input_width(&self, group: InputGroup) -> usize {
        match group {
            InputGroup::Attention | InputGroup::Mlp => self.config.hidden,
            InputGroup::AttentionOutput => self.config.n_heads * self.config.head_dim,
            InputGroup::MlpOutput => self.config.intermediate,
        }
    }
}
