//! Sizes and constants from GGUF metadata.

use super::{ModelConfig, RopeScaling};
use crate::arch::Architecture;
use crate::error::ModelError;
use crate::load::Metadata;
use crate::rope::{frequencies, llama3_divisor};
use tailorq_tensor::Slot;

/// What the tensors of a GGUF file, rather than its metadata, say about the model.
pub(crate) struct TensorFacts {
    /// Rows of the embedding.
    pub vocab: usize,
    /// `rope_freqs.weight`.
    pub rope_divisors: Option<Vec<f32>>,
    /// There is no `output.weight`.
    pub tied_head: bool,
    /// q has a bias.
    pub attention_bias: bool,
    /// gate has a bias.
    pub mlp_bias: bool,
}

/// The configuration of a GGUF file.
pub(crate) fn from_gguf(
    meta: &Metadata<'_>,
    architecture: &'static Architecture,
    facts: TensorFacts,
) -> Result<ModelConfig, ModelError> {
    let fields = Fields { meta, prefix: architecture.name };
    fields.refuse_unsupported()?;
    let (hidden, n_heads) = (fields.size("embedding_length")?, fields.size("attention.head_count")?);
    if n_heads == 0 {
        return Err(meta.problem("has 0 attention heads"));
    }
    let head_dim = fields.optional_size("attention.key_length")?.unwrap_or(hidden / n_heads);
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(n) = fields.optional_size(key)?.filter(|&n| n != head_dim) {
            let problem =
                format!("{}.{key} is {n}, but heads have {head_dim} elements; that is not supported", fields.prefix);
            return Err(meta.problem(&problem));
        }
    }
    let mut config = ModelConfig {
        architecture: architecture.name,
        hidden,
        intermediate: fields.size("feed_forward_length")?,
        n_blocks: fields.size("block_count")?,
        n_heads,
        n_kv_heads: fields.optional_size("attention.head_count_kv")?.unwrap_or(n_heads),
        head_dim,
        vocab: facts.vocab,
        max_positions: fields.size("context_length")?,
        rms_eps: fields
            .float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| meta.problem(&format!("{}.attention.layer_norm_rms_epsilon is missing", fields.prefix)))?
            as f32,
        rope_theta: fields.float("rope.freq_base")?.unwrap_or(10_000.0),
        rope_scaling: fields.rope_scaling()?,
        sliding_window: fields.optional_size("attention.sliding_window")?.filter(|&n| n > 0),
        tied_head: facts.tied_head,
        attention_bias: facts.attention_bias && architecture.configures_bias(Slot::Q),
        mlp_bias: facts.mlp_bias && architecture.configures_bias(Slot::Gate),
    };
    config.validate().map_err(|e| meta.problem(&e))?;
    if let Some(divisors) = facts.rope_divisors {
        config.rope_scaling = recognise_divisors(&config, divisors);
        config.validate().map_err(|e| meta.problem(&e))?;
    }
    Ok(config)
}

/// The keys below `llama.`, `qwen2.`, ...
struct Fields<'m, 'a> {
    meta: &'m Metadata<'a>,
    prefix: &'static str,
}

impl Fields<'_, '_> {
    fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.optional_size(key)?.ok_or_else(|| self.meta.problem(&format!("{}.{key} is missing", self.prefix)))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        // A size that does not fit usize is refused by the range check of the configuration.
        Ok(self.meta.uint(&self.full(key))?.map(|n| usize::try_from(n).unwrap_or(usize::MAX)))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.meta.float(&self.full(key))
    }

    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn refuse_unsupported(&self) -> Result<(), ModelError> {
        match self.optional_size("expert_count")? {
            None | Some(0) => Ok(()),
            Some(n) => Err(self.meta.problem(&format!("is a mixture of {n} experts, which is not supported"))),
        }
    }

    fn rope_scaling(&self) -> Result<RopeScaling, ModelError> {
        // `rope.scale_linear` is how files of 2023 spell it.
        let factor = self.float("rope.scaling.factor")?.or(self.float("rope.scale_linear")?);
        let kind = self.full("rope.scaling.type");
        match (self.meta.string(&kind)?, factor) {
            (Some("linear"), Some(factor)) => Ok(RopeScaling::Linear { factor }),
            (Some("linear"), None) => Err(self.meta.problem(&format!("{kind} is linear without a factor"))),
            (None, Some(factor)) if factor != 1.0 && factor != 0.0 => Ok(RopeScaling::Linear { factor }),
            (None | Some("none"), _) => Ok(RopeScaling::None),
            (Some(other), _) => Err(self.meta.problem(&format!(
                "rotary scaling '{other}' is not supported (supported: none, linear, and Llama 3's rope_freqs.weight)"
            ))),
        }
    }
}

/// Names Llama 3's scaling when the divisors are those of its formula with the constants of all published models, so
/// that a config.json made from the file says what the original said.
fn recognise_divisors(config: &ModelConfig, divisors: Vec<f32>) -> RopeScaling {
    let factor = divisors.iter().copied().fold(1.0, f32::max);
    let (low_freq_factor, high_freq_factor, original_context) = (1.0, 4.0, 8192.0);
    let factor = f64::from(factor);
    let close = divisors.len() == config.head_dim / 2
        && frequencies(&ModelConfig { rope_scaling: RopeScaling::None, ..config.clone() }).iter().zip(&divisors).all(
            |(&frequency, &divisor)| {
                let expected = llama3_divisor(frequency, factor, low_freq_factor, high_freq_factor, original_context);
                (f64::from(divisor) / expected - 1.0).abs() < 1e-5
            },
        );
    if close && factor > 1.0 {
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }
    } else {
        RopeScaling::Divisors(divisors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_divisors_of_llama_3_are_recognised() {
        let json = serde_json::json!({
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 32, "vocab_size": 8, "rope_theta": 500000.0,
        });
        let config = super::super::from_hf(&json, Path::new("config.json")).unwrap();
        let mut divisors: Vec<f32> =
            frequencies(&config).iter().map(|&f| llama3_divisor(f, 8.0, 1.0, 4.0, 8192.0) as f32).collect();
        let scaling = recognise_divisors(&config, divisors.clone());
        assert!(matches!(scaling, RopeScaling::Llama3 { factor: 8.0, .. }), "{scaling:?}");
        divisors[3] = 2.0;
        assert!(matches!(recognise_divisors(&config, divisors), RopeScaling::Divisors(_)));
    }
}
