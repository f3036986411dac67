//! Hugging Face directories, and the artifacts of tailorq that have their shape.

use super::assemble::{Tensors, assemble};
use super::{ModelFiles, OpenTimes, OpenedModel, joined_types, total_bytes};
use crate::arch::{Architecture, EMBEDDING, HEAD};
use crate::config::from_hf;
use crate::error::ModelError;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use tailorq_format::{FORMAT_VERSION, TensorSet, format_version, read_packed};
use tailorq_tensor::{PackedSpec, Weight};

/// Files beside weights, configuration and tokenizer that belong to a model and are copied with it.
pub(super) const EXTRA_FILES: [&str; 6] =
    ["special_tokens_map.json", "chat_template.jinja", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"];

/// Opens a directory with config.json, tokenizer.json and safetensors.
pub(super) fn open(dir: &Path, source: &str) -> Result<OpenedModel, ModelError> {
    let started = Instant::now();
    let config_path = dir.join("config.json");
    if !config_path.exists() {
        return Err(no_config(dir));
    }
    let config_json = read_json(&config_path)?;
    let mut config = from_hf(&config_json, &config_path)?;
    let architecture = Architecture::find(config.architecture, &config_path)?;
    let quantization = Quantization::read(&config_json, &config_path)?;
    let set = TensorSet::open_dir(dir)?;
    let checkpoint = Checkpoint { set: &set, quantization: &quantization, config_path: &config_path };
    let has_head = quantization.layers.contains_key(HEAD) || set.contains(&format!("{HEAD}.weight"));
    config.tied_head |= !has_head;
    let model = assemble(config, architecture, &checkpoint)?;
    quantization.check_names(&model, &config_path)?;
    let opened = Instant::now();

    let generation_config_json = read_optional_json(&dir.join("generation_config.json"))?;
    let tokenizer_config_json = read_optional_json(&dir.join("tokenizer_config.json"))?;
    let tokenizer_path = dir.join("tokenizer.json");
    if !tokenizer_path.exists() {
        return Err(no_tokenizer(dir, &tokenizer_path));
    }
    let settings =
        SpecialTokens { config: &config_json, generation: &generation_config_json, tokenizer: &tokenizer_config_json };
    let tokenizer = settings.tokenizer(&tokenizer_path, model.config.vocab)?;
    let template = settings.template(dir, &tokenizer)?;
    let weight_files: Vec<PathBuf> = set.files().iter().map(|f| f.path().to_owned()).collect();
    let files = ModelFiles {
        source: source.to_owned(),
        path: dir.to_owned(),
        weight_bytes: total_bytes(&weight_files),
        weight_files,
        is_quantized: !quantization.layers.is_empty(),
        stored_as: quantization.stored_as(&set),
        config_json,
        generation_config_json,
        tokenizer_config_json,
        tokenizer_json: Some(tokenizer_path),
        extra_files: EXTRA_FILES.iter().map(|name| dir.join(name)).filter(|p| p.is_file()).collect(),
    };
    let times = OpenTimes::since(started, opened);
    Ok(OpenedModel { model, tokenizer, template, files, times })
}

fn no_config(dir: &Path) -> ModelError {
    let gguf = std::fs::read_dir(dir).ok().and_then(|entries| {
        entries.filter_map(|e| Some(e.ok()?.path())).find(|p| p.extension().is_some_and(|x| x == "gguf"))
    });
    let problem = match gguf {
        Some(file) => format!("has no config.json; for a GGUF model give the file itself, such as {}", file.display()),
        None => "has no config.json; give the directory of a Hugging Face model or of a tailorq artifact".into(),
    };
    ModelError::File { path: dir.to_owned(), problem }
}

fn no_tokenizer(dir: &Path, path: &Path) -> ModelError {
    let slow = ["tokenizer.model", "vocab.json"].into_iter().find(|name| dir.join(name).exists());
    let problem = match slow {
        Some(name) => format!(
            "is missing; there is a {name}: make tokenizer.json from it with transformers, \
             AutoTokenizer.from_pretrained(dir).save_pretrained(dir)"
        ),
        None => "is missing; fetch it from where the model came from".into(),
    };
    ModelError::File { path: path.to_owned(), problem }
}

/// The value of a JSON file.
pub(super) fn read_json(path: &Path) -> Result<Value, ModelError> {
    let problem = |problem: String| ModelError::File { path: path.to_owned(), problem };
    let text = std::fs::read(path).map_err(|e| problem(format!("cannot be read: {e}")))?;
    serde_json::from_slice(&text).map_err(|e| problem(format!("is not valid JSON: {e}")))
}

/// The value of a JSON file, null when there is no such file.
fn read_optional_json(path: &Path) -> Result<Value, ModelError> {
    if path.exists() { read_json(path) } else { Ok(Value::Null) }
}

/// `quantization_config` of a tailorq artifact; no layers for a dense checkpoint.
#[derive(Default)]
struct Quantization {
    layers: BTreeMap<String, PackedSpec>,
}

impl Quantization {
    fn read(config: &Value, path: &Path) -> Result<Self, ModelError> {
        let Some(found) = config.get("quantization_config").filter(|q| !q.is_null()) else {
            return Ok(Quantization::default());
        };
        let problem = |problem: String| ModelError::File { path: path.to_owned(), problem };
        let method = found.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        if method != "tailorq" {
            return Err(problem(format!(
                "the model is quantized by '{method}', which tailorq does not read; use the original checkpoint"
            )));
        }
        let version = found.get("format_version").and_then(Value::as_u64);
        let Some(version) = version.filter(|v| (1..=u64::from(FORMAT_VERSION)).contains(v)) else {
            let version = version.map_or("missing".into(), |v| v.to_string());
            return Err(problem(format!(
                "format_version of the quantization is {version}, this tailorq reads 1 to {FORMAT_VERSION}; use a tailorq of \
                 the version that wrote the model"
            )));
        };
        let layers = found.get("layers").cloned().unwrap_or(Value::Null);
        let layers: BTreeMap<String, PackedSpec> = serde_json::from_value(layers)
            .map_err(|e| problem(format!("\"layers\" of the quantization is not as tailorq writes it: {e}")))?;
        let needed = format_version(layers.values());
        if version < u64::from(needed) {
            return Err(problem(format!(
                "format_version of the quantization is {version}, but its layers have corrections or other parts that came \
                 with version {needed}; the file was changed after it was written: fetch or write the model again"
            )));
        }
        Ok(Quantization { layers })
    }

    /// Refuses layers that the model does not have: they would be left out in silence.
    fn check_names(&self, model: &crate::Model, path: &Path) -> Result<(), ModelError> {
        let linears = model.blocks.iter().flat_map(|b| b.linears.iter().map(|l| l.name.as_str()));
        let known: HashSet<&str> = linears.chain([EMBEDDING, HEAD]).collect();
        let stray =
            self.layers.keys().find(|name| !known.contains(name.as_str()) || (*name == HEAD && model.config.tied_head));
        match stray {
            None => Ok(()),
            Some(name) => Err(ModelError::File {
                path: path.to_owned(),
                problem: format!("the quantization names the layer '{name}', which this model does not have"),
            }),
        }
    }

    fn stored_as(&self, set: &TensorSet) -> String {
        if !self.layers.is_empty() {
            return "tailorq".into();
        }
        let linears = set.iter().filter(|t| t.shape.len() == 2 && t.name.starts_with("model.layers."));
        joined_types(linears.map(|t| (t.dtype.name().to_owned(), t.bytes.len())))
    }
}

/// The tensors of a directory, packed where its configuration says so.
struct Checkpoint<'a> {
    set: &'a TensorSet,
    quantization: &'a Quantization,
    config_path: &'a Path,
}

