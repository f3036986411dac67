//! The passes of the TAQ family over a small model, against calculations without batches, tapes or prefixes.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::io;
use std::ops::ControlFlow;
use tailorq_kernels::Device;
use tailorq_model::testing::TinyModel;
use tailorq_model::{Batch, Model, Spill};
use tailorq_quant::QuantError;
use tailorq_quant::signals::{
    Sampling, add_uniform_noise, divergence, matrix_entropy, noise_rng, normalize_rows, range,
};
use tailorq_quant::survey::{BlockNoise, BlockStability, Judged, NoiseSurvey, StabilitySurvey, SurveySample};
use tailorq_tensor::{Matrix, Rng};

fn model(architecture: &str, n_blocks: usize) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = TinyModel::new(architecture, 6).unwrap();
    tiny.config.n_blocks = n_blocks;
    tiny.write_directory(dir.path()).unwrap();
    tailorq_model::open(dir.path().to_str().unwrap()).unwrap().model
}

fn prompts(lengths: &[usize]) -> Vec<Vec<u32>> {
    let mut rng = Rng::new(8);
    lengths.iter().map(|&n| (0..n).map(|_| rng.below(256) as u32).collect()).collect()
}

fn samples(lengths: &[usize]) -> Vec<SurveySample> {
    prompts(lengths).into_iter().map(|ids| SurveySample { ids, scored: None }).collect()
}

fn go_on(_: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[derive(Default)]
struct Heap(HashMap<usize, Vec<f32>>);

impl Spill for Heap {
    fn put(&mut self, key: usize, values: &[f32]) -> io::Result<()> {
        self.0.insert(key, values.to_vec());
        Ok(())
    }
    fn get(&mut self, key: usize, values: &mut [f32]) -> io::Result<()> {
        values.copy_from_slice(&self.0[&key]);
        Ok(())
    }
}

/// The stream of one prompt behind a block, changed there by `disturb`, and then behind the last block.
fn streams(
    device: &dyn Device,
    model: &Model,
    ids: &[u32],
    at: usize,
    disturb: &mut dyn FnMut(&mut Matrix),
) -> [Matrix; 2] {
    let batch = Batch::new([ids]);
    let mut residual = model.embed(device, ids);
    let mut found = None;
    for (block_idx, block) in model.blocks.iter().enumerate() {
        model.forward_block(device, block, &batch.spans, &mut residual);
        if block_idx == at {
            found = Some(residual.clone());
            disturb(&mut residual);
        }
    }
    [found.unwrap(), residual]
}

fn output(device: &dyn Device, model: &Model, ids: &[u32], block_idx: usize) -> Matrix {
    let [output, _] = streams(device, model, ids, block_idx, &mut |_| ());
    output
}

fn stability(model: &Model, sampling: Sampling, normalize: bool, prompts: &[Vec<u32>]) -> Vec<BlockStability> {
    let device = tailorq_kernels::cpu();
    let survey = StabilitySurvey { device: device.as_ref(), model, sampling, normalize, tape_bytes: 1 << 30 };
    survey.run(prompts, None, &mut go_on).unwrap()
}

#[test]
fn information_and_variance_are_those_of_the_outputs() {
    let (device, lengths) = (tailorq_kernels::cpu(), [9, 0, 14, 1, 30]);
    for architecture in ["llama", "qwen3"] {
        let (model, prompts) = (model(architecture, 3), prompts(&lengths));
        for (without_first, normalize) in [(false, false), (true, false), (true, true)] {
            // A reservoir larger than all tokens holds each of them.
            let sampling = Sampling { size: 1000, without_first, ..Sampling::default() };
            let found = stability(&model, sampling, normalize, &prompts);
            assert_eq!(found.len(), 3);
            for (block_idx, found) in found.iter().enumerate() {
                let rows: Vec<Vec<f32>> = (prompts.iter().filter(|p| !p.is_empty()))
                    .flat_map(|ids| {
                        let output = output(device.as_ref(), &model, ids, block_idx);
                        let first = usize::from(without_first);
                        (first..ids.len()).map(move |t| output.row(t).to_vec()).collect::<Vec<_>>()
                    })
                    .collect();
                let all: Vec<f64> = rows.iter().flatten().map(|&x| f64::from(x)).collect();
                let mean = all.iter().sum::<f64>() / all.len() as f64;
                let variance = all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / all.len() as f64;
                assert!((found.variance / variance - 1.0).abs() < 1e-4);
                let mut matrix = Matrix::from_vec(rows.len(), 64, rows.concat());
                if normalize {
                    normalize_rows(&mut matrix);
                }
                let entropy = matrix_entropy(&matrix).unwrap();
                assert!((found.information - entropy).abs() < 1e-3, "{} {entropy}", found.information);
            }
        }
    }
}

#[test]
fn a_sample_is_smaller_than_all_and_says_less() {
    let (model, prompts) = (model("qwen2", 2), prompts(&[40; 20]));
    let all =
        stability(&model, Sampling { size: 1000, candidates_per_batch: 1000, ..Sampling::default() }, false, &prompts);
    let few = stability(&model, Sampling { size: 12, ..Sampling::default() }, false, &prompts);
    for (all, few) in all.iter().zip(&few) {
        assert_eq!(all.variance, few.variance);
        assert!(few.information <= 11f64.ln() + 1e-9 && all.information > 12f64.ln());
    }
}

#[test]
fn neither_spilling_nor_threads_change_a_bit() {
    let (model, lengths) = (model("qwen3", 3), [1500, 700, 30]);
    let (prompts, samples) = (prompts(&lengths), samples(&lengths));
    let device = tailorq_kernels::cpu();
    let device = device.as_ref();
    let run = |tape_bytes: usize, heap: &mut Heap| -> (Vec<BlockStability>, Vec<BlockNoise>) {
        let sampling = Sampling::default();
        let stability = StabilitySurvey { device, model: &model, sampling, normalize: false, tape_bytes };
        let judged = Judged::LastToken;
        let noise = NoiseSurvey { device, model: &model, bits: 4, seed: 1, judged, tape_bytes };
        let first = stability.run(&prompts, Some(&mut *heap), &mut go_on).unwrap();
        (first, noise.run(&samples, Some(heap), &mut go_on).unwrap())
    };
    let expected = run(1 << 30, &mut Heap::default());
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut heap = Heap::default();
        assert!(pool.install(|| run(400_000, &mut heap)) == expected, "{threads} threads");
        assert!(!heap.0.is_empty());
    }
    let tight =
        StabilitySurvey { device, model: &model, sampling: Sampling::default(), normalize: false, tape_bytes: 9 };
    assert!(matches!(tight.run(&prompts, None, &mut go_on), Err(QuantError::Tape(_))));
}

