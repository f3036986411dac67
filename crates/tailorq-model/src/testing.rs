//! Small random models for tests and measurements, as Hugging Face directories and as GGUF files.
//!
//! Every tensor's numbers depend on seed and name alone, so a directory and a GGUF file of one [`TinyModel`] hold the
//! same model. The tokenizer is byte-level without merges: a token a byte, then the three special tokens of ChatML.

mod plain;

pub use plain::{PlainDecoder, PlainDecoders};

use crate::arch::{Architecture, Bias, EMBEDDING, FINAL_NORM, HEAD, block_name, block_norms};
use crate::config::{ModelConfig, RopeScaling};
use crate::error::ModelError;
use crate::rope::{frequencies, llama3_divisor};
use serde_json::{Value, json};
use std::path::Path;
use tailorq_format::testing::GgufBuilder;
use tailorq_format::{FormatError, SafetensorsWriter, TensorSpec};
use tailorq_tensor::{DType, Rng, Slot};

/// Tokens of the tiny tokenizer after the 256 bytes.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// ChatML without a default system message.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A random model to be written.
#[derive(Clone, Debug)]
pub struct TinyModel {
    /// Sizes and constants; all may be changed before writing.
    pub config: ModelConfig,
    /// Where the numbers come from.
    pub seed: u64,
    /// Type in which a directory's tensors are stored. GGUF files are F32.
    pub dtype: DType,
    /// Safetensors files of a directory.
    pub n_shards: usize,
}

impl TinyModel {
    /// A model of 2 blocks with a tied head, stored in F32 and in one file.
    pub fn new(architecture: &str, seed: u64) -> Result<Self, ModelError> {
        let architecture = Architecture::find(architecture, Path::new("testing"))?;
        let config = ModelConfig {
            architecture: architecture.name,
            hidden: 64,
            intermediate: 96,
            n_blocks: 2,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 16,
            vocab: 256 + SPECIAL.len(),
            max_positions: 4096,
            rms_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            sliding_window: None,
            tied_head: true,
            attention_bias: false,
            mlp_bias: false,
        };
        Ok(TinyModel { config, seed, dtype: DType::F32, n_shards: 1 })
    }

