//! Gradients against finite differences on small random models, and against an independent implementation on real ones
//! (`TAILORQ_TEST_MODELS` and `TAILORQ_TEST_GOLDEN`; the larger model with `TAILORQ_TEST_FULL=1` only).
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use tailorq_format::SafetensorsFile;
use tailorq_kernels::{Device, GradientSums};
use tailorq_model::testing::TinyModel;
use tailorq_model::{Batch, BlockStage, Model, RopeScaling, Target, next_token_targets};
use tailorq_tensor::{LayerId, Matrix, Rng, Slot, Weight};

/// A batch with its targets.
struct Data {
    batch: Batch,
    targets: Vec<Target>,
}

fn data() -> Data {
    let mut rng = Rng::new(3);
    let samples: Vec<Vec<u32>> = [7, 1, 12].iter().map(|&n| (0..n).map(|_| rng.below(256) as u32).collect()).collect();
    let batch = Batch::new(samples.iter().map(Vec::as_slice));
    let mask: Vec<bool> = (0..12).map(|t| t % 3 == 0 || t > 8).collect();
    let scored = [None, None, Some(mask.as_slice())];
    let parts = samples.iter().zip(&batch.spans).zip(scored);
    let targets = parts.flat_map(|((ids, span), scored)| next_token_targets(ids, scored, span.start)).collect();
    Data { batch, targets }
}

fn residual(model: &Model, device: &dyn Device, batch: &Batch) -> Matrix {
    let mut residual = model.embed(device, &batch.ids);
    model.blocks.iter().for_each(|block| model.forward_block(device, block, &batch.spans, &mut residual));
    residual
}

/// The weighted loss, without any gradient: by cross-entropy, or by the divergence from a reference.
fn loss(model: &Model, reference: Option<&Model>, device: &dyn Device, data: &Data) -> f64 {
    let log_probabilities = |model: &Model| -> Vec<Vec<f64>> {
        let logits = model.logits(device, &model.hidden(device, &data.batch, None));
        let of = |t: &Target| {
            let row = logits.row(t.row);
            let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            row.iter().map(|&x| f64::from(x) - sum.ln()).collect()
        };
        data.targets.iter().map(of).collect()
    };
    let found = log_probabilities(model);
    let expected = reference.map(log_probabilities);
    let one = |(i, t): (usize, &Target)| {
        let loss = match &expected {
            None => -found[i][t.token as usize],
            Some(p) => p[i].iter().zip(&found[i]).map(|(p, q)| p.exp() * (p - q)).sum(),
        };
        f64::from(t.weight) * loss
    };
    data.targets.iter().enumerate().map(one).sum()
}

/// Loss and gradient of every linear by the backward pass.
fn gradients(
    model: &Model,
    reference: Option<&Model>,
    device: &dyn Device,
    data: &Data,
) -> (f64, BTreeMap<LayerId, Matrix>) {
    let spans = &data.batch.spans;
    let mut inputs = vec![model.embed(device, &data.batch.ids)];
    for block in &model.blocks {
        let mut next = inputs[inputs.len() - 1].clone();
        model.forward_block(device, block, spans, &mut next);
        inputs.push(next);
    }
    let last = inputs.pop().unwrap();
    let result = match reference {
        None => model.cross_entropy_backward(device, &last, &data.targets),
        Some(r) => model.divergence_backward(device, &last, (r, &residual(r, device, &data.batch)), &data.targets),
    };
    let mut gradient = result.gradient;
    let mut all = BTreeMap::new();
    for (block_idx, block) in model.blocks.iter().enumerate().rev() {
        let stage = BlockStage { model, block, device };
        stage.backward(&inputs[block_idx], spans, &mut gradient, &mut |tap| {
            for (slot, dy) in tap.gradients {
                let mut sum = Matrix::zeros(dy.cols(), tap.input.cols());
                let sums = GradientSums { sum: Some(&mut sum), ..GradientSums::default() };
                device.weight_gradients(dy.data(), tap.input.data(), std::slice::from_ref(&(0..dy.rows())), sums);
                all.insert(LayerId { block_idx, slot: *slot }, sum);
            }
        });
    }
    let losses = data.targets.iter().zip(result.losses);
    (losses.map(|(t, loss)| f64::from(t.weight) * loss).sum(), all)
}

