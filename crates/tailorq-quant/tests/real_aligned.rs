//! What salient tiles, rotations and codebooks are worth on layers of a real model, on demand: `TAILORQ_TEST_MODELS=DIR TAILORQ_TEST_DATA=DIR cargo
//! test -p tailorq-quant --test real_aligned -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Mutex;
use tailorq_kernels::Device;
use tailorq_quant::quantize::{Aligned, Gptq, Saliency, Salient, Scope, Unit};
use tailorq_quant::{
    Activations, AlignedSettings, BlockQuantizer, Clip, GridKind, LayerPlan, LayerSettings, LayerStats, Needs,
    QuantError, Quantized, Quantizer, TokenWeight, TransformSettings, advance,
};
use tailorq_tensor::{Bits, Group, Layout, Matrix, TileBits};

/// The blocks that are looked at.
const BLOCKS: [usize; 3] = [0, 10, 20];

/// The smallest GGUF file and a text.
fn inputs() -> Option<(PathBuf, String)> {
    let files = std::fs::read_dir(std::env::var_os("TAILORQ_TEST_MODELS")?).ok()?;
    let gguf = files.filter_map(|f| Some(f.ok()?.path())).filter(|p| p.extension() == Some("gguf".as_ref()));
    let model = gguf.min_by_key(|p| std::fs::metadata(p).map_or(u64::MAX, |m| m.len()))?;
    let data =
        PathBuf::from(std::env::var_os("TAILORQ_TEST_DATA")?).join("wikitext2").join("wiki.train.sample.raw.txt");
    Some((model, std::fs::read_to_string(data).ok()?))
}

/// Name, and what to run with which settings.
type Case = (String, &'static dyn Quantizer, LayerSettings);

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for (bits, group) in [(Bits::Two, 128), (Bits::Two, 64), (Bits::Two, 32), (Bits::Three, 128)] {
        let name = format!("GPTQ {} bits, group {group}", bits.count());
        cases.push((name, &Gptq, LayerSettings::new(bits, Group::Inputs(group))));
    }
    let base = AlignedSettings::default();
    let by_hessian = AlignedSettings { saliency: Saliency::Hessian, ..base };
    let eight = AlignedSettings { tile_bits: TileBits::Eight, ..base };
    let paper = AlignedSettings::paper;
    let all = [
        ("aligned 5 %", base),
        ("aligned 5 %, saliency by the Hessian", by_hessian),
        ("aligned 5 %, over the matrix", AlignedSettings { scope: Scope::Matrix, ..base }),
        ("aligned 8 bits, 2.78 %", AlignedSettings { share: 0.05 / 1.8, ..eight }),
        ("aligned 7 %", AlignedSettings { share: 0.07, ..base }),
        ("aligned 19 %", AlignedSettings { share: 0.19, ..base }),
        ("paper, means, K = 50", paper(50, Salient::Mean4)),
        ("paper, means, K = 100", paper(100, Salient::Mean4)),
        ("means by gain, K = 50", AlignedSettings { saliency: Saliency::Gain, ..paper(50, Salient::Mean4) }),
        ("paper, 8 bits, K = 50", paper(50, Salient::EightBit)),
        ("paper, 8 bits, K = 50, no grouping", AlignedSettings { unit: Unit::Weight, ..paper(50, Salient::EightBit) }),
        ("paper, 8 bits, K = 100", paper(100, Salient::EightBit)),
    ];
    for (name, aligned) in all {
        let settings = LayerSettings { aligned: Some(aligned), ..LayerSettings::new(Bits::Two, Group::Inputs(128)) };
        cases.push((name.into(), &Aligned { by_task: false }, settings));
    }
    for (name, group, clip) in [
        ("aligned 5 %, group 64", 64, Clip::Magnitude),
        ("aligned 5 %, group row", 0, Clip::Magnitude),
        ("aligned 5 %, clip by the Hessian", 128, Clip::Hessian),
    ] {
        let group = if group == 0 { Group::Row } else { Group::Inputs(group) };
        let settings = LayerSettings { aligned: Some(base), clip, ..LayerSettings::new(Bits::Two, group) };
        cases.push((name.into(), &Aligned { by_task: false }, settings));
    }
    cases
}

/// Rotated bases, on affine grids and codebooks.
fn rotations() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for (bits, group) in [(Bits::Two, Group::Inputs(128)), (Bits::Two, Group::Row), (Bits::Three, Group::Inputs(128))] {
        let plain = LayerSettings::new(bits, group);
        let by_width = TransformSettings::hadamard(0);
        let overlapping = TransformSettings { block: Some(512), ..by_width };
        let codebook = |s: LayerSettings| {
            let layout = Layout { symmetric: true, ..s.layout };
            LayerSettings { layout, grid: GridKind::Codebook, ..s }
        };
        let rotated = |t| LayerSettings { transform: Some(t), ..plain };
        let all = [
            ("affine", plain),
            ("codebook", codebook(plain)),
            ("rotated, affine", rotated(by_width)),
            ("rotated in blocks of 512, affine", rotated(overlapping)),
            ("rotated, codebook", codebook(rotated(by_width))),
            ("rotated in blocks of 512, codebook", codebook(rotated(overlapping))),
        ];
        for (name, settings) in all {
            cases.push((format!("GPTQ {} bits, group {group}, {name}", bits.count()), &Gptq, settings));
        }
    }
    cases
}

