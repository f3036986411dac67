//! The survey against itself: sums over samples, kinds of Hessians, spilling, threads.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::io;
use std::ops::ControlFlow;
use tailorq_model::testing::TinyModel;
use tailorq_model::{Model, Spill};
use tailorq_quant::QuantError;
use tailorq_quant::survey::{BlockStats, LayerGradients, Loss, Needs, Summary, Survey, SurveySample, TokenWeight};
use tailorq_tensor::{Matrix, Rng};

fn model(architecture: &str, seed: u64) -> Model {
    let dir = tempfile::tempdir().unwrap();
    TinyModel::new(architecture, seed).unwrap().write_directory(dir.path()).unwrap();
    tailorq_model::open(dir.path().to_str().unwrap()).unwrap().model
}

fn samples(lengths: &[usize]) -> Vec<SurveySample> {
    let mut rng = Rng::new(8);
    let ids = |n: &usize| (0..*n).map(|_| rng.below(256) as u32).collect();
    lengths.iter().map(ids).map(|ids| SurveySample { ids, scored: None }).collect()
}

fn everything() -> Needs {
    use TokenWeight::*;
    let hessians = vec![Uniform, InverseNorm, Gradient, GradientInverseNorm];
    Needs {
        sum: true,
        absolute: true,
        square: true,
        hessians,
        token_norms: true,
        input_energies: true,
        token_energies: true,
        without_first: false,
    }
}

fn run(model: &Model, needs: &Needs, samples: &[SurveySample]) -> (Summary, Vec<BlockStats>) {
    survey(model, Loss::CrossEntropy, needs, samples, 1 << 30, None).unwrap()
}

