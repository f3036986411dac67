//! The finished artifact: a Hugging Face-shaped directory, written file by file, `config.json` last.

use crate::error::{PipelineError, output_error};
use crate::output::{Output, Part, TensorData, write_safetensors};
use crate::recipe::Recipe;
use crate::report::{LayerReport, Report};
use serde_json::{Value, json};
use std::path::Path;
use tailorq_format::{StoredType, TensorSpec, format_version, write_atomic};
use tailorq_model::arch::{FINAL_NORM, block_name, block_norms};
use tailorq_model::{Model, OpenedModel};
use tailorq_quant::GridKind;
use tailorq_tensor::{PackedSpec, SharedBytes};

/// Largest weight file; more becomes shards, as hub readers expect.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Writes the weight files from the finished parts (embedding, blocks in order, head if untied) and the dense vectors
/// of `model`. Returns their bytes.
pub fn write_weights(output: &Output, model: &Model, parts: &[Part]) -> Result<u64, PipelineError> {
    let mut tensors: Vec<TensorData> = Vec::new();
    for part in parts {
        let specs = part.tensors.iter().map(|t| (TensorSpec::new(t.name, t.dtype, t.shape), t.bytes));
        tensors.extend(specs);
    }
    tensors.extend(vectors(model).into_iter().map(|(name, values)| {
        (TensorSpec::new(name, StoredType::F32, &[values.len()]), SharedBytes::from_vec(values.to_vec()))
    }));
    let shards = shards(tensors);
    remove_stale(output.dir(), shards.len())?;
    let mut written = 0;
    for (idx, shard) in shards.iter().enumerate() {
        let path = output.dir().join(shard_name(idx, shards.len()));
        write_safetensors(&path, shard)?;
        written += std::fs::metadata(&path).map_err(|e| output_error(&path, &e))?.len();
    }
    if shards.len() > 1 {
        write_index(output.dir(), &shards)?;
    }
    Ok(written)
}

/// Checkpoint name and elements of every norm and bias, in file order.
pub(crate) fn vectors(model: &Model) -> Vec<(String, &[f32])> {
    let mut all: Vec<(String, &[f32])> = Vec::new();
    for (block_idx, block) in model.blocks.iter().enumerate() {
        let norm = |part: &str| block_name(block_idx, part) + ".weight";
        all.push((norm(block_norms::ATTENTION), &block.attention_norm));
        all.push((norm(block_norms::MLP), &block.mlp_norm));
        if let Some((q, k)) = &block.qk_norm {
            all.push((norm(block_norms::QUERY), q));
            all.push((norm(block_norms::KEY), k));
        }
        let biases = block.linears.iter().filter_map(|l| Some((format!("{}.bias", l.name), l.bias.as_deref()?)));
        all.extend(biases);
    }
    all.push((format!("{FINAL_NORM}.weight"), &model.norm));
    all
}

/// Elements of all norms and biases.
pub(crate) fn n_vector_elements(model: &Model) -> usize {
    vectors(model).iter().map(|(_, v)| v.len()).sum()
}

fn shards(tensors: Vec<TensorData>) -> Vec<Vec<TensorData>> {
    let mut shards: Vec<Vec<TensorData>> = vec![Vec::new()];
    let mut bytes = 0;
    for tensor in tensors {
        let size = tensor.1.len() as u64;
        if bytes + size > SHARD_BYTES && bytes > 0 {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        shards.last_mut().expect("there is always a shard").push(tensor);
    }
    shards
}

fn shard_name(idx: usize, n_shards: usize) -> String {
    if n_shards == 1 {
        "model.safetensors".into()
    } else {
        format!("model-{:05}-of-{n_shards:05}.safetensors", idx + 1)
    }
}

fn write_index(dir: &Path, shards: &[Vec<TensorData>]) -> Result<(), PipelineError> {
    let total: usize = shards.iter().flatten().map(|(_, bytes)| bytes.len()).sum();
    let map: serde_json::Map<String, Value> = shards
        .iter()
        .enumerate()
        .flat_map(|(i, s)| s.iter().map(move |t| (t.0.name.clone(), shard_name(i, shards.len()).into())))
        .collect();
    write_json(
        &dir.join("model.safetensors.index.json"),
        &json!({"metadata": {"total_size": total}, "weight_map": map}),
    )
}

/// Papers that an artifact may hold beside its weights, in the order of removal: `config.json` marks a finished artifact.
const PAPERS: [&str; 10] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "recipe.toml",
    "report.json",
    "README.md",
    "model.safetensors.index.json",
];

