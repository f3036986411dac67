//! From an experiment to its arms: what is quantized and measured, each recipe once, and what each stands for.

use super::controls::{Variant, controls};
use super::error::CompareError;
use super::experiment::{CalibrationTable, Experiment, MethodTable};
use super::general::GeneralText;
use crate::estimate::{PredictedSize, predicted_size};
use crate::inputs::{QuantizeRequest, recipe_of};
use crate::observer::Silent;
use crate::output::OutputMode;
use crate::presets::Method;
use crate::recipe::{QuantizeSettings, Recipe, hex};
use crate::task::uniform::{n_weights, one_size, uniform_bytes};
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use tailorq_model::{Model, OpenedModel};
use tailorq_quant::quantize::Saliency;
use tailorq_tensor::Bits;

/// A recipe to be quantized and measured.
#[derive(Clone, Debug)]
pub struct Arm {
    /// The hash of its recipe, 16 hexadecimal digits: the name of its folder.
    pub key: String,
    /// The recipe with paths as the experiment file has them.
    pub recipe: Recipe,
    /// For progress: the first row that it stands in, with its seed.
    pub title: String,
    /// Predicted bytes of the artifact's weight files.
    pub predicted_bytes: u64,
    /// Predicted bits of the linears, from bytes of the file.
    pub predicted_bits_per_weight: f64,
    pub(super) request: QuantizeRequest,
}

/// A line of the table: a method at a budget, with an arm for each seed that makes a difference.
#[derive(Clone, Debug)]
pub struct Row {
    /// The method's or the control's name.
    pub method: String,
    /// `2 bits`, `2.5 bits per weight`, or nothing for a method of one size.
    pub budget: String,
    /// The method beside which a control first stood; absent for methods.
    pub control_of: Option<String>,
    /// Places in the list of arms, in the order of seeds.
    pub arms: Vec<usize>,
}

/// All arms of an experiment.
#[derive(Clone, Debug, Default)]
pub struct Arms {
    /// Each recipe once.
    pub arms: Vec<Arm>,
    /// What they stand for.
    pub rows: Vec<Row>,
    /// What the user should know: budgets that a method does not have.
    pub notes: Vec<String>,
}

#[derive(Clone, Copy)]
enum Budget {
    Bits(Bits),
    BitsPerWeight(f64),
    /// The method's own size.
    Own,
}

impl Budget {
    fn label(self) -> String {
        match self {
            Budget::Bits(bits) => format!("{} bits", bits.count()),
            Budget::BitsPerWeight(b) => format!("{b} bits per weight"),
            Budget::Own => String::new(),
        }
    }
}

/// Settings and data of an arm, before its inputs are hashed.
struct Wanted<'a> {
    method: Method,
    calibration: Option<&'a CalibrationTable>,
    bits_per_weight: Option<f64>,
    general: bool,
    seed: u64,
}

/// The experiment on its model.
pub(super) struct Planner<'a> {
    experiment: &'a Experiment,
    opened: &'a OpenedModel,
    model_sha256: &'a str,
    arms: Arms,
    texts: GeneralText,
}

impl<'a> Planner<'a> {
    pub(super) fn new(experiment: &'a Experiment, opened: &'a OpenedModel, model_sha256: &'a str) -> Self {
        Planner { experiment, opened, model_sha256, arms: Arms::default(), texts: GeneralText::default() }
    }

    /// All arms: methods in the order of the file, budgets, seeds, each followed by its controls.
    pub(super) fn plan(mut self) -> Result<Arms, CompareError> {
        for table in &self.experiment.methods {
            let settings = table.settings().map_err(|problem| self.bad(problem))?;
            for budget in self.budgets(table.fixes_size() || !settings.has_budget()) {
                let Some((method, bits_per_weight)) = at_budget(&self.opened.model, settings.clone(), budget) else {
                    let (name, budget) = (table.label(), budget.label());
                    let why = one_size(&settings.quantize).map_or(String::new(), |why| format!(" ({why})"));
                    self.arms.notes.push(format!("{name} has no form of {budget}: it is left out there{why}"));
                    continue;
                };
                self.method(table, budget, &method, bits_per_weight)?;
            }
        }
        let reads_data = self.arms.arms.iter().any(|arm| arm.recipe.calibration.is_some());
        let has_controls = self.arms.rows.iter().any(|row| row.control_of.is_some());
        if self.experiment.general.is_none() && reads_data && has_controls {
            let note = "no method stands beside itself on general text: name one, such as C4, in [general]";
            self.arms.notes.push(note.into());
        }
        Ok(self.arms)
    }

