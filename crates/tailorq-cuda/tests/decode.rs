//! The kernels of decoding against the definitions: packed matrices against their values, whole models against the reference
//! device. Inputs are random and fresh for every layout.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![allow(clippy::print_stdout, reason = "a test that was skipped says so")]

use half::f16;
use tailorq_cuda::CudaError;
use tailorq_cuda::decode::{Decoder, DecoderOptions, DenseWeights, Products};
use tailorq_model::{Block, KvCache, Linear, Model, ModelConfig, RopeScaling, Workspace, arch};
use tailorq_tensor::{
    Bits, ElementCorrections, Group, InputTransform, Layout, Matrix, MeanTile, PackedMatrix, Rng, ScaleBits,
    SharedBytes, Slot, TILE, TileBits, TileCorrection, TileCorrections, TransformKind, TransformSpec, Weight,
};

/// `None`, with words about it, where there is no device.
fn on_device<T>(made: Result<T, CudaError>) -> Option<T> {
    match made {
        Ok(made) => Some(made),
        Err(CudaError::NoDriver | CudaError::NoLibrary { .. } | CudaError::NoDevice { .. }) => {
            println!("skipped: no CUDA device");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// What lies beside the base of a matrix.
#[derive(Clone, Copy, Default)]
struct Beside {
    tiles: Option<TileBits>,
    elements: bool,
    /// Block of an input transform.
    transform: Option<usize>,
}

fn packed(rng: &mut Rng, rows: usize, cols: usize, layout: Layout, codebook: bool, beside: Beside) -> PackedMatrix {
    let groups = layout.group.count(cols);
    let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(1 << layout.bits.count()) as u8).collect();
    let scale = |x: f64| layout.scales.nearest(0.01 + 0.1 * x as f32).unwrap();
    let scales: Vec<f16> = (0..rows * groups).map(|_| scale(rng.uniform())).collect();
    let zeros: Vec<u8> = match layout.symmetric {
        true => Vec::new(),
        false => (0..rows * groups).map(|_| rng.below(1 << layout.bits.count()) as u8).collect(),
    };
    let mut m = PackedMatrix::pack(rows, cols, layout, &codes, &scales, &zeros).unwrap();
    if codebook {
        let mut levels: Vec<f16> = (0..1 << layout.bits.count()).map(|_| f16::from_f32(rng.normal())).collect();
        levels.sort_by(|a, b| a.partial_cmp(b).unwrap());
        m = m.with_levels(SharedBytes::from_vec(levels)).unwrap();
    }
    if let Some(block) = beside.transform {
        let spec = TransformSpec { kind: TransformKind::Hadamard, seed: rng.next_u64(), block };
        m = m.with_transform(InputTransform::new(cols, spec).unwrap()).unwrap();
    }
    if let Some(bits) = beside.tiles {
        m = m.with_tiles(tile_corrections(rng, rows, cols, bits, |_| 0.2)).unwrap();
    }
    if beside.elements {
        m = m.with_elements(element_corrections(rng, rows, cols, |_| 0.03)).unwrap();
    }
    m
}

/// `share` of the elements of a row.
fn element_corrections(rng: &mut Rng, rows: usize, cols: usize, share: impl Fn(usize) -> f64) -> ElementCorrections {
    let row = |rng: &mut Rng, r: usize| {
        let cols: Vec<usize> = (0..cols).filter(|_| rng.uniform() < share(r)).collect();
        cols.into_iter().map(|c| (c, f16::from_f32(rng.normal()))).collect::<Vec<_>>()
    };
    let all: Vec<_> = (0..rows).map(|r| row(rng, r)).collect();
    ElementCorrections::from_rows(cols, &all).unwrap()
}

/// `share` of the tiles of a row.
fn tile_corrections(
    rng: &mut Rng,
    rows: usize,
    cols: usize,
    bits: TileBits,
    share: impl Fn(usize) -> f64,
) -> TileCorrections {
    let max = i64::from(bits.max_code());
    let all: Vec<Vec<TileCorrection>> = (0..rows)
        .map(|r| {
            let marked: Vec<usize> = (0..cols.div_ceil(TILE)).filter(|_| rng.uniform() < share(r)).collect();
            let one = |tile: usize, rng: &mut Rng| {
                let code = |c: usize, rng: &mut Rng| {
                    if tile * TILE + c < cols { (rng.below(2 * max as usize + 2) as i64 - max - 1) as i8 } else { 0 }
                };
                let codes: Vec<i8> = (0..TILE).map(|c| code(c, rng)).collect();
                let scale = f16::from_f32(0.01 * rng.uniform() as f32);
                TileCorrection { tile, scale, codes: codes.try_into().unwrap() }
            };
            marked.into_iter().map(|tile| one(tile, rng)).collect()
        })
        .collect();
    TileCorrections::from_rows(cols, bits, &all).unwrap()
}

/// `‖a - b‖ / ‖b‖`; infinite where a number is none.
fn distance(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let (mut difference, mut norm) = (0.0, 0.0);
    for (&a, &b) in a.iter().zip(b) {
        difference += (f64::from(a) - b).powi(2);
        norm += b * b;
    }
    let distance = (difference / norm.max(1e-30)).sqrt();
    if distance.is_finite() { distance } else { f64::INFINITY }
}

fn product(weight: &Weight, x: &[f32]) -> Vec<f64> {
    let w = weight.to_matrix();
    let dot = |x: &[f32], r: usize| w.row(r).iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    x.chunks_exact(w.cols()).flat_map(|x| (0..w.rows()).map(move |r| (x, r))).map(|(x, r)| dot(x, r)).collect()
}

/// Numbers that half precision holds, so that only the sums are rounded.
fn halves(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| f16::from_f32(rng.normal()).to_f32()).collect()
}

/// Sums in single precision of numbers that are exact: tolerance 2e-5. A rotation's results are rounded to half precision
/// (2^-11 each, at random): 1e-3. Results for one vector are the same bits alone and among others.
fn check(products: &Products, rng: &mut Rng, name: &str, weight: &Weight, dense: DenseWeights, tolerance: f64) {
    check_each(products, rng, name, weight, dense, tolerance, &[1, 3, 8]);
}

/// The same for these numbers of vectors, 1 first.
fn check_each(
    products: &Products,
    rng: &mut Rng,
    name: &str,
    weight: &Weight,
    dense: DenseWeights,
    tolerance: f64,
    counts: &[usize],
) {
    let (rows, cols) = (weight.rows(), weight.cols());
    let x = halves(rng, 8 * cols);
    let mut alone = Vec::new();
    for &n in counts {
        let mut matvec = products.of(weight, dense, n, 1).unwrap();
        let y = matvec.apply(&x[..n * cols]);
        let error = distance(&y, &product(weight, &x[..n * cols]));
        assert!(error < tolerance, "{name}, [{rows}, {cols}], {n} vectors: {error}");
        match n {
            1 => alone = y,
            _ => assert_eq!(alone[..], y[..rows], "{name}, [{rows}, {cols}], {n} vectors"),
        }
    }
}

/// Awkward shapes: widths that are no multiple of a group, a chunk or a tile, rows that fill no tile.
const SHAPES: [(usize, usize); 5] = [(50, 576), (33, 896), (16, 4864), (17, 100), (1, 16)];

fn layouts(bits: Bits, codebook: bool) {
    let Some(products) = on_device(Products::open(0)) else { return };
    let rng = &mut Rng::new(u64::from(bits.count()) * 2 + u64::from(codebook));
    let groups = Group::SIZES.map(Group::Inputs).into_iter().chain([Group::Row]);
    for (i, (group, symmetric)) in groups.flat_map(|g| [(g, true), (g, false)]).enumerate() {
        if codebook && !symmetric {
            continue;
        }
        // Both widths of scales, which are one on the device, with zeros and without.
        let scales = ScaleBits::ALL[(i + i / 2) % 2];
        let layout = Layout { symmetric, scales, ..Layout::new(bits, group) };
        for (rows, cols) in [SHAPES[i % 3], SHAPES[3 + i % 2]] {
            let weight = packed(rng, rows, cols, layout, codebook, Beside::default()).into();
            check(&products, rng, &format!("{layout}, codebook {codebook}"), &weight, DenseWeights::F16, 2e-5);
        }
    }
}

#[test]
fn two_bits_multiply() {
    layouts(Bits::Two, false);
}

#[test]
fn three_bits_multiply() {
    layouts(Bits::Three, false);
}

#[test]
fn four_bits_multiply() {
    layouts(Bits::Four, false);
}

#[test]
fn six_bits_multiply() {
    layouts(Bits::Six, false);
}

#[test]
fn eight_bits_multiply() {
    layouts(Bits::Eight, false);
}

#[test]
fn codebooks_of_two_bits_multiply() {
    layouts(Bits::Two, true);
}

#[test]
fn codebooks_of_three_bits_multiply() {
    layouts(Bits::Three, true);
}

#[test]
fn codebooks_of_four_bits_multiply() {
    layouts(Bits::Four, true);
}

/// Rows so long that a warp fills each of its stages several times.
#[test]
fn long_rows_multiply() {
    let Some(products) = on_device(Products::open(0)) else { return };
    let rng = &mut Rng::new(50);
    let (rows, cols) = (40, 28_672 - 128);
    for (bits, group) in [(Bits::Two, 128), (Bits::Two, 32), (Bits::Three, 64), (Bits::Four, 128), (Bits::Eight, 64)] {
        let layout = Layout::new(bits, Group::Inputs(group));
        for beside in [Beside::default(), Beside { elements: true, ..Beside::default() }] {
            let weight = packed(rng, rows, cols, layout, false, beside).into();
            check(&products, rng, &format!("{layout}, long rows"), &weight, DenseWeights::F16, 2e-5);
        }
    }
    let numbers = (0..rows * cols).map(|_| f16::from_f32(0.1 * rng.normal()).to_f32()).collect();
    let weight: Weight = Matrix::from_vec(rows, cols, numbers).into();
    check(&products, rng, "long rows, dense", &weight, DenseWeights::F16, 2e-5);
}

#[test]
fn corrections_are_added() {
    let Some(products) = on_device(Products::open(0)) else { return };
    let rng = &mut Rng::new(100);
    let layout = |group| Layout::new(Bits::Two, group);
    let cases = [
        (Some(TileBits::Eight), true, Group::Inputs(128), (50, 896)),
        (Some(TileBits::Four), false, Group::Inputs(64), (33, 576)),
        (None, true, Group::Row, (17, 4864)),
        // Columns that take more than 16 bits.
        (Some(TileBits::Eight), true, Group::Inputs(128), (5, 70_000)),
    ];
    for (tiles, elements, group, (rows, cols)) in cases {
        let beside = Beside { tiles, elements, transform: None };
        let weight = packed(rng, rows, cols, layout(group), false, beside).into();
        check(&products, rng, "corrections", &weight, DenseWeights::F16, 2e-5);
    }
}

/// Rows without corrections, rows of nothing else, a single row that has all of them, columns that take more than 16 bits.
#[test]
fn corrections_lie_anywhere() {
    let Some(products) = on_device(Products::open(0)) else { return };
    let rng = &mut Rng::new(150);
    let layout = Layout::new(Bits::Two, Group::Inputs(128));
    // Shares of the tiles and of the elements of a row.
    type Share = fn(usize) -> f64;
    let cases: [(&str, Share, Share); 5] = [
        ("a third has none", |r| if r % 3 == 0 { 0.0 } else { 0.02 }, |r| if r % 3 == 1 { 0.0 } else { 0.02 }),
        ("one row is corrected throughout", |r| if r == 20 { 1.0 } else { 0.01 }, |r| if r == 20 { 1.0 } else { 0.01 }),
        ("all in the last row", |r| if r == 39 { 0.8 } else { 0.0 }, |r| if r == 39 { 0.8 } else { 0.0 }),
        ("tiles in one row, elements in another", |r| f64::from(r == 3), |r| f64::from(r == 4)),
        ("many everywhere", |_| 0.4, |_| 0.2),
    ];
    for (name, tiles, elements) in cases {
        for cols in [896, 3584, 70_000] {
            let mut m = packed(rng, 40, cols, layout, false, Beside::default());
            m = m.with_tiles(tile_corrections(rng, 40, cols, TileBits::Eight, tiles)).unwrap();
            let weight = m.with_elements(element_corrections(rng, 40, cols, elements)).unwrap().into();
            let counts: &[usize] = if cols == 896 { &[1, 2, 3, 4, 5, 6, 7, 8] } else { &[1, 3, 8] };
            check_each(&products, rng, name, &weight, DenseWeights::F16, 2e-5, counts);
        }
    }
    // Beside all kinds of bases.
    for (i, bits) in Bits::ALL.into_iter().enumerate() {
        let layout = Layout {
            symmetric: i % 2 == 0,
            ..Layout::new(bits, [Group::Row, Group::Inputs(32), Group::Inputs(64)][i % 3])
        };
        let codebooks: &[bool] = if bits.count() <= 4 { &[false, true] } else { &[false] };
        for &codebook in codebooks {
            let layout = Layout { symmetric: codebook || layout.symmetric, ..layout };
            let beside = Beside { tiles: Some(TileBits::Four), elements: true, transform: None };
            let weight = packed(rng, 33, 1100, layout, codebook, beside).into();
            check(&products, rng, &format!("{layout}, corrected"), &weight, DenseWeights::F16, 2e-5);
        }
    }
    // So wide that what the corrections meet has no room in shared memory beside what the base meets.
    for transform in [Some(4096), None] {
        let beside = Beside { tiles: Some(TileBits::Eight), elements: true, transform };
        let weight = packed(rng, 24, 28_672, layout, false, beside).into();
        let tolerance = if transform.is_some() { 1e-3 } else { 2e-5 };
        check(&products, rng, "wide and corrected", &weight, DenseWeights::F16, tolerance);
    }
}

#[test]
fn inputs_are_rotated() {
    let Some(products) = on_device(Products::open(0)) else { return };
    let rng = &mut Rng::new(200);
    // Whole blocks, one that overlaps another, blocks smaller than a step, a width that is no multiple of a step.
    for (cols, block) in [(896, 128), (576, 64), (4864, 256), (1100, 1024), (100, 64), (64, 4), (4096, 4096), (98, 2)] {
        for (codebook, elements) in [(true, false), (false, true)] {
            let layout = Layout { symmetric: true, ..Layout::new(Bits::Two, Group::Inputs(64)) };
            let beside = Beside { tiles: elements.then_some(TileBits::Eight), elements, transform: Some(block) };
            let weight = packed(rng, 33, cols, layout, codebook, beside).into();
            check(&products, rng, &format!("rotated by {block}"), &weight, DenseWeights::F16, 1e-3);
        }
    }
}

#[test]
fn dense_weights_and_means_multiply() {
    let Some(products) = on_device(Products::open(0)) else { return };
    let rng = &mut Rng::new(300);
    for (rows, cols) in SHAPES {
        let numbers: Vec<f32> = (0..rows * cols).map(|_| half::bf16::from_f32(0.1 * rng.normal()).to_f32()).collect();
        let weight: Weight = Matrix::from_vec(rows, cols, numbers).into();
        // Numbers of bfloat16 are exact in half precision unless they are tiny.
        for dense in [DenseWeights::F16, DenseWeights::Bf16] {
            check(&products, rng, &format!("{dense:?}"), &weight, dense, 2e-5);
        }
    }
    let layout = Layout { symmetric: true, ..Layout::new(Bits::Two, Group::Inputs(128)) };
    let base = packed(rng, 33, 576, layout, false, Beside::default());
    let scales: Vec<f16> = (0..33 * 5).map(|_| f16::from_f32(0.01)).collect();
    let tiles: Vec<Vec<MeanTile>> = (0..33)
        .map(|r| (r % 3..36).step_by(3).map(|tile| MeanTile { tile, means: [3, -4, 100, 7] }).collect())
        .collect();
    let weight = base.pack_mean4(&scales, &tiles).unwrap().into();
    // Values are rounded to half precision.
    check(&products, rng, "means of four", &weight, DenseWeights::Bf16, 5e-4);
}

/// Widths of the tiny models: a head of 32, groups that are short, rows that fill no chunk.
fn config(architecture: &'static str, n_heads: usize, n_kv_heads: usize) -> ModelConfig {
    ModelConfig {
        architecture,
        hidden: 144,
        intermediate: 304,
        n_blocks: 3,
        n_heads,
        n_kv_heads,
        head_dim: 32,
        vocab: 259,
        max_positions: 1024,
        rms_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        sliding_window: None,
        tied_head: false,
        attention_bias: architecture == "qwen2",
        mlp_bias: false,
    }
}

/// A random model; `weight` makes the matrix of a slot from its shape.
fn model(config: ModelConfig, rng: &mut Rng, weight: impl Fn(&mut Rng, Slot, usize, usize) -> Weight) -> Model {
    let architecture = arch::ALL.iter().find(|a| a.name == config.architecture).unwrap();
    let dense = |rng: &mut Rng, rows: usize, cols: usize, spread: f32| -> Weight {
        let spread = spread / (cols as f32).sqrt();
        Matrix::from_vec(rows, cols, (0..rows * cols).map(|_| spread * rng.normal()).collect()).into()
    };
    let norm = |rng: &mut Rng, n: usize| -> Vec<f32> { (0..n).map(|_| 1.0 + 0.1 * rng.normal()).collect() };
    let blocks = (0..config.n_blocks)
        .map(|b| Block {
            attention_norm: norm(rng, config.hidden),
            mlp_norm: norm(rng, config.hidden),
            qk_norm: architecture.qk_norm.then(|| (norm(rng, config.head_dim), norm(rng, config.head_dim))),
            linears: Slot::ALL.map(|slot| {
                let (rows, cols) = config.linear_shape(slot);
                let has_bias = config.attention_bias && matches!(slot, Slot::Q | Slot::K | Slot::V);
                Linear {
                    name: format!("block {b} {}", slot.name()),
                    weight: weight(rng, slot, rows, cols),
                    bias: has_bias.then(|| (0..rows).map(|_| 0.2 * rng.normal()).collect()),
                }
            }),
        })
        .collect();
    let (embedding, last) = (dense(rng, config.vocab, config.hidden, 12.0), norm(rng, config.hidden));
    let head = dense(rng, config.vocab, config.hidden, 4.0);
    Model::new(config, architecture, embedding, blocks, last, head)
}

/// A packed matrix whose products are about as large as its inputs.
fn moderate(rng: &mut Rng, rows: usize, cols: usize, layout: Layout, beside: Beside) -> Weight {
    let groups = layout.group.count(cols);
    let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(1 << layout.bits.count()) as u8).collect();
    let step = 3.0 / f32::from(layout.bits.max_code()) / (cols as f32).sqrt();
    let scales: Vec<f16> = (0..rows * groups).map(|_| f16::from_f32(step * (0.5 + rng.uniform() as f32))).collect();
    let middle = layout.bits.middle();
    let zeros: Vec<u8> = match layout.symmetric {
        true => Vec::new(),
        false => (0..rows * groups).map(|_| middle - rng.below(2) as u8).collect(),
    };
    let mut m = PackedMatrix::pack(rows, cols, layout, &codes, &scales, &zeros).unwrap();
    if let Some(block) = beside.transform {
        let spec = TransformSpec { kind: TransformKind::Hadamard, seed: 5, block };
        m = m.with_transform(InputTransform::new(cols, spec).unwrap()).unwrap();
    }
    if beside.elements {
        let all: Vec<_> = (0..rows).map(|r| vec![(r % cols, f16::from_f32(0.3))]).collect();
        m = m.with_elements(ElementCorrections::from_rows(cols, &all).unwrap()).unwrap();
    }
    m.into()
}

