//! The command from outside: help, exit codes, bad input, and the shapes of its JSON.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod inputs;

use inputs::{Place, text};
use serde_json::Value;
use std::path::Path;
use std::process::Stdio;
use tailorq_model::testing::TinyModel;

impl Place {
    fn new() -> Self {
        let [one, two] = [1, 2].map(|seed| TinyModel::new("llama", seed).unwrap());
        let place = Place::with_models(&[("model-1", &one), ("model-2", &two)]);
        place.write("text.txt", "Some text that is long enough to be scored. ".repeat(4));
        place
    }
}

fn safetensors_header(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    serde_json::from_slice(&bytes[8..8 + len]).unwrap()
}

#[test]
fn help_has_examples_and_bad_usage_exits_with_2() {
    let place = Place::new();
    for command in ["run", "chat", "bench", "eval", "inspect", "probe", "compare"] {
        let output = place.run(&[command, "--help"]);
        assert_eq!(output.status.code(), Some(0));
        let help = text(&output.stdout);
        assert!(help.contains("Example") && help.contains(&format!("tailorq {command}")), "{help}");
        assert_eq!(place.run(&[command]).status.code(), Some(2), "{command} without a model");
    }
    assert_eq!(place.run(&["--version"]).status.code(), Some(0));
    for bad in [
        &["poem"][..],
        &["run", "model-1", "x", "--bogus"],
        &["run", "model-1", "x", "--max-tokens", "0"],
        &["run", "model-1", "x", "--raw", "--system", "y"],
        &["inspect", "model-1", "--threads", "0"],
        &["probe", "model-1", "--output", "x"],
        &["probe", "model-1", "--output", "x", "--text", "a", "--tokens", "b"],
    ] {
        assert_eq!(place.run(bad).status.code(), Some(2), "{bad:?}");
    }
}

#[test]
fn run_streams_text_and_gives_it_in_json() {
    let place = Place::new();
    let args = ["run", "model-1", "Hello", "--temperature", "0", "--max-tokens", "8"];
    let object = place.json(&args);
    let ids = object["token_ids"].as_array().unwrap();
    assert_eq!(object["tokens"].as_u64().unwrap(), ids.len() as u64);
    assert!(ids.len() <= 8 && object["tokens_per_second"].is_number() && object["finish_reason"].is_string());
    let plain = place.run(&args);
    assert_eq!(text(&plain.stdout), format!("{}\n", object["text"].as_str().unwrap()));
    let piped = place.run_with(&["run", "model-1", "-", "--temperature", "0", "--max-tokens", "8"], "Hello");
    assert_eq!(piped.stdout, plain.stdout);

    let raw = place.json(&["run", "model-1", "Hello", "--raw", "--max-tokens", "4", "--seed", "3"]);
    assert_eq!(raw["prompt_tokens"], 5, "a token a byte");
    let again = place.json(&["run", "model-1", "Hello", "--raw", "--max-tokens", "4", "--seed", "3", "--threads", "1"]);
    assert_eq!(raw["token_ids"], again["token_ids"]);
}

#[test]
fn chat_does_not_read_again_what_was_said() {
    let place = Place::new();
    let args = ["chat", "model-1", "--max-tokens", "4", "--temperature", "0", "--verbose"];
    let log = text(&place.run_with(&args, "Hello there\nHello there\n").stderr);
    let read: Vec<usize> =
        (log.lines()).filter_map(|line| line.strip_prefix("prompt: ")?.split_once(' ')?.0.parse().ok()).collect();
    let [first, second] = read[..] else { panic!("two turns: {log}") };
    // All of the first turn again would be twice as much, and the answer. A broken character may cost three tokens.
    assert!(first <= second && second <= first + 4 * 3 + 2 && second < 2 * first, "{first}, {second}");
}

