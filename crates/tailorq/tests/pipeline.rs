//! The main path on small random models: what a run writes, and that nothing which must not matter changes it.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod inputs;

use inputs::{Bench, StopAfter, assert_same, files, items, quantize};
use std::path::Path;
use tailorq::{
    Bits, CircuitSettings, CircuitSignal, Group, LossKind, Outcome, OutputMode, PRESETS, PipelineError, Preset,
    QuantizeRequest, QuantizeSettings, Recipe, Reference, Report, Silent, SurveyRequest, TokenWeight,
};
use tailorq_model::testing::TinyModel;

impl Bench {
    fn new(architecture: &str) -> Self {
        let mut model = TinyModel::new(architecture, 7).unwrap();
        model.config.n_blocks = 3;
        model.config.intermediate = 144;
        model.config.tied_head = architecture == "llama";
        let bench = Bench::with_model(&model);
        bench.write("calibration.jsonl", &items(0..12));
        bench
    }

    fn request(&self, output: &str) -> QuantizeRequest {
        QuantizeRequest {
            settings: QuantizeSettings { group: Group::Inputs(32), ..QuantizeSettings::default() },
            calibration: Some(self.calibration("calibration.jsonl", 8)),
            ..self.plain_request(output)
        }
    }
}

#[test]
fn an_artifact_opens_and_says_what_it_is() {
    for architecture in ["llama", "qwen2", "qwen3"] {
        let bench = Bench::new(architecture);
        let Outcome::Written(report) = quantize(&bench.request("out")).unwrap() else { panic!("not written") };
        assert_eq!(report.layers.len(), 3 * 7 + if architecture == "llama" { 1 } else { 2 });
        assert!(report.notes().next().is_none(), "{:?}", report.notes().collect::<Vec<_>>());
        let opened = tailorq::open(&bench.path("out").display().to_string()).unwrap();
        let inspection = tailorq::inspect(&opened);
        assert_eq!(inspection.architecture, architecture);
        assert!((inspection.linears.bits_per_weight - report.size.linear_bits_per_weight).abs() < 1e-9);
        // 3 bits, an f16 scale and a 3-bit zero per 32 inputs, and short last groups (144 = 4.5 x 32).
        assert!((3.5..4.2).contains(&inspection.linears.bits_per_weight), "{}", inspection.linears.bits_per_weight);
        for name in ["tokenizer.json", "recipe.toml", "report.json", "README.md", "config.json"] {
            assert!(bench.path("out").join(name).exists(), "{name}");
        }
        assert!(!bench.path("out/.tailorq-partial").exists());
    }
}

#[test]
fn a_stopped_run_resumes_to_the_same_bytes() {
    let bench = Bench::new("qwen2");
    quantize(&bench.request("whole")).unwrap();
    let whole = files(&bench.path("whole"));
    for stop in [1, 5, 9, 16, 20] {
        let name = format!("stopped-{stop}");
        let mut request = bench.request(&name);
        let stopped = tailorq::quantize(tailorq::cpu().as_ref(), &request, &StopAfter::new(stop));
        assert!(matches!(stopped, Err(PipelineError::Cancelled)), "stop {stop}: {stopped:?}");
        assert!(!bench.path(&name).join("config.json").exists());
        // What is there is refused without a word on what to do with it.
        assert!(matches!(quantize(&request), Err(PipelineError::Output { .. })));
        request.mode = OutputMode::Resume;
        quantize(&request).unwrap();
        assert_same(&files(&bench.path(&name)), &whole, &format!("stop {stop}"));
    }
}

#[test]
fn damaged_parts_are_made_again() {
    let bench = Bench::new("llama");
    quantize(&bench.request("whole")).unwrap();
    let mut request = bench.request("out");
    let stop = StopAfter::new(17);
    assert!(tailorq::quantize(tailorq::cpu().as_ref(), &request, &stop).is_err());
    let part = bench.path("out/.tailorq-partial/block-00000.safetensors");
    let bytes = std::fs::read(&part).unwrap();
    std::fs::write(&part, &bytes[..bytes.len() / 2]).unwrap();
    request.mode = OutputMode::Resume;
    quantize(&request).unwrap();
    assert_same(&files(&bench.path("out")), &files(&bench.path("whole")), "a damaged part");
}

