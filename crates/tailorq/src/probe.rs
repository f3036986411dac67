//! Logits of a few tokens in a file, or gradients of their loss, for anyone who wants to compare engines.

use std::ops::ControlFlow;
use std::path::Path;
use tailorq_format::{AtomicFile, FormatError, SafetensorsWriter, StoredType, TensorSpec};
use tailorq_kernels::Device;
use tailorq_model::{Batch, Model};
use tailorq_quant::QuantError;
use tailorq_quant::survey::{BlockStats, Loss, Needs, Survey, SurveySample};
use tailorq_tensor::{DType, Matrix, Slot};
use thiserror::Error;

/// Positions whose logits are in memory at once: 64 rows of 152k words are 39 MB.
const ROWS: usize = 64;

/// What can stop a probe.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// There is no token.
    #[error("there is no token to probe: give a text that is not empty or at least one token")]
    Empty,
    /// There is no next token.
    #[error("one token has no successor to predict: gradients need at least two tokens")]
    NoTarget,
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
    /// Loss or gradients are not finite.
    #[error(transparent)]
    Gradients(QuantError),
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
    check_input(model, tokens)?;
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

/// The tokens are some, not too many, and words of the model.
fn check_input(model: &Model, tokens: &[u32]) -> Result<(), ProbeError> {
    if tokens.is_empty() {
        return Err(ProbeError::Empty);
    }
    if tokens.len() > model.config.max_positions {
        return Err(ProbeError::TooLong { tokens: tokens.len(), limit: model.config.max_positions });
    }
    let ids: Vec<i64> = tokens.iter().map(|id| i64::from(*id)).collect();
    check_tokens(&ids, model.config.vocab).map(|_| ())
}

/// Gradients of the mean next-token cross-entropy of some tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct GradientProbe {
    /// In nats a token, over all tokens but the first.
    pub mean_cross_entropy: f64,
    /// Frobenius norms with respect to each linear's weight, under the tensor's checkpoint name, in the order of the model.
    pub gradient_norms: Vec<(String, f64)>,
}

/// Where to write gradients.
#[derive(Clone, Copy, Debug)]
pub struct GradientOutput<'a> {
    /// A safetensors file: `tokens` (I32 `[n]`) and for each linear `grad.NAME` (F32 `[rows, in]`), the last block first.
    pub path: &'a Path,
    /// Only the first so many output rows of each gradient.
    pub rows: Option<usize>,
}

/// The gradients of a model's linears on one sequence, whatever its weights are stored as. `progress` hears how many of
/// how many blocks are done and may stop. One block's gradients are in memory at a time.
pub fn probe_gradients(
    model: &Model,
    device: &dyn Device,
    tokens: &[u32],
    output: Option<GradientOutput<'_>>,
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<GradientProbe, ProbeError> {
    check_input(model, tokens)?;
    if tokens.len() < 2 {
        return Err(ProbeError::NoTarget);
    }
    let mut file = output.map(|output| start_gradients(model, tokens, output)).transpose()?;
    let (needs, n_blocks) = (Needs { sum: true, ..Needs::default() }, model.blocks.len());
    let survey = Survey { device, model, loss: Loss::CrossEntropy, needs: &needs, tape_bytes: usize::MAX };
    let sample = SurveySample { ids: tokens.to_vec(), scored: None };
    let (mut norms, mut failed) = (Vec::new(), None);
    let summary = survey.run(&[sample], None, &mut |block| {
        let names = Slot::ALL.map(|slot| tensor_name(model, block.block_idx, slot));
        let of_block: Vec<_> = names.into_iter().zip(&block.layers).map(|(n, l)| (n, norm(l.sum.as_ref()))).collect();
        norms.push(of_block);
        let written = file.as_mut().map_or(Ok(()), |(file, rows)| write_block(file, *rows, model, &block));
        failed = written.err();
        let go_on = failed.is_none() && progress(n_blocks - block.block_idx, n_blocks).is_continue();
        Ok(if go_on { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    });
    if let Some(error) = failed {
        return Err(error.into());
    }
    let summary = summary.map_err(|error| match error {
        QuantError::Interrupted => ProbeError::Interrupted,
        other => ProbeError::Gradients(other),
    })?;
    if let Some((file, _)) = file {
        file.commit()?;
    }
    let mean_cross_entropy = summary.mean_loss.expect("a survey of gradients has a loss");
    Ok(GradientProbe { mean_cross_entropy, gradient_norms: norms.into_iter().rev().flatten().collect() })
}

fn tensor_name(model: &Model, block_idx: usize, slot: Slot) -> String {
    format!("{}.weight", model.architecture.linear_name(block_idx, slot))
}

fn norm(gradient: Option<&Matrix>) -> f64 {
    let values = gradient.map_or(&[][..], Matrix::data);
    values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

type GradientFile = (SafetensorsWriter<AtomicFile>, usize);

/// Opens the output before the work; blocks are declared in the order in which the backward pass finishes them.
fn start_gradients(model: &Model, tokens: &[u32], output: GradientOutput<'_>) -> Result<GradientFile, FormatError> {
    let rows = output.rows.unwrap_or(usize::MAX);
    let mut specs = vec![TensorSpec::new("tokens", StoredType::I32, &[tokens.len()])];
    for block_idx in (0..model.blocks.len()).rev() {
        for slot in Slot::ALL {
            let weight = &model.blocks[block_idx].linear(slot).weight;
            let name = format!("grad.{}", tensor_name(model, block_idx, slot));
            specs.push(TensorSpec::new(name, DType::F32, &[weight.rows().min(rows), weight.cols()]));
        }
    }
    let mut file = SafetensorsWriter::create(output.path, &specs, &[])?;
    let ids: Vec<u8> = tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
    file.write("tokens", &ids)?;
    Ok((file, rows))
}

fn write_block(
    file: &mut SafetensorsWriter<AtomicFile>,
    rows: usize,
    model: &Model,
    block: &BlockStats,
) -> Result<(), FormatError> {
    for layer in &block.layers {
        let name = format!("grad.{}", tensor_name(model, block.block_idx, layer.slot));
        if let Some(sum) = &layer.sum {
            file.write(&name, &DType::F32.encode(&sum.data()[..sum.rows().min(rows) * sum.cols()]))?;
        }
    }
    Ok(())
}
