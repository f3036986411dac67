//! Qwen2 and Qwen2.5: a llama with biases on q, k and v.

use super::{Architecture, Bias, LinearDecl, llama_linears};

const LINEARS: [LinearDecl; 7] = llama_linears(Bias::Always, Bias::Never, Bias::Never);

/// The Qwen2 family.
pub const QWEN2: Architecture = Architecture {
    name: "qwen2",
    hf_class: "Qwen2ForCausalLM",
    aliases: &[],
    linears: &LINEARS,
    qk_norm: false,
    gguf_permutes_qk: false,
};
