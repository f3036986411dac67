//! Calibration text: a plain text file or JSONL in the shapes that people have, as token sequences.

use crate::error::PipelineError;
use crate::recipe::CalibrationInput;
use serde_json::{Map, Value};
use std::path::Path;
use tailorq_eval::{fingerprint, text_fingerprint};
use tailorq_model::{ChatMessage, OpenedModel};
use tailorq_tensor::Rng;

/// Token sequences of a calibration file, and what was done to get them.
#[derive(Clone, Debug)]
pub struct Samples {
    /// One sequence an item.
    pub sequences: Vec<Vec<u32>>,
    /// One an item: which of its tokens belong to a completion; `None` for items without one.
    pub completions: Vec<Option<Vec<bool>>>,
    /// Which shape the items have: `text file`, `prompt and completion`, `messages`, `text`.
    pub shape: &'static str,
    /// Whether the model's chat template rendered them.
    pub chat_template: bool,
    /// Items (or windows) that the file holds.
    pub available: usize,
    /// Items cut to the sequence length.
    pub shortened: usize,
    /// The first item as the model reads it, special tokens visible, for the user to check.
    pub preview: String,
    /// The fingerprint of each sequence's item, by which an evaluation knows it.
    pub fingerprints: Vec<String>,
}

impl Samples {
    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum()
    }

    /// Tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.sequences.iter().map(Vec::len).max().unwrap_or(0)
    }
}

/// Names under which people keep what the user says; the first present wins.
const PROMPT_KEYS: [&str; 3] = ["prompt", "question", "instruction"];
/// Names under which people keep what the model should answer.
const COMPLETION_KEYS: [&str; 4] = ["completion", "answer", "response", "output"];

/// Templates that ask for the date get 26 July 2024 (which those of Llama 3 assume when they get none), so that a recipe
/// gives the same bytes on every day.
const TEMPLATE_TIME: u64 = 1_721_952_000;

/// One item before tokenization.
pub(crate) enum Item {
    Messages(Vec<ChatMessage>),
    Text(String),
}

/// Reads `input.file`, chooses `input.samples` items by `input.seed`, renders and tokenizes them; general text takes the
/// places of the last of them.
pub fn load(opened: &OpenedModel, input: &CalibrationInput) -> Result<Samples, PipelineError> {
    let Some(general) = &input.general else { return load_file(opened, input) };
    let n_general = (general.mix * input.samples as f64).round() as usize;
    let of_file =
        |file: &Path, samples| CalibrationInput { file: file.into(), samples, general: None, ..input.clone() };
    if n_general == 0 {
        return load_file(opened, input);
    }
    let blended = load_file(opened, &of_file(&general.file, n_general))?;
    if blended.sequences.len() < n_general {
        let found = blended.sequences.len();
        let problem =
            format!("has {found} items or windows, the mix asks for {n_general}: lower --mix or give more text");
        return Err(PipelineError::Calibration { path: general.file.clone(), problem });
    }
    if n_general >= input.samples {
        return Ok(blended);
    }
    let mut samples = load_file(opened, &of_file(&input.file, input.samples - n_general))?;
    samples.sequences.extend(blended.sequences);
    samples.completions.extend(blended.completions);
    samples.fingerprints.extend(blended.fingerprints);
    samples.shortened += blended.shortened;
    samples.available += blended.available;
    Ok(samples)
}

/// The items of one file.
fn load_file(opened: &OpenedModel, input: &CalibrationInput) -> Result<Samples, PipelineError> {
    let text = read_text(opened, input)?;
    if is_jsonl(&input.file, &text) { load_items(opened, input, &text) } else { load_windows(opened, input, &text) }
}

