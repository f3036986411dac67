//! The streaming step on a small random model.

use super::*;
use crate::quantize::{Best, Gptq, Rtn, proxy_loss};
use std::path::Path;
use std::sync::Arc;
use tailorq_model::{Architecture, Linear, ModelConfig, RopeScaling};
use tailorq_tensor::{Bits, Group, Rng};

const HIDDEN: usize = 48;
const INTERMEDIATE: usize = 80;
const HEAD_DIM: usize = 16;

fn random(rows: usize, cols: usize, rng: &mut Rng) -> Weight {
    let scale = (cols as f32).sqrt().recip();
    Matrix::from_vec(rows, cols, (0..rows * cols).map(|_| rng.normal() * scale).collect()).into()
}

fn block(architecture: &Architecture, block_idx: usize, rng: &mut Rng) -> Block {
    let linears = Slot::ALL.map(|slot| {
        let (rows, cols) = match slot {
            Slot::Q => (3 * HEAD_DIM, HIDDEN),
            Slot::K | Slot::V => (HEAD_DIM, HIDDEN),
            Slot::O => (HIDDEN, 3 * HEAD_DIM),
            Slot::Gate | Slot::Up => (INTERMEDIATE, HIDDEN),
            Slot::Down => (HIDDEN, INTERMEDIATE),
        };
        let name = architecture.linear_name(block_idx, slot);
        Linear { name, weight: random(rows, cols, rng), bias: None }
    });
    let norm = |rng: &mut Rng| (0..HIDDEN).map(|_| 1.0 + 0.1 * rng.normal()).collect();
    Block { attention_norm: norm(rng), mlp_norm: norm(rng), qk_norm: None, linears }
}

fn model() -> Model {
    let mut rng = Rng::new(1);
    let architecture = Architecture::find("llama", Path::new("")).unwrap();
    let config = ModelConfig {
        architecture: "llama",
        hidden: HIDDEN,
        intermediate: INTERMEDIATE,
        n_blocks: 2,
        n_heads: 3,
        n_kv_heads: 1,
        head_dim: HEAD_DIM,
        vocab: 100,
        max_positions: 4096,
        rms_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        sliding_window: None,
        tied_head: true,
        attention_bias: false,
        mlp_bias: false,
    };
    let embedding = random(100, HIDDEN, &mut rng);
    let blocks = (0..2).map(|i| block(architecture, i, &mut rng)).collect();
    Model::new(config, architecture, embedding.clone(), blocks, vec![1.0; HIDDEN], embedding)
}

/// Several micro-batches, one of them a long sequence.
fn samples() -> Vec<Vec<u32>> {
    let mut rng = Rng::new(2);
    [700, 900, 600, 2100, 5].iter().map(|&n| (0..n).map(|_| rng.below(100) as u32).collect()).collect()
}

fn plan(_: LayerId) -> Result<LayerPlan, QuantError> {
    Ok(LayerSettings::new(Bits::Three, Group::Inputs(32)).into())
}

fn go_on(_: LayerId) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

struct Fixture {
    device: Arc<dyn Device>,
    model: Model,
}

impl Fixture {
    fn new() -> Self {
        Fixture { device: tailorq_kernels::cpu(), model: model() }
    }

    fn acts(&self) -> Activations {
        Activations::embed(self.device.as_ref(), &self.model, &samples()).unwrap()
    }

    fn run<'a>(&'a self, quantizer: &'a dyn Quantizer, true_sequential: bool) -> BlockQuantizer<'a> {
        let (device, model) = (self.device.as_ref(), &self.model);
        BlockQuantizer {
            device,
            model,
            quantizer,
            plan_of: &plan,
            true_sequential,
            token_weight: TokenWeight::Uniform,
            token_energies: None,
            squares: None,
            drift: DriftCorrection::default(),
            shrink: 0.0,
        }
    }
}

fn codes(block: &QuantizedBlock) -> Vec<Vec<u8>> {
    block.layers.iter().map(|l| l.weight.packed().unwrap().parts().codes.to_vec()).collect()
}