/// The models of the tests: all architectures, layouts that agree and layouts that do not.
fn models() -> Vec<(&'static str, Model)> {
    let rng = &mut Rng::new(400);
    let layout = |bits, group, symmetric| Layout { symmetric, ..Layout::new(bits, group) };
    let plain = move |rng: &mut Rng, _: Slot, rows, cols| {
        moderate(rng, rows, cols, layout(Bits::Four, Group::Inputs(128), false), Beside::default())
    };
    let mixed = move |rng: &mut Rng, slot: Slot, rows: usize, cols: usize| {
        let bits = [Bits::Four, Bits::Three, Bits::Eight, Bits::Four, Bits::Six, Bits::Four, Bits::Three][slot.index()];
        let beside = Beside { elements: slot == Slot::V, ..Beside::default() };
        moderate(rng, rows, cols, layout(bits, Group::Inputs(64), slot != Slot::O), beside)
    };
    let rotated = move |rng: &mut Rng, slot: Slot, rows: usize, cols: usize| {
        let beside = Beside { elements: slot != Slot::Down, transform: Some(16), tiles: None };
        moderate(rng, rows, cols, layout(Bits::Four, Group::Row, true), beside)
    };
    let dense = |rng: &mut Rng, _: Slot, rows: usize, cols: usize| -> Weight {
        let spread = 1.0 / (cols as f32).sqrt();
        Matrix::from_vec(rows, cols, (0..rows * cols).map(|_| spread * rng.normal()).collect()).into()
    };
    // More numbers than a block has threads, of which some may be idle.
    let wide = ModelConfig { hidden: 1040, intermediate: 1200, n_blocks: 1, ..config("qwen2", 6, 2) };
    let windowed = ModelConfig { sliding_window: Some(150), ..config("llama", 6, 2) };
    vec![
        ("llama, 4 bits", model(config("llama", 4, 4), rng, plain)),
        ("qwen2, mixed layouts", model(config("qwen2", 6, 2), rng, mixed)),
        ("qwen3, rotated", model(config("qwen3", 7, 1), rng, rotated)),
        ("llama, dense, a window", model(windowed, rng, dense)),
        ("qwen2, mixed layouts, wide", model(wide, rng, mixed)),
    ]
}

