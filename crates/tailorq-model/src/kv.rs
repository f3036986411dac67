//! Keys and values of one sequence.

/// Per block, the keys (rotated) and values of all tokens so far, `[len, kv_heads * head_dim]` f32 each.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    pub(crate) blocks: Vec<BlockKv>,
}

/// One block's part of a [`KvCache`].
#[derive(Clone, Debug, Default)]
pub(crate) struct BlockKv {
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
}
