//! Test items that a model was calibrated on are refused, in every task and in the shapes in which people calibrate.
//!
//! `TAILORQ_TEST_DATA` names the directory of data sets; without it the last test says that it was skipped.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may stop where it stands and say why it was skipped"
)]

mod inputs;

use serde_json::{Map, Value, json};
use std::ops::ControlFlow;
use std::path::Path;
use tailorq_eval::{CalibrationItems, EvalError, ItemOptions, TaskOptions, TaskResult, fingerprint, task};
use tailorq_model::OpenedModel;

fn tiny() -> OpenedModel {
    inputs::tiny(5, |tiny| tiny.config.max_positions = 1024)
}

/// Runs a task; the work stops where the first item would be scored unless `allowed`.
fn run(
    name: &str,
    model: &OpenedModel,
    data: &Path,
    calibration: &[Value],
    allowed: bool,
) -> Result<TaskResult, EvalError> {
    let prints: Vec<String> = calibration.iter().map(|item| fingerprint(item.as_object().unwrap())).collect();
    let known = [CalibrationItems::new("artifact", prints.iter().map(String::as_str)).unwrap()];
    let device = tailorq_kernels::cpu();
    let subject = inputs::subject("tiny", model, device.as_ref());
    let items = ItemOptions {
        data: Some(data),
        limit: Some(200),
        max_tokens: Some(2),
        calibration: &known,
        allow_calibration_items: allowed,
        ..ItemOptions::default()
    };
    let options = TaskOptions { items, ..TaskOptions::default() };
    task::find(name).unwrap().run(&subject, &options, &mut |_, _| match allowed {
        true => ControlFlow::Continue(()),
        false => ControlFlow::Break(()),
    })
}

/// For each task rows of test items and, for the second row, a calibration item in which it stands.
fn cases() -> Vec<(&'static str, &'static str, Value, Value)> {
    let arc = |i: usize| json!({"question": format!("Which of these animals number {i} has six legs?"), "choices": {"text": ["ant", "bat"], "label": ["A", "B"]}, "answerKey": "A"});
    vec![
        (
            "arc_easy",
            "arc_easy/test.jsonl",
            Value::Array((0..3).map(arc).collect()),
            json!({"text": "Question: Which of these animals number 1 has six legs?\nAnswer: ant"}),
        ),
        (
            "mmlu",
            "mmlu/test.jsonl",
            json!([
                {"subject": "anatomy", "question": "Which is a bone?", "choices": ["ulna", "liver", "iris", "skin"], "answer": 0},
                {"subject": "anatomy", "question": "Which is a bone?", "choices": ["tibia", "lung", "lens", "hair"], "answer": 0},
            ]),
            json!({"prompt": "Which is a bone?\nA. tibia\nB. lung\nC. lens\nD. hair\nAnswer:", "completion": " A"}),
        ),
        (
            "winogrande",
            "winogrande/test.jsonl",
            json!([
                {"sentence": "The dog ate, as the _ was hungry.", "option1": "dog", "option2": "man", "answer": "1"},
                {"sentence": "The cup broke when the stone hit it, for the _ was thin.", "option1": "cup", "option2": "stone", "answer": "1"},
            ]),
            json!({"text": "The cup broke when the stone hit it, for the cup was thin."}),
        ),
        (
            "hellaswag",
            "hellaswag/test.jsonl",
            json!([
                {"activity_label": "Food", "ctx": "A man bakes.", "endings": ["He eats.", "He flies."], "label": "0"},
                {"activity_label": "Food", "ctx_a": "How to [step] bake a cake of many layers. [title] Mix.", "ctx_b": "then", "endings": ["eat.", "fly."], "label": "0"},
            ]),
            json!({"messages": [{"role": "user", "content": "Food: How to bake a cake of many layers.. Mix. Then"}, {"role": "assistant", "content": "eat."}]}),
        ),
        (
            "gsm8k_chat",
            "gsm8k/test.jsonl",
            json!([{"question": "Ann has 2 nuts. How many?", "answer": "2\n#### 2"}, {"question": "Bob has 3 nuts and eats one. How many are left?", "answer": "2\n#### 2"}]),
            json!({"messages": [{"role": "user", "content": "Think. Bob has 3 nuts and eats one. How many are left?"}]}),
        ),
        (
            "gsm8k_nll",
            "gsm8k/test.jsonl",
            json!([{"question": "Ann has 2 nuts. How many?", "answer": "2\n#### 2"}, {"question": "Bob has 3 nuts. How many?", "answer": "3 nuts\n#### 3"}]),
            json!({"question": "Bob has 3 nuts. How many?", "answer": "3 nuts\n#### 3"}),
        ),
    ]
}

