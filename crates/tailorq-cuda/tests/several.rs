//! Several devices, or one that stands for two where there is no second: surveys, Hessians and decoding are those of one.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may stop where it stands, and says when it is skipped"
)]

use std::ops::ControlFlow;
use std::sync::Arc;
use tailorq_cuda::{CudaDecoders, CudaError, CudaOptions};
use tailorq_kernels::Device;
use tailorq_model::testing::TinyModel;
use tailorq_model::{DecoderSize, Decoders, Model};
use tailorq_quant::quantize::{Gptq, Rtn};
use tailorq_quant::survey::{Loss, Needs, Survey, SurveySample, TokenWeight};
use tailorq_quant::{
    Activations, BlockQuantizer, DriftCorrection, LayerPlan, LayerSettings, LayerStats, Quantizer, TransformSettings,
};
use tailorq_tensor::{Bits, Group, InputTransform, LayerId, Matrix, Rng, Slot, TransformSpec};

/// The numbers of two devices, the same number twice where there is one; `None`, with words about it, where there is none.
fn two() -> Option<[usize; 2]> {
    match tailorq_cuda::count() {
        Ok(0) | Err(CudaError::NoDriver | CudaError::NoLibrary { .. } | CudaError::NoDevice { .. }) => {
            println!("skipped: no CUDA device");
            None
        }
        Ok(1) => Some([0, 0]),
        Ok(_) => Some([0, 1]),
        Err(error) => panic!("{error}"),
    }
}

fn open(ordinals: &[usize]) -> Arc<dyn Device> {
    tailorq_cuda::open_several(ordinals, CudaOptions::default()).unwrap()
}

fn model(n_blocks: usize) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = TinyModel::new("qwen2", 7).unwrap();
    tiny.config.n_blocks = n_blocks;
    tiny.config.tied_head = false;
    tiny.write_directory(dir.path()).unwrap();
    tailorq_model::open(dir.path().to_str().unwrap()).unwrap().model
}

fn ids(rng: &mut Rng, n: usize) -> Vec<u32> {
    (0..n).map(|_| rng.below(256) as u32).collect()
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let size = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= 2e-4 * size, "{what}: element {i} is {f}, expected {e}");
    }
}

#[test]
fn surveys_share_their_samples() {
    let Some(two) = two() else { return };
    let (model, mut rng) = (model(3), Rng::new(6));
    let samples: Vec<SurveySample> =
        [30, 2, 150, 700, 1400, 9].map(|n| SurveySample { ids: ids(&mut rng, n), scored: None }).into();
    let hessians = vec![TokenWeight::Uniform, TokenWeight::Gradient];
    let needs = Needs { absolute: true, square: true, token_energies: true, hessians, ..Needs::default() };
    let run = |ordinals: &[usize]| -> Vec<Vec<f32>> {
        let device = open(ordinals);
        let survey =
            Survey { device: &*device, model: &model, loss: Loss::CrossEntropy, needs: &needs, tape_bytes: 1 << 30 };
        let mut all = Vec::new();
        survey
            .run(&samples, None, &mut |stats| {
                for layer in &stats.layers {
                    all.extend([&layer.absolute, &layer.square].map(|m| m.as_ref().unwrap().data().to_vec()));
                    all.extend(layer.hessians.iter().map(|(_, h)| h.data().to_vec()));
                    all.push(layer.token_energies.clone());
                }
                all.extend(stats.groups.iter().flat_map(|g| &g.hessians).map(|(_, h)| h.data().to_vec()));
                Ok(ControlFlow::Continue(()))
            })
            .unwrap();
        all
    };
    let (alone, together) = (run(&two[..1]), run(&two));
    alone.iter().zip(&together).for_each(|(alone, together)| assert_close(together, alone, "statistics"));
    assert_eq!(run(&two), together, "the same devices give the same bits");
}

