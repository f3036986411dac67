//! One sequence in work: its tokens, and their keys and values.

use crate::error::RuntimeError;
use std::slice;
use tailorq_kernels::{Device, KvType};
use tailorq_model::{KvCache, Model, Workspace};

/// Tokens that a prefill sends through the model at once: enough to keep the matrix products busy, few enough to keep
/// the activations small and an interruption prompt.
pub const PREFILL_CHUNK: usize = 512;

/// A model, the sequence it has read so far, and that sequence's keys and values.
pub struct Session<'a> {
    model: &'a Model,
    device: &'a dyn Device,
    cache: KvCache,
    tokens: Vec<u32>,
    workspace: Workspace,
    logits: Vec<f32>,
}

impl<'a> Session<'a> {
    /// An empty sequence that keeps keys and values as they are computed: the reference.
    pub fn new(model: &'a Model, device: &'a dyn Device) -> Self {
        Session::with(model, device, KvType::F32)
    }

    /// An empty sequence that stores keys and values in this precision.
    pub fn with(model: &'a Model, device: &'a dyn Device, kv: KvType) -> Self {
        let (cache, workspace) = (KvCache::with(kv), Workspace::new());
        Session { model, device, cache, tokens: Vec::new(), workspace, logits: Vec::new() }
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
        self.logits.clear();
    }

    /// Keeps of the sequence what begins `ids` too and forgets the rest; returns how many tokens were kept. At least the
    /// last token of `ids` is left to read, because only reading gives logits.
    pub fn rewind_to(&mut self, ids: &[u32]) -> usize {
        let common = self.tokens.iter().zip(ids).take_while(|(a, b)| a == b).count();
        let kept = common.min(ids.len().saturating_sub(1));
        if kept < self.tokens.len() {
            self.logits.clear();
        }
        self.cache.truncate(kept);
        self.tokens.truncate(kept);
        kept
    }

    /// Makes room for a sequence of `tokens` tokens (or the model's context, if that is less), so that steps up to there ask
    /// for no memory.
    pub fn reserve(&mut self, tokens: usize) {
        let tokens = tokens.min(self.context_limit());
        self.cache.reserve(self.model, tokens);
        self.tokens.reserve(tokens.saturating_sub(self.tokens.len()));
    }

    /// Reads `ids` after what was read before, [`PREFILL_CHUNK`] tokens at a time, and returns the logits `[vocab]` that
    /// follow the last of them. `cancelled` is asked before every chunk.
    ///
    /// Nothing is read when an id is unknown or the sequence would not fit the context; after an interruption the
    /// sequence ends with the last whole chunk.
    pub fn prefill(&mut self, ids: &[u32], cancelled: &dyn Fn() -> bool) -> Result<&[f32], RuntimeError> {
        self.check(ids)?;
        if ids.is_empty() {
            return Err(RuntimeError::EmptyPrompt);
        }
        let n_chunks = ids.len().div_ceil(PREFILL_CHUNK);
        for (i, chunk) in ids.chunks(PREFILL_CHUNK).enumerate() {
            if cancelled() {
                return Err(RuntimeError::Interrupted);
            }
            let Session { model, device, cache, workspace, .. } = self;
            self.logits.clear();
            if i + 1 < n_chunks {
                let all = 0..chunk.len();
                model.read(*device, chunk, slice::from_ref(&all), slice::from_mut(cache), workspace);
            } else {
                let logits = model.read_prompt(*device, chunk, cache, workspace);
                self.logits.extend_from_slice(logits);
            }
            self.tokens.extend_from_slice(chunk);
        }
        Ok(&self.logits)
    }

    /// Reads one token and returns the logits `[vocab]` that follow it. After the first step this asks the allocator for
    /// nothing but, every now and then, a page of the cache (see [`Session::reserve`]).
    pub fn step(&mut self, id: u32) -> Result<&[f32], RuntimeError> {
        self.prefill(&[id], &|| false)
    }

    /// The logits `[vocab]` after the last token of [`Session::tokens`]; none before the first, and none when what followed that
    /// token was forgotten or it ends an interrupted prefill.
    pub fn logits(&self) -> &[f32] {
        &self.logits
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
}
