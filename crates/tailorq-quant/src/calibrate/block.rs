//! One block at a time: statistics of each input, quantized weights in its place, on to the next input.

use super::activations::{Activations, MicroBatch};
use super::drift::{Drift, DriftCorrection};
use super::hessians::{InputHessians, OneHessian};
use super::tokens::TokenWeight;
use crate::quantize::{Half, LayerStats, Note, Quantized, QuantizedWeight, Quantizer};
use crate::{LayerPlan, LayerSettings, QuantError};
use std::ops::{ControlFlow, Range};
use tailorq_kernels::Device;
use tailorq_model::{Block, BlockStage, Model};
use tailorq_tensor::{InputGroup, LayerId, Matrix, Slot, Weight};

/// Inputs of o and down that were computed for the Hessian are kept for the step that follows it, up to so many bytes, or on a
/// device with a memory of its own up to what it has room for; beyond that they are computed again, with the same bits.
pub const KEPT_INPUT_BYTES: usize = 512 << 20;

/// Quantizes the blocks of a model one after another.
///
/// Beside the activations it holds one layer's f32 weights, one Hessian (all four of a block when not
/// `true_sequential`) with one copy, and the inputs kept under [`KEPT_INPUT_BYTES`].
#[derive(Clone, Copy)]
pub struct BlockQuantizer<'a> {
    /// Where it runs. Micro-batches go through the device of the group that they are on, Hessians are added up, and layers
    /// quantized, on this one.
    pub device: &'a dyn Device,
    /// The model as loaded.
    pub model: &'a Model,
    /// The method.
    pub quantizer: &'a dyn Quantizer,
    /// What each layer shall become.
    pub plan_of: &'a dyn Fn(LayerId) -> Result<LayerPlan, QuantError>,
    /// Each input is measured with all earlier linears of its block quantized, not with the original ones.
    pub true_sequential: bool,
    /// How much each token counts in the Hessians.
    pub token_weight: TokenWeight,
    /// For a kind that reads gradients: the token energies of a layer, as a survey of the same samples gathered them.
    pub token_energies: Option<&'a TokenEnergies<'a>>,
    /// For a method that reads them: the squared gradients of a layer, from such a survey.
    pub squares: Option<&'a Squares<'a>>,
    /// How much weights make up for what quantized predecessors did; reads the original stream of the activations, and
    /// only measures input by input.
    pub drift: DriftCorrection,
    /// How much of the correlations between inputs is disbelieved: elements of Hessians off the diagonal are multiplied by
    /// `1 - shrink` (Ledoit and Wolf 2004, towards the diagonal). What a small sample of one kind of text says of
    /// correlations need not hold elsewhere.
    pub shrink: f64,
}

/// See [`LayerGradients::token_energies`](crate::survey::LayerGradients::token_energies).
pub type TokenEnergies<'a> = dyn Fn(LayerId) -> Result<Vec<f32>, QuantError> + 'a;

/// See [`LayerStats::square`].
pub type Squares<'a> = dyn Fn(LayerId) -> Result<Matrix, QuantError> + 'a;

/// The quantized layers of one block.
#[derive(Clone, Debug)]
pub struct QuantizedBlock {
    /// Which block.
    pub block_idx: usize,
    /// The quantizable layers in quantization order.
    pub layers: Vec<QuantizedLayer>,
}

/// One quantized layer and how it went.
#[derive(Clone, Debug)]
pub struct QuantizedLayer {
    /// Which layer.
    pub id: LayerId,
    /// Checkpoint name without `.weight`.
    pub name: String,
    /// What is stored.
    pub weight: QuantizedWeight,
    /// What was asked for.
    pub settings: LayerSettings,
    /// See [`Quantized::proxy_loss`].
    pub proxy_loss: Option<f64>,
    /// See [`Quantized::relative_error`].
    pub relative_error: f64,
    /// See [`Quantized::notes`].
    pub notes: Vec<Note>,
    /// See [`Quantized::counted_bits`].
    pub counted_bits: Option<u64>,
}

