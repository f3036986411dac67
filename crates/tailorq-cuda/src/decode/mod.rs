//! Decoding on a device: a model whose weights stay packed there, and steps of 1 to 8 tokens that are one graph each.
//!
//! All buffers are allocated when the decoder is made. A step is recorded once for each number of sequences and then replayed:
//! positions and tokens lie in the device's memory and are advanced there, so that many tokens are as many launches of a
//! graph without a word from the host. Keys and values are kept in half precision, activations meet weights in half precision,
//! sums are taken in single precision. What a token's numbers are does not depend on the sequences beside it.

mod corrections;
mod launch;
mod layout;
mod matrix;
mod matvec;
mod pipeline;
mod step;
mod stream;
mod weights;

pub use layout::DenseWeights;
#[cfg(test)]
pub(crate) use matrix::SOURCES;
pub use matvec::{MatVec, Products};
pub use pipeline::CudaDecoders;
#[cfg(test)]
pub(crate) use step::SOURCE as STEP;

use crate::error::CudaError;
use crate::gpu::{Buffer, Gpu};
use launch::{Graph, Launch};
use matrix::{DeviceMatrix, Fragments, Input, MOST_ROWS, Output, RotatedNorm};
use std::collections::HashMap;
use std::sync::Arc;
use step::{Attention, AttentionIo, Choice, Embedding};
use tailorq_model::{Model, ModelConfig};
use weights::{Attending, DecoderBlock, FeedForward, Weights};

/// Tokens that are generated between two looks at whether all sequences have ended.
const STRETCH: usize = 32;

/// Sizes of a [`Decoder`].
#[derive(Clone, Copy, Debug)]
pub struct DecoderOptions {
    /// Sequences that are generated at once, 1 to 8.
    pub batch: usize,
    /// Tokens of the longest sequence.
    pub capacity: usize,
    /// How weights that are not packed lie on the device.
    pub dense: DenseWeights,
}

impl Default for DecoderOptions {
    fn default() -> Self {
        DecoderOptions { batch: 1, capacity: 4096, dense: DenseWeights::default() }
    }
}

/// How long the last [`Decoder::generate_greedy`] took on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DecodeTimes {
    /// Steps of all sequences together.
    pub n_steps: usize,
    /// Milliseconds of these steps by the device's clock.
    pub milliseconds: f64,
}

/// What a step does beside running the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    /// Reads tokens of prompts; several may be of one sequence. No logits.
    Prompt,
    /// Reads the last token of a prompt: logits to a place of their own.
    Last,
    /// Chooses a token for each sequence, then reads it.
    Next,
    /// Chooses a token for each sequence.
    Choose,
    /// Reads tokens that were chosen elsewhere, one for each sequence.
    Given,
}

/// Which part of a model a device holds beside its blocks.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// The embedding: the stream begins here.
    is_first: bool,
    /// The last norm and the head.
    is_last: bool,
}

/// A step of so many rows, with the buffers that only it uses.
struct Step {
    graph: Graph,
    tokens: Buffer,
    positions: Buffer,
    sequences: Buffer,
    /// Address of the residual stream: what comes in from the device before and goes out to the one after.
    residual: u64,
    /// Those that only the launches name.
    _buffers: Vec<Buffer>,
}

/// A model on a device that generates greedily. See the module.
pub struct Decoder {
    gpu: Arc<Gpu>,
    config: ModelConfig,
    options: DecoderOptions,
    part: Part,
    weights: Weights,
    attention: Attention,
    choice: Choice,
    /// `[batch + 1, vocabulary]`: of every sequence, and what [`Kind::Last`] leaves.
    logits: Buffer,
    steps: HashMap<(Kind, usize), Step>,
    /// Tokens that each sequence holds.
    lengths: Vec<usize>,
    times: DecodeTimes,
}

impl Decoder {
    /// Puts `model` on device number `gpu_ordinal`.
    ///
    /// # Errors
    /// When there is no such device, or the model or the options are of a kind that the kernels do not serve.
    pub fn new(gpu_ordinal: usize, model: &Model, options: DecoderOptions) -> Result<Decoder, CudaError> {
        let whole = Part { is_first: true, is_last: true };
        Decoder::of_part(&Gpu::open(gpu_ordinal)?, model, options, whole)
    }

