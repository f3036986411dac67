//! Tiny models on a CUDA device against the CPU: forward, caches that are shared and cut, gradients.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may stop where it stands, and says when it is skipped"
)]

use std::ops::ControlFlow;
use std::sync::Arc;
use tailorq_cuda::CudaOptions;
use tailorq_kernels::Device;
use tailorq_model::testing::TinyModel;
use tailorq_model::{Batch, KvCache, Model};
use tailorq_quant::survey::{Loss, Needs, Survey, SurveySample};
use tailorq_tensor::{Matrix, Rng};

/// The device, unless there is none.
fn cuda() -> Option<Arc<dyn Device>> {
    match tailorq_cuda::open(0, CudaOptions::default()) {
        Ok(device) => Some(device),
        Err(error) if error.is_absence() => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn tiny(architecture: &str) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = TinyModel::new(architecture, 7).unwrap();
    tiny.config.attention_bias = architecture == "qwen2";
    tiny.write_directory(dir.path()).unwrap();
    tailorq_model::open(dir.path().to_str().unwrap()).unwrap().model
}

fn ids(rng: &mut Rng, n: usize) -> Vec<u32> {
    (0..n).map(|_| rng.below(256) as u32).collect()
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let size = expected.iter().fold(1.0f32, |m, v| m.max(v.abs()));
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= 2e-4 * size, "{what}: element {i} is {f}, expected {e}");
    }
}

const ARCHITECTURES: [&str; 3] = ["llama", "qwen2", "qwen3"];

#[test]
fn sequences_without_and_with_caches() {
    let Some(cuda) = cuda() else { return };
    let cpu = tailorq_kernels::cpu();
    for architecture in ARCHITECTURES {
        let (model, mut rng) = (tiny(architecture), Rng::new(3));
        let sequences = [ids(&mut rng, 37), ids(&mut rng, 5), ids(&mut rng, 300)];
        let batch = Batch::new(sequences.iter().map(Vec::as_slice));
        let expected = model.hidden(&*cpu, &batch, None);
        assert_close(model.hidden(&*cuda, &batch, None).data(), expected.data(), architecture);
        // In two pieces, each after what its cache holds.
        let mut caches: Vec<KvCache> = sequences.iter().map(|_| KvCache::new()).collect();
        let first = Batch::new(sequences.iter().map(|s| &s[..s.len() / 2]));
        let rest = Batch::new(sequences.iter().map(|s| &s[s.len() / 2..]));
        model.hidden(&*cuda, &first, Some(&mut caches));
        // Copies that go on differently leave the others as they are.
        let mut others = caches.clone();
        others.iter_mut().for_each(|cache| cache.truncate(1));
        let other = Batch::new(sequences.iter().map(|_| &[7u32, 8, 9][..]));
        model.hidden(&*cuda, &other, Some(&mut others));
        let found = model.hidden(&*cuda, &rest, Some(&mut caches));
        for ((span, of_rest), sequence) in batch.spans.iter().zip(&rest.spans).zip(&sequences) {
            let from = span.start + sequence.len() / 2;
            let expected = &expected.data()[from * expected.cols()..span.end * expected.cols()];
            let found = &found.data()[of_rest.start * found.cols()..of_rest.end * found.cols()];
            assert_close(found, expected, &format!("{architecture} after a cache"));
        }
    }
}

#[test]
fn steps_of_several_sequences() {
    let Some(cuda) = cuda() else { return };
    let cpu = tailorq_kernels::cpu();
    for architecture in ARCHITECTURES {
        let (model, mut rng) = (tiny(architecture), Rng::new(5));
        let prompts = [ids(&mut rng, 300), ids(&mut rng, 1), ids(&mut rng, 40)];
        let read = |device: &dyn Device| -> Vec<f32> {
            let mut caches: Vec<KvCache> = prompts.iter().map(|_| KvCache::new()).collect();
            let batch = Batch::new(prompts.iter().map(Vec::as_slice));
            model.hidden(device, &batch, Some(&mut caches));
            let mut workspace = tailorq_model::Workspace::new();
            let mut all = Vec::new();
            for step in 0..5u32 {
                let ids = [step, 10 + step, 200 - step];
                all.extend_from_slice(model.step(device, &ids, &mut caches, &mut workspace));
            }
            all
        };
        assert_close(&read(&*cuda), &read(&*cpu), architecture);
    }
}

#[test]
fn surveys_of_gradients() {
    let Some(cuda) = cuda() else { return };
    let cpu = tailorq_kernels::cpu();
    for architecture in ARCHITECTURES {
        let (model, mut rng) = (tiny(architecture), Rng::new(6));
        let sample = |n: usize, rng: &mut Rng| SurveySample { ids: ids(rng, n), scored: None };
        let samples = [sample(30, &mut rng), sample(2, &mut rng), sample(150, &mut rng)];
        let needs = Needs { absolute: true, square: true, token_energies: true, ..Needs::default() };
        let run = |device: &dyn Device| -> (f64, Vec<f32>) {
            let survey = Survey { device, model: &model, loss: Loss::CrossEntropy, needs: &needs, tape_bytes: 1 << 30 };
            let mut all = Vec::new();
            let summary = survey.run(&samples, None, &mut |stats| {
                for layer in &stats.layers {
                    let of = |m: &Option<Matrix>| m.as_ref().unwrap().data().to_vec();
                    all.extend(of(&layer.absolute).iter().map(|v| v * 100.0));
                    all.extend(of(&layer.square).iter().map(|v| v * 1e4));
                    all.extend_from_slice(&layer.token_energies);
                }
                Ok(ControlFlow::Continue(()))
            });
            (summary.unwrap().mean_loss.unwrap(), all)
        };
        let (expected_loss, expected) = run(&*cpu);
        let (loss, found) = run(&*cuda);
        assert!((loss - expected_loss).abs() < 1e-5 * expected_loss, "{architecture}: {loss}, {expected_loss}");
        assert_close(&found, &expected, architecture);
    }
}