    fn budgets(&self, own: bool) -> Vec<Budget> {
        let given = &self.experiment.budgets;
        let bits = given.bits.iter().map(|&b| Budget::Bits(b));
        let bits_per_weight = given.bits_per_weight.iter().map(|&b| Budget::BitsPerWeight(b));
        if own { vec![Budget::Own] } else { bits.chain(bits_per_weight).collect() }
    }

    /// A method at a budget over all seeds, and its controls.
    fn method(
        &mut self,
        table: &MethodTable,
        budget: Budget,
        method: &Method,
        bits_per_weight: Option<f64>,
    ) -> Result<(), CompareError> {
        let (label, calibration) = (table.label(), table.calibration.as_ref());
        let mut arms = Vec::new();
        let mut variants: Vec<(String, Vec<usize>)> = Vec::new();
        for &seed in &self.experiment.seeds {
            let wanted = Wanted { method: method.clone(), calibration, bits_per_weight, general: false, seed };
            let arm = self.arm(&wanted, label, budget)?;
            arms.push(arm);
            if !table.controls.unwrap_or(self.experiment.controls) {
                continue;
            }
            let recipe = self.arms.arms[arm].recipe.clone();
            let of_arm = controls(&self.opened.model, &recipe, self.experiment.general.is_some());
            for (at, Variant { name, settings }) in of_arm.into_iter().enumerate() {
                let wanted = match settings {
                    Some(method) => Wanted { method, calibration, bits_per_weight: None, general: false, seed },
                    None => Wanted { method: method.clone(), calibration, bits_per_weight, general: true, seed },
                };
                let name = if wanted.general { format!("{label} {name}") } else { name };
                let arm = self.arm(&wanted, &name, budget)?;
                match variants.get_mut(at) {
                    Some((_, arms)) => arms.push(arm),
                    None => variants.push((name, vec![arm])),
                }
            }
        }
        self.row(label.into(), budget, None, arms);
        for (name, arms) in variants {
            self.row(name, budget, Some(label), arms);
        }
        Ok(())
    }

    /// Adds a row, unless there is one of the same arms; a name that another row has tells them apart by the method.
    fn row(&mut self, mut method: String, budget: Budget, control_of: Option<&str>, mut arms: Vec<usize>) {
        let mut seen = Vec::new();
        arms.retain(|arm| !seen.contains(arm) && (seen.push(*arm), true).1);
        let budget = budget.label();
        let rows = &mut self.arms.rows;
        if let Some(same) = rows.iter_mut().find(|r| r.arms == arms) {
            // A method that is also another's control is called by its own name.
            if control_of.is_none() && same.control_of.is_some() {
                (same.method, same.control_of) = (method, None);
            }
            return;
        }
        if let Some(beside) = control_of.filter(|_| rows.iter().any(|r| r.method == method && r.budget == budget)) {
            method = format!("{method} (beside {beside})");
        }
        rows.push(Row { method, budget, control_of: control_of.map(str::to_string), arms });
    }

