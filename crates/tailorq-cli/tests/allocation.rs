//! Budgets, scores and plans from the command line.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use tailorq_model::testing::TinyModel;

fn run(dir: &Path, line: &str) -> Output {
    let words = line.split_whitespace();
    Command::new(env!("CARGO_BIN_EXE_tailorq")).args(words).current_dir(dir).output().unwrap()
}

fn json(dir: &Path, line: &str) -> Value {
    let output = run(dir, &format!("{line} --json"));
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn fails(dir: &Path, code: i32, line: &str, words: &str) {
    let output = run(dir, line);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{line}: {message}");
    assert!(message.contains(words), "{line}: no '{words}' in: {message}");
}

fn place() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut model = TinyModel::new("llama", 1).unwrap();
    model.config.n_blocks = 4;
    model.write_directory(&dir.path().join("model")).unwrap();
    let line = |i| format!("{{\"prompt\": \"what is {i} and {i}?\", \"completion\": \"it is {}\"}}\n", 2 * i);
    std::fs::write(dir.path().join("task.jsonl"), (0..6).map(line).collect::<String>()).unwrap();
    dir
}

#[test]
fn the_one_liner_is_score_plan_and_quantize() {
    let place = place();
    let dir = place.path();
    let data = "--task-data task.jsonl --samples 4 --group 32";
    json(dir, &format!("quantize model --method taqo --bits-per-weight 3.2 --prompts 2 {data} --output one"));
    let scores = json(dir, &format!("score model --signal taqo --prompts 2 {data} --output scores.json"));
    assert_eq!(scores["units"].as_array().unwrap().len(), 4);
    assert_eq!(scores["units"][0]["candidates"][3]["bits"], 8);
    let plan = json(dir, "plan --scores scores.json --bits-per-weight 3.2 --output plan.safetensors");
    assert!(plan["plan"]["bits_per_weight"].as_f64().unwrap() <= 3.2);
    assert_eq!(plan["rule"], "knapsack");
    json(dir, &format!("quantize model --plan plan.safetensors {data} --output two"));
    let weights = |name: &str| std::fs::read(dir.join(name).join("model.safetensors")).unwrap();
    assert!(weights("one") == weights("two"));
    let recipe = std::fs::read_to_string(dir.join("two/recipe.toml")).unwrap();
    assert!(recipe.contains("[plan]") && recipe.contains("plan.safetensors"), "{recipe}");
    // Tables for people.
    let text = run(dir, "plan --scores scores.json --rule top-share --share 25% --output plan.safetensors");
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("block 0") && text.contains("bits per weight"), "{text}");
    let dry = json(
        dir,
        &format!("quantize model --method gptq --allocate damage --bits-per-weight 3 {data} --output dry --dry-run"),
    );
    assert_eq!(dry["recipe"]["allocation"]["score"]["signal"], "damage");
    assert!((dry["estimate"]["linear_bits_per_weight"].as_f64().unwrap() - 3.0).abs() < 0.01);
    let settled = json(dir, &format!("quantize model --method tacq --bits-per-weight 2.9 {data} --output tacq"));
    assert!(settled["size"]["linear_bits_per_weight"].as_f64().unwrap() <= 2.9);
}

#[test]
fn command_lines_that_cannot_work_are_refused() {
    let place = place();
    let dir = place.path();
    let to = |rest: &str| format!("quantize model --task-data task.jsonl --output out {rest}");
    fails(dir, 2, &to("--bits 3 --bits-per-weight 2.5"), "cannot be used with");
    fails(dir, 2, &to("--method taqo --bits 3"), "--widths");
    fails(dir, 2, &to("--method gptq --widths 2,4"), "--allocate");
    fails(dir, 2, &to("--method taq-paper --bits-per-weight 5"), "knows no budget");
    fails(dir, 2, &to("--method taqo --widths 4,5"), "5 bits");
    fails(dir, 2, &to("--method taqo --bits-per-weight 1"), "least possible");
    fails(dir, 2, &to("--allocate magic"), "taq-is");
    fails(dir, 2, "score model --bits 3 --task-data task.jsonl --output s.json", "--widths");
    fails(dir, 2, "score model --output s.json", "--calibration");
    fails(dir, 1, "plan --scores nothing.json --bits-per-weight 3 --output p", "nothing.json");
    fails(dir, 2, &to("--plan p --allocate damage"), "cannot be used with");
}