fn residuals(acts: &Activations) -> Vec<&[f32]> {
    acts.batches.iter().map(|b| b.residual.data()).collect()
}

/// However a block is quantized, a resumed run that replays it continues with the same bits.
#[test]
fn replay_gives_the_same_bits() {
    let f = Fixture::new();
    let methods: [(&dyn Quantizer, bool); 3] = [(&Gptq, true), (&Gptq, false), (&Rtn, true)];
    for (quantizer, true_sequential) in methods {
        let run = f.run(quantizer, true_sequential);
        let (mut acts, mut replayed) = (f.acts(), f.acts());
        for block_idx in 0..2 {
            let done = run.quantize_block(block_idx, Some(&mut acts), &mut go_on).unwrap();
            let slots: Vec<Slot> = done.layers.iter().map(|l| l.id.slot).collect();
            assert_eq!(slots, Slot::ALL);
            let installed = done.install(&f.model.blocks[block_idx]);
            assert!(installed.linears.iter().all(|l| matches!(l.weight, Weight::Packed(_))));
            advance(f.device.as_ref(), &f.model, (block_idx, &installed), &mut replayed);
            assert_eq!(residuals(&acts), residuals(&replayed), "{} {true_sequential}", quantizer.name());
        }
    }
}

#[test]
fn keeping_inputs_changes_nothing() {
    let f = Fixture::new();
    let run = f.run(&Gptq, true);
    // Nothing, one batch of one input, everything.
    let results = [0, 2200 * 48 * 4, KEPT_INPUT_BYTES].map(|kept| {
        let mut acts = f.acts();
        let done = run.quantize_keeping(kept, 0, Some(&mut acts), &mut go_on).unwrap();
        (codes(&done), acts)
    });
    for (codes, acts) in &results[1..] {
        assert_eq!(codes, &results[0].0);
        assert_eq!(residuals(acts), residuals(&results[0].1));
    }
}

/// The Hessian of each input is that of the block with all earlier linears quantized, and only with `true_sequential`.
#[test]
fn inputs_see_quantized_predecessors() {
    let f = Fixture::new();
    for true_sequential in [true, false] {
        let done = f.run(&Gptq, true_sequential).quantize_block(0, Some(&mut f.acts()), &mut go_on).unwrap();
        // Rebuild the input of down from scratch, with or without the six others quantized.
        let original = &f.model.blocks[0];
        let mut before = if true_sequential { done.install(original) } else { original.clone() };
        before.linear_mut(Slot::Down).weight = original.linear(Slot::Down).weight.clone();
        let stage = BlockStage { model: &f.model, block: &before, device: f.device.as_ref() };
        let mut hessian = Matrix::zeros(INTERMEDIATE, INTERMEDIATE);
        let acts = f.acts();
        for batch in &acts.batches {
            let mut residual = batch.residual.clone();
            stage.add_attention(&mixed(&stage, &residual, &batch.spans), &mut residual);
            f.device.gram(hidden(&stage, &residual).data(), &mut hessian);
        }
        let down = &done.layers[Slot::Down.index()];
        let weights = original.linear(Slot::Down).weight.to_matrix();
        let measured = proxy_loss(f.device.as_ref(), &weights, down.weight.reader(), &hessian, acts.n_tokens());
        let claimed = down.proxy_loss.unwrap();
        assert!((claimed / measured - 1.0).abs() < 2e-3, "{true_sequential}: {claimed} against {measured}");
    }
}

#[test]
fn methods_without_statistics_run_nothing() {
    let f = Fixture::new();
    let alone = f.run(&Rtn, true).quantize_block(1, None, &mut go_on).unwrap();
    let along = f.run(&Rtn, true).quantize_block(1, Some(&mut f.acts()), &mut go_on).unwrap();
    assert_eq!(codes(&alone), codes(&along));
    assert!(alone.layers.iter().all(|l| l.proxy_loss.is_none() && l.relative_error > 0.0));
    let error = f.run(&Gptq, true).quantize_block(1, None, &mut go_on).unwrap_err();
    assert!(error.to_string().contains("block 1 q"), "{error}");
    let mut nothing = Activations { batches: Vec::new() };
    let error = f.run(&Gptq, true).quantize_block(1, Some(&mut nothing), &mut go_on).unwrap_err();
    assert!(matches!(error, QuantError::NoCalibration));
    assert!(Activations::embed(f.device.as_ref(), &f.model, &[vec![]]).is_err());
}

