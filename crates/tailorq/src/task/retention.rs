//! What is left of the task: a held-out score of the quantized model against the original's, and a bar that it must pass.
//!
//! The bar belongs to the request and not to the recipe. A recipe holds what decides the bytes of the weights, and asking
//! whether a model is good enough does not change it: a run that failed goes on with a lower bar from the parts that it
//! left. The report says what was measured.

use crate::error::PipelineError;
use crate::held_out::{HeldOut, load_held_out};
use crate::inputs::{QuantizeRequest, hash_of};
use crate::observer::Observer;
use crate::recipe::{CalibrationInput, Recipe};
use crate::report::rounded;
use crate::samples::Samples;
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use tailorq_eval::{EvalError, Subject};
use tailorq_kernels::Device;
use tailorq_model::{Model, OpenedModel};

/// Items that are measured, where the file has as many.
const MOST_ITEMS: usize = 64;
/// Fewer say too little: the share of one item more or less would decide.
const LEAST_ITEMS: usize = 16;

/// How good the quantized model must be.
#[derive(Clone, Debug, PartialEq)]
pub struct RetainRequest {
    /// The least share of the original's held-out score, from 0 to 1 (see [`RetentionReport::share`]).
    pub min: f64,
    /// Items to measure on; `None` takes those of the calibration file that were not drawn for calibration.
    pub data: Option<PathBuf>,
}

impl RetainRequest {
    /// Refuses a bar that is no share.
    pub(crate) fn check(&self) -> Result<(), PipelineError> {
        if (0.0..=1.0).contains(&self.min) {
            return Ok(());
        }
        Err(PipelineError::Settings(format!("--min-retain is {}: use a share from 0 to 1, such as 0.95", self.min)))
    }
}

/// The held-out score of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RetentionReport {
    /// The share that was asked for.
    pub min: f64,
    /// `exp(original_nll - nll)`: the probability that the quantized model gives to a token of a held-out completion, in
    /// the geometric mean, as a share of what the original gives.
    pub share: f64,
    /// Its standard error over items.
    pub stderr: f64,
    /// Mean negative log-likelihood of a scored token under the original, in nats.
    pub original_nll: f64,
    /// The same under the quantized model.
    pub nll: f64,
    /// Items measured.
    pub items: usize,
    /// Tokens scored in them: those of completions, or all but the first of items without one.
    pub tokens: usize,
    /// SHA-256 of the file that the items are from, hexadecimal.
    pub data_sha256: String,
}

impl RetentionReport {
    /// Whether the model is as good as was asked for.
    pub fn passes(&self) -> bool {
        self.share >= self.min
    }
}

/// The items that a model will be measured on, and the bar.
pub(crate) struct Gate {
    min: f64,
    sha256: String,
    held_out: HeldOut,
}

impl Gate {
    /// Reads and chooses the items, before anything is quantized; `None` where nothing was asked for.
    pub(crate) fn open(
        opened: &OpenedModel,
        request: &QuantizeRequest,
        (recipe, samples): (&Recipe, Option<&Samples>),
        observer: &dyn Observer,
    ) -> Result<Option<Self>, PipelineError> {
        let Some(retain) = &request.retain else { return Ok(None) };
        let input = held_out_input(opened, request, retain, recipe)?;
        let calibrated = samples.map_or(&[][..], |s| &s.fingerprints);
        let held_out = load_held_out(opened, &input, calibrated, MOST_ITEMS)?;
        let HeldOut { items, known, empty } = &held_out;
        let n = items.len();
        if n < LEAST_ITEMS {
            let unscored = if *empty > 0 { format!(", {empty} have no token to score") } else { String::new() };
            let problem = format!(
                "has {n} items to hold out ({known} are calibration items or repeat others{unscored}), and --min-retain needs {LEAST_ITEMS}: \
                 give items of their own with --retain-data FILE, or draw fewer for calibration with --samples"
            );
            return Err(PipelineError::Calibration { path: input.file, problem });
        }
        observer.note(&format!("held out: {n} items of {}, none of them a calibration item", input.file.display()));
        Ok(Some(Gate { min: retain.min, sha256: hash_of(&input.file)?, held_out }))
    }

    /// Measures both models.
    pub(crate) fn measure(
        &self,
        device: &dyn Device,
        opened: &OpenedModel,
        model: &Model,
        observer: &dyn Observer,
    ) -> Result<RetentionReport, PipelineError> {
        let items = &self.held_out.items;
        observer.stage("measuring held-out items", items.len() as u64);
        let subject =
            |name, model| Subject { name, model, tokenizer: &opened.tokenizer, template: None, device, decoders: None };
        let (original, quantized) = (subject("the original", &opened.model), subject("the quantized model", model));
        let found = tailorq_eval::retention(&original, &quantized, items, &mut |done, _| {
            observer.progress(done as u64, "");
            if observer.cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let found = match found {
            Err(EvalError::Interrupted) => return Err(PipelineError::Cancelled),
            other => other?,
        };
        Ok(RetentionReport {
            min: self.min,
            share: rounded(found.share),
            stderr: rounded(found.stderr),
            original_nll: rounded(found.original_nll),
            nll: rounded(found.nll),
            items: found.items,
            tokens: found.tokens,
            data_sha256: self.sha256.clone(),
        })
    }
}

/// Where the items are, and how they become tokens: as the calibration's do.
fn held_out_input(
    opened: &OpenedModel,
    request: &QuantizeRequest,
    retain: &RetainRequest,
    recipe: &Recipe,
) -> Result<CalibrationInput, PipelineError> {
    // A method that reads no calibration leaves all items of a file that was named all the same.
    let asked = request.calibration.as_ref();
    let file = retain.data.clone().or_else(|| asked.map(|c| c.file.clone())).ok_or_else(|| {
        let problem = "--min-retain measures items of the task, and no data was given: give --retain-data FILE";
        PipelineError::Settings(problem.into())
    })?;
    let (length, seed) = asked.map_or((None, 0), |c| (c.sequence_length, c.seed));
    let input = recipe.calibration.clone().unwrap_or_else(|| CalibrationInput {
        file: PathBuf::new(),
        sha256: String::new(),
        samples: 0,
        sequence_length: length.unwrap_or(opened.model.config.max_positions.min(2048)),
        seed,
        drop_calculator_marks: asked.is_some_and(|c| c.drop_calculator_marks),
        general: None,
    });
    Ok(CalibrationInput { file, ..input })
}

/// The error of a model that does not pass; `remains` says what became of it.
pub(crate) fn below_bar(dir: &Path, report: &RetentionReport, remains: &'static str) -> PipelineError {
    PipelineError::Retention { path: dir.to_path_buf(), report: Box::new(report.clone()), remains }
}
