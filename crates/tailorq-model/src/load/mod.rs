//! From a path or a hub id to a model.

mod assemble;
mod directory;
mod gguf;
mod hub;
mod metadata;

pub use hub::{Select, data_set_files};
pub(crate) use metadata::Metadata;

use crate::error::ModelError;
use crate::model::Model;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where a model came from and what its directory says beside the weights.
#[derive(Clone, Debug)]
pub struct ModelFiles {
    /// As the user wrote it: a path or a hub id.
    pub source: String,
    /// The directory, or the GGUF file.
    pub path: PathBuf,
    /// Every file that holds weights, in order.
    pub weight_files: Vec<PathBuf>,
    /// Bytes of those files together.
    pub weight_bytes: u64,
    /// `config.json` as a Hugging Face reader would want it (made from the metadata for a GGUF file).
    pub config_json: serde_json::Value,
    /// `generation_config.json` likewise; null when there is none.
    pub generation_config_json: serde_json::Value,
    /// `tokenizer_config.json` likewise (special tokens, chat template); null when there is none.
    pub tokenizer_config_json: serde_json::Value,
    /// `tokenizer.json` as it lies on disk; `None` for a GGUF file, whose tokenizer [`Tokenizer::to_json`] writes.
    pub tokenizer_json: Option<PathBuf>,
    /// Small files that belong to the model and can be copied as they are: special tokens, licence, ...
    pub extra_files: Vec<PathBuf>,
    /// The linears are stored quantized (a GGUF file with quantized types, a packed artifact).
    pub is_quantized: bool,
    /// Content type of the linears as stored, for tables: `BF16`, `Q4_1`, `tailorq`, several joined by `+`.
    pub stored_as: String,
}

/// A model ready to run.
pub struct OpenedModel {
    /// The decoder.
    pub model: Model,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, if it has one.
    pub template: Option<ChatTemplate>,
    /// Where it came from.
    pub files: ModelFiles,
    /// How long opening took.
    pub times: OpenTimes,
}

/// What opening a model cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenTimes {
    /// Configuration, headers, norms, checks of the weights.
    pub model: Duration,
    /// Tokenizer and chat template.
    pub tokenizer: Duration,
}

impl OpenTimes {
    /// The model was opened from `started` to `opened`, the rest is ready now.
    fn since(started: Instant, opened: Instant) -> Self {
        OpenTimes { model: opened - started, tokenizer: opened.elapsed() }
    }
}

/// Opens a Hugging Face directory, a tailorq artifact, a GGUF file or a hub id (`org/name[@revision]`); what exists on
/// disk wins over the hub. Weights stay memory-mapped.
pub fn open(source: &str) -> Result<OpenedModel, ModelError> {
    let path = Path::new(source);
    if path.is_dir() {
        return directory::open(path, source);
    }
    if path.exists() {
        return open_file(path, source);
    }
    match hub::HubId::parse(source) {
        Some(id) => directory::open(&hub::resolve(&id, &hub::Settings::from_environment())?, source),
        None => Err(ModelError::File {
            path: path.to_owned(),
            problem: "no such file or directory; give a model directory, a .gguf file or a hub id (org/name)".into(),
        }),
    }
}

fn open_file(path: &Path, source: &str) -> Result<OpenedModel, ModelError> {
    let is_gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) || begins_with(path, b"GGUF");
    if is_gguf {
        return gguf::open(path, source);
    }
    let problem =
        "is neither a directory nor a GGUF file; for a safetensors model give the directory with its config.json";
    Err(ModelError::File { path: path.to_owned(), problem: problem.into() })
}

fn begins_with(path: &Path, magic: &[u8]) -> bool {
    let mut start = vec![0; magic.len()];
    let read = std::fs::File::open(path).and_then(|mut f| std::io::Read::read_exact(&mut f, &mut start));
    read.is_ok() && start == magic
}

/// Bytes of files together; what cannot be asked counts nothing.
fn total_bytes(files: &[PathBuf]) -> u64 {
    files.iter().filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum()
}

/// Names of the types in which weights are stored, each once, most bytes first.
fn joined_types(types: impl IntoIterator<Item = (String, usize)>) -> String {
    let mut totals: Vec<(String, usize)> = Vec::new();
    for (name, bytes) in types {
        match totals.iter_mut().find(|(n, _)| *n == name) {
            Some((_, total)) => *total += bytes,
            None => totals.push((name, bytes)),
        }
    }
    totals.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    totals.into_iter().map(|(n, _)| n).collect::<Vec<_>>().join("+")
}
