//! Tasks of choices: folders, examples, logs and results on a tiny model; log-likelihoods of real checkpoints.
//!
//! `TAILORQ_TEST_MODELS`, `TAILORQ_TEST_GOLDEN` and `TAILORQ_TEST_DATA` name the directories of checkpoints, reference numbers
//! and data sets; without them the last test says that it was skipped.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may stop where it stands and say why it was skipped"
)]

mod inputs;

use inputs::{open, subject, tiny};
use serde_json::Value;
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use tailorq_eval::{EvalError, ItemOptions, ItemRecord, PromptStyle, TaskOptions, TaskResult, task};
use tailorq_model::OpenedModel;

/// The result and the records, in the order in which they came.
fn run(
    name: &str,
    opened: &OpenedModel,
    reference: Option<&OpenedModel>,
    items: ItemOptions<'_>,
) -> Result<(TaskResult, Vec<ItemRecord>), EvalError> {
    let device = tailorq_kernels::cpu();
    let records = RefCell::new(Vec::new());
    let log = |record: &ItemRecord| records.borrow_mut().push(record.clone());
    let options = TaskOptions {
        reference: reference.map(|r| subject("original", r, device.as_ref())),
        items: ItemOptions { log: Some(&log), ..items },
        ..TaskOptions::default()
    };
    let (mut before, mut last) = (0, (0, 0));
    let result =
        task::find(name).unwrap().run(&subject("tiny", opened, device.as_ref()), &options, &mut |done, total| {
            assert!(done >= before && done <= total);
            (before, last) = (done, (done, total));
            ControlFlow::Continue(())
        })?;
    assert_eq!(last.0, last.1, "progress ends at its end");
    Ok((result, records.into_inner()))
}

fn write(folder: &Path, name: &str, lines: &[String]) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, lines.join("\n")).unwrap();
}

fn arc_row(i: usize) -> String {
    let (gold, n) = (["A", "B", "C"][i % 3], "x".repeat(i % 5));
    format!(
        r#"{{"question": "Item {i}?", "choices": {{"text": ["a{n}", "b and more", "c{i}"], "label": ["A", "B", "C"]}}, "answerKey": "{gold}"}}"#
    )
}

fn arc_folder(n: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "arc_easy/test.jsonl", &(0..n).map(arc_row).collect::<Vec<_>>());
    write(dir.path(), "arc_easy/calib.jsonl", &(100..130).map(arc_row).collect::<Vec<_>>());
    dir
}

#[test]
fn results_and_logs_have_the_harness_shape() {
    let (dir, model) = (arc_folder(20), tiny(5, |_| {}));
    let items = ItemOptions { data: Some(dir.path()), limit: Some(12), ..ItemOptions::default() };
    let (result, records) = run("arc_easy", &model, None, items).unwrap();
    assert_eq!(records.len(), 12);
    let mut right = [0.0, 0.0];
    for (i, record) in records.iter().enumerate() {
        assert_eq!((record.task, record.index, record.gold.clone()), ("arc_easy", i, Some((i % 3).into())));
        let sums = record.loglikelihoods.as_ref().unwrap();
        let best = |values: &[f64]| (0..values.len()).fold(0, |b, i| if values[i] > values[b] { i } else { b });
        assert_eq!(record.prediction, Some(best(sums).into()));
        let lengths = [1 + i % 5, 10, format!("c{i}").len()];
        let by_length: Vec<f64> = sums.iter().zip(lengths).map(|(s, l)| s / l as f64).collect();
        assert_eq!(record.scores["prediction_norm"], best(&by_length));
        for (at, (metric, prediction)) in [("acc", best(sums)), ("acc_norm", best(&by_length))].into_iter().enumerate()
        {
            assert_eq!(record.scores[metric], u8::from(prediction == i % 3));
            right[at] += f64::from(u8::from(prediction == i % 3));
        }
    }
    let details = &result.details;
    assert_eq!(result.value, right[0] / 12.0);
    assert_eq!(details["acc,none"], right[0] / 12.0);
    assert_eq!(details["acc_norm,none"], right[1] / 12.0);
    let p = right[0] / 12.0;
    assert!((details["acc_stderr,none"].as_f64().unwrap() - (p * (1.0 - p) / 11.0).sqrt()).abs() < 1e-12);
    let interval: Vec<f64> = serde_json::from_value(details["acc_interval95,none"].clone()).unwrap();
    assert!(interval[0] < p && p < interval[1]);
    let line: Value = serde_json::to_value(&records[0]).unwrap();
    assert!(line["loglikelihoods"].is_array() && line.get("completion").is_none());
}

