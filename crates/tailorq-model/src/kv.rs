//! Keys and values of one sequence.

/// Per block, the keys (rotated) and values of all tokens so far, `[len, kv_heads * head_dim]` f32 each.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    pub(crate) len: usize,
    pub(crate) blocks: Vec<BlockKv>,
}

/// One block's part of a [`KvCache`].
#[derive(Clone, Debug, Default)]
pub(crate) struct BlockKv {
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
}

impl KvCache {
    /// A cache of no tokens.
    pub fn new() -> Self {
        KvCache::default()
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
        if len >= self.len {
            return;
        }
        for block in &mut self.blocks {
            let width = block.keys.len() / self.len;
            block.keys.truncate(len * width);
            block.values.truncate(len * width);
        }
        self.len = len;
    }

    /// Bytes of all keys and values.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(|b| 4 * (b.keys.len() + b.values.len())).sum()
    }
}
