//! The blocks of the main path, one after another, each a finished part as soon as it is quantized.

use crate::error::PipelineError;
use crate::observer::Observer;
use crate::output::{Output, Part};
use crate::recipe::{QuantizeSettings, Recipe};
use crate::report::LayerReport;
use crate::samples::Samples;
use crate::task::Task;
use std::ops::ControlFlow;
use tailorq_kernels::Device;
use tailorq_model::{Block, Model};
use tailorq_quant::{Activations, BlockQuantizer, LayerPlan, LayerSettings, QuantError, advance};
use tailorq_tensor::{LayerId, Slot};

/// What every stage of a run has in hand.
#[derive(Clone, Copy)]
pub(crate) struct Run<'a> {
    pub(crate) device: &'a dyn Device,
    pub(crate) output: &'a Output,
    pub(crate) recipe: &'a Recipe,
    pub(crate) samples: Option<&'a Samples>,
    pub(crate) observer: &'a dyn Observer,
}

/// The settings that a recipe gives to all linears alike.
pub(crate) fn layer_settings(settings: &QuantizeSettings) -> LayerSettings {
    LayerSettings {
        layout: settings.layout(),
        clip: settings.clip,
        damping: settings.damping,
        act_order: settings.act_order,
        half: false,
        grid: settings.grid,
        transform: settings.transform,
        aligned: settings.aligned,
    }
}

/// All blocks in order, as parts `PREFIX-00000` and so on; those of an earlier run are replayed, so that later ones see
/// the same quantized predecessors. `original` is the model as opened, `model` that with the artifact's embedding.
pub(crate) fn quantize_blocks(
    run: &Run<'_>,
    (original, model): (&Model, &Model),
    task: &Task,
    prefix: &str,
) -> Result<Vec<Part>, PipelineError> {
    let (settings, observer) = (&run.recipe.quantize, run.observer);
    let layer = layer_settings(settings);
    let plan_of = |id: LayerId| match &task.plan {
        Some(plan) => plan.layer(model, id, layer),
        None => Ok(LayerPlan::from(layer)),
    };
    let token_energies = |id: LayerId| task.token_energies(model, id);
    let squares = |id: LayerId| task.squares(model, id);
    let method = tailorq_quant::find(&settings.method).expect("checked when the recipe was resolved");
    let quantizer = BlockQuantizer {
        device: run.device,
        model,
        quantizer: method,
        plan_of: &plan_of,
        true_sequential: settings.true_sequential,
        token_weight: settings.token_weight,
        token_energies: Some(&token_energies),
        squares: Some(&squares),
        drift: settings.drift(),
        shrink: settings.shrink,
    };
    let embed = |s: &Samples| match settings.drift().is_on() {
        true => Activations::embed_beside(run.device, model, original, &s.sequences),
        false => Activations::embed(run.device, model, &s.sequences),
    };
    // Who reads no inputs needs none to be calculated.
    let mut activations = run.samples.filter(|_| method.needs().hessian).map(embed).transpose()?;
    let total = model.blocks.len() * Slot::ALL.len();
    observer.stage(&format!("quantizing with {}", settings.method), total as u64);
    let mut parts = Vec::new();
    for block_idx in 0..model.blocks.len() {
        let name = format!("{prefix}-{block_idx:05}");
        if let Some(part) = run.output.part(&name, Slot::ALL.len()) {
            if let Some(activations) = &mut activations {
                observer.progress((block_idx * Slot::ALL.len()) as u64, &format!("replaying block {block_idx}"));
                let block = packed_block(&model.blocks[block_idx], &part)?;
                advance(run.device, model, (block_idx, &block), activations);
            }
            parts.push(part);
        } else {
            parts.push(quantize_block(run, &quantizer, block_idx, activations.as_mut(), &name)?);
        }
        observer.progress(((block_idx + 1) * Slot::ALL.len()) as u64, "");
        if observer.cancelled() {
            return Err(PipelineError::Cancelled);
        }
    }
    Ok(parts)
}

fn quantize_block(
    run: &Run<'_>,
    quantizer: &BlockQuantizer<'_>,
    block_idx: usize,
    activations: Option<&mut Activations>,
    name: &str,
) -> Result<Part, PipelineError> {
    let observer = run.observer;
    let mut watch = |id: LayerId| {
        observer.progress((block_idx * Slot::ALL.len() + id.slot.index()) as u64, &id.to_string());
        if observer.cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let block = match quantizer.quantize_block(block_idx, activations, &mut watch) {
        Err(QuantError::Interrupted) => return Err(PipelineError::Cancelled),
        other => other?,
    };
    let (weights, reports): (Vec<_>, Vec<_>) =
        block.layers.into_iter().map(|l| (l.weight.clone(), LayerReport::of(&l))).unzip();
    reports.iter().flat_map(LayerReport::named_notes).for_each(|n| observer.note(&n));
    run.output.write_part(name, &weights, reports)
}

/// The block with its linears replaced by the quantized ones of a finished part.
pub(crate) fn packed_block(block: &Block, part: &Part) -> Result<Block, PipelineError> {
    let mut block = block.clone();
    for linear in &mut block.linears {
        if let Some(layer) = part.layers.iter().find(|l| l.name == linear.name) {
            linear.weight = part.weight(layer)?;
        }
    }
    Ok(block)
}
