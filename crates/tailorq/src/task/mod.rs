//! What a run knows of its task before it quantizes: scores, a survey, and from them a plan. All are files among the parts,
//! so that a resumed run has them already.

pub(crate) mod allocation;
pub(crate) mod answers;
pub(crate) mod circuit;
pub(crate) mod continuations;
pub(crate) mod plan;
pub(crate) mod planning;
pub(crate) mod retention;
pub(crate) mod score;
pub(crate) mod scores;
pub(crate) mod scoring;
pub(crate) mod survey;
pub(crate) mod uniform;

use crate::blocks::{Run, layer_settings, packed_block, quantize_blocks};
use crate::error::PipelineError;
use crate::inputs::QuantizeRequest;
use crate::observer::Observer;
use crate::recipe::{LossKind, QuantizeSettings, Recipe};
use crate::task::circuit::{CircuitSettings, Evidence, Reference, choose_circuit};
use crate::task::plan::{Exceptions, PlanFile};
use crate::task::planning::{allocate_widths, counts};
use crate::task::scores::{Scores, at_width};
use crate::task::scoring::Scoring;
use crate::task::survey::{SQUARE, SurveyFile, write_survey};
use crate::task::uniform::circuit_bytes;
use std::collections::BTreeMap;
use std::path::Path;
use tailorq_model::{Model, OpenedModel};
use tailorq_quant::survey::Needs;
use tailorq_quant::{LayerSettings, QuantError};
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
        self.read_survey(|survey| survey.token_energies(model, id))
    }

    /// The squared gradients of a layer, which a survey must hold.
    pub(crate) fn squares(&self, model: &Model, id: LayerId) -> Result<Matrix, QuantError> {
        let linear = model.blocks[id.block_idx].linear(id.slot);
        let shape = (linear.weight.rows(), linear.weight.cols());
        self.read_survey(|survey| survey.statistic(SQUARE, &linear.name, shape))
    }

    fn read_survey<T>(&self, read: impl FnOnce(&SurveyFile) -> Result<T, PipelineError>) -> Result<T, QuantError> {
        let survey = self.survey.as_ref().ok_or_else(|| QuantError::Settings("there is no survey".into()))?;
        read(survey).map_err(|e| QuantError::Settings(e.to_string()))
    }
}

/// What the survey of a recipe must hold; nothing when it needs none.
pub(crate) fn survey_needs(recipe: &Recipe) -> Option<Needs> {
    needs_of(&recipe.quantize, recipe.circuit.as_ref())
}

/// The same of settings alone.
pub(crate) fn needs_of(quantize: &QuantizeSettings, circuit: Option<&CircuitSettings>) -> Option<Needs> {
    let of_circuit = circuit.map_or_else(Needs::default, CircuitSettings::needs);
    let needs = of_circuit.union(&quantize.survey_needs());
    (needs != Needs::default()).then_some(needs)
}

/// Scores and surveys the task and makes the plan, as far as the recipe asks for them and earlier runs have not. `opened` is
/// the model as opened, `model` that with the artifact's embedding.
pub(crate) fn gather_task(
    run: &Run<'_>,
    opened: &OpenedModel,
    model: &Model,
    request: &QuantizeRequest,
) -> Result<Task, PipelineError> {
    let survey = match survey_needs(run.recipe) {
        Some(needs) => Some(open_survey(run, opened, &needs, request.survey.as_deref())?),
        None => None,
    };
    let mut task = Task { survey, plan: None };
    let (path, sha256) = (run.output.extra("plan.safetensors"), &run.recipe.model.sha256);
    let Recipe { circuit, allocation, plan, .. } = run.recipe;
    if !path.exists() && (circuit.is_some() || allocation.is_some() || plan.is_some()) {
        let mut exceptions = widths_of(run, opened, request)?;
        if let Some(circuit) = circuit {
            // A circuit is chosen around these widths, which a file of their own keeps for the next run.
            let widths = run.output.extra("widths.safetensors");
            exceptions.write(&widths, sha256, &run.recipe.tailorq)?;
            task.plan = Some(PlanFile::open(&widths, sha256)?);
            exceptions.kept = circuit_of(run, (&opened.model, model), &task, circuit)?;
        }
        exceptions.write(&path, sha256, &run.recipe.tailorq)?;
    }
    if path.exists() {
        task.plan = Some(PlanFile::open(&path, sha256)?);
    }
    Ok(task)
}

