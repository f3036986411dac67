//! `results.json`: every arm with its recipe, bytes and numbers, and the rows of the table.

use super::arms::Arms;
use super::evaluate::{ItemValues, Metric, eight_digits, paired_difference};
use crate::recipe::Recipe;
use crate::report::SizeReport;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The model that all arms were made from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Original {
    /// SHA-256 of its files.
    pub sha256: String,
    /// Bytes of its weight files.
    pub bytes: u64,
    /// Weights of all linears.
    pub linear_weights: u64,
    /// Bits a weight of its linears, from bytes of the file.
    pub linear_bits_per_weight: f64,
    /// What was measured.
    pub metrics: Vec<Metric>,
}

/// `result.json` of an arm: what quantizing and measuring gave, with nothing that the recipe already says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArmResult {
    /// The arm.
    pub key: String,
    /// Hash of the evaluation's settings and of the original's numbers.
    pub evaluation: String,
    /// Bytes and bits; of simulated methods also what their own format would take.
    pub size: SizeReport,
    /// Mean relative error of the layers' weights.
    pub mean_relative_error: f64,
    /// By kind of linear: the squared error of its weights over their own energy, in the mean over blocks.
    #[serde(default)]
    pub squared_errors: BTreeMap<String, f64>,
    /// Raised dampings, fallbacks and the like.
    pub notes: Vec<String>,
    /// What was measured.
    pub metrics: Vec<Metric>,
}

/// A number of an arm, and its distance from the original's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compared {
    /// The number.
    #[serde(flatten)]
    pub metric: Metric,
    /// It less the original's.
    pub difference: Option<f64>,
}

/// A measured arm.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MeasuredArm {
    /// The hash of its recipe.
    pub key: String,
    /// Where it stands first.
    pub title: String,
    /// What made it; paths are as the experiment file has them.
    pub recipe: Recipe,
    /// Bytes and bits.
    pub size: SizeReport,
    /// Mean relative error of the layers' weights.
    pub mean_relative_error: f64,
    /// By kind of linear: the squared error of its weights over their own energy, in the mean over blocks.
    pub squared_errors: BTreeMap<String, f64>,
    /// Raised dampings, fallbacks and the like.
    pub notes: Vec<String>,
    /// What was measured.
    pub metrics: Vec<Compared>,
}

/// A metric over the seeds of a row.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RowMetric {
    /// The task.
    pub task: String,
    /// The metric.
    pub metric: String,
    /// Mean over seeds.
    pub mean: f64,
    /// Sample standard deviation over seeds; absent for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spread: Option<f64>,
    /// For one seed, its standard error over items.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stderr: Option<f64>,
    /// For one seed its interval; for several the mean and twice the spread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval95: Option<[f64; 2]>,
    /// The mean less the original's value.
    pub difference: Option<f64>,
    /// The standard error of that difference over items, of which both models answered the same; over several seeds, of
    /// their mean.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference_stderr: Option<f64>,
    /// Of a control: it less the method that it stands beside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside_method: Option<PairedDifference>,
}

/// How far two models are apart on the same items.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PairedDifference {
    /// The one less the other.
    pub difference: f64,
    /// Its standard error over items.
    pub stderr: f64,
}

impl PairedDifference {
    fn of(a: &ItemValues, b: &ItemValues) -> Option<Self> {
        paired_difference(a, b).map(|(difference, stderr)| PairedDifference { difference, stderr })
    }
}

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RowResult {
    /// The method's or the control's name.
    pub method: String,
    /// The budget, or nothing.
    pub budget: String,
    /// The method that a control stands beside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control_of: Option<String>,
    /// Keys of its measured arms.
    pub arms: Vec<String>,
    /// Mean bytes of the weight files, simulated methods counted as their own format would take.
    pub bytes: f64,
    /// Mean bits a weight of the linears, likewise.
    pub bits_per_weight: f64,
    /// Some linears are simulated: the file itself is larger.
    pub simulated: bool,
    /// Every metric.
    pub metrics: Vec<RowMetric>,
}

/// Everything that was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Results {
    /// Version of tailorq.
    pub tailorq: &'static str,
    /// The model before.
    pub original: Original,
    /// Rows by bytes.
    pub rows: Vec<RowResult>,
    /// Arms in the order in which they were planned.
    pub arms: Vec<MeasuredArm>,
    /// Titles of the arms without a result.
    pub missing: Vec<String>,
}

