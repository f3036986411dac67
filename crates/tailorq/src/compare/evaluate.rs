//! How an arm is measured: the experiment's tasks, and of each the metrics with their uncertainty.

use super::error::CompareError;
use super::experiment::{EvaluationTable, Experiment};
use crate::observer::Observer;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use tailorq_eval::{Cache, CalibrationItems, ItemOptions, PromptStyle, Subject, TaskOptions, TaskResult, task};
use tailorq_kernels::Device;
use tailorq_model::OpenedModel;

/// Half the width of a 95 % interval in standard errors.
const Z95: f64 = 1.959_963_984_540_054;

/// A measured number of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// The task.
    pub task: String,
    /// The metric as the task calls it: `acc,none`, `nll,none`, or `value` of a task with one number.
    pub metric: String,
    /// The number.
    pub value: f64,
    /// Its standard error over items; absent where the task knows none.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stderr: Option<f64>,
    /// Its 95 % interval: the task's own, or the normal one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub interval95: Option<[f64; 2]>,
    /// Items or windows behind it, where the task tells.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub items: Option<u64>,
}

impl Metric {
    /// For headings: the task, and the metric where it is not the task's only one.
    pub fn title(&self) -> String {
        match self.metric.as_str() {
            "value" | "nll,none" => self.task.clone(),
            metric => format!("{} {}", self.task, metric.trim_end_matches(",none")),
        }
    }

    /// Whether a smaller number is a better model.
    pub fn lower_is_better(&self) -> bool {
        let words = ["perplexity", "nll", "bits_per_byte", "rolling", "wikitext"];
        words.iter().any(|w| self.metric.contains(w) || (self.metric == "value" && self.task.contains(w)))
    }

    /// Whether both are the same number of different models.
    pub(super) fn is_same_as(&self, other: &Metric) -> bool {
        self.task == other.task && self.metric == other.metric
    }
}

/// What does not change from arm to arm.
pub(super) struct Evaluation<'a> {
    table: &'a EvaluationTable,
    data: Option<PathBuf>,
    text: Option<String>,
    cache: PathBuf,
}

impl<'a> Evaluation<'a> {
    /// Reads the text to score; finished items are kept in `cache`.
    pub(super) fn new(experiment: &'a Experiment, cache: PathBuf) -> Result<Self, CompareError> {
        let table = &experiment.evaluation;
        let read = |path: &PathBuf| {
            let path = experiment.locate(path);
            std::fs::read_to_string(&path).map_err(|e| CompareError::Output {
                path,
                problem: format!("the text of evaluation.text cannot be read: {e}"),
            })
        };
        let text = table.text.as_ref().map(read).transpose()?;
        Ok(Evaluation { table, data: table.data.as_ref().map(|d| locate_data(experiment, d)), text, cache })
    }

    /// Measures a model; `calibration` are items that must not be among the test items.
    pub(super) fn run(
        &self,
        device: &dyn Device,
        opened: &OpenedModel,
        calibration: &[CalibrationItems],
        progress: &dyn Observer,
    ) -> Result<Vec<Metric>, CompareError> {
        let mut sha256 = crate::model_sha256(opened)?;
        if let Some(signature) = device.signature() {
            sha256 = format!("{sha256} {signature}");
        }
        let table = self.table;
        let options = TaskOptions {
            text: self.text.as_deref(),
            window: table.window,
            windows: table.windows,
            reference: None,
            items: ItemOptions {
                data: self.data.as_deref(),
                limit: table.limit,
                num_fewshot: table.num_fewshot,
                style: match (table.apply_chat_template, table.fewshot_as_multiturn) {
                    (false, _) => PromptStyle::Text,
                    (true, false) => PromptStyle::Chat,
                    (true, true) => PromptStyle::ChatOfTurns,
                },
                max_tokens: table.max_tokens,
                stop: &table.stop,
                plain: table.plain,
                calibration,
                allow_calibration_items: table.allow_calibration_items,
                cache: Some(Cache { folder: &self.cache, model: &sha256, reference: None }),
                log: None,
            },
        };
        let subject = Subject {
            name: &opened.files.source,
            model: &opened.model,
            tokenizer: &opened.tokenizer,
            template: opened.template.as_ref(),
            device,
        };
        let mut metrics = Vec::new();
        for name in &table.tasks {
            let mut total_told = None;
            let result = task::find(name)?.run(&subject, &options, &mut |done, total| {
                if total_told != Some(total) {
                    progress.stage(&format!("measuring {name}"), total as u64);
                    total_told = Some(total);
                }
                progress.progress(done as u64, "");
                if progress.cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })?;
            metrics.extend(metrics_of(name, &result));
        }
        Ok(metrics)
    }
}

/// `hub` is a place of its own, unless a folder beside the experiment is called so.
fn locate_data(experiment: &Experiment, data: &Path) -> PathBuf {
    let folder = experiment.locate(data);
    if data == Path::new("hub") && !folder.exists() { data.to_path_buf() } else { folder }
}

/// The numbers of a result: those in the harness' notation with what stands beside them, or else its value.
fn metrics_of(task: &str, result: &TaskResult) -> Vec<Metric> {
    let details = &result.details;
    let items = ["items", "windows", "documents"].iter().find_map(|key| details.get(*key)?.as_u64());
    let of = |(key, value): (&String, &Value)| {
        let (name, filter) = key.split_once(',')?;
        if name.ends_with("_stderr") || name.ends_with("_interval95") {
            return None;
        }
        let stderr = number(details, &format!("{name}_stderr,{filter}"));
        let value = value.as_f64()?;
        let interval = details.get(&format!("{name}_interval95,{filter}")).and_then(|i| {
            let bounds: Option<Vec<f64>> = i.as_array()?.iter().map(Value::as_f64).collect();
            bounds?.try_into().ok()
        });
        let interval95 = interval.or(stderr.map(|s| [value - Z95 * s, value + Z95 * s]));
        let metric = Metric { task: task.into(), metric: key.clone(), value, stderr, interval95, items };
        Some(rounded_metric(metric))
    };
    let named: Vec<Metric> = details.iter().filter_map(of).collect();
    if !named.is_empty() {
        return named;
    }
    let (value, metric) = (result.value, "value".to_owned());
    vec![rounded_metric(Metric { task: task.into(), metric, value, stderr: None, interval95: None, items })]
}

fn number(details: &Map<String, Value>, key: &str) -> Option<f64> {
    details.get(key).and_then(Value::as_f64)
}

fn rounded_metric(metric: Metric) -> Metric {
    Metric {
        value: eight_digits(metric.value),
        stderr: metric.stderr.map(eight_digits),
        interval95: metric.interval95.map(|i| i.map(eight_digits)),
        ..metric
    }
}

/// Eight significant digits: a decimal that comes back from JSON as the very number that was written, so that a resumed
/// comparison writes the same results.
pub(super) fn eight_digits(value: f64) -> f64 {
    format!("{value:.7e}").parse().unwrap_or(value)
}

/// What an artifact's folder says that it was calibrated on.
pub(super) fn calibration_of(opened: &OpenedModel) -> Result<Vec<CalibrationItems>, CompareError> {
    Ok(crate::calibration_items(opened)?.into_iter().collect())
}

/// A model in a directory or file.
pub(super) fn open(path: &Path) -> Result<OpenedModel, CompareError> {
    Ok(tailorq_model::open(&path.to_string_lossy())?)
}