/// Tokens and keys in half precision: logits within 1 % of the reference in norm, whatever the length.
#[test]
fn logits_are_those_of_the_reference() {
    for (name, model) in models() {
        let options = DecoderOptions { batch: 2, capacity: 320, ..DecoderOptions::default() };
        let Some(mut decoder) = on_device(Decoder::new(0, &model, options)) else { return };
        let rng = &mut Rng::new(500);
        // One token, one chunk of rows and a rest, splits of attention and the window.
        for length in [1, 12, 280] {
            let ids: Vec<u32> = (0..length).map(|_| rng.below(model.config.vocab) as u32).collect();
            decoder.reset(1);
            decoder.prefill(1, &ids).unwrap();
            let mut workspace = Workspace::new();
            let expected =
                model.read_prompt(&*tailorq_kernels::reference(), &ids, &mut KvCache::new(), &mut workspace).to_vec();
            let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
            let error = distance(&decoder.logits(1), &expected);
            let (first, last) = (&decoder.logits(1)[..4], &expected[..4]);
            assert!(error < 0.01, "{name}, {length} tokens: {error}, {first:?} for {last:?}");
        }
    }
}

/// Each token is the reference's own choice for what was generated before it, or all but equal to it.
#[test]
fn greedy_tokens_are_those_of_the_reference() {
    for (name, model) in models() {
        let options = DecoderOptions { batch: 3, capacity: 64, ..DecoderOptions::default() };
        let Some(mut decoder) = on_device(Decoder::new(0, &model, options)) else { return };
        let prompts = vec![vec![1, 2, 3], vec![77; 10], vec![200], vec![5, 4, 3, 2]];
        let outputs = decoder.generate_greedy(&prompts, 40, &[]).unwrap();
        assert!(decoder.times().n_steps == 80 && decoder.times().milliseconds > 0.0);
        let (mut equal, mut all) = (0, 0);
        for (prompt, output) in prompts.iter().zip(&outputs) {
            assert_eq!(output.len(), 40);
            let device = tailorq_kernels::reference();
            let (mut cache, mut workspace) = (KvCache::new(), Workspace::new());
            let mut logits = model.read_prompt(&*device, prompt, &mut cache, &mut workspace).to_vec();
            for &token in output {
                let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
                let spread = logits.iter().map(|l| l * l).sum::<f32>().sqrt() / (logits.len() as f32).sqrt();
                let short = logits[best] - logits[token as usize];
                assert!(short < 0.05 * spread, "{name}: {token} is {short} short of {best}");
                equal += usize::from(best == token as usize);
                all += 1;
                logits = model.step(&*device, &[token], std::slice::from_mut(&mut cache), &mut workspace).to_vec();
            }
        }
        assert!(equal * 100 >= all * 97, "{name}: {equal} of {all} tokens are the same");
    }
}