fn plan(_: LayerId) -> Result<LayerPlan, tailorq_quant::QuantError> {
    Ok(LayerSettings::new(Bits::Three, Group::Inputs(32)).into())
}

#[test]
fn hessians_are_summed_over_devices() {
    let Some(two) = two() else { return };
    let (model, mut rng) = (model(1), Rng::new(9));
    let samples: Vec<Vec<u32>> = [900, 1500, 700, 1900, 30].map(|n| ids(&mut rng, n)).into();
    let run = |ordinals: &[usize]| {
        let device = open(ordinals);
        let quantizer = BlockQuantizer {
            device: &*device,
            model: &model,
            quantizer: &Gptq,
            plan_of: &plan,
            true_sequential: true,
            token_weight: TokenWeight::Uniform,
            token_energies: None,
            squares: None,
            drift: DriftCorrection::default(),
            shrink: 0.0,
        };
        let mut acts = Activations::embed(&*device, &model, &samples).unwrap();
        let block = quantizer.quantize_block(0, Some(&mut acts), &mut |_| ControlFlow::Continue(())).unwrap();
        let losses: Vec<f64> = block.layers.iter().map(|l| l.proxy_loss.unwrap()).collect();
        (losses, acts.batches.iter().flat_map(|b| b.residual.data().to_vec()).collect::<Vec<f32>>())
    };
    let (alone, together) = (run(&two[..1]), run(&two));
    for (a, b) in alone.0.iter().zip(&together.0) {
        assert!((a - b).abs() < 0.02 * a, "{a}, together {b}");
    }
    assert_eq!(run(&two), together, "the same devices give the same bits");
}

/// A model of packed weights; blocks are not alike, so that they are not split in the middle.
fn packed() -> Model {
    let (mut model, device) = (model(5), tailorq_kernels::cpu());
    for (i, block) in model.blocks.iter_mut().enumerate() {
        for slot in Slot::ALL {
            let bits = if i == 4 { Bits::Eight } else { Bits::Four };
            let plan = LayerPlan::from(LayerSettings::new(bits, Group::Inputs(32)));
            let linear = block.linear_mut(slot);
            let rounded = Rtn.quantize(&*device, &linear.weight.to_matrix(), &LayerStats::default(), &plan).unwrap();
            linear.weight = rounded.weight.into();
        }
    }
    model
}

#[test]
fn blocks_on_several_devices_say_what_one_says() {
    let Some(two) = two() else { return };
    let (model, mut rng) = (packed(), Rng::new(12));
    assert!(model.is_packed());
    let size = DecoderSize { sequences: 3, capacity: 200 };
    let prompts: Vec<Vec<u32>> = [1, 30, 77].map(|n| ids(&mut rng, n)).into();
    let run = |ordinals: &[usize]| {
        let mut decoder = CudaDecoders::new(ordinals).unwrap().open(&model, size).unwrap();
        let (mut all, mut logits) = (Vec::new(), Vec::new());
        for (i, prompt) in prompts.iter().enumerate() {
            decoder.read(i, prompt).unwrap();
            decoder.logits(i, &mut logits);
            all.extend_from_slice(&logits);
        }
        let mut chosen = decoder.choose(&[0, 1, 2], 50).unwrap();
        // Back to some beginning, a beginning of another, one alone, a single token as a sampler gives it.
        decoder.truncate(1, 20);
        decoder.read(1, &[7, 8]).unwrap();
        decoder.share(2, 0, 60).unwrap();
        decoder.read(0, &prompts[2][60..]).unwrap();
        decoder.logits(0, &mut logits);
        all.extend_from_slice(&logits);
        chosen.extend(decoder.choose(&[0, 1], 9).unwrap());
        chosen.extend(decoder.choose(&[1], 3).unwrap());
        // Up to the end of the room, and not further.
        chosen.extend(decoder.choose(&[2], 100).unwrap().into_iter().map(|c| c[..73].to_vec()));
        assert!(decoder.read(2, &[1]).is_err());
        assert!(decoder.copy_rate() > 1e9);
        (all, chosen)
    };
    let one = run(&two[..1]);
    assert_eq!(run(&two), one);
    let vocab = model.config.vocab;
    assert_eq!(one.0[3 * vocab..], one.0[2 * vocab..3 * vocab], "a shared beginning is as good as one that was read");
    assert_eq!(one.1[3][..], one.1[2][..9], "and so is what is chosen after it");
    // More devices than blocks.
    assert_eq!(run(&[two[0], two[1], two[0], two[1], two[0], two[1], two[0]]), one);
}

