//! A block of a real model, on demand:
//! `TAILORQ_TEST_MODELS=DIR cargo test -p tailorq-quant --test real_block -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tailorq_quant::{Activations, BlockQuantizer, DriftCorrection, LayerSettings, TokenWeight, find};
use tailorq_tensor::{Bits, Group, Rng};

/// The largest GGUF file of the directory in the environment.
fn checkpoint() -> Option<PathBuf> {
    let files = std::fs::read_dir(std::env::var_os("TAILORQ_TEST_MODELS")?).ok()?;
    let gguf = files.filter_map(|f| Some(f.ok()?.path())).filter(|p| p.extension() == Some("gguf".as_ref()));
    gguf.max_by_key(|p| std::fs::metadata(p).map_or(0, |m| m.len()))
}

/// Time of one block, and its loss against rounding, with random tokens as calibration.
#[test]
#[ignore = "a measurement"]
fn one_block() {
    let Some(path) = checkpoint() else {
        println!("skipped: TAILORQ_TEST_MODELS names no directory with a GGUF file");
        return;
    };
    measure(&path);
}

fn measure(path: &Path) {
    let device = tailorq_kernels::cpu();
    let opened = tailorq_model::open(&path.display().to_string()).unwrap();
    let mut rng = Rng::new(1);
    let samples: Vec<Vec<u32>> =
        (0..8).map(|_| (0..512).map(|_| rng.below(opened.model.config.vocab) as u32).collect()).collect();
    for bits in [Bits::Two, Bits::Three] {
        let plan_of = |_| Ok(LayerSettings::new(bits, Group::Inputs(128)).into());
        for name in ["rtn", "gptq"] {
            let quantizer = find(name).unwrap();
            let run = BlockQuantizer {
                device: device.as_ref(),
                model: &opened.model,
                quantizer,
                plan_of: &plan_of,
                token_energies: None,
                squares: None,
                drift: DriftCorrection::default(),
                shrink: 0.0,
                true_sequential: true,
                token_weight: TokenWeight::default(),
            };
            let mut acts = Activations::embed(device.as_ref(), &opened.model, &samples).unwrap();
            let mut last = Instant::now();
            for block_idx in 0..2 {
                let mut times = Vec::new();
                let mut watch = |id| {
                    times.push((id, last.elapsed().as_secs_f64()));
                    last = Instant::now();
                    ControlFlow::Continue(())
                };
                let done = run.quantize_block(block_idx, Some(&mut acts), &mut watch).unwrap();
                for (layer, (id, seconds)) in done.layers.iter().zip(times) {
                    let (loss, error) = (layer.proxy_loss, layer.relative_error);
                    println!("{name} {bits:?} {id}: {seconds:.2} s, loss {loss:?}, relative error {error:.4}");
                    layer.notes.iter().for_each(|n| println!("    {n}"));
                }
            }
        }
    }
}
