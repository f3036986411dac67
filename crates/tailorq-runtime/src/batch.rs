//! Many greedy continuations at once, each with the tokens that it would get alone.
//!
//! Prompts are read one after another, in chunks that start at multiples of [`PREFIX_CHUNK`]; whole chunks that a prompt
//! shares with the one read before it are not read again, their keys and values are copied. Up to
//! [`BatchOptions::sequences`] sequences then take each step together, and where one ends a waiting one takes its place
//! (continuous batching, Yu et al. 2022, "Orca").
//!
//! What a sequence computes does not depend on its neighbours: reading is done alone and always in the same chunks, and a
//! step of few rows (up to 12 on the CPU) computes every row by itself. With more sequences than that a step is a matrix
//! product whose rounding may differ in the last bits from that of a single row, which can only matter where two
//! words are equally likely up to rounding. A device with a memory of its own takes up to 128 sequences, so there this can always happen.

use crate::awake::awake_on;
use crate::error::RuntimeError;
use crate::generate::{FinishReason, Output};
use crate::sampler::greedy;
use std::ops::ControlFlow;
use std::slice;
use tailorq_kernels::{Device, KvType};
use tailorq_model::{KvCache, Model, Tokenizer, Workspace};

/// Tokens that are read at once, and the grain in which prompts share what was read.
pub const PREFIX_CHUNK: usize = 128;

/// One continuation to make.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompletionRequest {
    /// The tokens to continue.
    pub prompt: Vec<u32>,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the continuation; they are not part of it.
    pub stop: Vec<String>,
}

/// How many sequences run together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Most sequences that take a step together; at least 1.
    pub sequences: usize,
    /// Bytes that keys and values may take. One sequence always runs, whatever it takes.
    pub kv_bytes: usize,
    /// Tokens of prompt and continuation together; the model's context when `None`.
    pub context: Option<usize>,
    /// How keys and values are stored.
    pub kv: KvType,
}

impl Default for BatchOptions {
    /// 12 sequences, the most that give each the bits it would get alone; 2 GiB of keys and values as they are computed; the
    /// model's context.
    fn default() -> Self {
        BatchOptions { sequences: 12, kv_bytes: 2 << 30, context: None, kv: KvType::F32 }
    }
}

impl BatchOptions {
    /// The default of a device: one with a memory of its own takes many sequences at once, since a step of it costs as
    /// much for one as for a hundred.
    pub fn for_device(device: &dyn Device) -> Self {
        let default = BatchOptions::default();
        match device.resident() {
            None => default,
            // Arrays of keys and values double as they grow, so they take up to twice what they hold.
            Some(resident) => BatchOptions { sequences: 128, kv_bytes: resident.room() / 4, ..default },
        }
    }
}

/// A finished continuation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Its text, without the end token and without the stop string.
    pub text: String,
    /// Its tokens, without the end token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// Tokens cut from the start of the prompt so that prompt and continuation fit the context.
    pub cut_tokens: usize,
}

/// What [`generate_batch`] tells on the way.
#[derive(Clone, Copy, Debug)]
pub struct BatchProgress<'a> {
    /// Continuations that are finished.
    pub done: usize,
    /// Continuations asked for.
    pub total: usize,
    /// The continuation that has just been finished, with its index among the requests.
    pub finished: Option<(usize, &'a Completion)>,
}

/// Hears of progress and may stop the work.
pub(crate) type OnProgress<'a> = dyn FnMut(BatchProgress<'_>) -> ControlFlow<()> + 'a;

/// Continues every prompt greedily; completions come in the order of the requests.
///
/// A prompt that does not fit the context with its `max_tokens` loses tokens at its start. `on_progress` is called before
/// every chunk, before every step and after every finished continuation; a break is [`RuntimeError::Interrupted`].
pub fn generate_batch(
    model: &Model,
    tokenizer: &Tokenizer,
    device: &dyn Device,
    requests: &[CompletionRequest],
    options: &BatchOptions,
    on_progress: &mut OnProgress<'_>,
) -> Result<Vec<Completion>, RuntimeError> {
    let context = options.context.map_or(model.config.max_positions, |c| c.min(model.config.max_positions));
    let prompts = requests.iter().map(|r| fit(r, context, model.config.vocab)).collect::<Result<Vec<_>, _>>()?;
    let mut stage = Stage {
        model,
        tokenizer,
        device,
        requests,
        options,
        on_progress,
        plan: plan(&prompts),
        prompts,
        donor: None,
        running: Vec::new(),
        caches: Vec::new(),
        next: Vec::new(),
        workspace: Workspace::new(),
        finished: requests.iter().map(|_| None).collect(),
        n_finished: 0,
    };
    awake_on(device, || stage.run())?;
    Ok(stage.finished.into_iter().flatten().collect())
}

