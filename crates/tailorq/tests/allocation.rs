//! Widths under a budget on small random models: what is promised of bytes, and that no way to a plan changes the artifact.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod inputs;

use inputs::{Bench, StopAfter, assert_same, files, items};
use std::path::Path;
use tailorq::{
    AllocationSettings, AllocationSignal, CalibrationRequest, CircuitSettings, GridKind, Group, MeasureKind, Outcome,
    OutputMode, PRESETS, PipelineError, Preset, QuantizeRequest, Recipe, Report, Rule, RuleSettings, ScoreRequest,
    ScoreSettings, Scores, Silent, Span, UnitKind,
};
use tailorq_format::SafetensorsFile;
use tailorq_model::testing::TinyModel;

fn model(architecture: &str, n_blocks: usize, seed: u64) -> TinyModel {
    let mut model = TinyModel::new(architecture, seed).unwrap();
    model.config.n_blocks = n_blocks;
    model.config.intermediate = 144;
    model
}

impl Bench {
    fn new(architecture: &str, n_blocks: usize) -> Self {
        let bench = Bench::with_model(&model(architecture, n_blocks, 7));
        bench.write("calibration.jsonl", &items(0..12));
        bench
    }

    fn add_model(&self, name: &str, architecture: &str, n_blocks: usize, seed: u64) {
        model(architecture, n_blocks, seed).write_directory(&self.path(name)).unwrap();
    }

    fn data(&self) -> Option<CalibrationRequest> {
        Some(self.calibration("calibration.jsonl", 6))
    }

    /// A preset with few prompts and groups that fit the tiny model.
    fn request(&self, preset: &str, output: &str) -> QuantizeRequest {
        let mut method = Preset::find(preset).unwrap().method();
        method.quantize.group = Group::Inputs(32);
        if let Some(allocation) = &mut method.allocation {
            allocation.score.prompts = 3;
        }
        QuantizeRequest {
            settings: method.quantize,
            calibration: self.data(),
            circuit: method.circuit,
            allocation: method.allocation,
            ..self.plain_request(output)
        }
    }

    fn budget(&self, preset: &str, output: &str, bits_per_weight: f64) -> QuantizeRequest {
        let mut request = self.request(preset, output);
        match &mut request.allocation {
            Some(allocation) => allocation.rule.bits_per_weight = Some(bits_per_weight),
            None => request.bits_per_weight = Some(bits_per_weight),
        }
        request
    }
}

fn quantize(request: &QuantizeRequest) -> Result<Report, PipelineError> {
    match inputs::quantize(request)? {
        Outcome::Written(report) => Ok(*report),
        Outcome::AlreadyFinished => panic!("finished before"),
    }
}

fn weights(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("model.safetensors")).unwrap()
}

/// Bits per weight of the linears by the lengths of their tensors in the file, whatever the report says.
fn bits_in_file(dir: &Path, report: &Report) -> f64 {
    let file = SafetensorsFile::open(dir.join("model.safetensors")).unwrap();
    let linears: Vec<_> = report.layers.iter().filter(|l| l.name.contains(".layers.")).collect();
    let n_weights: usize = linears.iter().map(|l| l.rows * l.cols).sum();
    let is_part = |name: &str| linears.iter().any(|l| name.strip_prefix(&l.name).is_some_and(|r| r.starts_with('.')));
    let vectors = ["bias"];
    let bytes: usize = file
        .iter()
        .filter(|t| is_part(t.name) && !vectors.iter().any(|v| t.name.ends_with(v)))
        .map(|t| t.bytes.len())
        .sum();
    bytes as f64 * 8.0 / n_weights as f64
}

/// The widths of the blocks' first linears.
fn widths(report: &Report) -> Vec<u32> {
    report
        .layers
        .iter()
        .filter(|l| l.name.ends_with("q_proj"))
        .map(|l| l.layout.map_or(16, |l| l.bits.count()))
        .collect()
}

