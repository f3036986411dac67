//! Perplexity and divergence against a computation that holds all logits, on tiny random models, and against an
//! independent implementation on a real one.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may stop where it stands, and says why it was skipped"
)]

mod inputs;

use inputs::{Fixture, go_on};
use std::ops::ControlFlow;
use std::path::PathBuf;
use tailorq_eval::{EvalError, TaskOptions, WindowOptions, divergence, perplexity, same_tokens, task};
use tailorq_model::{Batch, Model};
use tailorq_runtime::Device;

const TEXT: &str =
    "The quick brown fox jumps over the lazy dog. Größe, naïveté, 猫と犬; 0123456789 and so on, until it ends.";

impl Fixture {
    fn tokens(&self, text: &str) -> Vec<u32> {
        self.opened.tokenizer.encode(text, true).unwrap()
    }
}

/// Log-probabilities of every position of a window, all of them held, in f64.
fn log_softmax(model: &Model, device: &dyn Device, window: &[u32]) -> Vec<Vec<f64>> {
    let logits = model.logits(device, &model.hidden(device, &Batch::new([window]), None));
    let row = |r: usize| {
        let row: Vec<f64> = logits.row(r).iter().map(|l| f64::from(*l)).collect();
        let sum: f64 = row.iter().map(|l| l.exp()).sum();
        row.iter().map(|l| l - sum.ln()).collect()
    };
    (0..window.len()).map(row).collect()
}

fn best(row: &[f64]) -> usize {
    row.iter().enumerate().fold(0, |b, (i, v)| if *v > row[b] { i } else { b })
}

#[test]
fn perplexity_is_that_of_all_logits_at_once() {
    let fixture = Fixture::new(1, |_| {});
    let tokens = fixture.tokens(TEXT);
    let options = WindowOptions { window: 25, windows: None };
    let measured = perplexity(&fixture.subject(), &tokens, options, &mut go_on).unwrap();
    let windows: Vec<&[u32]> = tokens.chunks_exact(25).collect();
    let mut nll = 0.0;
    for window in &windows {
        let rows = log_softmax(&fixture.opened.model, fixture.device.as_ref(), window);
        nll -= (1..window.len()).map(|t| rows[t - 1][window[t] as usize]).sum::<f64>();
    }
    let targets = windows.len() * 24;
    assert!(windows.len() > 3 && !tokens.len().is_multiple_of(25), "the text should leave a rest");
    let expected = (nll / targets as f64).exp();
    assert!((measured.value / expected - 1.0).abs() < 1e-5, "{} {expected}", measured.value);
    assert_eq!((measured.tokens, measured.windows, measured.window), (targets, windows.len(), 25));
    assert!(!measured.shortened);

    let first = perplexity(&fixture.subject(), &tokens, WindowOptions { windows: Some(1), ..options }, &mut go_on);
    assert_eq!(first.unwrap().tokens, 24);
    let whole = perplexity(&fixture.subject(), &tokens, WindowOptions::default(), &mut go_on).unwrap();
    assert!(whole.shortened);
    assert_eq!((whole.tokens, whole.window), (tokens.len() - 1, tokens.len()));
}

#[test]
fn divergence_is_that_of_all_logits_at_once() {
    let (fixture, other) = (Fixture::new(1, |_| {}), Fixture::new(2, |_| {}));
    let tokens = same_tokens(&fixture.subject(), &other.subject(), TEXT).unwrap();
    let options = WindowOptions { window: 30, windows: Some(3) };
    let (p, d) = divergence(&fixture.subject(), &other.subject(), &tokens, options, &mut go_on).unwrap();
    let (mut kl, mut agreed) = (0.0, 0);
    for window in tokens.chunks_exact(30).take(3) {
        let ours = log_softmax(&fixture.opened.model, fixture.device.as_ref(), window);
        let theirs = log_softmax(&other.opened.model, other.device.as_ref(), window);
        for (m, r) in ours.iter().zip(&theirs).take(29) {
            kl += r.iter().zip(m).map(|(r, m)| r.exp() * (r - m)).sum::<f64>();
            agreed += usize::from(best(r) == best(m));
        }
    }
    let targets = 3.0 * 29.0;
    assert!((d.mean_kl / (kl / targets) - 1.0).abs() < 1e-4, "{} {}", d.mean_kl, kl / targets);
    assert!((d.top1_agreement - agreed as f64 / targets).abs() < 1e-12);
    assert_eq!(p, perplexity(&fixture.subject(), &tokens, options, &mut go_on).unwrap());
    let reference = perplexity(&other.subject(), &tokens, options, &mut go_on).unwrap();
    assert!((d.reference_perplexity / reference.value - 1.0).abs() < 1e-12);
}

