//! Reading tokens after what caches hold, in buffers that are used again.
//!
//! This is the forward pass of generation: the same operations in the same order as [`crate::BlockStage`], but what they
//! write lies in a [`Workspace`] that grows to the largest batch it has seen and then stays, so that a step asks the
//! allocator for nothing. A device with a memory of its own takes [`Model::read_resident`] instead, which is the stages
//! themselves.

use crate::forward::{BlockStage, attention_shape, positions, positions_into};
use crate::kv::KvCache;
use crate::model::{Block, Linear, Model};
use std::ops::Range;
use tailorq_kernels::{AttentionSpan, Device, KeyValues, KvBlock, Resident, RopeTable};
use tailorq_tensor::{Matrix, Slot};

/// The buffers of a pass, by role. One serves any model and any batch, one pass at a time.
#[derive(Default)]
pub struct Workspace {
    /// `[tokens, hidden]`.
    residual: Vec<f32>,
    /// What a norm makes of it.
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Queries or keys before their norms.
    before: Vec<f32>,
    /// What attention makes of them.
    mixed: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// What a block adds to the residual stream.
    change: Vec<f32>,
    logits: Vec<f32>,
    positions: Vec<u32>,
    /// Tokens in every cache before the pass.
    past: Vec<usize>,
    /// The rows of every sequence in a step.
    rows: Vec<Range<usize>>,
    /// Empty between passes; it only lends its memory.
    spans: Vec<AttentionSpan<'static>>,
    /// The hidden states of the last pass where a device holds them in its own memory.
    resident: Option<Matrix>,
}

impl Workspace {
    /// Empty buffers.
    pub fn new() -> Self {
        Workspace::default()
    }
}

/// The first `len` elements, whatever they hold.
fn room(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// An empty vector for elements of another lifetime that keeps the memory: the standard library collects in place.
fn recycled<'b>(mut spans: Vec<AttentionSpan<'_>>) -> Vec<AttentionSpan<'b>> {
    spans.clear();
    spans.into_iter().map(|_| unreachable!("the vector was cleared")).collect()
}

/// What all blocks of one pass share.
struct Pass<'a> {
    model: &'a Model,
    device: &'a dyn Device,
    spans: &'a [Range<usize>],
    table: &'a RopeTable,
    n: usize,
}

