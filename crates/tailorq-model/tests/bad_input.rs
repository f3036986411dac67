//! Damaged, incomplete and foreign models: an error that names file and tensor, never a panic.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use std::path::Path;
use tailorq_format::testing::GgufBuilder;
use tailorq_model::open;
use tailorq_model::testing::TinyModel;
use tailorq_tensor::DType;
use tempfile::TempDir;

fn tiny(architecture: &str) -> TinyModel {
    TinyModel::new(architecture, 3).unwrap()
}

fn written(tiny: &TinyModel) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    tiny.write_directory(dir.path()).unwrap();
    dir
}

/// Opening `path` fails with a message that contains all of `expected`.
fn refused(path: &Path, expected: &[&str]) {
    let message = open(path.to_str().unwrap()).err().expect("it must not open").to_string();
    for part in expected {
        assert!(message.contains(part), "expected '{part}' in: {message}");
    }
}

fn edit_config(dir: &Path, key: &str, value: Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config[key] = value;
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn places_that_are_no_model() {
    let dir = tempfile::tempdir().unwrap();
    refused(dir.path(), &["config.json"]);
    refused(&dir.path().join("absent"), &["absent", "hub id"]);
    std::fs::write(dir.path().join("m.gguf"), "x").unwrap();
    refused(dir.path(), &["m.gguf"]);
    refused(&dir.path().join("m.gguf"), &["m.gguf"]);
    std::fs::write(dir.path().join("m.safetensors"), "x").unwrap();
    refused(&dir.path().join("m.safetensors"), &["directory"]);
}

#[test]
fn a_missing_tokenizer_comes_with_a_remedy() {
    let dir = written(&tiny("llama"));
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    refused(dir.path(), &["tokenizer.json", "fetch"]);
    std::fs::write(dir.path().join("tokenizer.model"), "").unwrap();
    refused(dir.path(), &["tokenizer.model", "save_pretrained"]);
    std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    refused(dir.path(), &["tokenizer.json"]);
}

#[test]
fn unknown_architectures_and_sizes_that_do_not_fit() {
    let dir = written(&tiny("qwen2"));
    edit_config(dir.path(), "model_type", json!("mamba2"));
    refused(dir.path(), &["config.json", "mamba2", "qwen3"]);
    edit_config(dir.path(), "model_type", json!("qwen2"));
    edit_config(dir.path(), "intermediate_size", json!(95));
    refused(dir.path(), &["model.layers.0.mlp.gate_proj.weight", "[96, 64]", "[95, 64]"]);
    edit_config(dir.path(), "intermediate_size", json!(96));
    edit_config(dir.path(), "num_hidden_layers", json!(3));
    refused(dir.path(), &["model.layers.2", "missing"]);
    edit_config(dir.path(), "num_hidden_layers", json!(2));
    // The biases of qwen2 are none that a llama has.
    edit_config(dir.path(), "model_type", json!("llama"));
    refused(dir.path(), &["model.layers.0.self_attn.q_proj.bias", "attention_bias"]);
    std::fs::write(dir.path().join("config.json"), "[]").unwrap();
    refused(dir.path(), &["config.json"]);
}

#[test]
fn a_norm_that_is_no_number() {
    for value in [f32::NAN, f32::INFINITY] {
        let dir = written(&tiny("llama"));
        let path = dir.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        // The final norm is the last tensor of a tied model.
        let at = bytes.len() - 8;
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        refused(dir.path(), &["model.safetensors", "model.norm.weight", "index 62"]);
    }
}

#[test]
fn truncated_and_missing_shards() {
    let mut model = tiny("qwen3");
    model.n_shards = 2;
    let dir = written(&model);
    let shard = dir.path().join("model-00002-of-00002.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 100]).unwrap();
    refused(dir.path(), &["model-00002-of-00002.safetensors"]);
    std::fs::remove_file(&shard).unwrap();
    refused(dir.path(), &["model-00002-of-00002.safetensors"]);
}

/// Writes a GGUF file and opens it.
fn refused_gguf(file: GgufBuilder, expected: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    file.write(&path).unwrap();
    refused(&path, &[&["tiny.gguf"], expected].concat());
}

#[test]
fn gguf_files_that_do_not_fit() {
    refused_gguf(GgufBuilder::new(), &["general.architecture"]);
    refused_gguf(GgufBuilder::new().str("general.architecture", "mamba"), &["mamba", "llama"]);
    refused_gguf(GgufBuilder::new().str("general.architecture", "llama"), &["token_embd.weight"]);
    let file = || tiny("llama").gguf().unwrap();
    refused_gguf(file().u32("llama.expert_count", 8), &["mixture of 8 experts"]);
    refused_gguf(file().str("llama.rope.scaling.type", "yarn"), &["yarn"]);
    refused_gguf(file().u32("llama.rope.dimension_count", 8), &["rope.dimension_count"]);
    refused_gguf(file().dense("rope_freqs.weight", DType::F32, &[3], &[1.0; 3]), &["scaling"]);
    refused_gguf(file().dense("blk.0.attn_q.bias", DType::F32, &[5], &[0.0; 5]), &["blk.0.attn_q.bias", "[64]"]);
    refused_gguf(file().raw("blk.0.ffn_up.bias", &[96], 0, vec![0; 384]), &["blk.0.ffn_up.bias", "bias"]);
}

/// The same tokens under another pre-tokenizer or with other merges.
fn gguf_tokenizer(pre: &str, merges: &[&str]) -> GgufBuilder {
    let embedding = vec![0.0; 4 * 64];
    let sizes = ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"];
    let mut file = GgufBuilder::new().str("general.architecture", "llama");
    for (key, size) in sizes.iter().zip([1, 16, 64, 96, 4]) {
        file = file.u32(&format!("llama.{key}"), size);
    }
    file = file.f32("llama.attention.layer_norm_rms_epsilon", 1e-5).dense(
        "token_embd.weight",
        DType::F32,
        &[4, 64],
        &embedding,
    );
    for (name, shape) in tiny("llama").tensors().unwrap() {
        let Some(rest) = name.strip_prefix("model.layers.0.") else { continue };
        let stored = rest
            .replace("self_attn.q_proj", "attn_q")
            .replace("self_attn.k_proj", "attn_k")
            .replace("self_attn.v_proj", "attn_v")
            .replace("self_attn.o_proj", "attn_output")
            .replace("mlp.", "ffn_")
            .replace("_proj", "")
            .replace("input_layernorm", "attn_norm")
            .replace("post_attention_layernorm", "ffn_norm");
        // k and v have as many heads as q here.
        let shape: Vec<usize> = shape.iter().map(|&n| if n == 32 { 64 } else { n }).collect();
        let n: usize = shape.iter().product();
        file = file.dense(&format!("blk.0.{stored}"), DType::F32, &shape, &vec![0.0; n]);
    }
    file.dense("output_norm.weight", DType::F32, &[64], &[1.0; 64])
        .str("tokenizer.ggml.model", "gpt2")
        .str("tokenizer.ggml.pre", pre)
        .strings("tokenizer.ggml.tokens", &["a", "b", "ab", "<|im_end|>"])
        .i32s("tokenizer.ggml.token_type", &[1, 1, 1, 3])
        .strings("tokenizer.ggml.merges", merges)
}

#[test]
fn gguf_tokenizers_that_are_not_known() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("good.gguf");
    gguf_tokenizer("gpt-2", &["a b"]).write(&path).unwrap();
    let opened = open(path.to_str().unwrap()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(opened.tokenizer.encode("abba<|im_end|>", true).unwrap(), [2, 1, 0, 3]);
    assert_eq!(opened.tokenizer.eos, [3], "the end of a turn ends a generation");

    refused_gguf(gguf_tokenizer("chameleon", &["a b"]), &["chameleon", "qwen2"]);
    refused_gguf(gguf_tokenizer("gpt-2", &["ab ab"]), &["ab ab"]);
    refused_gguf(gguf_tokenizer("gpt-2", &["ab"]), &["merges"]);
    refused_gguf(gguf_tokenizer("gpt-2", &[""]), &["merges"]);
}
