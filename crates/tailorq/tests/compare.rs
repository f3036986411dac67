//! Comparisons on a small random model: the arms with their controls, the files, and a stop in between.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod inputs;

use inputs::{Bench, StopAfter, items};
use std::collections::BTreeMap;
use std::path::PathBuf;
use tailorq::compare::{Arms, CompareError, Experiment, compare, plan};
use tailorq::{CircuitSignal, Saliency, Silent};
use tailorq_model::testing::TinyModel;

const EXPERIMENT: &str = r#"
model = "model"
output = "out"
[calibration]
file = "task.jsonl"
samples = 6
sequence_length = 64
[general]
file = "general.txt"
samples = 4
sequence_length = 32
[budgets]
bits = [2, 3]
[[methods]]
preset = "gptq"
quantize = { group = 64 }
[[methods]]
preset = "tacq-plain"
quantize = { group = 64 }
circuit = { keep = 0.01 }
[evaluation]
tasks = ["perplexity", "completion_nll"]
data = "held-out.jsonl"
text = "general.txt"
window = 32
windows = 2
"#;

impl Bench {
    fn new() -> Self {
        let mut model = TinyModel::new("qwen2", 7).unwrap();
        model.config.n_blocks = 2;
        let bench = Bench::with_model(&model);
        bench.write("task.jsonl", &items(0..8));
        bench.write("held-out.jsonl", &items(100..104));
        bench.write("general.txt", &"A text about nothing that a model can learn from, told at length. ".repeat(6));
        bench
    }

    fn experiment(&self, text: &str) -> Result<Experiment, CompareError> {
        self.write("experiment.toml", text);
        Experiment::read(&self.path("experiment.toml"))
    }

    /// The files of results, without times.
    fn results(&self, output: &str) -> BTreeMap<&'static str, String> {
        let read = |name| (name, std::fs::read_to_string(self.path(output).join(name)).unwrap());
        ["results.json", "results.md", "results.svg"].map(read).into_iter().collect()
    }
}

fn names(arms: &Arms, budget: &str, control_of: Option<&str>) -> Vec<String> {
    let rows = arms.rows.iter().filter(|r| r.budget == budget && r.control_of.as_deref() == control_of);
    rows.map(|r| r.method.clone()).collect()
}

#[test]
fn arms_are_methods_and_controls_each_recipe_once() {
    let bench = Bench::new();
    let arms = plan(&bench.experiment(EXPERIMENT).unwrap()).unwrap().arms;
    assert_eq!(names(&arms, "2 bits", None), ["gptq", "tacq-plain"]);
    // The grid at damping 0.01 is the method itself, and so is the uniform width of its bytes.
    let of_gptq = ["rtn group 64", "gptq group 64 damping 0.1", "gptq group 64 damping 1", "gptq on general text"];
    assert_eq!(names(&arms, "2 bits", Some("gptq")), of_gptq);
    let of_tacq = names(&arms, "2 bits", Some("tacq-plain"));
    for name in ["random mask of 1 %, group 64", "|w|sqrt(H) mask of 1 %, group 64", "tacq-plain on general text"] {
        assert!(of_tacq.iter().any(|n| n == name), "{name}: {of_tacq:?}");
    }
    assert!(of_tacq.iter().any(|n| n.contains("equal bytes")), "{of_tacq:?}");
    let mut recipes: Vec<String> = arms.arms.iter().map(|a| a.recipe.to_toml()).collect();
    recipes.sort();
    recipes.dedup();
    assert_eq!(recipes.len(), arms.arms.len(), "each recipe once");
    let of = |name: &str| arms.rows.iter().find(|r| r.method == name).map(|r| &arms.arms[r.arms[0]]).unwrap();
    let signal = |name: &str| of(name).recipe.circuit.unwrap().signal;
    assert_eq!(signal("random mask of 1 %, group 64"), CircuitSignal::Random);
    assert_eq!(signal("|w|sqrt(H) mask of 1 %, group 64"), CircuitSignal::MagnitudeHessian);
    assert_eq!(
        of("tacq-plain on general text").recipe.calibration.as_ref().unwrap().file,
        PathBuf::from("general.txt")
    );
    assert_eq!(of("random mask of 1 %, group 64").predicted_bytes, of("tacq-plain").predicted_bytes);
    // A uniform width "below" takes less than the method, one "above" not much more.
    for row in arms.rows.iter().filter(|r| r.method.contains("equal bytes")) {
        let bits = arms.arms[row.arms[0]].predicted_bits_per_weight;
        let method = arms.rows.iter().find(|r| r.method == "tacq-plain" && r.budget == row.budget).unwrap();
        assert!(bits <= 1.05 * arms.arms[method.arms[0]].predicted_bits_per_weight, "{row:?}");
    }
    assert!(!bench.path("out").exists(), "planning writes nothing");

    let alone = plan(&bench.experiment(&EXPERIMENT.replace("[calib", "controls = false\n[calib")).unwrap()).unwrap();
    assert_eq!(alone.arms.arms.len(), 4);
    assert!(alone.arms.rows.iter().all(|r| r.control_of.is_none()));
}