/// The end of the prompt that fits, or why it cannot be continued.
pub(crate) fn fit(request: &CompletionRequest, context: usize, vocab: usize) -> Result<&[u32], RuntimeError> {
    let prompt = &request.prompt[..];
    if prompt.is_empty() {
        return Err(RuntimeError::EmptyPrompt);
    }
    if let Some((position, &id)) = prompt.iter().enumerate().find(|(_, id)| **id as usize >= vocab) {
        return Err(RuntimeError::UnknownToken { id, position, vocab });
    }
    match context.checked_sub(request.max_tokens) {
        Some(room @ 1..) => Ok(&prompt[prompt.len().saturating_sub(room)..]),
        _ => Err(RuntimeError::ContextFull { needed: request.max_tokens.saturating_add(1), limit: context }),
    }
}

/// A prompt's turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Which request.
    pub(crate) request: usize,
    /// Tokens, in whole chunks, that it begins with like the turn before.
    shared: usize,
}

/// The order in which prompts are read: those that begin with the same chunk together and there in lexical order, so that
/// neighbours share as much as they can; otherwise the longest first, so that no long one is left to run alone at the end.
pub(crate) fn plan(prompts: &[&[u32]]) -> Vec<Turn> {
    let mut groups: Vec<(&[u32], usize)> = Vec::new();
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|&i| (prompts[i], i));
    let head = |i: usize| &prompts[i][..prompts[i].len().min(PREFIX_CHUNK)];
    for &i in &order {
        match groups.last_mut() {
            Some((first, longest)) if *first == head(i) => *longest = prompts[i].len().max(*longest),
            _ => groups.push((head(i), prompts[i].len())),
        }
    }
    let longest = |i: usize| groups.binary_search_by_key(&head(i), |g| g.0).map_or(0, |at| groups[at].1);
    // The sort is stable: prompts of one group have the same key and keep their order, unless another group is as long.
    order.sort_by_key(|&i| (std::cmp::Reverse(longest(i)), head(i)));
    let mut turns: Vec<Turn> = Vec::with_capacity(order.len());
    for &request in &order {
        let shared = turns.last().map_or(0, |before| shared_chunks(prompts[before.request], prompts[request]));
        turns.push(Turn { request, shared });
    }
    turns
}

/// Tokens of the whole chunks with which both begin. The last token of `b` is never among them, because only reading it
/// gives logits.
fn shared_chunks(a: &[u32], b: &[u32]) -> usize {
    let common = a.iter().zip(b).take_while(|(a, b)| a == b).count().min(b.len().saturating_sub(1));
    common / PREFIX_CHUNK * PREFIX_CHUNK
}

/// A sequence in work.
struct Running<'a> {
    request: usize,
    output: Output<'a>,
    /// The token that is read next.
    next: u32,
    /// Bytes set aside for its keys and values.
    reserved: usize,
}

/// Everything that the steps share.
struct Stage<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    device: &'a dyn Device,
    requests: &'a [CompletionRequest],
    prompts: Vec<&'a [u32]>,
    plan: Vec<Turn>,
    options: &'a BatchOptions,
    on_progress: &'a mut OnProgress<'a>,
    /// Keys and values of exactly the tokens that the next turn shares.
    donor: Option<KvCache>,
    running: Vec<Running<'a>>,
    /// One for each of `running`, apart because the model wants them side by side.
    caches: Vec<KvCache>,
    /// The token that each of them reads next.
    next: Vec<u32>,
    workspace: Workspace,
    finished: Vec<Option<Completion>>,
    n_finished: usize,
}