#[test]
fn bench_measures_and_counts() {
    let place = Place::new();
    let args = ["bench", "model-1", "--generate", "4", "--memory", "1", "--repeat", "2", "--prompt"];
    let object = place.json(&[&args[..], &["16", "--threads", "1", "--batch", "2", "--kv", "q8"]].concat());
    for key in ["prompt_tokens_per_second", "generated_tokens_per_second", "share_of_memory_rate"] {
        let spread = &object[key];
        assert!(spread["min"].as_f64().unwrap() > 0.0 && spread["max"].as_f64() >= spread["median"].as_f64(), "{key}");
    }
    assert_eq!((&object["threads"], &object["batch"], &object["repeat"]), (&1.into(), &2.into(), &2.into()));
    let step = &object["bytes_per_step"];
    let parts: u64 = ["linears", "head", "rest", "kv"].iter().map(|part| step[part].as_u64().unwrap()).sum();
    assert_eq!(step["total"].as_u64().unwrap(), parts);
    assert_eq!(object["bytes_per_token"].as_u64().unwrap(), parts / 2);
    let start = &object["start_seconds"];
    assert!(start["model"].as_f64().unwrap() > 0.0 && start["total"].as_f64() > start["first_token"].as_f64());
    let table = text(&place.run(&[&args[..], &["16"]].concat()).stdout);
    for word in ["prompt", "generation", "a step reads", "of the memory", "first token", "memory held"] {
        assert!(table.contains(word), "no '{word}' in {table}");
    }
    let no_prompt = place.json(&[&args[..], &["0"]].concat());
    assert!(no_prompt["prompt_tokens_per_second"].is_null());
    place.fails(1, &["bench", "model-1", "--prompt", "99999"], &["99999", "context"]);
    place.fails(2, &["bench", "model-1", "--batch", "0"], &["--batch"]);
    place.fails(2, &["bench", "model-1", "--kv", "q3"], &["q8"]);
    place.fails(2, &["run", "model-1", "x", "--activations", "f64"], &["int8"]);
}

#[test]
fn chat_answers_line_by_line() {
    let place = Place::new();
    let args = ["chat", "model-1", "--max-tokens", "4", "--temperature", "0", "--json"];
    let output = place.run_with(&args, "Hi\n\n/help\n/nonsense\nAnd?\n");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    let roles: Vec<&str> = object["messages"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["user", "assistant", "user", "assistant"]);
    assert!(text(&output.stderr).contains("/reset"));
    let output = place.run_with(&[&args[..], &["--system", "Be brief."]].concat(), "Hi\n/reset\n/exit\nlost\n");
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["messages"].as_array().unwrap().len(), 1, "only the system message is left");
}

#[test]
fn eval_measures_and_compares() {
    let place = Place::new();
    let args = ["eval", "model-1", "--tasks", "perplexity", "--text", "text.txt", "--window", "32"];
    let object = place.json(&args);
    assert_eq!(object["model"], "model-1");
    let result = &object["results"]["perplexity"];
    assert!(result["value"].as_f64().unwrap() > 1.0);
    assert_eq!(result["tokens"].as_u64().unwrap(), 31 * result["windows"].as_u64().unwrap());
    assert_eq!(object["task"], "perplexity");
    assert_eq!((&object["value"], &object["tokens"]), (&result["value"], &result["tokens"]));
    let one = place.json(&[&args[..], &["--windows", "1", "--threads", "1"]].concat());
    assert_eq!(one["tokens"], 31);

    let compared = place.json(&[&args[..], &["--reference", "model-2"]].concat());
    let divergence = &compared["results"]["perplexity"]["divergence"];
    assert!(divergence["mean_kl"].as_f64().unwrap() > 0.0);
    let itself = place.json(&[&args[..], &["--reference", "model-1"]].concat());
    assert_eq!(itself["results"]["perplexity"]["divergence"]["top1_agreement"], 1.0);
    let table = text(&place.run(&args).stdout);
    assert!(table.contains("definition paper") && table.contains("windows of 32"), "{table}");
    let [low, high] = [0, 1].map(|i| result["perplexity_interval95,none"][i].as_f64().unwrap());
    assert!(low < result["value"].as_f64().unwrap() && result["value"].as_f64().unwrap() < high, "{result}");
    assert!(table.contains(&format!("{low:.4} to {high:.4}")), "{table}");
    let short = place.run(&["eval", "model-1", "--text", "text.txt", "--window", "4096"]);
    assert!(text(&short.stderr).contains("shorter than a window"), "{}", text(&short.stderr));
}