impl Model {
    /// Reads `ids`, whose sequences are the ranges `spans` (ascending, covering all), each after what its cache holds, and
    /// adds them to the caches. Returns the hidden states after the final norm, `[ids.len(), hidden]`.
    pub fn read<'w>(
        &self,
        device: &dyn Device,
        ids: &[u32],
        spans: &[Range<usize>],
        caches: &mut [KvCache],
        workspace: &'w mut Workspace,
    ) -> &'w [f32] {
        assert_eq!(spans.len(), caches.len(), "one cache a sequence");
        if let Some(resident) = device.resident() {
            let hidden = self.read_resident(device, resident, (ids, spans), caches);
            return workspace.resident.insert(hidden).data();
        }
        workspace.resident = None;
        let n = ids.len();
        workspace.past.clear();
        workspace.past.extend(caches.iter().map(KvCache::len));
        positions_into(&mut workspace.positions, n, spans, |i| workspace.past[i]);
        let table = self.rope.table(workspace.positions.iter().max().map_or(0, |&p| p as usize + 1));
        device.embed(ids, &self.embedding, room(&mut workspace.residual, n * self.config.hidden));
        caches.iter_mut().for_each(|cache| cache.prepare(&self.config));
        let pass = Pass { model: self, device, spans, table: &table, n };
        for (block_idx, block) in self.blocks.iter().enumerate() {
            pass.attention(block, block_idx, caches, workspace);
            pass.feed_forward(block, workspace);
        }
        for (cache, rows) in caches.iter_mut().zip(spans) {
            cache.len += rows.len();
        }
        pass.norm(&self.norm, workspace);
        &workspace.normed[..n * self.config.hidden]
    }

    /// One token for every sequence. Returns the logits that follow, `[ids.len(), vocab]`.
    pub fn step<'w>(
        &self,
        device: &dyn Device,
        ids: &[u32],
        caches: &mut [KvCache],
        workspace: &'w mut Workspace,
    ) -> &'w [f32] {
        let mut rows = std::mem::take(&mut workspace.rows);
        rows.clear();
        rows.extend((0..ids.len()).map(|i| i..i + 1));
        self.read_only(device, ids, &rows, caches, workspace);
        workspace.rows = rows;
        self.head(device, 0..ids.len(), workspace)
    }

    /// [`Model::step`] on a device with a memory of its own, where the logits stay.
    pub fn step_resident(
        &self,
        device: &dyn Device,
        resident: &dyn Resident,
        ids: &[u32],
        caches: &mut [KvCache],
    ) -> Matrix {
        let rows: Vec<Range<usize>> = (0..ids.len()).map(|i| i..i + 1).collect();
        let hidden = self.read_resident(device, resident, (ids, &rows), caches);
        device.linear_matrix(&hidden, &self.head, None, 0..self.head.rows())
    }

    /// Reads `ids` of one sequence. Returns the logits that follow the last of them, `[vocab]`.
    pub fn read_prompt<'w>(
        &self,
        device: &dyn Device,
        ids: &[u32],
        cache: &mut KvCache,
        workspace: &'w mut Workspace,
    ) -> &'w [f32] {
        assert!(!ids.is_empty(), "read_prompt: at least one token");
        let all = 0..ids.len();
        self.read_only(device, ids, std::slice::from_ref(&all), std::slice::from_mut(cache), workspace);
        self.head(device, ids.len() - 1..ids.len(), workspace)
    }

    /// [`Model::read`] for those who do not look at the hidden states, which stay where they are.
    pub fn read_only(
        &self,
        device: &dyn Device,
        ids: &[u32],
        spans: &[Range<usize>],
        caches: &mut [KvCache],
        workspace: &mut Workspace,
    ) {
        match device.resident() {
            Some(resident) => {
                workspace.resident = Some(self.read_resident(device, resident, (ids, spans), caches));
            }
            None => {
                self.read(device, ids, spans, caches, workspace);
            }
        }
    }

    /// [`Model::read`] with matrices and caches in the device's own memory.
    pub(crate) fn read_resident(
        &self,
        device: &dyn Device,
        resident: &dyn Resident,
        (ids, spans): (&[u32], &[Range<usize>]),
        caches: &mut [KvCache],
    ) -> Matrix {
        let positions = positions(ids.len(), spans, |i| caches[i].len());
        caches.iter_mut().for_each(|cache| cache.prepare(&self.config));
        let mut residual = self.embed(device, ids);
        for (block_idx, block) in self.blocks.iter().enumerate() {
            let stage = BlockStage { model: self, block, device };
            let ([q, k, v], _) = stage.heads(&stage.attention_input(&residual), &positions);
            let mut blocks: Vec<&mut KvBlock> = caches.iter_mut().map(|c| &mut c.blocks[block_idx]).collect();
            resident.push(&mut blocks, &k, &v, spans);
            let blocks: Vec<&KvBlock> = caches.iter().map(|c| &c.blocks[block_idx]).collect();
            let mixed = resident.attention_cached(stage.attention_shape(), &q, &blocks, spans);
            stage.add_attention(&mixed, &mut residual);
            stage.mlp(&mut residual);
        }
        for (cache, rows) in caches.iter_mut().zip(spans) {
            cache.len += rows.len();
        }
        self.final_norm(device, &residual)
    }

    /// The logits of some rows of the hidden states that the workspace holds.
    fn head<'w>(&self, device: &dyn Device, rows: Range<usize>, workspace: &'w mut Workspace) -> &'w [f32] {
        if let Some(hidden) = workspace.resident.take() {
            let chosen: Vec<usize> = rows.collect();
            let logits = device.linear_matrix(&device.rows(&hidden, &chosen), &self.head, None, 0..self.head.rows());
            workspace.logits = logits.into_vec();
            return &workspace.logits;
        }
        let width = self.config.hidden;
        let logits = room(&mut workspace.logits, rows.len() * self.head.rows());
        device.linear(&workspace.normed[rows.start * width..rows.end * width], &self.head, None, logits);
        logits
    }
}