impl Stage<'_> {
    /// Admits and steps until every request is finished.
    fn run(&mut self) -> Result<(), RuntimeError> {
        let mut waiting = 0;
        loop {
            while waiting < self.plan.len() && self.has_room(waiting) {
                self.admit(waiting)?;
                waiting += 1;
            }
            if self.running.is_empty() {
                return Ok(());
            }
            self.step()?;
        }
    }

    fn report(&mut self, finished: Option<(usize, &Completion)>) -> Result<(), RuntimeError> {
        let progress = BatchProgress { done: self.n_finished, total: self.requests.len(), finished };
        if (self.on_progress)(progress).is_break() { Err(RuntimeError::Interrupted) } else { Ok(()) }
    }

    /// Bytes that the sequence of a turn may come to take.
    fn reservation(&self, turn_idx: usize) -> usize {
        let request = self.plan[turn_idx].request;
        let tokens = self.prompts[request].len() + self.requests[request].max_tokens;
        tokens * KvCache::token_bytes(self.options.kv, &self.model.config)
    }

    /// Whether the turn may begin now.
    fn has_room(&self, turn_idx: usize) -> bool {
        let taken: usize = self.running.iter().map(|r| r.reserved).sum();
        let donor = self.donor.as_ref().map_or(0, KvCache::bytes);
        let fits = taken.saturating_add(donor).saturating_add(self.reservation(turn_idx)) <= self.options.kv_bytes;
        self.running.is_empty() || (fits && self.running.len() < self.options.sequences)
    }

    /// Reads a prompt and chooses its first token.
    fn admit(&mut self, turn_idx: usize) -> Result<(), RuntimeError> {
        let request = self.plan[turn_idx].request;
        let mut sequence = Running {
            request,
            output: Output::new(self.tokenizer, &self.requests[request].stop),
            next: 0,
            reserved: self.reservation(turn_idx),
        };
        let (cache, logits) = self.read(turn_idx)?;
        match self.accept(&mut sequence, greedy(&logits)?)? {
            Some(finish) => self.retire(sequence, finish),
            None => {
                self.running.push(sequence);
                self.caches.push(cache);
                Ok(())
            }
        }
    }

    /// Reads what the donor has not read of a turn's prompt, leaves behind a donor for the next turn, and returns the
    /// keys and values with the logits `[vocab]` after the last token.
    fn read(&mut self, turn_idx: usize) -> Result<(KvCache, Vec<f32>), RuntimeError> {
        let Turn { request, shared } = self.plan[turn_idx];
        let keep = self.plan.get(turn_idx + 1).map_or(0, |next| next.shared);
        let prompt = self.prompts[request];
        let mut cache = self.donor.take().unwrap_or_else(|| KvCache::with(self.options.kv));
        assert_eq!(cache.len(), shared, "the donor was made for this turn");
        if keep > 0 && keep <= shared {
            let mut donor = cache.clone();
            donor.truncate(keep);
            self.donor = Some(donor);
        }
        let n_chunks = (prompt.len() - shared).div_ceil(PREFIX_CHUNK);
        for (i, chunk) in prompt[shared..].chunks(PREFIX_CHUNK).enumerate() {
            self.report(None)?;
            let logits = if i + 1 < n_chunks {
                let all = 0..chunk.len();
                let cache = slice::from_mut(&mut cache);
                self.model.read_only(self.device, chunk, slice::from_ref(&all), cache, &mut self.workspace);
                None
            } else {
                Some(self.model.read_prompt(self.device, chunk, &mut cache, &mut self.workspace).to_vec())
            };
            if keep > 0 && cache.len() == keep {
                self.donor = Some(cache.clone());
            }
            if let Some(logits) = logits {
                return Ok((cache, logits));
            }
        }
        Err(RuntimeError::EmptyPrompt)
    }

    /// See [`accept`].
    fn accept(&self, sequence: &mut Running<'_>, id: u32) -> Result<Option<FinishReason>, RuntimeError> {
        sequence.next = id;
        let most = self.requests[sequence.request].max_tokens;
        accept(&mut sequence.output, id, (self.tokenizer, most))
    }

    fn retire(&mut self, sequence: Running<'_>, finish: FinishReason) -> Result<(), RuntimeError> {
        let request = sequence.request;
        let cut_tokens = self.requests[request].prompt.len() - self.prompts[request].len();
        let completion = retired(sequence.output, finish, cut_tokens)?;
        self.n_finished += 1;
        self.report(Some((request, &completion)))?;
        self.finished[request] = Some(completion);
        Ok(())
    }

    /// One token for every running sequence.
    fn step(&mut self) -> Result<(), RuntimeError> {
        self.report(None)?;
        self.next.clear();
        self.next.extend(self.running.iter().map(|r| r.next));
        let mut workspace = std::mem::take(&mut self.workspace);
        let (mut running, mut caches) = (std::mem::take(&mut self.running), std::mem::take(&mut self.caches));
        let chosen = most_likely(self.model, self.device, &self.next, &mut caches, &mut workspace)?;
        let mut place = 0;
        for id in chosen {
            match self.accept(&mut running[place], id)? {
                Some(finish) => {
                    caches.remove(place);
                    self.retire(running.remove(place), finish)?;
                }
                None => place += 1,
            }
        }
        (self.workspace, self.running, self.caches) = (workspace, running, caches);
        Ok(())
    }
}

