//! GGUF files.

use super::assemble::{Tensors, assemble};
use super::{Metadata, ModelFiles, OpenTimes, OpenedModel, joined_types, total_bytes};
use crate::arch::{Architecture, EMBEDDING, FINAL_NORM, HEAD, block_norms};
use crate::config::{ModelConfig, TensorFacts, from_gguf};
use crate::error::ModelError;
use crate::template::ChatTemplate;
use crate::tokenizer::{self, GgufVocabulary, Tokenizer};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use tailorq_format::GgufFile;
use tailorq_tensor::{RowOrder, Slot, Weight};

/// Opens a GGUF file with everything that it brings.
pub(super) fn open(path: &Path, source: &str) -> Result<OpenedModel, ModelError> {
    let started = Instant::now();
    let file = GgufFile::open(path)?;
    let meta = Metadata::new(&file);
    let name = meta.string("general.architecture")?.ok_or_else(|| meta.problem("has no general.architecture"))?;
    let architecture = Architecture::find(name, path)?;
    let config = from_gguf(&meta, architecture, tensor_facts(&file)?)?;
    let tensors = GgufTensors { file: &file, architecture, config: &config };
    let model = assemble(config.clone(), architecture, &tensors)?;
    let opened = Instant::now();

    let vocabulary = GgufVocabulary::read(&meta)?;
    let mut tokenizer = tokenizer::from_gguf(&meta, &vocabulary)?;
    tokenizer.limit_to(config.vocab);
    let text = |id| vocabulary.text(id).unwrap_or_default().to_owned();
    let template = meta.string("tokenizer.chat_template")?.map(|source| ChatTemplate {
        source: source.to_owned(),
        bos_token: text(vocabulary.bos),
        eos_token: text(vocabulary.eos),
    });
    let mut weight_files: Vec<PathBuf> = file.tensors().iter().map(|t| t.file().to_owned()).collect();
    weight_files.dedup();
    let linears = || file.tensors().iter().filter(|t| t.name().starts_with("blk.") && t.dims().len() == 2);
    let files = ModelFiles {
        source: source.to_owned(),
        path: path.to_owned(),
        weight_bytes: total_bytes(&weight_files),
        weight_files,
        config_json: config.to_hf(architecture, tokenizer.bos, &tokenizer.eos),
        generation_config_json: generation_config(&tokenizer),
        tokenizer_config_json: tokenizer_config(&config, &vocabulary, template.as_ref()),
        tokenizer_json: None,
        extra_files: Vec::new(),
        is_quantized: linears().any(|t| !["F32", "F16", "BF16"].contains(&t.type_name().as_str())),
        stored_as: joined_types(linears().map(|t| (t.type_name(), t.n_elements()))),
    };
    let times = OpenTimes::since(started, opened);
    Ok(OpenedModel { model, tokenizer, template, files, times })
}

/// What the tensors say about the model.
fn tensor_facts(file: &GgufFile) -> Result<TensorFacts, ModelError> {
    let has = |name: &str| file.get(name).is_some();
    Ok(TensorFacts {
        vocab: file.require("token_embd.weight")?.dims().get(1).copied().unwrap_or(0),
        rope_divisors: has("rope_freqs.weight").then(|| file.vector("rope_freqs.weight")).transpose()?,
        tied_head: !has("output.weight"),
        attention_bias: has("blk.0.attn_q.bias"),
        mlp_bias: has("blk.0.ffn_gate.bias"),
    })
}

/// The tensors of a GGUF file under the names and in the row order of checkpoints.
struct GgufTensors<'a> {
    file: &'a GgufFile,
    architecture: &'static Architecture,
    config: &'a ModelConfig,
}

