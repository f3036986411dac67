//! A model for whoever generates ([`tailorq_model::Decoder`]): on one device, or its blocks one after another on several.
//!
//! Each device holds some blocks with their keys and values, the first the embedding, the last the norm and the head, and has
//! graphs of its own. What passes from one to the next is the stream of a step's few tokens, and from the last to all others
//! what it chose; each waits for the other by events of their streams, never for the host. Chunks of a prompt follow one
//! another, so that all devices work. The numbers are those of one device: the same kernels in the same order.

use super::{Decoder, DecoderOptions, Kind, MOST_ROWS, Part, STRETCH};
use crate::error::CudaError;
use crate::gpu::Gpu;
use std::ops::Range;
use std::sync::Arc;
use tailorq_model::{Block, DecoderError, DecoderSize, Decoders, Model};
use tailorq_tensor::{Matrix, Weight};

/// What graphs, kernels and the buffers of a step take on a device, about.
const OVERHEAD: usize = 256 << 20;

/// Bytes that are copied to measure the device's memory: much more than its cache holds.
const COPIED: usize = 512 << 20;

/// Makes decoders on some devices.
#[derive(Clone, Debug)]
pub struct CudaDecoders {
    ordinals: Vec<usize>,
    names: Vec<String>,
}

impl CudaDecoders {
    /// On the devices of these numbers, each of which gets a share of the blocks.
    ///
    /// # Errors
    /// When there is no device of some number.
    pub fn new(ordinals: &[usize]) -> Result<Self, CudaError> {
        assert!(!ordinals.is_empty(), "at least one device");
        let names = ordinals.iter().map(|&o| Ok(Gpu::open(o)?.name().to_owned())).collect::<Result<_, CudaError>>()?;
        Ok(CudaDecoders { ordinals: ordinals.to_vec(), names })
    }
}

impl Decoders for CudaDecoders {
    fn open(&self, model: &Model, size: DecoderSize) -> Result<Box<dyn tailorq_model::Decoder>, DecoderError> {
        let pipeline = Pipeline::new(&self.ordinals, model, size).map_err(DecoderError::new)?;
        Ok(Box::new(pipeline))
    }

    fn most_sequences(&self) -> usize {
        MOST_ROWS
    }

    fn signature(&self) -> String {
        // Blocks on several devices have the numbers of one.
        // The number changes with the order of sums.
        format!("decoder 2 {}", self.names[0])
    }
}

/// See the module.
pub(crate) struct Pipeline {
    /// In the order of their blocks.
    stages: Vec<Decoder>,
    /// Of the whole model.
    kv_token_bytes: usize,
    /// Which sequences have been read up to their logits.
    lengths: Vec<usize>,
}

impl Pipeline {
    pub(crate) fn new(ordinals: &[usize], model: &Model, size: DecoderSize) -> Result<Self, CudaError> {
        let options = DecoderOptions { batch: size.sequences, capacity: size.capacity, ..DecoderOptions::default() };
        let costs: Vec<usize> = model.blocks.iter().map(block_bytes).collect();
        let parts = split(&costs, weight_bytes(&model.head), ordinals.len());
        let n = parts.len();
        let stage = |(i, blocks): (usize, Range<usize>)| {
            let part = Part { is_first: i == 0, is_last: i + 1 == n };
            let gpu = Gpu::open(ordinals[i])?;
            let of_stage = model_of(model, blocks, part);
            check_room(&gpu, &of_stage, size)?;
            Decoder::of_part(&gpu, &of_stage, options, part)
        };
        let stages = parts.into_iter().enumerate().map(stage).collect::<Result<Vec<_>, _>>()?;
        let kv_token_bytes = 4 * model.config.kv_width() * model.config.n_blocks;
        Ok(Pipeline { stages, kv_token_bytes, lengths: vec![0; size.sequences] })
    }

    fn last(&self) -> &Decoder {
        &self.stages[self.stages.len() - 1]
    }

