//! Small random models: one model in several kinds of files, caches, stages, packed layers.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use std::path::Path;
use tailorq_format::{SafetensorsWriter, TensorSpec, packed_tensors};
use tailorq_kernels::Device;
use tailorq_model::testing::TinyModel;
use tailorq_model::{Batch, BlockStage, ChatMessage, KvCache, Model, OpenedModel, RopeScaling, open};
use tailorq_tensor::{Bits, ElementCorrections, Group, Layout, Matrix, PackedMatrix, Slot, Weight};
use tempfile::TempDir;

fn tiny(architecture: &str) -> TinyModel {
    TinyModel::new(architecture, 7).unwrap()
}

fn open_path(path: &Path) -> OpenedModel {
    open(path.to_str().unwrap()).unwrap_or_else(|e| panic!("{e}"))
}

fn open_directory(tiny: &TinyModel) -> (TempDir, OpenedModel) {
    let dir = tempfile::tempdir().unwrap();
    tiny.write_directory(dir.path()).unwrap();
    let opened = open_path(dir.path());
    (dir, opened)
}

fn open_gguf(tiny: &TinyModel) -> (TempDir, OpenedModel) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    tiny.gguf().unwrap().write(&path).unwrap();
    let opened = open_path(&path);
    (dir, opened)
}

fn ids(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 89 + 13) % 256).collect()
}

fn logits(model: &Model, device: &dyn Device, ids: &[u32]) -> Matrix {
    model.logits(device, &model.hidden(device, &Batch::new([ids]), None))
}

fn largest_difference(a: &Matrix, b: &Matrix) -> f32 {
    assert_eq!((a.rows(), a.cols()), (b.rows(), b.cols()));
    a.data().iter().zip(b.data()).fold(0.0, |m, (x, y)| m.max((x - y).abs()))
}

/// Every architecture, with tied and untied heads, and every option of the configuration.
fn variants() -> Vec<TinyModel> {
    let mut all = Vec::new();
    for architecture in ["llama", "qwen2", "qwen3"] {
        for tied_head in [true, false] {
            let mut model = tiny(architecture);
            model.config.tied_head = tied_head;
            all.push(model);
        }
    }
    let mut biased = tiny("llama");
    (biased.config.attention_bias, biased.config.mlp_bias) = (true, true);
    let mut wide_heads = tiny("qwen3");
    wide_heads.config.head_dim = 32;
    all.extend([biased, wide_heads]);
    all
}

#[test]
fn directory_and_gguf_are_the_same_model() {
    let device = tailorq_kernels::cpu();
    for model in variants() {
        let (_a, from_directory) = open_directory(&model);
        let (_b, from_gguf) = open_gguf(&model);
        assert_eq!(from_directory.model.config, model.config);
        assert_eq!(from_gguf.model.config, model.config);
        let (a, b) = (&from_directory.model, &from_gguf.model);
        assert_eq!(logits(a, device.as_ref(), &ids(9)), logits(b, device.as_ref(), &ids(9)), "{:?}", model.config);
        assert!(!from_gguf.files.is_quantized && from_gguf.files.stored_as == "F32");

        let text = "héllo <|im_start|>user 12";
        assert_eq!(
            from_directory.tokenizer.encode(text, true).unwrap(),
            from_gguf.tokenizer.encode(text, true).unwrap()
        );
        assert_eq!((from_directory.tokenizer.bos, from_gguf.tokenizer.bos), (Some(256), Some(256)));
        assert_eq!((from_directory.tokenizer.eos, from_gguf.tokenizer.eos), (vec![258, 256], vec![258]));
    }
}

#[test]
fn llama_3_scaling_is_recognised_in_gguf() {
    let mut model = tiny("llama");
    model.config.rope_theta = 500_000.0;
    model.config.rope_scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 };
    let (_dir, opened) = open_gguf(&model);
    assert_eq!(opened.model.config, model.config);
}

