//! TAQ's scores of a real model's blocks, on demand: `TAILORQ_TEST_MODELS=DIR TAILORQ_TEST_DATA=DIR cargo test
//! -p tailorq-quant --test real_signals -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;
use tailorq_quant::signals::{Sampling, information_stability};
use tailorq_quant::survey::{BlockStability, Judged, NoiseSurvey, StabilitySurvey, SurveySample};

const PROMPTS: usize = 12;

/// The smallest GGUF file and the first prompts of GSM8K's calibration items.
fn inputs() -> Option<(PathBuf, String)> {
    let files = std::fs::read_dir(std::env::var_os("TAILORQ_TEST_MODELS")?).ok()?;
    let gguf = files.filter_map(|f| Some(f.ok()?.path())).filter(|p| p.extension() == Some("gguf".as_ref()));
    let model = gguf.min_by_key(|p| std::fs::metadata(p).map_or(u64::MAX, |m| m.len()))?;
    let data = PathBuf::from(std::env::var_os("TAILORQ_TEST_DATA")?).join("gsm8k").join("calib.jsonl");
    Some((model, std::fs::read_to_string(data).ok()?))
}

/// Spearman's correlation of values without ties.
fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    let rank = |v: &[f64], x: f64| v.iter().filter(|y| **y < x).count() as f64;
    let n = a.len() as f64;
    let squares: f64 = a.iter().zip(b).map(|(x, y)| (rank(a, *x) - rank(b, *y)).powi(2)).sum();
    1.0 - 6.0 * squares / (n * (n * n - 1.0))
}

#[test]
#[ignore = "a measurement"]
fn scores_of_blocks() {
    let Some((path, data)) = inputs() else {
        println!("skipped: TAILORQ_TEST_MODELS and TAILORQ_TEST_DATA name no GGUF file and gsm8k/calib.jsonl");
        return;
    };
    let opened = tailorq_model::open(&path.display().to_string()).unwrap();
    let (model, device) = (&opened.model, tailorq_kernels::cpu());
    let device = device.as_ref();
    let prompt = |line: &str| {
        let item: serde_json::Value = serde_json::from_str(line).unwrap();
        let text = format!("Question: {}\nAnswer:", item["question"].as_str().unwrap());
        opened.tokenizer.encode(&text, true).unwrap()
    };
    let prompts: Vec<Vec<u32>> = data.lines().take(PROMPTS).map(prompt).collect();
    println!("{} prompts, {} tokens", prompts.len(), prompts.iter().map(Vec::len).sum::<usize>());
    let depth: Vec<f64> = (0..model.blocks.len()).map(|b| b as f64).collect();
    for (without_first, normalize) in [(false, false), (true, true)] {
        let sampling = Sampling { without_first, ..Sampling::default() };
        let survey = StabilitySurvey { device, model, sampling, normalize, tape_bytes: 1 << 30 };
        let start = Instant::now();
        let blocks = survey.run(&prompts, None, &mut |_| ControlFlow::Continue(())).unwrap();
        let column = |f: fn(&BlockStability) -> f64| blocks.iter().map(f).collect::<Vec<_>>();
        let (information, variance) = (column(|b| b.information), column(|b| b.variance));
        assert!(information.iter().all(|&x| x > 0.0 && x <= 255f64.ln() + 1e-9));
        println!("hygiene {without_first}, {:.1} s", start.elapsed().as_secs_f64());
        let scores = information_stability(&information, &variance);
        println!("information {information:.3?}\nvariance {variance:.3?}\nscores {scores:.3?}");
        let with = |values: &[f64]| rank_correlation(&depth, values);
        println!("with depth: {:.3} {:.3} {:.3}", with(&information), with(&variance), with(&scores));
    }
    let samples: Vec<_> = prompts.into_iter().map(|ids| SurveySample { ids, scored: None }).collect();
    for (judged, n) in [(Judged::LastToken, PROMPTS), (Judged::Scored, 2)] {
        let survey = NoiseSurvey { device, model, bits: 4, seed: 0, judged, tape_bytes: 1 << 30 };
        let start = Instant::now();
        let blocks = survey.run(&samples[..n], None, &mut |_| ControlFlow::Continue(())).unwrap();
        assert!(blocks.iter().all(|b| b.divergence > 0.0));
        println!("noise, {n} prompts, {judged:?}, {:.1} s", start.elapsed().as_secs_f64());
        blocks.iter().for_each(|b| println!("  range {:.2}, divergence {:.4}", b.range, b.divergence));
    }
}