/// The text of a file, which holds something.
pub(crate) fn read_text(opened: &OpenedModel, input: &CalibrationInput) -> Result<String, PipelineError> {
    let fail = |problem: String| PipelineError::Calibration { path: input.file.clone(), problem };
    let longest = opened.model.config.max_positions;
    if input.sequence_length > longest {
        let asked = input.sequence_length;
        return Err(fail(format!("--sequence-length {asked} is beyond the model's context of {longest}")));
    }
    let bytes = std::fs::read(&input.file).map_err(|e| fail(format!("cannot be read: {e}")))?;
    let text = String::from_utf8(bytes).map_err(|e| fail(format!("is not UTF-8 text: {e}")))?;
    if text.trim().is_empty() {
        return Err(fail("is empty: calibration needs at least one item".into()));
    }
    Ok(text)
}

/// `.jsonl` and `.json` by name; otherwise by the first character.
pub(crate) fn is_jsonl(path: &Path, text: &str) -> bool {
    match path.extension().and_then(|e| e.to_str()) {
        Some("jsonl" | "json" | "ndjson") => true,
        Some("txt" | "md" | "raw") => false,
        _ => text.trim_start().starts_with('{'),
    }
}

/// The indices of `n` of `available` items, chosen by `seed`, in ascending order.
fn choose(available: usize, n: usize, seed: u64) -> Vec<usize> {
    let mut order = shuffled(available, seed);
    order.truncate(n);
    order.sort_unstable();
    order
}

pub(crate) fn shuffled(available: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..available).collect();
    Rng::new(seed).shuffle(&mut order);
    order
}

/// One item as tokens.
pub(crate) struct Sequence {
    pub(crate) ids: Vec<u32>,
    /// Which of them belong to the completion, if there is one.
    pub(crate) completion: Option<Vec<bool>>,
    /// As the model reads it.
    text: String,
    /// It was cut to the sequence length.
    shortened: bool,
}

pub(crate) fn sequence_of(
    opened: &OpenedModel,
    input: &CalibrationInput,
    mut item: Item,
    templated: &mut bool,
) -> Result<Sequence, PipelineError> {
    if input.drop_calculator_marks {
        drop_calculator_marks(&mut item);
    }
    let Rendered { text, special, prompt } = render(opened, item, templated)?;
    let mut ids = opened.tokenizer.encode(&text, special)?;
    let mut completion = match prompt {
        Some(prompt) => Some(after(&opened.tokenizer.encode(&prompt, special)?, &ids)),
        None => None,
    };
    let shortened = ids.len() > input.sequence_length;
    if shortened {
        ids.truncate(input.sequence_length);
        completion.iter_mut().for_each(|flags| flags.truncate(input.sequence_length));
    }
    Ok(Sequence { ids, completion, text, shortened })
}

/// The lines of a JSONL file that hold something, with their numbers from 1.
pub(crate) fn numbered_lines(text: &str) -> Vec<(usize, &str)> {
    text.lines().enumerate().map(|(i, l)| (i + 1, l)).filter(|(_, l)| !l.trim().is_empty()).collect()
}

/// The object of a line, its shape and its item.
pub(crate) fn read_line(
    input: &CalibrationInput,
    (number, line): (usize, &str),
) -> Result<(Map<String, Value>, &'static str, Item), PipelineError> {
    let fail = |problem: String| {
        let problem = format!("line {number}: {problem}");
        PipelineError::Calibration { path: input.file.clone(), problem }
    };
    let object: Map<String, Value> =
        serde_json::from_str(line).map_err(|e| fail(format!("is not a JSON object: {e}")))?;
    let (shape, item) = read_item(&object).map_err(fail)?;
    Ok((object, shape, item))
}

fn load_items(opened: &OpenedModel, input: &CalibrationInput, text: &str) -> Result<Samples, PipelineError> {
    let lines = numbered_lines(text);
    let chosen = choose(lines.len(), input.samples, input.seed);
    let mut fingerprints = Vec::new();
    let (mut sequences, mut completions) = (Vec::new(), Vec::new());
    let (mut shortened, mut preview, mut shape, mut templated) = (0, String::new(), "", false);
    for idx in chosen {
        let (object, item_shape, item) = read_line(input, lines[idx])?;
        shape = item_shape;
        let sequence = sequence_of(opened, input, item, &mut templated)?;
        if preview.is_empty() {
            preview = sequence.text;
        }
        shortened += usize::from(sequence.shortened);
        if sequence.ids.len() >= 2 {
            sequences.push(sequence.ids);
            fingerprints.push(fingerprint(&object));
            completions.push(sequence.completion);
        }
    }
    if sequences.is_empty() {
        let problem = "no item has two tokens or more".into();
        return Err(PipelineError::Calibration { path: input.file.clone(), problem });
    }
    let available = lines.len();
    Ok(Samples { sequences, completions, shape, chat_template: templated, available, shortened, preview, fingerprints })
}