#[test]
fn shards_and_half_precision() {
    let device = tailorq_kernels::cpu();
    let mut model = tiny("qwen2");
    let (_a, whole) = open_directory(&model);
    model.n_shards = 3;
    let (_b, sharded) = open_directory(&model);
    assert_eq!(sharded.files.weight_files.len(), 3);
    let expected = logits(&whole.model, device.as_ref(), &ids(5));
    assert_eq!(logits(&sharded.model, device.as_ref(), &ids(5)), expected);
    model.dtype = tailorq_tensor::DType::BF16;
    let (_c, half) = open_directory(&model);
    assert_eq!(half.files.stored_as, "BF16");
    let difference = largest_difference(&logits(&half.model, device.as_ref(), &ids(5)), &expected);
    assert!(difference > 0.0 && difference < 0.2, "{difference}");
}

#[test]
fn what_a_gguf_file_turns_into_opens_as_the_same_model() {
    let mut model = tiny("llama");
    model.config.tied_head = false;
    let (dir, opened) = open_directory(&model);
    let (_gguf, from_gguf) = open_gguf(&model);
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("config.json", &from_gguf.files.config_json.to_string());
    write("generation_config.json", &from_gguf.files.generation_config_json.to_string());
    write("tokenizer_config.json", &from_gguf.files.tokenizer_config_json.to_string());
    write("tokenizer.json", &from_gguf.tokenizer.to_json().unwrap());
    let again = open_path(dir.path());
    assert_eq!(again.model.config, opened.model.config);
    assert_eq!((again.tokenizer.bos, &again.tokenizer.eos), (from_gguf.tokenizer.bos, &from_gguf.tokenizer.eos));
    let turns = [ChatMessage { role: "user".into(), content: "Hi".into() }];
    let prompt = again.template.unwrap().render(&turns, true).unwrap();
    assert_eq!(prompt, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(again.tokenizer.encode(&prompt, true).unwrap(), from_gguf.tokenizer.encode(&prompt, true).unwrap());
    assert_eq!(from_gguf.files.config_json["architectures"], json!(["LlamaForCausalLM"]));
    assert_eq!(from_gguf.files.config_json["eos_token_id"], 258);
}

#[test]
fn decoding_with_caches_equals_the_whole_forward() {
    let device = tailorq_kernels::cpu();
    let mut windowed = tiny("llama");
    windowed.config.sliding_window = Some(5);
    for tiny in [tiny("llama"), tiny("qwen3"), windowed] {
        let (_dir, opened) = open_directory(&tiny);
        let (model, device) = (&opened.model, device.as_ref());
        let (first, second) = (ids(12), ids(7).into_iter().rev().collect::<Vec<_>>());
        let mut caches = [KvCache::new(), KvCache::new()];
        model.hidden(device, &Batch::new([&first[..8], &second[..2]]), Some(&mut caches));
        model.hidden(device, &Batch::new([&first[8..9], &second[2..6]]), Some(&mut caches));
        // A conversation that goes back one token and takes it again.
        caches[1].truncate(5);
        let hidden = model.hidden(device, &Batch::new([&first[9..12], &second[5..7]]), Some(&mut caches));
        assert_eq!((caches[0].len(), caches[1].len()), (12, 7));
        let steps = model.logits(device, &hidden);
        for (rows, sequence) in [(0..3, &first), (3..5, &second)] {
            let whole = logits(model, device, sequence);
            for (row, position) in rows.clone().zip(sequence.len() - rows.len()..) {
                let pairs = steps.row(row).iter().zip(whole.row(position));
                let difference = pairs.fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(difference < 1e-4, "row {row}: {difference}");
            }
        }
    }
}

#[test]
fn stages_compose_to_a_block_bit_for_bit() {
    let device = tailorq_kernels::cpu();
    let device = device.as_ref();
    for tiny in variants() {
        let (_dir, opened) = open_directory(&tiny);
        let model = &opened.model;
        let batch = Batch::new([&ids(6)[..], &ids(1)[..], &ids(9)[..]]);
        let mut whole = model.embed(device, &batch.ids);
        let mut staged = whole.clone();
        for block in &model.blocks {
            model.forward_block(device, block, &batch.spans, &mut whole);
            let stage = BlockStage { model, block, device };
            let mixed = stage.attention_mix(&stage.attention_input(&staged), &batch.spans);
            stage.add_attention(&mixed, &mut staged);
            let hidden = stage.mlp_hidden(&stage.mlp_input(&staged));
            stage.add_mlp(&hidden, &mut staged);
        }
        assert_eq!(whole, staged);
        assert_eq!(model.final_norm(device, &staged), model.hidden(device, &batch, None));
    }
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    let device = tailorq_kernels::cpu();
    let (_dir, opened) = open_directory(&tiny("qwen2"));
    let (model, device) = (&opened.model, device.as_ref());
    let (first, second) = (ids(6), ids(4));
    let both = model.hidden(device, &Batch::new([&first[..], &second[..]]), None);
    let alone = model.hidden(device, &Batch::new([&second[..]]), None);
    let part = Matrix::from_vec(4, alone.cols(), both.data()[6 * alone.cols()..].to_vec());
    assert!(largest_difference(&part, &alone) < 1e-5);
}

#[test]
fn chunks_of_the_head_cover_the_vocabulary() {
    let mut tiny = tiny("llama");
    tiny.config.vocab = 9000;
    let (_dir, opened) = open_directory(&tiny);
    let device = tailorq_kernels::cpu();
    let hidden = opened.model.hidden(device.as_ref(), &Batch::new([&ids(3)[..]]), None);
    let mut seen = Vec::new();
    opened.model.for_each_logits(device.as_ref(), &hidden, &mut |words, logits| {
        assert_eq!(logits.len(), 3 * words.len());
        seen.push(words);
    });
    assert_eq!(seen, [0..4096, 4096..8192, 8192..9000]);
    let logits = opened.model.logits(device.as_ref(), &hidden);
    // The last word's logit, computed by hand.
    let row = opened.model.head.to_matrix().row(8999).to_vec();
    let expected: f32 = row.iter().zip(hidden.row(2)).map(|(a, b)| a * b).sum();
    assert!((logits.row(2)[8999] - expected).abs() < 1e-4);
}

/// Writes an artifact whose q of block 0 and embedding are packed, q with the elements of its diagonal corrected if asked
/// to, and returns the packed q.
fn write_artifact(tiny: &TinyModel, dir: &Path, corrected: bool) -> PackedMatrix {
    tiny.write_directory(dir).unwrap();
    let layout = Layout::new(Bits::Three, Group::Inputs(32));
    let pack = |rows: usize, cols: usize| {
        let groups = rows * layout.group.count(cols);
        let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 5 % 8) as u8).collect();
        let scales = vec![half::f16::from_f32(0.03); groups];
        PackedMatrix::pack(rows, cols, layout, &codes, &scales, &vec![4; groups]).unwrap()
    };
    let q = match corrected {
        false => pack(64, 64),
        true => {
            let kept: Vec<Vec<_>> = (0..64).map(|r| vec![(r, half::f16::from_f32(0.5))]).collect();
            pack(64, 64).with_elements(ElementCorrections::from_rows(64, &kept).unwrap()).unwrap()
        }
    };
    let packed = [("model.layers.0.self_attn.q_proj", q), ("model.embed_tokens", pack(tiny.config.vocab, 64))];
    let mut parts: Vec<(TensorSpec, Vec<u8>)> = Vec::new();
    let mut layers = serde_json::Map::new();
    for (name, matrix) in &packed {
        parts.extend(packed_tensors(name, matrix).into_iter().map(|(spec, bytes)| (spec, bytes.to_vec())));
        layers.insert((*name).to_owned(), serde_json::to_value(matrix.spec()).unwrap());
    }
    for (name, shape) in tiny.tensors().unwrap() {
        if !packed.iter().any(|(layer, _)| name == format!("{layer}.weight")) {
            let bytes = tiny.dtype.encode(&tiny.values(&name, &shape));
            parts.push((TensorSpec::new(name, tiny.dtype, &shape), bytes));
        }
    }
    let specs: Vec<_> = parts.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = SafetensorsWriter::create(&dir.join("model.safetensors"), &specs, &[]).unwrap();
    for (spec, bytes) in &parts {
        writer.write(&spec.name, bytes).unwrap();
    }
    writer.commit().unwrap();
    let quantization =
        json!({"quant_method": "tailorq", "format_version": if corrected { 2 } else { 1 }, "layers": layers});
    edit_config(dir, "quantization_config", quantization);
    packed.into_iter().next().unwrap().1
}

