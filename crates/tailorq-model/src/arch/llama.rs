//! Llama 2 and 3, SmolLM2, Mistral: rotary attention without q/k norms, a SwiGLU feed-forward.

use super::{Architecture, Bias, LinearDecl, llama_linears};

const LINEARS: [LinearDecl; 7] = llama_linears(Bias::Configured, Bias::Configured, Bias::Configured);

/// The llama family.
pub const LLAMA: Architecture = Architecture {
    name: "llama",
    hf_class: "LlamaForCausalLM",
    aliases: &["mistral"],
    linears: &LINEARS,
    qk_norm: false,
    gguf_permutes_qk: true,
};