#[test]
fn each_idea_stands_beside_chance() {
    let bench = Bench::new();
    let text = EXPERIMENT
        .replace("[calib", "seeds = [0, 3]\n[calib")
        .replace("preset = \"gptq\"\nquantize = { group = 64 }", "preset = \"taqo\"\nallocation = { score = { unit = \"layer\" } }")
        .replace("preset = \"tacq-plain\"\nquantize = { group = 64 }\ncircuit = { keep = 0.01 }", "preset = \"aligned\"")
        .replace(
            "[evaluation]",
            "[[methods]]\npreset = \"gptq-codebook\"\n[[methods]]\npreset = \"tacq-hadamard\"\n[[methods]]\npreset = \"awq\"\n\
             [[methods]]\npreset = \"taq-paper\"\n[evaluation]",
        )
        .replace("samples = 4\nsequence_length = 32\n", "")
        .replace("bits = [2, 3]", "bits = [2]");
    let arms = plan(&bench.experiment(&text).unwrap()).unwrap().arms;
    let of = |name: &str, beside: &str| {
        let is = |r: &&tailorq::compare::Row| r.method == name && r.control_of.as_deref() == Some(beside);
        let rows: Vec<String> = arms.rows.iter().map(|r| format!("{} < {:?}", r.method, r.control_of)).collect();
        arms.rows
            .iter()
            .find(is)
            .map(|r| &arms.arms[*r.arms.last().unwrap()])
            .unwrap_or_else(|| panic!("{name}: {rows:#?}"))
    };
    let method = |name: &str| {
        let row = arms.rows.iter().find(|r| r.method == name && r.control_of.is_none()).unwrap();
        &arms.arms[row.arms[0]]
    };
    for name in ["random widths", "depth widths"] {
        let (control, own) = (of(name, "taqo").recipe.allocation.clone().unwrap(), method("taqo"));
        let of_own = own.recipe.allocation.clone().unwrap();
        assert_eq!(control.rule.bits_per_weight, of_own.rule.bits_per_weight);
        assert_eq!((control.score.unit, &control.score.widths), (of_own.score.unit, &of_own.score.widths));
        assert_eq!(of(name, "taqo").predicted_bytes, own.predicted_bytes);
        assert_eq!(of(name, "taq-paper").predicted_bytes, method("taq-paper").predicted_bytes);
    }
    let drawn = of("random tiles of 5 %, group 128", "aligned");
    let tiles = drawn.recipe.quantize.aligned.unwrap();
    assert_eq!((tiles.saliency, tiles.seed), (Saliency::Random, 3));
    assert_eq!(drawn.predicted_bytes, method("aligned").predicted_bytes);
    // Grid and rotation are part of an idea, unless there is another.
    let rotated = arms.rows.iter().filter(|r| r.control_of.as_deref() == Some("tacq-hadamard"));
    assert!(rotated.clone().any(|r| r.method.starts_with("gptq rotated")), "{:?}", rotated.collect::<Vec<_>>());
    let alone = text[..text.find("[[methods]]").unwrap()].to_owned() + "[[methods]]\npreset = \"gptq-codebook\"\n";
    let alone = alone + &text[text.find("[evaluation]").unwrap()..];
    let of_codebook = plan(&bench.experiment(&alone).unwrap()).unwrap().arms;
    let near: Vec<&str> = of_codebook.rows.iter().map(|r| r.method.as_str()).filter(|m| m.contains("equal")).collect();
    assert!(near.iter().all(|m| m.starts_with("gptq 2 bits group")) && !near.is_empty(), "{near:?}");
    // A simulated method stands at its own size, not at that of its file.
    let near = arms.rows.iter().find(|r| r.method.contains("equal bytes") && r.control_of.as_deref() == Some("awq"));
    assert!(near.is_none_or(|r| arms.arms[r.arms[0]].predicted_bits_per_weight < 4.0), "{near:?}");
    // General text of as many tokens.
    let calibration = of("aligned on general text", "aligned").recipe.calibration.clone().unwrap();
    let tokens = calibration.samples * calibration.sequence_length;
    assert!((100..600).contains(&tokens) && calibration.samples == 6, "{calibration:?}");
    assert!(arms.notes.is_empty(), "{:?}", arms.notes);
    let without = text.replace("[general]\nfile = \"general.txt\"\n", "");
    let arms = plan(&bench.experiment(&without).unwrap()).unwrap().arms;
    assert!(arms.notes.iter().any(|n| n.contains("[general]")), "{:?}", arms.notes);
}