    /// Puts the blocks of `model` on a device, with what belongs to its part.
    fn of_part(gpu: &Arc<Gpu>, model: &Model, options: DecoderOptions, part: Part) -> Result<Decoder, CudaError> {
        let refused = |what: String| Err(CudaError::Unsupported { what });
        if !(1..=MOST_ROWS).contains(&options.batch) {
            return refused(format!("{} sequences at once; it takes 1 to {MOST_ROWS}", options.batch));
        }
        if options.capacity == 0 || options.capacity > 1 << 24 {
            return refused(format!("sequences of {} tokens", options.capacity));
        }
        let config = model.config.clone();
        let table = model.rope_table(options.capacity);
        let angles = options.capacity * table.half;
        let attention = Attention::new(gpu, &config, options.capacity, &table.cos[..angles], &table.sin[..angles])?;
        Ok(Decoder {
            weights: Weights::new(gpu, model, options)?,
            choice: Choice::new(gpu, options.batch, STRETCH),
            logits: gpu.zeros(4 * (options.batch + 1) * config.vocab),
            steps: HashMap::new(),
            lengths: vec![0; options.batch],
            times: DecodeTimes::default(),
            attention,
            options,
            part,
            config,
            gpu: gpu.clone(),
        })
    }

    /// The device's name.
    pub fn device_name(&self) -> &str {
        self.gpu.name()
    }

    /// Bytes of weights that a step reads, whatever the number of sequences; keys, values and embeddings are not counted.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// How long the last generation took.
    pub fn times(&self) -> DecodeTimes {
        self.times
    }

    /// Forgets the tokens of a sequence.
    pub fn reset(&mut self, sequence: usize) {
        self.lengths[sequence] = 0;
    }

    /// Reads `ids` after what `sequence` holds.
    ///
    /// # Errors
    /// When there are no tokens or too many, or one is no word of the vocabulary.
    pub fn prefill(&mut self, sequence: usize, ids: &[u32]) -> Result<(), CudaError> {
        self.check(sequence, ids)?;
        let Some((last, rest)) = ids.split_last() else { return Ok(()) };
        for ids in rest.chunks(MOST_ROWS) {
            self.read(Kind::Prompt, MOST_ROWS, sequence, ids)?;
        }
        self.read(Kind::Last, 1, sequence, &[*last])?;
        self.keep_logits(sequence);
        Ok(())
    }

    /// Puts what [`Kind::Last`] left in the place of its sequence.
    fn keep_logits(&self, sequence: usize) {
        let bytes = 4 * self.config.vocab;
        let at = |row: usize| self.logits.ptr() + (row * bytes) as u64;
        self.gpu.copy(at(sequence), at(self.options.batch), bytes);
    }

    /// Keys and values of a sequence become those of another one.
    fn copy_sequence(&self, from: usize, to: usize) {
        for cache in self.weights.blocks.iter().flat_map(|block| [&block.keys, &block.values]) {
            let bytes = cache.bytes() / self.options.batch;
            let at = |sequence: usize| cache.ptr() + (sequence * bytes) as u64;
            self.gpu.copy(at(to), at(from), bytes);
        }
    }

    fn check(&self, sequence: usize, ids: &[u32]) -> Result<(), CudaError> {
        let refused = |what: String| Err(CudaError::Unsupported { what });
        if sequence >= self.options.batch {
            return refused(format!("sequence {sequence} of {}", self.options.batch));
        }
        if ids.is_empty() {
            return refused("a prompt of no tokens".into());
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.config.vocab) {
            return refused(format!("token {id} of a vocabulary of {}", self.config.vocab));
        }
        let length = self.lengths[sequence] + ids.len();
        if length > self.options.capacity {
            return refused(format!("{length} tokens in room for {}", self.options.capacity));
        }
        Ok(())
    }