/// Flags the tokens of `ids` that come after those which it shares with `prompt`.
fn after(prompt: &[u32], ids: &[u32]) -> Vec<bool> {
    let shared = prompt.iter().zip(ids).take_while(|(a, b)| a == b).count();
    (0..ids.len()).map(|t| t >= shared).collect()
}

/// Takes every `<<...>>` out of what the assistant says.
fn drop_calculator_marks(item: &mut Item) {
    let Item::Messages(messages) = item else { return };
    for message in messages.iter_mut().filter(|m| m.role == "assistant") {
        let mut text = String::new();
        let mut rest = message.content.as_str();
        while let Some((before, mark)) = rest.split_once("<<") {
            let Some((_, behind)) = mark.split_once(">>") else { break };
            text.push_str(before);
            rest = behind;
        }
        text.push_str(rest);
        message.content = text;
    }
}

fn read_item(object: &Map<String, Value>) -> Result<(&'static str, Item), String> {
    let string = |keys: &[&str]| keys.iter().find_map(|k| object.get(*k)?.as_str().map(str::to_owned));
    if let Some(messages) = object.get("messages") {
        let messages: Vec<ChatMessage> = serde_json::from_value(messages.clone())
            .map_err(|e| format!("'messages' is not a list of {{\"role\",\"content\"}}: {e}"))?;
        if messages.is_empty() {
            return Err("'messages' is empty".into());
        }
        return Ok(("messages", Item::Messages(messages)));
    }
    if let (Some(prompt), Some(completion)) = (string(&PROMPT_KEYS), string(&COMPLETION_KEYS)) {
        let turn = |role: &str, content: String| ChatMessage { role: role.into(), content };
        return Ok((
            "prompt and completion",
            Item::Messages(vec![turn("user", prompt), turn("assistant", completion)]),
        ));
    }
    // A prompt by itself is one without an answer; beside other texts one of them may be the answer under another name.
    let n_texts = object.values().filter(|v| v.is_string()).count();
    if let (Some(prompt), 1) = (string(&PROMPT_KEYS), n_texts) {
        return Ok(("prompt", Item::Messages(vec![ChatMessage { role: "user".into(), content: prompt }])));
    }
    if let Some(text) = string(&["text"]) {
        return Ok(("text", Item::Text(text)));
    }
    let found: Vec<_> = object.keys().map(String::as_str).collect();
    Err(format!(
        "has the fields [{}]: an item needs \"prompt\" and \"completion\", or \"prompt\" alone, or \"messages\", or \"text\"",
        found.join(", ")
    ))
}

/// An item as the model reads it.
struct Rendered {
    text: String,
    /// Whether the tokenizer shall add its own special tokens (a template writes them itself).
    special: bool,
    /// What comes before the assistant's last turn, if the item ends with one.
    prompt: Option<String>,
}