#[test]
fn seeds_and_budgets_concern_those_that_read_them() {
    let bench = Bench::new();
    let text = EXPERIMENT.replace("[calib", "seeds = [0, 1]\ncontrols = false\n[calib").replace(
        "[evaluation]",
        "[[methods]]\npreset = \"rtn\"\n[[methods]]\npreset = \"awq\"\n[[methods]]\npreset = \"half\"\n\
         [[methods]]\npreset = \"taqo\"\n[methods.allocation.score]\nprompts = 2\n[evaluation]",
    );
    let text = text.replace("bits = [2, 3]", "bits = [3]\nbits_per_weight = [4.0]");
    let arms = plan(&bench.experiment(&text).unwrap()).unwrap().arms;
    let count = |name: &str, budget: &str| {
        arms.rows.iter().find(|r| r.method == name && r.budget == budget).map_or(0, |r| r.arms.len())
    };
    assert_eq!((count("gptq", "3 bits"), count("gptq", "4 bits per weight")), (2, 2));
    assert_eq!(
        (count("rtn", "3 bits"), count("half", ""), count("half", "3 bits")),
        (1, 1, 0),
        "no seed matters to them"
    );
    assert_eq!((count("awq", "3 bits"), count("awq", "4 bits per weight")), (2, 0));
    assert!(arms.notes.iter().any(|n| n.contains("awq") && n.contains("4 bits per weight")), "{:?}", arms.notes);
    let taqo = arms.rows.iter().find(|r| r.method == "taqo" && r.budget == "3 bits").unwrap();
    let recipe = &arms.arms[taqo.arms[1]].recipe;
    let allocation = recipe.allocation.as_ref().unwrap();
    assert_eq!((allocation.score.prompts, allocation.score.seed), (2, 1));
    // As many bytes as 3 bits take in groups of 128.
    assert!((3.0..3.5).contains(&allocation.rule.bits_per_weight.unwrap()));
}

#[test]
fn a_stopped_comparison_goes_on_to_the_same_bytes() {
    let bench = Bench::new();
    let small = EXPERIMENT.replace("[calib", "controls = false\n[calib");
    let device = tailorq::cpu();
    let whole = compare(device.as_ref(), &bench.experiment(&small).unwrap(), &Silent).unwrap();
    assert!(whole.files.iter().all(|f| f.exists()) && whole.results.missing.is_empty());
    let expected = bench.results("out");

    let experiment = bench.experiment(&small.replace("\"out\"", "\"again\"")).unwrap();
    let mut stops = 0;
    for looks in [2, 9, 30, 55, 80] {
        match compare(device.as_ref(), &experiment, &StopAfter::new(looks)) {
            Err(CompareError::Stopped) => stops += 1,
            other => panic!("{looks}: {other:?}"),
        }
    }
    assert_eq!(stops, 5);
    compare(device.as_ref(), &experiment, &Silent).unwrap();
    assert_eq!(bench.results("again"), expected);
    // A finished one is left alone.
    let before = std::fs::metadata(bench.path("again/arms")).unwrap().modified().unwrap();
    compare(device.as_ref(), &experiment, &Silent).unwrap();
    assert_eq!(bench.results("again"), expected);
    assert_eq!(std::fs::metadata(bench.path("again/arms")).unwrap().modified().unwrap(), before);
    assert!(!bench.path("again/surveys").exists() && bench.path("again/cache").exists());
    let folders = std::fs::read_dir(bench.path("again/arms")).unwrap().map(|e| e.unwrap().path());
    for folder in folders {
        assert!(folder.join("result.json").exists() && !folder.join("model").exists(), "{}", folder.display());
    }
}

