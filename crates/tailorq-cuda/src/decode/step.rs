//! What lies between the matrices of a step, as launches of the kernels of `decode_step.cu` and `decode_attention.cu`.

use super::launch::{self, BLOCK_THREADS, Launch, Sharing};
use super::matrix::Fragments;
use crate::error::CudaError;
use crate::gpu::{Buffer, Gpu, Source};
use std::sync::Arc;
use tailorq_model::ModelConfig;

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "decode_step",
    code: concat!(
        include_str!("../kernels/decode_parts.cuh"),
        include_str!("../kernels/decode_ring.cuh"),
        include_str!("../kernels/decode_attention.cu"),
        include_str!("../kernels/decode_step.cu")
    ),
};

/// Dynamic shared memory of these kernels at most: what every supported device gives a block.
pub(super) const MOST_SHARED: u32 = 96 << 10;

/// Positions of a split of attention: as many of them times [`SPLIT_STEP`] as have room.
const SPLIT_STEP: usize = 16;
const MOST_SPLIT: usize = 256;

/// Blocks of threads that look for the largest logit of a token, as in `decode_step.cu`.
const PICK_BLOCKS: usize = 32;

/// Heads whose values `attend` sums at once.
const HEADS_AT_ONCE: usize = 2;

/// Where the embedding of the tokens comes from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Embedding {
    pub(super) table: u64,
    pub(super) tokens: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Embed {
    embedding: u64,
    tokens: u64,
    stream: u64,
    width: u32,
    n: u32,
}

