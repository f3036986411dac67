//! An item with choices, read from a data set's row and turned into requests.

use crate::calibration::Identity;
use crate::data::Item;
use crate::error::EvalError;
use crate::likelihood::Request;
use crate::prompt::{Asker, Lead, Shot};

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
            return Err(item.fail(problem));
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
    pub(crate) fn shot(&self) -> Shot {
        Shot { asked: self.context(self.gold).to_owned(), answer: self.choices[self.gold].clone() }
    }

    /// By what it is known: the first of `fields`, its context, or all of it as it is shown in an example; beside them the
    /// other fields and the choices.
    pub(crate) fn identity(&self, item: &Item<'_>, fields: &[&str]) -> Identity {
        // Copies of a data set may lack a field that is not read otherwise.
        let mut fields = fields.iter().map(|field| item.text(field).unwrap_or_default().to_owned());
        let asked = fields.next().unwrap_or_default();
        let questions = vec![asked, self.context(self.gold).to_owned(), self.shot().text()];
        Identity { questions, beside: fields.chain(self.choices.iter().cloned()).collect() }
    }

    /// A request for each choice, after `lead`.
    pub(crate) fn requests(&self, asker: Asker<'_>, lead: &Lead) -> Result<Vec<Request>, EvalError> {
        let contexts = self.contexts.iter().map(|context| lead.context(asker, context));
        let contexts = contexts.collect::<Result<Vec<_>, EvalError>>()?;
        let request = |(i, choice): (usize, &String)| {
            let (context, delimiter) = contexts.get(i).unwrap_or(&contexts[0]);
            Request { context: context.clone(), continuation: [delimiter, choice.as_str()].concat() }
        };
        Ok(self.choices.iter().enumerate().map(request).collect())
    }

    /// Unicode code points of each choice, by which `acc_norm` divides.
    pub(crate) fn lengths(&self) -> Vec<usize> {
        self.choices.iter().map(|choice| choice.chars().count()).collect()
    }
}