impl Results {
    /// Of what was measured so far: an entry for each of the arms, and what its items got.
    pub(super) fn new(
        (original, original_items): (Original, &[ItemValues]),
        arms: &Arms,
        measured: &[Option<ArmResult>],
        items: &[Vec<ItemValues>],
    ) -> Self {
        let arm = |(at, result): (usize, &Option<ArmResult>)| {
            let result = result.clone()?;
            let planned = &arms.arms[at];
            Some(MeasuredArm {
                key: result.key,
                title: planned.title.clone(),
                recipe: planned.recipe.clone(),
                size: result.size,
                mean_relative_error: result.mean_relative_error,
                squared_errors: result.squared_errors,
                notes: result.notes,
                metrics: result.metrics.into_iter().map(|m| compared(m, &original)).collect(),
            })
        };
        let missing = arms.arms.iter().zip(measured).filter(|(_, r)| r.is_none()).map(|(a, _)| a.title.clone());
        let missing = missing.collect();
        let row = |row: &super::arms::Row| {
            let results: Vec<&ArmResult> = row.arms.iter().filter_map(|&at| measured[at].as_ref()).collect();
            (!results.is_empty()).then(|| row_of(row, &results, &original))
        };
        let mut rows: Vec<RowResult> = arms.rows.iter().filter_map(row).collect();
        let of_rows = Paired { original: original_items, arms, measured, items };
        rows.iter_mut().for_each(|row| of_rows.add_to(row));
        rows.sort_by(|a, b| a.bytes.total_cmp(&b.bytes));
        let arms = measured.iter().enumerate().filter_map(arm).collect();
        Results { tailorq: env!("CARGO_PKG_VERSION"), original, rows, arms, missing }
    }

    /// Every metric, in the order of the original's.
    pub(super) fn metrics(&self) -> &[Metric] {
        &self.original.metrics
    }
}

/// What items say about the distances between rows.
struct Paired<'a> {
    original: &'a [ItemValues],
    arms: &'a Arms,
    measured: &'a [Option<ArmResult>],
    items: &'a [Vec<ItemValues>],
}

impl Paired<'_> {
    fn add_to(&self, row: &mut RowResult) {
        let method = row.control_of.clone();
        for metric in &mut row.metrics {
            let Some(own) = self.mean_items(&row.method, &row.budget, metric) else { continue };
            let original = self.original.iter().find(|i| i.task == metric.task && i.metric == metric.metric);
            metric.difference_stderr = original.and_then(|o| PairedDifference::of(&own, o)).map(|p| p.stderr);
            let beside = method.as_ref().and_then(|method| self.mean_items(method, &row.budget, metric));
            metric.beside_method = beside.and_then(|b| PairedDifference::of(&own, &b));
        }
    }

    /// What each item got in the mean over the measured seeds of a row.
    fn mean_items(&self, method: &str, budget: &str, metric: &RowMetric) -> Option<ItemValues> {
        let row = self.arms.rows.iter().find(|r| r.method == method && r.budget == budget)?;
        let measured = row.arms.iter().filter(|&&at| self.measured[at].is_some());
        let of = |&at: &usize| self.items[at].iter().find(|i| i.task == metric.task && i.metric == metric.metric);
        let seeds: Vec<&ItemValues> = measured.map(of).collect::<Option<_>>()?;
        let first = *seeds.first()?;
        let is_same = |s: &&ItemValues| s.values.len() == first.values.len() && s.weights == first.weights;
        let n = seeds.len() as f64;
        seeds.iter().all(is_same).then(|| ItemValues {
            values: (0..first.values.len()).map(|at| seeds.iter().map(|s| s.values[at]).sum::<f64>() / n).collect(),
            ..first.clone()
        })
    }
}

impl RowResult {
    /// Its numbers of this metric.
    pub(super) fn metric(&self, metric: &Metric) -> Option<&RowMetric> {
        self.metrics.iter().find(|m| m.task == metric.task && m.metric == metric.metric)
    }
}

fn of_original(original: &Original, metric: &Metric) -> Option<f64> {
    original.metrics.iter().find(|m| m.is_same_as(metric)).map(|m| m.value)
}

fn compared(metric: Metric, original: &Original) -> Compared {
    let difference = of_original(original, &metric).map(|value| eight_digits(metric.value - value));
    Compared { metric, difference }
}

