//! Architectures as declarations.
//!
//! A family of decoders is one file here plus one line in [`ALL`]: its names, its seven linears with their names in
//! checkpoints and in GGUF files, and the few switches by which such decoders differ. The forward pass is one and the
//! same for all of them.

mod llama;
mod qwen2;
mod qwen3;

use crate::error::ModelError;
use std::path::Path;
use tailorq_tensor::Slot;

/// Every architecture that tailorq knows.
pub const ALL: &[&Architecture] = &[&llama::LLAMA, &qwen2::QWEN2, &qwen3::QWEN3];

/// Name of the embedding in a checkpoint, without `.weight`.
pub const EMBEDDING: &str = "model.embed_tokens";
/// Name of the head in a checkpoint, without `.weight`; absent when it shares the embedding's weights.
pub const HEAD: &str = "lm_head";
/// Name of the final norm in a checkpoint, without `.weight`.
pub const FINAL_NORM: &str = "model.norm";

/// When a linear carries a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// Never.
    Never,
    /// In every model of the architecture.
    Always,
    /// In models whose configuration (`attention_bias`, `mlp_bias`) or whose GGUF tensors say so.
    Configured,
}

/// One linear of a block: its names in a checkpoint and in a GGUF file.
#[derive(Clone, Copy, Debug)]
pub struct LinearDecl {
    /// Which linear.
    pub slot: Slot,
    /// Name below `model.layers.N.` without `.weight`: `self_attn.q_proj`.
    pub checkpoint: &'static str,
    /// Name below `blk.N.` without `.weight`: `attn_q`.
    pub gguf: &'static str,
    /// Whether it has a bias.
    pub bias: Bias,
    /// Whether the quantizers may touch it.
    pub quantizable: bool,
}

impl LinearDecl {
    /// A quantizable linear.
    const fn new(slot: Slot, checkpoint: &'static str, gguf: &'static str, bias: Bias) -> Self {
        LinearDecl { slot, checkpoint, gguf, bias, quantizable: true }
    }
}

/// The seven linears of a gated decoder block under the names that llama gave them, with the biases of q, k and v, of o,
/// and of the feed-forward.
const fn llama_linears(qkv: Bias, o: Bias, mlp: Bias) -> [LinearDecl; 7] {
    [
        LinearDecl::new(Slot::Q, "self_attn.q_proj", "attn_q", qkv),
        LinearDecl::new(Slot::K, "self_attn.k_proj", "attn_k", qkv),
        LinearDecl::new(Slot::V, "self_attn.v_proj", "attn_v", qkv),
        LinearDecl::new(Slot::O, "self_attn.o_proj", "attn_output", o),
        LinearDecl::new(Slot::Gate, "mlp.gate_proj", "ffn_gate", mlp),
        LinearDecl::new(Slot::Up, "mlp.up_proj", "ffn_up", mlp),
        LinearDecl::new(Slot::Down, "mlp.down_proj", "ffn_down", mlp),
    ]
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

impl Architecture {
    /// The architecture that `name` means (a name or an alias); `path` is the file that said so.
    pub fn find(name: &str, path: &Path) -> Result<&'static Architecture, ModelError> {
        ALL.iter().copied().find(|a| a.name == name || a.aliases.contains(&name)).ok_or_else(|| {
            let names = ALL.iter().flat_map(|a| std::iter::once(&a.name).chain(a.aliases));
            ModelError::UnknownArchitecture {
                path: path.to_owned(),
                found: name.to_owned(),
                supported: names.copied().collect::<Vec<_>>().join(", "),
            }
        })
    }

    /// The declaration of a slot.
    pub fn linear(&self, slot: Slot) -> &'static LinearDecl {
        &self.linears[slot.index()]
    }

    /// Whether the biases of q (for attention) or gate (for the feed-forward) are a matter of configuration.
    pub(crate) fn configures_bias(&self, slot: Slot) -> bool {
        self.linear(slot).bias == Bias::Configured
    }

    /// Checkpoint name of a linear without `.weight`: `model.layers.3.mlp.down_proj`.
    pub fn linear_name(&self, block_idx: usize, slot: Slot) -> String {
        block_name(block_idx, self.linear(slot).checkpoint)
    }
}

/// Checkpoint name of a part of a block: `model.layers.{block_idx}.{part}`.
pub fn block_name(block_idx: usize, part: &str) -> String {
    format!("model.layers.{block_idx}.{part}")
}

/// Names of a block's norms below `model.layers.N.`, without `.weight`.
pub mod block_norms {
    /// Before attention.
    pub const ATTENTION: &str = "input_layernorm";
    /// Before the feed-forward.
    pub const MLP: &str = "post_attention_layernorm";
    /// Of each query head, where the architecture has `qk_norm`.
    pub const QUERY: &str = "self_attn.q_norm";
    /// Of each key head, where the architecture has `qk_norm`.
    pub const KEY: &str = "self_attn.k_norm";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declarations_follow_the_slot_order() {
        for architecture in ALL {
            for (slot, decl) in Slot::ALL.into_iter().zip(architecture.linears) {
                assert_eq!(slot, decl.slot, "{}", architecture.name);
            }
        }
    }

    #[test]
    fn aliases_resolve_and_unknown_names_list_what_exists() {
        let path = Path::new("config.json");
        assert_eq!(Architecture::find("mistral", path).unwrap().name, "llama");
        let message = Architecture::find("mamba", path).unwrap_err().to_string();
        assert!(message.contains("config.json") && message.contains("mamba") && message.contains("qwen3"), "{message}");
    }

    #[test]
    fn names_are_those_of_checkpoints() {
        assert_eq!(qwen2::QWEN2.linear_name(3, Slot::Down), "model.layers.3.mlp.down_proj");
    }
}