    fn read(&mut self, kind: Kind, n: usize, sequence: usize, ids: &[u32]) -> Result<(), CudaError> {
        self.prepare(kind, n)?;
        let step = &self.steps[&(kind, n)];
        let mut tokens = ids.to_vec();
        tokens.resize(n, 0);
        let first = self.lengths[sequence];
        let positions: Vec<i32> = (0..n).map(|i| if i < ids.len() { (first + i) as i32 } else { -1 }).collect();
        self.gpu.write(&step.tokens, 0, &tokens);
        self.gpu.write(&step.positions, 0, &positions);
        self.gpu.write(&step.sequences, 0, &vec![sequence as u32; n]);
        step.graph.launch();
        self.lengths[sequence] += ids.len();
        Ok(())
    }

    /// The logits after the last token of a sequence, `[vocab]`.
    pub fn logits(&self, sequence: usize) -> Vec<f32> {
        let mut logits = vec![0.0; self.config.vocab];
        self.gpu.read(&self.logits, 4 * sequence * self.config.vocab, &mut logits);
        logits
    }

    /// Continues each prompt with its most likely tokens (the first of equals), at most `max_tokens` and no more than fit,
    /// up to the first of `eos`, which is not among them. What sequences held before is forgotten.
    ///
    /// # Errors
    /// As [`Decoder::prefill`].
    pub fn generate_greedy(
        &mut self,
        prompts: &[Vec<u32>],
        max_tokens: usize,
        eos: &[u32],
    ) -> Result<Vec<Vec<u32>>, CudaError> {
        self.times = DecodeTimes::default();
        let mut all = Vec::with_capacity(prompts.len());
        for prompts in prompts.chunks(self.options.batch) {
            for (i, prompt) in prompts.iter().enumerate() {
                self.reset(i);
                self.prefill(i, prompt)?;
            }
            all.extend(self.continue_greedy(prompts.len(), max_tokens, eos)?);
        }
        Ok(all)
    }

    /// Continues the first `n` sequences, which have logits.
    fn continue_greedy(&mut self, n: usize, max_tokens: usize, eos: &[u32]) -> Result<Vec<Vec<u32>>, CudaError> {
        self.prepare(Kind::Next, n)?;
        let next: Vec<i32> = self.lengths[..n].iter().map(|&l| l as i32).collect();
        self.gpu.write(&self.choice.next_positions, 0, &next);
        self.gpu.write(&self.choice.taken, 0, &vec![0u32; n]);
        // The last token of a full sequence is chosen, but not read.
        let limits: Vec<usize> =
            self.lengths[..n].iter().map(|l| max_tokens.min(self.options.capacity - l + 1)).collect();
        let (mut outputs, mut ended) = (vec![Vec::new(); n], vec![false; n]);
        let mut ring = vec![0u32; n * STRETCH];
        let most = limits.iter().copied().max().unwrap_or(0);
        for first in (0..most).step_by(STRETCH) {
            let n_steps = STRETCH.min(most - first);
            let graph = &self.steps[&(Kind::Next, n)].graph;
            let milliseconds = self.gpu.milliseconds(|| (0..n_steps).for_each(|_| graph.launch()));
            self.times.n_steps += n_steps;
            self.times.milliseconds += f64::from(milliseconds);
            self.gpu.read(&self.choice.ring, 0, &mut ring);
            for (i, tokens) in ring.chunks_exact(STRETCH).enumerate() {
                for &token in &tokens[..n_steps] {
                    ended[i] |= outputs[i].len() >= limits[i] || eos.contains(&token);
                    if !ended[i] {
                        outputs[i].push(token);
                    }
                }
            }
            if (0..n).all(|i| ended[i] || outputs[i].len() >= limits[i]) {
                break;
            }
        }
        // What the device holds now is more than what was asked for.
        self.lengths[..n].fill(0);
        Ok(outputs)
    }

    /// Records the step of a kind for so many rows, unless that was done before.
    fn prepare(&mut self, kind: Kind, n: usize) -> Result<(), CudaError> {
        if !self.steps.contains_key(&(kind, n)) {
            let step = self.record(kind, n)?;
            self.steps.insert((kind, n), step);
        }
        Ok(())
    }

