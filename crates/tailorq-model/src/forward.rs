//! The forward pass of a decoder, whole or in the stages that a streaming quantizer needs.

use crate::config::ModelConfig;
use crate::kv::KvCache;
use crate::model::{Block, Linear, Model};
use crate::workspace::Workspace;
use std::ops::Range;
use std::sync::Arc;
use tailorq_kernels::{AttentionShape, Device, RopeTable};
use tailorq_tensor::{InputGroup, Matrix, Slot};

/// Words of the vocabulary whose logits are computed at once: with 2048 tokens, 32 MiB.
const LOGITS_CHUNK: usize = 4096;

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
    pub fn attention_input(&self, residual: &Matrix) -> Matrix {
        self.norm(residual, &self.block.attention_norm)
    }

    /// The mixed heads from the input of q, k and v: the input of o. Positions start at 0 in every span. `[n, heads * head_dim]`.
    pub fn attention_mix(&self, attention_input: &Matrix, spans: &[Range<usize>]) -> Matrix {
        let positions = positions(attention_input.rows(), spans, |_| 0);
        let (heads, _) = self.heads(attention_input, &positions);
        self.mix(&heads, spans)
    }

    /// Attention of fresh sequences.
    pub(crate) fn mix(&self, [q, k, v]: &[Matrix; 3], spans: &[Range<usize>]) -> Matrix {
        self.device.attention_matrix(self.attention_shape(), [q, k, v], spans)
    }

    /// `residual += o(mixed)`.
    pub fn add_attention(&self, mixed: &Matrix, residual: &mut Matrix) {
        let y = self.apply(Slot::O, mixed);
        self.device.add_matrix(&y, residual);
    }

    /// `norm(residual)`: the input of gate and up. `[n, hidden]`.
    pub fn mlp_input(&self, residual: &Matrix) -> Matrix {
        self.norm(residual, &self.block.mlp_norm)
    }

    /// `silu(gate(x)) * up(x)`: the input of down. `[n, intermediate]`.
    pub fn mlp_hidden(&self, mlp_input: &Matrix) -> Matrix {
        let mut gate = self.apply(Slot::Gate, mlp_input);
        let up = self.apply(Slot::Up, mlp_input);
        self.device.swiglu_matrix(&mut gate, &up);
        gate
    }

    /// `residual += down(hidden)`.
    pub fn add_mlp(&self, hidden: &Matrix, residual: &mut Matrix) {
        let y = self.apply(Slot::Down, hidden);
        self.device.add_matrix(&y, residual);
    }

    /// The feed-forward, all stages.
    pub(crate) fn mlp(&self, residual: &mut Matrix) {
        let hidden = self.mlp_hidden(&self.mlp_input(residual));
        self.add_mlp(&hidden, residual);
    }

    /// Queries, keys and values of tokens at these positions, ready to be mixed: heads normalised (if the architecture does)
    /// and rotated. With them queries and keys as they were before such norms.
    pub(crate) fn heads(&self, x: &Matrix, positions: &[u32]) -> ([Matrix; 3], Option<[Matrix; 2]>) {
        let (mut q, mut k, v) = (self.apply(Slot::Q, x), self.apply(Slot::K, x), self.apply(Slot::V, x));
        let plain = self.block.qk_norm.as_ref().map(|(q_norm, k_norm)| {
            // A head is a row of `head_dim` elements, so the norm of rows is the norm of heads.
            let eps = self.model.config.rms_eps;
            [(&mut q, q_norm), (&mut k, k_norm)].map(|(heads, norm)| {
                let normed = self.device.rms_norm_matrix(heads, norm, eps);
                std::mem::replace(heads, normed)
            })
        });
        let table = self.rope_table(positions);
        self.device.rope_matrix(&mut q, &table, positions);
        self.device.rope_matrix(&mut k, &table, positions);
        ([q, k, v], plain)
    }

    /// Angles of all these positions.
    pub(crate) fn rope_table(&self, positions: &[u32]) -> Arc<RopeTable> {
        self.model.rope.table(positions.iter().max().map_or(0, |&p| p as usize + 1))
    }

    pub(crate) fn attention_shape(&self) -> AttentionShape {
        attention_shape(&self.model.config)
    }

    pub(crate) fn apply(&self, slot: Slot, x: &Matrix) -> Matrix {
        apply_linear(self.device, self.block.linear(slot), x)
    }

    fn norm(&self, x: &Matrix, weight: &[f32]) -> Matrix {
        self.device.rms_norm_matrix(x, weight, self.model.config.rms_eps)
    }
}

/// Heads as attention wants to know them.
pub(crate) fn attention_shape(config: &ModelConfig) -> AttentionShape {
    AttentionShape {
        heads: config.n_heads,
        kv_heads: config.n_kv_heads,
        head_dim: config.head_dim,
        window: config.sliding_window,
    }
}

