//! What a run will cost, before it starts: size from layouts, memory and time from a count of the work.

use crate::artifact::n_vector_elements;
use crate::recipe::{QuantizeSettings, Recipe};
use crate::task::allocation::{AllocationSettings, AllocationSignal};
use crate::task::scores::units_of;
use crate::task::survey::TAPE_BYTES;
use crate::task::survey_needs;
use crate::task::uniform::{circuit_bytes, n_weights, uniform_bytes};
use serde::Serialize;
use std::time::Instant;
use tailorq_kernels::Device;
use tailorq_model::Model;
use tailorq_quant::{Clip, KEPT_INPUT_BYTES, MICRO_BATCH_TOKENS};
use tailorq_tensor::{Bits, Layout, Matrix, Rng, Slot, Weight};

/// Process, tokenizer and code.
const FIXED_BYTES: u64 = 150 << 20;
/// Grid evaluations of the clip search that one core does in a second, in weights; measured on a 2.6 GHz Zen 4 core.
const CLIP_WEIGHTS_PER_SECOND: f64 = 1.5e7;

/// A prediction. Size is exact but for the container's header and the small files; memory and time are estimates.
#[derive(Clone, Debug, Serialize)]
pub struct Estimate {
    /// Bytes of the packed linears, embedding, head, norms and biases.
    pub artifact_bytes: u64,
    /// Bits per weight of the linears, scales and zeros included.
    pub linear_bits_per_weight: f64,
    /// Peak resident memory, memory-mapped file pages not counted.
    pub peak_memory_bytes: u64,
    /// Wall-clock seconds on this machine.
    pub seconds: f64,
    /// Calibration tokens that this counts with.
    pub tokens: usize,
}

/// Predicts a run on `model` with `tokens` calibration tokens (0 for a method without calibration), the longest
/// sequence having `longest` of them. Times a small matrix product on `device` to know the machine.
pub fn estimate(device: &dyn Device, model: &Model, recipe: &Recipe, tokens: usize, longest: usize) -> Estimate {
    let settings = &recipe.quantize;
    let size = predicted_size(model, recipe);
    let linear_weights = n_weights(model);
    // Forward, recomputation and two products backward, where there is a survey.
    let survey = if survey_needs(recipe).is_some() { 8.0 * tokens as f64 * linear_weights as f64 } else { 0.0 };
    let scores = 2.0 * scored_tokens(model, recipe, tokens) * linear_weights as f64;
    let flops = total_flops(model, tokens) + (survey + scores);
    let seconds = flops / measured_flops(device) + search_seconds(linear_weights, settings);
    Estimate {
        artifact_bytes: size.artifact_bytes,
        linear_bits_per_weight: size.linear_bytes as f64 * 8.0 / linear_weights as f64,
        peak_memory_bytes: peak_memory(model, recipe, tokens, longest),
        seconds,
        tokens,
    }
}

/// What a recipe's artifact will take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PredictedSize {
    /// Bytes of the linears.
    pub(crate) linear_bytes: u64,
    /// Bytes of linears, embedding, head, norms and biases.
    pub(crate) artifact_bytes: u64,
}

/// Predicts the size: exact but for the container's header, and for widths that an allocation spreads.
pub(crate) fn predicted_size(model: &Model, recipe: &Recipe) -> PredictedSize {
    let settings = &recipe.quantize;
    let mut linear_bytes = uniform_bytes(model, settings);
    if let Some(budget) = recipe.allocation.as_ref().and_then(|a| a.rule.bits_per_weight) {
        // A plan comes close to its budget, but for less than one unit.
        linear_bytes = (budget * n_weights(model) as f64 / 8.0) as u64;
    } else if let Some(allocation) = &recipe.allocation {
        linear_bytes = unbudgeted_bytes(model, settings, allocation);
    } else if let Some(circuit) = &recipe.circuit {
        linear_bytes += circuit_bytes(model, circuit);
    }
    let artifact_bytes = linear_bytes + table_bytes(model, settings) + 4 * n_vector_elements(model) as u64;
    PredictedSize { linear_bytes, artifact_bytes }
}

/// Bytes of the linears by a rule that counts units: so many at the widest of the widths, the others at the narrowest. Units
/// differ in size only inside a block, so their mean stands for each.
fn unbudgeted_bytes(model: &Model, settings: &QuantizeSettings, allocation: &AllocationSettings) -> u64 {
    let (rule, n_units) = (&allocation.rule, units_of(model, allocation.score.unit).len());
    let n_wide = match (rule.share, rule.ends, rule.top) {
        (Some(share), ..) => (share * n_units as f64).ceil() as usize,
        (None, ends, top) => 2 * ends.unwrap_or(0) + top.unwrap_or(0),
    };
    let wide = n_wide.min(n_units) as f64 / n_units.max(1) as f64;
    let at = |width: Option<&u32>| match width.map(|&w| Bits::try_from(w)) {
        Some(Ok(bits)) => uniform_bytes(model, &QuantizeSettings { bits, ..settings.clone() }),
        _ => 2 * n_weights(model),
    };
    let widths = &allocation.score.widths;
    (wide * at(widths.last()) as f64 + (1.0 - wide) * at(widths.first()) as f64) as u64
}

