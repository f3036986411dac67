//! What several arms read: surveys of equal data and loss, scores of equal settings. Made by the first arm that needs them.

use super::arms::{Arm, short_hash};
use super::error::CompareError;
use crate::blocks::layer_settings;
use crate::inputs::QuantizeRequest;
use crate::observer::Observer;
use crate::recipe::{CalibrationInput, LossKind};
use crate::task::allocation::AllocationSettings;
use crate::task::score::{ScoreRequest, score};
use crate::task::scores::at_width;
use crate::task::survey::{SurveyRequest, rounding, survey};
use crate::task::survey_needs;
use serde::Serialize;
use std::path::{Path, PathBuf};
use tailorq_kernels::Device;
use tailorq_quant::LayerSettings;
use tailorq_quant::survey::Needs;

/// Files between arms.
pub(super) struct Shared<'a> {
    pub(super) device: &'a dyn Device,
    /// The comparison's output directory.
    pub(super) output: &'a Path,
    /// All arms, also the finished ones: what a survey gathers does not depend on where a run was stopped.
    pub(super) arms: &'a [Arm],
}

/// What decides a survey, beside what it gathers.
fn data_of(arm: &Arm) -> (Option<CalibrationInput>, LossKind, Option<(LayerSettings, bool)>) {
    let (quantize, calibration) = (&arm.recipe.quantize, arm.recipe.calibration.as_ref());
    let rounded = (quantize.loss == LossKind::Kl).then(|| (rounding(quantize), quantize.own_answers));
    (calibration.map(CalibrationInput::without_paths), quantize.loss, rounded)
}

impl Shared<'_> {
    /// The name of what these parts decide, on this device.
    fn name_of(&self, parts: &impl Serialize) -> String {
        let mut bytes = serde_json::to_vec(parts).expect("plain data");
        bytes.extend(self.device.signature().into_iter().flat_map(String::into_bytes));
        short_hash(&bytes)
    }

    /// The arm's request with the files that it shares, which are made unless they are there.
    pub(super) fn request(
        &self,
        arm: &Arm,
        output: PathBuf,
        observer: &dyn Observer,
    ) -> Result<QuantizeRequest, CompareError> {
        let mut request = QuantizeRequest { output, ..arm.request.clone() };
        if survey_needs(&arm.recipe).is_some() {
            request.survey = Some(self.survey(arm, observer)?);
        }
        if let Some(allocation) = &arm.recipe.allocation {
            request.scores = Some(self.scores(arm, allocation, observer)?);
        }
        Ok(request)
    }

    /// The survey that serves all arms of the same data and loss.
    fn survey(&self, arm: &Arm, observer: &dyn Observer) -> Result<PathBuf, CompareError> {
        let data = data_of(arm);
        let same = self.arms.iter().filter(|a| data_of(a) == data);
        let needs = same.filter_map(|a| survey_needs(&a.recipe)).fold(Needs::default(), |all, n| all.union(&n));
        let gathered = [needs.absolute, needs.square, needs.token_energies, needs.input_energies];
        let name = self.name_of(&(&arm.recipe.tailorq, &arm.recipe.model.sha256, &data, gathered));
        let path = self.folder("surveys")?.join(format!("{name}.safetensors"));
        if !path.exists() {
            let made =
                SurveyRequest { needs, settings: arm.recipe.quantize.clone(), ..SurveyRequest::of(&arm.request) };
            survey(self.device, &made, &path, observer)?;
        }
        Ok(path)
    }

    fn scores(
        &self,
        arm: &Arm,
        allocation: &AllocationSettings,
        observer: &dyn Observer,
    ) -> Result<PathBuf, CompareError> {
        let recipe = &arm.recipe;
        let calibration = data_of(arm).0.filter(|_| allocation.score.reads_data());
        let base = at_width(layer_settings(&recipe.quantize), 2);
        let name = self.name_of(&(&recipe.tailorq, &recipe.model.sha256, calibration, &allocation.score, base));
        let path = self.folder("scores")?.join(format!("{name}.json"));
        if !path.exists() {
            let made = ScoreRequest {
                model: arm.request.model.clone(),
                calibration: arm.request.calibration.clone(),
                settings: recipe.quantize.clone(),
                score: allocation.score.clone(),
            };
            score(self.device, &made, &path, observer)?;
        }
        Ok(path)
    }

    fn folder(&self, name: &str) -> Result<PathBuf, CompareError> {
        let folder = self.output.join(name);
        std::fs::create_dir_all(&folder).map_err(|e| CompareError::io(&folder, &e))?;
        Ok(folder)
    }

    /// Removes the surveys, which are as large as the model; scores are small and stay.
    pub(super) fn clear(&self) -> Result<(), CompareError> {
        let folder = self.output.join("surveys");
        match std::fs::remove_dir_all(&folder) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(CompareError::io(&folder, &e)),
            _ => Ok(()),
        }
    }
}