#[test]
fn examples_change_scores_and_need_a_pool() {
    let (dir, model) = (arc_folder(4), tiny(5, |_| {}));
    let with = |n| {
        run("arc_easy", &model, None, ItemOptions { data: Some(dir.path()), num_fewshot: n, ..ItemOptions::default() })
    };
    let (none, three) = (with(None).unwrap(), with(Some(3)).unwrap());
    assert_ne!(none.1[0].loglikelihoods, three.1[0].loglikelihoods);
    assert_eq!((&none.0.details["num_fewshot"], &three.0.details["num_fewshot"]), (&0.into(), &3.into()));
    assert_eq!(with(Some(0)).unwrap().1, none.1);
    let message = with(Some(31)).unwrap_err().to_string();
    assert!(message.contains("calib.jsonl holds 30 items"), "{message}");
}

#[test]
fn a_chat_is_asked_in_one_turn_or_in_several() {
    let (dir, mut model) = (arc_folder(4), tiny(5, |_| {}));
    let items = ItemOptions { data: Some(dir.path()), num_fewshot: Some(2), ..ItemOptions::default() };
    let with = |model: &OpenedModel, style| run("arc_easy", model, None, ItemOptions { style, ..items });
    let [text, chat, turns] =
        [PromptStyle::Text, PromptStyle::Chat, PromptStyle::ChatOfTurns].map(|style| with(&model, style).unwrap());
    assert_ne!(text.1[0].loglikelihoods, chat.1[0].loglikelihoods);
    assert_ne!(turns.1[0].loglikelihoods, chat.1[0].loglikelihoods);
    assert_eq!(
        (text.0.details.get("apply_chat_template"), &chat.0.details["fewshot_as_multiturn"]),
        (None, &false.into())
    );
    assert_eq!(turns.0.details["fewshot_as_multiturn"], true);
    // The space before an answer goes; the line break that ends the template's text belongs to the continuation.
    assert_eq!(text.0.tokens, chat.0.tokens);
    model.template = None;
    assert!(matches!(with(&model, PromptStyle::Chat), Err(EvalError::NoTemplate { .. })));
}

#[test]
fn flips_are_counted_against_the_reference() {
    let (dir, model, other) = (arc_folder(20), tiny(5, |_| {}), tiny(6, |_| {}));
    let items = ItemOptions { data: Some(dir.path()), ..ItemOptions::default() };
    let (result, records) = run("arc_easy", &model, Some(&other), items).unwrap();
    let (of_other, _) = run("arc_easy", &other, None, items).unwrap();
    let flips = &result.details["flips"];
    let count = |right: bool, reference_right: bool| {
        let is = |r: &&ItemRecord, prediction: &Value| Some(prediction) == r.gold.as_ref();
        let hits = records.iter().filter(|r| is(r, r.prediction.as_ref().unwrap()) == right);
        hits.filter(|r| is(r, &r.scores["reference_prediction"]) == reference_right).count()
    };
    assert_eq!(flips["right_to_wrong"], count(false, true));
    assert_eq!(flips["wrong_to_right"], count(true, false));
    assert!(count(false, true) + count(true, false) > 0, "the models differ");
    assert_eq!(flips["reference_acc"], of_other.value);
    let (same, _) = run("arc_easy", &model, Some(&model), items).unwrap();
    for key in ["right_to_wrong", "wrong_to_right", "changed_predictions"] {
        assert_eq!(same.details["flips"][key], 0);
    }
}

#[test]
fn mmlu_reports_subjects_and_groups() {
    let row = |subject: &str, i: usize| {
        format!(
            r#"{{"subject": "{subject}", "question": "Q{i}?", "choices": ["{i}", "b", "c", "d"], "answer": {}}}"#,
            i % 4
        )
    };
    let dir = tempfile::tempdir().unwrap();
    let subjects = ["anatomy", "virology", "anatomy", "astronomy", "anatomy"];
    let test: Vec<String> = subjects.iter().enumerate().map(|(i, s)| row(s, i)).collect();
    write(dir.path(), "mmlu/test.jsonl", &test);
    let dev: Vec<String> = (0..9).map(|i| row(["anatomy", "virology", "astronomy"][i % 3], 10 + i)).collect();
    write(dir.path(), "mmlu/dev.jsonl", &dev);
    let model = tiny(5, |_| {});
    let with =
        |n| run("mmlu", &model, None, ItemOptions { data: Some(dir.path()), num_fewshot: n, ..ItemOptions::default() });
    let (result, records) = with(Some(3)).unwrap();
    let names: Vec<&str> = result.parts.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["mmlu_stem", "mmlu_other", "mmlu_anatomy", "mmlu_astronomy", "mmlu_virology"]);
    let hit = |i: usize| f64::from(u8::from(records[i].prediction == records[i].gold));
    assert_eq!(result.parts[0].1["acc,none"], (hit(0) + hit(2) + hit(3) + hit(4)) / 4.0);
    assert_eq!(result.value, (0..5).map(hit).sum::<f64>() / 5.0);
    assert_ne!(with(None).unwrap().1[0].loglikelihoods, records[0].loglikelihoods);
    let message = with(Some(4)).unwrap_err().to_string();
    assert!(
        message.contains("(item 0) is of the subject 'anatomy'") && message.contains("3 examples, not 4"),
        "{message}"
    );
}