/// The settings of single layers, by the plan that was given or by an allocation; none where all are alike.
fn widths_of(run: &Run<'_>, opened: &OpenedModel, request: &QuantizeRequest) -> Result<Exceptions, PipelineError> {
    if let Some(given) = &run.recipe.plan {
        let plan = PlanFile::open(&given.file, &run.recipe.model.sha256)?;
        plan.check_names(&opened.model)?;
        note_version(&given.file, plan.made_by(), run.observer);
        let base = at_width(layer_settings(&run.recipe.quantize), 2);
        let differs = |s: &LayerSettings| !s.half && at_width(*s, 2) != base;
        if let Some((name, _)) = plan.layers().iter().find(|(_, s)| differs(s)) {
            let problem = format!(
                "has another grid for {name} (group, symmetry, clip, damping or order) than these settings: repeat those of the scores"
            );
            return Err(PipelineError::Output { path: given.file.clone(), problem });
        }
        if run.recipe.circuit.is_some() && plan.keeps_elements() {
            let problem = "keeps elements already: leave --keep and --signal out".into();
            return Err(PipelineError::Output { path: given.file.clone(), problem });
        }
        return Ok(Exceptions { layers: plan.layers().clone(), kept: plan.kept(&opened.model)? });
    }
    let Some(allocation) = &run.recipe.allocation else { return Ok(Exceptions::default()) };
    let base = layer_settings(&run.recipe.quantize);
    let path = match &request.scores {
        Some(given) => given.clone(),
        None => run.output.extra("scores.json"),
    };
    if !path.exists() && request.scores.is_none() {
        let spill = path.parent().unwrap_or(Path::new("."));
        let scoring = Scoring {
            device: run.device,
            opened,
            recipe: run.recipe,
            samples: run.samples,
            settings: &allocation.score,
            base,
            spill,
            observer: run.observer,
        };
        scoring.run()?.write(&path)?;
    }
    // Read back even when just written: the same numbers as a run that resumes here.
    let scores = Scores::read(&path)?;
    scores.check_origin(run.recipe, (&allocation.score, base), &path)?;
    note_version(&path, Some(&scores.tailorq), run.observer);
    let reserved = run.recipe.circuit.as_ref().map_or(0, |c| circuit_bytes(&opened.model, c));
    let planned = allocate_widths(&scores, &allocation.rule, reserved)?;
    let summary = &planned.summary;
    run.observer.note(&format!("the plan: {:.3} bits per weight, {}", summary.bits_per_weight, counts(summary)));
    Ok(Exceptions { layers: planned.layers, ..Exceptions::default() })
}

/// The elements that the recipe keeps at 16 bits.
fn circuit_of(
    run: &Run<'_>,
    (original, model): (&Model, &Model),
    task: &Task,
    circuit: &CircuitSettings,
) -> Result<BTreeMap<String, Vec<u32>>, PipelineError> {
    // GPTQ, whatever the method that follows.
    let settings = QuantizeSettings { method: "gptq".into(), aligned: None, ..run.recipe.quantize.clone() };
    let recipe = Recipe { quantize: settings, ..run.recipe.clone() };
    let reference = match circuit.reference {
        Reference::Gptq if circuit.signal.reads_reference() => {
            Some(quantize_blocks(&Run { recipe: &recipe, ..*run }, (original, model), task, "reference")?)
        }
        _ => None,
    };
    let of_block = |idx: usize| match &reference {
        Some(parts) => packed_block(&original.blocks[idx], &parts[idx]),
        None => Ok(original.blocks[idx].clone()),
    };
    let settings = layer_settings(&run.recipe.quantize);
    let planned = |name: &str| task.plan.as_ref().and_then(|plan| plan.layers().get(name).copied());
    let evidence = Evidence {
        model: original,
        settings_of: &|name| planned(name).unwrap_or(settings),
        reference: reference.is_some().then_some(&of_block),
        survey: task.survey.as_ref(),
    };
    choose_circuit(run.device, &evidence, circuit, run.observer)
}

fn open_survey(
    run: &Run<'_>,
    opened: &OpenedModel,
    needs: &Needs,
    existing: Option<&Path>,
) -> Result<SurveyFile, PipelineError> {
    if let Some(path) = existing {
        let survey = SurveyFile::open(path, run.recipe)?;
        if survey.has(&opened.model, needs) {
            note_version(path, survey.made_by(), run.observer);
            return Ok(survey);
        }
        let problem =
            "lacks statistics that these settings read: make a survey with `tailorq survey --gather` for them";
        return Err(PipelineError::Output { path: path.to_path_buf(), problem: problem.into() });
    }
    let path = run.output.extra("survey.safetensors");
    if !path.exists() {
        let samples = run.samples.expect("a recipe with a survey has calibration");
        if let Some(loss) = write_survey(run.device, opened, (run.recipe, samples), needs, &path, run.observer)? {
            let what = match run.recipe.quantize.loss {
                LossKind::Kl => "the divergence of the rounded model, at which gradients were taken",
                LossKind::Completion | LossKind::Full => "the task's loss before quantization",
            };
            run.observer.note(&format!("{what}: {loss:.4} nats a token"));
        }
    }
    SurveyFile::open(&path, run.recipe)
}

/// Tells that a file is another version's. Its schema is this version's, so it can be read; what that version counted as
/// the same numbers may differ from what this one would.
fn note_version(path: &Path, made_by: Option<&str>, observer: &dyn Observer) {
    let (here, there) = (env!("CARGO_PKG_VERSION"), made_by.filter(|v| !v.is_empty()).unwrap_or("before 0.1.0"));
    if there != here {
        observer.note(&format!(
            "{} was made by tailorq {there}, this is {here}: make it again if results are to be repeated from the start",
            path.display()
        ));
    }
}