#[test]
fn watchers_see_every_layer_and_may_stop() {
    let f = Fixture::new();
    let mut seen = Vec::new();
    let mut watch = |id: LayerId| {
        seen.push(id.slot);
        if seen.len() == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let error = f.run(&Gptq, true).quantize_block(0, Some(&mut f.acts()), &mut watch).unwrap_err();
    assert!(matches!(error, QuantError::Interrupted));
    assert_eq!(seen, Slot::ALL[..5]);
}

#[test]
fn bad_tensors_are_named() {
    let mut f = Fixture::new();
    let mut weights = f.model.blocks[1].linear(Slot::Up).weight.to_matrix();
    weights.row_mut(3)[7] = f32::NAN;
    f.model.blocks[1].linear_mut(Slot::Up).weight = weights.into();
    for acts in [None, Some(&mut f.acts())] {
        let error = f.run(&Rtn, true).quantize_block(1, acts, &mut go_on).unwrap_err().to_string();
        assert!(error.contains("model.layers.1.mlp.up_proj.weight") && error.contains("row 3, column 7"), "{error}");
    }
    // Activations that overflow are reported as such, at the first layer that would use them.
    let mut acts = f.acts();
    acts.batches[1].residual.row_mut(5)[0] = f32::NAN;
    let error = f.run(&Gptq, true).quantize_block(0, Some(&mut acts), &mut go_on).unwrap_err().to_string();
    assert!(error.contains("q_proj") && error.contains("activations overflowed"), "{error}");
}

#[test]
fn threads_do_not_matter() {
    let f = Fixture::new();
    let results = [1, 2, 3].map(|n| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        pool.install(|| {
            let mut acts = f.acts();
            let done = f.run(&Gptq, true).quantize_block(0, Some(&mut acts), &mut go_on).unwrap();
            (codes(&done), acts)
        })
    });
    for (codes, acts) in &results[1..] {
        assert_eq!(codes, &results[0].0);
        assert_eq!(residuals(acts), residuals(&results[0].1));
    }
}

/// Inputs of one length: a token with massive activations counts like any other, and codes differ from those of the plain
/// Hessian; both ways of gathering (input by input, and all at once) weigh alike.
#[test]
fn tokens_count_as_they_are_told() {
    let f = Fixture::new();
    let quantize = |true_sequential, token_weight| {
        let run = BlockQuantizer { token_weight, ..f.run(&Gptq, true_sequential) };
        run.quantize_block(0, Some(&mut f.acts()), &mut |_| ControlFlow::Continue(()))
    };
    let of = |true_sequential, weight| quantize(true_sequential, weight).unwrap();
    let first = |block: &QuantizedBlock| block.layers[0].weight.packed().unwrap().parts().codes.to_vec();
    // Nothing is quantized before the first layer, so both ways see the same inputs there.
    let [a, b] = [true, false].map(|t| of(t, TokenWeight::InverseNorm));
    assert_eq!(first(&a), first(&b));
    assert_ne!(codes(&a), codes(&of(true, TokenWeight::Uniform)));
    assert!(matches!(quantize(true, TokenWeight::Gradient), Err(QuantError::Settings(_))));
}

