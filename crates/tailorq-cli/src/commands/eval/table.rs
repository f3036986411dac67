//! Metrics as the rows of a Markdown table.

use serde_json::{Map, Value};

/// The metrics among the details of a task, in the harness' notation: `acc,none`.
pub(super) fn metrics(details: &Map<String, Value>) -> impl Iterator<Item = (&String, &Value)> {
    let is_metric = |key: &str| key.contains(',') && !key.contains("_stderr,") && !key.contains("_interval95,");
    details.iter().filter(move |(key, _)| is_metric(key))
}

/// A metric with what stands beside it.
pub(super) struct Row {
    task: String,
    /// Items, or documents or windows where there are no items.
    items: Option<u64>,
    shots: Option<u64>,
    metric: String,
    value: f64,
    stderr: Option<f64>,
    interval95: Option<[f64; 2]>,
    /// Time of the task, in the first of its rows.
    pub(super) seconds: Option<f64>,
}

impl Row {
    /// The metrics of a task or a part of one: those in the harness' notation with their standard errors and intervals
    /// (`exact_match,strict-match` beside `exact_match_stderr,strict-match`).
    pub(super) fn of(task: &str, details: &Map<String, Value>) -> Vec<Row> {
        let number = |key: &str| details.get(key).and_then(Value::as_u64);
        let row = |(key, value): (&String, &Value)| {
            let (metric, filter) = key.split_once(',')?;
            let beside = |what: &str| details.get(&format!("{metric}_{what},{filter}"));
            Some(Row {
                task: task.to_owned(),
                items: ["items", "documents", "windows"].into_iter().find_map(number),
                shots: number("num_fewshot"),
                metric: key.clone(),
                value: value.as_f64()?,
                stderr: beside("stderr").and_then(Value::as_f64),
                interval95: beside("interval95").and_then(bounds),
                seconds: None,
            })
        };
        metrics(details).filter_map(row).collect()
    }

    /// The one number of a task that has no other name than the task's: a perplexity.
    pub(super) fn of_value(task: &str, value: f64, details: &Map<String, Value>) -> Row {
        Row {
            task: task.to_owned(),
            items: details.get("windows").and_then(Value::as_u64),
            shots: None,
            metric: "perplexity".to_owned(),
            value,
            stderr: details.get("perplexity_stderr,none").and_then(Value::as_f64),
            interval95: details.get("perplexity_interval95,none").and_then(bounds),
            seconds: None,
        }
    }

    /// The share of a class of items: of questions of one hardness.
    pub(super) fn of_class(task: &str, class: &str, details: &Value) -> Option<Row> {
        let (metric, value) = details.as_object()?.iter().next()?;
        Some(Row {
            task: format!("{task}, {class}"),
            items: details.get("items").and_then(Value::as_u64),
            shots: None,
            metric: metric.clone(),
            value: value.as_f64()?,
            stderr: details.get("stderr").and_then(Value::as_f64),
            interval95: details.get("interval95").and_then(bounds),
            seconds: None,
        })
    }

    fn cells(&self) -> [String; 8] {
        let whole = |number: Option<u64>| number.map_or(String::new(), |n| n.to_string());
        [
            self.task.clone(),
            whole(self.items),
            whole(self.shots),
            self.metric.clone(),
            format!("{:.4}", self.value),
            self.stderr.map_or(String::new(), |stderr| format!("{stderr:.4}")),
            self.interval95.map_or(String::new(), |[low, high]| format!("{low:.4} to {high:.4}")),
            self.seconds.map_or(String::new(), |seconds| format!("{seconds:.1}")),
        ]
    }
}

fn bounds(value: &Value) -> Option<[f64; 2]> {
    let bounds: Option<Vec<f64>> = value.as_array()?.iter().map(Value::as_f64).collect();
    bounds?.try_into().ok()
}

const HEADINGS: [&str; 8] = ["task", "items", "shots", "metric", "value", "stderr", "95 % interval", "seconds"];
/// Names to the left, numbers to the right.
const IS_NUMBER: [bool; 8] = [false, true, true, false, true, true, false, true];

/// A Markdown table whose columns are aligned for the eye too.
pub(super) fn markdown(rows: &[Row]) -> String {
    let cells: Vec<[String; 8]> =
        std::iter::once(HEADINGS.map(str::to_owned)).chain(rows.iter().map(Row::cells)).collect();
    let widths: [usize; 8] =
        std::array::from_fn(|at| cells.iter().map(|row| row[at].chars().count()).max().unwrap_or(0));
    let line = |row: &[String; 8]| {
        let cells = (0..8).map(|at| match IS_NUMBER[at] {
            true => format!(" {:>width$} |", row[at], width = widths[at]),
            false => format!(" {:<width$} |", row[at], width = widths[at]),
        });
        format!("|{}\n", cells.collect::<String>())
    };
    let rule = (0..8).map(|at| format!(" {}{} |", "-".repeat(widths[at] - 1), if IS_NUMBER[at] { ":" } else { "-" }));
    let rule = format!("|{}\n", rule.collect::<String>());
    cells.iter().enumerate().map(|(at, row)| line(row) + if at == 0 { &rule } else { "" }).collect()
}
