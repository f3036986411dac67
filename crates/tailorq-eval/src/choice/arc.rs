//! ARC (Clark et al. 2018), the easy and the challenge set.

use super::ChoiceTask;
use super::question::Question;
use crate::data::Item;
use crate::error::EvalError;
use crate::task::Task;

/// `arc_easy`.
pub(crate) const ARC_EASY: &dyn Task = &ChoiceTask {
    name: "arc_easy",
    about: "grade school science, the easier questions",
    version: 1,
    by_length: true,
    read,
    known_by: &["question"],
};
/// `arc_challenge`.
pub(crate) const ARC_CHALLENGE: &dyn Task = &ChoiceTask {
    name: "arc_challenge",
    about: "grade school science, the harder questions",
    version: 1,
    by_length: true,
    read,
    known_by: &["question"],
};

fn read(item: &Item<'_>) -> Result<Question, EvalError> {
    let (choices, gold) = item.labelled_choices()?;
    Question::new(format!("Question: {}\nAnswer:", item.text("question")?), &choices, gold, item)
}

#[cfg(test)]
mod tests {
    use super::read;
    use crate::choice::testing::{self, of, texts};

    #[test]
    fn prompts_are_the_harness_ones() {
        let json = r#"{"question": "Who?", "choices": {"text": ["me", "you there", "they"], "label": ["1", "2", "3"]}, "answerKey": "2"}"#;
        let question = testing::read(read, json).unwrap();
        assert_eq!(texts(&question), of("Question: Who?\nAnswer:", &[" me", " you there", " they"], 1));
        assert_eq!(question.shot().text(), "Question: Who?\nAnswer: you there\n\n");
        assert_eq!(question.lengths(), [2, 9, 4]);
    }

    #[test]
    fn bad_rows_are_refused_by_name() {
        for (json, part) in [
            (r#"{"question": "Q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}"#, "label 'B'"),
            (r#"{"question": "Q", "choices": {"text": ["a", ""], "label": ["A", "B"]}, "answerKey": "A"}"#, "empty"),
            (
                r#"{"question": "Q", "choices": {"text": ["a", 1], "label": ["A", "B"]}, "answerKey": "A"}"#,
                "choices.text",
            ),
            (r#"{"question": "Q", "choices": {"text": ["a"], "label": ["A", "B"]}, "answerKey": "B"}"#, "1 choices"),
            (r#"{"choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}"#, "'question'"),
        ] {
            let message = testing::read(read, json).unwrap_err().to_string();
            assert!(message.contains("test.jsonl line 4 (item 3)") && message.contains(part), "{message}");
        }
    }
}