#[test]
fn threads_do_not_change_a_byte() {
    let bench = Bench::new("qwen3");
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| quantize(&bench.request(&format!("threads-{threads}")))).unwrap();
    }
    let one = files(&bench.path("threads-1"));
    assert_same(&one, &files(&bench.path("threads-2")), "2 threads");
    assert_same(&one, &files(&bench.path("threads-3")), "3 threads");
}

#[test]
fn a_recipe_repeats_a_run_and_refuses_other_inputs() {
    let bench = Bench::new("llama");
    let mut first = bench.request("first");
    first.settings.bits = Bits::Two;
    first.settings.act_order = true;
    quantize(&first).unwrap();
    let recipe = Recipe::read(&bench.path("first/recipe.toml")).unwrap();
    let again = QuantizeRequest::repeat(recipe.clone(), bench.path("again"), OutputMode::Fresh);
    quantize(&again).unwrap();
    assert_same(&files(&bench.path("first")), &files(&bench.path("again")), "the repeated run");
    let mut text = std::fs::read_to_string(bench.path("calibration.jsonl")).unwrap();
    text.push_str("{\"text\": \"one more\"}\n");
    std::fs::write(bench.path("calibration.jsonl"), text).unwrap();
    let changed = quantize(&QuantizeRequest::repeat(recipe, bench.path("changed"), OutputMode::Fresh));
    assert!(matches!(&changed, Err(PipelineError::Recipe { .. })), "{changed:?}");
    assert!(!bench.path("changed").exists());
}

#[test]
fn resume_on_a_finished_run_is_content_and_on_another_recipe_refuses() {
    let bench = Bench::new("llama");
    let mut request = bench.request("out");
    request.mode = OutputMode::Resume;
    assert!(matches!(quantize(&request).unwrap(), Outcome::Written(_)), "an empty place starts afresh");
    assert!(matches!(quantize(&request).unwrap(), Outcome::AlreadyFinished));
    request.settings.bits = Bits::Four;
    let refused = quantize(&request).unwrap_err().to_string();
    assert!(refused.contains("quantize.bits: 4 here, 3 there"), "{refused}");
    request.mode = OutputMode::Overwrite;
    assert!(matches!(quantize(&request).unwrap(), Outcome::Written(_)));
    let opened = tailorq::open(&bench.path("out").display().to_string()).unwrap();
    assert!(tailorq::inspect(&opened).linears.bits_per_weight > 4.5);
}

#[test]
fn rtn_needs_no_calibration_and_gptq_says_that_it_does() {
    let bench = Bench::new("llama");
    let mut request = bench.request("out");
    request.calibration = None;
    let refused = quantize(&request).unwrap_err().to_string();
    assert!(refused.contains("--calibration"), "{refused}");
    request.settings.method = "rtn".into();
    quantize(&request).unwrap();
}

#[test]
fn tables_at_sixteen_bits_are_kept_as_they_are() {
    let bench = Bench::new("qwen2");
    let mut model = TinyModel::new("qwen2", 9).unwrap();
    model.dtype = tailorq_tensor::DType::BF16;
    model.config.tied_head = false;
    model.write_directory(&bench.path("model")).unwrap();
    let mut request = bench.request("out");
    request.settings.embedding_bits = 16;
    request.settings.head_bits = 16;
    quantize(&request).unwrap();
    let (a, b) =
        (tailorq::open(&request.model).unwrap(), tailorq::open(&request.output.display().to_string()).unwrap());
    assert_eq!(a.model.embedding.to_matrix(), b.model.embedding.to_matrix());
    assert_eq!(a.model.head.to_matrix(), b.model.head.to_matrix());
}

