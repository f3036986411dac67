//! What a model is made of, counted: sizes, layouts, bytes, bits per weight.

use crate::artifact::n_vector_elements;
use serde::Serialize;
use tailorq_model::OpenedModel;
use tailorq_tensor::{Slot, Weight};

/// One stored matrix.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StoredMatrix {
    /// Checkpoint name.
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// How it is stored: `BF16`, `Q4_1`, `2-bit affine, group 128`.
    pub encoding: String,
    /// Bytes, with scales and zeros.
    pub bytes: usize,
    /// `8 * bytes / (rows * cols)`.
    pub bits_per_weight: f64,
}

impl StoredMatrix {
    fn new(name: &str, weight: &Weight) -> Self {
        let reader = weight.reader();
        let (rows, cols, bytes) = (reader.rows(), reader.cols(), reader.bytes());
        let bits_per_weight = bits(bytes, rows * cols);
        StoredMatrix { name: name.to_owned(), rows, cols, encoding: reader.encoding(), bytes, bits_per_weight }
    }
}

/// Some of a model's weights together.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Share {
    /// Number of weights.
    pub parameters: usize,
    /// Their bytes.
    pub bytes: usize,
    /// `8 * bytes / parameters`.
    pub bits_per_weight: f64,
}

impl Share {
    fn of<'a>(matrices: impl IntoIterator<Item = &'a StoredMatrix>) -> Self {
        let (parameters, bytes) = matrices.into_iter().fold((0, 0), |(p, b), m| (p + m.rows * m.cols, b + m.bytes));
        Share { parameters, bytes, bits_per_weight: bits(bytes, parameters) }
    }
}

/// What [`inspect`] finds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// As the user named it.
    pub model: String,
    /// Directory or file.
    pub path: String,
    /// Declared architecture.
    pub architecture: String,
    /// Transformer blocks.
    pub blocks: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Words of the vocabulary.
    pub vocab: usize,
    /// Longest context.
    pub context: usize,
    /// The head is the embedding.
    pub tied_head: bool,
    /// The tokenizer comes with a chat template.
    pub chat_template: bool,
    /// All weights, norms and biases included; a tied head counts once.
    pub parameters: usize,
    /// The linears of all blocks.
    pub linears: Share,
    /// The embedding.
    pub embedding: Share,
    /// The head; `None` when it is the embedding.
    pub head: Option<Share>,
    /// Linears, embedding and head together.
    pub total: Share,
    /// Norms and biases: number of weights.
    pub vector_parameters: usize,
    /// Bytes of the files that hold weights, headers and metadata included.
    pub file_bytes: u64,
    /// `8 * file_bytes / parameters`: nothing left out.
    pub file_bits_per_weight: f64,
    /// Every linear, embedding and head.
    pub matrices: Vec<StoredMatrix>,
}

/// Counts a model from its shapes and layouts; no weight is read.
pub fn inspect(opened: &OpenedModel) -> Inspection {
    let (model, files) = (&opened.model, &opened.files);
    let config = &model.config;
    let linears: Vec<StoredMatrix> = model
        .blocks
        .iter()
        .flat_map(|block| Slot::ALL.map(|slot| block.linear(slot)))
        .map(|linear| StoredMatrix::new(&linear.name, &linear.weight))
        .collect();
    let embedding = StoredMatrix::new("model.embed_tokens", &model.embedding);
    let head = (!config.tied_head).then(|| StoredMatrix::new("lm_head", &model.head));
    let total = Share::of(linears.iter().chain([&embedding]).chain(&head));
    let vector_parameters = n_vector_elements(model);
    let parameters = total.parameters + vector_parameters;
    Inspection {
        model: files.source.clone(),
        path: files.path.display().to_string(),
        architecture: config.architecture.to_owned(),
        blocks: config.n_blocks,
        hidden: config.hidden,
        intermediate: config.intermediate,
        heads: config.n_heads,
        kv_heads: config.n_kv_heads,
        head_dim: config.head_dim,
        vocab: config.vocab,
        context: config.max_positions,
        tied_head: config.tied_head,
        chat_template: opened.template.is_some(),
        parameters,
        linears: Share::of(&linears),
        embedding: Share::of([&embedding]),
        head: head.as_ref().map(|h| Share::of([h])),
        total,
        vector_parameters,
        file_bytes: files.weight_bytes,
        file_bits_per_weight: files.weight_bytes as f64 * 8.0 / parameters.max(1) as f64,
        matrices: linears.into_iter().chain([embedding]).chain(head).collect(),
    }
}

fn bits(bytes: usize, parameters: usize) -> f64 {
    bytes as f64 * 8.0 / parameters.max(1) as f64
}
