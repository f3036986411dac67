//! Items of data sets: where they lie, how they are read, and what is kept of each.

use crate::error::EvalError;
use serde::Serialize;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// An object of a JSONL file.
pub(crate) type Row = Map<String, Value>;

/// The rows of a JSONL file; empty lines are passed over.
pub(crate) fn read_rows(path: &Path) -> Result<Vec<Row>, EvalError> {
    let fail = |problem: String| EvalError::Data { path: path.to_owned(), problem };
    let bytes = std::fs::read(path).map_err(|e| fail(format!("cannot be read: {e}")))?;
    let text = String::from_utf8(bytes).map_err(|e| fail(format!("is no UTF-8 text: {e}")))?;
    let mut rows = Vec::new();
    for (line_idx, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let row = serde_json::from_str(line);
        rows.push(row.map_err(|e| fail(format!("line {} is not a JSON object: {e}", line_idx + 1)))?);
    }
    if rows.is_empty() { Err(fail("holds no items".to_owned())) } else { Ok(rows) }
}

/// A text field of the item `index` of a file.
pub(crate) fn text<'a>(row: &'a Row, key: &str, path: &Path, index: usize) -> Result<&'a str, EvalError> {
    row.get(key)
        .and_then(Value::as_str)
        .ok_or_else(|| EvalError::Data { path: path.to_owned(), problem: format!("item {index} has no text '{key}'") })
}

/// The first of `names` that exists in `folder`, or the first, whose absence will be told.
pub(crate) fn first_present(folder: &Path, names: &[&str]) -> PathBuf {
    let paths = names.iter().map(|name| folder.join(name));
    paths.clone().find(|path| path.is_file()).unwrap_or_else(|| folder.join(names.first().copied().unwrap_or_default()))
}

/// What is kept of an item: a line of a log.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ItemRecord {
    /// The task.
    pub task: &'static str,
    /// The item's place in its file, from 0.
    pub index: usize,
    /// What the model wrote, where it wrote something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion: Option<String>,
    /// What was taken from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction: Option<String>,
    /// What was expected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gold: Option<String>,
    /// Numbers of the item, under the names of the metrics they are averaged into.
    #[serde(flatten)]
    pub scores: Map<String, Value>,
}

/// The mean and the standard error (sample deviation over the root of the count, as in the harness) of a metric.
pub(crate) fn mean_and_stderr(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, if values.len() > 1 { (squares / (n - 1.0) / n).sqrt() } else { 0.0 })
}