/// The stream of `n` tokens begins with their embeddings, `[n, width]`.
pub(super) fn embed(gpu: &Gpu, n: usize, width: usize, embedding: Embedding, stream: u64) -> Launch {
    let args = Embed { embedding: embedding.table, tokens: embedding.tokens, stream, width: width as u32, n: n as u32 };
    Launch::new(gpu, (&SOURCE, "embed", Sharing::Shared), 0, args)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Norm {
    stream: u64,
    weight: u64,
    out: u64,
    out_sums: u64,
    plain: u64,
    eps: f32,
    width: u32,
    n: u32,
    end: u32,
}

/// RMS norm of the stream of `n` tokens. `plain`: as numbers too.
pub(super) fn norm(gpu: &Gpu, n: usize, stream: u64, weight: (&Buffer, f32), out: (Fragments, u64)) -> Launch {
    let width = weight.0.bytes() / 4;
    let args = Norm {
        stream,
        weight: weight.0.ptr(),
        out: out.0.data,
        out_sums: out.0.sums,
        plain: out.1,
        eps: weight.1,
        width: width as u32,
        n: n as u32,
        end: 0,
    };
    Launch::new(gpu, (&SOURCE, "rms_norm", Sharing::Shared), 0, args)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Arrange {
    x: u64,
    up: u64,
    out: u64,
    out_sums: u64,
    plain: u64,
    width: u32,
    n: u32,
}

/// Numbers `[n, width]` become fragments; with `up`, `silu(x) up` does. `plain`: as numbers too.
pub(super) fn arrange(gpu: &Gpu, n: usize, width: usize, x: u64, up: u64, out: (Fragments, u64)) -> Launch {
    let args = Arrange { x, up, out: out.0.data, out_sums: out.0.sums, plain: out.1, width: width as u32, n: n as u32 };
    Launch::new(gpu, (&SOURCE, "arrange", Sharing::Shared), 0, args)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Attend {
    heads: u64,
    query_norm: u64,
    key_norm: u64,
    cos: u64,
    sin: u64,
    positions: u64,
    sequences: u64,
    keys: u64,
    values: u64,
    out: u64,
    out_sums: u64,
    plain: u64,
    parts: u64,
    arrivals: u64,
    eps: f32,
    scale: f32,
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: u32,
    capacity: u32,
    window: u32,
    split: u32,
    n_splits: u32,
    n: u32,
    stores: u32,
    end: u32,
}

/// Sizes of attention, and its cosines and sines on the device.
pub(super) struct Attention {
    config: ModelConfig,
    cos: Buffer,
    sin: Buffer,
    capacity: usize,
    split: usize,
    n_splits: usize,
}

/// What one call of attention reads and writes, beside keys and values.
pub(super) struct AttentionIo<'a> {
    /// Queries, keys and values, `[n, (heads + 2 kv_heads) head_dim]`.
    pub(super) heads: u64,
    pub(super) norms: Option<&'a (Buffer, Buffer)>,
    /// `[n]` of each.
    pub(super) positions: u64,
    pub(super) sequences: u64,
    /// Keys and values of the block.
    pub(super) cache: (&'a Buffer, &'a Buffer),
    pub(super) out: (Fragments, u64),
    pub(super) parts: &'a Buffer,
    pub(super) arrivals: &'a Buffer,
}

/// Warps of a block.
const WARPS: usize = BLOCK_THREADS as usize / 32;

/// Bytes of shared memory of `attend`: keys and values of so many positions, and what `Rooms` names beside.
fn shared(config: &ModelConfig, split: usize) -> usize {
    let (group, width) = (config.n_heads / config.n_kv_heads, config.head_dim);
    let (rows, numbers) =
        (2 * split * width, group * (width + split + 2 * WARPS) + WARPS * HEADS_AT_ONCE * width + width);
    2 * rows + 4 * numbers
}

impl Attention {
    /// For caches of `capacity` tokens; `cos` and `sin` have that many positions.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        config: &ModelConfig,
        capacity: usize,
        cos: &[f32],
        sin: &[f32],
    ) -> Result<Self, CudaError> {
        let refused = |what: String| Err(CudaError::Unsupported { what });
        if !config.head_dim.is_multiple_of(16) || config.head_dim > 256 {
            return refused(format!("heads of {} numbers; it takes multiples of 16 up to 256", config.head_dim));
        }
        let room = launch::half(gpu).unwrap_or(launch::whole(gpu)) as usize;
        let mut splits = (1..=MOST_SPLIT / SPLIT_STEP).rev().map(|steps| steps * SPLIT_STEP);
        let Some(split) = splits.find(|split| shared(config, *split) <= room) else {
            let (heads, kv_heads, width) = (config.n_heads, config.n_kv_heads, config.head_dim);
            return refused(format!("{heads} heads of {width} numbers on {kv_heads} heads of keys"));
        };
        Ok(Attention {
            config: config.clone(),
            cos: gpu.upload(cos),
            sin: gpu.upload(sin),
            capacity,
            split,
            n_splits: capacity.div_ceil(split),
        })
    }

    /// Numbers of the parts of `n` tokens.
    pub(super) fn n_parts(&self, n: usize) -> usize {
        n * self.config.n_heads * self.n_splits * (self.config.head_dim + 2)
    }

    /// Attention of `n` tokens over their caches. Tokens of one sequence (`is_prompt`) are stored by a launch before it.
    pub(super) fn launches(&self, gpu: &Gpu, n: usize, io: &AttentionIo<'_>, is_prompt: bool) -> Vec<Launch> {
        let config = &self.config;
        let args = Attend {
            heads: io.heads,
            query_norm: io.norms.map_or(0, |n| n.0.ptr()),
            key_norm: io.norms.map_or(0, |n| n.1.ptr()),
            cos: self.cos.ptr(),
            sin: self.sin.ptr(),
            positions: io.positions,
            sequences: io.sequences,
            keys: io.cache.0.ptr(),
            values: io.cache.1.ptr(),
            out: io.out.0.data,
            out_sums: io.out.0.sums,
            plain: io.out.1,
            parts: io.parts.ptr(),
            arrivals: io.arrivals.ptr(),
            eps: config.rms_eps,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
            n_heads: config.n_heads as u32,
            n_kv_heads: config.n_kv_heads as u32,
            head_dim: config.head_dim as u32,
            capacity: self.capacity as u32,
            window: config.sliding_window.map_or(0, |w| w.min(u32::MAX as usize) as u32),
            split: self.split as u32,
            n_splits: self.n_splits as u32,
            n: n as u32,
            stores: u32::from(!is_prompt),
            end: 0,
        };
        let of_store = WARPS * 4 * config.head_dim;
        let store = is_prompt.then(|| Launch::new(gpu, (&SOURCE, "store", Sharing::Alone), of_store as u32, args));
        let of_attend = shared(config, self.split);
        store
            .into_iter()
            .chain([Launch::new(gpu, (&SOURCE, "attend", Sharing::Shared), of_attend as u32, args)])
            .collect()
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Pick {
    logits: u64,
    best: u64,
    best_idx: u64,
    arrivals: u64,
    tokens: u64,
    positions: u64,
    next_positions: u64,
    taken: u64,
    ring: u64,
    vocabulary: u32,
    capacity: u32,
    ring_length: u32,
    n: u32,
}

/// The choice of tokens: what it writes, for so many sequences.
pub(super) struct Choice {
    best: Buffer,
    best_idx: Buffer,
    arrivals: Buffer,
    /// Position of the token that is chosen next, i32.
    pub(super) next_positions: Buffer,
    /// How many were chosen.
    pub(super) taken: Buffer,
    /// `[sequences, ring_length]`.
    pub(super) ring: Buffer,
    ring_length: usize,
}

impl Choice {
    pub(super) fn new(gpu: &Arc<Gpu>, n_sequences: usize, ring_length: usize) -> Self {
        Choice {
            best: gpu.zeros(4 * n_sequences * PICK_BLOCKS),
            best_idx: gpu.zeros(4 * n_sequences * PICK_BLOCKS),
            arrivals: gpu.zeros(4 * n_sequences),
            next_positions: gpu.zeros(4 * n_sequences),
            taken: gpu.zeros(4 * n_sequences),
            ring: gpu.zeros(4 * n_sequences * ring_length),
            ring_length,
        }
    }

    /// The most likely token of each of `n` sequences, whose `logits` are `[n, vocabulary]`, becomes what the step reads.
    pub(super) fn launch(
        &self,
        gpu: &Gpu,
        n: usize,
        logits: (u64, usize),
        capacity: usize,
        tokens: u64,
        positions: u64,
    ) -> Launch {
        let args = Pick {
            logits: logits.0,
            best: self.best.ptr(),
            best_idx: self.best_idx.ptr(),
            arrivals: self.arrivals.ptr(),
            tokens,
            positions,
            next_positions: self.next_positions.ptr(),
            taken: self.taken.ptr(),
            ring: self.ring.ptr(),
            vocabulary: logits.1 as u32,
            capacity: capacity as u32,
            ring_length: self.ring_length as u32,
            n: n as u32,
        };
        Launch::new(gpu, (&SOURCE, "pick", Sharing::Alone), 0, args)
    }
}
