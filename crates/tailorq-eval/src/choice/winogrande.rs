//! WinoGrande (Sakaguchi et al. 2020) by partial evaluation (Trinh and Le 2018): the words after the blank are scored
//! after each way to fill it.

use super::ChoiceTask;
use super::question::Question;
use crate::data::Item;
use crate::error::EvalError;
use crate::items::python_strip;
use crate::task::Task;

/// `winogrande`.
pub(crate) const WINOGRANDE: &dyn Task = &ChoiceTask {
    name: "winogrande",
    about: "what a pronoun stands for",
    version: 1,
    by_length: false,
    read,
    known_by: &["sentence"],
};

fn read(item: &Item<'_>) -> Result<Question, EvalError> {
    let (before, after) = item.text("sentence")?.split_once('_').ok_or_else(|| item.fail("has no blank '_'"))?;
    let contexts = [item.text("option1")?, item.text("option2")?].map(|option| [before, option].concat());
    let gold = item.number("answer")?.checked_sub(1).ok_or_else(|| item.fail("has the answer 0, not 1 or 2"))?;
    Question::of_contexts(contexts.to_vec(), python_strip(after), gold, item)
}

#[cfg(test)]
mod tests {
    use super::read;
    use crate::choice::testing::{self, texts};

    #[test]
    fn the_rest_is_scored_after_both_options() {
        let json = r#"{"sentence": "He fed the dog, as the _ was hungry _ .", "option1": "dog", "option2": "man", "answer": "1"}"#;
        let question = testing::read(read, json).unwrap();
        let rest = " was hungry _ .".to_owned();
        let expected =
            ["He fed the dog, as the dog", "He fed the dog, as the man"].map(|c| (c.to_owned(), rest.clone()));
        assert_eq!(texts(&question), (expected.to_vec(), 0));
        assert_eq!(question.shot().text(), "He fed the dog, as the dog was hungry _ .\n\n");
        for bad in ["No blank.", "_"] {
            let json = format!(r#"{{"sentence": "{bad}", "option1": "a", "option2": "b", "answer": "2"}}"#);
            assert!(testing::read(read, &json).is_err());
        }
    }
}
