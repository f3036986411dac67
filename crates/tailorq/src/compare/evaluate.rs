//! How an arm is measured: the experiment's tasks, and of each the metrics with their uncertainty.

use super::error::CompareError;
use super::experiment::{EvaluationTable, Experiment};
use crate::observer::Observer;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use tailorq_eval::{
    Cache, CalibrationItems, ItemOptions, ItemRecord, PromptStyle, Subject, TaskOptions, TaskResult, task,
};
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
        match self.metric.trim_end_matches(",none") {
            "value" | "nll" => self.task.clone(),
            metric if self.task.split(' ').next() == Some(metric) => self.task.clone(),
            metric => format!("{} {metric}", self.task),
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

/// What a model got in a metric item by item: the metric is the quotient of both sums.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ItemValues {
    /// The task, as [`Metric`] has it.
    pub(super) task: String,
    /// The metric, likewise.
    pub(super) metric: String,
    /// What each item adds to the metric.
    pub(super) values: Vec<f64>,
    /// The tokens of each, where tokens weigh the same and not items; else empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) weights: Vec<f64>,
}

/// Everything that was measured of a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Measured {
    pub(super) metrics: Vec<Metric>,
    pub(super) items: Vec<ItemValues>,
}

/// One of the experiment's tables with what it reads.
struct Part<'a> {
    table: &'a EvaluationTable,
    data: Option<PathBuf>,
    text: Option<String>,
}

/// What does not change from arm to arm.
pub(super) struct Evaluation<'a> {
    parts: Vec<Part<'a>>,
    cache: PathBuf,
}

impl<'a> Evaluation<'a> {
    /// Reads the texts to score; finished items are kept in `cache`.
    pub(super) fn new(experiment: &'a Experiment, cache: PathBuf) -> Result<Self, CompareError> {
        let read = |path: &PathBuf| {
            let path = experiment.locate(path);
            std::fs::read_to_string(&path).map_err(|e| CompareError::Output {
                path,
                problem: format!("the text of evaluation.text cannot be read: {e}"),
            })
        };
        let part = |table: &'a EvaluationTable| {
            let text = table.text.as_ref().map(read).transpose()?;
            Ok(Part { table, data: table.data.as_ref().map(|d| locate_data(experiment, d)), text })
        };
        let parts = experiment.evaluation.iter().map(part).collect::<Result<_, CompareError>>()?;
        Ok(Evaluation { parts, cache })
    }

    /// Measures a model; `calibration` are items that must not be among the test items.
    pub(super) fn run(
        &self,
        device: &dyn Device,
        opened: &OpenedModel,
        calibration: &[CalibrationItems],
        progress: &dyn Observer,
    ) -> Result<Measured, CompareError> {
        let mut sha256 = crate::model_sha256(opened)?;
        if let Some(signature) = device.signature() {
            sha256 = format!("{sha256} {signature}");
        }
        let cache = Cache { folder: &self.cache, model: &sha256, reference: None };
        let subject = Subject {
            name: &opened.files.source,
            model: &opened.model,
            tokenizer: &opened.tokenizer,
            template: opened.template.as_ref(),
            device,
            decoders: None,
        };
        let mut measured = Measured::default();
        for part in &self.parts {
            for name in &part.table.tasks {
                part.measure(name, &subject, (calibration, cache), progress, &mut measured)?;
            }
        }
        Ok(measured)
    }
}

impl Part<'_> {
    /// Adds what task `name` says of the subject.
    fn measure(
        &self,
        name: &str,
        subject: &Subject<'_>,
        (calibration, cache): (&[CalibrationItems], Cache<'_>),
        progress: &dyn Observer,
        measured: &mut Measured,
    ) -> Result<(), CompareError> {
        let table = self.table;
        let records = RefCell::new(Vec::new());
        let log = |record: &ItemRecord| records.borrow_mut().push(record.scores.clone());
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
                cache: Some(cache),
                log: Some(&log),
            },
        };
        let title = table.title(name);
        let mut total_told = None;
        let result = task::find(name)?.run(subject, &options, &mut |done, total| {
            if total_told != Some(total) {
                progress.stage(&format!("measuring {title}"), total as u64);
                total_told = Some(total);
            }
            progress.progress(done as u64, "");
            if progress.cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let metrics = metrics_of(&title, &result);
        let records = records.into_inner();
        measured.items.extend(metrics.iter().filter_map(|metric| item_values(metric, &records)));
        measured.metrics.extend(metrics);
        Ok(())
    }
}

/// What the items say of a metric, if all of them speak of it.
fn item_values(metric: &Metric, records: &[Map<String, Value>]) -> Option<ItemValues> {
    let short = metric.metric.trim_end_matches(",none");
    let all = |key: &str| -> Option<Vec<f64>> { records.iter().map(|r| r.get(key)?.as_f64()).collect() };
    let values = all(&metric.metric).or_else(|| all(short)).filter(|v| !v.is_empty())?;
    let weights = if short == "nll" { all("tokens")? } else { Vec::new() };
    let (task, metric) = (metric.task.clone(), metric.metric.clone());
    Some(ItemValues { task, metric, values: values.into_iter().map(eight_digits).collect(), weights })
}