#[test]
fn eval_asks_and_logs_every_item() {
    let place = Place::new();
    place.write("items.jsonl", "{\"prompt\": \"a?\", \"answer\": \"a\"}\n{\"prompt\": \"b?\", \"answer\": \"b\"}\n");
    let args = ["eval", "model-1", "--tasks", "jsonl,completion_nll", "--data", "items.jsonl", "--max-tokens", "4"];
    let object = place.json(&[&args[..], &["--log-samples", "log.jsonl"]].concat());
    assert_eq!(object["results"]["jsonl"]["items"], 2);
    assert!(object["results"]["completion_nll"]["nll,none"].as_f64().unwrap() > 0.0);
    let log = std::fs::read_to_string(place.path("log.jsonl")).unwrap();
    let lines: Vec<Value> = log.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let seen: Vec<_> = lines.iter().map(|l| (l["task"].as_str().unwrap(), l["index"].as_u64().unwrap())).collect();
    assert_eq!(seen, [("jsonl", 0), ("jsonl", 1), ("completion_nll", 0), ("completion_nll", 1)]);
    assert!(lines[0]["completion"].is_string() && lines[0]["gold"] == "a");
    let table = text(&place.run(&[&args[..], &["--limit", "1"]].concat()).stdout);
    assert!(table.contains("exact_match,none") && table.contains("f1,none"), "{table}");
    let help = text(&place.run(&["eval", "--help"]).stdout);
    assert!(help.contains("gsm8k_cot") && help.contains("perplexity_llamacpp"), "the help names every task: {help}");
    place.fails(2, &["eval", "model-1", "--tasks", "gsm8k"], &["gsm8k", "--data"]);
    place.fails(1, &["eval", "model-1", "--tasks", "gsm8k", "--data", "gone"], &["gone"]);
    place.fails(1, &[&args[..], &["--log-samples", "gone/log.jsonl"]].concat(), &["gone/log.jsonl"]);
}

#[test]
fn eval_scores_choices() {
    let place = Place::new();
    let row = |i: usize| {
        let gold = ["A", "B"][i % 2];
        format!(
            r#"{{"question": "Q{i}?", "choices": {{"text": ["a{i}", "bb"], "label": ["A", "B"]}}, "answerKey": "{gold}"}}"#
        )
    };
    let rows = |range: std::ops::Range<usize>| range.map(row).collect::<Vec<_>>().join("\n");
    std::fs::create_dir_all(place.path("data/arc_easy")).unwrap();
    place.write("data/arc_easy/test.jsonl", rows(0..8));
    place.write("data/arc_easy/calib.jsonl", rows(20..26));
    let args =
        ["eval", "model-1", "--tasks", "arc_easy", "--data", "data", "--num-fewshot", "2", "--reference", "model-2"];
    let object = place.json(&[&args[..], &["--log-samples", "log.jsonl", "--threads", "1"]].concat());
    let result = &object["results"]["arc_easy"];
    for key in ["acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"] {
        assert!(result[key].is_f64(), "{key}: {result}");
    }
    assert_eq!((&object["n-shot"]["arc_easy"], &object["n-samples"]["arc_easy"]["effective"]), (&2.into(), &8.into()));
    let log = std::fs::read_to_string(place.path("log.jsonl")).unwrap();
    let lines: Vec<Value> = log.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 8);
    let right = lines.iter().filter(|line| line["prediction"] == line["gold"]).count();
    assert_eq!(result["acc,none"].as_f64().unwrap(), right as f64 / 8.0);
    let table = text(&place.run(&args).stdout);
    let row = table.lines().find(|line| line.contains("acc,none")).unwrap();
    let cells: Vec<&str> = row.split('|').map(str::trim).collect();
    assert_eq!(cells[..5], ["", "arc_easy", "8", "2", "acc,none"]);
    assert_eq!(cells[5], format!("{:.4}", right as f64 / 8.0));
    assert!(table.contains("arc_easy against model-2 (acc,none") && table.contains("from right to wrong"), "{table}");
    assert!(table.contains("arc_easy against model-2 (acc_norm,none"), "{table}");
    assert_eq!(
        (&object["versions"]["arc_easy"], &object["higher_is_better"]["arc_easy"]["acc_norm"]),
        (&1.into(), &true.into())
    );
    let itself =
        ["eval", "model-1", "--tasks", "arc_easy", "--data", "data", "--reference", "model-1", "--cache", "finished"];
    let itself = place.json(&itself);
    assert_eq!(itself["results"]["arc_easy"]["flips"]["changed_predictions"], 0);
    assert_eq!(itself["from_cache"]["arc_easy"], 8, "the reference is the same model");
    place.fails(1, &["eval", "model-1", "--tasks", "piqa", "--data", "data"], &["piqa/test.jsonl"]);
}