fn edit_config(dir: &Path, key: &str, value: Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config[key] = value;
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn artifacts_open_with_packed_layers() {
    for corrected in [false, true] {
        let (tiny, dir) = (tiny("llama"), tempfile::tempdir().unwrap());
        let q = write_artifact(&tiny, dir.path(), corrected);
        let opened = open_path(dir.path());
        assert!(opened.files.is_quantized && opened.files.stored_as == "tailorq");
        let Weight::Packed(found) = &opened.model.blocks[0].linear(Slot::Q).weight else { panic!("q is not packed") };
        assert_eq!(found.parts().codes[..], q.parts().codes[..]);
        assert_eq!((found.spec(), found.elements().is_some()), (q.spec(), corrected));
        assert!(matches!(opened.model.head, Weight::Packed(_)), "the tied head is the packed embedding");

        let device = tailorq_kernels::cpu();
        let mut dense = opened.model.clone();
        dense.blocks[0].linear_mut(Slot::Q).weight = Weight::from(Weight::from(q).to_matrix());
        let (a, b) = (logits(&dense, device.as_ref(), &ids(5)), logits(&opened.model, device.as_ref(), &ids(5)));
        assert!(largest_difference(&a, &b) < 1e-4, "{}", largest_difference(&a, &b));
    }
}

#[test]
fn corrections_and_their_announcement_belong_together() {
    let (tiny, dir) = (tiny("llama"), tempfile::tempdir().unwrap());
    write_artifact(&tiny, dir.path(), true);
    let config: Value = serde_json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap();
    let good = config["quantization_config"].clone();
    let layer = "model.layers.0.self_attn.q_proj";
    assert_eq!(good["layers"][layer]["elements"], 64);
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut quantization = good.clone();
        change(&mut quantization);
        edit_config(dir.path(), "quantization_config", quantization);
        open(dir.path().to_str().unwrap()).err().unwrap().to_string()
    };
    let text = refused(&|q| q["format_version"] = json!(1));
    assert!(text.contains("config.json") && text.contains("corrections"), "{text}");
    let text = refused(&|q| drop(q["layers"][layer].as_object_mut().unwrap().remove("elements")));
    assert!(text.contains("model.safetensors") && text.contains("q_proj.element_counts' is there"), "{text}");
    let text = refused(&|q| q["layers"][layer]["elements"] = json!(65));
    assert!(text.contains("q_proj.element_cols"), "{text}");
    let text = refused(&|q| q["layers"][layer]["elements"] = json!(-1));
    assert!(text.contains("config.json"), "{text}");
    write_artifact(&tiny, dir.path(), false);
    edit_config(dir.path(), "quantization_config", good.clone());
    let text = open(dir.path().to_str().unwrap()).err().unwrap().to_string();
    assert!(text.contains("q_proj.element_counts' is missing"), "{text}");
}

