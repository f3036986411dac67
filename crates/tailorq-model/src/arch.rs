//! Architectures as declarations.

use tailorq_tensor::Slot;

/// One linear of a block: its names in a checkpoint and in a GGUF file.
#[derive(Clone, Copy, Debug)]
pub struct LinearDecl {
    /// Which linear.
    pub slot: Slot,
    /// Name below `model.layers.N.` without `.weight`: `self_attn.q_proj`.
    pub checkpoint: &'static str,
    /// Name below `blk.N.` without `.weight`: `attn_q`.
    pub gguf: &'static str,
    /// Whether a bias is required, may occur, or never occurs, is the architecture's business; this says it may.
    pub bias: bool,
    /// Whether the quantizers may touch it.
    pub quantizable: bool,
}

/// A family of decoders that one declaration describes.
#[derive(Clone, Copy, Debug)]
pub struct Architecture {
    /// Name in `config.json`'s `model_type` and in GGUF's `general.architecture`.
    pub name: &'static str,
    /// Entries of `config.json`'s `architectures`.
    pub hf_class: &'static str,
    /// Further `model_type`s that are the same decoder (`mistral` is a llama).
    pub aliases: &'static [&'static str],
    /// The seven linears, in [`Slot::ALL`] order.
    pub linears: &'static [LinearDecl; 7],
    /// Queries and keys are normalised per head before rotation.
    pub qk_norm: bool,
    /// GGUF files hold q and k rows permuted for interleaved rotation.
    pub gguf_permutes_qk: bool,
}
