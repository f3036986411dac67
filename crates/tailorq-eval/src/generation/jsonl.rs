//! Any JSONL of prompts and answers: exact match and F1 of words for short answers (TriviaQA's way), the chosen letter for
//! questions with options (MMLU-Pro's and CodeMMLU's way).

use super::{Judgement, Prompt};
use crate::answers::{INVALID, chosen_letter, squad_normalized, token_f1};
use crate::calibration::Identity;
use crate::completion::user;
use crate::data::Row;
use serde_json::Value;
use tailorq_model::ChatMessage;

/// Names under which people keep what is asked; the first present wins.
const PROMPT_KEYS: [&str; 4] = ["prompt", "question", "instruction", "input"];
/// Names under which people keep what is right.
const ANSWER_KEYS: [&str; 7] = ["answers", "answer", "completion", "target", "response", "output", "gold"];
/// Names under which people keep what can be chosen from.
const OPTION_KEYS: [&str; 2] = ["options", "choices"];
/// Letters of options.
const LETTERS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// What is asked of an item and what is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    /// The conversation; its last turn lists the options if there are any.
    pub(crate) messages: Vec<ChatMessage>,
    /// Every answer that is right; letters if there are options.
    pub(crate) golds: Vec<String>,
    /// Number of options, 0 if the answer is free text.
    pub(crate) n_options: usize,
    /// By what the item is known.
    pub(crate) identity: Identity,
}

impl Question {
    /// Reads an item, or says what it lacks.
    pub(crate) fn read(row: &Row) -> Result<Self, String> {
        let options = OPTION_KEYS.iter().find_map(|key| row.get(*key)).map(texts).unwrap_or_default();
        if options.len() > LETTERS.len() {
            return Err(format!("has {} options, more than there are letters", options.len()));
        }
        let mut messages = read_messages(row)?;
        let question = asked(&messages);
        let golds = match options.len() {
            0 => read_golds(row)?,
            _ => vec![gold_letter(row, &options)?.to_string()],
        };
        if let Some(last) = messages.last_mut().filter(|_| !options.is_empty()) {
            for (letter, option) in LETTERS.chars().zip(&options) {
                last.content.push_str(&format!("\n{letter}. {option}"));
            }
            last.content.push_str("\nAnswer with the letter of the right option.");
        }
        let n_options = options.len();
        let beside = if n_options > 0 { options } else { golds.clone() };
        Ok(Question { messages, golds, n_options, identity: Identity { questions: vec![question], beside } })
    }

    /// Reads an item as the turns before a completion and the completion, for scoring it as it is: the first answer if
    /// there are several.
    pub(crate) fn read_pair(row: &Row) -> Result<(Vec<ChatMessage>, String), String> {
        let messages = read_messages(row)?;
        let completion = read_golds(row)?.into_iter().next().ok_or("has no answer")?;
        Ok((messages, completion))
    }

    /// What the model continues: a conversation, or the bare text of the last turn.
    pub(crate) fn prompt(&self, chat: bool) -> Prompt {
        match self.messages.last() {
            Some(last) if !chat => Prompt::Text(last.content.clone()),
            _ => Prompt::Chat(self.messages.clone()),
        }
    }

    /// The best score among the right answers.
    pub(crate) fn judge(&self, completion: &str) -> Judgement {
        let gold = self.golds.first().cloned().unwrap_or_default();
        if self.n_options > 0 {
            let letter = chosen_letter(completion, self.n_options).map(String::from);
            let is_right = letter.as_ref().is_some_and(|letter| self.golds.contains(letter));
            let score = f64::from(u8::from(is_right));
            let prediction = letter.unwrap_or_else(|| INVALID.to_owned());
            return Judgement { prediction, gold, scores: vec![("exact_match,letter", score)] };
        }
        let prediction = squad_normalized(completion);
        let is_right = self.golds.iter().any(|gold| squad_normalized(gold) == prediction);
        let f1 = self.golds.iter().map(|gold| token_f1(completion, gold)).fold(0.0, f64::max);
        let scores = vec![("exact_match,none", f64::from(u8::from(is_right))), ("f1,none", f1)];
        Judgement { prediction, gold, scores }
    }
}

/// What the user says in a conversation.
pub(crate) fn asked(messages: &[ChatMessage]) -> String {
    let turns: Vec<&str> = messages.iter().filter(|m| m.role == "user").map(|m| m.content.as_str()).collect();
    turns.join("\n")
}

fn read_messages(row: &Row) -> Result<Vec<ChatMessage>, String> {
    if let Some(messages) = row.get("messages") {
        let mut messages: Vec<ChatMessage> = serde_json::from_value(messages.clone())
            .map_err(|e| format!("'messages' is not a list of {{\"role\",\"content\"}}: {e}"))?;
        // A finished conversation asks for its last turn.
        if messages.last().is_some_and(|last| last.role == "assistant") {
            messages.pop();
        }
        return if messages.is_empty() { Err("'messages' asks nothing".to_owned()) } else { Ok(messages) };
    }
    let prompt = PROMPT_KEYS.iter().find_map(|key| row.get(*key)?.as_str());
    match prompt {
        Some(prompt) => Ok(vec![user(prompt)]),
        None => Err(format!("has nothing to ask: it needs one of {} or \"messages\"", PROMPT_KEYS.join(", "))),
    }
}