    /// The place of the arm, which is made if no other has its recipe.
    fn arm(&mut self, wanted: &Wanted<'_>, name: &str, budget: Budget) -> Result<usize, CompareError> {
        let comma = if matches!(budget, Budget::Own) { "" } else { ", " };
        let title = format!("{name}{comma}{}", budget.label());
        let path = self.experiment.path().to_path_buf();
        let about = |e: crate::PipelineError| CompareError::Experiment {
            path: path.clone(),
            problem: format!("methods: {title}: {e}"),
        };
        let Wanted { method, calibration, bits_per_weight, general, seed } = wanted;
        let mut data = self.experiment.calibration(*calibration, *seed);
        if let (true, Some(text)) = (*general, &self.experiment.general) {
            let file = self.experiment.locate(&text.file);
            data = self.texts.in_place_of(self.opened, &data, (text, file)).map_err(about)?;
        }
        let mut request = QuantizeRequest {
            settings: method.quantize.clone(),
            calibration: Some(data),
            circuit: method.circuit,
            allocation: method.allocation.clone(),
            bits_per_weight: *bits_per_weight,
            mode: OutputMode::Resume,
            ..QuantizeRequest::new(self.experiment.model_source(), PathBuf::new())
        };
        if let Some(circuit) = &mut request.circuit {
            circuit.seed = *seed;
        }
        if let Some(aligned) = request.settings.aligned.as_mut().filter(|a| a.saliency == Saliency::Random) {
            aligned.seed = *seed;
        }
        if let Some(allocation) = &mut request.allocation {
            allocation.score.seed = *seed;
        }
        request.check().map_err(about)?;
        let mut recipe = recipe_of(self.opened, &request, self.model_sha256.into(), &Silent).map_err(about)?;
        let model = &self.opened.model;
        let PredictedSize { linear_bytes, artifact_bytes } = predicted_size(model, &recipe);
        recipe.model.source.clone_from(&self.experiment.model);
        if let Some(calibration) = &mut recipe.calibration {
            calibration.file = self.experiment.as_written(&calibration.file);
            if let Some(general) = &mut calibration.general {
                general.file = self.experiment.as_written(&general.file);
            }
        }
        let key = key_of(&recipe);
        if let Some(same) = self.arms.arms.iter().position(|a| a.key == key) {
            return Ok(same);
        }
        self.arms.arms.push(Arm {
            key,
            title: format!("{title}, seed {seed}"),
            predicted_bytes: artifact_bytes,
            predicted_bits_per_weight: linear_bytes as f64 * 8.0 / n_weights(model) as f64,
            recipe,
            request,
        });
        Ok(self.arms.arms.len() - 1)
    }

    fn bad(&self, problem: String) -> CompareError {
        CompareError::Experiment { path: self.experiment.path().to_path_buf(), problem }
    }
}

/// The settings at a budget, and what is left for the pipeline to settle; nothing where the method cannot have it.
fn at_budget(model: &Model, mut method: Method, budget: Budget) -> Option<(Method, Option<f64>)> {
    let allocation = method.allocation.as_mut();
    match (budget, allocation) {
        (Budget::Own, _) => Some((method, None)),
        (Budget::Bits(bits), Some(allocation)) => {
            let bytes = uniform_bytes(model, &QuantizeSettings { bits, ..method.quantize.clone() }) as f64;
            // Up to the next millionth, lest rounding takes the last byte away.
            let budget = (bytes * 8.0 / n_weights(model) as f64 * 1e6).ceil() / 1e6;
            allocation.rule.bits_per_weight = Some(budget);
            Some((method, None))
        }
        (Budget::BitsPerWeight(budget), Some(allocation)) => {
            allocation.rule.bits_per_weight = Some(budget);
            Some((method, None))
        }
        (Budget::Bits(bits), None) => {
            method.quantize.bits = bits;
            method.quantize.check().is_ok().then_some((method, None))
        }
        (Budget::BitsPerWeight(budget), None) => one_size(&method.quantize).is_none().then_some((method, Some(budget))),
    }
}

/// The hash of what an arm is: its recipe, but not where its calibration lies.
fn key_of(recipe: &Recipe) -> String {
    let mut recipe = recipe.clone();
    recipe.model.source.clear();
    recipe.calibration = recipe.calibration.map(|c| c.without_paths());
    short_hash(recipe.to_toml().as_bytes())
}

/// The first 16 digits of a SHA-256.
pub(super) fn short_hash(bytes: &[u8]) -> String {
    let mut hash = hex(&Sha256::digest(bytes));
    hash.truncate(16);
    hash
}