/// Runs all cases on every layer and returns the first one's result.
struct Compare {
    cases: Vec<Case>,
    /// By case: bits a weight, relative mean-square error, and loss over that of the first case, of each layer.
    found: Mutex<Vec<Vec<[f64; 3]>>>,
}

impl Quantizer for Compare {
    fn name(&self) -> &'static str {
        "compare"
    }

    fn needs(&self) -> Needs {
        Needs { hessian: true, ..Needs::default() }
    }

    fn quantize(
        &self,
        device: &dyn Device,
        weights: &Matrix,
        stats: &LayerStats<'_>,
        _: &LayerPlan,
    ) -> Result<Quantized, QuantError> {
        let mut first: Option<Quantized> = None;
        for ((_, quantizer, settings), found) in self.cases.iter().zip(self.found.lock().unwrap().iter_mut()) {
            let done = quantizer.quantize(device, weights, stats, &(*settings).into())?;
            let reference = first.as_ref().unwrap_or(&done).proxy_loss.unwrap();
            let n = weights.data().len() as f64;
            let bits = done.counted_bits.map_or(8.0 * done.weight.reader().bytes() as f64, |b| b as f64) / n;
            found.push([bits, done.relative_error.powi(2), done.proxy_loss.unwrap() / reference]);
            first.get_or_insert(done);
        }
        Ok(first.unwrap())
    }
}

#[test]
#[ignore = "a measurement"]
fn salient_tiles_of_real_layers() {
    measure(cases());
}

#[test]
#[ignore = "a measurement"]
fn rotations_of_real_layers() {
    measure(rotations());
}

fn measure(cases: Vec<Case>) {
    let Some((path, text)) = inputs() else {
        println!("skipped: TAILORQ_TEST_MODELS and TAILORQ_TEST_DATA name no GGUF file and no WikiText-2");
        return;
    };
    let opened = tailorq_model::open(&path.display().to_string()).unwrap();
    let (model, device) = (&opened.model, tailorq_kernels::cpu());
    let head: String = text.chars().take(40_000).collect();
    let ids = opened.tokenizer.encode(&head, true).unwrap();
    let samples: Vec<Vec<u32>> = ids.chunks_exact(512).take(12).map(<[u32]>::to_vec).collect();
    let compare = Compare { found: Mutex::new(vec![Vec::new(); cases.len()]), cases };
    let plan_of = |_| Ok(LayerSettings::new(Bits::Two, Group::Inputs(128)).into());
    let run = BlockQuantizer {
        device: device.as_ref(),
        model,
        quantizer: &compare,
        plan_of: &plan_of,
        token_energies: None,
        squares: None,
        drift: tailorq_quant::DriftCorrection::default(),
        shrink: 0.0,
        true_sequential: false,
        token_weight: TokenWeight::default(),
    };
    let mut acts = Activations::embed(device.as_ref(), model, &samples).unwrap();
    let mut names = Vec::new();
    for (block_idx, block) in model.blocks.iter().enumerate().take(BLOCKS[BLOCKS.len() - 1] + 1) {
        if BLOCKS.contains(&block_idx) {
            // A copy: what follows sees the original block.
            let done =
                run.quantize_block(block_idx, Some(&mut acts.clone()), &mut |_| ControlFlow::Continue(())).unwrap();
            names.extend(done.layers.iter().map(|l| l.id.to_string()));
        }
        advance(device.as_ref(), model, (block_idx, block), &mut acts);
    }
    report(&compare, &names);
}

fn report(compare: &Compare, names: &[String]) {
    let found = compare.found.lock().unwrap();
    println!("| method | bits a weight | mean-square error | loss of the output (geometric mean) | from | to |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for ((name, ..), layers) in compare.cases.iter().zip(found.iter()) {
        let mean = |i: usize| layers.iter().map(|l| l[i]).sum::<f64>() / layers.len() as f64;
        let loss = (layers.iter().map(|l| l[2].ln()).sum::<f64>() / layers.len() as f64).exp();
        let least = layers.iter().map(|l| l[2]).fold(f64::INFINITY, f64::min);
        let most = layers.iter().map(|l| l[2]).fold(0.0, f64::max);
        println!("| {name} | {:.3} | {:.4} | {loss:.3} | {least:.3} | {most:.3} |", mean(0), mean(1));
    }
    let of = |wanted: &&str| compare.cases.iter().position(|c| &c.0 == wanted);
    let shown = [
        "GPTQ 2 bits, group 128",
        "aligned 5 %",
        "paper, means, K = 50",
        "paper, means, K = 100",
        "paper, 8 bits, K = 50",
    ];
    if !shown.iter().all(|s| of(s).is_some()) {
        return;
    }
    println!("\nmean-square error of each tensor over its mean square: {}", shown.join("; "));
    for (i, layer) in names.iter().enumerate() {
        let errors: Vec<String> = shown.iter().filter_map(of).map(|case| format!("{:.4}", found[case][i][1])).collect();
        println!("| {layer} | {} |", errors.join(" | "));
    }
}