impl QuantizedBlock {
    /// `original` (this block of the model) with the packed weights in their places, for [`advance`].
    pub fn install(&self, original: &Block) -> Block {
        let mut block = original.clone();
        for layer in &self.layers {
            block.linear_mut(layer.id.slot).weight = Weight::from(layer.weight.clone());
        }
        block
    }
}

/// Takes the activations through block `block_idx` as finished (with its packed weights installed), and the original stream,
/// if there is one, through the model's own block. The same code moves them on while the block is being quantized, so a
/// resumed run sees the same bits as one that was never interrupted.
pub fn advance(device: &dyn Device, model: &Model, (block_idx, block): (usize, &Block), acts: &mut Activations) {
    let group = device.group();
    let through = |block: &Block, residual: &mut Matrix, spans: &[Range<usize>], place: usize| {
        let stage = BlockStage { model, block, device: group[place] };
        let mixed = mixed(&stage, residual, spans);
        stage.add_attention(&mixed, residual);
        let hidden = hidden(&stage, residual);
        stage.add_mlp(&hidden, residual);
    };
    for MicroBatch { residual, original, spans, place } in &mut acts.batches {
        through(block, residual, spans, *place);
        if let Some(original) = original {
            through(&model.blocks[block_idx], original, spans, *place);
        }
    }
}

fn mixed(stage: &BlockStage<'_>, residual: &Matrix, spans: &[Range<usize>]) -> Matrix {
    stage.attention_mix(&stage.attention_input(residual), spans)
}

fn hidden(stage: &BlockStage<'_>, residual: &Matrix) -> Matrix {
    stage.mlp_hidden(&stage.mlp_input(residual))
}

impl BlockQuantizer<'_> {
    /// Quantizes block `block_idx`. With activations (the input of this block), they end as the output of the quantized
    /// block; without, nothing is run, which a method that needs a Hessian refuses. `watch` is called after every layer
    /// and may stop the run with [`QuantError::Interrupted`]. After an error the activations are in between: start over
    /// from a finished block.
    pub fn quantize_block(
        &self,
        block_idx: usize,
        acts: Option<&mut Activations>,
        watch: &mut dyn FnMut(LayerId) -> ControlFlow<()>,
    ) -> Result<QuantizedBlock, QuantError> {
        let kept_bytes = self.device.resident().map_or(KEPT_INPUT_BYTES, |resident| resident.room());
        self.quantize_keeping(kept_bytes, block_idx, acts, watch)
    }

    /// [`BlockQuantizer::quantize_block`] with a bound on the inputs that are kept.
    fn quantize_keeping(
        &self,
        kept_bytes: usize,
        block_idx: usize,
        acts: Option<&mut Activations>,
        watch: &mut Watch<'_>,
    ) -> Result<QuantizedBlock, QuantError> {
        if self.token_weight.reads_gradients() && self.token_energies.is_none() {
            let name = self.token_weight.name();
            return Err(QuantError::Settings(format!("token weight {name} reads gradients, which this pass has not")));
        }
        let reads_original = self.drift.is_on() && self.quantizer.needs().hessian && self.true_sequential;
        if reads_original && acts.as_ref().is_some_and(|a| a.batches.iter().any(|b| b.original.is_none())) {
            let problem = "drift is measured against the original stream, which the activations have not";
            return Err(QuantError::Settings(problem.into()));
        }
        let block = self.model.blocks[block_idx].clone();
        let mut work = Work { run: self, kept_bytes, block_idx, block, layers: Vec::new() };
        match acts {
            None => work.quantize_all(&no_stats, watch)?,
            Some(acts) => {
                if acts.n_tokens() == 0 {
                    return Err(QuantError::NoCalibration);
                }
                if self.quantizer.needs().hessian && self.true_sequential {
                    work.true_sequential(acts, watch)?;
                } else {
                    let hessians = work.float_hessians(acts)?;
                    let of_slot = |slot| hessians.iter().find_map(|h| h.of(slot)).unwrap_or_default();
                    work.quantize_all(&of_slot, watch)?;
                    drop(hessians);
                    advance(self.device, self.model, (block_idx, &work.block), acts);
                }
            }
        }
        Ok(QuantizedBlock { block_idx, layers: work.layers })
    }
}

