//! Many greedy continuations on a decoder: as [`crate::generate_batch`], but the device takes the steps and chooses the tokens.
//!
//! Each sequence of the decoder is a place. Prompts come in the same order; one that begins as a prompt that some place has read
//! takes over those tokens. All places go on together for [`STRETCH`] tokens, then ended ones make room. What a sequence
//! computes does not depend on its neighbours, nor on where its first tokens were read.

use crate::batch::{
    BatchProgress, Completion, CompletionRequest, OnProgress, PREFIX_CHUNK, accept, fit, plan, retired,
};
use crate::error::RuntimeError;
use crate::generate::{FinishReason, Output};
use crate::sampler::check;
use crate::session::STRETCH;
use tailorq_model::{Decoder, DecoderSize, Decoders, Model, Tokenizer};

/// Fewer common tokens are read anew.
const LEAST_SHARED: usize = 16;

/// Continues every prompt greedily on a decoder that is made for them; see [`crate::generate_batch`].
pub fn generate_batch_decoding(
    (model, tokenizer): (&Model, &Tokenizer),
    decoders: &dyn Decoders,
    requests: &[CompletionRequest],
    on_progress: &mut OnProgress<'_>,
) -> Result<Vec<Completion>, RuntimeError> {
    let limit = model.config.max_positions;
    let prompts = requests.iter().map(|r| fit(r, limit, model.config.vocab)).collect::<Result<Vec<_>, _>>()?;
    let needed = prompts.iter().zip(requests).map(|(prompt, request)| prompt.len() + request.max_tokens);
    let Some(capacity) = needed.max() else { return Ok(Vec::new()) };
    let mut decoder =
        open(model, decoders, DecoderSize { sequences: decoders.most_sequences().min(requests.len()), capacity })?;
    let places = (0..decoder.sequences()).map(|_| Place::default()).collect();
    let mut stage = Stage {
        decoder: decoder.as_mut(),
        tokenizer,
        requests,
        on_progress,
        prompts,
        places,
        finished: requests.iter().map(|_| None).collect(),
        n_finished: 0,
        logits: Vec::new(),
    };
    let mut waiting = plan(&stage.prompts).into_iter().map(|turn| turn.request);
    loop {
        for place in 0..stage.places.len() {
            // One that ends with its first token makes room for the next.
            while stage.places[place].running.is_none()
                && let Some(request) = waiting.next()
            {
                stage.admit(place, request)?;
            }
        }
        if stage.places.iter().all(|place| place.running.is_none()) {
            break;
        }
        stage.step()?;
    }
    Ok(stage.finished.into_iter().flatten().collect())
}

/// A decoder with as many sequences as have room: what is generated does not depend on how many there are.
fn open(model: &Model, decoders: &dyn Decoders, mut size: DecoderSize) -> Result<Box<dyn Decoder>, RuntimeError> {
    loop {
        match decoders.open(model, size) {
            Ok(decoder) => return Ok(decoder),
            Err(_) if size.sequences > 1 => size.sequences = size.sequences.div_ceil(2),
            Err(error) => return Err(error.into()),
        }
    }
}

/// A sequence of the decoder.
#[derive(Default)]
struct Place<'a> {
    /// The prompt that it begins with, still there when its continuation has ended.
    prompt: &'a [u32],
    running: Option<Running<'a>>,
}

struct Running<'a> {
    request: usize,
    output: Output<'a>,
}

struct Stage<'a> {
    decoder: &'a mut dyn Decoder,
    tokenizer: &'a Tokenizer,
    requests: &'a [CompletionRequest],
    on_progress: &'a mut OnProgress<'a>,
    prompts: Vec<&'a [u32]>,
    places: Vec<Place<'a>>,
    finished: Vec<Option<Completion>>,
    n_finished: usize,
    logits: Vec<f32>,
}

impl Stage<'_> {
    fn report(&mut self, finished: Option<(usize, &Completion)>) -> Result<(), RuntimeError> {
        let progress = BatchProgress { done: self.n_finished, total: self.requests.len(), finished };
        if (self.on_progress)(progress).is_break() { Err(RuntimeError::Interrupted) } else { Ok(()) }
    }

    /// Reads a prompt into a place.
    fn admit(&mut self, place: usize, request: usize) -> Result<(), RuntimeError> {
        let prompt = self.prompts[request];
        let kept = self.take_over(place, prompt)?;
        for chunk in prompt[kept..].chunks(PREFIX_CHUNK) {
            self.report(None)?;
            self.decoder.read(place, chunk)?;
        }
        self.decoder.logits(place, &mut self.logits);
        check(&self.logits)?;
        self.places[place].prompt = prompt;
        let running = Running { request, output: Output::new(self.tokenizer, &self.requests[request].stop) };
        // A request may ask for nothing.
        if self.requests[request].max_tokens == 0 {
            return self.retire(running, FinishReason::MaxTokens);
        }
        self.places[place].running = Some(running);
        Ok(())
    }

    /// Makes the place begin with the longest beginning of `prompt` that some place holds; returns how many tokens that are. The
    /// last token is never among them, because only reading gives logits.
    fn take_over(&mut self, place: usize, prompt: &[u32]) -> Result<usize, RuntimeError> {
        let common = |held: &[u32]| held.iter().zip(prompt).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
        let found = (0..self.places.len()).map(|i| (common(self.places[i].prompt), i == place, i)).max();
        let (shared, is_own, from) = found.filter(|f| f.0 >= LEAST_SHARED).unwrap_or((0, true, place));
        // What is about to be written over is nobody's beginning any more.
        self.places[place].prompt = &[];
        if is_own {
            self.decoder.truncate(place, shared);
        } else {
            self.decoder.share(from, place, shared)?;
        }
        Ok(shared)
    }

    /// Some tokens for every running sequence.
    fn step(&mut self) -> Result<(), RuntimeError> {
        self.report(None)?;
        let left =
            |p: &Place<'_>| p.running.as_ref().map(|r| self.requests[r.request].max_tokens - r.output.tokens.len());
        let most = self.places.iter().filter_map(left).max().unwrap_or(0);
        let active: Vec<usize> = (0..self.places.len()).filter(|&i| self.places[i].running.is_some()).collect();
        let chosen = self.decoder.choose(&active, STRETCH.min(most))?;
        for (&place, tokens) in active.iter().zip(chosen) {
            let Some(mut running) = self.places[place].running.take() else { continue };
            match self.take(&mut running, &tokens)? {
                Some(finish) => self.retire(running, finish)?,
                None => self.places[place].running = Some(running),
            }
        }
        Ok(())
    }

    /// Takes tokens into a sequence up to the one that ends it.
    fn take(&self, running: &mut Running<'_>, tokens: &[u32]) -> Result<Option<FinishReason>, RuntimeError> {
        for &id in tokens {
            let most = self.requests[running.request].max_tokens;
            if let Some(finish) = accept(&mut running.output, id, (self.tokenizer, most))? {
                return Ok(Some(finish));
            }
        }
        Ok(None)
    }

    fn retire(&mut self, running: Running<'_>, finish: FinishReason) -> Result<(), RuntimeError> {
        let request = running.request;
        let cut_tokens = self.requests[request].prompt.len() - self.prompts[request].len();
        let completion = retired(running.output, finish, cut_tokens)?;
        self.n_finished += 1;
        self.report(Some((request, &completion)))?;
        self.finished[request] = Some(completion);
        Ok(())
    }
}
