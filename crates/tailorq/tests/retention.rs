//! A bar for the held-out score: what passes, what fails, what a failure leaves behind and which items count.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod inputs;

use inputs::{Bench, item, items, quantize};
use std::sync::Mutex;
use tailorq::{
    Bits, Group, Observer, Outcome, OutputMode, PipelineError, QuantizeRequest, QuantizeSettings, Report,
    RetainRequest, Silent,
};
use tailorq_model::testing::TinyModel;

impl Bench {
    /// A tiny model and a calibration file of 40 items, of which 8 are drawn.
    fn new(architecture: &str) -> Self {
        Bench::seeded(architecture, 7)
    }

    fn seeded(architecture: &str, seed: u64) -> Self {
        let mut model = TinyModel::new(architecture, seed).unwrap();
        model.config.n_blocks = 2;
        model.config.tied_head = architecture == "llama";
        let bench = Bench::with_model(&model);
        bench.write("task.jsonl", &items(0..40));
        bench
    }

    fn request(&self, output: &str, min: Option<f64>) -> QuantizeRequest {
        QuantizeRequest {
            settings: QuantizeSettings { group: Group::Inputs(32), bits: Bits::Two, ..QuantizeSettings::default() },
            calibration: Some(self.calibration("task.jsonl", 8)),
            retain: min.map(|min| RetainRequest { min, data: None }),
            ..self.plain_request(output)
        }
    }

    /// Writes items of their own to measure on.
    fn with_data(&self, mut request: QuantizeRequest, text: &str) -> QuantizeRequest {
        self.write("held-out.jsonl", text);
        request.retain.as_mut().unwrap().data = Some(self.path("held-out.jsonl"));
        request
    }
}

fn written(request: &QuantizeRequest) -> Box<Report> {
    match quantize(request).unwrap() {
        Outcome::Written(report) => report,
        Outcome::AlreadyFinished => panic!("was finished before"),
    }
}

/// Remembers what blocks say while they are made.
#[derive(Default)]
struct Details(Mutex<Vec<String>>);

impl Observer for Details {
    fn stage(&self, _: &str, _: u64) {}
    fn progress(&self, _: u64, detail: &str) {
        self.0.lock().unwrap().push(detail.to_owned());
    }
    fn note(&self, _: &str) {}
    fn cancelled(&self) -> bool {
        false
    }
}

#[test]
fn a_bar_that_is_met_changes_nothing_but_the_report() {
    for architecture in ["llama", "qwen3"] {
        let bench = Bench::new(architecture);
        let plain = written(&bench.request("plain", None));
        let report = written(&bench.request("out", Some(0.0)));
        assert!(plain.retention.is_none());
        let retention = report.retention.clone().unwrap();
        assert_eq!((retention.items, retention.min), (32, 0.0));
        let expected = (retention.original_nll - retention.nll).exp();
        assert!((retention.share / expected - 1.0).abs() < 1e-4 && retention.stderr > 0.0, "{retention:?}");
        for name in ["model.safetensors", "recipe.toml", "config.json"] {
            let bytes = |output: &str| std::fs::read(bench.path(output).join(name)).unwrap();
            assert!(bytes("out") == bytes("plain"), "{architecture}: {name}");
        }
        let json = std::fs::read(bench.path("out/report.json")).unwrap();
        let read: Report = serde_json::from_slice(&json).unwrap();
        assert_eq!(&read, report.as_ref());
    }
}