    fn record(&self, kind: Kind, n: usize) -> Result<Step, CudaError> {
        let (gpu, config) = (&self.gpu, &self.config);
        let identity: Vec<u32> = (0..n as u32).collect();
        let (tokens, positions, sequences) = (gpu.zeros(4 * n), gpu.zeros(4 * n), gpu.upload(&identity));
        let mut recorder = Recorder::new(self, n, kind);
        if matches!(kind, Kind::Next | Kind::Choose) {
            let logits = (self.logits.ptr(), config.vocab);
            let pick = self.choice.launch(gpu, n, logits, self.options.capacity, tokens.ptr(), positions.ptr());
            recorder.launches.push(pick);
        }
        if self.part.is_first && kind != Kind::Choose {
            let embedding = Embedding { table: self.weights.embedding.ptr(), tokens: tokens.ptr() };
            recorder.launches.push(step::embed(gpu, n, config.hidden, embedding, recorder.residual));
        }
        recorder.positions = (positions.ptr(), sequences.ptr());
        for block in self.weights.blocks.iter().filter(|_| kind != Kind::Choose) {
            recorder.block(block);
        }
        let first = if kind == Kind::Last { self.options.batch } else { 0 };
        if self.part.is_last && !matches!(kind, Kind::Prompt | Kind::Choose) {
            recorder.head(self.logits.ptr() + (4 * first * config.vocab) as u64);
        }
        let Recorder { launches, buffers, residual, .. } = recorder;
        Ok(Step {
            graph: Graph::new(gpu, launches, n == 1)?,
            tokens,
            positions,
            sequences,
            residual,
            _buffers: buffers,
        })
    }
}

/// Activations as fragments, and as numbers only where a rotation wants them.
fn numbers_too(out: (Fragments, u64), is_rotated: bool) -> (Fragments, u64) {
    (out.0, if is_rotated { out.1 } else { 0 })
}

/// The launches of a step while they are written down.
struct Recorder<'a> {
    decoder: &'a Decoder,
    n: usize,
    kind: Kind,
    launches: Vec<Launch>,
    buffers: Vec<Buffer>,
    /// Positions and sequences.
    positions: (u64, u64),
    residual: u64,
    /// What a norm makes of the stream, as fragments and as numbers; what attention does; the hidden numbers.
    normed: (Fragments, u64),
    mixed: (Fragments, u64),
    hidden: (Fragments, u64),
    /// Rotated inputs of a matrix, by their number: what lies past the last input stays zero.
    rotated: HashMap<usize, Fragments>,
    heads: u64,
    gate: u64,
    up: u64,
    /// Index in `buffers`.
    parts: usize,
    arrivals: usize,
}

impl<'a> Recorder<'a> {
    fn new(decoder: &'a Decoder, n: usize, kind: Kind) -> Self {
        let (gpu, config) = (&decoder.gpu, &decoder.config);
        let mut buffers: Vec<Buffer> = Vec::new();
        let mut numbers = |len: usize| {
            buffers.push(gpu.zeros(4 * len));
            buffers[buffers.len() - 1].ptr()
        };
        let (query, intermediate) = (config.query_width(), config.intermediate);
        let mut both = |width: usize| {
            let padded = width.next_multiple_of(layout::CHUNK);
            // Two bytes a number; sums of eight.
            let fragments = Fragments { data: numbers(n * padded / 2), sums: numbers(n * padded / 8) };
            (fragments, numbers(n * width))
        };
        let (normed, mixed, hidden) = (both(config.hidden), both(query), both(intermediate));
        let rotated = [config.hidden, query, intermediate].map(|width| (width, both(width).0)).into_iter().collect();
        let residual = numbers(n * config.hidden);
        let heads = numbers(n * (query + 2 * config.kv_width()));
        let (gate, up) = (numbers(n * intermediate), numbers(n * intermediate));
        numbers(decoder.attention.n_parts(n));
        numbers(n * config.n_kv_heads);
        let (parts, arrivals) = (buffers.len() - 2, buffers.len() - 1);
        let (launches, positions) = (Vec::new(), (0, 0));
        Recorder {
            decoder,
            n,
            kind,
            launches,
            buffers,
            positions,
            residual,
            normed,
            mixed,
            hidden,
            rotated,
            heads,
            gate,
            up,
            parts,
            arrivals,
        }
    }

