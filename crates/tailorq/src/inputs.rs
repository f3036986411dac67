//! From what the user asked to what is certain: hashed inputs, a recipe, token sequences that fit into memory.

use crate::error::PipelineError;
use crate::estimate::{available_memory, peak_memory};
use crate::observer::Observer;
use crate::output::OutputMode;
use crate::recipe::{
    CalibrationInput, GeneralInput, ModelInput, PlanInput, QuantizeSettings, RECIPE_SCHEMA, Recipe, hash_files,
};
use crate::samples::{self, Samples};
use crate::task::allocation::{ALLOCATED_METHODS, AllocationSettings};
use crate::task::circuit::CircuitSettings;
use crate::task::retention::RetainRequest;
use crate::task::uniform;
use std::path::{Path, PathBuf};
use tailorq_model::OpenedModel;
use tailorq_quant::survey::Needs;

/// What to quantize and how; becomes a [`Recipe`] once the inputs are hashed.
#[derive(Clone, Debug)]
pub struct QuantizeRequest {
    /// Path or hub id of the checkpoint.
    pub model: String,
    /// How weights become codes.
    pub settings: QuantizeSettings,
    /// Calibration text; required by methods that need a Hessian or gradients.
    pub calibration: Option<CalibrationRequest>,
    /// The weights that stay at 16 bits, if any.
    pub circuit: Option<CircuitSettings>,
    /// A survey of the same model and calibration, made before.
    pub survey: Option<PathBuf>,
    /// How bits are spread over the linears; all alike without one.
    pub allocation: Option<AllocationSettings>,
    /// Scores of the same model, calibration and settings, made before, for the allocation.
    pub scores: Option<PathBuf>,
    /// A plan made before, in place of an allocation.
    pub plan: Option<PathBuf>,
    /// Without an allocation or a plan: bits of the linears, counted from bytes of the file. Settles width and group, or
    /// width and the share of kept weights where there is a circuit, of salient tiles where there are some.
    pub bits_per_weight: Option<f64>,
    /// Hashes that the inputs must have (model, calibration), when a recipe is repeated.
    pub expected: Option<Recipe>,
    /// How good the result must be, if that matters. Not part of the recipe, whose bytes it does not decide.
    pub retain: Option<RetainRequest>,
    /// Where the artifact goes.
    pub output: PathBuf,
    /// What to do when `output` is not empty.
    pub mode: OutputMode,
}

/// More calibration items than anybody has; keeps a mistyped number from becoming an odd failure later.
const MOST_SAMPLES: usize = 100_000_000;

impl QuantizeRequest {
    /// What can be refused before a file is opened.
    pub(crate) fn check(&self) -> Result<(), PipelineError> {
        self.settings.check()?;
        self.circuit.as_ref().map_or(Ok(()), CircuitSettings::check)?;
        self.allocation.as_ref().map_or(Ok(()), AllocationSettings::check)?;
        self.retain.as_ref().map_or(Ok(()), RetainRequest::check)?;
        let fail = |problem: String| Err(PipelineError::Settings(problem));
        if self.circuit.is_some() && tailorq_quant::find(&self.settings.method).is_some_and(|q| q.stores_half()) {
            let method = &self.settings.method;
            return fail(format!(
                "{method} stores all weights at 16 bits: a circuit of kept weights belongs to gptq or rtn"
            ));
        }
        if self.plan.is_some() && (self.allocation.is_some() || self.bits_per_weight.is_some()) {
            return fail(
                "a plan already says what every linear becomes: give it to --method gptq or rtn, without a budget"
                    .into(),
            );
        }
        let has_widths = self.plan.is_some() || self.allocation.is_some();
        if has_widths && !ALLOCATED_METHODS.contains(&self.settings.method.as_str()) {
            return fail(format!(
                "method {} has one width for all linears: allocations and plans are for {}",
                self.settings.method,
                ALLOCATED_METHODS.join(", ")
            ));
        }
        if let Some(problem) = self.bits_per_weight.and_then(|_| uniform::one_size(&self.settings)) {
            return fail(format!("{problem}; leave --bits-per-weight out"));
        }
        if self.scores.is_some() && self.allocation.is_none() {
            return fail(
                "scores are read by an allocation: use --method taqo or another that allocates, or --allocate".into(),
            );
        }
        match &self.calibration {
            None if self.needs_calibration() => fail(format!(
                "method {} needs calibration text: give --calibration FILE (text, or JSONL with prompt and completion)",
                self.settings.method
            )),
            Some(c) if !(1..=MOST_SAMPLES).contains(&c.samples) => {
                fail(format!("--samples is {}: use 1 to {MOST_SAMPLES}", c.samples))
            }
            Some(c) if c.general.as_ref().is_some_and(|(_, mix)| !(0.0..=1.0).contains(mix)) => {
                fail("--mix is not a share from 0 to 1".into())
            }
            Some(c) if c.sequence_length.is_some_and(|n| n < 2) => {
                fail("--sequence-length is below 2: a sequence needs two tokens".into())
            }
            Some(c) if i64::try_from(c.seed).is_err() => {
                fail(format!("--seed is {}: a recipe holds numbers up to {}", c.seed, i64::MAX))
            }
            _ => Ok(()),
        }
    }