#[test]
fn every_preset_makes_an_artifact_that_repeats() {
    let bench = Bench::new("llama", 6);
    let is_packed = |p: &&Preset| matches!(p.method().quantize.method.as_str(), "rtn" | "gptq");
    for preset in PRESETS.iter().filter(is_packed) {
        let request = bench.request(preset.name, preset.name);
        let report = quantize(&request).unwrap_or_else(|e| panic!("{}: {e}", preset.name));
        let bits = bits_in_file(&request.output, &report);
        assert!((bits - report.size.linear_bits_per_weight).abs() < 1e-9, "{}: {bits}", preset.name);
        if let Some(allocation) = &request.allocation {
            let budget = allocation.rule.bits_per_weight;
            // Blocks are a sixth of this model, so that much of the budget may be left.
            assert!(budget.is_none_or(|b| bits <= b && bits > b - 0.6), "{}: {bits}", preset.name);
            let found = widths(&report);
            let wide = found.iter().filter(|&&w| w > 4).count();
            match preset.name {
                "taq-paper" | "taq-kl-paper" => assert_eq!((wide, found.len()), (2, 6), "{found:?}"),
                "taqo-paper" => assert_eq!(found, [16; 6]),
                _ => assert!(found.iter().any(|w| w != &found[0]), "{}: {found:?}", preset.name),
            }
        }
        let recipe = Recipe::read(&request.output.join("recipe.toml")).unwrap();
        let again = bench.path(&format!("{}-again", preset.name));
        quantize(&QuantizeRequest::repeat(recipe, again.clone(), OutputMode::Fresh)).unwrap();
        assert_same(&files(&again), &files(&request.output), preset.name);
    }
}

#[test]
fn budgets_are_kept_by_every_unit_rule_and_method() {
    let bench = Bench::new("qwen2", 4);
    let scores = |unit: UnitKind| {
        let score = ScoreSettings { unit, prompts: 2, ..ScoreSettings::of(AllocationSignal::Damage) };
        let path = bench.path(&format!("{}.json", unit.name()));
        let settings = bench.request("rtn", "").settings;
        let request = ScoreRequest {
            model: bench.path("model").display().to_string(),
            calibration: bench.data(),
            settings,
            score,
        };
        tailorq::score(tailorq::cpu().as_ref(), &request, &path, &Silent).unwrap();
        (path, request.score)
    };
    for &unit in UnitKind::ALL {
        let (path, score) = scores(unit);
        let mut damages = Vec::new();
        for (i, budget) in [2.7, 3.0, 3.37, 5.0, 9.5].into_iter().enumerate() {
            for &name in Rule::ALL.iter().filter(|r| r.is_budgeted()) {
                let rule = RuleSettings::budget(name, budget);
                let plan = bench.path("plan.safetensors");
                let summary = tailorq::plan(&path, &rule, &plan).unwrap();
                assert!(summary.bits_per_weight <= budget, "{} {}: {summary:?}", unit.name(), name.name());
                if name == Rule::Knapsack {
                    damages.push(summary.damage);
                }
                // Of each rule and unit one run counts the bytes.
                if i == usize::from(name == Rule::Knapsack) {
                    let mut request = bench.request("rtn", &format!("{}-{}", unit.name(), name.name()));
                    request.allocation = Some(AllocationSettings { rule, score: score.clone() });
                    request.scores = Some(path.clone());
                    let report = quantize(&request).unwrap();
                    let bits = bits_in_file(&request.output, &report);
                    assert!(bits <= budget && (bits - summary.bits_per_weight).abs() < 1e-9, "{bits} {summary:?}");
                }
            }
        }
        assert!(damages.windows(2).all(|d| d[1] <= d[0]), "{damages:?}");
    }
    let settled = [("gptq", 2.5), ("gptq", 4.4), ("rtn", 3.0), ("best", 3.0), ("tacq", 2.9), ("tacq", 4.0)];
    for (preset, budget) in settled.into_iter().chain([("aligned", 2.9), ("aligned", 4.2), ("aligned-true8-50", 5.3)]) {
        let request = bench.budget(preset, &format!("{preset}-{budget}"), budget);
        let report = quantize(&request).unwrap();
        let bits = bits_in_file(&request.output, &report);
        // Few layouts there are, but many elements and tiles.
        let room = if preset == "tacq" || preset.starts_with("aligned") { 0.02 } else { 1.0 };
        assert!(bits <= budget && bits > budget - room, "{preset} {budget}: {bits}");
        assert!(preset != "tacq" || report.recipe.circuit.unwrap().keep > 0.0);
        assert!(report.recipe.quantize.aligned.is_none_or(|a| a.share > 0.01), "{:?}", report.recipe.quantize);
        let width = if preset == "aligned" && budget > 4.0 { 3 } else { 2 };
        assert!(!preset.starts_with("aligned") || report.recipe.quantize.bits.count() == width, "{preset} {budget}");
    }
    // A circuit beside an allocation is paid from the same budget.
    let mut request = bench.budget("taqo", "both", 3.3);
    request.circuit = Some(CircuitSettings { keep: 0.01, ..CircuitSettings::default() });
    let report = quantize(&request).unwrap();
    let bits = bits_in_file(&request.output, &report);
    assert!(bits <= 3.3 && report.layers.iter().any(|l| !l.corrections.is_none()), "{bits}");
}