impl Pass<'_> {
    /// `normed = norm(residual)`.
    fn norm(&self, weight: &[f32], workspace: &mut Workspace) {
        let len = self.n * weight.len();
        let eps = self.model.config.rms_eps;
        self.device.rms_norm(&workspace.residual[..len], weight, eps, room(&mut workspace.normed, len));
    }

    /// `y = linear(x)`; `x` may be longer.
    fn linear(&self, linear: &Linear, x: &[f32], y: &mut Vec<f32>) {
        let x = &x[..self.n * linear.weight.cols()];
        let y = room(y, self.n * linear.weight.rows());
        self.device.linear(x, &linear.weight, linear.bias.as_deref(), y);
    }

    /// `residual += linear(x)`.
    fn add(&self, linear: &Linear, x: &[f32], change: &mut Vec<f32>, residual: &mut [f32]) {
        self.linear(linear, x, change);
        let len = self.n * linear.weight.rows();
        self.device.add(&change[..len], &mut residual[..len]);
    }

    fn attention(&self, block: &Block, block_idx: usize, caches: &mut [KvCache], workspace: &mut Workspace) {
        self.norm(&block.attention_norm, workspace);
        let Workspace { residual, normed, q, k, v, before, mixed, change, positions, past, spans, .. } = workspace;
        for (slot, y) in [(Slot::Q, &mut *q), (Slot::K, &mut *k), (Slot::V, &mut *v)] {
            self.linear(block.linear(slot), normed, y);
        }
        let config = &self.model.config;
        let (width, kv_width) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
        let (q, k, v) = (&mut q[..self.n * width], &mut k[..self.n * kv_width], &v[..self.n * kv_width]);
        if let Some((q_norm, k_norm)) = &block.qk_norm {
            for (heads, weight) in [(&mut *q, q_norm), (&mut *k, k_norm)] {
                let before = room(before, heads.len());
                before.copy_from_slice(heads);
                self.device.rms_norm(before, weight, config.rms_eps, heads);
            }
        }
        self.device.rope(q, self.table, positions);
        self.device.rope(k, self.table, positions);
        for (rows, cache) in self.spans.iter().zip(caches.iter_mut()) {
            let part = rows.start * kv_width..rows.end * kv_width;
            cache.blocks[block_idx].push(&k[part.clone()], &v[part]);
        }
        let mut sequences = recycled(std::mem::take(spans));
        sequences.extend(self.spans.iter().zip(past.iter()).zip(caches.iter()).map(|((rows, &past), cache)| {
            AttentionSpan { rows: rows.clone(), source: KeyValues::Cache(&cache.blocks[block_idx]), past }
        }));
        self.device.attention(attention_shape(config), q, &sequences, room(mixed, self.n * width));
        *spans = recycled(sequences);
        self.add(block.linear(Slot::O), mixed, change, residual);
    }

    fn feed_forward(&self, block: &Block, workspace: &mut Workspace) {
        self.norm(&block.mlp_norm, workspace);
        let Workspace { residual, normed, gate, up, change, .. } = workspace;
        self.linear(block.linear(Slot::Gate), normed, gate);
        self.linear(block.linear(Slot::Up), normed, up);
        let len = self.n * self.model.config.intermediate;
        self.device.swiglu(&mut gate[..len], &up[..len]);
        self.add(block.linear(Slot::Down), gate, change, residual);
    }
}