/// Each linear has a Hessian of its own when gradients weigh its tokens; even weights give that of GPTQ.
#[test]
fn output_gradients_weigh_the_tokens_of_each_linear() {
    let f = Fixture::new();
    let n_tokens = f.acts().n_tokens();
    let quantize = |energies: &dyn Fn(LayerId) -> Vec<f32>, true_sequential| {
        let energies = |id| Ok(energies(id));
        let run = BlockQuantizer {
            token_weight: TokenWeight::Gradient,
            token_energies: Some(&energies),
            ..f.run(&Gptq, true_sequential)
        };
        run.quantize_block(0, Some(&mut f.acts()), &mut |_| ControlFlow::Continue(()))
    };
    let plain = f.run(&Gptq, true).quantize_block(0, Some(&mut f.acts()), &mut |_| ControlFlow::Continue(())).unwrap();
    let even = quantize(&|_| vec![1.0; n_tokens], true).unwrap();
    assert_eq!(codes(&even), codes(&plain));
    let only_k = |id: LayerId| -> Vec<f32> {
        (0..n_tokens).map(|t| if id.slot == Slot::K && t % 7 == 0 { 40.0 } else { 1.0 }).collect()
    };
    for true_sequential in [true, false] {
        let uneven = quantize(&only_k, true_sequential).unwrap();
        assert_eq!(codes(&uneven)[0], codes(&plain)[0], "q");
        assert_ne!(codes(&uneven)[1], codes(&plain)[1], "k");
    }
    let error = quantize(&|_| vec![1.0; 3], true).unwrap_err().to_string();
    assert!(error.contains("energies of 3 tokens"), "{error}");
}

/// A layer that the plan leaves at 16 bits stands among packed ones, and they see it as it is.
#[test]
fn a_plan_may_leave_layers_at_sixteen_bits() {
    let f = Fixture::new();
    let plan_of = |id: LayerId| match id.slot {
        Slot::V | Slot::Down => Ok(LayerSettings::half().into()),
        _ => plan(id),
    };
    let run = BlockQuantizer { plan_of: &plan_of, ..f.run(&Gptq, true) };
    let mut acts = f.acts();
    let done = run.quantize_block(0, Some(&mut acts), &mut go_on).unwrap();
    for layer in &done.layers {
        let is_half = matches!(layer.id.slot, Slot::V | Slot::Down);
        assert_eq!(layer.weight.packed().is_none(), is_half, "{}", layer.id);
        if is_half {
            let linear = f.model.blocks[0].linear(layer.id.slot);
            assert_eq!(layer.weight.reader().bytes(), 2 * linear.weight.rows() * linear.weight.cols());
            assert!(layer.relative_error < 5e-4 && layer.proxy_loss.unwrap() < 1e-3, "{}", layer.id);
        }
    }
    let mut again = f.acts();
    advance(f.device.as_ref(), &f.model, (0, &done.install(&f.model.blocks[0])), &mut again);
    assert_eq!(residuals(&acts), residuals(&again));
}

/// A method that reads squared gradients gets those of each layer; others do not ask for them.
#[test]
fn squares_reach_who_reads_them() {
    struct Reader;
    impl Quantizer for Reader {
        fn name(&self) -> &'static str {
            "reader"
        }
        fn needs(&self) -> crate::Needs {
            crate::Needs { square: true, ..crate::Needs::default() }
        }
        fn quantize(
            &self,
            device: &dyn Device,
            weights: &Matrix,
            stats: &LayerStats<'_>,
            plan: &LayerPlan,
        ) -> Result<Quantized, QuantError> {
            let square = stats.square.ok_or(QuantError::SquareMissing { quantizer: self.name() })?;
            assert_eq!((square.rows(), square.cols()), (weights.rows(), weights.cols()));
            Half.quantize(device, square, stats, plan)
        }
    }
    let f = Fixture::new();
    let squares = |id: LayerId| {
        let w = &f.model.blocks[id.block_idx].linear(id.slot).weight;
        let data = vec![id.slot.index() as f32; w.rows() * w.cols()];
        Ok(Matrix::from_vec(w.rows(), w.cols(), data))
    };
    let run = BlockQuantizer { squares: Some(&squares), ..f.run(&Reader, true) };
    let done = run.quantize_block(1, None, &mut go_on).unwrap();
    for layer in &done.layers {
        assert!(layer.weight.to_matrix().data().iter().all(|v| *v == layer.id.slot.index() as f32), "{}", layer.id);
    }
    let without = f.run(&Reader, true).quantize_block(1, None, &mut go_on).unwrap_err().to_string();
    assert!(without.contains("squared gradients"), "{without}");
    let never = |_: LayerId| -> Result<Matrix, QuantError> { panic!("nobody asked") };
    BlockQuantizer { squares: Some(&never), ..f.run(&Rtn, true) }.quantize_block(1, None, &mut go_on).unwrap();
}

