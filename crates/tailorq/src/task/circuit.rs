//! The circuit of a task: which weights stay at 16 bits, from a survey and a reference quantization.

use crate::error::PipelineError;
use crate::observer::Observer;
use crate::task::survey::{ABSOLUTE, SQUARE, SurveyFile};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use tailorq_kernels::Device;
use tailorq_model::{Block, Model};
use tailorq_quant::quantize::Rtn;
use tailorq_quant::survey::Needs;
use tailorq_quant::{
    CircuitSignal, ElementRow, LayerPlan, LayerSettings, LayerStats, QuantError, Quantizer, TopElements,
};
use tailorq_tensor::{DenseRows, LayerId, ReadRows, Rng, Slot, Weight};

/// The largest share of weights that may be kept: beyond it more bits for all are cheaper (a kept weight costs 32 bits).
pub(crate) const MOST_KEPT: f64 = 0.1;

/// Where the quantized values come from that a signal compares weights with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reference {
    /// Each weight rounded to nearest on the layer's own grid: costs seconds.
    #[default]
    Rtn,
    /// A whole run of GPTQ without kept weights (TACQ's authors): costs as much as the run that follows it.
    Gptq,
}

/// Which weights stay at 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CircuitSettings {
    /// Share of all weights of the linears, from 0 to 0.1.
    pub keep: f64,
    /// What makes a weight worth keeping.
    pub signal: CircuitSignal,
    /// Quantized values for signals that read them.
    pub reference: Reference,
    /// For the random control.
    pub seed: u64,
}

impl Default for CircuitSettings {
    /// TACQ's share of 0.35 %.
    fn default() -> Self {
        CircuitSettings { keep: 0.0035, signal: CircuitSignal::Tacq, reference: Reference::Rtn, seed: 0 }
    }
}

impl CircuitSettings {
    /// Refuses shares that make no sense.
    pub fn check(&self) -> Result<(), PipelineError> {
        if self.keep.is_finite() && (0.0..=MOST_KEPT).contains(&self.keep) {
            return Ok(());
        }
        Err(PipelineError::Settings(format!(
            "the share of kept weights is {}: use 0 to {MOST_KEPT} (TACQ keeps 0.0035)",
            self.keep
        )))
    }

    /// What a survey must hold for it.
    pub fn needs(&self) -> Needs {
        Needs {
            absolute: self.signal.reads_absolute(),
            square: self.signal.reads_square(),
            input_energies: self.signal.reads_inputs(),
            ..Needs::default()
        }
    }
}

/// What decides the scores, beside the settings.
pub(crate) struct Evidence<'a> {
    /// The original model.
    pub(crate) model: &'a Model,
    /// How a layer would be rounded.
    pub(crate) settings_of: &'a dyn Fn(&str) -> LayerSettings,
    /// The blocks of a finished reference run; without one weights are rounded to nearest.
    pub(crate) reference: Option<&'a dyn Fn(usize) -> Result<Block, PipelineError>>,
    /// The survey, when the signal reads one.
    pub(crate) survey: Option<&'a SurveyFile>,
}

/// The elements with the highest scores of all layers together: each linear's checkpoint name with its ascending row-major
/// indices.
pub(crate) fn choose_circuit(
    device: &dyn Device,
    evidence: &Evidence<'_>,
    circuit: &CircuitSettings,
    observer: &dyn Observer,
) -> Result<BTreeMap<String, Vec<u32>>, PipelineError> {
    let model = evidence.model;
    let layers = layers(model)?;
    observer.stage("choosing the circuit", layers.len() as u64);
    let sizes = layers.iter().map(|&id| linear_weight(model, id).rows() * linear_weight(model, id).cols());
    let n_kept = (circuit.keep * sizes.sum::<usize>() as f64).floor() as usize;
    let mut top = TopElements::new(n_kept);
    let mut rng = Rng::new(circuit.seed);
    let mut reference_block: Option<Block> = None;
    for (idx, &id) in layers.iter().enumerate() {
        if observer.cancelled() {
            return Err(PipelineError::Cancelled);
        }
        if let (Slot::Q, true, Some(of_block)) = (id.slot, circuit.signal.reads_reference(), evidence.reference) {
            reference_block = Some(of_block(id.block_idx)?);
        }
        // A layer at 16 bits has nothing to keep.
        if (evidence.settings_of)(&model.blocks[id.block_idx].linear(id.slot).name).half {
            continue;
        }
        let layer = LayerEvidence::gather(device, evidence, circuit, id, reference_block.as_ref())?;
        layer.score(circuit.signal, (idx, &mut top), &mut rng);
        observer.progress(idx as u64 + 1, &id.to_string());
    }
    let named = |(id, kept): (&LayerId, Vec<usize>)| {
        let index = |i| u32::try_from(i).expect("no layer is larger, or `layers` had refused it");
        let name = model.blocks[id.block_idx].linear(id.slot).name.clone();
        (name, kept.into_iter().map(index).collect())
    };
    Ok(layers.iter().zip(top.finish(layers.len())).map(named).collect())
}