fn read_golds(row: &Row) -> Result<Vec<String>, String> {
    if let Some(golds) = ANSWER_KEYS.iter().find_map(|key| row.get(*key)).map(texts)
        && !golds.is_empty()
    {
        return Ok(golds);
    }
    let last = row.get("messages").and_then(Value::as_array).and_then(|m| m.last());
    match last.filter(|m| m["role"] == "assistant").and_then(|m| m["content"].as_str()) {
        Some(content) => Ok(vec![content.to_owned()]),
        None => Err(format!("has no answer: it needs one of {}", ANSWER_KEYS.join(", "))),
    }
}

/// All texts of a value: a string or number, a list of them, or an object that keeps them as SQuAD (`text`), TriviaQA
/// (`value`, `aliases`) or ARC (`text`) do.
fn texts(value: &Value) -> Vec<String> {
    match value {
        Value::String(text) => vec![text.clone()],
        Value::Number(number) => vec![number.to_string()],
        Value::Bool(truth) => vec![if *truth { "yes" } else { "no" }.to_owned()],
        Value::Array(values) => values.iter().flat_map(texts).collect(),
        Value::Object(object) => {
            ["value", "text", "aliases"].iter().filter_map(|key| object.get(*key)).flat_map(texts).collect()
        }
        Value::Null => Vec::new(),
    }
}

/// The letter of the right option: given as a letter, as an index from 0 or as the option's text.
fn gold_letter(row: &Row, options: &[String]) -> Result<char, String> {
    let keys = ["answer", "answer_index", "label", "answers", "target", "gold"];
    let value = keys.iter().find_map(|key| row.get(*key)).ok_or("has options but no answer")?;
    let at = match value {
        Value::Number(number) => number.as_u64().and_then(|n| usize::try_from(n).ok()),
        Value::String(text) => {
            let text = text.trim();
            let letter = text.trim_matches(['(', ')', '.']);
            let by_letter = LETTERS.chars().position(|l| letter.len() == 1 && letter.starts_with(l));
            by_letter.filter(|at| *at < options.len()).or_else(|| options.iter().position(|o| o.trim() == text))
        }
        _ => None,
    };
    at.filter(|at| *at < options.len()).and_then(|at| LETTERS.chars().nth(at)).ok_or_else(|| {
        format!("has the answer {value}, which is no letter, index or text of its {} options", options.len())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Question, String> {
        Question::read(&serde_json::from_str(json).unwrap())
    }

    fn scores(json: &str, completion: &str) -> Vec<(&'static str, f64)> {
        read(json).unwrap().judge(completion).scores
    }

    #[test]
    fn the_best_of_several_answers_counts() {
        let json =
            r#"{"question": "Who?", "answer": {"value": "The Beatles", "aliases": ["Fab Four", "Beatles band"]}}"#;
        assert_eq!(read(json).unwrap().golds, ["The Beatles", "Fab Four", "Beatles band"]);
        assert_eq!(scores(json, " beatles!"), [("exact_match,none", 1.0), ("f1,none", 1.0)]);
        assert_eq!(scores(json, "the band Beatles of Liverpool"), [("exact_match,none", 0.0), ("f1,none", 4.0 / 6.0)]);
        for json in [
            r#"{"prompt": "p", "answers": ["x", "y"]}"#,
            r#"{"instruction": "p", "answers": {"text": ["x", "y"], "answer_start": [1, 2]}}"#,
        ] {
            assert_eq!(read(json).unwrap().golds, ["x", "y"]);
        }
        let turns = r#"{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}"#;
        let question = read(turns).unwrap();
        assert_eq!((question.messages.len(), &question.golds[..]), (1, &["c".to_owned()][..]));
        assert_eq!(question.prompt(false), Prompt::Text("p".to_owned()));
    }

    #[test]
    fn options_are_listed_and_chosen_by_letter() {
        for answer in [r#""B""#, r#""(B)""#, "1", r#""two""#] {
            let json = format!(r#"{{"question": "Which?", "options": ["one", "two", "three"], "answer": {answer}}}"#);
            let question = read(&json).unwrap();
            let asked = "Which?\nA. one\nB. two\nC. three\nAnswer with the letter of the right option.";
            assert_eq!((question.messages[0].content.as_str(), &question.golds[0][..]), (asked, "B"));
            assert_eq!(scores(&json, "I think the answer is (B)."), [("exact_match,letter", 1.0)]);
            assert_eq!(scores(&json, "C"), [("exact_match,letter", 0.0)]);
            assert_eq!(scores(&json, "two"), [("exact_match,letter", 0.0)]);
        }
        let arc = r#"{"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "A"}"#;
        assert_eq!(read(arc).unwrap().golds, ["A"]);
    }

    #[test]
    fn items_without_a_question_or_an_answer_are_refused() {
        for json in [
            r#"{"foo": 1}"#,
            r#"{"prompt": "p"}"#,
            r#"{"prompt": "p", "answers": []}"#,
            r#"{"messages": []}"#,
            r#"{"messages": "x", "answer": "y"}"#,
            r#"{"question": "q", "options": ["a", "b"]}"#,
            r#"{"question": "q", "options": ["a", "b"], "answer": "C"}"#,
            r#"{"question": "q", "options": ["a", "b"], "answer": 2}"#,
        ] {
            assert!(read(json).is_err(), "{json}");
        }
    }
}