#[test]
fn a_model_below_the_bar_leaves_parts_that_a_lower_bar_takes() {
    // Two bits do a model of random weights good as often as harm.
    let harmed = |bench: &Bench| written(&bench.request("tried", Some(0.0))).retention.unwrap().share < 0.99;
    let bench = (1..20).map(|seed| Bench::seeded("qwen2", seed)).find(harmed).unwrap();
    let whole = written(&bench.request("whole", None));
    let mut request = bench.request("out", Some(1.0));
    let error = quantize(&request).unwrap_err();
    let PipelineError::Retention { report, .. } = &error else { panic!("{error}") };
    assert!(report.share < 1.0 && report.items == 32, "{report:?}");
    let text = error.to_string();
    for word in ["--bits", "--keep", "--samples", "--resume", &format!("{:.4}", report.share)] {
        assert!(text.contains(word), "{text}");
    }
    for name in ["config.json", "model.safetensors", "report.json"] {
        assert!(!bench.path("out").join(name).exists(), "{name}");
    }
    assert!(bench.path("out/.tailorq-partial/block-00001.safetensors").exists());
    request.mode = OutputMode::Resume;
    request.retain.as_mut().unwrap().min = report.share;
    let details = Details::default();
    let Outcome::Written(lower) = tailorq::quantize(tailorq::cpu().as_ref(), &request, &details).unwrap() else {
        panic!()
    };
    assert_eq!(lower.retention.as_ref().unwrap().share, report.share);
    assert_eq!(lower.layers, whole.layers);
    let told = details.0.into_inner().unwrap();
    assert!(told.iter().all(|d| d.is_empty() || d.starts_with("replaying")), "{told:?}");
    assert!(told.iter().any(|d| d.starts_with("replaying")), "{told:?}");
    // A finished run is measured again and left alone.
    request.retain.as_mut().unwrap().min = 1.0;
    let error = quantize(&request).unwrap_err().to_string();
    assert!(error.contains("left as it is"), "{error}");
    assert!(bench.path("out/config.json").exists());
    request.retain.as_mut().unwrap().min = 0.0;
    assert!(matches!(quantize(&request).unwrap(), Outcome::AlreadyFinished));
    // An artifact that was to be replaced by one that fails is not there any more.
    request.mode = OutputMode::Overwrite;
    request.retain.as_mut().unwrap().min = 1.0;
    assert!(matches!(quantize(&request), Err(PipelineError::Retention { .. })));
    assert!(!bench.path("out/config.json").exists());
}

#[test]
fn calibration_items_are_never_held_out() {
    let bench = Bench::new("llama");
    // All 40 calibration items, some in another shape, and 20 others, some twice.
    let own: String = (0..40)
        .map(|i| match i % 2 {
            0 => item(i),
            _ => format!(
                "{{\"messages\": [{{\"role\": \"system\", \"content\": \"be brief\"}}, {{\"role\": \"user\", \"content\": \"WHAT \
                 is {i} plus {}?\"}}, {{\"role\": \"assistant\", \"content\": \"it is {}\"}}]}}\n",
                i * 7,
                i * 8
            ),
        })
        .chain((100..120).map(item))
        .chain((100..110).map(item))
        .collect();
    let mut request = bench.request("out", Some(0.0));
    request.calibration.as_mut().unwrap().samples = 40;
    let request = bench.with_data(request, &own);
    assert_eq!(written(&request).retention.unwrap().items, 20);
}

#[test]
fn what_cannot_be_measured_is_refused_before_any_work() {
    let bench = Bench::new("llama");
    let refuse = |request: QuantizeRequest, word: &str| {
        for error in
            [quantize(&request).unwrap_err(), tailorq::dry_run(tailorq::cpu().as_ref(), &request, &Silent).unwrap_err()]
        {
            let error = error.to_string();
            assert!(error.contains(word), "expected '{word}' in: {error}");
        }
        assert!(!bench.path("out").exists(), "{word}");
    };
    let mut drawn = bench.request("out", Some(0.5));
    drawn.calibration.as_mut().unwrap().samples = 25;
    refuse(drawn, "has 15 items to hold out");
    let mut all = bench.request("out", Some(0.5));
    all.calibration.as_mut().unwrap().samples = 128;
    refuse(all, "--retain-data");
    refuse(bench.request("out", Some(95.0)), "share from 0 to 1");
    refuse(bench.request("out", Some(f64::NAN)), "share from 0 to 1");
    let known: String = (0..40).map(item).collect();
    let mut drawn = bench.with_data(bench.request("out", Some(0.5)), &known);
    drawn.calibration.as_mut().unwrap().samples = 40;
    refuse(drawn, "has 0 items to hold out (40 are calibration items");
    refuse(bench.with_data(bench.request("out", Some(0.5)), "{\"foo\": 1}\n"), "fields [foo]");
    let mut nothing = bench.request("out", Some(0.5));
    nothing.settings.method = "rtn".into();
    nothing.calibration = None;
    refuse(nothing, "--retain-data");
}

#[test]
fn methods_without_calibration_and_plain_text_are_measured_too() {
    let bench = Bench::new("llama");
    let mut request = bench.request("rtn", Some(0.0));
    request.settings.method = "rtn".into();
    assert_eq!(written(&request).retention.unwrap().items, 40, "nothing was drawn");
    let text: String = (0..400).map(|i| format!("sentence {} of a longer text, about {}.\n", i * i, i * 13)).collect();
    std::fs::write(bench.path("text.txt"), text).unwrap();
    let mut request = bench.request("text", Some(0.0));
    let calibration = request.calibration.as_mut().unwrap();
    (calibration.file, calibration.sequence_length) = (bench.path("text.txt"), Some(64));
    let retention = written(&request).retention.unwrap();
    assert_eq!((retention.items, retention.tokens), (64, 64 * 63), "all tokens but the first of each window");
}