fn render(opened: &OpenedModel, item: Item, templated: &mut bool) -> Result<Rendered, PipelineError> {
    let messages = match item {
        Item::Text(text) => return Ok(Rendered { text, special: true, prompt: None }),
        Item::Messages(messages) => messages,
    };
    let before = match messages.split_last() {
        Some((last, before)) if last.role == "assistant" && !before.is_empty() => Some(before),
        _ => None,
    };
    // A conversation that waits for an answer is read up to where the answer begins.
    let waits = messages.last().is_some_and(|last| last.role == "user");
    let Some(template) = &opened.template else {
        let lines = |turns: &[ChatMessage]| turns.iter().map(|m| m.content.as_str()).collect::<Vec<_>>().join("\n");
        let end = if waits { "\n" } else { "" };
        let text = lines(&messages) + end;
        return Ok(Rendered { text, special: true, prompt: before.map(|b| lines(b) + "\n") });
    };
    *templated = true;
    let prompt = before.map(|b| template.render_at(b, true, TEMPLATE_TIME)).transpose()?;
    Ok(Rendered { text: template.render_at(&messages, waits, TEMPLATE_TIME)?, special: false, prompt })
}

fn load_windows(opened: &OpenedModel, input: &CalibrationInput, text: &str) -> Result<Samples, PipelineError> {
    let ids = opened.tokenizer.encode(text, true)?;
    let windows = windows_of(&ids, input.sequence_length);
    if ids.len() < 2 {
        let problem = "has fewer than two tokens".into();
        return Err(PipelineError::Calibration { path: input.file.clone(), problem });
    }
    let chosen = choose(windows.len(), input.samples, input.seed);
    let printed = |i: &usize| Ok(text_fingerprint(&opened.tokenizer.decode(windows[*i], true)?));
    Ok(Samples {
        fingerprints: chosen.iter().map(printed).collect::<Result<_, PipelineError>>()?,
        completions: vec![None; chosen.len()],
        sequences: chosen.into_iter().map(|i| windows[i].to_vec()).collect(),
        shape: "text file",
        chat_template: false,
        available: windows.len(),
        shortened: 0,
        preview: text.chars().take(400).collect(),
    })
}

/// Whole windows, or all of a text that is shorter than one.
pub(crate) fn windows_of(ids: &[u32], length: usize) -> Vec<&[u32]> {
    if ids.len() <= length { vec![ids] } else { ids.chunks_exact(length).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(json: &str) -> Result<(&'static str, Item), String> {
        read_item(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn the_shapes_that_people_have_are_read() {
        assert_eq!(item(r#"{"prompt":"a","completion":"b"}"#).ok().unwrap().0, "prompt and completion");
        assert_eq!(item(r#"{"question":"a","answer":"b","idx":3}"#).ok().unwrap().0, "prompt and completion");
        assert_eq!(item(r#"{"messages":[{"role":"user","content":"a"}]}"#).ok().unwrap().0, "messages");
        assert_eq!(item(r#"{"text":"a"}"#).ok().unwrap().0, "text");
        assert_eq!(item(r#"{"id":3,"prompt":"a"}"#).ok().unwrap().0, "prompt");
        for bad in [
            r#"{"foo":1}"#,
            r#"{"messages":[]}"#,
            r#"{"messages":"x"}"#,
            r#"{"prompt":"a","completions":"b"}"#,
            r#"{"text":3}"#,
        ] {
            assert!(item(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn completions_follow_what_is_shared_and_lose_their_marks() {
        assert_eq!(after(&[1, 2, 3], &[1, 2, 3, 4, 5]), [false, false, false, true, true]);
        // A token across the border belongs to the completion.
        assert_eq!(after(&[1, 2, 3], &[1, 2, 9, 4]), [false, false, true, true]);
        let (_, mut found) = item(r#"{"question":"<<a>>?","answer":"4/2 = <<4/2=2>>2, a << b, <<1>>c"}"#).ok().unwrap();
        drop_calculator_marks(&mut found);
        let Item::Messages(messages) = found else { panic!() };
        assert_eq!((messages[0].content.as_str(), messages[1].content.as_str()), ("<<a>>?", "4/2 = 2, a c"));
    }

    #[test]
    fn the_seed_chooses_and_the_order_stays() {
        let a = choose(1000, 10, 1);
        assert_eq!(a, choose(1000, 10, 1));
        assert_ne!(a, choose(1000, 10, 2));
        assert!(a.windows(2).all(|w| w[0] < w[1]));
        assert_eq!(choose(3, 10, 5), [0, 1, 2]);
    }
}