    /// Runs a step of `n` rows through all devices, with these tokens, positions and sequences where they come from the host.
    fn run(&mut self, kind: Kind, n: usize, rows: Option<(&[u32], &[i32], &[u32])>) -> Result<(), CudaError> {
        for i in 0..self.stages.len() {
            self.stages[i].prepare(kind, n)?;
            let (before, stage) = (i.checked_sub(1).map(|i| &self.stages[i]), &self.stages[i]);
            let step = &stage.steps[&(kind, n)];
            if let Some((tokens, positions, sequences)) = rows {
                stage.gpu.write(&step.tokens, 0, tokens);
                stage.gpu.write(&step.positions, 0, positions);
                stage.gpu.write(&step.sequences, 0, sequences);
            }
            if let Some(before) = before {
                let stream = before.steps[&(kind, n)].residual;
                stage.gpu.receive(step.residual, &before.gpu, stream, 4 * n * stage.config.hidden);
            }
            step.graph.launch();
        }
        Ok(())
    }

    /// One token for each of the first `n` sequences.
    fn choose_next(&mut self, n: usize) -> Result<(), CudaError> {
        let last = self.stages.len() - 1;
        if last == 0 {
            return self.run(Kind::Next, n, None);
        }
        self.stages[last].prepare(Kind::Choose, n)?;
        self.stages.iter_mut().try_for_each(|stage| stage.prepare(Kind::Given, n))?;
        let chooser = &self.stages[last];
        let chosen = &chooser.steps[&(Kind::Choose, n)];
        chosen.graph.launch();
        for (i, stage) in self.stages.iter().enumerate() {
            let given = &stage.steps[&(Kind::Given, n)];
            for (to, from) in [(&given.tokens, &chosen.tokens), (&given.positions, &chosen.positions)] {
                match i == last {
                    true => stage.gpu.copy(to.ptr(), from.ptr(), 4 * n),
                    false => stage.gpu.receive(to.ptr(), &chooser.gpu, from.ptr(), 4 * n),
                }
            }
        }
        self.run(Kind::Given, n, None)
    }

    fn read_ids(&mut self, sequence: usize, ids: &[u32]) -> Result<(), CudaError> {
        self.stages[0].lengths.copy_from_slice(&self.lengths);
        self.stages[0].check(sequence, ids)?;
        let Some((last, rest)) = ids.split_last() else { return Ok(()) };
        for ids in rest.chunks(MOST_ROWS) {
            let (mut tokens, first) = (ids.to_vec(), self.lengths[sequence]);
            tokens.resize(MOST_ROWS, 0);
            let position = |i: usize| if i < ids.len() { (first + i) as i32 } else { -1 };
            let positions: Vec<i32> = (0..MOST_ROWS).map(position).collect();
            self.run(Kind::Prompt, MOST_ROWS, Some((&tokens, &positions, &[sequence as u32; MOST_ROWS])))?;
            self.lengths[sequence] += ids.len();
        }
        let place = self.lengths[sequence] as i32;
        self.run(Kind::Last, 1, Some((&[*last], &[place], &[sequence as u32])))?;
        self.lengths[sequence] += 1;
        self.last().keep_logits(sequence);
        Ok(())
    }

    fn choose_ids(&mut self, sequences: &[usize], n: usize) -> Result<Vec<Vec<u32>>, CudaError> {
        let Some(rows) = sequences.iter().max().map(|most| most + 1) else { return Ok(Vec::new()) };
        let last = self.last();
        let capacity = last.options.capacity;
        // A row without a sequence stands behind the end of the memory, where nothing is read.
        let next = |i: usize| if sequences.contains(&i) { self.lengths[i] as i32 } else { capacity as i32 };
        last.gpu.write(&last.choice.next_positions, 0, &(0..rows).map(next).collect::<Vec<_>>());
        last.gpu.write(&last.choice.taken, 0, &vec![0u32; rows]);
        let mut chosen = vec![Vec::with_capacity(n); sequences.len()];
        let mut ring = vec![0u32; rows * STRETCH];
        for first in (0..n).step_by(STRETCH) {
            let n_steps = STRETCH.min(n - first);
            (0..n_steps).try_for_each(|_| self.choose_next(rows))?;
            self.last().gpu.read(&self.last().choice.ring, 0, &mut ring);
            for (chosen, &i) in chosen.iter_mut().zip(sequences) {
                chosen.extend_from_slice(&ring[i * STRETCH..][..n_steps]);
            }
        }
        for &i in sequences {
            self.lengths[i] = (self.lengths[i] + n).min(capacity);
        }
        Ok(chosen)
    }
}