fn noise(model: &Model, judged: Judged, bits: u32, samples: &[SurveySample]) -> Vec<BlockNoise> {
    let device = tailorq_kernels::cpu();
    let survey = NoiseSurvey { device: device.as_ref(), model, bits, seed: 5, judged, tape_bytes: 1 << 30 };
    survey.run(samples, None, &mut go_on).unwrap()
}

/// Every sample alone, from the embedding on, for each block.
fn direct(model: &Model, samples: &[SurveySample], judged: &dyn Fn(&SurveySample) -> Vec<usize>) -> Vec<(f64, f64)> {
    let device = tailorq_kernels::cpu();
    let device = device.as_ref();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let logits = |stream: &Matrix| model.logits(device, &model.final_norm(device, stream));
    let of_block = |block_idx: usize| {
        let of_sample = |s: &SurveySample| {
            let last = judged(s).into_iter().max().unwrap();
            range(output(device, model, &s.ids, block_idx).row(last))
        };
        let range = mean(&samples.iter().map(of_sample).collect::<Vec<_>>());
        let of_sample = |(i, s): (usize, &SurveySample)| {
            let [_, clean] = streams(device, model, &s.ids, block_idx, &mut |_| ());
            let step = tailorq_quant::signals::NoiseStep::of(range, 4);
            let mut disturb = |m: &mut Matrix| add_uniform_noise(&mut noise_rng(5, block_idx, i), step, m.data_mut());
            let [_, noisy] = streams(device, model, &s.ids, block_idx, &mut disturb);
            let (clean, noisy) = (logits(&clean), logits(&noisy));
            mean(&judged(s).into_iter().map(|t| divergence(clean.row(t), noisy.row(t))).collect::<Vec<_>>())
        };
        (range, mean(&samples.iter().enumerate().map(of_sample).collect::<Vec<_>>()))
    };
    (0..model.blocks.len()).map(of_block).collect()
}

fn assert_close(found: &[BlockNoise], expected: &[(f64, f64)]) {
    assert_eq!(found.len(), expected.len());
    for (found, (range, divergence)) in found.iter().zip(expected) {
        assert!((found.range / range - 1.0).abs() < 1e-4, "{found:?} {range}");
        assert!((found.step.0 / (range / 15.0) - 1.0).abs() < 1e-4);
        assert!((found.divergence / divergence - 1.0).abs() < 1e-2 && *divergence > 0.0, "{found:?} {divergence}");
    }
}

