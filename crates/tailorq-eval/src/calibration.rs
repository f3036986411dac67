//! Calibration items as fingerprints, so that a test item that a model was calibrated on is known for one.
//!
//! A text is cut into sentences, at line breaks and after `.`, `!`, `?`, `:` and `;` before white space; of each only letters
//! and digits count, in lower case. The fingerprint of a calibration item is the hashes of the sentences of all its text
//! fields. A test item was a calibration item if all sentences of its question are among those of one calibration
//! item, whatever stands around them there: a cue such as `Question:`, a schema, worked examples, a chat's turns. A
//! question of few words, which several items may share, needs one of its answers or its passage beside it.

use crate::data::{Item, Items};
use crate::error::EvalError;
use crate::task::TaskOptions;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::collections::{BTreeSet, HashMap};

/// A question of so many words is one item's own.
const SPECIFIC_WORDS: usize = 8;
/// Hexadecimal digits of the hash of a sentence, 48 bits: of a million pairs of sentences 4e-9 collide.
const HASH_DIGITS: usize = 12;

/// The fingerprint of a calibration item: hashes of the sentences of all its texts (12 hexadecimal digits each), sorted,
/// a space apart.
pub fn fingerprint(item: &Map<String, Value>) -> String {
    let mut hashes = BTreeSet::new();
    // A role is the same in every conversation.
    let fields = item.iter().filter(|(key, _)| *key != "role").map(|(_, value)| value);
    fields.for_each(|value| add_texts(value, &mut hashes));
    written(&hashes)
}

/// The fingerprint of a text that is a calibration item by itself.
pub fn text_fingerprint(text: &str) -> String {
    written(&hashes(text).collect())
}

fn written(hashes: &BTreeSet<u64>) -> String {
    hashes.iter().map(|hash| format!("{hash:0HASH_DIGITS$x}")).collect::<Vec<_>>().join(" ")
}

