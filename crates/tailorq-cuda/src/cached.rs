//! Keys and values of sequences that go on, on the device: one pair of growing arrays a sequence and block.
//!
//! They are f32 whatever type the cache asks for: the device has room, and rounding would only lose. A copy of a cache shares
//! its arrays until one of the two writes.

use crate::attention::Sequence;
use crate::device::Cuda;
use crate::gpu::{Buffer, Grid, Source, launch};
use std::ops::Range;
use std::sync::Arc;
use tailorq_kernels::{AttentionShape, KvBlock};
use tailorq_tensor::Matrix;

pub(crate) const SOURCE: Source = Source { name: "cached", code: include_str!("kernels/cached.cu") };

/// Tokens that a cache has room for at first; it doubles.
const FIRST_TOKENS: usize = 256;

/// The longest head that [`Cuda::attention_steps`] has registers for.
const MAX_HEAD_DIM: usize = 256;

struct Arrays {
    /// `[capacity, width]`.
    keys: Buffer,
    values: Buffer,
    /// Tokens.
    capacity: usize,
}

/// The arrays of a block that holds tokens.
fn arrays(block: &KvBlock) -> &Arrays {
    let remote = block.remote().expect("a cache belongs to the device that wrote its first token");
    remote.downcast_ref().expect("one kind of device a process")
}

const FLOAT: usize = size_of::<f32>();

impl Cuda {
    /// Makes room for `more` tokens that the block alone holds.
    fn make_room(&self, block: &mut KvBlock, width: usize, more: usize) {
        let len = block.len();
        let kept = block.remote_mut().and_then(|remote| Arc::get_mut(remote)).and_then(|r| r.downcast_ref::<Arrays>());
        if kept.is_some_and(|a| a.capacity >= len + more) {
            return;
        }
        let capacity = (len + more).next_power_of_two().max(FIRST_TOKENS);
        let array = || self.gpu.allocate(capacity * width * FLOAT);
        let grown = Arrays { keys: array(), values: array(), capacity };
        if len > 0 {
            let old = arrays(block);
            self.gpu.copy(grown.keys.ptr(), old.keys.ptr(), len * width * FLOAT);
            self.gpu.copy(grown.values.ptr(), old.values.ptr(), len * width * FLOAT);
        }
        block.set_remote(Arc::new(grown));
    }

    /// See [`tailorq_kernels::Resident::push`].
    pub(crate) fn push_cached(
        &self,
        blocks: &mut [&mut KvBlock],
        keys: &Matrix,
        values: &Matrix,
        spans: &[Range<usize>],
    ) {
        let width = keys.cols();
        let (k, v) = (self.gpu.address(keys), self.gpu.address(values));
        for (block, rows) in blocks.iter_mut().zip(spans) {
            self.make_room(block, width, rows.len());
        }
        if one_each(spans) {
            let list = self.addresses(blocks.iter().map(|b| &**b), 0);
            let at = |i: usize| list.ptr() + (i * blocks.len() * 8) as u64;
            let grid = Grid::rows(blocks.len(), 128);
            launch!(self.gpu, &SOURCE, "push_rows", grid, k, v, at(0), at(1), at(2), width as i32);
        } else {
            for (block, rows) in blocks.iter().zip(spans) {
                let (arrays, from, to) =
                    (arrays(block), (rows.start * width * FLOAT) as u64, (block.len() * width * FLOAT) as u64);
                self.gpu.copy(arrays.keys.ptr() + to, k + from, rows.len() * width * FLOAT);
                self.gpu.copy(arrays.values.ptr() + to, v + from, rows.len() * width * FLOAT);
            }
        }
        for (block, rows) in blocks.iter_mut().zip(spans) {
            block.grow(rows.len());
        }
    }

    /// Addresses of keys, of values, and the tokens held less `newest`, of every block.
    fn addresses<'a>(&self, blocks: impl Iterator<Item = &'a KvBlock> + Clone, newest: usize) -> Buffer {
        let keys = blocks.clone().map(|b| arrays(b).keys.ptr());
        let values = blocks.clone().map(|b| arrays(b).values.ptr());
        let list: Vec<u64> = keys.chain(values).chain(blocks.map(|b| (b.len() - newest) as u64)).collect();
        self.gpu.upload(&list)
    }

    /// See [`tailorq_kernels::Resident::attention_cached`].
    pub(crate) fn attention_after(
        &self,
        shape: AttentionShape,
        q: &Matrix,
        blocks: &[&KvBlock],
        spans: &[Range<usize>],
    ) -> Matrix {
        let mut y = Matrix::zeros(q.rows(), q.cols());
        let at = self.gpu.address_mut(&mut y);
        let from = self.gpu.address(q);
        if one_each(spans) && shape.head_dim <= MAX_HEAD_DIM {
            self.attention_steps(shape, from, blocks, at);
            return y;
        }
        for (block, rows) in blocks.iter().zip(spans).filter(|(_, rows)| !rows.is_empty()) {
            let (arrays, offset) = (arrays(block), (rows.start * q.cols() * FLOAT) as u64);
            let (k, v) = (arrays.keys.ptr(), arrays.values.ptr());
            let sequence = Sequence { q: from + offset, k, v, n: rows.len(), past: block.len() - rows.len() };
            self.attend(shape, &sequence, at + offset);
        }
        y
    }

    /// One new token of every sequence.
    fn attention_steps(&self, shape: AttentionShape, q: u64, blocks: &[&KvBlock], y: u64) {
        let list = self.addresses(blocks.iter().copied(), 1);
        let at = |i: usize| list.ptr() + (i * blocks.len() * 8) as u64;
        let grid = Grid { blocks: (shape.heads as u32, blocks.len() as u32, 1), threads: 256, shared: 0 };
        let window = shape.window.map_or(0, |w| w.min(i32::MAX as usize) as i32);
        let scale = 1.0 / (shape.head_dim as f32).sqrt();
        let (heads, kv_heads, head_dim) = (shape.heads as i32, shape.kv_heads as i32, shape.head_dim as i32);
        launch!(
            self.gpu,
            &SOURCE,
            "attention_step",
            grid,
            q,
            at(0),
            at(1),
            at(2),
            y,
            heads,
            kv_heads,
            head_dim,
            window,
            scale
        );
    }
}

/// Whether every sequence has one row, in order.
fn one_each(spans: &[Range<usize>]) -> bool {
    !spans.is_empty() && spans.iter().enumerate().all(|(i, rows)| *rows == (i..i + 1))
}