fn open(tiny: &TinyModel) -> Model {
    let dir = tempfile::tempdir().unwrap();
    tiny.write_directory(dir.path()).unwrap();
    tailorq_model::open(dir.path().to_str().unwrap()).unwrap().model
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// Moves a layer's weights by `step` times a direction.
fn moved(model: &Model, id: LayerId, direction: &[f64], step: f64) -> Model {
    let mut model = model.clone();
    let weight = &mut model.blocks[id.block_idx].linear_mut(id.slot).weight;
    let mut matrix = weight.to_matrix();
    matrix.data_mut().iter_mut().zip(direction).for_each(|(w, d)| *w = (f64::from(*w) + step * d) as f32);
    *weight = Weight::from(matrix);
    model
}

/// Central differences along the gradient, along a random direction and along the axis of the largest element.
fn check(model: &Model, reference: Option<&Model>, what: &str) {
    let (device, data) = (tailorq_kernels::cpu(), data());
    let (value, all) = gradients(model, reference, &*device, &data);
    assert!((value - loss(model, reference, &*device, &data)).abs() < 1e-5, "{what}: loss {value}");
    assert_eq!(all.len(), model.blocks.len() * Slot::ALL.len());
    let mut rng = Rng::new(5);
    for (id, gradient) in all {
        let size = norm(gradient.data());
        let along: Vec<f64> = gradient.data().iter().map(|&g| f64::from(g) / size).collect();
        let random: Vec<f64> =
            (along.iter()).map(|a| a + f64::from(rng.normal()) / (along.len() as f64).sqrt()).collect();
        let largest = (0..along.len()).max_by(|&a, &b| along[a].abs().total_cmp(&along[b].abs())).unwrap();
        let axis: Vec<f64> = (0..along.len()).map(|i| f64::from(u8::from(i == largest))).collect();
        for (name, direction) in [("gradient", along), ("random", random), ("axis", axis)] {
            let expected: f64 = gradient.data().iter().zip(&direction).map(|(&g, d)| f64::from(g) * d).sum();
            let step = 0.01;
            let at = |step| loss(&moved(model, id, &direction, step), reference, &*device, &data);
            // Four points: the error is of the fourth order in the step.
            let near = (at(step) - at(-step)) / (2.0 * step);
            let far = (at(2.0 * step) - at(-2.0 * step)) / (4.0 * step);
            let found = (4.0 * near - far) / 3.0;
            let tolerance = 1e-3 * expected.abs() + 3e-4 * size + 3e-5;
            assert!((found - expected).abs() < tolerance, "{what} {id} {name}: {found} by differences, {expected}");
        }
    }
}

#[test]
fn finite_differences_for_every_architecture() {
    for architecture in ["llama", "qwen2", "qwen3"] {
        let mut tiny = TinyModel::new(architecture, 11).unwrap();
        check(&open(&tiny), None, architecture);
        tiny.config.tied_head = false;
        tiny.config.sliding_window = Some(4);
        (tiny.config.attention_bias, tiny.config.mlp_bias) = (architecture == "llama", architecture == "llama");
        tiny.config.rope_scaling = RopeScaling::Linear { factor: 2.0 };
        check(&open(&tiny), None, &format!("{architecture} with options"));
    }
}

#[test]
fn finite_differences_of_the_divergence() {
    let [model, reference] = [11, 12].map(|seed| open(&TinyModel::new("qwen3", seed).unwrap()));
    check(&model, Some(&reference), "divergence");
    let (device, data) = (tailorq_kernels::cpu(), data());
    let (value, all) = gradients(&model, Some(&model), &*device, &data);
    assert!(value.abs() < 1e-6 && all.values().all(|g| norm(g.data()) < 1e-4), "a model does not differ from itself");
}

#[test]
fn stored_weights_have_the_gradients_of_dense_ones_and_threads_do_not_matter() {
    let mut tiny = TinyModel::new("llama", 4).unwrap();
    tiny.dtype = tailorq_tensor::DType::BF16;
    let stored = open(&tiny);
    let mut dense = stored.clone();
    dense.head = dense.head.to_matrix().into();
    for linear in dense.blocks.iter_mut().flat_map(|b| &mut b.linears) {
        linear.weight = linear.weight.to_matrix().into();
    }
    let (device, data) = (tailorq_kernels::cpu(), data());
    let run = |model: &Model, threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| gradients(model, None, &*device, &data))
    };
    let expected = run(&dense, 1);
    for threads in [1, 2, 3] {
        assert!(run(&stored, threads) == expected, "{threads} threads");
    }
}

