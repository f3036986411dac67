//! From a path or a hub id to a model.

use crate::error::ModelError;
use crate::model::Model;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use std::path::PathBuf;

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
    /// `generation_config.json` likewise.
    pub generation_config_json: serde_json::Value,
    /// `tokenizer_config.json` likewise (special tokens, chat template).
    pub tokenizer_config_json: serde_json::Value,
    /// Bits per weight of the linears as stored, when the file is itself quantized (GGUF, packed).
    pub is_quantized: bool,
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
}

/// Opens a Hugging Face directory, a tailorq artifact, a GGUF file or a hub id (`org/name[@revision]`); what exists on
/// disk wins over the hub. Weights stay memory-mapped.
pub fn open(_source: &str) -> Result<OpenedModel, ModelError> {
    todo!()
}
