//! Items of data sets: where they lie, how they are read, and errors that say which field of which line is amiss.

use crate::error::EvalError;
use crate::task::TaskOptions;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The fields of an item.
pub(crate) type Row = Map<String, Value>;

/// The items of a file, in their order.
#[derive(Clone, Debug)]
pub(crate) struct Items {
    /// The file.
    pub(crate) path: PathBuf,
    /// Each item with its line, from 1.
    rows: Vec<(usize, Row)>,
}

impl Items {
    /// Reads a JSONL file; empty lines are passed over.
    pub(crate) fn read(path: &Path) -> Result<Self, EvalError> {
        let fail = |problem: String| EvalError::Data { path: path.to_owned(), problem };
        let bytes = std::fs::read(path).map_err(|e| fail(format!("cannot be read: {e}")))?;
        let text = String::from_utf8(bytes).map_err(|e| fail(format!("is no UTF-8 text: {e}; save it as UTF-8")))?;
        let mut rows = Vec::new();
        for (line_idx, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let line_number = line_idx + 1;
            let row = serde_json::from_str(line).map_err(|e| {
                fail(format!("line {line_number} is not a JSON object: {e}; every line has to hold one item whole"))
            })?;
            rows.push((line_number, row));
        }
        if rows.is_empty() {
            return Err(fail("holds no items".to_owned()));
        }
        Ok(Items { path: path.to_owned(), rows })
    }

    /// The first items, as many as asked for.
    pub(crate) fn limited(mut self, options: &TaskOptions<'_>) -> Self {
        self.rows.truncate(options.items.limit.unwrap_or(usize::MAX));
        self
    }

    /// Number of items.
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The item `index`, which exists.
    pub(crate) fn get(&self, index: usize) -> Item<'_> {
        let (line, row) = &self.rows[index];
        Item { row, path: &self.path, line: *line, index }
    }

    /// All items.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = Item<'_>> {
        (0..self.rows.len()).map(|index| self.get(index))
    }
}

/// An item and where it stands.
#[derive(Clone, Copy)]
pub(crate) struct Item<'a> {
    /// Its fields.
    pub(crate) row: &'a Row,
    /// Its file.
    pub(crate) path: &'a Path,
    /// Its line there, from 1.
    pub(crate) line: usize,
    /// Its place among the items, from 0.
    pub(crate) index: usize,
}

impl<'a> Item<'a> {
    /// An error that names file and line.
    pub(crate) fn fail(&self, problem: impl AsRef<str>) -> EvalError {
        let problem = format!("line {} (item {}) {}", self.line, self.index, problem.as_ref());
        EvalError::Data { path: self.path.to_owned(), problem }
    }

    /// An error that names the field too, and what there is instead.
    pub(crate) fn lacks(&self, what: &str) -> EvalError {
        let fields: Vec<&str> = self.row.keys().map(String::as_str).collect();
        let fields = if fields.is_empty() { "none".to_owned() } else { fields.join(", ") };
        self.fail(format!("has no {what} (its fields: {fields}); fields have the names of the data set on the hub"))
    }

    /// The value of a field, if there is one that is not null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.row.get(key).filter(|value| !value.is_null())
    }

    /// A text field.
    pub(crate) fn text(&self, key: &str) -> Result<&'a str, EvalError> {
        self.get(key).and_then(Value::as_str).ok_or_else(|| self.lacks(&format!("text '{key}'")))
    }

    /// A field that is a list of texts.
    pub(crate) fn texts(&self, key: &str) -> Result<Vec<&'a str>, EvalError> {
        self.get(key).and_then(texts).ok_or_else(|| self.lacks(&format!("list of texts '{key}'")))
    }

    /// A field that is a number from 0, as a number or as its digits.
    pub(crate) fn number(&self, key: &str) -> Result<usize, EvalError> {
        let number = match self.get(key) {
            Some(Value::String(digits)) => digits.trim().parse().ok(),
            Some(value) => value.as_u64().and_then(|n| usize::try_from(n).ok()),
            None => None,
        };
        number.ok_or_else(|| self.lacks(&format!("number from 0 on '{key}'")))
    }

    /// Choices under `choices.text` with labels under `choices.label`, and the place of `answerKey` among the labels.
    pub(crate) fn labelled_choices(&self) -> Result<(Vec<&'a str>, usize), EvalError> {
        let choices = self.get("choices").ok_or_else(|| self.lacks("'choices'"))?;
        let list = |key: &str| {
            let list = choices.get(key).and_then(texts);
            list.ok_or_else(|| self.lacks(&format!("list of texts 'choices.{key}'")))
        };
        let (choices, labels) = (list("text")?, list("label")?);
        let key = self.text("answerKey")?.trim_start();
        let gold = labels.iter().position(|label| *label == key);
        let gold = gold.ok_or_else(|| {
            self.fail(format!(
                "has no choice with the label '{key}' of its 'answerKey' (labels: {})",
                labels.join(", ")
            ))
        })?;
        Ok((choices, gold))
    }
}

fn texts(value: &Value) -> Option<Vec<&str>> {
    value.as_array()?.iter().map(Value::as_str).collect()
}

/// The folder of the data set `name` in the folder of data sets.
pub(crate) fn data_folder(task: &'static str, name: &str, options: &TaskOptions<'_>) -> Result<PathBuf, EvalError> {
    let input = "a folder of data sets (--data DIR)";
    Ok(options.items.data.ok_or(EvalError::MissingInput { task, input })?.join(name))
}

/// The one file of items.
pub(crate) fn data_file<'a>(task: &'static str, options: &TaskOptions<'a>) -> Result<&'a Path, EvalError> {
    let input = "a file of items (--data FILE.jsonl)";
    options.items.data.ok_or(EvalError::MissingInput { task, input })
}

/// The items of a folder: of the first of `names` that it has, such as `test` for `test.jsonl`. `what` is what they are
/// called when there are none.
pub(crate) fn read_split(folder: &Path, names: &[&str], what: &str) -> Result<Items, EvalError> {
    let files: Vec<String> = names.iter().map(|name| format!("{name}.jsonl")).collect();
    match files.iter().map(|file| folder.join(file)).find(|path| path.is_file()) {
        Some(path) => Items::read(&path),
        None => {
            let [first, others @ ..] = &files[..] else { unreachable!("every split has a name") };
            let others: String = others.iter().map(|file| format!(", nor does {file}")).collect();
            let problem = format!(
                "does not exist{others}: {what} are read from there, one JSON object a line with the fields of the data \
                 set on the hub; --data names the folder above"
            );
            Err(EvalError::Data { path: folder.join(first), problem })
        }
    }
}