#[test]
fn eval_refuses_what_a_model_was_calibrated_on() {
    let place = Place::new();
    let row = |i: usize| {
        format!(
            "{{\"question\": \"What is {i} plus {i}, if you add them both up?\", \"answer\": \"#### {}\"}}\n",
            2 * i
        )
    };
    let rows = |range: std::ops::Range<usize>| range.map(row).collect::<String>();
    std::fs::create_dir_all(place.path("data/gsm8k")).unwrap();
    place.write("data/gsm8k/test.jsonl", rows(0..3));
    place.write("calibration.jsonl", rows(2..10));
    let quantize = ["quantize", "model-1", "--bits", "4", "--calibration", "calibration.jsonl", "--output", "q"];
    let made = place.run(&quantize);
    assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
    let eval = ["eval", "q", "--tasks", "gsm8k_nll", "--data", "data"];
    place.fails(1, &eval, &["gsm8k_nll", "item 2", "test.jsonl line 3", "--allow-calibration-items"]);
    place.json(&[&eval[..], &["--limit", "2"]].concat());
    let allowed = [&eval[..], &["--allow-calibration-items"]].concat();
    assert_eq!(place.json(&allowed)["results"]["gsm8k_nll"]["calibration_items"], 1);
    assert!(text(&place.run(&allowed).stderr).contains("1 items of gsm8k_nll were calibration items"));
    place.fails(1, &[&eval[..], &["--reference", "model-1"]].concat(), &["item of q"]);
    place.write("q/report.json", "{");
    place.fails(1, &eval, &["report.json", "no JSON"]);
}

#[test]
fn eval_goes_on_from_finished_items() {
    let place = Place::new();
    let row = |i: usize| format!("{{\"prompt\": \"What is {i}?\", \"answer\": \"{i}\"}}\n");
    place.write("items.jsonl", (0..6).map(row).collect::<String>());
    let args = ["eval", "model-1", "--tasks", "jsonl,completion_nll", "--data", "items.jsonl", "--max-tokens", "4"];
    let cached = [&args[..], &["--cache", "finished"]].concat();
    // Times differ from run to run, and so does what came from the cache; nothing else does.
    let without_times = |args: &[&str]| {
        let mut object = place.json(args);
        let mut take = |key: &str| object.as_object_mut().unwrap().remove(key).unwrap();
        let (seconds, from_cache) = (take("seconds"), take("from_cache"));
        assert!(seconds["jsonl"].as_f64() > Some(0.0) && seconds["completion_nll"].as_f64() > Some(0.0));
        assert!(take("total_evaluation_time_seconds").as_f64() >= seconds["jsonl"].as_f64());
        (object, [from_cache["jsonl"].as_u64(), from_cache["completion_nll"].as_u64()].map(Option::unwrap))
    };
    let (whole, from_cache) = without_times(&args);
    assert_eq!(from_cache, [0, 0]);
    assert_eq!(without_times(&cached), (whole.clone(), [0, 0]));
    assert_eq!(without_times(&cached), (whole.clone(), [6, 6]));
    let table = text(&place.run(&cached).stdout);
    assert!(table.contains("jsonl: 6 finished results came from --cache"), "{table}");
    let files = || {
        let mut files: Vec<_> = std::fs::read_dir(place.path("finished")).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files
    };
    assert_eq!(files().len(), 2);
    // As if it had been killed while it wrote the third item.
    for file in files() {
        let text = std::fs::read_to_string(&file).unwrap();
        let third = text.match_indices('\n').nth(2).unwrap().0;
        std::fs::write(&file, &text[..third + 9]).unwrap();
    }
    let log = |name: &str, args: &[&str], from_cache: u64| {
        let found = without_times(&[args, &["--log-samples", name]].concat());
        assert_eq!(found, (whole.clone(), [from_cache; 2]));
        std::fs::read_to_string(place.path(name)).unwrap()
    };
    assert_eq!(log("resumed.jsonl", &cached, 2), log("whole.jsonl", &args, 0));
    place.json(&[&cached[..], &["--limit", "2"]].concat());
    assert_eq!(files().len(), 4, "other items have other files");
    place.write("finished/no folder", "");
    place.fails(1, &[&args[..], &["--cache", "finished/no folder"]].concat(), &["finished/no folder", "--cache"]);
}