    /// Products with the norm of the stream. A single vector's norm is taken by each block of each product, where all can, and
    /// that of a single rotated product by its rotation.
    fn normed_products(&mut self, weight: &Buffer, products: &[(&DeviceMatrix, Output)]) {
        let eps = self.decoder.config.rms_eps;
        if self.n == 1 && products.iter().all(|(matrix, _)| matrix.takes_norms()) {
            let input = Input::Norm { stream: self.residual, weight: weight.ptr(), eps };
            self.launches.extend(products.iter().map(|(matrix, output)| matrix.product(1, input, *output)));
            return;
        }
        if let [(matrix, output)] = products
            && matrix.is_rotated()
        {
            let (x, plain) = (self.rotated[&matrix.cols()], self.normed.0);
            let norm = RotatedNorm { weight: weight.ptr(), eps, plain: matrix.is_corrected().then_some(plain) };
            self.launches.extend(matrix.rotation(self.n, self.residual, Some(norm), x));
            self.launches.push(matrix.product(self.n, Input::Fragments { x, plain }, *output));
            return;
        }
        let is_rotated = products.iter().any(|(matrix, _)| matrix.is_rotated());
        let out = numbers_too(self.normed, is_rotated);
        self.launches.push(step::norm(&self.decoder.gpu, self.n, self.residual, (weight, eps), out));
        for (matrix, output) in products {
            self.product(matrix, self.normed, *output);
        }
    }

    /// A product with inputs that are there as fragments and as numbers.
    fn product(&mut self, matrix: &DeviceMatrix, input: (Fragments, u64), output: Output) {
        let (plain, numbers) = input;
        let rotated = self.rotated[&matrix.cols()];
        let x = match matrix.rotation(self.n, numbers, None, rotated) {
            None => plain,
            Some(rotation) => {
                self.launches.push(rotation);
                rotated
            }
        };
        self.launches.push(matrix.product(self.n, Input::Fragments { x, plain }, output));
    }

    fn block(&mut self, block: &DecoderBlock) {
        let Decoder { gpu, config, attention, .. } = self.decoder;
        let stride = config.query_width() + 2 * config.kv_width();
        let mut y = self.heads;
        let mut heads = |matrix: &DeviceMatrix| {
            let output = Output::Store { y, stride };
            y += 4 * matrix.rows() as u64;
            output
        };
        let products: Vec<_> = match &block.attending {
            Attending::Together(qkv) => vec![(&**qkv, heads(qkv))],
            Attending::Apart(parts) => parts.iter().map(|matrix| (matrix, heads(matrix))).collect(),
        };
        self.normed_products(&block.attention_norm, &products);
        let io = AttentionIo {
            heads: self.heads,
            norms: block.qk_norm.as_ref(),
            positions: self.positions.0,
            sequences: self.positions.1,
            cache: (&block.keys, &block.values),
            out: numbers_too(self.mixed, block.output.is_rotated()),
            parts: &self.buffers[self.parts],
            arrivals: &self.buffers[self.arrivals],
        };
        self.launches.extend(attention.launches(gpu, self.n, &io, self.kind == Kind::Prompt));
        let residual = Output::Add { y: self.residual, stride: config.hidden };
        self.product(&block.output, self.mixed, residual);
        let stride = config.intermediate;
        match &block.feed_forward {
            FeedForward::Together(pair) => {
                let (out, y) = numbers_too(self.hidden, block.down.is_rotated());
                self.normed_products(&block.mlp_norm, &[(pair, Output::SwiGlu { out, y, stride })]);
            }
            FeedForward::Apart { gate, up } => {
                let products = [(&**gate, self.gate), (&**up, self.up)];
                let products = products.map(|(matrix, y)| (matrix, Output::Store { y, stride }));
                self.normed_products(&block.mlp_norm, &products);
                let hidden = step::arrange(gpu, self.n, stride, self.gate, self.up, self.hidden);
                self.launches.push(hidden);
            }
        }
        self.product(&block.down, self.hidden, residual);
    }

    /// The last norm and the head.
    fn head(&mut self, logits: u64) {
        let (weights, stride) = (&self.decoder.weights, self.decoder.config.vocab);
        self.normed_products(&weights.norm, &[(&weights.head, Output::Store { y: logits, stride })]);
    }
}
