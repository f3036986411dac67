//! A model from named tensors, wherever they lie.

use crate::arch::{Architecture, Bias, EMBEDDING, FINAL_NORM, HEAD, block_name, block_norms};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::model::{Block, Linear, Model};
use std::path::PathBuf;
use tailorq_tensor::{Slot, Weight};

/// The tensors of a file or a set of files, by checkpoint names.
pub(super) trait Tensors {
    /// The weight of `layer` (a name without `.weight`), as it lies in the file.
    fn matrix(&self, layer: &str, rows: usize, cols: usize) -> Result<Weight, ModelError>;
    /// A vector as f32.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError>;
    /// Whether there is a tensor of this name.
    fn contains(&self, name: &str) -> bool;
    /// File and name to report when tensor `name` is wrong.
    fn place(&self, name: &str) -> (PathBuf, String);
}

/// Builds the model that `config` describes. A head shares the embedding's weights when the configuration says so.
pub(super) fn assemble(
    config: ModelConfig,
    architecture: &'static Architecture,
    tensors: &dyn Tensors,
) -> Result<Model, ModelError> {
    let embedding = tensors.matrix(EMBEDDING, config.vocab, config.hidden)?;
    let head = if config.tied_head { embedding.clone() } else { tensors.matrix(HEAD, config.vocab, config.hidden)? };
    let norm = finite_vector(tensors, &format!("{FINAL_NORM}.weight"), config.hidden)?;
    let builder = Builder { config: &config, architecture, tensors };
    let blocks = (0..config.n_blocks).map(|i| builder.block(i)).collect::<Result<_, _>>()?;
    Ok(Model::new(config, architecture, embedding, blocks, norm, head))
}

struct Builder<'a> {
    config: &'a ModelConfig,
    architecture: &'static Architecture,
    tensors: &'a dyn Tensors,
}

impl Builder<'_> {
    fn block(&self, block_idx: usize) -> Result<Block, ModelError> {
        let norm = |part: &str, len: usize| {
            finite_vector(self.tensors, &format!("{}.weight", block_name(block_idx, part)), len)
        };
        let head_dim = self.config.head_dim;
        let qk_norm = match self.architecture.qk_norm {
            true => Some((norm(block_norms::QUERY, head_dim)?, norm(block_norms::KEY, head_dim)?)),
            false => None,
        };
        let linears = Slot::ALL.into_iter().map(|slot| self.linear(block_idx, slot)).collect::<Result<Vec<_>, _>>()?;
        Ok(Block {
            attention_norm: norm(block_norms::ATTENTION, self.config.hidden)?,
            mlp_norm: norm(block_norms::MLP, self.config.hidden)?,
            qk_norm,
            linears: linears.try_into().expect("there are as many slots as linears in a block"),
        })
    }

    fn linear(&self, block_idx: usize, slot: Slot) -> Result<Linear, ModelError> {
        let name = self.architecture.linear_name(block_idx, slot);
        let (rows, cols) = self.config.linear_shape(slot);
        let weight = self.tensors.matrix(&name, rows, cols)?;
        let bias = self.bias(&format!("{name}.bias"), slot, rows)?;
        Ok(Linear { name, weight, bias })
    }

    fn bias(&self, name: &str, slot: Slot, rows: usize) -> Result<Option<Vec<f32>>, ModelError> {
        let wanted = match (self.architecture.linear(slot).bias, slot) {
            (Bias::Never, _) => false,
            (Bias::Always, _) => true,
            (Bias::Configured, Slot::Gate | Slot::Up | Slot::Down) => self.config.mlp_bias,
            (Bias::Configured, _) => self.config.attention_bias,
        };
        if wanted {
            return finite_vector(self.tensors, name, rows).map(Some);
        }
        if self.tensors.contains(name) {
            let (path, tensor) = self.tensors.place(name);
            let problem = format!(
                "is a bias that a {} model of this configuration does not have; attention_bias or mlp_bias in its \
                 config.json may be wrong",
                self.architecture.name
            );
            return Err(ModelError::Tensor { path, tensor, problem });
        }
        Ok(None)
    }
}

/// A vector whose elements are numbers.
fn finite_vector(tensors: &dyn Tensors, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
    let values = tensors.vector(name, len)?;
    if let Some(i) = values.iter().position(|x| !x.is_finite()) {
        let (path, tensor) = tensors.place(name);
        let problem = format!("has the value {} at index {i}; the checkpoint is damaged, fetch it again", values[i]);
        return Err(ModelError::Tensor { path, tensor, problem });
    }
    Ok(values)
}