#[test]
fn eval_says_which_options_change_nothing() {
    let place = Place::new();
    std::fs::create_dir_all(place.path("data/wikitext2")).unwrap();
    std::fs::create_dir_all(place.path("data/c4")).unwrap();
    place.write("data/wikitext2/wiki.test.raw.txt", format!(" \n = A = \n \n {}", "Some text . ".repeat(40)));
    place.write("data/c4/test.jsonl", "{\"text\": \"Another text that is long enough to be scored.\"}\n".repeat(4));
    let eval = |tasks: &'static str, more: &[&'static str]| {
        [&["eval", "model-1", "--data", "data", "--tasks", tasks, "--window", "16"], more].concat()
    };
    for option in [&["--limit", "3"][..], &["--num-fewshot", "2"], &["--plain"], &["--log-samples", "log.jsonl"]] {
        place.fails(
            2,
            &eval("perplexity,perplexity_c4", option),
            &[option[0], "perplexity, perplexity_c4", "leave it out"],
        );
    }
    assert!(!place.path("log.jsonl").exists());
    place.fails(
        2,
        &["eval", "model-1", "--tasks", "gsm8k_cot", "--data", "data", "--num-fewshot", "2"],
        &["gsm8k_cot", "mmlu, gsm8k)"],
    );
    place.fails(2, &["eval", "model-1", "--tasks", "spider", "--data", "data", "--plain"], &["--plain", "jsonl"]);
    place.fails(2, &eval("wikitext", &["--reference", "model-2"]), &["--reference"]);
    // What some of the tasks read is no mistake.
    let both = eval("perplexity,perplexity_c4,perplexity_llamacpp,wikitext", &["--limit", "1"]);
    let output = place.run(&both);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(
        text(&output.stderr).contains("--limit changes nothing for perplexity, perplexity_c4, perplexity_llamacpp")
    );
    let table = text(&output.stdout);
    for words in ["definition lm-eval", "definition llama.cpp", "byte_perplexity,none", "bits_per_byte,none"] {
        assert!(table.contains(words), "no '{words}' in {table}");
    }
    let object = place.json(&both);
    assert_eq!(object["higher_is_better"]["wikitext"]["bits_per_byte"], false);
    assert_eq!(object["versions"]["wikitext"], 2);
    let of_c4 = object["results"]["perplexity_c4"]["tokens_in_text"].as_u64();
    assert_ne!(of_c4, object["results"]["perplexity"]["tokens_in_text"].as_u64());
}