fn apply_linear(device: &dyn Device, linear: &Linear, x: &Matrix) -> Matrix {
    device.linear_matrix(x, &linear.weight, linear.bias.as_deref(), 0..linear.weight.rows())
}

/// The position of every row: counted up from `first(i)` in span `i`.
pub(crate) fn positions(n_rows: usize, spans: &[Range<usize>], first: impl Fn(usize) -> usize) -> Vec<u32> {
    let mut all = Vec::new();
    positions_into(&mut all, n_rows, spans, first);
    all
}

/// As [`positions`], in place of what the vector held.
pub(crate) fn positions_into(
    positions: &mut Vec<u32>,
    n_rows: usize,
    spans: &[Range<usize>],
    first: impl Fn(usize) -> usize,
) {
    positions.clear();
    positions.resize(n_rows, 0);
    for (span_idx, rows) in spans.iter().enumerate() {
        for (i, position) in positions[rows.clone()].iter_mut().enumerate() {
            *position =
                u32::try_from(first(span_idx) + i).expect("a sequence of more than 2^32 tokens does not fit memory");
        }
    }
}

impl Model {
    /// Embeds the tokens: `[ids.len(), hidden]`. Every id is below the vocabulary's size.
    pub fn embed(&self, device: &dyn Device, ids: &[u32]) -> Matrix {
        device.embed_matrix(ids, &self.embedding)
    }

    /// One block over a batch of fresh sequences (positions from 0, no cache), in place.
    pub fn forward_block(&self, device: &dyn Device, block: &Block, spans: &[Range<usize>], residual: &mut Matrix) {
        let stage = BlockStage { model: self, block, device };
        let mixed = stage.attention_mix(&stage.attention_input(residual), spans);
        stage.add_attention(&mixed, residual);
        stage.mlp(residual);
    }

    /// All blocks and the final norm; appends to each sequence's cache when caches are given (one a span; positions go
    /// on from what a cache holds). Returns `[batch.ids.len(), hidden]`.
    pub fn hidden(&self, device: &dyn Device, batch: &Batch, caches: Option<&mut [KvCache]>) -> Matrix {
        if let Some(caches) = caches {
            if let Some(resident) = device.resident() {
                return self.read_resident(device, resident, (&batch.ids, &batch.spans), caches);
            }
            let mut workspace = Workspace::new();
            let hidden = self.read(device, &batch.ids, &batch.spans, caches, &mut workspace).to_vec();
            return Matrix::from_vec(batch.ids.len(), self.config.hidden, hidden);
        }
        let mut residual = self.embed(device, &batch.ids);
        for block in &self.blocks {
            self.forward_block(device, block, &batch.spans, &mut residual);
        }
        self.final_norm(device, &residual)
    }

    /// The final norm of the residual stream: what the head reads. `[n, hidden]`.
    pub fn final_norm(&self, device: &dyn Device, residual: &Matrix) -> Matrix {
        device.rms_norm_matrix(residual, &self.norm, self.config.rms_eps)
    }

    /// Logits of chosen hidden rows in chunks of the vocabulary: calls `visit(words, logits)` with
    /// `logits: [hidden.rows(), words.len()]`, words ascending, a fixed chunk size, so that the logits of a long window are never held whole.
    pub fn for_each_logits(&self, device: &dyn Device, hidden: &Matrix, visit: &mut dyn FnMut(Range<usize>, &Matrix)) {
        let n_words = self.head.rows();
        let mut room = Vec::new();
        for start in (0..n_words).step_by(LOGITS_CHUNK) {
            let words = start..(start + LOGITS_CHUNK).min(n_words);
            if device.resident().is_some() {
                visit(words.clone(), &device.linear_matrix(hidden, &self.head, None, words));
                continue;
            }
            // One buffer for all chunks: fresh memory of this size would be cleared by the system every time.
            room.resize(hidden.rows() * words.len(), 0.0);
            device.linear_rows(hidden.data(), &self.head, None, words.clone(), &mut room);
            let logits = Matrix::from_vec(hidden.rows(), words.len(), room);
            visit(words, &logits);
            room = logits.into_vec();
        }
    }

    /// All logits of a few rows: `[hidden.rows(), vocab]`.
    pub fn logits(&self, device: &dyn Device, hidden: &Matrix) -> Matrix {
        let mut all = Matrix::zeros(hidden.rows(), self.head.rows());
        self.for_each_logits(device, hidden, &mut |words, logits| {
            for r in 0..logits.rows() {
                all.row_mut(r)[words.clone()].copy_from_slice(logits.row(r));
            }
        });
        all
    }

    /// Elements that a group of linears reads for one token.
    pub fn input_width(&self, group: InputGroup) -> usize {
        match group {
            InputGroup::Attention | InputGroup::Mlp => self.config.hidden,
            InputGroup::AttentionOutput => self.config.n_heads * self.config.head_dim,
            InputGroup::MlpOutput => self.config.intermediate,
        }
    }
}