#[test]
fn every_task_refuses_what_a_model_was_calibrated_on() {
    let model = tiny();
    for (name, file, rows, calibration) in cases() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let lines: Vec<String> = rows.as_array().unwrap().iter().map(Value::to_string).collect();
        std::fs::write(&path, lines.join("\n")).unwrap();
        let calibration = [json!({"text": "Something else."}), calibration];
        let message = run(name, &model, dir.path(), &calibration, false).unwrap_err().to_string();
        for part in ["item 1 of task", name, "test.jsonl line 2", "item of artifact:", "--allow-calibration-items"] {
            assert!(message.contains(part), "{name}: no '{part}' in {message}");
        }
        assert!(matches!(run(name, &model, dir.path(), &calibration[..1], false), Err(EvalError::Interrupted)));
        let result = run(name, &model, dir.path(), &calibration, true).unwrap();
        assert_eq!(result.details["calibration_items"], 1, "{name}");
        let clean = run(name, &model, dir.path(), &calibration[..1], true).unwrap();
        assert_eq!((clean.value, clean.details.get("calibration_items")), (result.value, None), "{name}");
    }
}

#[test]
fn files_of_ones_own_are_looked_through_too() {
    let (model, dir) = (tiny(), tempfile::tempdir().unwrap());
    let path = dir.path().join("mine.jsonl");
    let rows = [json!({"question": "Capital of Peru?", "options": ["Lima", "Rome"], "answer": "A"})];
    std::fs::write(&path, rows[0].to_string()).unwrap();
    let calibration = [json!({"prompt": "Capital of Peru?\n(A) Lima\n(B) Rome", "completion": "A"})];
    assert!(
        matches!(run("jsonl", &model, &path, &calibration, false), Err(EvalError::Interrupted)),
        "'A Lima' is not 'Lima'"
    );
    for calibration in [json!({"prompt": "Capital of Peru?\nA. Lima", "completion": "A"}), rows[0].clone()] {
        assert!(matches!(run("jsonl", &model, &path, &[calibration], false), Err(EvalError::CalibrationItem { .. })));
    }
    let text = json!({"text": "A text of many words that stands in a file of texts, whole."});
    std::fs::write(&path, text.to_string()).unwrap();
    assert!(matches!(run("rolling", &model, &path, &[text], false), Err(EvalError::CalibrationItem { .. })));
}

#[test]
fn real_training_items_pass_and_real_test_items_do_not() {
    let Some(data) = std::env::var_os("TAILORQ_TEST_DATA").filter(|v| !v.is_empty()) else {
        println!("skipped: TAILORQ_TEST_DATA is not set");
        return;
    };
    let (data, model) = (Path::new(&data), tiny());
    for (name, folder) in [
        ("gsm8k_chat", "gsm8k"),
        ("spider", "spider"),
        ("mmlu", "mmlu"),
        ("arc_easy", "arc_easy"),
        ("arc_challenge", "arc_challenge"),
        ("piqa", "piqa"),
        ("boolq", "boolq"),
        ("openbookqa", "openbookqa"),
        ("winogrande", "winogrande"),
        ("hellaswag", "hellaswag"),
    ] {
        let rows = |file: &str| -> Vec<Value> {
            let text = std::fs::read_to_string(data.join(folder).join(file)).unwrap();
            let rows = text.lines().map(|line| serde_json::from_str::<Map<String, Value>>(line).unwrap());
            rows.map(Value::Object).take(512).collect()
        };
        let trained = run(name, &model, data, &rows("calib.jsonl"), false);
        assert!(matches!(trained, Err(EvalError::Interrupted)), "{name}: {trained:?}");
        let tested = run(name, &model, data, &rows("test.jsonl"), false);
        assert!(matches!(tested, Err(EvalError::CalibrationItem { others: 199, .. })), "{name}: {tested:?}");
    }
}
