//! Budgets, scores and plans from the command line.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod inputs;

use inputs::{Place, text};
use tailorq_model::testing::TinyModel;

impl Place {
    fn new() -> Self {
        let mut model = TinyModel::new("llama", 1).unwrap();
        model.config.n_blocks = 4;
        let place = Place::with_models(&[("model", &model)]);
        let line = |i| format!("{{\"prompt\": \"what is {i} and {i}?\", \"completion\": \"it is {}\"}}\n", 2 * i);
        place.write("task.jsonl", (0..6).map(line).collect::<String>());
        place
    }
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[test]
fn the_one_liner_is_score_plan_and_quantize() {
    let place = Place::new();
    let json = |line: &str| place.json(&words(line));
    let data = "--task-data task.jsonl --samples 4 --group 32";
    json(&format!("quantize model --method taqo --bits-per-weight 3.2 --prompts 2 {data} --output one"));
    let scores = json(&format!("score model --signal taqo --prompts 2 {data} --output scores.json"));
    assert_eq!(scores["units"].as_array().unwrap().len(), 4);
    assert_eq!(scores["units"][0]["candidates"][3]["bits"], 8);
    let plan = json("plan --scores scores.json --bits-per-weight 3.2 --output plan.safetensors");
    assert!(plan["plan"]["bits_per_weight"].as_f64().unwrap() <= 3.2);
    assert_eq!(plan["rule"], "knapsack");
    json(&format!("quantize model --plan plan.safetensors {data} --output two"));
    let weights = |name: &str| std::fs::read(place.path(name).join("model.safetensors")).unwrap();
    assert!(weights("one") == weights("two"));
    let recipe = std::fs::read_to_string(place.path("two/recipe.toml")).unwrap();
    assert!(recipe.contains("[plan]") && recipe.contains("plan.safetensors"), "{recipe}");
    // Tables for people.
    let output = place.run(&words("plan --scores scores.json --rule top-share --share 25% --output plan.safetensors"));
    let table = text(&output.stdout);
    assert!(table.contains("block 0") && table.contains("bits per weight"), "{table}");
    let dry = json(&format!(
        "quantize model --method gptq --allocate damage --bits-per-weight 3 {data} --output dry --dry-run"
    ));
    assert_eq!(dry["recipe"]["allocation"]["score"]["signal"], "damage");
    assert!((dry["estimate"]["linear_bits_per_weight"].as_f64().unwrap() - 3.0).abs() < 0.01);
    let settled = json(&format!("quantize model --method tacq --bits-per-weight 2.9 {data} --output tacq"));
    assert!(settled["size"]["linear_bits_per_weight"].as_f64().unwrap() <= 2.9);
}

#[test]
fn a_survey_of_the_same_grid_serves_a_rotated_circuit() {
    let place = Place::new();
    let json = |line: &str| place.json(&words(line));
    let data = "--task-data task.jsonl --samples 4 --loss kl --group 32 --bits 2";
    json(&format!("survey model --transform hadamard --transform-seed 5 {data} --output kl.survey"));
    let run = format!("quantize model --method tacq-hadamard {data} --survey kl.survey");
    place.fails(1, &words(&format!("{run} --output other")), &["another grid"]);
    let written = json(&format!("{run} --transform hadamard --transform-seed 5 --output out"));
    assert_eq!(written["status"], "written");
}

#[test]
fn command_lines_that_cannot_work_are_refused() {
    let place = Place::new();
    let fails = |code, line: &str, said| place.fails(code, &words(line), &[said]);
    let to = |rest: &str| format!("quantize model --task-data task.jsonl --output out {rest}");
    fails(2, &to("--bits 3 --bits-per-weight 2.5"), "cannot be used with");
    fails(2, &to("--method taqo --bits 3"), "--widths");
    fails(2, &to("--method gptq --widths 2,4"), "--allocate");
    fails(2, &to("--method taq-paper --bits-per-weight 5"), "knows no budget");
    fails(2, &to("--method taqo --widths 4,5"), "5 bits");
    fails(2, &to("--method taqo --bits-per-weight 1"), "least possible");
    fails(2, &to("--allocate magic"), "taq-is");
    for unread in ["--loss full", "--loss kl --own-answers", "--survey nothing.survey", "--signal random --loss full"] {
        fails(2, &to(&format!("--method gptq {unread}")), "reads no gradients");
    }
    for unread in ["--damp 0.1", "--act-order", "--shrink 0.1", "--drift 1,0", "--token-weight inverse-norm"] {
        fails(2, &to(&format!("--method rtn {unread}")), "reads no Hessian");
    }
    fails(2, "score model --bits 3 --task-data task.jsonl --output s.json", "--widths");
    fails(2, "score model --output s.json", "--calibration");
    fails(1, "plan --scores nothing.json --bits-per-weight 3 --output p", "nothing.json");
    fails(2, &to("--plan p --allocate damage"), "cannot be used with");
    fails(2, &to("--bits 6"), "2, 3, 4 or 8");
    fails(2, &to("--method tacq --tile-share 5%"), "no salient tiles");
    fails(2, &to("--salient corrections"), "no salient tiles");
    fails(2, &to("--circuit-seed 3"), "--signal random");
    fails(2, &to("--method spqr --bits-per-weight 2.5"), "one size for each width");
    fails(2, "quantize --recipe r.toml --output out --general-data task.jsonl", "cannot be used with");
    fails(2, "quantize --recipe r.toml --output out --general-data task.jsonl --mix 0.5", "cannot be used with");
    fails(2, &to("--own-answers"), "--loss kl");
    fails(2, &to("--tile-seed 3"), "no salient tiles");
    fails(2, "survey model --task-data task.jsonl --output s --transform hadamard", "--loss kl");
    fails(2, "survey model --task-data task.jsonl --output s --loss kl --damp 0.1", "--bits, --group");
}