impl GgufTensors<'_> {
    /// Name in the file of a checkpoint's tensor, and its slot when it is a linear's.
    fn stored_name(&self, name: &str) -> (String, Option<Slot>) {
        let (layer, suffix) = name.rsplit_once('.').unwrap_or((name, "weight"));
        let part = match layer {
            EMBEDDING => "token_embd",
            HEAD => "output",
            FINAL_NORM => "output_norm",
            _ => return self.stored_block_name(layer, suffix).unwrap_or((name.to_owned(), None)),
        };
        (format!("{part}.{suffix}"), None)
    }

    fn stored_block_name(&self, layer: &str, suffix: &str) -> Option<(String, Option<Slot>)> {
        let (block_idx, part) = layer.strip_prefix("model.layers.")?.split_once('.')?;
        let linear = self.architecture.linears.iter().find(|l| l.checkpoint == part);
        let stored = match part {
            block_norms::ATTENTION => "attn_norm",
            block_norms::MLP => "ffn_norm",
            block_norms::QUERY => "attn_q_norm",
            block_norms::KEY => "attn_k_norm",
            _ => linear?.gguf,
        };
        Some((format!("blk.{block_idx}.{stored}.{suffix}"), linear.map(|l| l.slot)))
    }

    /// For each row of a checkpoint's q or k the row of the file, where the file has them permuted.
    fn row_order(&self, slot: Option<Slot>) -> Option<Vec<u32>> {
        let heads = match slot? {
            Slot::Q if self.architecture.gguf_permutes_qk => self.config.n_heads,
            Slot::K if self.architecture.gguf_permutes_qk => self.config.n_kv_heads,
            _ => return None,
        };
        let (head_dim, half) = (self.config.head_dim, self.config.head_dim / 2);
        // Checkpoints rotate (i, i + half), files (2i, 2i + 1).
        let row = |h: usize, r: usize| (h * head_dim + 2 * (r % half) + r / half) as u32;
        Some((0..heads).flat_map(|h| (0..head_dim).map(move |r| row(h, r))).collect())
    }

    fn shape_error(&self, stored: &str, expected: String) -> ModelError {
        let dims = self.file.get(stored).map(|t| t.dims().to_vec()).unwrap_or_default();
        ModelError::Tensor {
            path: self.file.path().to_owned(),
            tensor: stored.to_owned(),
            problem: format!("has dimensions {dims:?}, expected {expected}; the metadata does not fit the tensors"),
        }
    }
}

impl Tensors for GgufTensors<'_> {
    fn matrix(&self, layer: &str, rows: usize, cols: usize) -> Result<Weight, ModelError> {
        let (stored, slot) = self.stored_name(&format!("{layer}.weight"));
        let reader = self.file.rows(&stored)?;
        if (reader.rows(), reader.cols()) != (rows, cols) {
            return Err(self.shape_error(&stored, format!("[{cols}, {rows}]")));
        }
        Ok(Weight::Stored(match self.row_order(slot) {
            Some(order) => Arc::new(RowOrder::new(reader, order)),
            None => reader,
        }))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let (stored, slot) = self.stored_name(name);
        let values = self.file.vector(&stored)?;
        if values.len() != len {
            return Err(self.shape_error(&stored, format!("[{len}]")));
        }
        Ok(match self.row_order(slot) {
            Some(order) => order.iter().map(|&r| values[r as usize]).collect(),
            None => values,
        })
    }

    fn contains(&self, name: &str) -> bool {
        self.file.get(&self.stored_name(name).0).is_some()
    }

    fn place(&self, name: &str) -> (PathBuf, String) {
        let stored = self.stored_name(name).0;
        let file = self.file.get(&stored).map_or(self.file.path(), |t| t.file());
        (file.to_owned(), stored)
    }
}

/// generation_config.json for a Hugging Face reader.
fn generation_config(tokenizer: &Tokenizer) -> Value {
    let mut map = Map::new();
    if let Some(bos) = tokenizer.bos {
        map.insert("bos_token_id".into(), bos.into());
    }
    if !tokenizer.eos.is_empty() {
        map.insert("eos_token_id".into(), tokenizer.eos.clone().into());
    }
    Value::Object(map)
}

/// tokenizer_config.json for a Hugging Face reader.
fn tokenizer_config(config: &ModelConfig, vocabulary: &GgufVocabulary<'_>, template: Option<&ChatTemplate>) -> Value {
    let mut json = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": false,
        "bos_token": vocabulary.text(vocabulary.bos),
        "eos_token": vocabulary.text(vocabulary.eos),
    });
    for (key, id) in [("unk_token", vocabulary.unknown), ("pad_token", vocabulary.padding)] {
        if let Some(text) = vocabulary.text(id) {
            json[key] = text.into();
        }
    }
    if let Some(template) = template {
        json["chat_template"] = template.source.as_str().into();
    }
    json
}
