//! Scores on their own: the first half of "score once, plan many".

use crate::blocks::layer_settings;
use crate::error::PipelineError;
use crate::inputs::{CalibrationRequest, QuantizeRequest, announce, resolve};
use crate::observer::Observer;
use crate::recipe::QuantizeSettings;
use crate::task::allocation::{AllocationSettings, RuleSettings, ScoreSettings};
use crate::task::scores::Scores;
use crate::task::scoring::Scoring;
use std::path::Path;
use tailorq_kernels::Device;

/// Scores to be made.
#[derive(Clone, Debug)]
pub struct ScoreRequest {
    /// Path or hub id of the checkpoint.
    pub model: String,
    /// The task's data, for signals that read any.
    pub calibration: Option<CalibrationRequest>,
    /// How linears are quantized beside their width.
    pub settings: QuantizeSettings,
    /// What the scores are.
    pub score: ScoreSettings,
}

/// Scores the units of a model and writes the file to `path`, for [`crate::plan`] and `QuantizeRequest::scores`.
pub fn score(
    device: &dyn Device,
    request: &ScoreRequest,
    path: &Path,
    observer: &dyn Observer,
) -> Result<Scores, PipelineError> {
    let opened = tailorq_model::open(&request.model)?;
    // Rule, budget and method come later and do not matter here.
    let rule = RuleSettings::share(1.0);
    let inputs = QuantizeRequest {
        settings: QuantizeSettings { method: "rtn".into(), ..request.settings.clone() },
        calibration: request.calibration.clone(),
        allocation: Some(AllocationSettings { rule, score: request.score.clone() }),
        ..QuantizeRequest::new(&request.model, path)
    };
    inputs.check()?;
    let (recipe, samples) = resolve(&opened, &inputs, observer)?;
    if let Some(samples) = &samples {
        announce(samples, observer);
    }
    let spill = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let base = layer_settings(&recipe.quantize);
    let (recipe, samples, settings) = (&recipe, samples.as_ref(), &request.score);
    let scores = Scoring { device, opened: &opened, recipe, samples, settings, base, spill, observer }.run()?;
    scores.write(path)?;
    Ok(scores)
}
