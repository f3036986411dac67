//! An item with choices, read from a data set's row and turned into requests.

use crate::error::EvalError;
use crate::items::Row;
use crate::likelihood::Request;
use serde_json::Value;
use std::path::Path;

/// A row and where it stands.
#[derive(Clone, Copy)]
pub(crate) struct Item<'a> {
    /// The row.
    pub(crate) row: &'a Row,
    /// Its file.
    pub(crate) path: &'a Path,
    /// Its place there, from 0.
    pub(crate) index: usize,
}

impl<'a> Item<'a> {
    /// An error that names the item.
    pub(crate) fn fail(&self, problem: &str) -> EvalError {
        EvalError::Data { path: self.path.to_owned(), problem: format!("item {} {problem}", self.index) }
    }

    /// A text field.
    pub(crate) fn text(&self, key: &str) -> Result<&'a str, EvalError> {
        crate::items::text(self.row, key, self.path, self.index)
    }

    /// A field that is a list of texts.
    pub(crate) fn texts(&self, key: &str) -> Result<Vec<&'a str>, EvalError> {
        self.row.get(key).and_then(texts).ok_or_else(|| self.fail(&format!("has no list of texts '{key}'")))
    }

    /// A field that is a number from 0, as a number or as its digits.
    pub(crate) fn number(&self, key: &str) -> Result<usize, EvalError> {
        let number = match self.row.get(key) {
            Some(Value::String(digits)) => digits.trim().parse().ok(),
            Some(value) => value.as_u64().and_then(|n| usize::try_from(n).ok()),
            None => None,
        };
        number.ok_or_else(|| self.fail(&format!("has no number '{key}'")))
    }

    /// Choices under `choices.text` with labels under `choices.label`, and the place of `answerKey` among the labels.
    pub(crate) fn labelled_choices(&self) -> Result<(Vec<&'a str>, usize), EvalError> {
        let choices = self.row.get("choices").ok_or_else(|| self.fail("has no 'choices'"))?;
        let list = |key: &str| {
            let list = choices.get(key).and_then(texts);
            list.ok_or_else(|| self.fail(&format!("has no list of texts 'choices.{key}'")))
        };
        let (choices, labels) = (list("text")?, list("label")?);
        let key = self.text("answerKey")?.trim_start();
        let gold = labels.iter().position(|label| *label == key);
        let gold = gold.ok_or_else(|| self.fail(&format!("has no choice with the label '{key}' of its answer")))?;
        Ok((choices, gold))
    }
}

fn texts(value: &Value) -> Option<Vec<&str>> {
    value.as_array()?.iter().map(Value::as_str).collect()
}

/// An item as it is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    /// What comes before the choices: one text for all, or one for each.
    contexts: Vec<String>,
    /// What is scored, without the space before it.
    choices: Vec<String>,
    /// The right one.
    pub(crate) gold: usize,
}

impl Question {
    /// A context with several continuations.
    pub(crate) fn new(context: String, choices: &[&str], gold: usize, item: &Item<'_>) -> Result<Self, EvalError> {
        let choices: Vec<String> = choices.iter().map(|c| (*c).to_owned()).collect();
        Question { contexts: vec![context], choices, gold }.checked(item)
    }

    /// Several contexts with one continuation.
    pub(crate) fn of_contexts(
        contexts: Vec<String>,
        continuation: &str,
        gold: usize,
        item: &Item<'_>,
    ) -> Result<Self, EvalError> {
        let choices = vec![continuation.to_owned(); contexts.len()];
        Question { contexts, choices, gold }.checked(item)
    }

    fn checked(self, item: &Item<'_>) -> Result<Self, EvalError> {
        if self.gold >= self.choices.len() {
            let problem = format!("has {} choices, and its answer is number {}", self.choices.len(), self.gold);
            return Err(item.fail(&problem));
        }
        if self.choices.iter().any(String::is_empty) {
            return Err(item.fail("has an empty choice, and nothing of it can be scored"));
        }
        Ok(self)
    }

    fn context(&self, choice: usize) -> &str {
        self.contexts.get(choice).or(self.contexts.first()).map_or("", String::as_str)
    }

    /// The item with its answer, as an example before another one.
    pub(crate) fn shot(&self) -> String {
        format!("{} {}\n\n", self.context(self.gold), self.choices[self.gold])
    }

    /// A request for each choice, after `before` (description and examples).
    pub(crate) fn requests(&self, before: &str) -> Vec<Request> {
        (self.choices.iter().enumerate())
            .map(|(i, choice)| Request {
                context: [before, self.context(i)].concat(),
                continuation: format!(" {choice}"),
            })
            .collect()
    }

    /// Unicode code points of each choice, by which `acc_norm` divides.
    pub(crate) fn lengths(&self) -> Vec<usize> {
        self.choices.iter().map(|choice| choice.chars().count()).collect()
    }
}
