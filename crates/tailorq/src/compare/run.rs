//! A comparison from the experiment file to its results.

use super::arms::{Arm, Arms, Planner, short_hash};
use super::error::CompareError;
use super::evaluate::{Evaluation, ItemValues, Measured, Metric, calibration_of, eight_digits, open};
use super::experiment::Experiment;
use super::progress::{ArmProgress, Board};
use super::results::{ArmResult, Original, Results};
use super::shared::Shared;
use crate::error::PipelineError;
use crate::inputs::model_sha256;
use crate::inspect::inspect;
use crate::observer::Observer;
use crate::output::OutputMode;
use crate::recipe::CalibrationInput;
use crate::report::{Report, SizeReport};
use crate::samples;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tailorq_eval::CalibrationItems;
use tailorq_format::write_atomic;
use tailorq_kernels::Device;
use tailorq_model::OpenedModel;

/// What a comparison would do.
#[derive(Clone, Debug)]
pub struct Planned {
    /// What is quantized and measured.
    pub arms: Arms,
    /// Keys of the arms that have a result, as far as their settings tell.
    pub finished: Vec<String>,
}

/// A comparison that ran to its end.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Everything that was measured.
    pub results: Results,
    /// The files that were written.
    pub files: Vec<PathBuf>,
    /// The Markdown table.
    pub table: String,
}

/// Opens the model and lists the arms; writes nothing.
pub fn plan(experiment: &Experiment) -> Result<Planned, CompareError> {
    let opened = tailorq_model::open(&experiment.model_source())?;
    let arms = Planner::new(experiment, &opened, &model_sha256(&opened)?).plan()?;
    let output = experiment.output_dir();
    let finished = arms.arms.iter().filter(|arm| folder_of(&output, arm).join(RESULT).exists());
    let finished = finished.map(|arm| arm.key.clone()).collect();
    Ok(Planned { arms, finished })
}

/// Runs what is not finished and writes the results, which grow with every arm.
pub fn compare(
    device: &dyn Device,
    experiment: &Experiment,
    observer: &dyn Observer,
) -> Result<Finished, CompareError> {
    let opened = tailorq_model::open(&experiment.model_source())?;
    observer.stage("hashing the checkpoint", 0);
    let sha256 = model_sha256(&opened)?;
    let arms = Planner::new(experiment, &opened, &sha256).plan()?;
    arms.notes.iter().for_each(|note| observer.note(note));
    let calibrations = calibrations(experiment, &opened, &arms)?;
    let output = experiment.output_dir();
    let _lock = lock(&output)?;
    let evaluation = Evaluation::new(experiment, output.join("cache"))?;
    let ran = measure_original(device, (&opened, &sha256), (&evaluation, &calibrations), observer);
    let (original, original_items) = ran.map_err(stopped)?;
    let evaluated = evaluation_key(device, experiment, &original.metrics);
    let mut run =
        Run { device, experiment, output: &output, arms: &arms, evaluation, evaluated, original, original_items };
    let outcome = run.all(observer);
    let written = run.write()?;
    outcome.map(|()| written)
}

const RESULT: &str = "result.json";

/// What an arm's result is made of, item by item; written before the result.
const ITEMS: &str = "items.json";

fn folder_of(output: &Path, arm: &Arm) -> PathBuf {
    output.join("arms").join(&arm.key)
}

fn stopped(error: CompareError) -> CompareError {
    if error.is_stop() { CompareError::Stopped } else { error }
}

/// Seconds of an arm, in a file of their own: they are the only thing that two runs do not share.
#[derive(Clone, Copy, Debug, Default, Serialize, serde::Deserialize)]
struct Timing {
    quantize_seconds: f64,
    measure_seconds: f64,
}

struct Run<'a> {
    device: &'a dyn Device,
    experiment: &'a Experiment,
    output: &'a Path,
    arms: &'a Arms,
    evaluation: Evaluation<'a>,
    /// What an arm's result must have been measured with.
    evaluated: String,
    original: Original,
    original_items: Vec<ItemValues>,
}