#[test]
fn missing_and_bad_data_are_named() {
    let model = tiny(5, |_| {});
    let dir = tempfile::tempdir().unwrap();
    let at = ItemOptions { data: Some(dir.path()), ..ItemOptions::default() };
    assert!(matches!(
        run("piqa", &model, None, ItemOptions::default()),
        Err(EvalError::MissingInput { task: "piqa", .. })
    ));
    assert!(run("piqa", &model, None, at).unwrap_err().to_string().contains("piqa/test.jsonl does not exist"));
    write(
        dir.path(),
        "mmlu/test.jsonl",
        &[r#"{"subject": "alchemy", "question": "q", "choices": ["a", "b", "c", "d"], "answer": 0}"#.to_owned()],
    );
    assert!(run("mmlu", &model, None, at).unwrap_err().to_string().contains("alchemy"));
}

/// 1e-3, but for long continuations of low likelihood: the reference took the log-softmax in f32, which alone moves a
/// sum of -157.3757 over 152 thousand words by 1.8e-3 (its own logits agree in f64 to 3e-5).
fn tolerance(sum: f64) -> f64 {
    1e-3_f64.max(2e-5 * sum.abs())
}

fn directories() -> Option<[PathBuf; 3]> {
    let find = |variable: &str| {
        let value = std::env::var(variable).ok().filter(|v| !v.is_empty());
        if value.is_none() {
            println!("skipped: {variable} is not set");
        }
        value.map(PathBuf::from)
    };
    Some([find("TAILORQ_TEST_MODELS")?, find("TAILORQ_TEST_GOLDEN")?, find("TAILORQ_TEST_DATA")?])
}

#[test]
fn real_checkpoints_give_the_reference_log_likelihoods() {
    let Some([models, golden, data]) = directories() else { return };
    let full = std::env::var_os("TAILORQ_TEST_FULL").is_some();
    if !full {
        println!("skipped: all but a few items of the smaller checkpoint, because TAILORQ_TEST_FULL is not set");
    }
    let checkpoints = [
        ("smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("qwen2.5-coder-0.5b", "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf"),
    ];
    for (name, file) in checkpoints.into_iter().take(if full { 2 } else { 1 }) {
        let numbers = std::fs::read(golden.join(format!("{name}.json"))).unwrap();
        let numbers: Value = serde_json::from_slice(&numbers).unwrap();
        let opened = open(&models.join(file));
        let tasks =
            numbers["multiple_choice"].as_object().unwrap().iter().filter_map(|(t, i)| Some((t, i.as_array()?)));
        let mut n_tasks = 0;
        for (task, expected) in tasks {
            let expected = &expected[..if full { expected.len() } else { 3 }];
            let items = ItemOptions { data: Some(&data), limit: Some(expected.len()), ..ItemOptions::default() };
            let (_, records) = run(task, &opened, None, items).unwrap();
            assert_eq!(records.len(), expected.len());
            for (record, expected) in records.iter().zip(expected) {
                assert_eq!(record.gold.as_ref(), Some(&expected["gold"]), "{name} {task} {}", record.index);
                let sums: Vec<f64> = serde_json::from_value(expected["loglikelihoods"].clone()).unwrap();
                let ours = record.loglikelihoods.as_ref().unwrap();
                let close =
                    sums.len() == ours.len() && ours.iter().zip(&sums).all(|(a, b)| (a - b).abs() < tolerance(*b));
                assert!(close, "{name} {task} {}: {ours:?}, not {sums:?}", record.index);
            }
            n_tasks += 1;
        }
        assert!(n_tasks >= 3, "the reference numbers have three data sets");
    }
}
