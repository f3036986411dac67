//! Sizes and constants of one model, read from config.json or from GGUF metadata.

mod gguf;
mod hf;

pub(crate) use gguf::{TensorFacts, from_gguf};
pub(crate) use hf::from_hf;

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
    /// q, k, v and o have biases where the architecture leaves that to the configuration.
    pub attention_bias: bool,
    /// gate, up and down have biases where the architecture leaves that to the configuration.
    pub mlp_bias: bool,
}

impl ModelConfig {
    /// Checks that the sizes make a decoder: the message says which does not and why.
    pub(crate) fn validate(&self) -> Result<(), String> {
        let sizes = [
            ("hidden size", self.hidden),
            ("feed-forward size", self.intermediate),
            ("number of blocks", self.n_blocks),
            ("number of heads", self.n_heads),
            ("number of key/value heads", self.n_kv_heads),
            ("head size", self.head_dim),
            ("vocabulary size", self.vocab),
            ("context length", self.max_positions),
        ];
        for (what, size) in sizes {
            // The bound keeps every product of two sizes far from overflow; no decoder comes near it.
            if size == 0 || size > 1 << 30 {
                return Err(format!("{what} is {size}, which no decoder has"));
            }
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return Err(format!("{} heads cannot share {} key/value heads evenly", self.n_heads, self.n_kv_heads));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("head size {} is odd; rotary embedding turns pairs", self.head_dim));
        }
        let positive = |x: f64| x.is_finite() && x > 0.0;
        if !positive(f64::from(self.rms_eps)) {
            return Err(format!("RMS norm epsilon {} is not a positive number", self.rms_eps));
        }
        if !positive(self.rope_theta) {
            return Err(format!("rotary base {} is not a positive number", self.rope_theta));
        }
        if self.sliding_window == Some(0) {
            return Err("sliding window of 0 tokens".into());
        }
        self.validate_rope()
    }

    fn validate_rope(&self) -> Result<(), String> {
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let fine = match &self.rope_scaling {
            RopeScaling::None => true,
            RopeScaling::Linear { factor } => positive(*factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                [*factor, *low_freq_factor, *high_freq_factor, *original_context].into_iter().all(positive)
                    && high_freq_factor > low_freq_factor
            }
            RopeScaling::Divisors(d) => d.len() == self.head_dim / 2 && d.iter().all(|&d| positive(f64::from(d))),
        };
        if fine { Ok(()) } else { Err(format!("rotary scaling {:?} is out of range", self.rope_scaling)) }
    }

    /// Query width: heads times head size.
    pub fn query_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Key and value width: key/value heads times head size.
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// `[rows, cols]` of the linear in `slot`.
    pub fn linear_shape(&self, slot: tailorq_tensor::Slot) -> (usize, usize) {
        use tailorq_tensor::Slot;
        match slot {
            Slot::Q => (self.query_width(), self.hidden),
            Slot::K | Slot::V => (self.kv_width(), self.hidden),
            Slot::O => (self.hidden, self.query_width()),
            Slot::Gate | Slot::Up => (self.intermediate, self.hidden),
            Slot::Down => (self.hidden, self.intermediate),
        }
    }
}