fn no_stats(_: Slot) -> LayerStats<'static> {
    LayerStats::default()
}

/// Takes a micro-batch into the sums of the device that it is on; the others pass over it.
fn add_to(sums: &mut [InputHessians], place: usize, device: &dyn Device, x: &Matrix, spans: &[Range<usize>]) {
    for (i, hessians) in sums.iter_mut().enumerate() {
        match i == place {
            true => hessians.add(device, x, spans),
            false => hessians.pass(x.rows(), spans.len()),
        }
    }
}

/// A block in the middle of its quantization.
struct Work<'a> {
    run: &'a BlockQuantizer<'a>,
    kept_bytes: usize,
    block_idx: usize,
    /// The original block, in which packed weights take their places one by one.
    block: Block,
    layers: Vec<QuantizedLayer>,
}

type Watch<'a> = dyn FnMut(LayerId) -> ControlFlow<()> + 'a;

/// An input of a block's linears, made of a residual stream.
type Input<'a> = dyn Fn(&BlockStage<'_>, &Matrix, &[Range<usize>]) -> Matrix + 'a;

/// Adds what linears make of an input to a residual stream.
type Add<'a> = dyn Fn(&BlockStage<'_>, &Matrix, &mut Matrix) + 'a;

/// Inputs of one micro-batch that a later step needs again, unless there was no room for them.
#[derive(Default)]
struct Kept {
    x: Option<Matrix>,
    original: Option<Matrix>,
}