    fn needs_calibration(&self) -> bool {
        let reads_data = self.circuit.as_ref().is_some_and(|c| c.needs() != Needs::default());
        let scores_data = self.allocation.as_ref().is_some_and(|a| a.score.reads_data());
        let needs = tailorq_quant::find(&self.settings.method).map(|q| q.needs());
        needs.is_some_and(|n| n.hessian || n.square) || reads_data || scores_data
    }

    /// A request with the default settings and no data, to be filled in.
    pub fn new(model: impl Into<String>, output: impl Into<PathBuf>) -> Self {
        QuantizeRequest {
            model: model.into(),
            settings: QuantizeSettings::default(),
            calibration: None,
            circuit: None,
            survey: None,
            allocation: None,
            scores: None,
            plan: None,
            bits_per_weight: None,
            expected: None,
            retain: None,
            output: output.into(),
            mode: OutputMode::Fresh,
        }
    }

    /// The request that repeats `recipe`; its inputs are checked against the recipe's hashes.
    pub fn repeat(recipe: Recipe, output: PathBuf, mode: OutputMode) -> Self {
        QuantizeRequest {
            settings: recipe.quantize.clone(),
            calibration: recipe.calibration.as_ref().map(|c| CalibrationRequest {
                file: c.file.clone(),
                samples: c.samples,
                sequence_length: Some(c.sequence_length),
                seed: c.seed,
                drop_calculator_marks: c.drop_calculator_marks,
                general: c.general.as_ref().map(|g| (g.file.clone(), g.mix)),
            }),
            circuit: recipe.circuit,
            allocation: recipe.allocation.clone(),
            plan: recipe.plan.as_ref().map(|p| p.file.clone()),
            mode,
            ..QuantizeRequest::new(&recipe.model.source, output)
        }
        .expecting(recipe)
    }

    fn expecting(self, recipe: Recipe) -> Self {
        QuantizeRequest { expected: Some(recipe), ..self }
    }
}

/// Calibration as asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct CalibrationRequest {
    /// Text file or JSONL.
    pub file: PathBuf,
    /// Items or windows to take.
    pub samples: usize,
    /// Longest item; `None` is 2048 or the model's context, whichever is shorter.
    pub sequence_length: Option<usize>,
    /// Chooses the items.
    pub seed: u64,
    /// Take marks like `<<48/2=24>>` out of the completions.
    pub drop_calculator_marks: bool,
    /// General text to blend in, and its share of the items.
    pub general: Option<(PathBuf, f64)>,
}

/// Hashes the inputs and reads the calibration set: everything that decides the artifact's bytes.
pub(crate) fn resolve(
    opened: &OpenedModel,
    request: &QuantizeRequest,
    observer: &dyn Observer,
) -> Result<(Recipe, Option<Samples>), PipelineError> {
    observer.stage("hashing the checkpoint", opened.files.weight_bytes);
    let mut done = 0;
    let sha256 = hash_files(&model_files(opened), |n| {
        done += n as u64;
        observer.progress(done, "");
    })
    .map_err(|e| crate::error::output_error(&opened.files.path, &e))?;
    let recipe = recipe_of(opened, request, sha256, observer)?;
    let samples = recipe.calibration.as_ref().map(|input| samples::load(opened, input)).transpose()?;
    Ok((recipe, samples))
}

