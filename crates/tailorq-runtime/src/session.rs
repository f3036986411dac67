//! One sequence in work: its tokens, and their keys and values.

use crate::error::RuntimeError;
use std::slice;
use tailorq_kernels::{Device, KvType};
use tailorq_model::{Batch, KvCache, Model};
use tailorq_tensor::Matrix;

/// Tokens that a prefill sends through the model at once: enough to keep the matrix products busy, few enough to keep
/// the activations small and an interruption prompt.
pub const PREFILL_CHUNK: usize = 512;

/// A model, the sequence it has read so far, and that sequence's keys and values.
pub struct Session<'a> {
    model: &'a Model,
    device: &'a dyn Device,
    cache: KvCache,
    tokens: Vec<u32>,
}

impl<'a> Session<'a> {
    /// An empty sequence that keeps keys and values as they are computed: the reference.
    pub fn new(model: &'a Model, device: &'a dyn Device) -> Self {
        Session::with(model, device, KvType::F32)
    }

    /// An empty sequence that stores keys and values in this precision.
    pub fn with(model: &'a Model, device: &'a dyn Device, kv: KvType) -> Self {
        Session { model, device, cache: KvCache::with(kv), tokens: Vec::new() }
    }

    /// The model that runs.
    pub fn model(&self) -> &'a Model {
        self.model
    }

    /// Every token that the model has read.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Longest sequence of the model.
    pub fn context_limit(&self) -> usize {
        self.model.config.max_positions
    }

    /// Forgets the sequence.
    pub fn reset(&mut self) {
        self.cache = KvCache::with(self.cache.kind());
        self.tokens.clear();
    }

    /// Keeps of the sequence what begins `ids` too and forgets the rest; returns how many tokens were kept. At least the
    /// last token of `ids` is left to read, because only reading gives logits.
    pub fn rewind_to(&mut self, ids: &[u32]) -> usize {
        let common = self.tokens.iter().zip(ids).take_while(|(a, b)| a == b).count();
        let kept = common.min(ids.len().saturating_sub(1));
        self.cache.truncate(kept);
        self.tokens.truncate(kept);
        kept
    }

    /// Reads `ids` after what was read before, [`PREFILL_CHUNK`] tokens at a time, and returns the logits `[vocab]` that
    /// follow the last of them. `cancelled` is asked before every chunk.
    ///
    /// Nothing is read when an id is unknown or the sequence would not fit the context; after an interruption the
    /// sequence ends with the last whole chunk.
    pub fn prefill(&mut self, ids: &[u32], cancelled: &dyn Fn() -> bool) -> Result<Vec<f32>, RuntimeError> {
        self.check(ids)?;
        let mut last = None;
        for chunk in ids.chunks(PREFILL_CHUNK) {
            if cancelled() {
                return Err(RuntimeError::Interrupted);
            }
            last = Some(self.read(chunk));
        }
        let hidden = last.ok_or(RuntimeError::EmptyPrompt)?;
        Ok(self.model.logits(self.device, &hidden).into_vec())
    }

    /// Reads one token and returns the logits `[vocab]` that follow it.
    pub fn step(&mut self, id: u32) -> Result<Vec<f32>, RuntimeError> {
        self.prefill(&[id], &|| false)
    }

    fn check(&self, ids: &[u32]) -> Result<(), RuntimeError> {
        let vocab = self.model.config.vocab;
        let known = |id: u32| (id as usize) < vocab;
        if let Some((offset, &id)) = ids.iter().enumerate().find(|(_, id)| !known(**id)) {
            return Err(RuntimeError::UnknownToken { id, position: self.tokens.len() + offset, vocab });
        }
        let (needed, limit) = (self.tokens.len() + ids.len(), self.context_limit());
        if needed > limit {
            return Err(RuntimeError::ContextFull { needed, limit });
        }
        Ok(())
    }

    /// The last row of the hidden states of `chunk`: `[1, hidden]`.
    fn read(&mut self, chunk: &[u32]) -> Matrix {
        let batch = Batch::new([chunk]);
        let hidden = self.model.hidden(self.device, &batch, Some(slice::from_mut(&mut self.cache)));
        self.tokens.extend_from_slice(chunk);
        Matrix::from_vec(1, hidden.cols(), hidden.row(hidden.rows() - 1).to_vec())
    }
}