/// Later blocks come closer to what the original model gives when their weights make up for the drift; replay and kept
/// inputs change nothing, and the original stream ends where the original block takes it.
#[test]
fn drift_is_made_up_for() {
    let f = Fixture::new();
    let device = f.device.as_ref();
    let acts = || Activations::embed_beside(device, &f.model, &f.model, &samples()).unwrap();
    let distance = |acts: &Activations| -> f64 {
        let pairs = acts.batches.iter().flat_map(|b| b.residual.data().iter().zip(b.original.as_ref().unwrap().data()));
        pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum()
    };
    let run = |drift: DriftCorrection, kept_bytes| {
        let plan = |_: LayerId| Ok(LayerSettings::new(Bits::Two, Group::Inputs(32)).into());
        let run = BlockQuantizer { drift, plan_of: &plan, ..f.run(&Gptq, true) };
        let (mut acts, mut replayed) = (acts(), acts());
        for block_idx in 0..2 {
            let done = run.quantize_keeping(kept_bytes, block_idx, Some(&mut acts), &mut go_on).unwrap();
            advance(device, &f.model, (block_idx, &done.install(&f.model.blocks[block_idx])), &mut replayed);
        }
        assert_eq!(residuals(&acts), residuals(&replayed));
        acts
    };
    let off = run(DriftCorrection::default(), usize::MAX);
    let inputs = run(DriftCorrection { inputs: 1.0, residual: 0.0 }, usize::MAX);
    let both = run(DriftCorrection { inputs: 1.0, residual: 1.0 }, usize::MAX);
    let [a, b, c] = [&off, &inputs, &both].map(distance);
    assert!(b < 0.7 * a && c < b, "off {a}, inputs {b}, with the stream {c}");
    assert_eq!(residuals(&both), residuals(&run(DriftCorrection { inputs: 1.0, residual: 1.0 }, 0)));
    let mut plain = acts();
    f.model.blocks.iter().enumerate().for_each(|(i, block)| advance(device, &f.model, (i, block), &mut plain));
    for (a, b) in both.batches.iter().zip(&plain.batches) {
        assert_eq!(a.original.as_ref().unwrap().data(), b.residual.data());
    }
    let on = BlockQuantizer { drift: DriftCorrection { inputs: 1.0, residual: 0.0 }, ..f.run(&Gptq, true) };
    assert!(matches!(on.quantize_block(0, Some(&mut f.acts()), &mut go_on), Err(QuantError::Settings(_))));
}

/// Without correlations there is nothing to feed back: GPTQ rounds to nearest, on the same grids.
#[test]
fn without_correlations_gptq_rounds() {
    let f = Fixture::new();
    for true_sequential in [true, false] {
        let run = BlockQuantizer { shrink: 1.0, ..f.run(&Gptq, true_sequential) };
        let done = run.quantize_block(0, Some(&mut f.acts()), &mut go_on).unwrap();
        let rounded = f.run(&Rtn, true).quantize_block(0, None, &mut go_on).unwrap();
        assert_eq!(codes(&done), codes(&rounded));
        let half = BlockQuantizer { shrink: 0.5, ..f.run(&Gptq, true_sequential) };
        let half = half.quantize_block(0, Some(&mut f.acts()), &mut go_on).unwrap();
        assert_ne!(codes(&half), codes(&rounded));
        assert_ne!(
            codes(&half),
            codes(&f.run(&Gptq, true_sequential).quantize_block(0, Some(&mut f.acts()), &mut go_on).unwrap())
        );
    }
}