/// Compares every norm and the stored rows with the reference.
fn check_golden(name: &str, file: &str) {
    let directory = |variable: &str| {
        let value = std::env::var(variable).ok().filter(|v| !v.is_empty());
        if value.is_none() {
            println!("skipped: {variable} is not set");
        }
        value.map(PathBuf::from)
    };
    let (Some(models), Some(golden)) = (directory("TAILORQ_TEST_MODELS"), directory("TAILORQ_TEST_GOLDEN")) else {
        return;
    };
    let model = tailorq_model::open(models.join(file).to_str().unwrap()).unwrap().model;
    let numbers: Value = serde_json::from_slice(&std::fs::read(golden.join(format!("{name}.json"))).unwrap()).unwrap();
    let forward = SafetensorsFile::open(golden.join(format!("{name}-forward.safetensors"))).unwrap();
    let bytes = forward.get("tokens").unwrap().bytes;
    let ids: Vec<u32> = bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    let data = Data { batch: Batch::new([ids.as_slice()]), targets: next_token_targets(&ids, None, 0) };
    let (value, all) = gradients(&model, None, &*tailorq_kernels::cpu(), &data);
    let expected = numbers["mean_cross_entropy"].as_f64().unwrap();
    println!("{name}: mean cross-entropy {value:.7}, reference {expected:.7}");
    assert!((value - expected).abs() < 1e-4);
    let rows = SafetensorsFile::open(golden.join(format!("{name}-gradients.safetensors"))).unwrap();
    let (mut worst_norm, mut worst_rows, mut compared) = (0.0f64, 0.0f64, 0);
    for (id, gradient) in &all {
        let tensor = format!("{}.weight", model.architecture.linear_name(id.block_idx, id.slot));
        let expected = numbers["gradient_frobenius"][&tensor].as_f64().unwrap();
        let error = (norm(gradient.data()) / expected - 1.0).abs();
        assert!(error < 1e-3, "{tensor}: norm off by {error:e}");
        worst_norm = worst_norm.max(error);
        if let Some(view) = rows.get(&format!("grad.{tensor}")) {
            let expected = Weight::Stored(Arc::new(view.dense_rows().unwrap())).to_matrix();
            let found = &gradient.data()[..expected.data().len()];
            let difference: Vec<f32> = found.iter().zip(expected.data()).map(|(a, b)| a - b).collect();
            let error = norm(&difference) / norm(expected.data());
            assert!(error < 1e-3, "{tensor}: first rows off by {error:e}");
            worst_rows = worst_rows.max(error);
            compared += 1;
        }
    }
    println!(
        "{name}: norms of {} linears within {worst_norm:.1e}, rows of {compared} within {worst_rows:.1e}",
        all.len()
    );
    assert!(compared > 0);
}

#[test]
fn smollm2_gradients() {
    check_golden("smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf");
}

#[test]
fn qwen_gradients() {
    if std::env::var("TAILORQ_TEST_FULL").is_err() {
        println!("skipped: TAILORQ_TEST_FULL is not set");
        return;
    }
    check_golden("qwen2.5-coder-0.5b", "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf");
}