#[test]
fn a_model_does_not_differ_from_itself() {
    let fixture = Fixture::new(3, |_| {});
    let subject = fixture.subject();
    let options = WindowOptions { window: 40, windows: None };
    let (p, d) = divergence(&subject, &subject, &fixture.tokens(TEXT), options, &mut go_on).unwrap();
    assert!(d.mean_kl.abs() < 1e-12, "{}", d.mean_kl);
    assert_eq!(d.top1_agreement, 1.0);
    assert!((d.reference_perplexity / p.value - 1.0).abs() < 1e-12);
}

#[test]
fn models_that_cannot_be_compared_are_refused() {
    let fixture = Fixture::new(1, |_| {});
    let wider = Fixture::new(1, |tiny| tiny.config.vocab = 300);
    let tokens = fixture.tokens(TEXT);
    let options = WindowOptions { window: 20, windows: None };
    let error = divergence(&fixture.subject(), &wider.subject(), &tokens, options, &mut go_on).unwrap_err();
    assert!(error.to_string().contains("259") && error.to_string().contains("300"), "{error}");
    let error = perplexity(&fixture.subject(), &[1, 2, 299], options, &mut go_on).unwrap_err();
    assert!(matches!(error, EvalError::UnknownToken { id: 299, position: 2, .. }), "{error}");
}

#[test]
fn windows_beyond_the_context_and_empty_texts_are_refused() {
    let fixture = Fixture::new(1, |tiny| tiny.config.max_positions = 32);
    let tokens = fixture.tokens(TEXT);
    let run = |tokens: &[u32], window| {
        perplexity(&fixture.subject(), tokens, WindowOptions { window, windows: None }, &mut go_on)
    };
    assert!(matches!(run(&tokens, 33), Err(EvalError::BadOption { option: "window", value: 33, .. })));
    assert!(run(&tokens, 32).is_ok());
    // A short text fits, whatever the window.
    assert!(run(&tokens[..10], 2048).is_ok());
    assert!(matches!(run(&[], 8), Err(EvalError::TextTooShort { tokens: 0 })));
}

#[test]
fn damaged_weights_are_an_error_not_a_number() {
    let mut fixture = Fixture::new(1, |_| {});
    fixture.opened.model.norm[3] = f32::NAN;
    let options = WindowOptions { window: 20, windows: None };
    let error = perplexity(&fixture.subject(), &fixture.tokens(TEXT), options, &mut go_on).unwrap_err();
    assert!(matches!(error, EvalError::NotFinite { window: 0, .. }), "{error}");
}

#[test]
fn progress_counts_windows_and_can_stop() {
    let fixture = Fixture::new(1, |_| {});
    let tokens = fixture.tokens(TEXT);
    let options = WindowOptions { window: 20, windows: Some(3) };
    let mut heard = Vec::new();
    let mut listen = |done, total| {
        heard.push((done, total));
        ControlFlow::Continue(())
    };
    perplexity(&fixture.subject(), &tokens, options, &mut listen).unwrap();
    assert_eq!(heard, [(0, 3), (1, 3), (2, 3), (3, 3)]);
    let mut stop = |done, _| if done == 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    assert!(matches!(perplexity(&fixture.subject(), &tokens, options, &mut stop), Err(EvalError::Interrupted)));
}