#[test]
fn generated_answers_are_compared_with_the_reference_s() {
    let place = Place::new();
    std::fs::create_dir_all(place.path("data/gsm8k")).unwrap();
    std::fs::create_dir_all(place.path("data/jsonl")).unwrap();
    let row = |i: usize| format!("{{\"question\": \"What is {i} and {i}?\", \"answer\": \"#### {}\"}}\n", 2 * i);
    place.write("data/gsm8k/test.jsonl", (0..4).map(row).collect::<String>());
    place.write("data/jsonl/test.jsonl", (0..3).map(row).collect::<String>());
    let args = ["eval", "model-1", "--tasks", "gsm8k_cot,gsm8k_nll,jsonl", "--data", "data", "--max-tokens", "3"];
    let compared = [&args[..], &["--reference", "model-2", "--log-samples", "log.jsonl"]].concat();
    let object = place.json(&compared);
    let results = &object["results"];
    assert_eq!(results["gsm8k_cot"]["flips"]["items"], 4);
    assert_eq!(results["jsonl"]["flips"]["metric"], "exact_match,none");
    let against = &results["gsm8k_nll"]["against"];
    let difference = results["gsm8k_nll"]["value"].as_f64().unwrap() - against["reference_nll"].as_f64().unwrap();
    assert!((against["difference"].as_f64().unwrap() - difference).abs() < 1e-9, "{against}");
    assert_eq!((&object["n-shot"]["gsm8k_cot"], &object["n-shot"]["gsm8k_nll"]), (&8.into(), &0.into()));
    let log = std::fs::read_to_string(place.path("log.jsonl")).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines[0]["reference_completion"].is_string() && lines[4]["reference_nll"].is_f64(), "{log}");
    let table = text(&place.run(&compared).stdout);
    assert!(
        table.contains("gsm8k_cot against model-2 (exact_match,strict-match") && table.contains("its nll"),
        "{table}"
    );
    let itself = place.json(&[&args[..], &["--reference", "model-1"]].concat());
    assert_eq!(itself["results"]["gsm8k_cot"]["flips"]["changed_predictions"], 0);
    assert_eq!(itself["results"]["gsm8k_nll"]["against"]["difference"], 0.0);
    // Folders of the wrong depth, and files where folders are read.
    let with = |task: &'static str, data: &'static str| ["eval", "model-1", "--tasks", task, "--data", data];
    place.fails(1, &with("gsm8k", "data/gsm8k"), &["the folder above"]);
    place.fails(1, &with("gsm8k", "data/gsm8k/test.jsonl"), &["is one file", "gsm8k/test.jsonl"]);
    place.fails(1, &with("completion_nll", "data"), &["completion_nll/test.jsonl", "give their file"]);
    place.fails(2, &with("gsm8k", "hub:some/set"), &["--data hub"]);
    place.fails(2, &with("jsonl", "hub"), &["hub:ORG/NAME"]);
    place.fails(1, &with("jsonl", "hub:some/set"), &["some/set", "HF_HUB_OFFLINE"]);
}

#[test]
fn finished_tasks_are_told_when_a_later_one_fails() {
    let place = Place::new();
    place.write("items.jsonl", "{\"prompt\": \"a?\", \"answer\": \"a\"}\n{\"prompt\": \"b?\", \"answer\": \"b\"}\n");
    let args = ["eval", "model-1", "--data", "items.jsonl", "--max-tokens", "2", "--log-samples", "log.jsonl"];
    let tasks = |tasks| [&args[..], &["--tasks", tasks]].concat();
    place.write("log.jsonl", "of an earlier run\n");
    // A mistake that reading shows costs no computation, whichever task it is in, and no log.
    place.fails(1, &tasks("jsonl,rolling"), &["rolling", "items.jsonl", "no text 'text'"]);
    place.fails(2, &tasks("jsonl,perplexity"), &["perplexity", "--text"]);
    assert_eq!(std::fs::read_to_string(place.path("log.jsonl")).unwrap(), "of an earlier run\n");
    // One that only shows in the work: a damaged file of finished items of the second task.
    let cached = [&tasks("jsonl,completion_nll")[..], &["--cache", "finished"]].concat();
    let whole = place.json(&cached);
    let files = std::fs::read_dir(place.path("finished")).unwrap().map(|entry| entry.unwrap().path());
    let damaged = files.into_iter().find(|path| path.to_str().unwrap().contains("completion_nll")).unwrap();
    std::fs::write(damaged, "{}\n").unwrap();
    let output = place.run(&[&cached[..], &["--json"]].concat());
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("not finished: completion_nll") && message.contains("delete it"), "{message}");
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["results"]["jsonl"], whole["results"]["jsonl"]);
    assert!(object["results"].get("completion_nll").is_none());
    assert_eq!(
        (&object["error"]["task"], &object["unfinished"][0]),
        (&"completion_nll".into(), &"completion_nll".into())
    );
    assert_eq!(std::fs::read_to_string(place.path("log.jsonl")).unwrap().lines().count(), 2);
    assert!(text(&place.run(&cached).stdout).contains("exact_match,none"));
}

