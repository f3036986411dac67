//! PIQA (Bisk et al. 2020): which of two solutions reaches a goal.

use super::ChoiceTask;
use super::question::Question;
use crate::data::Item;
use crate::error::EvalError;
use crate::task::Task;

/// `piqa`.
pub(crate) const PIQA: &dyn Task = &TASK;

pub(super) const TASK: ChoiceTask = ChoiceTask {
    name: "piqa",
    about: "everyday physics: which of two ways works",
    version: 1,
    by_length: true,
    read,
    known_by: &["goal"],
};

fn read(item: &Item<'_>) -> Result<Question, EvalError> {
    let choices = [item.text("sol1")?, item.text("sol2")?];
    Question::new(format!("Question: {}\nAnswer:", item.text("goal")?), &choices, item.number("label")?, item)
}

#[cfg(test)]
mod tests {
    use super::read;
    use crate::choice::testing::{self, of, texts};

    #[test]
    fn prompts_are_the_harness_ones() {
        let question =
            testing::read(read, r#"{"goal": "To open a jar,", "sol1": "twist.", "sol2": "Pull it.", "label": 1}"#);
        assert_eq!(texts(&question.unwrap()), of("Question: To open a jar,\nAnswer:", &[" twist.", " Pull it."], 1));
        assert!(testing::read(read, r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 2}"#).is_err());
        assert!(testing::read(read, r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": -1}"#).is_err());
    }
}