#[test]
fn noise_runs_equal_whole_runs() {
    for architecture in ["llama", "qwen3"] {
        // More than one micro-batch, so that samples keep their noise across them.
        let (model, all) = (model(architecture, 3), samples(&[9, 14, 1, 1200, 900]));
        let last = |s: &SurveySample| vec![s.ids.len() - 1];
        assert_close(&noise(&model, Judged::LastToken, 4, &all), &direct(&model, &all, &last));
    }
}

#[test]
fn scored_tokens_are_judged_where_they_are_predicted() {
    let (model, mut all) = (model("qwen2", 2), samples(&[90, 14, 1, 20]));
    all[0].scored = Some((0..90).map(|t| t >= 15).collect());
    all[1].scored = Some((0..14).map(|t| t == 13).collect());
    all[3].scored = Some(vec![false; 20]);
    let judged = |s: &SurveySample| {
        let scored = s.scored.clone().unwrap();
        (1..s.ids.len()).filter(|&t| scored[t]).map(|t| t - 1).collect()
    };
    assert_close(&noise(&model, Judged::Scored, 4, &all), &direct(&model, &all[..2], &judged));
}

#[test]
fn finer_grids_disturb_less() {
    let (model, all) = (model("llama", 3), samples(&[20, 30]));
    let sizes: Vec<f64> =
        [2, 4, 8].map(|bits| noise(&model, Judged::LastToken, bits, &all).iter().map(|b| b.divergence).sum()).to_vec();
    assert!(sizes[0] > 4.0 * sizes[1] && sizes[1] > 50.0 * sizes[2], "{sizes:?}");
}

#[test]
fn bad_input_is_refused_and_the_caller_may_stop() {
    let (model, device) = (model("llama", 2), tailorq_kernels::cpu());
    let device = device.as_ref();
    let sampling = Sampling::default();
    let stability = StabilitySurvey { device, model: &model, sampling, normalize: false, tape_bytes: 1 << 30 };
    let noise = NoiseSurvey { device, model: &model, bits: 4, seed: 0, judged: Judged::LastToken, tape_bytes: 1 << 30 };
    let mut stop = |_| ControlFlow::Break(());
    assert!(matches!(stability.run(&prompts(&[9]), None, &mut stop), Err(QuantError::Interrupted)));
    assert!(matches!(noise.run(&samples(&[9]), None, &mut stop), Err(QuantError::Interrupted)));
    assert!(matches!(stability.run(&[vec![]], None, &mut go_on), Err(QuantError::NoCalibration)));
    assert!(matches!(noise.run(&samples(&[0]), None, &mut go_on), Err(QuantError::NoCalibration)));
    let inner = StabilitySurvey { sampling: Sampling { without_first: true, ..sampling }, ..stability };
    assert!(matches!(inner.run(&prompts(&[1, 1]), None, &mut go_on), Err(QuantError::NoCalibration)));
    let error = stability.run(&[vec![7, 9999]], None, &mut go_on).unwrap_err().to_string();
    assert!(error.contains("token 9999"), "{error}");
    let zero = NoiseSurvey { bits: 0, ..noise };
    assert!(matches!(zero.run(&samples(&[9]), None, &mut go_on), Err(QuantError::Settings(_))));
}

#[test]
fn overflowing_outputs_name_the_block() {
    let (mut model, device) = (model("llama", 2), tailorq_kernels::cpu());
    let mut down = model.blocks[1].linear(tailorq_tensor::Slot::Down).weight.to_matrix();
    down.data_mut().fill(f32::MAX);
    model.blocks[1].linear_mut(tailorq_tensor::Slot::Down).weight = tailorq_tensor::Weight::from(down);
    let device = device.as_ref();
    let survey =
        StabilitySurvey { device, model: &model, sampling: Sampling::default(), normalize: false, tape_bytes: 1 << 30 };
    let error = survey.run(&prompts(&[9]), None, &mut go_on).unwrap_err().to_string();
    assert!(error.contains("block 1"), "{error}");
    let noise = NoiseSurvey { device, model: &model, bits: 4, seed: 0, judged: Judged::Scored, tape_bytes: 1 << 30 };
    let error = noise.run(&samples(&[9]), None, &mut go_on).unwrap_err().to_string();
    assert!(error.contains("block 1"), "{error}");
}
