//! BoolQ (Clark et al. 2019): yes or no from a passage.

use super::ChoiceTask;
use super::question::Question;
use crate::data::Item;
use crate::error::EvalError;
use crate::task::Task;
use serde_json::Value;

/// `boolq`.
pub(crate) const BOOLQ: &dyn Task = &ChoiceTask {
    name: "boolq",
    about: "yes or no, from a passage",
    version: 2,
    by_length: false,
    read,
    known_by: &["question", "passage"],
};

/// The answer is `label` (0 or 1) as SuperGLUE has it, or `answer` (true or false) as the original.
fn read(item: &Item<'_>) -> Result<Question, EvalError> {
    let gold = match item.get("answer").and_then(Value::as_bool) {
        Some(answer) => usize::from(answer),
        None => item.number("label")?,
    };
    let context = format!("{}\nQuestion: {}?\nAnswer:", item.text("passage")?, item.text("question")?);
    Question::new(context, &["no", "yes"], gold, item)
}

#[cfg(test)]
mod tests {
    use super::read;
    use crate::choice::testing::{self, of, texts};

    #[test]
    fn prompts_are_the_harness_ones() {
        let expected = of("It rains.\nQuestion: is it wet?\nAnswer:", &[" no", " yes"], 1);
        for gold in [r#""answer": true"#, r#""label": 1"#] {
            let json = format!(r#"{{"passage": "It rains.", "question": "is it wet", {gold}}}"#);
            assert_eq!(texts(&testing::read(read, &json).unwrap()), expected);
        }
        assert!(testing::read(read, r#"{"passage": "p", "question": "q"}"#).is_err());
    }
}
