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
        rows.push(parse_row(path, line_idx + 1, line)?);
    }
    if rows.is_empty() { Err(fail("holds no items".to_owned())) } else { Ok(rows) }
}

/// The object of a line, which is counted from 1.
pub(crate) fn parse_row(path: &Path, line: usize, text: &str) -> Result<Row, EvalError> {
    serde_json::from_str(text).map_err(|e| EvalError::Data {
        path: path.to_owned(),
        problem: format!("line {line} is not a JSON object: {e}"),
    })
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
    /// Log-likelihoods in nats of what could be chosen, in the order of the choices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loglikelihoods: Option<Vec<f64>>,
    /// What was taken from either: a text, or the place of the most likely choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Value>,
    /// What was expected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gold: Option<Value>,
    /// Numbers of the item, under the names of the metrics they are averaged into.
    #[serde(flatten)]
    pub scores: Map<String, Value>,
}