/// Bytes of the weight files with simulated linears as their own format would take, and bits of the linears likewise.
fn counted(size: &SizeReport, linear_weights: u64) -> (f64, f64) {
    let bytes_of = |bits: f64| bits * linear_weights as f64 / 8.0;
    match size.counted_bits_per_weight {
        None => (size.artifact_bytes as f64, size.linear_bits_per_weight),
        Some(bits) => (size.artifact_bytes as f64 - bytes_of(size.linear_bits_per_weight) + bytes_of(bits), bits),
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn row_of(row: &super::arms::Row, results: &[&ArmResult], original: &Original) -> RowResult {
    let sizes: Vec<(f64, f64)> = results.iter().map(|r| counted(&r.size, original.linear_weights)).collect();
    let (bytes, bits): (Vec<f64>, Vec<f64>) = sizes.into_iter().unzip();
    let metric = |first: &Metric| {
        let same = |r: &&ArmResult| r.metrics.iter().find(|m| m.is_same_as(first)).cloned();
        row_metric(first, &results.iter().filter_map(same).collect::<Vec<_>>(), original)
    };
    RowResult {
        method: row.method.clone(),
        budget: row.budget.clone(),
        control_of: row.control_of.clone(),
        arms: results.iter().map(|r| r.key.clone()).collect(),
        bytes: mean(&bytes).round(),
        bits_per_weight: eight_digits(mean(&bits)),
        simulated: results.iter().any(|r| r.size.counted_bits_per_weight.is_some()),
        metrics: results[0].metrics.iter().map(metric).collect(),
    }
}

/// The mean over seeds; a single one keeps the uncertainty that its items give it.
fn row_metric(first: &Metric, same: &[Metric], original: &Original) -> RowMetric {
    let values: Vec<f64> = same.iter().map(|m| m.value).collect();
    let (mean, n) = (mean(&values), values.len() as f64);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    let spread = (values.len() > 1).then(|| eight_digits((squares / (n - 1.0)).sqrt()));
    let mean = eight_digits(mean);
    let (stderr, interval95) = match spread {
        None => (first.stderr, first.interval95),
        Some(s) => {
            // Of the mean: what seeds say by Student's distribution, and what the items say that all seeds share.
            let of_seeds = student95(values.len()) * s / n.sqrt();
            let half = of_seeds.hypot(1.96 * first.stderr.unwrap_or(0.0));
            (None, Some([mean - half, mean + half].map(eight_digits)))
        }
    };
    let difference = of_original(original, first).map(|value| eight_digits(mean - value));
    let (task, metric) = (first.task.clone(), first.metric.clone());
    let (difference_stderr, beside_method) = (None, None);
    RowMetric { task, metric, mean, spread, stderr, interval95, difference, difference_stderr, beside_method }
}

/// The 97.5 % quantile of Student's distribution for the mean of `n` values.
fn student95(n: usize) -> f64 {
    const BY_FREEDOM: [f64; 9] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262];
    BY_FREEDOM.get(n.saturating_sub(2)).copied().unwrap_or(2.23)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(value: f64) -> Metric {
        let interval95 = Some([value - 1.0, value + 1.0]);
        Metric { task: "t".into(), metric: "m,none".into(), value, stderr: Some(0.5), interval95, items: None }
    }

    #[test]
    fn seeds_become_a_mean_and_a_spread() {
        let original = Original {
            sha256: String::new(),
            bytes: 1,
            linear_weights: 1,
            linear_bits_per_weight: 16.0,
            metrics: vec![metric(1.0)],
        };
        let many = row_metric(&metric(2.0), &[metric(2.0), metric(3.0), metric(4.0)], &original);
        assert_eq!((many.mean, many.spread, many.stderr), (3.0, Some(1.0), None));
        let half = (4.303f64 / 3f64.sqrt()).hypot(1.96 * 0.5);
        let [low, high] = many.interval95.unwrap();
        assert!((low - (3.0 - half)).abs() < 1e-6 && (high - (3.0 + half)).abs() < 1e-6);
        assert_eq!(many.difference, Some(2.0));
        let one = row_metric(&metric(2.0), &[metric(2.0)], &original);
        assert_eq!((one.mean, one.spread, one.stderr, one.interval95), (2.0, None, Some(0.5), Some([1.0, 3.0])));
    }

    #[test]
    fn simulated_linears_count_as_their_own_format() {
        let size = SizeReport {
            source_bytes: 0,
            source_encoding: None,
            half_precision_bytes: 0,
            artifact_bytes: 2100,
            linear_bits_per_weight: 16.0,
            counted_bits_per_weight: Some(2.0),
            total_bits_per_weight: 16.0,
        };
        assert_eq!(counted(&size, 1000), (350.0, 2.0));
        assert_eq!(counted(&SizeReport { counted_bits_per_weight: None, ..size }, 1000), (2100.0, 16.0));
    }
}