#[test]
fn what_has_no_room_is_refused_with_a_remedy() {
    let Some(two) = two() else { return };
    let size = DecoderSize { sequences: 8, capacity: 1 << 24 };
    let mut large = packed();
    large.config.n_kv_heads = 1 << 12;
    let refused = CudaDecoders::new(&two[..1]).unwrap().open(&large, size).err().unwrap().to_string();
    assert!(refused.contains("MiB free") && refused.contains("cuda:0,1"), "{refused}");
}

/// Rotated rows have the host's bits, and so have rotated Hessians.
#[test]
fn rotations_are_those_of_the_host() {
    let Some(two) = two() else { return };
    let (device, host) = (open(&two[..1]), tailorq_kernels::cpu());
    let resident = device.resident().unwrap();
    let mut rng = Rng::new(3);
    for (width, block) in [(1, 1), (2, 2), (7, 4), (64, 64), (96, 32), (100, 64), (896, 128), (4864, 256), (4096, 4096)]
    {
        let spec = TransformSpec { block, ..TransformSpec::hadamard(width, 5) };
        let transform = InputTransform::new(width, spec).unwrap();
        let x = Matrix::from_vec(5, width, (0..5 * width).map(|_| rng.normal()).collect());
        let (mut found, mut expected) = (x.clone(), x);
        resident.rotate_rows(&mut found, &transform);
        (0..5).for_each(|r| transform.forward(expected.row_mut(r)));
        assert_eq!(found.data(), expected.data(), "{width} in blocks of {block}");
    }
    for n in [1, 31, 32, 33, 100] {
        let m = Matrix::from_vec(n, n, (0..n * n).map(|_| rng.normal()).collect());
        let (mut transposed, mut completed) = (m.clone(), m.clone());
        resident.transpose(&mut transposed);
        resident.complete_upper(&mut completed);
        for (r, c) in (0..n * n).map(|i| (i / n, i % n)) {
            assert_eq!(transposed.row(r)[c], m.row(c)[r]);
            assert_eq!(completed.row(r)[c], m.row(r.max(c))[r.min(c)]);
        }
    }
    // A whole layer on rotated inputs, some of which were never active.
    let (n, rows) = (160, 48);
    let mut hessian = Matrix::zeros(n, n);
    host.gram(&(0..3 * n * n).map(|_| rng.normal()).collect::<Vec<_>>(), &mut hessian);
    (0..n).for_each(|i| hessian.row_mut(i.max(5))[i.min(5)] = 0.0);
    let weights = Matrix::from_vec(rows, n, (0..rows * n).map(|_| rng.normal()).collect());
    let settings = LayerSettings {
        transform: Some(TransformSettings::hadamard(0)),
        ..LayerSettings::new(Bits::Three, Group::Inputs(32))
    };
    let quantize = |device: &dyn Device| {
        let stats = LayerStats { hessian: Some(&hessian), n_tokens: 3 * n, ..LayerStats::default() };
        Gptq.quantize(device, &weights, &stats, &LayerPlan::from(settings)).unwrap()
    };
    let (found, expected) = (quantize(&*device), quantize(&*host));
    assert_eq!(found.notes, expected.notes);
    let (a, b) = (found.proxy_loss.unwrap(), expected.proxy_loss.unwrap());
    assert!((a - b).abs() < 0.02 * b, "{a}, on the host {b}");
}