#[test]
fn linears_at_sixteen_bits_are_counted_as_such() {
    let bench = Bench::new("qwen2");
    let mut request = bench.request("out");
    request.settings.method = "half".into();
    request.calibration = None;
    let Outcome::Written(report) = quantize(&request).unwrap() else { panic!("not written") };
    assert!((report.size.linear_bits_per_weight - 16.0).abs() < 1e-9);
    assert!(report.size.counted_bits_per_weight.is_none());
    let opened = tailorq::open(&request.output.display().to_string()).unwrap();
    assert!((tailorq::inspect(&opened).linears.bits_per_weight - 16.0).abs() < 1e-9);
    let (_, estimate) = tailorq::dry_run(tailorq::cpu().as_ref(), &request, &Silent).unwrap();
    assert!((estimate.linear_bits_per_weight - 16.0).abs() < 1e-9);
    let whole = files(&request.output);
    request.output = bench.path("stopped");
    let stopped = tailorq::quantize(tailorq::cpu().as_ref(), &request, &StopAfter::new(9));
    assert!(matches!(stopped, Err(PipelineError::Cancelled)), "{stopped:?}");
    request.mode = OutputMode::Resume;
    quantize(&request).unwrap();
    assert_same(&files(&request.output), &whole, "the resumed run");
}

/// Every method as its preset has it: an artifact that opens and answers, counted twice where it is simulated, and a recipe
/// that repeats its bytes.
#[test]
fn every_preset_makes_an_artifact_that_its_recipe_repeats() {
    let bench = Bench::new("qwen2");
    for preset in PRESETS {
        let mut request = bench.request(preset.name);
        let method = preset.method();
        (request.settings, request.circuit) = (method.quantize, method.circuit);
        let Outcome::Written(report) = quantize(&request).unwrap() else { panic!("not written") };
        let opened = tailorq::open(&request.output.display().to_string()).unwrap();
        let inspection = tailorq::inspect(&opened);
        assert!(
            (inspection.linears.bits_per_weight - report.size.linear_bits_per_weight).abs() < 1e-9,
            "{}",
            preset.name
        );
        let batch = tailorq_model::Batch::new([&[1u32, 5, 9][..]]);
        let device = tailorq::cpu();
        let logits = opened.model.logits(device.as_ref(), &opened.model.hidden(device.as_ref(), &batch, None));
        assert!(logits.data().iter().all(|l| l.is_finite()), "{}", preset.name);
        // True 8 bit stands in a packed form that is wider than its own.
        let is_half = preset.about.contains("simulated");
        let is_simulated = is_half || preset.name.contains("true8");
        assert_eq!(report.size.counted_bits_per_weight.is_some(), is_simulated, "{}", preset.name);
        for layer in report.layers.iter().filter(|l| l.name.contains("layers")) {
            assert_eq!((layer.simulated, layer.counted_bits.is_some()), (is_simulated, is_simulated), "{}", layer.name);
        }
        if let Some(counted) = report.size.counted_bits_per_weight.filter(|_| is_half) {
            assert!(report.size.linear_bits_per_weight > 15.999 && counted < 12.0, "{}: {counted}", preset.name);
            let card = std::fs::read_to_string(request.output.join("README.md")).unwrap();
            assert!(card.contains(&format!("{counted:.2} bits in its own format")), "{card}");
        }
        let recipe = Recipe::read(&request.output.join("recipe.toml")).unwrap();
        let again = bench.path(&format!("{}-again", preset.name));
        quantize(&QuantizeRequest::repeat(recipe, again.clone(), OutputMode::Fresh)).unwrap();
        assert_same(&files(&again), &files(&request.output), preset.name);
    }
}

/// A simulated run that was stopped: its parts, with what was counted, are read back as they were.
#[test]
fn a_simulated_run_resumes_to_the_same_bytes() {
    let bench = Bench::new("llama");
    for name in ["squeezellm", "billm"] {
        let mut request = bench.request(&format!("{name}-whole"));
        request.settings = Preset::find(name).unwrap().method().quantize;
        quantize(&request).unwrap();
        let whole = files(&request.output);
        for stop in [6, 14, 22] {
            request.output = bench.path(&format!("{name}-{stop}"));
            request.mode = OutputMode::Fresh;
            let stopped = tailorq::quantize(tailorq::cpu().as_ref(), &request, &StopAfter::new(stop));
            assert!(stopped.is_err(), "{name}, stop {stop}");
            request.mode = OutputMode::Resume;
            quantize(&request).unwrap();
            assert_same(&files(&request.output), &whole, &format!("{name}, stop {stop}"));
        }
    }
    let mut request = bench.request("circuit");
    request.settings.method = "spqr".into();
    request.circuit = Some(CircuitSettings::default());
    assert!(quantize(&request).unwrap_err().to_string().contains("circuit"));
}

