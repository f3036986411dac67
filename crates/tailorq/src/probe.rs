//! Logits of a few tokens in a file, for anyone who wants to compare engines.

use std::ops::ControlFlow;
use std::path::Path;
use tailorq_format::{FormatError, SafetensorsWriter, StoredType, TensorSpec};
use tailorq_kernels::Device;
use tailorq_model::{Batch, Model};
use tailorq_tensor::{DType, Matrix};
use thiserror::Error;

/// Positions whose logits are in memory at once: 64 rows of 152k words are 39 MB.
const ROWS: usize = 64;

/// What can stop a probe.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// There is no token.
    #[error("there is no token to probe: give a text that is not empty or at least one token")]
    Empty,
    /// A token that the model does not have.
    #[error("token {id} at position {position} does not exist: the model has {vocab} words")]
    UnknownToken {
        /// The id.
        id: i64,
        /// Its place.
        position: usize,
        /// Words of the model.
        vocab: usize,
    },
    /// More tokens than the model's context.
    #[error("{tokens} tokens do not fit the model's context of {limit}")]
    TooLong {
        /// Tokens given.
        tokens: usize,
        /// Longest context.
        limit: usize,
    },
    /// The caller asked to stop.
    #[error("interrupted; nothing was written")]
    Interrupted,
    /// The output could not be written.
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// Checks that `ids` are words of a model with `vocab` words.
pub fn check_tokens(ids: &[i64], vocab: usize) -> Result<Vec<u32>, ProbeError> {
    let check = |(position, &id): (usize, &i64)| match u32::try_from(id) {
        Ok(word) if (word as usize) < vocab => Ok(word),
        _ => Err(ProbeError::UnknownToken { id, position, vocab }),
    };
    ids.iter().enumerate().map(check).collect()
}

/// Writes a safetensors file with `tokens` (I32 `[n]`) and `logits` (F32 `[n, vocab]`, row `i` predicts what follows token
/// `i`). The file appears when it is whole. `progress` hears how many of how many positions are done and may stop.
pub fn probe(
    model: &Model,
    device: &dyn Device,
    tokens: &[u32],
    output: &Path,
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<(), ProbeError> {
    let (n, vocab) = (tokens.len(), model.config.vocab);
    if n == 0 {
        return Err(ProbeError::Empty);
    }
    if n > model.config.max_positions {
        return Err(ProbeError::TooLong { tokens: n, limit: model.config.max_positions });
    }
    let ids: Vec<i64> = tokens.iter().map(|id| i64::from(*id)).collect();
    check_tokens(&ids, vocab)?;
    // Opened before the work, so that an output that cannot be written is known at once.
    let specs = [TensorSpec::new("tokens", StoredType::I32, &[n]), TensorSpec::new("logits", DType::F32, &[n, vocab])];
    let mut file = SafetensorsWriter::create(output, &specs, &[])?;
    let ids: Vec<u8> = tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
    file.write("tokens", &ids)?;
    let mut go_on = |done| if progress(done, n).is_break() { Err(ProbeError::Interrupted) } else { Ok(()) };
    go_on(0)?;
    let hidden = model.hidden(device, &Batch::new([tokens]), None);
    for (i, rows) in hidden.data().chunks(ROWS * hidden.cols()).enumerate() {
        go_on(i * ROWS)?;
        let rows = Matrix::from_vec(rows.len() / hidden.cols(), hidden.cols(), rows.to_vec());
        file.write("logits", &DType::F32.encode(model.logits(device, &rows).data()))?;
    }
    go_on(n)?;
    Ok(file.commit()?)
}