#[test]
fn the_task_reports_what_the_functions_measure() {
    let (fixture, other) = (Fixture::new(1, |_| {}), Fixture::new(2, |_| {}));
    let perplexity_task = task::find("perplexity").unwrap();
    assert!(task::find("poetry").is_err_and(|e| e.to_string().contains("perplexity")));
    let mut options = TaskOptions { window: Some(30), ..TaskOptions::default() };
    let missing = perplexity_task.run(&fixture.subject(), &options, &mut go_on);
    assert!(matches!(missing, Err(EvalError::MissingInput { .. })));
    options.text = Some(TEXT);
    let alone = perplexity_task.run(&fixture.subject(), &options, &mut go_on).unwrap();
    options.reference = Some(other.subject());
    let compared = perplexity_task.run(&fixture.subject(), &options, &mut go_on).unwrap();
    assert_eq!(alone.value, compared.value);
    let json = serde_json::to_value(&compared).unwrap();
    assert_eq!(json["definition"], "paper");
    assert_eq!(json["window"], 30);
    assert!(json["divergence"]["mean_kl"].as_f64().unwrap() > 0.0);
    assert!(serde_json::to_value(&alone).unwrap().get("divergence").is_none());
}

/// Directories of checkpoints, reference numbers and data, or the word that the test was skipped.
fn directories() -> Option<[PathBuf; 3]> {
    let find = |variable: &str| {
        let value = std::env::var_os(variable).filter(|v| !v.is_empty());
        if value.is_none() {
            println!("skipped: {variable} is not set");
        }
        value.map(PathBuf::from)
    };
    Some([find("TAILORQ_TEST_MODELS")?, find("TAILORQ_TEST_GOLDEN")?, find("TAILORQ_TEST_DATA")?])
}

#[test]
fn a_real_model_has_the_perplexity_of_an_independent_implementation() {
    let Some([models, golden, data]) = directories() else { return };
    let opened = tailorq_model::open(models.join("SmolLM2-135M-Instruct.Q4_1.gguf").to_str().unwrap()).unwrap();
    let fixture = Fixture { opened, device: tailorq_kernels::cpu() };
    let numbers = std::fs::read_to_string(golden.join("smollm2-135m.json")).unwrap();
    let numbers: serde_json::Value = serde_json::from_str(&numbers).unwrap();

    // One window of 128 tokens, whose mean cross entropy is known: the beginning of the validation text.
    let text = std::fs::read_to_string(data.join("wikitext2/wiki.valid.part1.raw.txt")).unwrap();
    let tokens = fixture.tokens(&text.chars().take(3000).collect::<String>());
    let options = WindowOptions { window: 128, windows: Some(1) };
    let short = perplexity(&fixture.subject(), &tokens, options, &mut go_on).unwrap();
    let expected = numbers["mean_cross_entropy"].as_f64().unwrap();
    assert!((short.mean_nll - expected).abs() < 1e-4, "{} {expected}", short.mean_nll);

    if std::env::var_os("TAILORQ_TEST_FULL").is_none() {
        println!("skipped: the long text, because TAILORQ_TEST_FULL is not set");
        return;
    }
    let golden = &numbers["perplexity"];
    let text = std::fs::read_to_string(data.join(golden["text"].as_str().unwrap())).unwrap();
    let tokens = fixture.tokens(&text);
    assert_eq!(tokens.len() as u64, golden["tokens_in_text"].as_u64().unwrap());
    let number = |key: &str| golden[key].as_u64().unwrap() as usize;
    let options = WindowOptions { window: number("window"), windows: Some(number("windows")) };
    let long = perplexity(&fixture.subject(), &tokens, options, &mut go_on).unwrap();
    let expected = golden["value"].as_f64().unwrap();
    assert!((long.value / expected - 1.0).abs() < 1e-3, "{} {expected}", long.value);
}