fn add_texts(value: &Value, into: &mut BTreeSet<u64>) {
    match value {
        Value::String(text) => into.extend(hashes(text)),
        Value::Array(values) => values.iter().for_each(|value| add_texts(value, into)),
        Value::Object(object) => {
            object.iter().filter(|(key, _)| *key != "role").for_each(|(_, value)| add_texts(value, into));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The hashes of a text's sentences.
fn hashes(text: &str) -> impl Iterator<Item = u64> {
    sentences(text).into_iter().map(|sentence| {
        let digest = Sha256::digest(sentence.as_bytes());
        digest.iter().take(HASH_DIGITS / 2).fold(0, |hash, byte| hash << 8 | u64::from(*byte))
    })
}

/// The sentences of a text, each reduced to its letters and digits in lower case; what has none is left out.
fn sentences(text: &str) -> Vec<String> {
    let (mut sentences, mut sentence, mut ends) = (Vec::new(), String::new(), false);
    for c in text.chars() {
        if c == '\n' || (ends && c.is_whitespace()) {
            sentences.push(std::mem::take(&mut sentence));
        }
        if c.is_alphanumeric() {
            sentence.extend(c.to_lowercase());
        }
        ends = matches!(c, '.' | '!' | '?' | ':' | ';' | '。' | '！' | '？');
    }
    sentences.push(sentence);
    sentences.retain(|sentence| !sentence.is_empty());
    sentences
}

/// The calibration items of a model.
#[derive(Clone, Debug)]
pub struct CalibrationItems {
    model: String,
    /// For each hash the items that have it, in ascending order.
    items: HashMap<u64, Vec<usize>>,
}

impl CalibrationItems {
    /// Reads fingerprints; `model` is the name that a refusal gives. `None` if one is none.
    pub fn new<'a>(model: &str, fingerprints: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let mut items: HashMap<u64, Vec<usize>> = HashMap::new();
        for (index, fingerprint) in fingerprints.into_iter().enumerate() {
            for hash in fingerprint.split_whitespace() {
                items.entry(u64::from_str_radix(hash, 16).ok()?).or_default().push(index);
            }
        }
        Some(CalibrationItems { model: model.to_owned(), items })
    }

    /// The calibration items that have all sentences of `text`; none if it has no sentence.
    fn with(&self, text: &str) -> Vec<usize> {
        let mut found: Option<Vec<usize>> = None;
        for hash in hashes(text) {
            let with_hash = self.items.get(&hash).map_or(&[][..], Vec::as_slice);
            found = Some(match found {
                None => with_hash.to_vec(),
                Some(found) => found.into_iter().filter(|item| with_hash.binary_search(item).is_ok()).collect(),
            });
        }
        found.unwrap_or_default()
    }

    /// Whether an item that asks `question` and answers `answer` (which may be empty) is one of them.
    pub fn has(&self, question: &str, answer: &str) -> bool {
        self.knows(&Identity::new(question, answer))
    }

    fn knows(&self, identity: &Identity) -> bool {
        identity.questions.iter().any(|question| {
            let found = self.with(question);
            let is_specific = question.split_whitespace().count() >= SPECIFIC_WORDS;
            let beside = |text: &String| self.with(text).iter().any(|item| found.contains(item));
            !found.is_empty() && (is_specific || identity.beside.iter().any(beside))
        })
    }
}

/// By which texts an item is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    /// What is asked, in any of several wordings.
    pub(crate) questions: Vec<String>,
    /// What stands beside it: answers, a passage.
    pub(crate) beside: Vec<String>,
}

impl Identity {
    /// A question and its answer.
    pub(crate) fn new(question: &str, answer: &str) -> Self {
        Identity { questions: vec![question.to_owned()], beside: vec![answer.to_owned()] }
    }
}

/// Refuses test items that a model was calibrated on, or counts them where they are allowed.
pub(crate) fn check_items<'a>(
    task: &'static str,
    options: &TaskOptions<'_>,
    items: &'a Items,
    identity: impl Fn(Item<'a>) -> Result<Identity, EvalError>,
) -> Result<CalibrationCount, EvalError> {
    let mut known = Vec::new();
    for item in items.iter().filter(|_| !options.items.calibration.is_empty()) {
        let identity = identity(item)?;
        known.extend(options.items.calibration.iter().find(|c| c.knows(&identity)).map(|c| (item, &c.model)));
    }
    match known.first() {
        Some((item, model)) if !options.items.allow_calibration_items => Err(EvalError::CalibrationItem {
            task,
            path: item.path.to_owned(),
            line: item.line,
            index: item.index,
            others: known.len() - 1,
            model: (*model).clone(),
        }),
        _ => Ok(CalibrationCount(known.len())),
    }
}

/// How many test items were calibration items.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CalibrationCount(usize);

impl CalibrationCount {
    /// Tells it, if it is any.
    pub(crate) fn tell(self, details: &mut Map<String, Value>) {
        if self.0 > 0 {
            details.insert("calibration_items".to_owned(), self.0.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUESTION: &str =
        "Natalia sold 48 clips in April. In May, she sold half as many.\nHow many did she sell altogether?";

    fn calibrated(items: &[Value]) -> CalibrationItems {
        let prints: Vec<String> = items.iter().map(|item| fingerprint(item.as_object().unwrap())).collect();
        CalibrationItems::new("model", prints.iter().map(String::as_str)).unwrap()
    }

    fn knows(item: Value, question: &str, beside: &[&str]) -> bool {
        let beside = beside.iter().map(|s| (*s).to_owned()).collect();
        // Another item before and after, so that sentences of several items never make up a question.
        let other = |text: &str| serde_json::json!({"text": text});
        let items = [other("How many did she sell altogether?"), item, other("Natalia sold 48 clips in April.")];
        calibrated(&items).knows(&Identity { questions: vec![question.to_owned()], beside })
    }

    #[test]
    fn texts_are_cut_and_reduced_the_same_way_everywhere() {
        assert_eq!(sentences(" Q: It's 3.5 $! Is  it?\r\n\n- YES;no "), ["q", "its35", "isit", "yesno"]);
        assert!(sentences(" ...\n").is_empty());
        assert_eq!(text_fingerprint("A b. A B!").len(), HASH_DIGITS, "a sentence counts once");
        assert_eq!(
            text_fingerprint("a\nb"),
            fingerprint(serde_json::json!({"x": [{"y": "B"}, "A"]}).as_object().unwrap())
        );
    }

    #[test]
    fn a_question_is_found_in_every_shape_of_calibration() {
        use serde_json::json;
        let around = format!("# singer(id, name);\nQuestion: {}\nAnswer:", QUESTION.to_uppercase());
        for item in [
            json!({"question": QUESTION, "answer": "72"}),
            json!({"prompt": around, "completion": "72"}),
            json!({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": around}]}),
            json!({"text": format!("Question: Another?\nAnswer: 1\n\nQuestion: {QUESTION}\nAnswer: 48 + 24\n#### 72")}),
        ] {
            assert!(knows(item.clone(), QUESTION, &[]), "{item}");
        }
        assert!(!knows(
            json!({"text": "Natalia sold 48 clips in April. In May, she sold half as many."}),
            QUESTION,
            &[]
        ));
        assert!(!knows(json!({"text": "In May, she sold half as many."}), QUESTION, &[]), "not from several items");
        assert!(!knows(json!({"text": ""}), "", &[]));
    }

    #[test]
    fn a_short_question_needs_an_answer_beside_it() {
        let prompt = "Which is true?\nA. Water is wet.\nB. Fire is cold.\nAnswer:";
        let item = || serde_json::json!({"prompt": prompt, "completion": " A"});
        assert!(knows(item(), "Which is true?", &["Gold is red", "Fire is cold."]));
        assert!(!knows(item(), "Which is true?", &["Gold is red"]));
        assert!(!knows(item(), "Which is true?", &[]));
    }

    #[test]
    fn what_is_no_fingerprint_is_refused() {
        assert!(CalibrationItems::new("model", ["0123456789ab cdef01234567"]).is_some());
        assert!(CalibrationItems::new("model", ["0123456789ab", "no"]).is_none());
    }
}