#[test]
fn inspect_counts_bytes() {
    let place = Place::new();
    let object = place.json(&["inspect", "model-1"]);
    assert_eq!(object["architecture"], "llama");
    assert_eq!(object["linears"]["bits_per_weight"], 32.0);
    assert_eq!(object["matrices"].as_array().unwrap().len(), 2 * 7 + 1);
    let parameters = object["total"]["parameters"].as_u64().unwrap() + object["vector_parameters"].as_u64().unwrap();
    assert_eq!(object["parameters"].as_u64().unwrap(), parameters);
    assert!(object["file_bytes"].as_u64().unwrap() >= 4 * parameters);
    let table = text(&place.run(&["inspect", "model-1", "--layers"]).stdout);
    assert!(table.contains("model.layers.1.mlp.down_proj") && table.contains("F32"), "{table}");
}

#[test]
fn probe_prints_and_writes_gradients() {
    let place = Place::new();
    let args = ["probe", "model-1", "--text", "some words", "--gradients"];
    let norms = place.json(&args);
    assert!(norms["mean_cross_entropy"].as_f64().unwrap() > 1.0);
    let found = norms["gradient_norms"].as_object().unwrap();
    assert_eq!(found.len(), 14);
    assert_eq!(found.keys().next().unwrap(), "model.layers.0.self_attn.q_proj.weight");
    assert!(found.values().all(|norm| norm.as_f64().unwrap() > 0.0));
    let whole = place.json(&[&args[..], &["--output", "all.safetensors", "--threads", "1"]].concat());
    assert_eq!(whole["gradient_norms"], norms["gradient_norms"]);
    place.json(&[&args[..], &["--output", "rows.safetensors", "--gradient-rows", "3"]].concat());
    let shape =
        |file: &str| safetensors_header(&place.path(file))["grad.model.layers.1.mlp.down_proj.weight"]["shape"].clone();
    assert_eq!(shape("all.safetensors"), serde_json::json!([64, 96]));
    assert_eq!(shape("rows.safetensors"), serde_json::json!([3, 96]));
    place.write("one.json", "[5]");
    place.fails(1, &["probe", "model-1", "--tokens", "one.json", "--gradients"], &["at least two tokens"]);
    place.fails(2, &["probe", "model-1", "--text", "a", "--gradient-rows", "3", "--output", "x"], &["--gradients"]);
    place.fails(2, &["probe", "model-1", "--text", "ab", "--gradients", "--gradient-rows", "0"], &["--gradient-rows"]);
}

#[test]
fn probe_writes_tokens_and_logits() {
    let place = Place::new();
    place.write("ids.json", "[104, 105]");
    let by_ids = place.json(&["probe", "model-1", "--tokens", "ids.json", "--output", "ids.safetensors"]);
    assert_eq!((&by_ids["tokens"], &by_ids["vocab"]), (&2.into(), &259.into()));
    place.json(&["probe", "model-1", "--text", "hi", "--output", "text.safetensors", "--threads", "1"]);
    let header = safetensors_header(&place.path("ids.safetensors"));
    assert_eq!(header["tokens"]["dtype"], "I32");
    assert_eq!(header["tokens"]["shape"], serde_json::json!([2]));
    assert_eq!(header["logits"]["dtype"], "F32");
    assert_eq!(header["logits"]["shape"], serde_json::json!([2, 259]));
    let bytes = |name: &str| std::fs::read(place.path(name)).unwrap();
    assert_eq!(bytes("ids.safetensors"), bytes("text.safetensors"), "the same tokens, on any number of threads");
}

