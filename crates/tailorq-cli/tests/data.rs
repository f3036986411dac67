//! What the command reads as data: data sets of the hub, and held-out items of a quantization.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod inputs;

use inputs::Place;
use serde_json::Value;
use std::path::Path;
use tailorq_model::testing::TinyModel;

impl Place {
    fn new() -> Self {
        Place::with_models(&[("model", &TinyModel::new("llama", 1).unwrap())])
    }
}

#[test]
fn tasks_read_the_hub_s_cache() {
    let place = Place::new();
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tailorq-eval/tests/data");
    let repo = place.path("cache/datasets--allenai--ai2_arc");
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), "abc").unwrap();
    let folder = repo.join("snapshots/abc/ARC-Easy");
    std::fs::create_dir_all(&folder).unwrap();
    let eval = |data: &str, task: &str| {
        let args = ["eval", "model", "--task", task, "--data", data, "--limit", "2"];
        args.map(str::to_owned)
    };
    let args = eval("hub", "arc_easy");
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    place.fails(1, &args, &["allenai/ai2_arc ARC-Easy", "HF_HUB_OFFLINE", "arc_easy/test.jsonl", "--data DIR"]);
    for part in ["00000-of-00002", "00001-of-00002"] {
        let (from, to) = (format!("arc-{part}.parquet"), format!("test-{part}.parquet"));
        std::fs::copy(files.join(from), folder.join(to)).unwrap();
    }
    let of_hub = place.json(&args);
    let own = place.path("own/arc_easy");
    std::fs::create_dir_all(&own).unwrap();
    std::fs::copy(files.join("arc.jsonl"), own.join("test.jsonl")).unwrap();
    let of_folder = place.json(&eval("own", "arc_easy").each_ref().map(String::as_str));
    assert_eq!(of_hub["results"]["arc_easy"], of_folder["results"]["arc_easy"]);
    assert!(of_hub["results"]["arc_easy"]["acc,none"].is_number(), "{of_hub}");
    place.fails(1, &eval("hub", "gsm8k_nll").each_ref().map(String::as_str), &["openai/gsm8k main"]);
    place.fails(1, &eval("hub", "piqa").each_ref().map(String::as_str), &["baber/piqa", "piqa/test.jsonl"]);
    place.fails(2, &eval("hub", "spider").each_ref().map(String::as_str), &["spider", "--data DIR"]);
    place.fails(
        1,
        &["eval", "model", "--task", "wikitext", "--data", "hub"],
        &["Salesforce/wikitext", "wikitext2/test.jsonl"],
    );
    // A data set of one's own choice, by its id.
    let own = ["eval", "model", "--task", "jsonl", "--data", "hub:allenai/ai2_arc:ARC-Easy", "--limit", "2"];
    assert_eq!(place.json(&own)["results"]["jsonl"]["items"], 2);
    // A folder of that name is a folder.
    std::fs::rename(place.path("own"), place.path("hub")).unwrap();
    std::fs::remove_dir_all(place.path("cache")).unwrap();
    assert_eq!(place.json(&args)["results"]["arc_easy"], of_hub["results"]["arc_easy"]);
}

#[test]
fn a_bar_fails_with_1_and_passes_with_its_numbers() {
    let place = Place::new();
    let line = |i: usize| format!("{{\"prompt\": \"how much is {i} and {i}?\", \"completion\": \"{}\"}}\n", 2 * i);
    place.write("task.jsonl", (0..40).map(line).collect::<String>());
    let quantize =
        ["quantize", "model", "--bits", "2", "--group", "32", "--task-data", "task.jsonl", "--output", "out"];
    let with = |more: &[&'static str]| [&quantize[..], more].concat();
    place.fails(1, &with(&["--samples", "39", "--min-retain", "0.5"]), &["1 items to hold out", "--retain-data"]);
    place.fails(2, &with(&["--min-retain", "95", "--samples", "8"]), &["share from 0 to 1"]);
    place.fails(2, &with(&["--retain-data", "task.jsonl"]), &["--min-retain"]);
    assert!(!place.path("out").exists());
    let written = place.json(&with(&["--samples", "8", "--min-retain", "1%"]));
    let share = written["retention"]["share"].as_f64().unwrap();
    assert!(share > 0.01 && written["retention"]["items"] == 32, "{written}");
    let report: Value = serde_json::from_slice(&std::fs::read(place.path("out/report.json")).unwrap()).unwrap();
    assert_eq!(report["retention"], written["retention"]);
}