#[test]
fn artifacts_of_others_and_of_the_future_are_refused() {
    let (tiny, dir) = (tiny("llama"), tempfile::tempdir().unwrap());
    write_artifact(&tiny, dir.path(), false);
    let config: Value = serde_json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap();
    let good = config["quantization_config"].clone();
    let with = |path: &str, value: Value| {
        let mut changed = good.clone();
        *changed.pointer_mut(path).unwrap() = value;
        changed
    };
    let q = "/layers/model.layers.0.self_attn.q_proj";
    let mut stray = good.clone();
    stray["layers"]["model.layers.9.mlp.up_proj"] = good.pointer(q).unwrap().clone();
    let cases = [
        (with("/quant_method", json!("gptq")), "gptq"),
        (with("/format_version", json!(5)), "format_version"),
        (with("/format_version", json!(0)), "format_version"),
        (with("/layers", json!([])), "layers"),
        (with(&format!("{q}/bits"), json!(5)), "5 bits"),
        (with(&format!("{q}/bits"), json!(4)), "q_proj"),
        (with(&format!("{q}/rows"), json!(63)), "q_proj"),
        (stray, "model.layers.9.mlp.up_proj"),
    ];
    for (quantization, expected) in cases {
        edit_config(dir.path(), "quantization_config", quantization);
        let message = open(dir.path().to_str().unwrap()).err().unwrap().to_string();
        assert!(message.contains(expected), "{message}");
    }
}