#[test]
fn results_have_every_arm_with_its_numbers() {
    let bench = Bench::new();
    let text = EXPERIMENT.replace("bits = [2, 3]", "bits = [2]").replace("[calib", "keep_artifacts = true\n[calib");
    let done = compare(tailorq::cpu().as_ref(), &bench.experiment(&text).unwrap(), &Silent).unwrap();
    let files = bench.results("out");
    let results: serde_json::Value = serde_json::from_str(&files["results.json"]).unwrap();
    let arms = results["arms"].as_array().unwrap();
    assert_eq!(arms.len(), done.results.arms.len());
    let original = &results["original"]["metrics"];
    for arm in arms {
        assert_eq!(arm["recipe"]["model"]["source"], "model", "paths are the file's");
        assert_eq!(arm["metrics"].as_array().unwrap().len(), 2);
        assert!(arm["metrics"][1]["stderr"].is_number() && arm["metrics"][1]["interval95"].is_array());
        let difference = arm["metrics"][0]["value"].as_f64().unwrap() - original[0]["value"].as_f64().unwrap();
        assert!((arm["metrics"][0]["difference"].as_f64().unwrap() - difference).abs() < 1e-3);
        assert!(arm["size"]["artifact_bytes"].as_u64().unwrap() > 0);
        let errors = arm["squared_errors"].as_object().unwrap();
        assert!(errors.len() == 7 && errors["q_proj"].as_f64().unwrap() > 0.0, "{errors:?}");
        let report = bench.path("out/arms").join(arm["key"].as_str().unwrap()).join("report.json");
        let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
        assert!(report["layers"].as_array().unwrap().len() > 7);
        let key = arm["key"].as_str().unwrap();
        assert!(bench.path("out/arms").join(key).join("model/config.json").exists(), "{key}");
    }
    let rows = results["rows"].as_array().unwrap();
    assert!(rows.windows(2).all(|w| w[0]["bytes"].as_f64() <= w[1]["bytes"].as_f64()), "by bytes");
    for row in rows {
        let name = row["method"].as_str().unwrap().replace('|', "\\|");
        assert!(files["results.md"].contains(&name), "{name}");
    }
    let svg = &files["results.svg"];
    assert_eq!(svg.matches("<circle").count(), 2 * rows.len());
    assert!(svg.contains("|w|sqrt(H) mask") && svg.trim_end().ends_with("</svg>"));
    assert!(!files.values().any(|text| text.contains(&*bench.path("").to_string_lossy())), "no path of this machine");
    let timings: serde_json::Value =
        serde_json::from_slice(&std::fs::read(bench.path("out/timings.json")).unwrap()).unwrap();
    assert_eq!(timings.as_object().unwrap().len(), arms.len());
}

#[test]
fn several_measurements_and_data_of_a_methods_own_cross() {
    let bench = Bench::new();
    bench.write("other.jsonl", &items(20..28));
    bench.write("other-held-out.jsonl", &items(200..203));
    let own = "name = \"gptq on the other\"\nquantize = { group = 64 }\ncalibration = { file = \"other.jsonl\", samples = 6 }";
    let text = EXPERIMENT
        .replace("bits = [2, 3]", "bits = [2]")
        .replace(
            "preset = \"tacq-plain\"\nquantize = { group = 64 }\ncircuit = { keep = 0.01 }",
            &format!("preset = \"gptq\"\n{own}"),
        )
        .replace("[evaluation]", "[[evaluation]]")
        + "[[evaluation]]\nname = \"other\"\ntasks = [\"completion_nll\"]\ndata = \"other-held-out.jsonl\"\n";
    let experiment = bench.experiment(&text).unwrap();
    let arms = plan(&experiment).unwrap().arms;
    let file_of = |name: &str| {
        let row = arms.rows.iter().find(|r| r.method == name).unwrap();
        arms.arms[row.arms[0]].recipe.calibration.clone().unwrap().file
    };
    assert_eq!(file_of("gptq on the other"), PathBuf::from("other.jsonl"));
    assert_eq!(file_of("gptq group 64 damping 0.1 (beside gptq on the other)"), PathBuf::from("other.jsonl"));
    // On general text both methods are one.
    assert_eq!(file_of("gptq on general text"), PathBuf::from("general.txt"));

    let done = compare(tailorq::cpu().as_ref(), &experiment, &Silent).unwrap();
    let titles: Vec<String> = done.results.original.metrics.iter().map(|m| m.title()).collect();
    assert_eq!(titles, ["perplexity", "completion_nll", "completion_nll other"]);
    for row in &done.results.rows {
        assert!(row.metrics[0].difference_stderr.is_none(), "windows are no items");
        for metric in &row.metrics[1..] {
            assert!(metric.difference_stderr.unwrap() > 0.0, "{row:?}");
            assert_eq!(metric.beside_method.is_some(), row.control_of.is_some(), "{row:?}");
        }
    }
    let row = |name: &str| done.results.rows.iter().find(|r| r.method == name).unwrap();
    let (control, method) = (row("rtn group 64"), row("gptq"));
    assert_eq!(control.control_of.as_deref(), Some("gptq"));
    let apart = control.metrics[1].mean - method.metrics[1].mean;
    assert!(
        (control.metrics[1].beside_method.unwrap().difference - apart).abs() < 1e-4,
        "the means are of these items"
    );

    let twice = text.replace("name = \"other\"\n", "");
    let error = bench.experiment(&twice).unwrap_err().to_string();
    assert!(error.contains("completion_nll is there twice"), "{error}");
    let unknown = bench.experiment(&text.replace("windows = 2", "window_count = 2")).unwrap_err().to_string();
    assert!(unknown.contains("window_count"), "{unknown}");
}

