//! config.json as Hugging Face models have it: reading and writing.

use super::{ModelConfig, RopeScaling};
use crate::arch::Architecture;
use crate::error::ModelError;
use serde_json::{Map, Value, json};
use std::path::Path;
use tailorq_tensor::Slot;

/// The configuration that `json`, the content of `path`, describes. Fails on what tailorq does not compute.
pub(crate) fn from_hf(json: &Value, path: &Path) -> Result<ModelConfig, ModelError> {
    let fields = Fields { map: json.as_object(), path };
    if fields.map.is_none() {
        return Err(fields.problem("is not a JSON object; a Hugging Face config.json is needed"));
    }
    let model_type = fields.get("model_type").and_then(Value::as_str);
    let model_type = model_type.ok_or_else(|| fields.problem("has no \"model_type\"; which architecture is it?"))?;
    let architecture = Architecture::find(model_type, path)?;
    fields.refuse_unsupported()?;
    let hidden = fields.usize("hidden_size")?;
    let n_heads = fields.usize("num_attention_heads")?;
    let n_blocks = fields.usize("num_hidden_layers")?;
    let head_dim = match fields.optional_usize("head_dim")? {
        Some(n) => n,
        None if n_heads > 0 && hidden.is_multiple_of(n_heads) => hidden / n_heads,
        None => return Err(fields.problem(&format!("hidden_size {hidden} does not divide into {n_heads} heads"))),
    };
    let config = ModelConfig {
        architecture: architecture.name,
        hidden,
        intermediate: fields.usize("intermediate_size")?,
        n_blocks,
        n_heads,
        n_kv_heads: fields.optional_usize("num_key_value_heads")?.unwrap_or(n_heads),
        head_dim,
        vocab: fields.usize("vocab_size")?,
        max_positions: fields.optional_usize("max_position_embeddings")?.unwrap_or(2048),
        rms_eps: fields.optional_f64("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope_theta: fields.rope_theta()?,
        rope_scaling: fields.rope_scaling(head_dim)?,
        sliding_window: fields.sliding_window(model_type, n_blocks)?,
        tied_head: fields.bool("tie_word_embeddings")?,
        attention_bias: fields.bool("attention_bias")? && architecture.configures_bias(Slot::Q),
        mlp_bias: fields.bool("mlp_bias")? && architecture.configures_bias(Slot::Gate),
    };
    config.validate().map_err(|problem| fields.problem(&problem))?;
    Ok(config)
}

/// The fields of a config.json, with errors that name file and field.
struct Fields<'a> {
    map: Option<&'a Map<String, Value>>,
    path: &'a Path,
}

