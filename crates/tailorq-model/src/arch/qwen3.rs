//! Qwen3: a llama whose query and key heads are RMS-normalised before rotation, with a head size of its own.

use super::{Architecture, Bias, LinearDecl, llama_linears};

const LINEARS: [LinearDecl; 7] = llama_linears(Bias::Configured, Bias::Configured, Bias::Never);

/// The Qwen3 family.
pub const QWEN3: Architecture = Architecture {
    name: "qwen3",
    hf_class: "Qwen3ForCausalLM",
    aliases: &[],
    linears: &LINEARS,
    qk_norm: true,
    gguf_permutes_qk: false,
};