#[test]
fn codebooks_are_paid_from_the_budget() {
    let bench = Bench::new("llama", 4);
    // Between what all linears take at 2 bits with and without codebooks lies a budget that cannot be met; above it one can.
    let request = |output: &str, budget: f64| {
        let mut request = bench.budget("taqo", output, budget);
        request.settings.grid = GridKind::Codebook;
        request.settings.group = Group::Row;
        request.allocation.as_mut().unwrap().score.unit = UnitKind::Layer;
        request
    };
    for budget in [3.0, 3.5, 4.01] {
        let request = request(&format!("at-{budget}"), budget);
        let report = quantize(&request).unwrap();
        let bits = bits_in_file(&request.output, &report);
        assert!(bits <= budget && bits > budget - 0.2, "{budget}: {bits}");
    }
    let error = quantize(&request("least", 1.0)).unwrap_err().to_string();
    let least = error.split("least possible is ").nth(1).unwrap().split(' ').next().unwrap().parse::<f64>().unwrap();
    let request = request("at-least", least);
    let report = quantize(&request).unwrap();
    assert!((least - 0.001..=least).contains(&bits_in_file(&request.output, &report)), "{least}");
}

#[test]
fn every_way_to_a_plan_gives_the_same_bytes() {
    let bench = Bench::new("qwen3", 4);
    for (preset, stops) in [("taqo", &[2, 9, 30][..]), ("taq-kl", &[16])] {
        let name = |what: &str| format!("{preset}-{what}");
        let whole = bench.budget(preset, &name("whole"), 3.0);
        quantize(&whole).unwrap();
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let request = bench.budget(preset, &name(&format!("threads-{threads}")), 3.0);
            pool.install(|| quantize(&request)).unwrap();
            assert_same(&files(&request.output), &files(&whole.output), &format!("{threads} threads"));
        }
        for &stop in stops {
            let mut request = bench.budget(preset, &name(&format!("stopped-{stop}")), 3.0);
            let stopped = tailorq::quantize(tailorq::cpu().as_ref(), &request, &StopAfter::new(stop));
            assert!(matches!(stopped, Err(PipelineError::Cancelled)), "stop {stop}: {stopped:?}");
            request.mode = OutputMode::Resume;
            quantize(&request).unwrap();
            assert_same(&files(&request.output), &files(&whole.output), &format!("stop {stop}"));
        }
        // Score once, plan, quantize by the plan.
        let allocation = whole.allocation.clone().unwrap();
        let request = ScoreRequest {
            model: whole.model.clone(),
            calibration: bench.data(),
            settings: whole.settings.clone(),
            score: allocation.score.clone(),
        };
        let (scores, plan) = (bench.path(&name("scores.json")), bench.path(&name("plan.safetensors")));
        let made = tailorq::score(tailorq::cpu().as_ref(), &request, &scores, &Silent).unwrap();
        assert_eq!(Scores::read(&scores).unwrap(), made);
        let mut with_scores = bench.budget(preset, &name("with-scores"), 3.0);
        with_scores.scores = Some(scores.clone());
        quantize(&with_scores).unwrap();
        assert_same(&files(&with_scores.output), &files(&whole.output), "given scores");
        tailorq::plan(&scores, &allocation.rule, &plan).unwrap();
        let mut by_plan = bench.request("gptq", &name("by-plan"));
        by_plan.plan = Some(plan.clone());
        let report = quantize(&by_plan).unwrap();
        assert_eq!(weights(&by_plan.output), weights(&whole.output));
        assert_eq!(report.recipe.plan.as_ref().unwrap().file, plan);
        // The recipe repeats it as long as the plan is the same file.
        let again = |name: &str| QuantizeRequest::repeat(report.recipe.clone(), bench.path(name), OutputMode::Fresh);
        quantize(&again(&name("again"))).unwrap();
        assert_same(&files(&bench.path(&name("again"))), &files(&by_plan.output), "repeated");
        tailorq::plan(&scores, &RuleSettings::budget(Rule::Hull, 4.0), &plan).unwrap();
        let error = quantize(&again(&name("other"))).unwrap_err().to_string();
        assert!(error.contains("is not the plan that"), "{error}");
    }
}