impl<'a> Fields<'a> {
    /// A field that is there and not null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map?.get(key).filter(|v| !v.is_null())
    }

    fn problem(&self, problem: &str) -> ModelError {
        ModelError::File { path: self.path.to_owned(), problem: problem.to_owned() }
    }

    fn usize(&self, key: &str) -> Result<usize, ModelError> {
        self.optional_usize(key)?.ok_or_else(|| self.problem(&format!("\"{key}\" is missing")))
    }

    fn optional_usize(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let read = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        self.typed(key, "a whole number", read)
    }

    fn optional_f64(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn bool(&self, key: &str) -> Result<bool, ModelError> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    fn typed<T>(&self, key: &str, kind: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(x) => Ok(Some(x)),
            None => Err(self.problem(&format!("\"{key}\" is {value}, not {kind}"))),
        }
    }

    /// Refuses variants of the architectures that the forward pass does not compute, rather than running them wrongly.
    fn refuse_unsupported(&self) -> Result<(), ModelError> {
        if let Some(act) = self.get("hidden_act").filter(|a| *a != "silu" && *a != "swish") {
            return Err(self.problem(&format!("\"hidden_act\" is {act}; only \"silu\" is supported")));
        }
        if let Some(part) = self.optional_f64("partial_rotary_factor")?.filter(|&p| p != 1.0) {
            return Err(
                self.problem(&format!("\"partial_rotary_factor\" is {part}; only whole heads (1) are supported"))
            );
        }
        Ok(())
    }

    /// The rotary settings: `rope_parameters` of newer files, `rope_scaling` of older ones.
    fn rope(&self) -> Option<Fields<'a>> {
        let map = self.get("rope_parameters").or_else(|| self.get("rope_scaling"))?.as_object();
        Some(Fields { map, path: self.path })
    }

    fn rope_theta(&self) -> Result<f64, ModelError> {
        let nested = self.rope().map(|rope| rope.optional_f64("rope_theta")).transpose()?.flatten();
        Ok(self.optional_f64("rope_theta")?.or(nested).unwrap_or(10_000.0))
    }

    fn rope_scaling(&self, head_dim: usize) -> Result<RopeScaling, ModelError> {
        let Some(rope) = self.rope() else { return Ok(RopeScaling::None) };
        let need =
            |key: &str| rope.optional_f64(key)?.ok_or_else(|| self.problem(&format!("rotary scaling lacks \"{key}\"")));
        let kind = rope.get("rope_type").or_else(|| rope.get("type"));
        match kind.and_then(Value::as_str).unwrap_or("default") {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: need("factor")? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_context: need("original_max_position_embeddings")?,
            }),
            "longrope" => rope.one_divisor_set(head_dim),
            other => Err(self.problem(&format!(
                "rotary scaling \"{other}\" is not supported (supported: default, linear, llama3); \
                 remove it from the file to use the original context length, if the model allows that"
            ))),
        }
    }

    /// `longrope` whose divisors do not depend on the length and that does not scale attention: what we write for a GGUF
    /// file that brings divisors of its own.
    fn one_divisor_set(&self, head_dim: usize) -> Result<RopeScaling, ModelError> {
        let list = |key: &str| {
            let items = self.get(key)?.as_array()?;
            items.iter().map(|v| Some(v.as_f64()? as f32)).collect::<Option<Vec<f32>>>()
        };
        let plain = self.optional_f64("attention_factor")? == Some(1.0);
        match (list("short_factor"), list("long_factor")) {
            (Some(short), Some(long)) if short == long && plain && short.len() == head_dim / 2 => {
                Ok(RopeScaling::Divisors(short))
            }
            _ => Err(self.problem(
                "rotary scaling \"longrope\" is supported only with short_factor = long_factor of head_dim / 2 numbers \
                 and attention_factor 1",
            )),
        }
    }

    /// The window of all blocks. Mistral always uses `sliding_window`; Qwen uses it when told to, from some block on.
    fn sliding_window(&self, model_type: &str, n_blocks: usize) -> Result<Option<usize>, ModelError> {
        let Some(window) = self.optional_usize("sliding_window")? else { return Ok(None) };
        if let Some(types) = self.get("layer_types").and_then(Value::as_array) {
            let sliding = types.iter().filter(|t| *t == "sliding_attention").count();
            return self.whole_model(window, sliding, types.len());
        }
        match model_type {
            "mistral" => Ok(Some(window)),
            "qwen2" | "qwen3" if self.bool("use_sliding_window")? => {
                let first = self.optional_usize("max_window_layers")?.unwrap_or(28).min(n_blocks);
                self.whole_model(window, n_blocks - first, n_blocks)
            }
            _ => Ok(None),
        }
    }

    fn whole_model(&self, window: usize, n_sliding: usize, n_blocks: usize) -> Result<Option<usize>, ModelError> {
        match n_sliding {
            0 => Ok(None),
            n if n == n_blocks => Ok(Some(window)),
            n => {
                Err(self
                    .problem(&format!("{n} of {n_blocks} blocks use a sliding window; only all or none is supported")))
            }
        }
    }
}

impl ModelConfig {
    /// The config.json of this model for Hugging Face readers; reading it gives the same configuration back.
    pub(crate) fn to_hf(&self, architecture: &Architecture, bos: Option<u32>, eos: &[u32]) -> Value {
        // llama ignores a window in its configuration, mistral is a llama that does not.
        let mistral = self.architecture == "llama" && self.sliding_window.is_some();
        let mut json = json!({
            "architectures": [if mistral { "MistralForCausalLM" } else { architecture.hf_class }],
            "model_type": if mistral { "mistral" } else { self.architecture },
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.n_blocks,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_positions,
            "hidden_act": "silu",
            "rms_norm_eps": decimal(self.rms_eps),
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied_head,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": true,
            "torch_dtype": "float32",
        });
        if let Some(scaling) = self.rope_scaling_to_hf() {
            json["rope_scaling"] = scaling;
        }
        if let Some(window) = self.sliding_window {
            json["sliding_window"] = window.into();
            json["use_sliding_window"] = true.into();
            json["max_window_layers"] = 0.into();
        }
        if let Some(bos) = bos {
            json["bos_token_id"] = bos.into();
        }
        match eos {
            [] => {}
            [one] => json["eos_token_id"] = (*one).into(),
            several => json["eos_token_id"] = several.into(),
        }
        json
    }