    fn architecture(&self) -> Result<&'static Architecture, ModelError> {
        Architecture::find(self.config.architecture, Path::new("testing"))
    }

    /// Checkpoint names and shapes of all tensors, in the order of the forward pass.
    pub fn tensors(&self) -> Result<Vec<(String, Vec<usize>)>, ModelError> {
        let (config, architecture) = (&self.config, self.architecture()?);
        let mut tensors = vec![(format!("{EMBEDDING}.weight"), vec![config.vocab, config.hidden])];
        for block_idx in 0..config.n_blocks {
            let mut add = |part: &str, shape: &[usize]| tensors.push((block_name(block_idx, part), shape.to_vec()));
            for part in [block_norms::ATTENTION, block_norms::MLP] {
                add(&format!("{part}.weight"), &[config.hidden]);
            }
            if architecture.qk_norm {
                for part in [block_norms::QUERY, block_norms::KEY] {
                    add(&format!("{part}.weight"), &[config.head_dim]);
                }
            }
            for linear in architecture.linears {
                let (rows, cols) = config.linear_shape(linear.slot);
                add(&format!("{}.weight", linear.checkpoint), &[rows, cols]);
                if self.has_bias(linear.bias, linear.slot) {
                    add(&format!("{}.bias", linear.checkpoint), &[rows]);
                }
            }
        }
        tensors.push((format!("{FINAL_NORM}.weight"), vec![config.hidden]));
        if !config.tied_head {
            tensors.push((format!("{HEAD}.weight"), vec![config.vocab, config.hidden]));
        }
        Ok(tensors)
    }

    fn has_bias(&self, bias: Bias, slot: Slot) -> bool {
        match (bias, slot) {
            (Bias::Never, _) => false,
            (Bias::Always, _) => true,
            (Bias::Configured, Slot::Gate | Slot::Up | Slot::Down) => self.config.mlp_bias,
            (Bias::Configured, _) => self.config.attention_bias,
        }
    }

    /// The numbers of a tensor: matrices normal with variance 1 / inputs, norms near 1, biases near 0.
    pub fn values(&self, name: &str, shape: &[usize]) -> Vec<f32> {
        // FNV-1a of the name, so that each tensor has a stream of its own.
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let mut rng = Rng::new(self.seed ^ hash);
        let (middle, spread) = match shape {
            [_, cols] => (0.0, (*cols as f32).sqrt().recip()),
            _ if name.ends_with(".bias") => (0.0, 0.2),
            _ => (1.0, 0.1),
        };
        (0..shape.iter().product()).map(|_| middle + spread * rng.normal()).collect()
    }

    /// Writes config.json, tokenizer files and weights into `dir`, which is made if need be. One tensor is in memory at a time.
    pub fn write_directory(&self, dir: &Path) -> Result<(), ModelError> {
        self.write_papers(dir)?;
        self.write_weights(dir)
    }

    /// Writes what a directory holds beside weights; `dir` is made if need be.
    pub fn write_papers(&self, dir: &Path) -> Result<(), ModelError> {
        std::fs::create_dir_all(dir).map_err(|e| FormatError::io(dir, "create", e))?;
        let architecture = self.architecture()?;
        let (end, eos) = (256, 258);
        write_json(dir, "config.json", &self.config.to_hf(architecture, Some(end), &[eos]))?;
        write_json(dir, "generation_config.json", &json!({"bos_token_id": end, "eos_token_id": [eos, end]}))?;
        write_json(dir, "tokenizer.json", &tokenizer_json())?;
        let tokenizer_config =
            json!({"bos_token": SPECIAL[0], "eos_token": {"content": SPECIAL[2]}, "chat_template": CHAT_TEMPLATE});
        write_json(dir, "tokenizer_config.json", &tokenizer_config)
    }

    fn write_weights(&self, dir: &Path) -> Result<(), ModelError> {
        let tensors = self.tensors()?;
        let per_shard = tensors.len().div_ceil(self.n_shards.max(1));
        let shards: Vec<_> = tensors.chunks(per_shard).collect();
        let mut weight_map = serde_json::Map::new();
        for (i, shard) in shards.iter().enumerate() {
            let file = match shards.len() {
                1 => "model.safetensors".to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
            };
            let specs: Vec<_> = shard.iter().map(|(name, shape)| TensorSpec::new(name, self.dtype, shape)).collect();
            let mut writer = SafetensorsWriter::create(&dir.join(&file), &specs, &[("format", "pt")])?;
            for (name, shape) in *shard {
                writer.write(name, &self.dtype.encode(&self.values(name, shape)))?;
                weight_map.insert(name.clone(), file.clone().into());
            }
            writer.commit()?;
        }
        if shards.len() > 1 {
            write_json(dir, "model.safetensors.index.json", &json!({"metadata": {}, "weight_map": weight_map}))?;
        }
        Ok(())
    }

    /// The same model as a GGUF file in F32, q and k permuted where such files have them so.
    pub fn gguf(&self) -> Result<GgufBuilder, ModelError> {
        let architecture = self.architecture()?;
        let mut file = self.gguf_metadata();
        for (name, shape) in self.tensors()? {
            let values = self.values(&name, &shape);
            let (stored, slot) = gguf_name(architecture, &name);
            let values = match slot.filter(|_| architecture.gguf_permutes_qk) {
                Some(Slot::Q | Slot::K) => permuted(&values, shape[0], self.config.head_dim),
                _ => values,
            };
            file = file.dense(&stored, DType::F32, &shape, &values);
        }
        if let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } =
            self.config.rope_scaling
        {
            let plain = frequencies(&ModelConfig { rope_scaling: RopeScaling::None, ..self.config.clone() });
            let divisor = |&f| llama3_divisor(f, factor, low_freq_factor, high_freq_factor, original_context) as f32;
            let divisors: Vec<f32> = plain.iter().map(divisor).collect();
            file = file.dense("rope_freqs.weight", DType::F32, &[divisors.len()], &divisors);
        }
        Ok(file)
    }

    fn gguf_metadata(&self) -> GgufBuilder {
        let config = &self.config;
        let key = |name: &str| format!("{}.{name}", config.architecture);
        let sizes = [
            ("block_count", config.n_blocks),
            ("context_length", config.max_positions),
            ("embedding_length", config.hidden),
            ("feed_forward_length", config.intermediate),
            ("attention.head_count", config.n_heads),
            ("attention.head_count_kv", config.n_kv_heads),
            ("attention.key_length", config.head_dim),
            ("attention.value_length", config.head_dim),
        ];
        let mut file = GgufBuilder::new().str("general.architecture", config.architecture);
        for (name, size) in sizes {
            file = file.u32(&key(name), size as u32);
        }
        let mut types = vec![1; 256];
        types.extend([3; SPECIAL.len()]);
        types.resize(config.vocab, 5);
        let mut tokens: Vec<String> = byte_tokens().into_iter().chain(SPECIAL.map(str::to_owned)).collect();
        tokens.extend((tokens.len()..config.vocab).map(|i| format!("[PAD{i}]")));
        file.f32(&key("attention.layer_norm_rms_epsilon"), config.rms_eps)
            .f32(&key("rope.freq_base"), config.rope_theta as f32)
            .str("tokenizer.ggml.model", "gpt2")
            .str("tokenizer.ggml.pre", "gpt-2")
            .strings("tokenizer.ggml.tokens", &tokens)
            .i32s("tokenizer.ggml.token_type", &types)
            .strings::<&str>("tokenizer.ggml.merges", &[])
            .u32("tokenizer.ggml.bos_token_id", 256)
            .u32("tokenizer.ggml.eos_token_id", 258)
            .str("tokenizer.chat_template", CHAT_TEMPLATE)
    }
}

