//! What is kept of items, and white space as Python sees it.

use serde::Serialize;
use serde_json::{Map, Value};

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
    /// Sums of the log-probabilities of the choices, in nats and in their order, where choices were scored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loglikelihoods: Option<Vec<f64>>,
    /// What was taken from the completion (a text), or the most likely choice (a number from 0).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Value>,
    /// What was expected, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gold: Option<Value>,
    /// Numbers of the item, under the names of the metrics they are averaged into.
    #[serde(flatten)]
    pub scores: Map<String, Value>,
}

impl ItemRecord {
    /// A record that says nothing yet.
    pub(crate) fn new(task: &'static str, index: usize) -> Self {
        let (completion, loglikelihoods, prediction, gold) = (None, None, None, None);
        ItemRecord { task, index, completion, loglikelihoods, prediction, gold, scores: Map::new() }
    }
}

/// What Python's `str.isspace` and `str.strip` take for white space.
pub(crate) fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Python's `str.strip()`.
pub(crate) fn python_strip(text: &str) -> &str {
    text.trim_matches(is_python_space)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_is_pythons() {
        assert_eq!(python_strip("\u{1f} \u{a0}a b\n\u{2003}"), "a b");
        assert_eq!(python_strip("\u{200b}a"), "\u{200b}a");
    }
}