fn survey(
    model: &Model,
    loss: Loss<'_>,
    needs: &Needs,
    samples: &[SurveySample],
    tape_bytes: usize,
    spill: Option<&mut dyn Spill>,
) -> Result<(Summary, Vec<BlockStats>), QuantError> {
    let mut blocks = Vec::new();
    let device = tailorq_kernels::cpu();
    let survey = Survey { device: device.as_ref(), model, loss, needs, tape_bytes };
    let summary = survey.run(samples, spill, &mut |stats| {
        blocks.push(stats);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok((summary, blocks))
}

/// Fails when two matrices differ by more than a few roundings.
fn close(found: &Matrix, expected: &[f64], what: &str) {
    let size = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    for (&a, b) in found.data().iter().zip(expected) {
        assert!((f64::from(a) - b).abs() <= 1e-4 * size + 1e-9, "{what}: {a}, expected {b}");
    }
}

fn trace(m: &Matrix) -> f64 {
    (0..m.rows()).map(|i| f64::from(m.row(i)[i])).sum()
}

#[test]
fn statistics_are_sums_over_samples() {
    for architecture in ["llama", "qwen3"] {
        let model = model(architecture, 1);
        let all = samples(&[9, 14, 3]);
        let (summary, together) = run(&model, &everything(), &all);
        assert_eq!((summary.n_samples, summary.n_tokens, summary.n_targets), (3, 26, 23));
        let single: Vec<_> = all.iter().map(|s| run(&model, &everything(), std::slice::from_ref(s))).collect();
        let mean = single.iter().map(|(s, _)| s.mean_loss.unwrap()).sum::<f64>() / 3.0;
        assert!((summary.mean_loss.unwrap() - mean).abs() < 1e-6);
        assert_eq!(together.iter().map(|b| b.block_idx).collect::<Vec<_>>(), [1, 0]);
        for (b, block) in together.iter().enumerate() {
            for (l, layer) in block.layers.iter().enumerate() {
                let gradients: Vec<&Matrix> =
                    single.iter().map(|(_, s)| s[b].layers[l].sum.as_ref().unwrap()).collect();
                let total = |f: &dyn Fn(f64) -> f64| -> Vec<f64> {
                    let n = gradients[0].data().len();
                    (0..n).map(|i| gradients.iter().map(|g| f(f64::from(g.data()[i]))).sum()).collect()
                };
                close(layer.sum.as_ref().unwrap(), &total(&|g| g), "sum");
                close(layer.absolute.as_ref().unwrap(), &total(&f64::abs), "absolute");
                close(layer.square.as_ref().unwrap(), &total(&|g| g * g), "square");
                for (k, (_, hessian)) in layer.hessians.iter().enumerate() {
                    let sum: f64 = single.iter().map(|(_, s)| trace(&s[b].layers[l].hessians[k].1)).sum();
                    assert!((trace(hessian) / sum - 1.0).abs() < 1e-4);
                }
            }
            for group in &block.groups {
                let squares: f64 = group.token_norms.iter().map(|&x| f64::from(x).powi(2)).sum();
                assert_eq!(group.token_norms.len(), 26);
                assert!((trace(&group.hessians[0].1) / squares - 1.0).abs() < 1e-4, "the plain Hessian");
                for (i, energy) in group.input_energies.iter().enumerate() {
                    let plain = f64::from(group.hessians[0].1.row(i)[i]);
                    assert!((energy - plain).abs() <= 1e-4 * plain + 1e-9, "its diagonal");
                }
                assert!((trace(&group.hessians[1].1) - 26.0).abs() < 1e-2, "every token counts once");
            }
        }
    }
}

/// A sample of two tokens has one target, and the gradient is the outer product `dy x^T` of its first token.
#[test]
fn guided_hessians_are_weighted_by_output_gradients() {
    let (_, blocks) = run(&model("qwen2", 2), &everything(), &samples(&[2, 2, 2]));
    for layer in blocks.iter().flat_map(|b| &b.layers) {
        let square = layer.square.as_ref().unwrap();
        let norms: f64 = square.data().iter().map(|&x| f64::from(x)).sum();
        let guided = trace(&layer.hessians[0].1) * square.rows() as f64;
        assert_eq!(layer.token_energies.len(), 6);
        assert!((norms - guided).abs() <= 1e-4 * guided, "{:?}: {norms} {guided}", layer.slot);
    }
}

#[test]
fn hessians_alone_need_no_backward_pass() {
    let (model, all) = (model("llama", 3), samples(&[9, 14]));
    let plain = Needs { hessians: vec![TokenWeight::Uniform], ..Needs::default() };
    let (summary, mut forward) = run(&model, &plain, &all);
    assert_eq!((summary.mean_loss, summary.n_targets), (None, 0));
    let (_, backward) = run(&model, &Needs { absolute: true, ..plain.clone() }, &all);
    forward.reverse();
    assert!(forward.iter().zip(&backward).all(|(a, b)| a.groups == b.groups && a.layers.is_empty()));
    let (_, without) = run(&model, &Needs { without_first: true, ..plain }, &all);
    assert!(trace(&without[0].groups[0].hessians[0].1) < trace(&forward[1].groups[0].hessians[0].1));
}

#[test]
fn only_scored_tokens_count_and_samples_without_any_are_passed_over() {
    let (model, mut all) = (model("llama", 3), samples(&[9, 14, 1, 0, 5]));
    all[0].scored = Some((0..9).map(|t| t >= 6).collect());
    all[4].scored = Some(vec![false; 5]);
    let (summary, _) = run(&model, &everything(), &all);
    assert_eq!((summary.n_samples, summary.n_targets), (2, 16));
    let none = survey(&model, Loss::CrossEntropy, &everything(), &all[4..], 1 << 30, None);
    assert!(matches!(none, Err(QuantError::NoCalibration)));
}

#[test]
fn a_model_diverges_from_another_and_not_from_itself() {
    let (a, b, all) = (model("llama", 3), model("llama", 4), samples(&[9, 14]));
    let loss = |reference| survey(&a, Loss::Divergence(reference), &everything(), &all, 1 << 30, None).unwrap().0;
    assert!(loss(&a).mean_loss.unwrap().abs() < 1e-6);
    assert!(loss(&b).mean_loss.unwrap() > 0.01);
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

#[test]
fn neither_spilling_nor_threads_change_a_bit() {
    let (model, all) = (model("qwen3", 5), samples(&[1500, 700, 30]));
    let expected = run(&model, &everything(), &all);
    let mut heap = Heap::default();
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let spilled = pool.install(|| {
            survey(&model, Loss::CrossEntropy, &everything(), &all, 500_000, Some(&mut Heap::default())).unwrap()
        });
        assert!(spilled == expected, "{threads} threads");
    }
    let tight = survey(&model, Loss::CrossEntropy, &everything(), &all, 100, Some(&mut heap)).unwrap();
    assert!(tight == expected && !heap.0.is_empty());
    let error = survey(&model, Loss::CrossEntropy, &everything(), &all, 100, None).unwrap_err().to_string();
    assert!(error.contains("raise the limit"), "{error}");
}

#[test]
fn the_caller_may_stop_it() {
    let (model, device) = (model("llama", 3), tailorq_kernels::cpu());
    let needs = everything();
    let survey =
        Survey { device: device.as_ref(), model: &model, loss: Loss::CrossEntropy, needs: &needs, tape_bytes: 1 << 30 };
    let stopped = survey.run(&samples(&[9]), None, &mut |_| Ok(ControlFlow::Break(())));
    assert!(matches!(stopped, Err(QuantError::Interrupted)));
}

/// Runs on a group of CPU devices.
fn run_on(n: usize, model: &Model, samples: &[SurveySample], tape_bytes: usize) -> (Summary, Vec<BlockStats>) {
    let (device, needs) = (tailorq_kernels::cpu_with_peers(n - 1), everything());
    let survey = Survey { device: &*device, model, loss: Loss::CrossEntropy, needs: &needs, tape_bytes };
    let (mut blocks, mut heap) = (Vec::new(), Heap::default());
    let summary = survey.run(samples, Some(&mut heap), &mut |stats| {
        blocks.push(stats);
        Ok(ControlFlow::Continue(()))
    });
    assert_eq!(tape_bytes == 0, !heap.0.is_empty(), "what does not fit is spilled by every device");
    (summary.unwrap(), blocks)
}

/// Sums of samples are the same whoever takes which, up to the order of additions; tokens stay in the order of the samples.
#[test]
fn devices_share_the_samples() {
    let model = model("qwen2", 3);
    let samples = samples(&[30, 2, 0, 90, 1, 1500, 700, 45, 8]);
    let (one, expected) = run_on(1, &model, &samples, 1 << 30);
    for n in [2, 3, 9] {
        let (summary, blocks) = run_on(n, &model, &samples, 1 << 30);
        let counts = |s: &Summary| (s.n_samples, s.n_tokens, s.n_targets);
        assert_eq!(counts(&summary), counts(&one));
        assert!((summary.mean_loss.unwrap() / one.mean_loss.unwrap() - 1.0).abs() < 1e-6);
        assert_eq!(blocks.iter().map(|b| b.block_idx).collect::<Vec<_>>(), [1, 0]);
        let wide = |m: &Matrix| m.data().iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        for (found, expected) in blocks.iter().zip(&expected) {
            for (found, expected) in found.layers.iter().zip(&expected.layers) {
                let sums =
                    |l: &LayerGradients| [l.sum.clone(), l.absolute.clone(), l.square.clone()].map(Option::unwrap);
                for (found, expected) in sums(found).iter().zip(&sums(expected)) {
                    close(found, &wide(expected), "gradients");
                }
                for ((_, found), (kind, expected)) in found.hessians.iter().zip(&expected.hessians) {
                    close(found, &wide(expected), kind.name());
                }
                assert_eq!(found.token_energies.len(), one.n_tokens);
                let pairs = found.token_energies.iter().zip(&expected.token_energies);
                pairs.for_each(|(a, b)| assert!((a - b).abs() <= 1e-4 * b, "{a} {b}"));
            }
            for (found, expected) in found.groups.iter().zip(&expected.groups) {
                assert_eq!(found.token_norms.len(), one.n_tokens);
                let pairs = found.token_norms.iter().zip(&expected.token_norms);
                pairs.for_each(|(a, b)| assert!((a - b).abs() <= 1e-4 * b, "{a} {b}"));
                let pairs = found.input_energies.iter().zip(&expected.input_energies);
                pairs.for_each(|(a, b)| assert!((a - b).abs() <= 1e-4 * b, "{a} {b}"));
                for ((_, found), (kind, expected)) in found.hessians.iter().zip(&expected.hessians) {
                    close(found, &wide(expected), kind.name());
                }
            }
        }
        assert_eq!(run_on(n, &model, &samples, 1 << 30).1, blocks, "the same devices give the same bits");
        assert_eq!(run_on(n, &model, &samples, 0).1, blocks, "and so they do where nothing fits");
    }
    // With one thread for all of them nobody waits for ever.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let alone = pool.install(|| run_on(3, &model, &samples, 1 << 30).1);
    assert_eq!(alone, run_on(3, &model, &samples, 1 << 30).1);
}

#[test]
fn what_stops_one_device_stops_all() {
    let model = model("llama", 3);
    let device = tailorq_kernels::cpu_with_peers(2);
    let needs = everything();
    let survey =
        Survey { device: &*device, model: &model, loss: Loss::CrossEntropy, needs: &needs, tape_bytes: 1 << 30 };
    let samples = samples(&[30, 20, 90, 40]);
    let mut n_seen = 0;
    let stopped = survey.run(&samples, None, &mut |_| {
        n_seen += 1;
        Ok(ControlFlow::Break(()))
    });
    assert!(matches!(stopped, Err(QuantError::Interrupted)) && n_seen == 1);
    let failed = survey.run(&samples, None, &mut |_| Err(QuantError::NoCalibration));
    assert!(matches!(failed, Err(QuantError::NoCalibration)));
    // No room for a tape, and no place to spill to.
    let full = Survey { tape_bytes: 8, ..survey };
    let failed = full.run(&samples, None, &mut |_| Ok(ControlFlow::Continue(())));
    assert!(failed.unwrap_err().to_string().contains("8 bytes"));
}