/// A plan file with settings of its own for some layers, written by hand: a table in the header, no tensors.
fn write_plan(path: &Path, model: &str, layers: &str) {
    let header =
        serde_json::json!({"__metadata__": {"tailorq_plan": "1", "model": model, "layers": layers}}).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_plan_mixes_packed_and_dense_layers() {
    let bench = Bench::new("llama");
    let mut request = bench.request("out");
    let stop = StopAfter::new(1);
    assert!(tailorq::quantize(tailorq::cpu().as_ref(), &request, &stop).is_err());
    let recipe = Recipe::read(&bench.path("out/.tailorq-partial/recipe.toml")).unwrap();
    let layout = r#"{"bits":8,"group":"row","symmetric":false}"#;
    let layers = format!(
        r#"{{"model.layers.0.self_attn.q_proj":{{"layout":{layout},"half":true}},"model.layers.2.mlp.down_proj":{{"layout":{layout},"half":true}},"model.layers.1.mlp.up_proj":{{"layout":{layout}}}}}"#
    );
    let partial = bench.path("out/.tailorq-partial");
    std::fs::remove_file(partial.join("block-00000.safetensors")).ok();
    write_plan(&partial.join("plan.safetensors"), &recipe.model.sha256, &layers);
    request.mode = OutputMode::Resume;
    let Outcome::Written(report) = quantize(&request).unwrap() else { panic!("not written") };
    let opened = tailorq::open(&request.output.display().to_string()).unwrap();
    let inspection = tailorq::inspect(&opened);
    assert!((inspection.linears.bits_per_weight - report.size.linear_bits_per_weight).abs() < 1e-9);
    for matrix in &inspection.matrices {
        let expected = match matrix.name.as_str() {
            "model.layers.0.self_attn.q_proj" | "model.layers.2.mlp.down_proj" => "16",
            "model.layers.1.mlp.up_proj" | "model.embed_tokens" => "8-bit",
            _ => "3-bit",
        };
        assert!(matrix.encoding.contains(expected), "{}: {}", matrix.name, matrix.encoding);
        if expected == "16" {
            assert!((matrix.bits_per_weight - 16.0).abs() < 1e-9);
        }
    }
}

#[test]
fn bad_places_and_bad_texts_are_refused_before_anything_is_written() {
    let bench = Bench::new("llama");
    let refuse = |change: &dyn Fn(&mut QuantizeRequest), word: &str| {
        let mut request = bench.request("out");
        change(&mut request);
        let error = quantize(&request).unwrap_err().to_string();
        assert!(error.contains(word), "expected '{word}' in: {error}");
        assert!(!bench.path("out").exists(), "{word}");
    };
    let write = |name: &str, text: &[u8]| {
        std::fs::write(bench.path(name), text).unwrap();
        let file = bench.path(name);
        move |r: &mut QuantizeRequest| r.calibration.as_mut().unwrap().file.clone_from(&file)
    };
    refuse(&write("empty.jsonl", b""), "is empty");
    refuse(&write("blank.txt", b"  \n "), "is empty");
    refuse(&write("broken.jsonl", b"{\"text\": \"a b c\"}\n{\"text\": "), "line 2");
    refuse(&write("shape.jsonl", b"{\"foo\": 1}\n"), "fields [foo]");
    refuse(&write("latin1.txt", b"caf\xe9"), "UTF-8");
    refuse(&|r| r.calibration.as_mut().unwrap().file = "/no/such/file.jsonl".into(), "/no/such/file.jsonl");
    refuse(&|r| r.calibration.as_mut().unwrap().samples = 0, "--samples");
    refuse(&|r| r.calibration.as_mut().unwrap().sequence_length = Some(1_000_000), "context");
    refuse(&|r| r.settings.method = "magic".into(), "magic");
    refuse(&|r| r.settings.damping = f64::NAN, "damping");
    refuse(&|r| r.model = "/no/such/model".into(), "/no/such/model");
    refuse(&|r| r.output.clone_from(&bench.path("calibration.jsonl")), "is a file");
    refuse(&|r| (r.output, r.mode) = (bench.path("model"), OutputMode::Overwrite), "source checkpoint");
}

#[test]
fn a_damaged_weight_names_its_tensor_and_leaves_no_artifact() {
    for bad in [f32::NAN, f32::INFINITY] {
        let bench = Bench::new("llama");
        poison(&bench.path("model/model.safetensors"), "model.layers.1.mlp.up_proj.weight", bad);
        for method in ["gptq", "rtn"] {
            let mut request = bench.request(method);
            request.settings.method = method.into();
            let error = quantize(&request).unwrap_err().to_string();
            assert!(error.contains("model.layers.1.mlp.up_proj.weight"), "{error}");
            assert!(!bench.path(method).join("config.json").exists());
        }
    }
}

/// Writes `value` into the middle of an F32 tensor of a safetensors file.
fn poison(file: &Path, tensor: &str, value: f32) {
    let mut bytes = std::fs::read(file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let offsets = &json[tensor]["data_offsets"];
    let (start, end) = (offsets[0].as_u64().unwrap() as usize, offsets[1].as_u64().unwrap() as usize);
    let at = 8 + header + start + (end - start) / 8 * 4;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn a_second_process_is_kept_out() {
    let bench = Bench::new("llama");
    std::fs::create_dir_all(bench.path("out/.tailorq-partial")).unwrap();
    let lock = std::fs::File::create(bench.path("out/.tailorq-partial/lock")).unwrap();
    lock.try_lock().unwrap();
    let mut request = bench.request("out");
    request.mode = OutputMode::Resume;
    let error = quantize(&request).unwrap_err().to_string();
    assert!(error.contains("another tailorq"), "{error}");
}

#[test]
fn overwrite_replaces_an_artifact_whole_and_nothing_else() {
    let bench = Bench::new("llama");
    let mut request = bench.request("out");
    std::fs::create_dir_all(&request.output).unwrap();
    std::fs::write(bench.path("out/model_lora.safetensors"), b"mine").unwrap();
    request.mode = OutputMode::Overwrite;
    let refused = quantize(&request).unwrap_err().to_string();
    assert!(refused.contains("did not write"), "{refused}");
    std::fs::remove_file(bench.path("out/model_lora.safetensors")).unwrap();
    quantize(&request).unwrap();
    // An older artifact may hold papers and shards that the new one does not.
    std::fs::write(bench.path("out/chat_template.jinja"), b"old").unwrap();
    std::fs::write(bench.path("out/model-00001-of-00002.safetensors"), b"old").unwrap();
    std::fs::write(bench.path("out/notes.txt"), b"mine").unwrap();
    request.settings.bits = Bits::Four;
    quantize(&request).unwrap();
    let names: Vec<_> = files(&bench.path("out")).into_keys().collect();
    assert!(names.contains(&"notes.txt".to_string()));
    assert!(!names.iter().any(|n| n == "chat_template.jinja" || n.contains("00002")), "{names:?}");
}

#[test]
fn parts_without_their_recipe_are_never_used() {
    let bench = Bench::new("llama");
    quantize(&bench.request("whole")).unwrap();
    let mut other = bench.request("out");
    other.settings.bits = Bits::Two;
    let stop = StopAfter::new(17);
    assert!(tailorq::quantize(tailorq::cpu().as_ref(), &other, &stop).is_err());
    std::fs::remove_file(bench.path("out/.tailorq-partial/recipe.toml")).unwrap();
    let mut request = bench.request("out");
    request.mode = OutputMode::Resume;
    quantize(&request).unwrap();
    assert_same(&files(&bench.path("out")), &files(&bench.path("whole")), "leftover parts");
}

#[test]
fn a_finished_artifact_that_cannot_be_opened_is_no_success() {
    let bench = Bench::new("llama");
    let mut request = bench.request("out");
    quantize(&request).unwrap();
    std::fs::remove_file(bench.path("out/model.safetensors")).unwrap();
    request.mode = OutputMode::Resume;
    assert!(quantize(&request).is_err());
}

#[test]
fn a_damaged_table_is_an_error_at_any_width() {
    for (bits, name) in [(8, "eight"), (16, "sixteen")] {
        let bench = Bench::new("llama");
        poison(&bench.path("model/model.safetensors"), "model.embed_tokens.weight", f32::NAN);
        let mut request = bench.request(name);
        request.settings.embedding_bits = bits;
        let error = quantize(&request).unwrap_err().to_string();
        assert!(error.contains("model.embed_tokens.weight"), "{error}");
        assert!(!bench.path(name).join("config.json").exists());
    }
}

/// A request for TACQ over the tiny model; the share is larger than real ones, whose layers are.
fn circuit(bench: &Bench, output: &str, reference: Reference) -> QuantizeRequest {
    let mut request = bench.request(output);
    request.settings.bits = Bits::Two;
    request.circuit = Some(CircuitSettings { keep: 0.02, reference, ..CircuitSettings::default() });
    request
}

#[test]
fn a_circuit_is_kept_resumed_and_repeated_to_the_same_bytes() {
    let bench = Bench::new("qwen2");
    for reference in [Reference::Rtn, Reference::Gptq] {
        let name = format!("whole-{reference:?}");
        let Outcome::Written(report) = quantize(&circuit(&bench, &name, reference)).unwrap() else { panic!() };
        let weights = tailorq::inspect(&tailorq::open(&bench.path(&name).display().to_string()).unwrap()).linears;
        assert!((weights.bits_per_weight - report.size.linear_bits_per_weight).abs() < 1e-9);
        let plain = {
            let mut request = circuit(&bench, &format!("plain-{reference:?}"), reference);
            request.circuit = None;
            let Outcome::Written(report) = quantize(&request).unwrap() else { panic!() };
            report
        };
        // A value and a column for each kept element, and a count for each row.
        let rows: usize = report.layers.iter().filter(|l| l.name.contains("layers")).map(|l| l.rows).sum();
        let kept = (0.02 * weights.parameters as f64).floor() as usize;
        let bytes = |r: &Report| r.layers.iter().map(|l| l.bytes).sum::<usize>();
        assert_eq!(bytes(&report) - bytes(&plain), 4 * kept + 2 * rows);
        assert!(report.mean_relative_error() < plain.mean_relative_error());
        let whole = files(&bench.path(&name));
        for stop in [2, 6, 30, 45] {
            let mut request = circuit(&bench, &format!("{name}-{stop}"), reference);
            let stopped = tailorq::quantize(tailorq::cpu().as_ref(), &request, &StopAfter::new(stop));
            assert!(matches!(stopped, Err(PipelineError::Cancelled)), "stop {stop}: {stopped:?}");
            request.mode = OutputMode::Resume;
            quantize(&request).unwrap();
            assert_same(&files(&request.output), &whole, &format!("{reference:?}, stop {stop}"));
        }
        let recipe = Recipe::read(&bench.path(&name).join("recipe.toml")).unwrap();
        let again = bench.path(&format!("{name}-again"));
        quantize(&QuantizeRequest::repeat(recipe, again.clone(), OutputMode::Fresh)).unwrap();
        assert_same(&files(&again), &whole, "the recipe");
    }
}

#[test]
fn salient_tiles_are_stored_counted_resumed_and_repeated() {
    let bench = Bench::new("llama");
    for name in ["aligned", "aligned-task", "aligned-paper-50", "aligned-true8-100"] {
        let mut request = bench.request(name);
        request.settings =
            QuantizeSettings { group: Group::Inputs(32), ..Preset::find(name).unwrap().method().quantize };
        let device = tailorq::cpu();
        let Outcome::Written(report) = quantize(&request).unwrap() else { panic!() };
        let (_, estimate) = tailorq::dry_run(device.as_ref(), &request, &Silent).unwrap();
        let bits = (report.size.linear_bits_per_weight, estimate.linear_bits_per_weight);
        assert!((bits.0 / bits.1 - 1.0).abs() < 1e-6, "{name}: {bits:?}");
        let opened = tailorq::open(&bench.path(name).display().to_string()).unwrap();
        assert!((tailorq::inspect(&opened).linears.bits_per_weight - bits.0).abs() < 1e-9);
        assert_eq!(report.size.counted_bits_per_weight.is_some_and(|b| b < bits.0), name.contains("true8"));
        let mut stopped = request.clone();
        stopped.output = bench.path(&format!("{name}-stopped"));
        let run = tailorq::quantize(device.as_ref(), &stopped, &StopAfter::new(9));
        assert!(matches!(run, Err(PipelineError::Cancelled)));
        stopped.mode = OutputMode::Resume;
        quantize(&stopped).unwrap();
        let whole = files(&bench.path(name));
        assert_same(&files(&stopped.output), &whole, name);
        let recipe = Recipe::read(&bench.path(&format!("{name}/recipe.toml"))).unwrap();
        let again = bench.path(&format!("{name}-again"));
        quantize(&QuantizeRequest::repeat(recipe, again.clone(), OutputMode::Fresh)).unwrap();
        assert_same(&files(&again), &whole, name);
    }
    let mut request = bench.request("none");
    request.settings.aligned = Some(tailorq::AlignedSettings::default());
    let refused = quantize(&request).unwrap_err().to_string();
    assert!(refused.contains("gptq has no salient tiles"), "{refused}");
}

#[test]
fn a_survey_serves_other_plans_and_only_its_own_inputs() {
    let bench = Bench::new("llama");
    let survey = bench.path("survey.safetensors");
    let mut request = circuit(&bench, "with", Reference::Rtn);
    request.settings.token_weight = TokenWeight::GradientInverseNorm;
    let needs = SurveyRequest::of(&request);
    tailorq::survey(tailorq::cpu().as_ref(), &needs, &survey, &Silent).unwrap();
    let mut again = request.clone();
    again.output = bench.path("without");
    request.survey = Some(survey.clone());
    quantize(&request).unwrap();
    quantize(&again).unwrap();
    assert_same(&files(&request.output), &files(&again.output), "the same survey, made before or on the way");
    // Another share reads the same survey; another loss does not.
    request.output = bench.path("more");
    request.circuit.as_mut().unwrap().keep = 0.03;
    quantize(&request).unwrap();
    request.output = bench.path("other");
    request.settings.loss = LossKind::Full;
    let error = quantize(&request).unwrap_err().to_string();
    assert!(error.contains("another model, data"), "{error}");
    request.settings.loss = LossKind::Completion;
    request.mode = OutputMode::Overwrite;
    request.circuit.as_mut().unwrap().signal = CircuitSignal::Fisher;
    let error = quantize(&request).unwrap_err().to_string();
    assert!(error.contains("lacks statistics"), "{error}");
}

#[test]
fn every_signal_makes_an_artifact_and_most_of_them_different_ones() {
    let bench = Bench::new("qwen3");
    let mut seen = Vec::new();
    for signal in CircuitSignal::ALL {
        let mut request = circuit(&bench, signal.name(), Reference::Rtn);
        request.circuit.as_mut().unwrap().signal = signal;
        quantize(&request).unwrap();
        let weights = files(&request.output).remove("model.safetensors").unwrap();
        assert!(!seen.contains(&weights), "{}", signal.name());
        seen.push(weights);
    }
    let mut request = circuit(&bench, "too-much", Reference::Rtn);
    request.circuit.as_mut().unwrap().keep = 0.5;
    assert!(matches!(quantize(&request), Err(PipelineError::Settings(_))));
}

#[test]
fn general_text_takes_the_places_of_some_items() {
    let bench = Bench::new("llama");
    std::fs::write(bench.path("general.txt"), "the quick brown fox jumps over the lazy dog ".repeat(40)).unwrap();
    let run = |name: &str, mix: f64| {
        let mut request = bench.request(name);
        let calibration = request.calibration.as_mut().unwrap();
        calibration.sequence_length = Some(64);
        calibration.general = Some((bench.path("general.txt"), mix));
        let Outcome::Written(report) = quantize(&request).unwrap() else { panic!() };
        report
    };
    let (quarter, all) = (run("quarter", 0.25), run("all", 1.0));
    assert_eq!((quarter.calibration.unwrap().used, all.calibration.unwrap().used), (8, 8));
    let recipe = Recipe::read(&bench.path("quarter/recipe.toml")).unwrap();
    quantize(&QuantizeRequest::repeat(recipe.clone(), bench.path("again"), OutputMode::Fresh)).unwrap();
    assert_same(&files(&bench.path("again")), &files(&bench.path("quarter")), "the recipe");
    std::fs::write(bench.path("general.txt"), "something else").unwrap();
    let changed = quantize(&QuantizeRequest::repeat(recipe, bench.path("changed"), OutputMode::Fresh));
    assert!(changed.unwrap_err().to_string().contains("general text"));
}
