//! One sequence in work: its tokens, and their keys and values.

use crate::error::RuntimeError;
use std::collections::VecDeque;
use std::slice;
use tailorq_kernels::{Device, KvType};
use tailorq_model::{Decoder, KvCache, Model, Workspace};

/// Tokens that a prefill sends through the model at once: enough to keep the matrix products busy, few enough to keep
/// the activations small and an interruption prompt.
pub const PREFILL_CHUNK: usize = 512;

/// Tokens that a decoder chooses before anybody looks at them: of an answer that ends earlier, the rest was in vain.
pub(crate) const STRETCH: usize = 8;

/// A model, the sequence it has read so far, and that sequence's keys and values.
pub struct Session<'a> {
    model: &'a Model,
    engine: Engine<'a>,
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

/// Who computes.
enum Engine<'a> {
    /// A device, operation by operation.
    Operations { device: &'a dyn Device, cache: KvCache, workspace: Box<Workspace> },
    /// A device that takes whole steps. It has read the session's tokens, and after them those that it chose ahead.
    Decoder { decoder: Box<dyn Decoder + 'a>, ahead: VecDeque<u32> },
}

impl<'a> Session<'a> {
    /// An empty sequence that keeps keys and values as they are computed: the reference.
    pub fn new(model: &'a Model, device: &'a dyn Device) -> Self {
        Session::with(model, device, KvType::F32)
    }

    /// An empty sequence that stores keys and values in this precision.
    pub fn with(model: &'a Model, device: &'a dyn Device, kv: KvType) -> Self {
        let workspace = Box::new(Workspace::new());
        Session::on(model, Engine::Operations { device, cache: KvCache::with(kv), workspace })
    }

    /// An empty sequence on a decoder of this model: its sequence 0.
    pub fn decoding(model: &'a Model, decoder: Box<dyn Decoder + 'a>) -> Self {
        let mut session = Session::on(model, Engine::Decoder { decoder, ahead: VecDeque::new() });
        session.reset();
        session
    }

    fn on(model: &'a Model, engine: Engine<'a>) -> Self {
        Session { model, engine, tokens: Vec::new(), logits: Vec::new() }
    }

    /// The model that runs.
    pub fn model(&self) -> &'a Model {
        self.model
    }

    /// Every token that the model has read.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Longest sequence of the model, or of the decoder where that is shorter.
    pub fn context_limit(&self) -> usize {
        let limit = self.model.config.max_positions;
        match &self.engine {
            Engine::Operations { .. } => limit,
            Engine::Decoder { decoder, .. } => limit.min(decoder.capacity()),
        }
    }

    /// Forgets the sequence.
    pub fn reset(&mut self) {
        self.truncate(0);
        if let Engine::Operations { cache, .. } = &mut self.engine {
            // Its pages go, too.
            *cache = KvCache::with(cache.kind());
        }
        self.logits.clear();
    }

    /// Forgets all but the first tokens, and what was chosen ahead.
    fn truncate(&mut self, kept: usize) {
        match &mut self.engine {
            Engine::Operations { cache, .. } => cache.truncate(kept),
            Engine::Decoder { decoder, ahead } => {
                decoder.truncate(0, kept);
                ahead.clear();
            }
        }
        self.tokens.truncate(kept);
    }

    /// Keeps of the sequence what begins `ids` too and forgets the rest; returns how many tokens were kept. At least the
    /// last token of `ids` is left to read, because only reading gives logits.
    pub fn rewind_to(&mut self, ids: &[u32]) -> usize {
        let common = self.tokens.iter().zip(ids).take_while(|(a, b)| a == b).count();
        let kept = common.min(ids.len().saturating_sub(1));
        if kept < self.tokens.len() {
            self.logits.clear();
        }
        self.truncate(kept);
        kept
    }

    /// Makes room for a sequence of `tokens` tokens (or the model's context, if that is less), so that steps up to there ask
    /// for no memory.
    pub fn reserve(&mut self, tokens: usize) {
        let tokens = tokens.min(self.context_limit());
        if let Engine::Operations { cache, .. } = &mut self.engine {
            cache.reserve(self.model, tokens);
        }
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
        if matches!(&self.engine, Engine::Decoder { ahead, .. } if !ahead.is_empty()) {
            self.truncate(self.tokens.len());
        }
        let n_chunks = ids.len().div_ceil(PREFILL_CHUNK);
        for (i, chunk) in ids.chunks(PREFILL_CHUNK).enumerate() {
            if cancelled() {
                return Err(RuntimeError::Interrupted);
            }
            self.logits.clear();
            self.read(chunk, i + 1 == n_chunks)?;
            self.tokens.extend_from_slice(chunk);
        }
        Ok(&self.logits)
    }

    fn read(&mut self, chunk: &[u32], is_last: bool) -> Result<(), RuntimeError> {
        let Session { model, engine, logits, .. } = self;
        match engine {
            Engine::Operations { device, cache, workspace } if is_last => {
                logits.extend_from_slice(model.read_prompt(*device, chunk, cache, workspace));
            }
            Engine::Operations { device, cache, workspace } => {
                let all = 0..chunk.len();
                model.read(*device, chunk, slice::from_ref(&all), slice::from_mut(cache), workspace);
            }
            Engine::Decoder { decoder, .. } => {
                decoder.read(0, chunk)?;
                if is_last {
                    decoder.logits(0, logits);
                }
            }
        }
        Ok(())
    }

    /// Reads one token and returns the logits `[vocab]` that follow it. After the first step this asks the allocator for
    /// nothing but, every now and then, a page of the cache (see [`Session::reserve`]).
    pub fn step(&mut self, id: u32) -> Result<&[f32], RuntimeError> {
        self.prefill(&[id], &|| false)
    }

    /// The most likely token after the last one, where a decoder chooses it by itself: it may go on up to `most` tokens before it
    /// is asked again. `None` where the logits are to be looked at.
    pub(crate) fn chosen(&mut self, most: usize) -> Result<Option<u32>, RuntimeError> {
        let room = self.context_limit() - self.tokens.len();
        let Session { engine: Engine::Decoder { decoder, ahead }, logits, .. } = self else { return Ok(None) };
        if ahead.is_empty() {
            // Those of a prompt are here; a decoder chooses something of numbers that are none, too.
            crate::sampler::check(logits)?;
            let n = STRETCH.min(most).min(room).max(1);
            ahead.extend(decoder.choose(&[0], n)?.into_iter().flatten());
        }
        Ok(ahead.front().copied())
    }

    /// Reads the token that [`Session::chosen`] gave.
    pub(crate) fn accept_chosen(&mut self) {
        if let Engine::Decoder { ahead, .. } = &mut self.engine {
            self.logits.clear();
            self.tokens.extend(ahead.pop_front());
        }
    }

    /// The logits `[vocab]` after the last token of [`Session::tokens`]; none before the first, and none when what followed that
    /// token was forgotten, it ends an interrupted prefill, or a decoder chose it.
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