fn write_json(dir: &Path, name: &str, value: &Value) -> Result<(), ModelError> {
    let path = dir.join(name);
    Ok(tailorq_format::write_atomic(&path, format!("{value:#}\n").as_bytes())?)
}

/// The character that byte-level BPE writes for each byte (GPT-2's `bytes_to_unicode`).
fn byte_tokens() -> Vec<String> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    let mut tokens = Vec::with_capacity(256);
    for byte in 0..256 {
        let code = if printable(byte) {
            byte
        } else {
            next += 1;
            next - 1
        };
        tokens.extend(char::from_u32(code).map(String::from));
    }
    tokens
}

fn tokenizer_json() -> Value {
    let vocab: serde_json::Map<String, Value> =
        byte_tokens().into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
    let added: Vec<Value> = (SPECIAL.iter().enumerate())
        .map(|(i, token)| {
            json!({"id": 256 + i, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []},
    })
}

/// Name of a checkpoint's tensor in a GGUF file, written out rather than shared with the reader so that a test of one is
/// a test of both.
fn gguf_name(architecture: &Architecture, name: &str) -> (String, Option<Slot>) {
    let Some((block_idx, part)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
        let renames = [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];
        return (renames.iter().fold(name.to_owned(), |n, (from, to)| n.replace(from, to)), None);
    };
    let linear = architecture.linears.iter().find(|l| part.starts_with(l.checkpoint));
    let part = match linear {
        Some(linear) => part.replace(linear.checkpoint, linear.gguf),
        None => part
            .replace("input_layernorm", "attn_norm")
            .replace("post_attention_layernorm", "ffn_norm")
            .replace("self_attn.q_norm", "attn_q_norm")
            .replace("self_attn.k_norm", "attn_k_norm"),
    };
    (format!("blk.{block_idx}.{part}"), linear.map(|l| l.slot))
}

/// Rows as llama.cpp's converter orders them: `[heads, 2, head_dim / 2, ...]` with the middle axes swapped.
fn permuted(values: &[f32], rows: usize, head_dim: usize) -> Vec<f32> {
    let (cols, half) = (values.len() / rows, head_dim / 2);
    let mut out = Vec::with_capacity(values.len());
    for head in 0..rows / head_dim {
        for i in 0..half {
            for part in 0..2 {
                let row = head * head_dim + part * half + i;
                out.extend_from_slice(&values[row * cols..(row + 1) * cols]);
            }
        }
    }
    out
}