/// Tokens that pass through the whole model while units are scored, answers that are generated not counted: measured units
/// begin at their block, which is half a pass each on average.
fn scored_tokens(model: &Model, recipe: &Recipe, tokens: usize) -> f64 {
    let Some(score) = recipe.allocation.as_ref().map(|a| &a.score).filter(|s| s.reads_data()) else { return 0.0 };
    let samples = recipe.calibration.as_ref().map_or(1, |c| c.samples).max(1);
    let looked_at = tokens as f64 * (score.prompts as f64 / samples as f64).min(1.0);
    let half_of = |n: usize| n as f64 * (model.blocks.len() + 1) as f64 / 2.0 / model.blocks.len().max(1) as f64;
    let passes = match score.signal {
        AllocationSignal::TaqIs => 0.0,
        AllocationSignal::TaqKl => half_of(model.blocks.len()),
        _ => half_of(units_of(model, score.unit).len()) * score.widths.len() as f64,
    };
    looked_at * (1.0 + passes)
}

/// Bytes of one table (embedding or head) in its layout, or at 16 bits.
fn one_table(table: &Weight, layout: Option<Layout>) -> u64 {
    match layout {
        Some(layout) => layout.bytes(table.rows(), table.cols()) as u64,
        None => 2 * (table.rows() * table.cols()) as u64,
    }
}

fn table_bytes(model: &Model, settings: &QuantizeSettings) -> u64 {
    let head = if model.config.tied_head { 0 } else { one_table(&model.head, settings.head_layout()) };
    one_table(&model.embedding, settings.embedding_layout()) + head
}

/// Peak resident memory of a run with `tokens` calibration tokens, the longest sequence having `longest`: the largest of
/// the moments of a block (a Hessian with its factorization, a micro-batch's activations) on top of all calibration
/// activations and the inputs that are kept between two steps, or the packing of the embedding.
pub(crate) fn peak_memory(model: &Model, recipe: &Recipe, tokens: usize, longest: usize) -> u64 {
    let settings = &recipe.quantize;
    let c = &model.config;
    let batch = tokens.min(MICRO_BATCH_TOKENS.max(longest));
    let shapes = || Slot::ALL.iter().map(|s| c.linear_shape(*s));
    let widest = shapes().map(|(_, cols)| cols).max().unwrap_or(0);
    let largest = shapes().map(|(rows, cols)| rows * cols).max().unwrap_or(0);
    let beside = 1 + usize::from(settings.drift().is_on());
    let streams = beside * 4 * tokens * c.hidden + (4 * tokens * widest).min(KEPT_INPUT_BYTES);
    // The Hessian, its damped copy that becomes the factor, and the factorization's own copy; two more for a method that
    // chooses, for a transform (the whole Hessian and the rotated one), for an input whose gradients weigh the tokens (one for
    // each of its linears), and for drift.
    let chooses = tailorq_quant::find(&settings.method).is_some_and(|q| q.needs().held_out);
    let has_two_more =
        [chooses, settings.transform.is_some(), settings.token_weight.reads_gradients(), settings.drift().is_on()];
    let n_hessians = 3 + 2 * has_two_more.into_iter().filter(|has| *has).count();
    let hessian = if tokens == 0 { 0 } else { 4 * n_hessians * widest * widest };
    // Weights as f32, their working copy, codes.
    let weights = 9 * largest;
    let activations = 4 * batch * (2 * c.hidden + 3 * c.intermediate);
    let table = model.embedding.rows() * model.embedding.cols() * settings.embedding_bits as usize / 8;
    let quantize = streams + (hessian + weights).max(activations);
    let tape = (4 * tokens * c.hidden * (c.n_blocks + 1)).min(TAPE_BYTES);
    // The sums of one block, and the activations of a micro-batch with their gradients.
    let sums = 4 * shapes().map(|(rows, cols)| rows * cols).sum::<usize>();
    let survey = if survey_needs(recipe).is_some() { tape + 2 * sums + 2 * activations } else { 0 };
    FIXED_BYTES + quantize.max(2 * table).max(survey) as u64
}

/// Floating-point operations of all blocks: forward (gate and up run twice), Hessians, factorizations, column loops.
fn total_flops(model: &Model, tokens: usize) -> f64 {
    if tokens == 0 {
        return 0.0;
    }
    let c = &model.config;
    let per_block: f64 = Slot::ALL
        .iter()
        .map(|&slot| {
            let (rows, cols) = c.linear_shape(slot);
            let (rows, cols, n) = (rows as f64, cols as f64, tokens as f64);
            let passes = if matches!(slot, Slot::Gate | Slot::Up) { 2.0 } else { 1.0 };
            let first_of_group = slot.input_group().slots()[0] == slot;
            let solve = if first_of_group { n * cols * cols + cols.powi(3) } else { 0.0 };
            2.0 * n * rows * cols * passes + solve + rows * cols * cols
        })
        .sum();
    per_block * c.n_blocks as f64
}

/// Of the search for the range of each group; without one, of finding extremes.
fn search_seconds(weights: u64, settings: &QuantizeSettings) -> f64 {
    let share = if settings.clip != Clip::None { 1.0 } else { 0.1 };
    share * weights as f64 / (CLIP_WEIGHTS_PER_SECOND * rayon::current_num_threads() as f64)
}

/// Operations a second of a product of the size that calibration does.
fn measured_flops(device: &dyn Device) -> f64 {
    const N: usize = 768;
    let mut rng = Rng::new(1);
    let mut random = || Matrix::from_vec(N, N, (0..N * N).map(|_| rng.normal()).collect());
    let (x, w) = (random(), Weight::from(random()));
    let mut y = vec![0.0; N * N];
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        device.linear(x.data(), &w, None, &mut y);
        best = best.min(start.elapsed().as_secs_f64());
    }
    2.0 * (N * N * N) as f64 / best
}

/// Bytes of memory that the system can still give, if it says so (Linux).
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}