#[test]
fn what_cannot_be_is_refused_with_what_could() {
    let bench = Bench::new("llama", 4);
    let mut request = bench.budget("depth", "out", 2.0);
    let error = quantize(&request).unwrap_err().to_string();
    let least = error.split("least possible is ").nth(1).unwrap().split(' ').next().unwrap().parse::<f64>().unwrap();
    assert!((2.5..3.0).contains(&least), "{error}");
    (request.output, request.allocation.as_mut().unwrap().rule.bits_per_weight) = (bench.path("least"), Some(least));
    let report = quantize(&request).unwrap();
    assert!(widths(&report).iter().all(|&w| w == 2), "the number in the message can be met");
    assert!(bits_in_file(&request.output, &report) <= least);
    let error = quantize(&bench.budget("gptq", "tight", 1.5)).unwrap_err().to_string();
    assert!(error.contains("least possible is"), "{error}");
    // Widths are for methods whose bytes follow from a layout.
    let mut request = bench.request("taqo", "awq");
    request.settings.method = "awq".into();
    let error = quantize(&request).unwrap_err().to_string();
    assert!(error.contains("rtn, gptq, best"), "{error}");
    // Who has one size says which.
    for (preset, words) in [
        ("half", "one size, about 16.00 bits"),
        ("billm", "one size, about 3.00 bits"),
        ("awq", "one size for each width, about 3.6"),
        ("aligned-paper-50", "one size, about 3.1"),
    ] {
        let error = quantize(&bench.budget(preset, "one-size", 3.0)).unwrap_err().to_string();
        assert!(error.contains(words), "{preset}: {error}");
    }
    // Answers need completions.
    std::fs::write(bench.path("calibration.jsonl"), "{\"text\": \"nothing but text\"}\n").unwrap();
    let error = quantize(&bench.request("taqo-paper", "no-labels")).unwrap_err().to_string();
    assert!(error.contains("prompt and completion"), "{error}");
}