/// What is held out is in no candidate's Hessian, and together they are all tokens.
#[test]
fn sequences_are_held_out_for_who_chooses() {
    struct Sees(std::sync::Mutex<Vec<(usize, usize)>>);
    impl Quantizer for Sees {
        fn name(&self) -> &'static str {
            "sees"
        }
        fn needs(&self) -> crate::Needs {
            crate::Needs { hessian: true, held_out: true, ..crate::Needs::default() }
        }
        fn quantize(
            &self,
            device: &dyn Device,
            weights: &Matrix,
            stats: &LayerStats<'_>,
            plan: &LayerPlan,
        ) -> Result<Quantized, QuantError> {
            let held = stats.held_out.unwrap();
            self.0.lock().unwrap().push((stats.n_tokens, held.n_tokens));
            let trace = |h: &Matrix| (0..h.rows()).map(|i| f64::from(h.row(i)[i])).sum::<f64>();
            let normalised = trace(stats.normalised.unwrap());
            assert!((normalised - stats.n_tokens as f64).abs() < 1e-2 * normalised, "every token counts once");
            assert!(trace(held.hessian) > 0.0 && trace(stats.hessian.unwrap()) > 0.0);
            Rtn.quantize(device, weights, stats, plan)
        }
    }
    let f = Fixture::new();
    for true_sequential in [true, false] {
        let sees = Sees(std::sync::Mutex::default());
        f.run(&sees, true_sequential).quantize_block(0, Some(&mut f.acts()), &mut go_on).unwrap();
        // Five sequences: the last one, of five tokens, is held out.
        assert_eq!(sees.0.into_inner().unwrap(), [(4300, 5); 7]);
    }
    let run = f.run(&Best, true);
    let mut one = Activations::embed(f.device.as_ref(), &f.model, &samples()[..1]).unwrap();
    let alone = run.quantize_block(0, Some(&mut one), &mut go_on).unwrap_err().to_string();
    assert!(alone.contains("at least two items"), "{alone}");
    let done = run.quantize_block(0, Some(&mut f.acts()), &mut go_on).unwrap();
    assert!(done.layers.iter().all(|l| l.notes.iter().any(|n| matches!(n, Note::Chosen { .. }))));
}

/// Micro-batches on several devices: the Hessians are the same up to the order of their sums, and so are the layers' losses.
#[test]
fn devices_share_the_micro_batches() {
    let alone = Fixture::new();
    for n in [2, 3] {
        let several = Fixture { device: tailorq_kernels::cpu_with_peers(n - 1), model: model() };
        for (quantizer, true_sequential) in [(&Gptq as &dyn Quantizer, true), (&Gptq, false), (&Best, true)] {
            let drift =
                if true_sequential { DriftCorrection { inputs: 0.5, residual: 0.5 } } else { Default::default() };
            let quantize = |f: &Fixture| {
                let run = BlockQuantizer { drift, ..f.run(quantizer, true_sequential) };
                let embed = || Activations::embed_beside(&*f.device, &f.model, &f.model, &samples()).unwrap();
                let mut acts = embed();
                let block = run.quantize_block(0, Some(&mut acts), &mut go_on).unwrap();
                let mut replayed = embed();
                advance(&*f.device, &f.model, (0, &block.install(&f.model.blocks[0])), &mut replayed);
                assert_eq!(residuals(&replayed), residuals(&acts), "a replay has the same bits");
                (acts, block)
            };
            let ((_, expected), (acts, found)) = (quantize(&alone), quantize(&several));
            let places: Vec<usize> = acts.batches.iter().map(|b| b.place).collect();
            assert_eq!(places, (0..places.len()).map(|i| i % n).collect::<Vec<_>>());
            for (found, expected) in found.layers.iter().zip(&expected.layers) {
                let (a, b) = (found.proxy_loss.unwrap(), expected.proxy_loss.unwrap());
                assert!((a - b).abs() < 0.02 * b, "{}: {a}, alone {b}", found.name);
            }
            assert_eq!(codes(&quantize(&several).1), codes(&found), "the same devices give the same bits");
        }
    }
}
