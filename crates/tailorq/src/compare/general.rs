//! General text in the place of a task's calibration, of about as many tokens: what differs is what it is about.

use super::experiment::GeneralTable;
use crate::error::PipelineError;
use crate::inputs::{CalibrationRequest, calibration_input};
use crate::samples;
use std::path::PathBuf;
use tailorq_model::OpenedModel;

/// A text is long enough with this share of the tokens that are wanted.
const ENOUGH: f64 = 0.95;

/// So often a text of short items is asked for more.
const ATTEMPTS: usize = 4;

/// Calibrations that were counted, so that each is read once.
#[derive(Default)]
pub(super) struct GeneralText {
    known: Vec<(CalibrationRequest, CalibrationRequest)>,
}

impl GeneralText {
    /// The calibration on `text` that stands for the task's. Where the table gives one of samples and length, the other follows
    /// from the tokens; where it gives none, there are as many samples as the task has.
    pub(super) fn in_place_of(
        &mut self,
        opened: &OpenedModel,
        task: &CalibrationRequest,
        (text, file): (&GeneralTable, PathBuf),
    ) -> Result<CalibrationRequest, PipelineError> {
        if let Some((_, found)) = self.known.iter().find(|(known, _)| known == task) {
            return Ok(found.clone());
        }
        let mut request = CalibrationRequest { file, drop_calculator_marks: false, general: None, ..task.clone() };
        (request.samples, request.sequence_length) =
            (text.samples.unwrap_or(task.samples), text.sequence_length.or(task.sequence_length));
        if text.samples.is_none() || text.sequence_length.is_none() {
            fit(opened, task, (text, &mut request))?;
        }
        self.known.push((task.clone(), request.clone()));
        Ok(request)
    }
}

/// Settles what the table leaves open.
fn fit(
    opened: &OpenedModel,
    task: &CalibrationRequest,
    (text, request): (&GeneralTable, &mut CalibrationRequest),
) -> Result<(), PipelineError> {
    let (wanted, n_items) = count(opened, task)?;
    let longest = opened.model.config.max_positions;
    match text.sequence_length {
        Some(length) => request.samples = wanted.div_ceil(length.max(1)),
        None => {
            request.samples = text.samples.unwrap_or(n_items);
            request.sequence_length = Some(wanted.div_ceil(request.samples.max(1)).clamp(2, longest));
        }
    }
    let mut last = 0;
    for _ in 0..ATTEMPTS {
        let (found, _) = count(opened, request)?;
        if found as f64 >= ENOUGH * wanted as f64 || found <= last {
            break;
        }
        last = found;
        let more = |n: usize| (n as f64 * wanted as f64 / found.max(1) as f64).ceil() as usize;
        match text.sequence_length {
            Some(_) => request.samples = more(request.samples),
            None => request.sequence_length = request.sequence_length.map(|n| more(n).min(longest)),
        }
    }
    Ok(())
}

/// Tokens and items of a calibration.
fn count(opened: &OpenedModel, asked: &CalibrationRequest) -> Result<(usize, usize), PipelineError> {
    let found = samples::load(opened, &calibration_input(opened, asked)?)?;
    Ok((found.tokens(), found.sequences.len()))
}
