//! OpenBookQA (Mihaylov et al. 2018), the main set: a stem that the choices complete.

use super::ChoiceTask;
use super::question::Question;
use crate::data::Item;
use crate::error::EvalError;
use crate::task::Task;

/// `openbookqa`.
pub(crate) const OPENBOOKQA: &dyn Task = &ChoiceTask {
    name: "openbookqa",
    about: "elementary science, sentences to complete",
    version: 1,
    by_length: true,
    read,
    known_by: &["question_stem"],
};

fn read(item: &Item<'_>) -> Result<Question, EvalError> {
    let (choices, gold) = item.labelled_choices()?;
    Question::new(item.text("question_stem")?.to_owned(), &choices, gold, item)
}

#[cfg(test)]
mod tests {
    use super::read;
    use crate::choice::testing::{self, of, texts};

    #[test]
    fn the_stem_stands_alone() {
        let json = r#"{"question_stem": "The sun is", "choices": {"text": ["a star", "cold"], "label": ["A", "B"]}, "answerKey": " A"}"#;
        assert_eq!(texts(&testing::read(read, json).unwrap()), of("The sun is", &[" a star", " cold"], 0));
    }
}