#[test]
fn an_arm_that_fails_does_not_keep_others_from_being_run() {
    let bench = Bench::new();
    // Four tokens end before the completions that gradients are read from.
    let text =
        EXPERIMENT.replace("sequence_length = 64", "sequence_length = 4").replace("[calib", "controls = false\n[calib");
    let guided = "preset = \"gptq\"\nname = \"guided\"\nquantize = { token_weight = \"gradient\" }";
    let text =
        text.replacen("preset = \"gptq\"\nquantize = { group = 64 }", guided, 1).replace("bits = [2, 3]", "bits = [2]");
    let text = text.replace("preset = \"tacq-plain\"", "preset = \"rtn\"").replace("circuit = { keep = 0.01 }", "");
    let error = compare(tailorq::cpu().as_ref(), &bench.experiment(&text).unwrap(), &Silent).unwrap_err();
    assert!(matches!(&error, CompareError::Arms(arms) if arms.len() == 1), "{error}");
    assert!(
        error.to_string().contains("guided, 2 bits, seed 0: ") && error.to_string().contains("no completion"),
        "{error}"
    );
    let files = bench.results("out");
    assert!(files["results.md"].contains("| rtn | 2 bits | 1 |"), "{}", files["results.md"]);
    assert!(files["results.md"].contains("Without a result yet: guided, 2 bits, seed 0."), "{}", files["results.md"]);
}

#[test]
fn a_bad_experiment_is_refused_with_its_key() {
    let bench = Bench::new();
    let bad = [
        ("preset = \"tacq-plain\"", "preset = \"magic\"", "magic"),
        ("keep = 0.01", "keep = 0.5", "methods.circuit of tacq"),
        ("keep = 0.01", "kept = 0.5", "kept"),
        ("bits = [2, 3]", "bits = [5]", "5 bits"),
        ("bits = [2, 3]", "", "budgets"),
        ("bits = [2, 3]", "bits_per_weight = [-1.0]", "budgets.bits_per_weight"),
        ("samples = 6", "samples = 6\nmix = 1.5", "calibration.mix"),
        ("windows = 2", "window_count = 2", "window_count"),
        ("\"completion_nll\"", "\"poetry\"", "evaluation.tasks"),
        ("preset = \"tacq-plain\"", "preset = \"gptq\"", "two are called gptq"),
        ("circuit = { keep", "allocation = { keep", "does not allocate"),
    ];
    for (from, to, words) in bad {
        let error = bench.experiment(&EXPERIMENT.replacen(from, to, 1)).unwrap_err().to_string();
        assert!(error.contains("experiment.toml") && error.contains(words), "{to}: {error}");
    }
    let no_data = bench.experiment(&EXPERIMENT.replace("file = \"task", "file = \"gone")).unwrap();
    let error = plan(&no_data).unwrap_err().to_string();
    assert!(error.contains("gone.jsonl"), "{error}");
    let leaking = bench.experiment(&EXPERIMENT.replace("held-out", "task")).unwrap();
    let error = compare(tailorq::cpu().as_ref(), &leaking, &Silent).unwrap_err().to_string();
    assert!(error.contains("calibrat"), "test items that were calibration items: {error}");
}

#[test]
fn every_experiment_of_this_repository_can_be_read() {
    let recipes = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let files = std::fs::read_dir(recipes).unwrap().map(|e| e.unwrap().path());
    let files: Vec<PathBuf> = files.filter(|f| f.extension().is_some_and(|e| e == "toml")).collect();
    assert!(files.len() >= 2);
    for file in files {
        Experiment::read(&file).unwrap();
    }
}
