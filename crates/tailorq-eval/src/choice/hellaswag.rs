//! HellaSwag (Zellers et al. 2019): how a scene goes on.

use super::ChoiceTask;
use super::question::Question;
use crate::data::Item;
use crate::error::EvalError;
use crate::items::python_strip;
use crate::task::Task;
use regex::Regex;
use std::sync::LazyLock;

/// `hellaswag`.
pub(crate) const HELLASWAG: &dyn Task = &ChoiceTask {
    name: "hellaswag",
    about: "how a scene goes on",
    version: 1,
    by_length: true,
    read,
    known_by: &["ctx"],
};

static BRACKETS: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\[.*?\]").expect("the pattern is a constant that compiles"));

fn read(item: &Item<'_>) -> Result<Question, EvalError> {
    let scene = if item.get("ctx_a").is_some() {
        format!("{} {}", item.text("ctx_a")?, capitalized(item.text("ctx_b")?))
    } else {
        // Copies of the data set that have only the joined text.
        item.text("ctx")?.to_owned()
    };
    let context = cleaned(&format!("{}: {scene}", item.text("activity_label")?));
    let endings: Vec<String> = item.texts("endings")?.into_iter().map(cleaned).collect();
    let endings: Vec<&str> = endings.iter().map(String::as_str).collect();
    Question::new(context, &endings, item.number("label")?, item)
}

/// WikiHow's marks taken out, as the harness does.
fn cleaned(text: &str) -> String {
    let text = python_strip(text).replace(" [title]", ". ");
    BRACKETS.replace_all(&text, "").replace("  ", " ")
}

/// Python's `str.capitalize()`: the first letter in title case, all others lower case.
fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    let Some(first) = letters.next() else { return String::new() };
    // Lower case of a letter may depend on the one before it (a final sigma), so the whole text is lowered.
    let lower = text.to_lowercase();
    let rest = &lower[first.to_lowercase().map(char::len_utf8).sum::<usize>()..];
    title_case(first) + rest
}

/// Title case differs from upper case where one character stands for several letters.
fn title_case(letter: char) -> String {
    match letter {
        '\u{1c4}'..='\u{1c6}' => '\u{1c5}'.into(),
        '\u{1c7}'..='\u{1c9}' => '\u{1c8}'.into(),
        '\u{1ca}'..='\u{1cc}' => '\u{1cb}'.into(),
        '\u{1f1}'..='\u{1f3}' => '\u{1f2}'.into(),
        _ => {
            let mut upper = letter.to_uppercase();
            upper.next().into_iter().chain(upper.flat_map(char::to_lowercase)).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{capitalized, cleaned, read};
    use crate::choice::testing::{self, of, texts};

    #[test]
    fn prompts_are_the_harness_ones() {
        let rest = r#""endings": [" [step] bake  it.", "[substeps] eat."], "label": "1"}"#;
        let json = format!(
            r#"{{"activity_label": "Food", "ctx_a": "How to bake [title] Mix. [step] A man", "ctx_b": "the BOWL is", {rest}"#
        );
        let expected = of("Food: How to bake. Mix. A man The bowl is", &["  bake it.", "  eat."], 1);
        assert_eq!(texts(&testing::read(read, &json).unwrap()), expected);
        let json = format!(r#"{{"activity_label": "Food", "ctx": "A Man [x] sits", {rest}"#);
        assert_eq!(texts(&testing::read(read, &json).unwrap()).0[0].0, "Food: A Man sits");
    }

    #[test]
    fn spaces_are_halved_once() {
        assert_eq!(cleaned(" a    b [x [y] z] [\n] "), "a  b z] [\n]");
    }

    #[test]
    fn capitals_are_pythons() {
        for (text, expected) in [
            ("", ""),
            ("a MAN", "A man"),
            ("ß A", "Ss a"),
            ("ǆ", "ǅ"),
            ("\"Oh\"", "\"oh\""),
            ("ΑΣ", "Ας"),
            ("İI", "İi"),
        ] {
            assert_eq!(capitalized(text), expected);
        }
    }
}