/// Removes what an artifact that is being replaced left: its papers, then weight files that the new one will not write.
fn remove_stale(dir: &Path, n_shards: usize) -> Result<(), PipelineError> {
    let new: Vec<String> = (0..n_shards).map(|i| shard_name(i, n_shards)).collect();
    let mut stale: Vec<_> = PAPERS.iter().map(|name| dir.join(name)).collect();
    for entry in std::fs::read_dir(dir).map_err(|e| output_error(dir, &e))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_weight_file(&name) && !new.contains(&name) {
            stale.push(entry.path());
        }
    }
    stale.iter().try_for_each(|path| remove(path))
}

/// `model.safetensors` or `model-00001-of-00002.safetensors`.
fn is_weight_file(name: &str) -> bool {
    let Some(middle) = name.strip_prefix("model").and_then(|n| n.strip_suffix(".safetensors")) else { return false };
    let number = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    let shard = middle.strip_prefix('-').and_then(|m| m.split_once("-of-"));
    middle.is_empty() || shard.is_some_and(|(idx, n)| number(idx) && number(n))
}

fn remove(path: &Path) -> Result<(), PipelineError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(output_error(path, &e)),
        _ => Ok(()),
    }
}

/// Takes back the mark of a finished artifact.
pub fn retract(output: &Output) -> Result<(), PipelineError> {
    remove(&output.dir().join(PAPERS[0]))
}

/// Writes everything beside the weights; `config.json`, the mark of a finished artifact, comes last.
pub fn write_papers(output: &Output, opened: &OpenedModel, report: &Report) -> Result<(), PipelineError> {
    let dir = output.dir();
    let tokenizer = dir.join("tokenizer.json");
    match &opened.files.tokenizer_json {
        Some(file) => write_atomic(&tokenizer, &std::fs::read(file).map_err(|e| output_error(file, &e))?)?,
        None => write_atomic(&tokenizer, opened.tokenizer.to_json()?.as_bytes())?,
    }
    for (name, value) in [
        ("tokenizer_config.json", &opened.files.tokenizer_config_json),
        ("generation_config.json", &opened.files.generation_config_json),
    ] {
        if !value.is_null() {
            write_json(&dir.join(name), value)?;
        }
    }
    for file in &opened.files.extra_files {
        let name = file.file_name().unwrap_or_default();
        let bytes = std::fs::read(file).map_err(|e| output_error(file, &e))?;
        write_atomic(&dir.join(name), &bytes)?;
    }
    write_atomic(&dir.join("recipe.toml"), report.recipe.to_toml().as_bytes())?;
    write_json(&dir.join("report.json"), &serde_json::to_value(report).expect("a report is plain data"))?;
    write_atomic(&dir.join("README.md"), model_card(opened, report).as_bytes())?;
    write_json(&dir.join("config.json"), &config(opened, &report.layers))
}

fn config(opened: &OpenedModel, layers: &[LayerReport]) -> Value {
    let mut config = opened.files.config_json.clone();
    // Linears at 16 bits are tensors like those of any checkpoint; what is not named is read as such.
    let named: Vec<(&str, PackedSpec)> = layers.iter().filter_map(|l| Some((l.name.as_str(), l.spec()?))).collect();
    let specs: Vec<PackedSpec> = named.iter().map(|(_, spec)| *spec).collect();
    let layers: serde_json::Map<String, Value> = named
        .iter()
        .map(|(name, spec)| ((*name).to_owned(), serde_json::to_value(spec).expect("a spec is plain data")))
        .collect();
    config["quantization_config"] =
        json!({"quant_method": "tailorq", "format_version": format_version(&specs), "layers": layers});
    config
}

