//! An evaluation that was stopped and goes on gives what it would have given in one go, to the bit.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod inputs;

use inputs::{subject, tiny};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::Path;
use tailorq_eval::{Cache, EvalError, ItemOptions, ItemRecord, TaskOptions, task};
use tailorq_model::OpenedModel;

struct Bench {
    model: OpenedModel,
    reference: OpenedModel,
    data: tempfile::TempDir,
    text: String,
}

/// A result and its log as JSON.
type Outcome = Result<(Value, Vec<Value>), EvalError>;

impl Bench {
    fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        let write = |name: &str, row: &dyn Fn(usize) -> Value, n: usize| {
            let path = data.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, (0..n).map(|i| row(i).to_string() + "\n").collect::<String>()).unwrap();
        };
        let arc = |i: usize| json!({"question": format!("Item {i} {}?", "long ".repeat(i % 7 * 9)), "choices": {"text": ["a", "b and more"], "label": ["A", "B"]}, "answerKey": "A"});
        write("arc_easy/test.jsonl", &arc, 14);
        write("arc_easy/train.jsonl", &arc, 20);
        // The examples of a subject are a long beginning that its items share.
        let mmlu = |i: usize| json!({"subject": if i.is_multiple_of(2) { "anatomy" } else { "virology" }, "question": format!("Which {i}? {}", "So ".repeat(40)), "choices": ["w", "x", "y", "z"], "answer": i % 4});
        write("mmlu/test.jsonl", &mmlu, 12);
        write("mmlu/dev.jsonl", &mmlu, 6);
        let gsm8k = |i: usize| json!({"question": format!("What is {i} + 1?"), "answer": format!("#### {}", i + 1)});
        write("gsm8k/test.jsonl", &gsm8k, 15);
        write("texts.jsonl", &|i| json!({"text": "Some text. ".repeat(1 + i)}), 5);
        Bench {
            model: tiny(5, |_| {}),
            reference: tiny(6, |_| {}),
            data,
            text: "A text that is long enough. ".repeat(12),
        }
    }

    /// Runs a task, and stops at the `stop`-th step.
    fn run(&self, name: &str, referenced: bool, cache: Option<Cache<'_>>, stop: usize) -> Outcome {
        let device = tailorq_kernels::cpu();
        let data = if name == "rolling" { self.data.path().join("texts.jsonl") } else { self.data.path().to_owned() };
        let log = RefCell::new(Vec::new());
        let write = |record: &ItemRecord| log.borrow_mut().push(serde_json::to_value(record).unwrap());
        let shots = if name == "mmlu" { 3 } else { 2 };
        let options = TaskOptions {
            text: name.starts_with("perplexity").then_some(&self.text),
            window: Some(24),
            reference: referenced.then(|| subject("other", &self.reference, device.as_ref())),
            items: ItemOptions {
                data: Some(&data),
                num_fewshot: Some(shots),
                max_tokens: Some(5),
                cache,
                log: Some(&write),
                ..ItemOptions::default()
            },
            ..TaskOptions::default()
        };
        let mut steps = 0;
        let result =
            task::find(name).unwrap().run(&subject("tiny", &self.model, device.as_ref()), &options, &mut |_, _| {
                steps += 1;
                if steps > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })?;
        Ok((json!([result, result.parts]), log.into_inner()))
    }
}

const TASKS: [(&str, bool); 9] = [
    ("arc_easy", true),
    ("mmlu", false),
    ("gsm8k_chat", false),
    ("gsm8k_nll", false),
    ("rolling", false),
    ("wikitext", false),
    ("perplexity", false),
    ("perplexity", true),
    ("perplexity_llamacpp", false),
];

fn cache<'a>(folder: &'a Path, reference: bool) -> Option<Cache<'a>> {
    Some(Cache { folder, model: "hash of the model", reference: reference.then_some("hash of the reference") })
}

#[test]
fn a_stopped_run_goes_on_to_the_same_end() {
    let bench = Bench::new();
    std::fs::create_dir_all(bench.data.path().join("wikitext2")).unwrap();
    let pages: String = (0..4).map(|i| format!(" = Page {i} = \n\n Text of page {i} .\n\n")).collect();
    std::fs::write(bench.data.path().join("wikitext2/wiki.test.raw.txt"), pages).unwrap();
    for (name, referenced) in TASKS {
        let whole = bench.run(name, referenced, None, usize::MAX).unwrap();
        for stop in [1, 2, 5] {
            let folder = tempfile::tempdir().unwrap();
            let mut tries = 0;
            let resumed = loop {
                match bench.run(name, referenced, cache(folder.path(), referenced), stop + 2 * tries) {
                    Err(EvalError::Interrupted) => tries += 1,
                    other => break other.unwrap(),
                }
            };
            assert_eq!(resumed, whole, "{name}, stopped {tries} times, first at step {stop}");
            let again = bench.run(name, referenced, cache(folder.path(), referenced), usize::MAX).unwrap();
            assert_eq!(again, whole, "{name}, all finished");
        }
    }
}

#[test]
fn finished_items_are_not_computed_again() {
    let mut bench = Bench::new();
    let folder = tempfile::tempdir().unwrap();
    for (name, referenced) in TASKS.into_iter().filter(|(name, _)| *name != "wikitext") {
        let whole = bench.run(name, referenced, cache(folder.path(), referenced), usize::MAX).unwrap();
        let norm = std::mem::replace(&mut bench.model.model.norm[0], f32::NAN);
        let reference_norm = std::mem::replace(&mut bench.reference.model.norm[0], f32::NAN);
        let again = bench.run(name, referenced, cache(folder.path(), referenced), usize::MAX);
        assert_eq!(again.unwrap(), whole, "{name}");
        let other = Cache { model: "hash of another model", ..cache(folder.path(), referenced).unwrap() };
        if !name.starts_with("gsm8k_chat") {
            assert!(
                bench.run(name, referenced, Some(other), usize::MAX).is_err(),
                "{name}: another model, other items"
            );
        }
        bench.model.model.norm[0] = norm;
        bench.reference.model.norm[0] = reference_norm;
    }
    // What a model gave as the reference is there when it is the model itself.
    let itself = Cache { folder: folder.path(), model: "hash of the reference", reference: None };
    let alone = bench.run("arc_easy", false, None, usize::MAX).unwrap();
    let files = || std::fs::read_dir(folder.path()).unwrap().count();
    let before = files();
    let other = bench.run("arc_easy", false, Some(itself), usize::MAX).unwrap();
    assert_eq!(files(), before);
    assert_ne!(other, alone);
}

#[test]
fn a_file_whose_content_is_anothers_is_refused() {
    let bench = Bench::new();
    let folder = tempfile::tempdir().unwrap();
    bench.run("gsm8k_nll", false, cache(folder.path(), false), usize::MAX).unwrap();
    let path = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let lines = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, lines.replacen("hash of the model", "hash of a model", 1)).unwrap();
    let message = bench.run("gsm8k_nll", false, cache(folder.path(), false), usize::MAX).unwrap_err().to_string();
    assert!(message.contains("another model") && message.contains("delete it"), "{message}");
}
