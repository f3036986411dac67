//! Surveys without labels: the divergence of the rounded model, on completions and on the model's own answers.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod inputs;

use inputs::{Bench, answer, items, quantize, question};
use std::path::Path;
use std::sync::Mutex;
use tailorq::{
    Bits, ChatMessage, CircuitSettings, Group, LossKind, Needs, Observer, OutputMode, PipelineError, QuantizeRequest,
    QuantizeSettings, Silent, SurveyRequest, TokenWeight,
};
use tailorq_model::testing::TinyModel;
use tailorq_model::{Batch, OpenedModel};

const N_ITEMS: usize = 6;

impl Bench {
    fn new() -> Self {
        let mut model = TinyModel::new("qwen2", 11).unwrap();
        // Tables at 16 bits are then what they were.
        model.dtype = tailorq_tensor::DType::BF16;
        let bench = Bench::with_model(&model);
        bench.write("pairs.jsonl", &items(0..N_ITEMS));
        let prompt = |i| format!("{{\"prompt\": \"{}\"}}\n", question(i));
        bench.write("prompts.jsonl", &(0..N_ITEMS).map(prompt).collect::<String>());
        bench
    }

    fn request(&self, data: &str, output: &str) -> QuantizeRequest {
        let settings = QuantizeSettings {
            bits: Bits::Two,
            group: Group::Inputs(32),
            loss: LossKind::Kl,
            embedding_bits: 16,
            head_bits: 16,
            ..QuantizeSettings::default()
        };
        QuantizeRequest {
            settings,
            calibration: Some(self.calibration(data, N_ITEMS)),
            circuit: Some(CircuitSettings { keep: 0.02, ..CircuitSettings::default() }),
            ..self.plain_request(output)
        }
    }

    fn survey(&self, request: &QuantizeRequest, name: &str) -> Result<f64, PipelineError> {
        let request =
            SurveyRequest { needs: Needs { absolute: true, ..Needs::default() }, ..SurveyRequest::of(request) };
        tailorq::survey(tailorq::cpu().as_ref(), &request, &self.path(name), &Silent).map(Option::unwrap)
    }
}

fn log_shares(opened: &OpenedModel, ids: &[u32]) -> Vec<Vec<f64>> {
    let device = tailorq::cpu();
    let logits = opened.model.logits(device.as_ref(), &opened.model.hidden(device.as_ref(), &Batch::new([ids]), None));
    let row = |t| {
        let row: Vec<f64> = logits.row(t).iter().map(|l| f64::from(*l)).collect();
        let sum = row.iter().map(|l| l.exp()).sum::<f64>().ln();
        row.iter().map(|l| l - sum).collect()
    };
    (0..ids.len()).map(row).collect()
}

#[test]
fn the_loss_is_the_divergence_of_the_rounded_model_at_the_completions() {
    let bench = Bench::new();
    let request = bench.request("pairs.jsonl", "tacq");
    let loss = bench.survey(&request, "pairs.survey").unwrap();
    // The rounded model as an artifact of its own.
    let mut rounded = request.clone();
    (rounded.settings.method, rounded.circuit, rounded.output) = ("rtn".into(), None, bench.path("rtn"));
    quantize(&rounded).unwrap();
    let original = tailorq::open(&request.model).unwrap();
    let rounded = tailorq::open(&bench.path("rtn").display().to_string()).unwrap();
    let turn = |role: &str, content: String| ChatMessage { role: role.into(), content };
    let template = original.template.as_ref().unwrap();
    let of_item = |i: usize| {
        let turns = [turn("user", question(i)), turn("assistant", answer(i))];
        let encode = |text: String| original.tokenizer.encode(&text, false).unwrap();
        let first = encode(template.render_at(&turns[..1], true, 0).unwrap()).len();
        let ids = encode(template.render_at(&turns, false, 0).unwrap());
        let (p, q) = (log_shares(&original, &ids), log_shares(&rounded, &ids));
        let at = |t: usize| p[t].iter().zip(&q[t]).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        (first - 1..ids.len() - 1).map(at).sum::<f64>() / (ids.len() - first) as f64
    };
    let expected = (0..N_ITEMS).map(of_item).sum::<f64>() / N_ITEMS as f64;
    assert!(expected > 1e-3 && (loss / expected - 1.0).abs() < 1e-3, "{loss} {expected}");
}