/// The metric of `a` less that of `b` on the same items, and its standard error: what both find hard falls out of it. Nothing if
/// they are not the same items.
///
/// Source: Cochran 1977, Sampling Techniques, chapter 6, without the correction for a finite population.
pub(super) fn paired_difference(a: &ItemValues, b: &ItemValues) -> Option<(f64, f64)> {
    let n = a.values.len();
    if n < 2 || b.values.len() != n || a.weights != b.weights {
        return None;
    }
    let weight = |at: usize| a.weights.get(at).copied().unwrap_or(1.0);
    let total: f64 = (0..n).map(weight).sum();
    let differences: Vec<f64> = a.values.iter().zip(&b.values).map(|(a, b)| a - b).collect();
    let mean = differences.iter().sum::<f64>() / total;
    let squares: f64 = differences.iter().enumerate().map(|(at, d)| (d - mean * weight(at)).powi(2)).sum();
    let stderr = (squares * n as f64 / (n as f64 - 1.0)).sqrt() / total;
    (total > 0.0).then(|| (eight_digits(mean), eight_digits(stderr)))
}

/// `hub` is a place of its own, unless a folder beside the experiment is called so.
fn locate_data(experiment: &Experiment, data: &Path) -> PathBuf {
    let folder = experiment.locate(data);
    let is_hub = data == Path::new("hub") || data.to_str().is_some_and(|d| d.starts_with("hub:"));
    if is_hub && !folder.exists() { data.to_path_buf() } else { folder }
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
        let own = details.get(&format!("{name}_interval95,{filter}")).and_then(interval);
        let interval95 = own.or(stderr.map(|s| [value - Z95 * s, value + Z95 * s]));
        let metric = Metric { task: task.into(), metric: key.clone(), value, stderr, interval95, items };
        Some(rounded_metric(metric))
    };
    let named: Vec<Metric> = details.iter().filter_map(of).collect();
    if !named.is_empty() {
        return named;
    }
    // A task of one number may still know how sure it is, under the number's own name.
    let beside = |suffix: &str| details.iter().find(|(key, _)| key.ends_with(suffix)).map(|(_, value)| value);
    let stderr = beside("_stderr,none").and_then(Value::as_f64);
    let interval95 = beside("_interval95,none").and_then(interval);
    let (value, metric) = (result.value, "value".to_owned());
    vec![rounded_metric(Metric { task: task.into(), metric, value, stderr, interval95, items })]
}

/// Both bounds.
fn interval(value: &Value) -> Option<[f64; 2]> {
    let bounds: Option<Vec<f64>> = value.as_array()?.iter().map(Value::as_f64).collect();
    bounds?.try_into().ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn values(values: &[f64], weights: &[f64]) -> ItemValues {
        ItemValues { task: "t".into(), metric: "m".into(), values: values.to_vec(), weights: weights.to_vec() }
    }

    #[test]
    fn what_is_hard_for_both_falls_out_of_a_paired_difference() {
        // Items differ by 100, the models by 1, 2 and 3: standard deviation 1 over the root of 3.
        let (a, b) = (values(&[101.0, 202.0, 303.0], &[]), values(&[100.0, 200.0, 300.0], &[]));
        let (mean, stderr) = paired_difference(&a, &b).unwrap();
        assert!((mean - 2.0).abs() < 1e-7 && (stderr - 1.0 / 3f64.sqrt()).abs() < 1e-7);
        // Tokens weigh the same: equal differences a token leave no error.
        let weights = [1.0, 2.0, 3.0];
        let (a, b) = (values(&[2.0, 4.0, 6.0], &weights), values(&[1.0, 2.0, 3.0], &weights));
        assert_eq!(paired_difference(&a, &b).unwrap(), (1.0, 0.0));
        assert_eq!(paired_difference(&a, &values(&[1.0, 2.0], &weights[..2])), None, "other items");
        assert_eq!(paired_difference(&a, &values(&[1.0, 2.0, 3.0], &[])), None, "other weights");
    }

    #[test]
    fn items_speak_of_a_metric_by_its_name() {
        let metric = |metric: &str| Metric {
            task: "t".into(),
            metric: metric.into(),
            value: 0.0,
            stderr: None,
            interval95: None,
            items: None,
        };
        let record = |value: Value| value.as_object().unwrap().clone();
        let records = [
            record(serde_json::json!({ "nll": 2.5, "tokens": 2, "acc": 1, "exact_match,strict-match": 0.0 })),
            record(serde_json::json!({ "nll": 1.5, "tokens": 4, "exact_match,strict-match": 1.0 })),
        ];
        let nll = item_values(&metric("nll,none"), &records).unwrap();
        assert_eq!((nll.values, nll.weights), (vec![2.5, 1.5], vec![2.0, 4.0]));
        let strict = item_values(&metric("exact_match,strict-match"), &records).unwrap();
        assert_eq!((strict.values, strict.weights.len()), (vec![0.0, 1.0], 0));
        assert_eq!(item_values(&metric("acc,none"), &records), None, "one of them says nothing of it");
        assert_eq!(item_values(&metric("value"), &[]), None);
    }
}