#[test]
fn a_sequence_is_the_same_alone_and_among_others() {
    for (name, model) in models() {
        let options = DecoderOptions { batch: 8, capacity: 200, ..DecoderOptions::default() };
        let Some(mut decoder) = on_device(Decoder::new(0, &model, options)) else { return };
        let rng = &mut Rng::new(600);
        let prompts: Vec<Vec<u32>> = (0..8).map(|i| (0..1 + 5 * i).map(|_| rng.below(259) as u32).collect()).collect();
        let together = decoder.generate_greedy(&prompts, 150, &[]).unwrap();
        for i in [0, 3, 7] {
            let alone = decoder.generate_greedy(&prompts[i..=i], 150, &[]).unwrap();
            assert_eq!(alone[0], together[i], "{name}, prompt {i}");
        }
        // An end token ends only its own sequence.
        let end = together[2][20];
        let ended = decoder.generate_greedy(&prompts, 150, &[end]).unwrap();
        for (all, ended) in together.iter().zip(&ended) {
            assert_eq!(*ended, all.iter().copied().take_while(|&t| t != end).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_full_sequence_ends() {
    let (_, model) = models().swap_remove(0);
    let options = DecoderOptions { batch: 2, capacity: 40, ..DecoderOptions::default() };
    let Some(mut decoder) = on_device(Decoder::new(0, &model, options)) else { return };
    let prompts = vec![vec![3; 40], vec![4; 5]];
    let outputs = decoder.generate_greedy(&prompts, 1000, &[]).unwrap();
    assert_eq!((outputs[0].len(), outputs[1].len()), (1, 36));
    let refused = [vec![vec![3; 41]], vec![vec![]], vec![vec![259]]];
    for prompts in refused {
        assert!(matches!(decoder.generate_greedy(&prompts, 4, &[]), Err(CudaError::Unsupported { .. })));
    }
}

#[test]
fn unsuitable_models_are_refused() {
    let rng = &mut Rng::new(700);
    let odd = ModelConfig { head_dim: 24, ..config("llama", 4, 4) };
    let model = model(odd, rng, |_, _, rows, cols| Matrix::zeros(rows, cols).into());
    let options = DecoderOptions { batch: 9, ..DecoderOptions::default() };
    for options in [DecoderOptions::default(), options] {
        match Decoder::new(0, &model, options) {
            Err(CudaError::Unsupported { what }) => assert!(!what.is_empty()),
            other => assert!(on_device(other).is_none(), "a decoder of odd heads"),
        }
    }
}
