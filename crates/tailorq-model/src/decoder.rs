//! Devices that decode by themselves: they hold a model in a form of their own, weights as packed as in the file, and keep keys
//! and values of some sequences beside it.
//!
//! What runs on [`tailorq_kernels::Device`] is put together here, operation by operation. A [`Decoder`] is the other way: the
//! device takes whole steps, and only tokens and logits travel. Those who generate serve both.

use crate::model::Model;
use tailorq_tensor::Weight;
use thiserror::Error;

/// A decoder could not be made, or could not go on.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct DecoderError(Box<dyn std::error::Error + Send + Sync>);

impl DecoderError {
    /// With the device's own words, which name the remedy.
    pub fn new(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        DecoderError(error.into())
    }
}

/// A model on a device, and its sequences, which are numbered from 0.
pub trait Decoder {
    /// For reports: the device.
    fn name(&self) -> String;

    /// Sequences that there are.
    fn sequences(&self) -> usize;

    /// Tokens that each sequence can hold.
    fn capacity(&self) -> usize;

    /// Bytes of the blocks' linears and of the head that a step reads of the device's memory, whatever the number of sequences.
    fn weight_bytes(&self) -> (usize, usize);

    /// Bytes of the keys and values of a sequence of so many tokens.
    fn kv_bytes(&self, tokens: usize) -> usize;

    /// Bytes that a copy inside the device's memory moves in a second, those read and those written, measured now; of several
    /// devices, their mean.
    fn copy_rate(&mut self) -> f64;

    /// Forgets all tokens of a sequence but the first so many. Its logits are those of tokens that may be gone: read before looking.
    fn truncate(&mut self, sequence: usize, tokens: usize);

    /// `to` becomes the first so many tokens of `from`, which holds at least as many.
    fn share(&mut self, from: usize, to: usize, tokens: usize) -> Result<(), DecoderError>;

    /// Reads `ids`, at least one, after what the sequence holds. Nothing is read when they do not fit.
    fn read(&mut self, sequence: usize, ids: &[u32]) -> Result<(), DecoderError>;

    /// The logits after the last token that was read of a sequence, `[vocab]`.
    fn logits(&mut self, sequence: usize, logits: &mut Vec<f32>);

    /// For each of some sequences, ascending, whose logits are those of their last token: chooses the most likely token (the first of
    /// equals), reads it, and so on, `n` times; what was chosen comes back in the order of the sequences. A sequence that is full is
    /// not read on: what comes after its last token means nothing. Logits of the sequences that are not named may be lost.
    fn choose(&mut self, sequences: &[usize], n: usize) -> Result<Vec<Vec<u32>>, DecoderError>;
}

/// How large a decoder shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderSize {
    /// Sequences at once.
    pub sequences: usize,
    /// Tokens of the longest of them.
    pub capacity: usize,
}

/// Makes decoders.
pub trait Decoders: Send + Sync {
    /// Puts `model` on the device.
    ///
    /// # Errors
    /// When the model is of a kind that the device does not serve, or has no room there.
    fn open(&self, model: &Model, size: DecoderSize) -> Result<Box<dyn Decoder>, DecoderError>;

    /// Most sequences at once.
    fn most_sequences(&self) -> usize;

    /// What results depend on beside the inputs, for names of what is kept between runs.
    fn signature(&self) -> String;
}

impl Model {
    /// Whether a linear of some block is packed, as in an artifact: a decoder multiplies it as it is.
    pub fn is_packed(&self) -> bool {
        self.blocks.iter().flat_map(|block| &block.linears).any(|linear| matches!(linear.weight, Weight::Packed(_)))
    }
}