impl Work<'_> {
    /// The block on every device of the group, as far as it is quantized, and before anything was.
    fn stages(&self) -> Vec<(BlockStage<'_>, BlockStage<'_>)> {
        let model = self.run.model;
        let of = |device| {
            let stage = |block| BlockStage { model, block, device };
            (stage(&self.block), stage(&model.blocks[self.block_idx]))
        };
        self.run.device.group().into_iter().map(of).collect()
    }

    fn is_quantizable(&self, slot: Slot) -> bool {
        self.run.model.architecture.linears[slot.index()].quantizable
    }

    /// Whether statistics of this input are wanted at all.
    fn is_wanted(&self, group: InputGroup) -> bool {
        self.run.quantizer.needs().hessian && group.slots().iter().any(|&s| self.is_quantizable(s))
    }

    /// Hessians of an input in which nothing was summed yet.
    fn empty_hessians(&self, group: InputGroup, acts: &Activations) -> Result<InputHessians, QuantError> {
        let n_tokens = acts.n_tokens();
        let width = self.run.model.input_width(group);
        let slots: Vec<Slot> = group.slots().iter().copied().filter(|&s| self.is_quantizable(s)).collect();
        let wants_more = self.run.quantizer.needs().held_out;
        let one = |slots: Vec<Slot>, energies| OneHessian::new(width, (slots, energies), wants_more);
        let list = match self.run.token_energies.filter(|_| self.run.token_weight.reads_gradients()) {
            None => vec![one(slots, None)],
            Some(energies_of) => {
                let with_energies = |slot: Slot| {
                    let layer = LayerId { block_idx: self.block_idx, slot };
                    let energies = energies_of(layer)?;
                    if energies.len() != n_tokens {
                        let n = energies.len();
                        let problem = format!("{layer}: energies of {n} tokens for {n_tokens} tokens of calibration");
                        return Err(QuantError::Settings(problem));
                    }
                    Ok(one(vec![slot], Some(energies)))
                };
                slots.into_iter().map(with_energies).collect::<Result<_, _>>()?
            }
        };
        let n_sequences = acts.batches.iter().map(|b| b.spans.len()).sum();
        Ok(InputHessians::new(self.run.token_weight, list, n_sequences))
    }

    fn quantize_all<'h>(
        &mut self,
        stats: &dyn Fn(Slot) -> LayerStats<'h>,
        watch: &mut Watch<'_>,
    ) -> Result<(), QuantError> {
        InputGroup::ALL.into_iter().try_for_each(|group| self.quantize_group(group, stats, None, watch))
    }

    /// Quantizes the layers that read one input, from their original weights, and installs the results.
    fn quantize_group<'h>(
        &mut self,
        group: InputGroup,
        stats: &dyn Fn(Slot) -> LayerStats<'h>,
        hessians: Option<&InputHessians>,
        watch: &mut Watch<'_>,
    ) -> Result<(), QuantError> {
        for &slot in group.slots() {
            if !self.is_quantizable(slot) {
                continue;
            }
            let id = LayerId { block_idx: self.block_idx, slot };
            let linear = self.block.linear(slot);
            let name = linear.name.clone();
            let plan = (self.run.plan_of)(id)?;
            let quantized = self.quantize_layer(id, &stats(slot), hessians, &plan).map_err(|source| {
                QuantError::Layer { layer: id, tensor: format!("{name}.weight"), source: Box::new(source) }
            })?;
            let Quantized { weight, proxy_loss, relative_error, notes, counted_bits } = quantized;
            self.block.linear_mut(slot).weight = Weight::from(weight.clone());
            self.layers.push(QuantizedLayer {
                id,
                name,
                weight,
                settings: plan.settings,
                proxy_loss,
                relative_error,
                notes,
                counted_bits,
            });
            if watch(id).is_break() {
                return Err(QuantError::Interrupted);
            }
        }
        // Other inputs follow, whose Hessians need the memory.
        group.slots().iter().filter_map(|&slot| stats(slot).shared).for_each(|shared| shared.work.clear());
        Ok(())
    }

    /// By the run's method, unless the plan leaves the layer at 16 bits.
    fn quantize_layer(
        &self,
        id: LayerId,
        stats: &LayerStats<'_>,
        hessians: Option<&InputHessians>,
        plan: &LayerPlan,
    ) -> Result<Quantized, QuantError> {
        let mut weights = self.run.device.dense_matrix(&self.block.linear(id.slot).weight);
        if plan.settings.half {
            return Half.quantize(self.run.device, &weights, stats, plan);
        }
        let is_read = |_: &&Squares<'_>| self.run.quantizer.needs().square;
        let square = self.run.squares.filter(is_read).map(|of_layer| of_layer(id)).transpose()?;
        let stats = LayerStats { square: square.as_ref(), slot: Some(id.slot), ..*stats };
        let correction = (self.run.drift, plan.settings.damping);
        let note = hessians.and_then(|h| h.correct(self.run.device, id.slot, correction, &mut weights));
        let mut quantized = self.run.quantizer.quantize(self.run.device, &weights, &stats, plan)?;
        quantized.notes.extend(note);
        Ok(quantized)
    }

    /// Input by input: measure with what is quantized so far, quantize the layers that read it, go on.
    fn true_sequential(&mut self, acts: &mut Activations, watch: &mut Watch<'_>) -> Result<(), QuantError> {
        self.measure(InputGroup::Attention, acts, watch, &|stage, residual, _| stage.attention_input(residual))?;
        let kept = self.measure(InputGroup::AttentionOutput, acts, watch, &mixed)?;
        self.step(acts, kept, &mixed, &|stage, mixed, residual| stage.add_attention(mixed, residual));
        self.measure(InputGroup::Mlp, acts, watch, &|stage, residual, _| stage.mlp_input(residual))?;
        let hidden = |stage: &BlockStage<'_>, residual: &Matrix, _: &[Range<usize>]| hidden(stage, residual);
        let kept = self.measure(InputGroup::MlpOutput, acts, watch, &hidden)?;
        self.step(acts, kept, &hidden, &|stage, hidden, residual| stage.add_mlp(hidden, residual));
        Ok(())
    }

    /// Adds what the layers that read some input make of it to both residual streams.
    fn step(&self, acts: &mut Activations, kept: Vec<Kept>, input: &Input<'_>, add: &Add<'_>) {
        let stages = self.stages();
        for (MicroBatch { residual, original, spans, place }, kept) in acts.batches.iter_mut().zip(kept) {
            let (stage, original_stage) = &stages[*place];
            let x = kept.x.unwrap_or_else(|| input(stage, residual, spans));
            add(stage, &x, residual);
            if let Some(original) = original {
                let x = kept.original.unwrap_or_else(|| input(original_stage, original, spans));
                add(original_stage, &x, original);
            }
        }
    }

    /// Sums the Hessian of one input over all batches and quantizes the layers that read it. Returns the inputs that
    /// the next step needs again, as many as may be kept.
    fn measure(
        &mut self,
        group: InputGroup,
        acts: &Activations,
        watch: &mut Watch<'_>,
        input: &Input<'_>,
    ) -> Result<Vec<Kept>, QuantError> {
        let mut kept: Vec<Kept> = acts.batches.iter().map(|_| Kept::default()).collect();
        if !self.is_wanted(group) {
            return Ok(kept);
        }
        let writes_stream = matches!(group, InputGroup::AttentionOutput | InputGroup::MlpOutput);
        let stages = self.stages();
        let mut room = vec![if writes_stream { self.kept_bytes } else { 0 }; stages.len()];
        let mut keep = |x: Matrix, place: usize| {
            let bytes = x.bytes();
            (bytes <= room[place]).then(|| {
                room[place] -= bytes;
                x
            })
        };
        let empty = || {
            let mut hessians = self.empty_hessians(group, acts)?;
            if self.run.drift.is_on() {
                hessians.follow_drift(writes_stream.then_some(self.run.model.config.hidden));
            }
            Ok(hessians)
        };
        let mut sums = stages.iter().map(|_| empty()).collect::<Result<Vec<_>, QuantError>>()?;
        for (MicroBatch { residual, original, spans, place }, kept) in acts.batches.iter().zip(&mut kept) {
            let (stage, original_stage) = &stages[*place];
            let x = input(stage, residual, spans);
            if let Some(original) = original.as_ref().filter(|_| self.run.drift.is_on()) {
                let y = input(original_stage, original, spans);
                let streams = writes_stream.then_some((residual, original));
                sums[*place].add_drift(stage.device, &Drift { quantized: &x, original: &y, streams }, spans);
                kept.original = keep(y, *place);
            }
            add_to(&mut sums, *place, stage.device, &x, spans);
            kept.x = keep(x, *place);
        }
        drop(stages);
        let mut hessians = InputHessians::together(self.run.device, sums);
        hessians.shrink(self.run.shrink as f32);
        let stats = |slot| hessians.of(slot).unwrap_or_default();
        self.quantize_group(group, &stats, Some(&hessians), watch)?;
        Ok(kept)
    }

    /// The Hessians of all inputs of the block as it is, in one pass that leaves the activations alone.
    fn float_hessians(&self, acts: &Activations) -> Result<Vec<InputHessians>, QuantError> {
        if !self.run.quantizer.needs().hessian {
            return Ok(Vec::new());
        }
        let stages = self.stages();
        let of_group = |group| stages.iter().map(|_| self.empty_hessians(group, acts)).collect();
        let sums = InputGroup::ALL.map(of_group).into_iter();
        let mut sums = sums.collect::<Result<Vec<Vec<InputHessians>>, QuantError>>()?;
        for batch in &acts.batches {
            let (stage, _) = &stages[batch.place];
            let mut add = |group: InputGroup, x: &Matrix| {
                add_to(&mut sums[group as usize], batch.place, stage.device, x, &batch.spans);
            };
            let x = stage.attention_input(&batch.residual);
            add(InputGroup::Attention, &x);
            let mixed = stage.attention_mix(&x, &batch.spans);
            add(InputGroup::AttentionOutput, &mixed);
            let mut residual = batch.residual.clone();
            stage.add_attention(&mixed, &mut residual);
            let x = stage.mlp_input(&residual);
            add(InputGroup::Mlp, &x);
            add(InputGroup::MlpOutput, &stage.mlp_hidden(&x));
        }
        let together = |of_group| InputHessians::together(self.run.device, of_group);
        let mut hessians: Vec<InputHessians> = sums.into_iter().map(together).collect();
        hessians.iter_mut().for_each(|h| h.shrink(self.run.shrink as f32));
        Ok(hessians)
    }
}

#[cfg(test)]
mod tests;