    fn rope_scaling_to_hf(&self) -> Option<Value> {
        Some(match &self.rope_scaling {
            RopeScaling::None => return None,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": *original_context as u64,
            }),
            RopeScaling::Divisors(divisors) => json!({
                "rope_type": "longrope",
                "short_factor": divisors,
                "long_factor": divisors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": self.max_positions,
            }),
        })
    }
}

/// The shortest decimal that means this f32, as a person would have written it (`1e-5`, not 9.999999747378752e-6).
fn decimal(x: f32) -> f64 {
    x.to_string().parse().expect("a formatted f32 parses")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &Value) -> Result<ModelConfig, String> {
        from_hf(json, Path::new("dir/config.json")).map_err(|e| e.to_string())
    }

    fn smollm() -> Value {
        json!({
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
            "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 100000, "tie_word_embeddings": true,
            "rope_scaling": null,
        })
    }

    fn with(mut json: Value, key: &str, value: Value) -> Value {
        json[key] = value;
        json
    }

    #[test]
    fn writes_what_it_reads() {
        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 8192});
        let divisors: Vec<f32> = (0..32).map(|i| 1.0 + i as f32 / 7.0).collect();
        let own =
            json!({"type": "longrope", "short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0});
        let cases = [
            smollm(),
            with(smollm(), "rope_scaling", llama3),
            with(smollm(), "rope_scaling", json!({"type": "linear", "factor": 2.0})),
            with(smollm(), "rope_scaling", own),
            with(with(smollm(), "model_type", "mistral".into()), "sliding_window", 4096.into()),
            with(with(smollm(), "model_type", "qwen3".into()), "head_dim", 128.into()),
            with(smollm(), "attention_bias", true.into()),
        ];
        for case in cases {
            let config = read(&case).unwrap();
            let architecture = Architecture::find(config.architecture, Path::new("")).unwrap();
            let written = config.to_hf(architecture, Some(1), &[2, 3]);
            assert_eq!(read(&written).unwrap(), config, "{written}");
        }
    }

    #[test]
    fn sizes_and_defaults() {
        let config = read(&smollm()).unwrap();
        assert_eq!((config.head_dim, config.n_kv_heads, config.rope_theta), (64, 3, 100_000.0));
        let config =
            read(&with(smollm(), "rope_parameters", json!({"rope_theta": 5e5, "rope_type": "default"}))).unwrap();
        assert_eq!(config.rope_theta, 100_000.0);
    }

    #[test]
    fn windows_of_qwen_need_the_switch() {
        let qwen = with(with(smollm(), "model_type", "qwen2".into()), "sliding_window", 4096.into());
        assert_eq!(read(&qwen).unwrap().sliding_window, None);
        let on = with(qwen, "use_sliding_window", true.into());
        assert!(read(&with(on.clone(), "max_window_layers", 10.into())).unwrap_err().contains("20 of 30 blocks"));
        assert_eq!(read(&with(on, "max_window_layers", 0.into())).unwrap().sliding_window, Some(4096));
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        let cases = [
            ("model_type", json!("gpt_bigcode"), "gpt_bigcode"),
            ("hidden_act", json!("gelu"), "hidden_act"),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}), "yarn"),
            ("rope_scaling", json!({"rope_type": "linear"}), "factor"),
            ("num_attention_heads", json!(7), "7 heads"),
            ("num_key_value_heads", json!(2), "2 key/value heads"),
            ("num_hidden_layers", json!(0), "number of blocks"),
            ("hidden_size", json!("576"), "hidden_size"),
            ("vocab_size", json!(null), "vocab_size"),
            ("vocab_size", json!(u64::MAX), "vocab"),
            ("head_dim", json!(63), "odd"),
            ("rms_norm_eps", json!(0.0), "epsilon"),
            ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
        ];
        for (key, value, expected) in cases {
            let message = read(&with(smollm(), key, value)).unwrap_err();
            assert!(message.contains(expected) && message.contains("config.json"), "{key}: {message}");
        }
        assert!(read(&json!([])).is_err());
    }
}