fn write_json(path: &Path, value: &Value) -> Result<(), PipelineError> {
    let mut text = serde_json::to_string_pretty(value).expect("a JSON value prints");
    text.push('\n');
    Ok(write_atomic(path, text.as_bytes())?)
}

fn model_card(opened: &OpenedModel, report: &Report) -> String {
    let Recipe { model, quantize: q, calibration, allocation, plan, .. } = &report.recipe;
    let base = Path::new(&model.source).file_name().map_or(model.source.clone(), |n| n.to_string_lossy().into_owned());
    let size = &report.size;
    let calibrated = match (&report.calibration, calibration) {
        (Some(used), Some(input)) => format!(
            "Calibrated on {} items ({} tokens, {}) of `{}`, seed {}.",
            used.used,
            used.tokens,
            used.shape,
            input.file.file_name().unwrap_or_default().to_string_lossy(),
            input.seed
        ),
        _ => "No calibration data.".into(),
    };
    let counted = size.counted_bits_per_weight.map_or(String::new(), |bits| {
        format!("| the same in the method's own format, which is not the file's | {bits:.3} |\n")
    });
    let already = if opened.files.is_quantized {
        "\nThe source was itself a quantized file; its errors are part of this model.\n"
    } else {
        ""
    };
    let stores_half = tailorq_quant::find(&q.method).is_some_and(|m| m.stores_half());
    let (bits, what) = match size.counted_bits_per_weight.filter(|_| stores_half) {
        Some(bits) => (format!("{bits:.2}"), format!("{bits:.2} bits in its own format, its values stored at 16 bits")),
        None if stores_half => ("16".into(), "16 bits".into()),
        None => {
            let sym = match (q.grid, q.symmetric) {
                (GridKind::Codebook, _) => "codebook",
                (_, true) => "symmetric",
                (_, false) => "asymmetric",
            };
            let bits = match (allocation, plan) {
                (None, None) => q.bits.count().to_string(),
                _ => format!("{:.2}", size.linear_bits_per_weight),
            };
            let rotated = if q.transform.is_some() { ", inputs rotated" } else { "" };
            (bits.clone(), format!("{bits} bits, group {}, {sym}{rotated}", q.group))
        }
    };
    let (model_type, mib) = (opened.model.config.architecture, 1024.0 * 1024.0);
    format!(
        "---\nbase_model: {base}\nbase_model_relation: quantized\nlibrary_name: tailorq\npipeline_tag: text-generation\n\
         quantized_by: tailorq {version}\ntags:\n- tailorq\n- {method}\n---\n\n# {base}, {method} at {bits} bits\n\n\
         A {model_type} model whose linears were quantized with tailorq {version}: {method}, {what}.\n\
         {calibrated}\n{already}\n| | |\n|---|---|\n| bits per weight, linears (scales, zeros, corrections included) | {lin:.3} |\n{counted}\
         | bits per weight, all | {all:.3} |\n| weight files | {a:.1} MiB |\n| source weight files | {s:.1} MiB |\n\
         | the same weights at 16 bit | {h:.1} MiB |\n\n`recipe.toml` repeats the run, `report.json` lists every layer. \
         Run it with `tailorq run DIR \"prompt\"`.\n",
        version = report.tailorq,
        method = q.method,
        lin = size.linear_bits_per_weight,
        all = size.total_bits_per_weight,
        a = size.artifact_bytes as f64 / mib,
        s = size.source_bytes as f64 / mib,
        h = size.half_precision_bytes as f64 / mib,
    )
}