impl Run<'_> {
    /// Runs all arms that have no result. One that fails does not keep the others from being run.
    fn all(&mut self, observer: &dyn Observer) -> Result<(), CompareError> {
        let shared = Shared { device: self.device, output: self.output, arms: &self.arms.arms };
        let open: Vec<&Arm> = self.arms.arms.iter().filter(|arm| self.result(arm).is_none()).collect();
        let mut board = Board::new(observer, open.len());
        let mut failed = Vec::new();
        for arm in open {
            if observer.cancelled() {
                return Err(CompareError::Stopped);
            }
            let progress = board.begin(&arm.title);
            match self.arm(arm, &shared, &progress) {
                Ok(()) => {
                    self.write()?;
                }
                Err(error) if error.is_stop() => return Err(CompareError::Stopped),
                Err(error) => {
                    observer.note(&format!("{} failed: {error}", arm.title));
                    failed.push(format!("{}: {error}", arm.title));
                }
            }
            board.end();
        }
        if !failed.is_empty() {
            return Err(CompareError::Arms(failed));
        }
        if self.experiment.keep_artifacts { Ok(()) } else { shared.clear() }
    }

    /// Quantizes and measures an arm and keeps its result.
    fn arm(&self, arm: &Arm, shared: &Shared<'_>, progress: &ArmProgress<'_>) -> Result<(), CompareError> {
        let folder = folder_of(self.output, arm);
        let model = folder.join("model");
        std::fs::create_dir_all(&folder).map_err(|e| CompareError::io(&folder, &e))?;
        // An artifact that another version of tailorq, or the same from another place, has left is made again.
        let started = Instant::now();
        let mut request = shared.request(arm, model.clone(), progress)?;
        if let Err(error) = crate::quantize(self.device, &request, progress) {
            if !matches!(error, PipelineError::OtherRun { .. }) {
                return Err(error.into());
            }
            request.mode = OutputMode::Overwrite;
            crate::quantize(self.device, &request, progress)?;
        }
        let quantize_seconds = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let report = read_report(&model)?;
        let opened = open(&model)?;
        let Measured { metrics, items } =
            self.evaluation.run(self.device, &opened, &calibration_of(&opened)?, progress)?;
        let timing = Timing { quantize_seconds, measure_seconds: started.elapsed().as_secs_f64() };
        let result = ArmResult {
            key: arm.key.clone(),
            evaluation: self.evaluated.clone(),
            notes: report.notes().collect(),
            mean_relative_error: eight_digits(report.mean_relative_error()),
            squared_errors: report.squared_errors().into_iter().map(|(k, e)| (k, eight_digits(e))).collect(),
            size: rounded_size(report.size.clone()),
            metrics,
        };
        write_json(&folder.join("timing.json"), &timing)?;
        // What every tensor lost stays when the artifact goes.
        write_json(&folder.join("report.json"), &report)?;
        write_json(&folder.join(ITEMS), &items)?;
        write_json(&folder.join(RESULT), &result)?;
        if self.experiment.keep_artifacts {
            return Ok(());
        }
        drop(opened);
        std::fs::remove_dir_all(&model).map_err(|e| CompareError::io(&model, &e))
    }

    /// The result of an arm, if it was measured as this experiment measures.
    fn result(&self, arm: &Arm) -> Option<ArmResult> {
        let bytes = std::fs::read(folder_of(self.output, arm).join(RESULT)).ok()?;
        let result: ArmResult = serde_json::from_slice(&bytes).ok()?;
        (result.evaluation == self.evaluated && result.key == arm.key).then_some(result)
    }

    /// The items of an arm, as far as they are there.
    fn items(&self, arm: &Arm) -> Vec<ItemValues> {
        let bytes = std::fs::read(folder_of(self.output, arm).join(ITEMS)).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// Writes the results of all arms that have one.
    fn write(&self) -> Result<Finished, CompareError> {
        let measured: Vec<Option<ArmResult>> = self.arms.arms.iter().map(|arm| self.result(arm)).collect();
        let timing = |arm: &Arm| -> Option<(String, Timing)> {
            let bytes = std::fs::read(folder_of(self.output, arm).join("timing.json")).ok()?;
            Some((arm.key.clone(), serde_json::from_slice(&bytes).ok()?))
        };
        let timings: BTreeMap<String, Timing> = self.arms.arms.iter().filter_map(timing).collect();
        let items: Vec<Vec<ItemValues>> = self.arms.arms.iter().map(|arm| self.items(arm)).collect();
        let results = Results::new((self.original.clone(), &self.original_items), self.arms, &measured, &items);
        let table = super::table::markdown(&results);
        let path = |name: &str| self.output.join(name);
        let files = ["results.json", "results.md", "results.svg", "timings.json"].map(path).to_vec();
        write_json(&files[0], &results)?;
        write_atomic(&files[1], table.as_bytes())?;
        write_atomic(&files[2], super::chart::svg(&results).as_bytes())?;
        write_json(&files[3], &timings)?;
        Ok(Finished { results, files, table })
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), CompareError> {
    let mut text = serde_json::to_string_pretty(value).expect("plain data");
    text.push('\n');
    Ok(write_atomic(path, text.as_bytes())?)
}

fn read_report(model: &Path) -> Result<Report, CompareError> {
    let path = model.join("report.json");
    let bytes = std::fs::read(&path).map_err(|e| CompareError::io(&path, &e))?;
    serde_json::from_slice(&bytes).map_err(|e| CompareError::Output {
        path,
        problem: format!("is no report of this version ({e}): delete the folder that it lies in and run again"),
    })
}

fn rounded_size(size: SizeReport) -> SizeReport {
    SizeReport {
        linear_bits_per_weight: eight_digits(size.linear_bits_per_weight),
        counted_bits_per_weight: size.counted_bits_per_weight.map(eight_digits),
        total_bits_per_weight: eight_digits(size.total_bits_per_weight),
        ..size
    }
}

/// The items of every calibration of the arms: read before anything runs, so that a file which cannot be used, or has
/// test items, is told at once.
fn calibrations(
    experiment: &Experiment,
    opened: &OpenedModel,
    arms: &Arms,
) -> Result<Vec<CalibrationItems>, CompareError> {
    let mut inputs: Vec<CalibrationInput> = Vec::new();
    for arm in &arms.arms {
        let (Some(mut input), Some(asked)) = (arm.recipe.calibration.clone(), &arm.request.calibration) else {
            continue;
        };
        input.file.clone_from(&asked.file);
        if let (Some(general), Some((file, _))) = (&mut input.general, &asked.general) {
            general.file.clone_from(file);
        }
        if !inputs.contains(&input) {
            inputs.push(input);
        }
    }
    let load = |input: &CalibrationInput| {
        let loaded = samples::load(opened, input)?;
        let name = format!("the calibration of {}", experiment.path().display());
        let items = CalibrationItems::new(&name, loaded.fingerprints.iter().map(String::as_str));
        Ok(items.expect("fingerprints that were just made"))
    };
    inputs.iter().map(load).collect()
}

fn measure_original(
    device: &dyn Device,
    (opened, sha256): (&OpenedModel, &str),
    (evaluation, calibrations): (&Evaluation<'_>, &[CalibrationItems]),
    observer: &dyn Observer,
) -> Result<(Original, Vec<ItemValues>), CompareError> {
    let progress = Board::new(observer, 0).outside("the original");
    let Measured { metrics, items } = evaluation.run(device, opened, calibrations, &progress)?;
    let found = inspect(opened);
    let original = Original {
        sha256: sha256.into(),
        bytes: found.file_bytes,
        linear_weights: found.linears.parameters as u64,
        linear_bits_per_weight: eight_digits(found.linears.bits_per_weight),
        metrics,
    };
    Ok((original, items))
}

/// What a result was measured with: the settings, the original's numbers, which change when the data does, and a device that
/// rounds in its own way.
fn evaluation_key(device: &dyn Device, experiment: &Experiment, original: &[Metric]) -> String {
    let mut table = serde_json::json!({ "evaluation": experiment.evaluation, "original": original });
    if let Some(signature) = device.signature() {
        table["device"] = signature.into();
    }
    short_hash(table.to_string().as_bytes())
}

/// Keeps a second comparison out of the directory.
fn lock(output: &Path) -> Result<File, CompareError> {
    std::fs::create_dir_all(output).map_err(|e| CompareError::io(output, &e))?;
    let path = output.join(".lock");
    let file = File::create(&path).map_err(|e| CompareError::io(&path, &e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(CompareError::Output {
            path: output.to_path_buf(),
            problem: "another comparison is at work in it: wait for it, or give the experiment another `output`".into(),
        }),
        Err(TryLockError::Error(e)) => Err(CompareError::io(&path, &e)),
    }
}