#[test]
fn scores_and_plans_of_other_inputs_are_refused() {
    let bench = Bench::new("llama", 4);
    bench.add_model("other", "llama", 4, 8);
    let (scores, plan) = (bench.path("scores.json"), bench.path("plan.safetensors"));
    let base = bench.budget("taq", "out", 3.5);
    let request = ScoreRequest {
        model: base.model.clone(),
        calibration: bench.data(),
        settings: base.settings.clone(),
        score: base.allocation.clone().unwrap().score,
    };
    tailorq::score(tailorq::cpu().as_ref(), &request, &scores, &Silent).unwrap();
    tailorq::plan(&scores, &RuleSettings::budget(Rule::Knapsack, 3.5), &plan).unwrap();
    let refused = |change: &dyn Fn(&mut QuantizeRequest), words: &str| {
        let mut request = QuantizeRequest { mode: OutputMode::Overwrite, ..base.clone() };
        request.scores = Some(scores.clone());
        change(&mut request);
        let error = quantize(&request).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    };
    let other = bench.path("other").display().to_string();
    refused(&|r| r.model.clone_from(&other), "another checkpoint");
    refused(&|r| r.allocation.as_mut().unwrap().score.prompts = 2, "other settings of the score");
    refused(&|r| r.settings.group = Group::Inputs(64), "another grid");
    refused(&|r| r.calibration.as_mut().unwrap().seed = 4, "other data");
    refused(&|r| r.scores = Some(plan.clone()), "no score file");
    refused(&|r| r.allocation = None, "read by an allocation");
    let by_plan = |r: &mut QuantizeRequest| (r.allocation, r.scores, r.plan) = (None, None, Some(plan.clone()));
    refused(
        &|r| {
            by_plan(r);
            r.model.clone_from(&other);
        },
        "another checkpoint",
    );
    refused(
        &|r| {
            by_plan(r);
            r.bits_per_weight = Some(3.0);
        },
        "without a budget",
    );
    refused(
        &|r| {
            by_plan(r);
            r.plan = Some(scores.clone());
        },
        "scores.json",
    );
    // A rule that chooses blocks does not fit scores of layers.
    let mut request = QuantizeRequest { mode: OutputMode::Overwrite, ..base.clone() };
    let allocation = request.allocation.as_mut().unwrap();
    (allocation.rule, allocation.score.unit) = (RuleSettings::of(Rule::EndsAndTop, None, None), UnitKind::Layer);
    assert!(matches!(quantize(&request), Err(PipelineError::Settings(_))));
}

#[test]
fn spans_and_measures_differ_and_the_probe_matters() {
    let bench = Bench::new("qwen2", 3);
    let score = |change: &dyn Fn(&mut ScoreSettings)| {
        let mut score = ScoreSettings { widths: vec![2, 4], prompts: 3, ..ScoreSettings::of(AllocationSignal::Taqo) };
        change(&mut score);
        let settings = bench.request("gptq", "").settings;
        let request = ScoreRequest {
            model: bench.path("model").display().to_string(),
            calibration: bench.data(),
            settings,
            score,
        };
        let scores = tailorq::score(tailorq::cpu().as_ref(), &request, &bench.path("s.json"), &Silent).unwrap();
        scores.units.iter().map(|u| u.candidates[0].damage).collect::<Vec<f64>>()
    };
    let found = [
        score(&|_| ()),
        score(&|s| s.span = Span::Last),
        score(&|s| s.span = Span::Prompt),
        score(&|s| s.span = Span::Completion),
        score(&|s| (s.span, s.measure) = (Span::Completion, MeasureKind::Likelihood)),
        score(&|s| s.probe = "gptq".into()),
        score(&|s| s.signal = AllocationSignal::TaqKl),
        score(&|s| s.signal = AllocationSignal::TaqIs),
    ];
    for (i, a) in found.iter().enumerate() {
        assert!(found[..i].iter().all(|b| a != b), "{i}: {found:?}");
        assert!(a.iter().all(|d| d.is_finite() && *d >= 0.0), "{a:?}");
    }
}
