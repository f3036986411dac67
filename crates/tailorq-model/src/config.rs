//! Sizes and constants of one model, read from config.json or from GGUF metadata.

/// How rotary frequencies are stretched for long contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Plain frequencies.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies divided, high ones kept, a smooth ramp between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided by `factor`.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original_context: f64,
    },
    /// One divisor per frequency, as GGUF's `rope_freqs.weight` stores them: `[head_dim / 2]`.
    Divisors(Vec<f32>),
}

/// Everything the forward pass needs beside the weights.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Name of the declared architecture: `llama`, `qwen2`, `qwen3`.
    pub architecture: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward.
    pub intermediate: usize,
    /// Transformer blocks.
    pub n_blocks: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Rows of embedding and head.
    pub vocab: usize,
    /// Longest context the model was trained for.
    pub max_positions: usize,
    /// Epsilon of every RMS norm.
    pub rms_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Attention sees only the last so many tokens, if set.
    pub sliding_window: Option<usize>,
    /// The head shares the embedding's weights.
    pub tied_head: bool,
}
