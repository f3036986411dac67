//! What a run knows of its task before it quantizes: a survey, and from it a plan. Both are files among the parts, so
//! that a resumed run has them already.

use crate::blocks::{Run, layer_settings, packed_block, quantize_blocks};
use crate::circuit::{CircuitSettings, Evidence, Reference, choose_circuit};
use crate::error::PipelineError;
use crate::plan::{Exceptions, PlanFile};
use crate::recipe::Recipe;
use crate::survey::{SQUARE, SurveyFile, write_survey};
use std::collections::BTreeMap;
use std::path::Path;
use tailorq_model::Model;
use tailorq_quant::QuantError;
use tailorq_quant::survey::Needs;
use tailorq_tensor::{LayerId, Matrix};

/// See the module.
#[derive(Default)]
pub(crate) struct Task {
    survey: Option<SurveyFile>,
    pub(crate) plan: Option<PlanFile>,
}

impl Task {
    /// The token energies of a layer, which a survey must hold.
    pub(crate) fn token_energies(&self, model: &Model, id: LayerId) -> Result<Vec<f32>, QuantError> {
        let survey = self.survey.as_ref().ok_or_else(|| QuantError::Settings("there is no survey".into()))?;
        survey.token_energies(model, id).map_err(|e| QuantError::Settings(e.to_string()))
    }
}

impl Task {
    /// The squared gradients of a layer, which a survey must hold.
    pub(crate) fn squares(&self, model: &Model, id: LayerId) -> Result<Matrix, QuantError> {
        let survey = self.survey.as_ref().ok_or_else(|| QuantError::Settings("there is no survey".into()))?;
        let linear = model.blocks[id.block_idx].linear(id.slot);
        let shape = (linear.weight.rows(), linear.weight.cols());
        survey.statistic(SQUARE, &linear.name, shape).map_err(|e| QuantError::Settings(e.to_string()))
    }
}

/// What the survey of a recipe must hold; nothing when it needs none.
pub(crate) fn survey_needs(recipe: &Recipe) -> Option<Needs> {
    let of_circuit = recipe.circuit.as_ref().map_or_else(Needs::default, CircuitSettings::needs);
    let needs = of_circuit.union(&recipe.quantize.survey_needs());
    (needs != Needs::default()).then_some(needs)
}

/// Surveys the task and makes the plan, as far as the recipe asks for them and earlier runs have not. `existing` is a
/// survey of the same inputs. `original` is the model as opened, `model` that with the artifact's embedding.
pub(crate) fn gather_task(
    run: &Run<'_>,
    original: &Model,
    model: &Model,
    existing: Option<&Path>,
) -> Result<Task, PipelineError> {
    let survey = match survey_needs(run.recipe) {
        Some(needs) => Some(open_survey(run, original, &needs, existing)?),
        None => None,
    };
    let mut task = Task { survey, plan: None };
    let path = run.output.extra("plan.safetensors");
    if let (Some(circuit), false) = (&run.recipe.circuit, path.exists()) {
        let kept = circuit_of(run, (original, model), &task, circuit)?;
        let exceptions = Exceptions { kept, ..Exceptions::default() };
        exceptions.write(&path, &run.recipe.model.sha256)?;
    }
    if path.exists() {
        task.plan = Some(PlanFile::open(&path, &run.recipe.model.sha256)?);
    }
    Ok(task)
}

/// The elements that the recipe keeps at 16 bits.
fn circuit_of(
    run: &Run<'_>,
    (original, model): (&Model, &Model),
    task: &Task,
    circuit: &CircuitSettings,
) -> Result<BTreeMap<String, Vec<u32>>, PipelineError> {
    let reference = match circuit.reference {
        Reference::Gptq if circuit.signal.reads_reference() => Some(quantize_blocks(run, model, task, "reference")?),
        _ => None,
    };
    let of_block = |idx: usize| match &reference {
        Some(parts) => packed_block(&original.blocks[idx], &parts[idx]),
        None => Ok(original.blocks[idx].clone()),
    };
    let settings = layer_settings(&run.recipe.quantize);
    let evidence = Evidence {
        model: original,
        settings_of: &|_| settings,
        reference: reference.is_some().then_some(&of_block),
        survey: task.survey.as_ref(),
    };
    choose_circuit(run.device, &evidence, circuit, run.observer)
}

fn open_survey(
    run: &Run<'_>,
    model: &Model,
    needs: &Needs,
    existing: Option<&Path>,
) -> Result<SurveyFile, PipelineError> {
    if let Some(path) = existing {
        let survey = SurveyFile::open(path, run.recipe)?;
        if survey.has(model, needs) {
            return Ok(survey);
        }
        let problem = "lacks statistics that these settings read: make a survey with --for the same settings";
        return Err(PipelineError::Output { path: path.to_path_buf(), problem: problem.into() });
    }
    let path = run.output.extra("survey.safetensors");
    if !path.exists() {
        let samples = run.samples.expect("a recipe with a survey has calibration");
        if let Some(loss) = write_survey(run.device, model, (run.recipe, samples), needs, &path, run.observer)? {
            run.observer.note(&format!("the task's loss before quantization: {loss:.4} nats a token"));
        }
    }
    SurveyFile::open(&path, run.recipe)
}