impl Tensors for Checkpoint<'_> {
    fn matrix(&self, layer: &str, rows: usize, cols: usize) -> Result<Weight, ModelError> {
        let Some(packed) = self.quantization.layers.get(layer) else {
            return Ok(Weight::Stored(Arc::new(self.set.dense_rows(&format!("{layer}.weight"), rows, cols)?)));
        };
        if (packed.rows, packed.cols) != (rows, cols) {
            return Err(ModelError::Tensor {
                path: self.config_path.to_owned(),
                tensor: layer.to_owned(),
                problem: format!(
                    "is packed as [{}, {}], but the model needs [{rows}, {cols}]",
                    packed.rows, packed.cols
                ),
            });
        }
        Ok(read_packed(self.set, layer, packed)?.into())
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        Ok(self.set.vector(name, len)?)
    }

    fn contains(&self, name: &str) -> bool {
        self.set.contains(name)
    }

    fn place(&self, name: &str) -> (PathBuf, String) {
        let file = self.set.get(name).map_or(self.set.place(), |view| view.file);
        (file.to_owned(), name.to_owned())
    }
}

/// The three files in which Hugging Face models name their special tokens.
struct SpecialTokens<'a> {
    config: &'a Value,
    generation: &'a Value,
    tokenizer: &'a Value,
}

impl SpecialTokens<'_> {
    fn tokenizer(&self, path: &Path, vocab: usize) -> Result<Tokenizer, ModelError> {
        let mut eos = token_ids(&self.generation["eos_token_id"]);
        eos.extend(
            token_ids(&self.config["eos_token_id"]).into_iter().filter(|id| !eos.contains(id)).collect::<Vec<_>>(),
        );
        let mut tokenizer = Tokenizer::from_file(path, None, eos)?;
        if let Some(id) = self.text("eos_token").and_then(|t| tokenizer.id(&t)).filter(|id| !tokenizer.eos.contains(id))
        {
            tokenizer.eos.push(id);
        }
        // A tokenizer_config.json knows best, even if it says that there is no BOS.
        tokenizer.bos = match self.tokenizer.get("bos_token") {
            Some(_) => self.text("bos_token").and_then(|t| tokenizer.id(&t)),
            None => token_ids(&self.config["bos_token_id"]).first().copied(),
        };
        tokenizer.limit_to(vocab);
        Ok(tokenizer)
    }

    fn template(&self, dir: &Path, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>, ModelError> {
        let path = dir.join("chat_template.jinja");
        let source = if path.exists() {
            let read = std::fs::read_to_string(&path);
            Some(read.map_err(|e| ModelError::File { path, problem: format!("cannot be read: {e}") })?)
        } else {
            named_template(&self.tokenizer["chat_template"])
        };
        let text_of = |key: &str, id: Option<u32>| {
            self.text(key).or_else(|| id.and_then(|id| tokenizer.token(id))).unwrap_or_default()
        };
        Ok(source.map(|source| ChatTemplate {
            source,
            bos_token: text_of("bos_token", tokenizer.bos),
            eos_token: text_of("eos_token", tokenizer.eos.first().copied()),
        }))
    }

    /// A special token of tokenizer_config.json: a string, or an object with `content`.
    fn text(&self, key: &str) -> Option<String> {
        let token = self.tokenizer.get(key)?;
        token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
    }
}

/// One id, a list of ids, or nothing.
fn token_ids(value: &Value) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    match value {
        Value::Array(ids) => ids.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

/// The chat template of tokenizer_config.json: a string, or a list of named ones of which `default` (else the first) is taken.
fn named_template(value: &Value) -> Option<String> {
    match value {
        Value::String(source) => Some(source.clone()),
        Value::Array(list) => {
            let template = list.iter().find(|t| t["name"] == "default").or(list.first())?;
            template["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}