/// Takes the most likely token into a sequence of at most so many tokens; says why the sequence ends, if it does.
pub(crate) fn accept(
    output: &mut Output<'_>,
    id: u32,
    (tokenizer, most): (&Tokenizer, usize),
) -> Result<Option<FinishReason>, RuntimeError> {
    if output.tokens.len() >= most {
        return Ok(Some(FinishReason::MaxTokens));
    }
    if tokenizer.eos.contains(&id) {
        return Ok(Some(FinishReason::EndOfSequence));
    }
    let (_, stopped) = output.push(id)?;
    if stopped {
        return Ok(Some(FinishReason::StopString));
    }
    Ok((output.tokens.len() >= most).then_some(FinishReason::MaxTokens))
}

/// What an ended sequence has become.
pub(crate) fn retired(
    mut output: Output<'_>,
    finish: FinishReason,
    cut_tokens: usize,
) -> Result<Completion, RuntimeError> {
    output.finish(finish)?;
    let Output { text, tokens, .. } = output;
    Ok(Completion { text, tokens, finish, cut_tokens })
}

/// One step of every sequence, and the most likely token after each.
fn most_likely(
    model: &Model,
    device: &dyn Device,
    ids: &[u32],
    caches: &mut [KvCache],
    workspace: &mut Workspace,
) -> Result<Vec<u32>, RuntimeError> {
    let Some(resident) = device.resident() else {
        let logits = model.step(device, ids, caches, workspace);
        return logits.chunks_exact(model.head.rows()).map(greedy).collect();
    };
    // The logits of all sequences stay on the device.
    let logits = model.step_resident(device, resident, ids, caches);
    let best = resident.row_max(&logits).into_iter();
    best.map(|(word, logit)| if logit.is_finite() { Ok(word as u32) } else { Err(RuntimeError::BadLogits) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_share_whole_chunks_and_long_groups_come_first() {
        let common: Vec<u32> = (0..2 * PREFIX_CHUNK as u32 + 5).collect();
        let with = |tail: &[u32]| [&common[..], tail].concat();
        let prompts = [vec![9; 40], with(&[1]), vec![7; 400], with(&[]), vec![8; 300], with(&[0, 3])];
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let turns: Vec<(usize, usize)> = plan(&prompts).iter().map(|t| (t.request, t.shared)).collect();
        let shared = 2 * PREFIX_CHUNK;
        assert_eq!(turns, [(2, 0), (4, 0), (3, 0), (5, shared), (1, shared), (0, 0)]);
    }

    #[test]
    fn the_last_token_is_never_shared() {
        let chunk = vec![1; PREFIX_CHUNK];
        assert_eq!(shared_chunks(&chunk, &chunk), 0);
        assert_eq!(shared_chunks(&chunk, &vec![1; PREFIX_CHUNK + 1]), PREFIX_CHUNK);
        assert_eq!(shared_chunks(&vec![1; 3 * PREFIX_CHUNK], &vec![1; 2 * PREFIX_CHUNK]), PREFIX_CHUNK);
    }
}