/// The recipe of a request to a checkpoint of this hash; reads the calibration file to hash it, but no items.
pub(crate) fn recipe_of(
    opened: &OpenedModel,
    request: &QuantizeRequest,
    sha256: String,
    observer: &dyn Observer,
) -> Result<Recipe, PipelineError> {
    let calibration = match &request.calibration {
        Some(asked) if request.needs_calibration() => Some(calibration_input(opened, asked)?),
        _ => None,
    };
    let (mut quantize, mut circuit) = (request.settings.clone(), request.circuit);
    match (&request.allocation, request.bits_per_weight) {
        (None, Some(budget)) => {
            observer.note(&uniform::settle(&opened.model, budget, &mut quantize, circuit.as_mut())?);
        }
        // The narrowest width is what a layer has that no plan names; there is none.
        (Some(allocation), _) => quantize.bits = allocation.score.narrowest(),
        _ => {}
    }
    let recipe = Recipe {
        schema: RECIPE_SCHEMA,
        tailorq: env!("CARGO_PKG_VERSION").into(),
        model: ModelInput { source: request.model.clone(), sha256 },
        quantize,
        calibration,
        circuit,
        allocation: request.allocation.clone(),
        plan: request.plan.as_deref().map(plan_input).transpose()?,
        device: None,
    };
    if let Some(expected) = &request.expected {
        recipe.check_inputs(expected)?;
    }
    Ok(recipe)
}

/// A calibration with its files hashed and its lengths settled.
pub(crate) fn calibration_input(
    opened: &OpenedModel,
    asked: &CalibrationRequest,
) -> Result<CalibrationInput, PipelineError> {
    Ok(CalibrationInput {
        file: asked.file.clone(),
        sha256: hash_of(&asked.file)?,
        samples: asked.samples,
        sequence_length: asked.sequence_length.unwrap_or(opened.model.config.max_positions.min(2048)),
        seed: asked.seed,
        drop_calculator_marks: asked.drop_calculator_marks,
        general: match &asked.general {
            Some((file, mix)) => Some(GeneralInput { file: file.clone(), sha256: hash_of(file)?, mix: *mix }),
            None => None,
        },
    })
}

fn plan_input(file: &Path) -> Result<PlanInput, PipelineError> {
    let sha256 = hash_files(&[file], |_| ()).map_err(|e| crate::error::output_error(file, &e))?;
    Ok(PlanInput { file: file.to_path_buf(), sha256 })
}

/// The hash of a calibration file.
pub(crate) fn hash_of(file: &Path) -> Result<String, PipelineError> {
    hash_files(&[file], |_| ())
        .map_err(|e| PipelineError::Calibration { path: file.to_path_buf(), problem: format!("cannot be read: {e}") })
}

/// Every file of the checkpoint that decides what a run computes: weights, and in a directory the configuration, the
/// tokenizer and the chat template.
fn model_files(opened: &OpenedModel) -> Vec<PathBuf> {
    let beside =
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
    let beside = beside.iter().map(|name| opened.files.path.join(name)).filter(|path| path.is_file());
    opened.files.weight_files.iter().cloned().chain(beside).collect()
}

/// The SHA-256 of all files of a model that decide what it computes.
pub fn model_sha256(opened: &OpenedModel) -> Result<String, PipelineError> {
    hash_files(&model_files(opened), |_| ()).map_err(|e| crate::error::output_error(&opened.files.path, &e))
}

pub(crate) fn announce(samples: &Samples, observer: &dyn Observer) {
    let used = samples.sequences.len();
    let template = if samples.chat_template { " through the chat template" } else { "" };
    observer.note(&format!(
        "calibration: {used} of {} items ({}{template}), {} tokens",
        samples.available,
        samples.shape,
        samples.tokens()
    ));
    if samples.shortened > 0 {
        observer.note(&format!("calibration: {} items were cut to the sequence length", samples.shortened));
    }
    observer.note(&format!("calibration: the first item as the model reads it: {:?}", samples.preview));
}

pub(crate) fn refuse_oversized(opened: &OpenedModel, recipe: &Recipe, samples: &Samples) -> Result<(), PipelineError> {
    let needed = peak_memory(&opened.model, recipe, samples.tokens(), samples.longest());
    match available_memory() {
        Some(free) if needed > free => Err(PipelineError::Settings(format!(
            "the run needs about {} MiB of memory, {} MiB are free: use fewer --samples or a shorter --sequence-length",
            needed >> 20,
            free >> 20
        ))),
        _ => Ok(()),
    }
}
