//! Keys and values of one sequence.

use crate::config::ModelConfig;
use crate::model::Model;
use tailorq_kernels::{KvBlock, KvType};

/// Per block, the keys (rotated) and values of all tokens so far. Clones share what they have in common.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    kind: KvType,
    pub(crate) len: usize,
    pub(crate) blocks: Vec<KvBlock>,
}

impl KvCache {
    /// A cache of no tokens that keeps keys and values as they are computed.
    pub fn new() -> Self {
        KvCache::default()
    }

    /// A cache of no tokens that stores keys and values in this precision.
    pub fn with(kind: KvType) -> Self {
        KvCache { kind, ..KvCache::default() }
    }

    /// How keys and values are stored.
    pub fn kind(&self) -> KvType {
        self.kind
    }

    /// Tokens held: the position of the next one.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all tokens but the first `len`, for conversations that go back. Keeps everything when `len` is not below [`KvCache::len`].
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for block in &mut self.blocks {
            block.truncate(self.len);
        }
    }

    /// Makes room for `tokens` tokens of `model` in all, rotary angles included, so that reading them asks for no memory.
    pub fn reserve(&mut self, model: &Model, tokens: usize) {
        self.prepare(&model.config);
        model.rope.table(tokens);
        for block in &mut self.blocks {
            block.reserve(tokens);
        }
    }

    /// Bytes of all keys and values.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(KvBlock::bytes).sum()
    }

    /// Bytes of the keys and values of one token of a model.
    pub fn token_bytes(kind: KvType, config: &ModelConfig) -> usize {
        2 * config.n_blocks * config.n_kv_heads * kind.row_bytes(config.head_dim)
    }

    /// A part for every block.
    pub(crate) fn prepare(&mut self, config: &ModelConfig) {
        let block = || KvBlock::new(self.kind, config.n_kv_heads, config.head_dim);
        self.blocks.resize_with(config.n_blocks, block);
    }
}
