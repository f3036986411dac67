//! Scores in a file: every unit of a model with what it could become, exact bytes and predicted damages. Scored once,
//! planned many times.

use crate::error::{PipelineError, output_error};
use crate::recipe::{CalibrationInput, ModelInput, Recipe};
use crate::task::allocation::{ScoreSettings, UnitKind};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tailorq_format::write_atomic;
use tailorq_model::Model;
use tailorq_quant::LayerSettings;
use tailorq_quant::allocate::{Candidate, Unit, UnitId};
use tailorq_tensor::{Bits, LayerId, Layout, Slot};

/// Schema of score files.
pub const SCORES_SCHEMA: u32 = 1;

/// `scores.json`: what a plan is made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scores {
    /// Another number means another format.
    pub tailorq_scores: u32,
    /// Version of tailorq that measured them; empty where that was not yet told.
    #[serde(default)]
    pub tailorq: String,
    /// The checkpoint.
    pub model: ModelInput,
    /// The data; absent for signals that read none.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub calibration: Option<CalibrationInput>,
    /// What the scores are.
    pub score: ScoreSettings,
    /// How linears are quantized beside their width; the width is that of the narrowest candidate.
    pub base: LayerSettings,
    /// Weights of all linears.
    pub n_weights: u64,
    /// The units in the order of the model.
    pub units: Vec<ScoredUnit>,
}

/// A unit of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoredUnit {
    /// `block 3`, `block 3 q+k+v`, `block 3 down`.
    pub name: String,
    /// The block that it lies in.
    pub block_idx: usize,
    /// Its linears.
    pub slots: Vec<Slot>,
    /// Their checkpoint names.
    pub layers: Vec<String>,
    /// The higher the more bits; the scale is the signal's own.
    pub score: f64,
    /// What it could become, widths ascending.
    pub candidates: Vec<ScoredCandidate>,
}

/// A width of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoredCandidate {
    /// Code width, or 16 for a unit that is not quantized.
    pub bits: u32,
    /// Bytes in the file: of codes, scales and zeros, or two for each weight.
    pub bytes: u64,
    /// What it is predicted to cost: measured, or derived from the score (see [`crate::ScoreSettings::signal`]).
    pub damage: f64,
}

impl ScoredUnit {
    /// Its name among allocators.
    pub(crate) fn id(&self, kind: UnitKind) -> UnitId {
        match (kind, &self.slots[..]) {
            (UnitKind::Block, _) => UnitId::Block(self.block_idx),
            (UnitKind::Fused, [first, _, ..]) => UnitId::Fused(self.block_idx, first.input_group()),
            (_, slots) => UnitId::Layer(LayerId { block_idx: self.block_idx, slot: slots[0] }),
        }
    }
}

/// The units of a model and the linears in each.
pub(crate) fn units_of(model: &Model, kind: UnitKind) -> Vec<(UnitId, Vec<Slot>)> {
    let groups: Vec<Vec<Slot>> = match kind {
        UnitKind::Block => vec![Slot::ALL.to_vec()],
        UnitKind::Fused => tailorq_tensor::InputGroup::ALL.iter().map(|g| g.slots().to_vec()).collect(),
        UnitKind::Layer => Slot::ALL.iter().map(|&slot| vec![slot]).collect(),
    };
    let of_block = |block_idx: usize| groups.iter().map(move |slots| (block_idx, slots.clone()));
    let id = |(block_idx, slots): (usize, Vec<Slot>)| {
        let id = match (kind, &slots[..]) {
            (UnitKind::Block, _) => UnitId::Block(block_idx),
            (_, [slot]) => UnitId::Layer(LayerId { block_idx, slot: *slot }),
            (_, slots) => UnitId::Fused(block_idx, slots[0].input_group()),
        };
        (id, slots)
    };
    (0..model.blocks.len()).flat_map(of_block).map(id).collect()
}

/// The settings with another width, 16 for one that is not quantized.
pub(crate) fn at_width(base: LayerSettings, width: u32) -> LayerSettings {
    match Bits::try_from(width) {
        Ok(bits) => LayerSettings { layout: Layout { bits, ..base.layout }, ..base },
        Err(_) => LayerSettings::half(),
    }
}

impl Scores {
    /// The units as allocators see them; a format's number is its width in bits.
    pub(crate) fn units(&self) -> Vec<Unit> {
        let candidate =
            |c: &ScoredCandidate| Candidate { format: c.bits as usize, cost_bytes: c.bytes, damage: c.damage };
        let unit = |u: &ScoredUnit| Unit {
            id: u.id(self.score.unit),
            candidates: u.candidates.iter().map(candidate).collect(),
        };
        self.units.iter().map(unit).collect()
    }

    /// Reads a score file.
    pub fn read(path: &Path) -> Result<Self, PipelineError> {
        let fail = |problem: String| PipelineError::Output { path: path.to_path_buf(), problem };
        let bytes = std::fs::read(path).map_err(|e| output_error(path, &e))?;
        let scores: Scores = serde_json::from_slice(&bytes)
            .map_err(|e| fail(format!("is no score file of this version ({e}): make one with `tailorq score`")))?;
        if scores.tailorq_scores != SCORES_SCHEMA {
            let found = scores.tailorq_scores;
            return Err(fail(format!("has schema {found}, this tailorq reads {SCORES_SCHEMA}: make it again")));
        }
        scores.score.check()?;
        let whole = |u: &ScoredUnit| {
            let widths: Vec<u32> = u.candidates.iter().map(|c| c.bits).collect();
            !u.slots.is_empty() && u.slots.len() == u.layers.len() && widths == scores.score.widths
        };
        match scores.units.iter().find(|u| !whole(u)) {
            Some(unit) => {
                Err(fail(format!("{} has no linear, or other widths than the rest: make it again", unit.name)))
            }
            None if scores.units.is_empty() => Err(fail("has no units: make it again".into())),
            None => Ok(scores),
        }
    }

    /// Writes the file, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), PipelineError> {
        let mut text = serde_json::to_string_pretty(self).expect("plain data with finite numbers");
        text.push('\n');
        Ok(write_atomic(path, text.as_bytes())?)
    }

    /// Refuses scores of other inputs than this run's: `path` is where they came from.
    pub(crate) fn check_origin(
        &self,
        recipe: &Recipe,
        (score, base): (&ScoreSettings, LayerSettings),
        path: &Path,
    ) -> Result<(), PipelineError> {
        let fail = |what: &str| {
            let problem = format!("was made {what}: repeat that, or make new scores");
            Err(PipelineError::Output { path: path.to_path_buf(), problem })
        };
        if self.model.sha256 != recipe.model.sha256 {
            return fail("from another checkpoint");
        }
        if &self.score != score {
            return fail("with other settings of the score (signal, unit, widths, prompts and so on)");
        }
        if at_width(self.base, 2) != at_width(base, 2) {
            return fail("for another grid (group, symmetry, clip, damping or order)");
        }
        // Where the file lies does not matter.
        let data = |c: &Option<CalibrationInput>| c.as_ref().map(CalibrationInput::without_paths);
        if score.reads_data() && data(&self.calibration) != data(&recipe.calibration) {
            return fail("from other data or another choice of items");
        }
        Ok(())
    }
}