#[test]
fn prompts_alone_are_enough_and_a_survey_is_of_one_grid() {
    let bench = Bench::new();
    let request = bench.request("prompts.jsonl", "out");
    let loss = bench.survey(&request, "a.survey").unwrap();
    assert!(loss > 1e-3, "{loss}");
    assert_eq!(bench.survey(&request, "b.survey").unwrap(), loss);
    let read = |name: &str| std::fs::read(bench.path(name)).unwrap();
    assert!(read("a.survey") == read("b.survey"));
    // The same survey, made before or on the way.
    quantize(&request).unwrap();
    let given =
        QuantizeRequest { survey: Some(bench.path("a.survey")), output: bench.path("given"), ..request.clone() };
    quantize(&given).unwrap();
    assert!(read("out/model.safetensors") == read("given/model.safetensors"));
    // Labels choose other weights, and completions are other answers than the model's own.
    let mut labels = request.clone();
    (labels.settings.loss, labels.output) = (LossKind::Full, bench.path("labels"));
    quantize(&labels).unwrap();
    assert!(read("out/model.safetensors") != read("labels/model.safetensors"));
    assert_ne!(bench.survey(&bench.request("pairs.jsonl", "x"), "c.survey").unwrap(), loss);
    // Gradients at another grid are others.
    let mut wider = QuantizeRequest { output: bench.path("wider"), ..given };
    wider.settings.bits = Bits::Three;
    let refused = quantize(&wider).unwrap_err().to_string();
    assert!(refused.contains("grid"), "{refused}");
    let at_three = bench.survey(&wider, "three.survey").unwrap();
    assert!(at_three < loss, "{at_three} {loss}");
}

#[test]
fn own_answers_take_the_place_of_completions() {
    let bench = Bench::new();
    let from_prompts = bench.survey(&bench.request("prompts.jsonl", "out"), "prompts.survey").unwrap();
    let mut request = bench.request("pairs.jsonl", "out");
    let labelled = bench.survey(&request, "pairs.survey").unwrap();
    request.settings.own_answers = true;
    // The pairs are the prompts with answers, which nobody reads now.
    assert_eq!(bench.survey(&request, "own.survey").unwrap(), from_prompts);
    assert_ne!(labelled, from_prompts);
    request.survey = Some(bench.path("pairs.survey"));
    let refused = quantize(&request).unwrap_err().to_string();
    assert!(refused.contains("was made from another"), "{refused}");
    (request.survey, request.output) = (Some(bench.path("own.survey")), bench.path("given"));
    quantize(&request).unwrap();
    request.settings.loss = LossKind::Completion;
    let refused = quantize(&request).unwrap_err().to_string();
    assert!(refused.contains("--own-answers with --loss kl"), "{refused}");
}

#[test]
fn token_weights_need_the_calibration_s_own_completions() {
    let bench = Bench::new();
    let mut request = bench.request("prompts.jsonl", "out");
    request.settings.token_weight = TokenWeight::Gradient;
    let refused = quantize(&request).unwrap_err().to_string();
    assert!(refused.contains("--loss kl") && refused.contains("--token-weight"), "{refused}");
    let mut request = bench.request("pairs.jsonl", "pairs");
    request.settings.token_weight = TokenWeight::Gradient;
    quantize(&request).unwrap();
}

/// Items whose completion is cut off have no energies, which is said before anything is surveyed.
#[test]
fn token_weights_need_completions_within_the_sequence() {
    let bench = Bench::new();
    let mut request = bench.request("pairs.jsonl", "out");
    (request.settings.loss, request.settings.token_weight) = (LossKind::Completion, TokenWeight::Gradient);
    request.calibration.as_mut().unwrap().sequence_length = Some(8);
    let refused = quantize(&request).unwrap_err().to_string();
    assert!(refused.contains("--sequence-length") && refused.contains("--loss full"), "{refused}");
}

/// Remembers notes.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Observer for Notes {
    fn stage(&self, _: &str, _: u64) {}
    fn progress(&self, _: u64, _: &str) {}
    fn note(&self, message: &str) {
        self.0.lock().unwrap().push(message.to_owned());
    }
    fn cancelled(&self) -> bool {
        false
    }
}

/// Puts another version, of as many letters, into the header of a safetensors file.
fn from_another_version(file: &Path) {
    let bytes = std::fs::read(file).unwrap();
    let (from, to) = (format!("\"tailorq\":\"{}\"", env!("CARGO_PKG_VERSION")), "\"tailorq\":\"0.0.9\"");
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
    let changed = [&bytes[..at], to.as_bytes(), &bytes[at + to.len()..]].concat();
    std::fs::write(file, changed).unwrap();
}

#[test]
fn a_survey_of_another_version_is_used_with_a_note() {
    let bench = Bench::new();
    let mut request = bench.request("pairs.jsonl", "out");
    bench.survey(&request, "own.survey").unwrap();
    request.survey = Some(bench.path("own.survey"));
    let notes_of = |request: &QuantizeRequest| {
        let notes = Notes::default();
        tailorq::quantize(tailorq::cpu().as_ref(), request, &notes).unwrap();
        notes.0.into_inner().unwrap()
    };
    assert!(!notes_of(&request).iter().any(|n| n.contains("made by tailorq")));
    from_another_version(&bench.path("own.survey"));
    request.mode = OutputMode::Overwrite;
    let notes = notes_of(&request);
    assert!(notes.iter().any(|n| n.contains("own.survey was made by tailorq 0.0.9")), "{notes:?}");
}