#[test]
fn bad_input_is_an_error_that_says_what_to_do() {
    let place = Place::new();
    place.write("empty.txt", "");
    place.write("latin.txt", b"na\xefve");
    place.write("words.json", "{\"a\": 1}");
    place.write("none.json", "[]");
    place.write("far.json", "[1, 259]");
    place.write("negative.json", "[-1]");
    place.write("broken.gguf", b"GGUF\x03");
    let probe = |tokens, words| {
        place.fails(1, &["probe", "model-1", "--tokens", tokens, "--output", "x.safetensors"], words);
        assert!(!place.path("x.safetensors").exists());
    };
    probe("words.json", &["words.json", "array"]);
    probe("none.json", &["no token"]);
    probe("far.json", &["259", "position 1"]);
    probe("negative.json", &["-1"]);
    probe("missing.json", &["missing.json"]);
    let nowhere = ["probe", "model-1", "--text", "hi", "--output", "nowhere/x.safetensors"];
    place.fails(1, &nowhere, &["nowhere"]);
    place.fails(1, &["run", "model-1", ""], &["empty"]);
    place.fails(1, &["run", "model-1", "x", "--top-p", "0"], &["top-p"]);
    place.fails(1, &["run", "no-such-model", "x"], &["no-such-model"]);
    place.fails(1, &["inspect", "broken.gguf"], &["broken.gguf"]);
    place.fails(1, &["chat", "no-such-model"], &["no-such-model"]);
    place.fails(2, &["eval", "model-1"], &["--text"]);
    place.fails(2, &["eval", "model-1", "--task", "poetry"], &["poetry", "perplexity"]);
    place.fails(1, &["eval", "model-1", "--text", "empty.txt"], &["empty.txt"]);
    place.fails(1, &["eval", "model-1", "--text", "latin.txt"], &["latin.txt", "UTF-8"]);
    place.fails(2, &["eval", "model-1", "--text", "text.txt", "--window", "1"], &["window", "2"]);
    place.fails(2, &["eval", "model-1", "--text", "text.txt", "--windows", "0"], &["windows"]);
    place.fails(1, &["eval", "model-1", "--text", "text.txt", "--reference", "gone"], &["gone"]);
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let place = Place::new();
    let mut command = place.command(&["run", "model-1", "Hello", "--max-tokens", "64", "--quiet"]);
    let mut child = command.stdin(Stdio::null()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
}

#[test]
fn compare_lists_arms_runs_them_and_writes_a_table() {
    let place = Place::new();
    let items = |range: std::ops::Range<u32>| -> String {
        range.map(|i| format!("{{\"prompt\": \"is {i} even, yes or no?\", \"completion\": \"it is {i}\"}}\n")).collect()
    };
    place.write("task.jsonl", items(0..4));
    place.write("held-out.jsonl", items(50..52));
    let experiment = "model = \"../model-1\"\noutput = \"out\"\n[calibration]\nfile = \"../task.jsonl\"\nsamples = 4\n\
        [budgets]\nbits = [3]\n[[methods]]\npreset = \"gptq\"\n\
        [evaluation]\ntasks = [\"completion_nll\"]\ndata = \"../held-out.jsonl\"\n";
    std::fs::create_dir_all(place.path("lab")).unwrap();
    place.write("lab/e.toml", experiment);
    let planned = place.json(&["compare", "lab/e.toml", "--dry-run"]);
    let arms = planned["arms"].as_array().unwrap().len();
    assert!(arms >= 4 && planned["arms"][0]["has_result"] == false && !place.path("lab/out").exists());
    let listed = text(&place.run(&["compare", "lab/e.toml", "--dry-run"]).stdout);
    assert!(listed.contains("damping 0.1") && listed.contains("MiB"), "{listed}");
    let done = place.json(&["compare", "lab/e.toml"]);
    assert_eq!(done["results"]["arms"].as_array().unwrap().len(), arms);
    let again = text(&place.run(&["compare", "lab/e.toml"]).stdout);
    assert!(again.contains("| **original** |") && again.contains("results.svg"), "{again}");
    assert_eq!(place.json(&["compare", "lab/e.toml", "--dry-run"])["arms"][0]["has_result"], true);
    place.write("lab/bad.toml", experiment.replace("preset", "method"));
    place.fails(1, &["compare", "lab/bad.toml"], &["bad.toml", "method", "preset"]);
    place.fails(1, &["compare", "lab/gone.toml"], &["gone.toml", "cannot be read"]);
}
