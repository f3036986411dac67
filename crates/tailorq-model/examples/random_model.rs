//! Writes a Hugging Face directory of random weights, to measure how memory and time grow with the size of a model:
//!
//! - `random_model DIR BLOCKS [HIDDEN]`: a model of small blocks.
//! - `random_model DIR llama-2-7b [BLOCKS]`: one of the shapes of Llama 2 7B, in bf16, a shard for each block or two, written on
//!   all threads; and beside it `DIR/calibration.jsonl`, 128 items of more than 2048 tokens.
//!
//! `cargo run --release -p tailorq-model --example random_model -- ARGUMENTS`. A token is a byte of text.

use rayon::prelude::*;
use serde_json::json;
use std::error::Error;
use std::fmt::Write;
use std::path::Path;
use tailorq_format::{SafetensorsWriter, TensorSpec};
use tailorq_model::testing::TinyModel;
use tailorq_tensor::{DType, Rng};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Random numbers that are used again and again: a prime, so that no two rows of a matrix are the same.
const N_NUMBERS: usize = 16_777_213;

/// The standard deviation of a matrix's elements.
const SPREAD: f32 = 0.02;

/// Items of the calibration file, and the letters of an item's parts.
const N_ITEMS: usize = 128;
const PROMPT_LETTERS: usize = 1400;
const COMPLETION_LETTERS: usize = 900;

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, what, rest @ ..] = &args[..] else {
        return Err("usage: random_model DIR BLOCKS [HIDDEN] | random_model DIR llama-2-7b [BLOCKS]".into());
    };
    let dir = Path::new(dir);
    if what == "llama-2-7b" {
        let n_blocks = rest.first().map_or(Ok(32), |n| n.parse())?;
        write_llama(dir, n_blocks)
    } else {
        small(what.parse()?, rest.first().map_or(Ok(512), |h| h.parse())?)?.write_directory(dir)?;
        Ok(())
    }
}

fn small(n_blocks: usize, hidden: usize) -> Outcome<TinyModel> {
    let mut model = TinyModel::new("llama", 1)?;
    model.dtype = DType::BF16;
    model.config.n_blocks = n_blocks;
    model.config.hidden = hidden;
    model.config.intermediate = 4 * hidden;
    model.config.head_dim = 64;
    model.config.n_heads = hidden / 64;
    model.config.n_kv_heads = hidden / 64;
    Ok(model)
}

fn write_llama(dir: &Path, n_blocks: usize) -> Outcome<()> {
    let mut model = TinyModel::new("llama", 1)?;
    model.config.n_blocks = n_blocks;
    (model.config.hidden, model.config.intermediate) = (4096, 11008);
    (model.config.n_heads, model.config.n_kv_heads, model.config.head_dim) = (32, 32, 128);
    (model.config.vocab, model.config.tied_head) = (32000, false);
    model.write_papers(dir)?;
    std::fs::write(dir.join("calibration.jsonl"), calibration()?)?;

    let piece = N_NUMBERS.div_ceil(64);
    let numbers: Vec<u8> = (0..64usize)
        .into_par_iter()
        .flat_map_iter(|i| {
            let mut rng = Rng::new(i as u64);
            let n = piece.min(N_NUMBERS - (i * piece).min(N_NUMBERS));
            DType::BF16.encode(&(0..n).map(|_| SPREAD * rng.normal()).collect::<Vec<f32>>())
        })
        .collect();
    let tensors = model.tensors()?;
    let shards: Vec<_> = tensors.chunks(tensors.len().div_ceil(n_blocks.max(1))).collect();
    let name = |i: usize| format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
    shards.par_iter().enumerate().try_for_each(|(i, shard)| write_shard(&dir.join(name(i)), shard, &numbers))?;
    let places = shards.iter().enumerate().flat_map(|(i, shard)| shard.iter().map(move |(tensor, _)| (tensor, i)));
    let weight_map: serde_json::Map<_, _> = places.map(|(tensor, i)| (tensor.clone(), name(i).into())).collect();
    let index = json!({"metadata": {}, "weight_map": weight_map});
    Ok(std::fs::write(dir.join("model.safetensors.index.json"), index.to_string())?)
}

/// Matrices from the random numbers, each from another place of them on; norms are ones.
fn write_shard(path: &Path, tensors: &[(String, Vec<usize>)], numbers: &[u8]) -> Outcome<()> {
    let specs: Vec<_> = tensors.iter().map(|(name, shape)| TensorSpec::new(name, DType::BF16, shape)).collect();
    let mut writer = SafetensorsWriter::create(path, &specs, &[])?;
    for (name, shape) in tensors {
        let bytes = 2 * shape.iter().product::<usize>();
        if shape.len() == 1 {
            writer.write(name, &DType::BF16.encode(&vec![1.0; shape[0]]))?;
            continue;
        }
        let start = name.bytes().fold(0usize, |h, b| h.wrapping_mul(31).wrapping_add(b.into())) % N_NUMBERS * 2;
        let (mut at, mut left) = (start, bytes);
        while left > 0 {
            let n = left.min(numbers.len() - at);
            writer.write(name, &numbers[at..at + n])?;
            (at, left) = (0, left - n);
        }
    }
    Ok(writer.commit()?)
}

fn calibration() -> Outcome<String> {
    let mut rng = Rng::new(7);
    let mut words = |n: usize| -> String {
        let letter = |_| if rng.below(6) == 0 { ' ' } else { char::from(b'a' + rng.below(26) as u8) };
        (0..n).map(letter).collect()
    };
    let mut lines = String::new();
    for _ in 0..N_ITEMS {
        let item = json!({"prompt": words(PROMPT_LETTERS), "completion": words(COMPLETION_LETTERS)});
        writeln!(lines, "{item}")?;
    }
    Ok(lines)
}