impl tailorq_model::Decoder for Pipeline {
    fn name(&self) -> String {
        let names: Vec<&str> = self.stages.iter().map(Decoder::device_name).collect();
        names.join(" + ")
    }

    fn sequences(&self) -> usize {
        self.lengths.len()
    }

    fn capacity(&self) -> usize {
        self.last().options.capacity
    }

    fn weight_bytes(&self) -> (usize, usize) {
        let head = self.last().weights.head.bytes();
        // Devices without a head hold one of no rows.
        let all: usize = self.stages.iter().map(Decoder::weight_bytes).sum();
        (all - head, head)
    }

    fn kv_bytes(&self, tokens: usize) -> usize {
        self.kv_token_bytes * tokens
    }

    fn copy_rate(&mut self) -> f64 {
        let rate = |stage: &Decoder| {
            let bytes = COPIED.min(stage.gpu.memory().0 / 4);
            let (from, to) = (stage.gpu.allocate(bytes), stage.gpu.allocate(bytes));
            let copy = || f64::from(stage.gpu.milliseconds(|| stage.gpu.copy(to.ptr(), from.ptr(), bytes)));
            let mut times: Vec<f64> = (0..5).map(|_| copy()).collect();
            times.sort_by(f64::total_cmp);
            2.0 * bytes as f64 / (times[2].max(1e-6) / 1e3)
        };
        self.stages.iter().map(rate).sum::<f64>() / self.stages.len() as f64
    }

    fn truncate(&mut self, sequence: usize, tokens: usize) {
        self.lengths[sequence] = self.lengths[sequence].min(tokens);
    }

    fn share(&mut self, from: usize, to: usize, tokens: usize) -> Result<(), DecoderError> {
        assert!(from != to && tokens <= self.lengths[from], "a beginning of another sequence");
        self.stages.iter().for_each(|stage| stage.copy_sequence(from, to));
        self.lengths[to] = tokens;
        Ok(())
    }

    fn read(&mut self, sequence: usize, ids: &[u32]) -> Result<(), DecoderError> {
        self.read_ids(sequence, ids).map_err(DecoderError::new)
    }

    fn logits(&mut self, sequence: usize, logits: &mut Vec<f32>) {
        *logits = self.last().logits(sequence);
    }

    fn choose(&mut self, sequences: &[usize], n: usize) -> Result<Vec<Vec<u32>>, DecoderError> {
        self.choose_ids(sequences, n).map_err(DecoderError::new)
    }
}

/// The blocks of a stage as a model; embedding and head of those that have none are empty.
fn model_of(model: &Model, blocks: Range<usize>, part: Part) -> Model {
    let none = || -> Weight { Matrix::zeros(0, model.config.hidden).into() };
    let of = |weight: &Weight, has_it: bool| if has_it { weight.clone() } else { none() };
    let mut config = model.config.clone();
    config.n_blocks = blocks.len();
    let (embedding, head) = (of(&model.embedding, part.is_first), of(&model.head, part.is_last));
    Model::new(config, model.architecture, embedding, model.blocks[blocks].to_vec(), model.norm.clone(), head)
}

/// Bytes of a weight on the device, about.
fn weight_bytes(weight: &Weight) -> usize {
    match weight {
        Weight::Packed(_) => weight.reader().bytes(),
        Weight::Dense(_) | Weight::Stored(_) => 2 * weight.rows() * weight.cols(),
    }
}