/// All linears, in the order in which ties are broken.
fn layers(model: &Model) -> Result<Vec<LayerId>, PipelineError> {
    let of_block = |block_idx| Slot::ALL.map(|slot| LayerId { block_idx, slot });
    let layers: Vec<LayerId> = (0..model.blocks.len()).flat_map(of_block).collect();
    let elements = |id: LayerId| linear_weight(model, id).rows() as u64 * linear_weight(model, id).cols() as u64;
    match layers.iter().find(|&&id| elements(id) > u64::from(u32::MAX)) {
        Some(id) => Err(PipelineError::Settings(format!("{id} has more than 2^32 weights: circuits cannot name them"))),
        None => Ok(layers),
    }
}

fn linear_weight(model: &Model, id: LayerId) -> &Weight {
    &model.blocks[id.block_idx].linear(id.slot).weight
}

/// Rows of a layer that one task scores.
const TASK_ROWS: usize = 16;

/// Rows whose candidates are in memory before they are taken in.
const PANEL_ROWS: usize = 512;

/// What is known of one layer, as it is stored.
struct LayerEvidence<'a> {
    weights: &'a dyn ReadRows,
    reference: Option<Weight>,
    gradient: Option<DenseRows>,
    inputs: Vec<f32>,
}

impl<'a> LayerEvidence<'a> {
    fn gather(
        device: &dyn Device,
        evidence: &Evidence<'a>,
        circuit: &CircuitSettings,
        id: LayerId,
        reference_block: Option<&Block>,
    ) -> Result<Self, PipelineError> {
        let signal = circuit.signal;
        let linear = evidence.model.blocks[id.block_idx].linear(id.slot);
        let weight = linear_weight(evidence.model, id);
        let shape = (weight.rows(), weight.cols());
        let survey = || evidence.survey.ok_or_else(|| PipelineError::Settings("the signal needs a survey".into()));
        let gradient = match (signal.reads_absolute(), signal.reads_square()) {
            (true, _) => Some(survey()?.stored_statistic(ABSOLUTE, &linear.name, shape)?),
            (_, true) => Some(survey()?.stored_statistic(SQUARE, &linear.name, shape)?),
            _ => None,
        };
        let inputs = if signal.reads_inputs() { survey()?.input_energies(evidence.model, id)? } else { Vec::new() };
        let reference = match (signal.reads_reference(), reference_block) {
            (false, _) => None,
            (true, Some(block)) => Some(block.linear(id.slot).weight.clone()),
            (true, None) => Some(rounded(device, weight, (evidence.settings_of)(&linear.name))?),
        };
        Ok(LayerEvidence { weights: weight.reader(), reference, gradient, inputs })
    }

    /// Scores all elements of layer number `idx`. Which are the top ones does not depend on the order in which they come, but
    /// draws do.
    fn score(&self, signal: CircuitSignal, (idx, top): (usize, &mut TopElements), rng: &mut Rng) {
        let n_rows = self.weights.rows();
        for panel in (0..n_rows).step_by(PANEL_ROWS) {
            let end = (panel + PANEL_ROWS).min(n_rows);
            let tasks: Vec<Range<usize>> =
                (panel..end).step_by(TASK_ROWS).map(|r| r..(r + TASK_ROWS).min(end)).collect();
            let of = |rows: Range<usize>, rng: &mut Rng| self.candidates(signal, rows, top, rng);
            let found: Vec<Vec<(f32, u64)>> = if signal == CircuitSignal::Random {
                tasks.into_iter().map(|rows| of(rows, rng)).collect()
            } else {
                tasks.into_par_iter().map(|rows| of(rows, &mut Rng::new(0))).collect()
            };
            found.iter().for_each(|candidates| top.take(idx, candidates));
        }
    }

    fn candidates(
        &self,
        signal: CircuitSignal,
        rows: Range<usize>,
        top: &TopElements,
        rng: &mut Rng,
    ) -> Vec<(f32, u64)> {
        let cols = self.weights.cols();
        let read = |from: Option<&dyn ReadRows>| -> Vec<f32> {
            let Some(from) = from else { return Vec::new() };
            let mut values = vec![0.0; rows.len() * cols];
            from.read_rows(rows.start, &mut values);
            values
        };
        let weights = read(Some(self.weights));
        let reference = read(self.reference.as_ref().map(Weight::reader));
        let gradient = read(self.gradient.as_ref().map(|g| g as &dyn ReadRows));
        fn of(values: &[f32], row: Range<usize>) -> &[f32] {
            if values.is_empty() { values } else { &values[row] }
        }
        let (mut scores, mut found) = (vec![0.0f32; cols], Vec::new());
        for (i, r) in rows.enumerate() {
            let row = || i * cols..(i + 1) * cols;
            let evidence = ElementRow {
                weights: &weights[row()],
                reference: of(&reference, row()),
                gradient: of(&gradient, row()),
                inputs: &self.inputs,
            };
            signal.score_row(&evidence, rng, &mut scores);
            top.candidates(r * cols, &scores, &mut found);
        }
        found
    }
}

fn rounded(device: &dyn Device, weight: &Weight, settings: LayerSettings) -> Result<Weight, QuantError> {
    let weights = device.dense_matrix(weight);
    let quantized = Rtn.quantize(device, &weights, &LayerStats::default(), &LayerPlan::from(settings))?;
    Ok(quantized.weight.into())
}
