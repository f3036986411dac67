//! A continuation, token by token.

use crate::error::RuntimeError;
use crate::sampler::{Sampler, SamplerOptions};
use crate::session::Session;
use crate::text::{StopFinder, TextStream};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};
use tailorq_kernels::awake;
use tailorq_model::{ModelError, Tokenizer};

/// When to stop and how to choose.
#[derive(Clone, Debug, Default)]
pub struct GenerationOptions {
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the generation; they are not part of the result.
    pub stop: Vec<String>,
    /// How tokens are chosen.
    pub sampler: SamplerOptions,
}

/// What [`generate`] hands out for each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The token.
    pub token: u32,
    /// The text that became certain with it: whole characters, or nothing.
    pub text: &'a str,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model said that it is done.
    EndOfSequence,
    /// A stop string came.
    StopString,
    /// As many tokens as asked for.
    MaxTokens,
    /// The model's context is full.
    ContextFull,
    /// The caller stopped it.
    Interrupted,
}

impl FinishReason {
    /// For machine-readable output: `eos`, `stop`, `max_tokens`, `context_full`, `interrupted`.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::EndOfSequence => "eos",
            FinishReason::StopString => "stop",
            FinishReason::MaxTokens => "max_tokens",
            FinishReason::ContextFull => "context_full",
            FinishReason::Interrupted => "interrupted",
        }
    }
}

/// A finished continuation.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Its text, without the end token and without the stop string.
    pub text: String,
    /// Its tokens, without the end token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// Tokens of the prompt that were read for it.
    pub prompt_tokens: usize,
    /// Time to read the prompt.
    pub prefill: Duration,
    /// Time from the first choice of a token to the end.
    pub decode: Duration,
}

impl Generation {
    /// Generated tokens a second, reading the prompt not counted; 0 when nothing was generated.
    pub fn tokens_per_second(&self) -> f64 {
        if self.tokens.is_empty() { 0.0 } else { self.tokens.len() as f64 / self.decode.as_secs_f64().max(1e-9) }
    }
}

/// Reads `prompt` after what the session has read before and continues it.
///
/// `on_piece` is called after each token, and once more (with the last token) for text that was held back until the end;
/// it may stop the generation. `cancelled` is asked before every chunk of the prompt, where a yes is
/// [`RuntimeError::Interrupted`], and before every token, where it ends the generation.
///
/// The session has then read the prompt and all tokens of the result but perhaps the last.
pub fn generate(
    session: &mut Session<'_>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerationOptions,
    cancelled: &dyn Fn() -> bool,
    on_piece: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
) -> Result<Generation, RuntimeError> {
    let mut sampler = Sampler::new(options.sampler)?;
    let started = Instant::now();
    session.prefill(prompt, cancelled)?;
    let prefill = started.elapsed();
    let mut output = Output::new(tokenizer, &options.stop);
    let finish = awake(|| decode_tokens(session, tokenizer, options, &mut sampler, &mut output, cancelled, on_piece))?;
    if let Some(text) = output.finish(finish)?
        && let Some(&token) = output.tokens.last()
    {
        // The generation is over, so an answer to stop changes nothing.
        let _ = on_piece(Piece { token, text: &text });
    }
    let decode = started.elapsed() - prefill;
    let Output { text, tokens, .. } = output;
    Ok(Generation { text, tokens, finish, prompt_tokens: prompt.len(), prefill, decode })
}

/// Token by token until something ends it.
fn decode_tokens(
    session: &mut Session<'_>,
    tokenizer: &Tokenizer,
    options: &GenerationOptions,
    sampler: &mut Sampler,
    output: &mut Output<'_>,
    cancelled: &dyn Fn() -> bool,
    on_piece: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
) -> Result<FinishReason, RuntimeError> {
    Ok(loop {
        if output.tokens.len() >= options.max_tokens {
            break FinishReason::MaxTokens;
        }
        if cancelled() {
            break FinishReason::Interrupted;
        }
        let left = options.max_tokens - output.tokens.len();
        let chosen = if sampler.is_greedy() { session.chosen(left)? } else { None };
        let id = match chosen {
            Some(id) => id,
            None => sampler.sample(session.logits(), session.tokens())?,
        };
        if tokenizer.eos.contains(&id) {
            break FinishReason::EndOfSequence;
        }
        let (text, stopped) = output.push(id)?;
        if on_piece(Piece { token: id, text: &text }).is_break() {
            break FinishReason::Interrupted;
        }
        if stopped {
            break FinishReason::StopString;
        }
        if session.tokens().len() >= session.context_limit() {
            break FinishReason::ContextFull;
        }
        // The logits after the last token would not be used.
        if output.tokens.len() < options.max_tokens {
            match chosen {
                Some(_) => session.accept_chosen(),
                None => session.step(id).map(|_| ())?,
            }
        }
    })
}

/// The text side of a generation.
pub(crate) struct Output<'a> {
    tokenizer: &'a Tokenizer,
    stream: TextStream,
    stops: StopFinder,
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
}

impl<'a> Output<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, stop: &[String]) -> Self {
        let stops = StopFinder::new(stop.iter().cloned());
        Output { tokenizer, stream: TextStream::default(), stops, text: String::new(), tokens: Vec::new() }
    }

    /// The text that may be shown after this token, and whether a stop string was found.
    pub(crate) fn push(&mut self, id: u32) -> Result<(String, bool), ModelError> {
        self.tokens.push(id);
        let piece = self.stream.push(id, |ids| self.tokenizer.decode(ids, true))?;
        let (text, stopped) = self.stops.push(&piece);
        self.text.push_str(&text);
        Ok((text, stopped))
    }

    /// Text held back that turns out to belong to the result.
    pub(crate) fn finish(&mut self, finish: FinishReason) -> Result<Option<String>, ModelError> {
        if finish == FinishReason::StopString {
            return Ok(None);
        }
        let rest = self.stream.finish(|ids| self.tokenizer.decode(ids, true))?;
        let (mut text, stopped) = self.stops.push(&rest);
        if !stopped {
            text.push_str(&self.stops.finish());
        }
        self.text.push_str(&text);
        Ok((!text.is_empty()).then_some(text))
    }
}