fn block_bytes(block: &Block) -> usize {
    block.linears.iter().map(|linear| weight_bytes(&linear.weight)).sum()
}

/// Refuses what a device has no room for before anything is brought there.
fn check_room(gpu: &Arc<Gpu>, model: &Model, size: DecoderSize) -> Result<(), CudaError> {
    let config = &model.config;
    let weights: usize = model.blocks.iter().map(block_bytes).sum::<usize>() + weight_bytes(&model.head);
    let embedding = 2 * model.embedding.rows() * config.hidden;
    let kv = 4 * config.kv_width() * config.n_blocks * size.sequences * size.capacity;
    let logits = 4 * config.vocab * (size.sequences + 1);
    let needed = weights + embedding + kv + logits + OVERHEAD;
    gpu.give_back_unused();
    let (free, _) = gpu.memory();
    if needed > free {
        let (sequences, capacity) = (size.sequences, size.capacity);
        return Err(CudaError::Full { name: gpu.name().to_owned(), needed, free, sequences, capacity });
    }
    Ok(())
}

/// Which blocks go to which of `n` devices: ranges in order, the largest of whose costs is as small as it can be, the head being
/// with the last. Fewer than `n` where there are fewer blocks.
fn split(costs: &[usize], head: usize, n: usize) -> Vec<Range<usize>> {
    let n_blocks = costs.len();
    let n = n.clamp(1, n_blocks.max(1));
    let mut sums = vec![0];
    costs.iter().for_each(|cost| sums.push(sums[sums.len() - 1] + cost));
    let cost =
        |blocks: Range<usize>| sums[blocks.end] - sums[blocks.start] + if blocks.end == n_blocks { head } else { 0 };
    // `best[end]`: the largest cost, and the start of the last range, when the first `end` blocks are on so many devices.
    let mut best: Vec<(usize, usize)> = (0..=n_blocks).map(|end| (cost(0..end), 0)).collect();
    let mut starts = Vec::new();
    for devices in 1..n {
        let with_one_more = |end: usize| {
            let choices = (devices..end).map(|start| (best[start].0.max(cost(start..end)), start));
            choices.min().unwrap_or((usize::MAX, 0))
        };
        best = (0..=n_blocks).map(with_one_more).collect();
        starts.push(best.iter().map(|b| b.1).collect::<Vec<_>>());
    }
    let (mut ranges, mut end) = (Vec::new(), n_blocks);
    for starts in starts.iter().rev() {
        ranges.push(starts[end]..end);
        end = starts[end];
    }
    ranges.push(0..end);
    ranges.reverse();
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_tensor::Rng;

    /// Every way to cut, tried.
    fn least(costs: &[usize], head: usize, n: usize) -> usize {
        if n == 1 {
            return costs.iter().sum::<usize>() + head;
        }
        (1..=costs.len() - (n - 1))
            .map(|first| costs[..first].iter().sum::<usize>().max(least(&costs[first..], head, n - 1)))
            .min()
            .unwrap()
    }

    #[test]
    fn blocks_are_split_as_evenly_as_can_be() {
        let mut rng = Rng::new(1);
        for n_blocks in 1..9 {
            for n in 1..6 {
                let costs: Vec<usize> = (0..n_blocks).map(|_| 1 + rng.below(20)).collect();
                let head = rng.below(30);
                let ranges = split(&costs, head, n);
                let n = n.min(n_blocks);
                assert_eq!(ranges.len(), n);
                assert_eq!((ranges[0].start, ranges[n - 1].end), (0, n_blocks));
                assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
                assert!(ranges.iter().all(|range| !range.is_empty()), "{ranges:?}");
                let of = |(i, r): (usize, &Range<usize>)| {
                    costs[r.clone()].iter().sum::<usize>() + if i + 1 == n { head } else { 0 }
                };
                let most = ranges.iter().enumerate().map(of).max().unwrap();
                assert_eq!(most, least(&costs, head, n), "{costs:?}, {head}, {n}: {ranges:?}");
            }
        }
    }
}
