//! Items that a model is measured on because none of them shaped it: those of a file that the calibration did not draw.

use crate::error::PipelineError;
use crate::recipe::CalibrationInput;
use crate::samples::{
    Item, Sequence, is_jsonl, numbered_lines, read_line, read_text, sequence_of, shuffled, windows_of,
};
use std::collections::HashSet;
use tailorq_eval::{CalibrationItems, ScoredItem, fingerprint, text_fingerprint};
use tailorq_model::OpenedModel;

/// Held-out items, and why others are not among them.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeldOut {
    /// The items; of those with a completion that alone is scored.
    pub(crate) items: Vec<ScoredItem>,
    /// Items that were passed over because they are calibration items, or one of these over again.
    pub(crate) known: usize,
    /// Items without a token to score within the sequence length.
    pub(crate) empty: usize,
}

/// Up to `n` items of `input.file`, chosen by `input.seed`, rendered and tokenized like calibration items. `calibrated` are
/// the fingerprints of items that are none of them.
pub(crate) fn load_held_out(
    opened: &OpenedModel,
    input: &CalibrationInput,
    calibrated: &[String],
    n: usize,
) -> Result<HeldOut, PipelineError> {
    let text = read_text(opened, input)?;
    let mut seen = Seen::new(calibrated);
    let mut found = HeldOut::default();
    if is_jsonl(&input.file, &text) {
        let lines = numbered_lines(&text);
        for idx in shuffled(lines.len(), input.seed) {
            if found.items.len() >= n {
                break;
            }
            let (object, _, item) = read_line(input, lines[idx])?;
            let (question, answer) = question_of(&item);
            if seen.is_new(fingerprint(&object), &question, &answer) {
                found.add(scored_item(opened, sequence_of(opened, input, item, &mut false)?));
            } else {
                found.known += 1;
            }
        }
    } else {
        let ids = opened.tokenizer.encode(&text, true)?;
        let windows = windows_of(&ids, input.sequence_length);
        for idx in shuffled(windows.len(), input.seed) {
            if found.items.len() >= n {
                break;
            }
            let printed = opened.tokenizer.decode(windows[idx], true)?;
            if seen.is_new(text_fingerprint(&printed), &printed, "") {
                found.add(whole(windows[idx].to_vec()));
            } else {
                found.known += 1;
            }
        }
    }
    Ok(found)
}

impl HeldOut {
    fn add(&mut self, item: Option<ScoredItem>) {
        match item {
            Some(item) => self.items.push(item),
            None => self.empty += 1,
        }
    }
}

/// Which items are known already.
struct Seen {
    calibrated: CalibrationItems,
    fingerprints: HashSet<String>,
}

impl Seen {
    fn new(calibrated: &[String]) -> Self {
        let items = CalibrationItems::new("the calibration", calibrated.iter().map(String::as_str));
        let items = items.expect("these are fingerprints that were just made");
        Seen { calibrated: items, fingerprints: calibrated.iter().cloned().collect() }
    }

    /// Whether an item is neither a calibration item, in these or other words around its question, nor one that was here
    /// before.
    fn is_new(&mut self, fingerprint: String, question: &str, answer: &str) -> bool {
        !self.calibrated.has(question, answer) && self.fingerprints.insert(fingerprint)
    }
}

/// What is scored of an item: its completion up to and with the token that ends the turn, which is the last that a model is
/// ever asked for, or all tokens but the first.
fn scored_item(opened: &OpenedModel, sequence: Sequence) -> Option<ScoredItem> {
    let Sequence { mut ids, completion, .. } = sequence;
    let Some(flags) = completion else { return whole(ids) };
    let first = flags.iter().position(|&f| f)?.max(1);
    if let Some(end) = ids[first..].iter().position(|id| opened.tokenizer.eos.contains(id)) {
        ids.truncate(first + end + 1);
    }
    (first < ids.len()).then_some(ScoredItem { ids, first })
}

/// All tokens but the first.
fn whole(ids: Vec<u32>) -> Option<ScoredItem> {
    (ids.len() >= 2).then_some(ScoredItem { ids, first: 1 })
}

/// What an item asks and what it answers; a text asks all that it says.
fn question_of(item: &Item) -> (String, String) {
    match item {
        Item::Text(text) => (text.clone(), String::new()),
        Item::Messages(messages) => {
            let said = |role: &str| -> Vec<&str> {
                messages.iter().filter(|m| m.role == role).map(|m| m.content.as_str()).collect()
            };
            (said("user").join("\n"), said("assistant").last().copied().unwrap_or_default().to_owned())
        }
    }
}
