//! Matrix times vector on packed weights against the bandwidth of a copy and against cuBLAS, and tokens a second of a model of
//! the shape of Llama 2 7B with random weights.
//!
//! `cargo bench -p tailorq-cuda --bench decode [-- gemv|model|rotated|bf16|8192x28672 ...]`; a shape asks for products of that shape
//! alone. Matrices are read one after the other in a graph,
//! from so many copies that the L2 cache holds none of them when its turn comes again. A copy on the device counts the bytes
//! that it reads and those that it writes.
#![allow(clippy::print_stdout, reason = "a benchmark is a program")]

use cudarc::cublas::{CudaBlas, result as cublas, sys as blas_sys};
use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use half::f16;
use rayon::prelude::*;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Instant;
use tailorq_cuda::decode::{Decoder, DecoderOptions, DenseWeights, Products};
use tailorq_model::{Block, Linear, Model, ModelConfig, RopeScaling, arch};
use tailorq_tensor::{
    Bits, DType, DenseRows, ElementCorrections, Group, InputTransform, Layout, PackedMatrix, PackedParts, Rng,
    SharedBytes, Slot, TILE, TileBits, TileCorrection, TileCorrections, TransformKind, TransformSpec, Weight,
};

/// Bytes of all copies of a matrix at least.
const WORKING_SET: usize = 2 << 30;
/// Tokens of a measured generation.
const TOKENS: usize = 256;

/// Outputs and inputs of the products.
const SHAPES: [(usize, usize); 4] = [(8192, 28672), (4096, 14336), (18944, 3584), (896, 4864)];

struct Case {
    name: &'static str,
    bits: Bits,
    /// Share of tiles and of elements that are corrected.
    tiles: f64,
    elements: f64,
    rotated: bool,
}

const PLAIN: Case = Case { name: "2 bit", bits: Bits::Two, tiles: 0.0, elements: 0.0, rotated: false };

const CASES: [Case; 4] = [
    PLAIN,
    Case { name: "2 bit, 2 % tiles, 0.35 % elements", tiles: 0.02, elements: 0.0035, ..PLAIN },
    Case { name: "3 bit", bits: Bits::Three, ..PLAIN },
    Case { name: "4 bit", bits: Bits::Four, ..PLAIN },
];

/// What TACQ makes of a linear.
const TACQ: Case = Case { name: "2 bit, rotated, 0.35 % elements", elements: 0.0035, rotated: true, ..PLAIN };

fn words(rng: &mut Rng, n: usize) -> Vec<u32> {
    let seed = rng.next_u64();
    let mut all = vec![0u32; n];
    all.par_chunks_mut(1 << 16).enumerate().for_each(|(i, chunk)| {
        let mut rng = Rng::new(seed ^ (i as u64) << 20);
        chunk.iter_mut().for_each(|w| *w = rng.next_u64() as u32);
    });
    all
}

/// So many distinct numbers below `n`, ascending.
fn some(rng: &mut Rng, n: usize, share: f64) -> Vec<usize> {
    let mut all: Vec<usize> = (0..(n as f64 * share).round() as usize).map(|_| rng.below(n)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Random codes, asymmetric groups of 128; products are about as large as inputs.
fn packed(rng: &mut Rng, rows: usize, cols: usize, case: &Case) -> Weight {
    let layout = Layout::new(case.bits, Group::Inputs(128));
    let (tiles, groups) = (cols.div_ceil(TILE), layout.group.count(cols));
    let step = 2.0 / f32::from(case.bits.max_code()) / (cols as f32).sqrt();
    let scales: Vec<f16> = (0..rows * groups).map(|_| f16::from_f32(step * (0.5 + rng.uniform() as f32))).collect();
    let zero = |i: usize| case.bits.middle() - (i % 2) as u8;
    let n = layout.zero_bytes_per_row(cols);
    let mut zeros = vec![0u8; rows * n];
    for (i, row) in zeros.chunks_exact_mut(n).enumerate() {
        for at in 0..groups * case.bits.count() as usize {
            let bit = zero(i + at / case.bits.count() as usize) >> (at % case.bits.count() as usize) & 1;
            row[at / 8] |= bit << (at % 8);
        }
    }
    let highs = || words(&mut Rng::new(7), rows * tiles).into_iter().map(|w| w as u16).collect::<Vec<u16>>();
    let parts = PackedParts {
        codes: SharedBytes::from_vec(words(rng, rows * tiles * case.bits.words_per_tile())),
        codes_high: (case.bits == Bits::Three).then(|| SharedBytes::from_vec(highs())),
        scales: SharedBytes::from_vec(scales),
        zeros: Some(SharedBytes::from_vec(zeros)),
    };
    let mut m = PackedMatrix::new(rows, cols, layout, parts).expect("a valid matrix");
    if case.tiles > 0.0 {
        let one = |tile: usize, rng: &mut Rng| TileCorrection {
            tile,
            scale: f16::from_f32(0.001),
            codes: std::array::from_fn(|_| rng.below(256) as u8 as i8),
        };
        let all: Vec<Vec<_>> =
            (0..rows).map(|_| some(rng, tiles, case.tiles).into_iter().map(|t| one(t, rng)).collect()).collect();
        m = m.with_tiles(TileCorrections::from_rows(cols, TileBits::Eight, &all).expect("valid")).expect("same shape");
    }
    if case.elements > 0.0 {
        let value = f16::from_f32(0.1);
        let all: Vec<Vec<_>> =
            (0..rows).map(|_| some(rng, cols, case.elements).into_iter().map(|c| (c, value)).collect()).collect();
        m = m.with_elements(ElementCorrections::from_rows(cols, &all).expect("valid")).expect("same shape");
    }
    if case.rotated {
        let block = 1 << cols.trailing_zeros().min(12);
        let spec = TransformSpec { kind: TransformKind::Hadamard, seed: 5, block };
        m = m.with_transform(InputTransform::new(cols, spec).expect("whole blocks")).expect("as wide");
    }
    m.into()
}

/// A device beside the one under test, for what it is compared with.
struct Yardstick {
    stream: Arc<CudaStream>,
    blas: CudaBlas,
}

impl Yardstick {
    fn new() -> Self {
        let context = CudaContext::new(0).expect("a device");
        // SAFETY: everything happens on the one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().expect("a stream");
        let blas = CudaBlas::new(stream.clone()).expect("cuBLAS");
        Yardstick { stream, blas }
    }

    fn milliseconds(&self, work: impl FnOnce()) -> f32 {
        let event = || self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).expect("an event");
        let start = event();
        work();
        start.elapsed_ms(&event()).expect("a time")
    }

    /// GB/s read and written by a large copy on the device, the median of several.
    fn copy_bandwidth(&self) -> f64 {
        let len = 2usize << 30;
        let from = self.stream.alloc_zeros::<u8>(len).expect("memory");
        let mut to = self.stream.alloc_zeros::<u8>(len).expect("memory");
        let mut times: Vec<f32> =
            (0..9).map(|_| self.milliseconds(|| self.stream.memcpy_dtod(&from, &mut to).expect("a copy"))).collect();
        times.sort_by(f32::total_cmp);
        2.0 * len as f64 / f64::from(times[4]) / 1e6
    }

    /// Milliseconds of a bf16 product with one vector by cuBLAS, in a graph over several copies.
    fn bf16_gemv(&self, rows: usize, cols: usize) -> f32 {
        let copies = (WORKING_SET / (2 * rows * cols)).clamp(2, 64);
        // Numbers of both signs about 0.01.
        let bits: Vec<u16> =
            words(&mut Rng::new(3), rows * cols).into_iter().map(|w| 0x3c00 | (w & 0x80ff) as u16).collect();
        let weights: Vec<CudaSlice<u16>> =
            (0..copies).map(|_| self.stream.clone_htod(&bits).expect("memory")).collect();
        let x = self.stream.clone_htod(&bits[..cols]).expect("memory");
        let mut y = self.stream.alloc_zeros::<u16>(rows).expect("memory");
        let (x, _x) = x.device_ptr(&self.stream);
        let (y, _y) = y.device_ptr_mut(&self.stream);
        let all = || {
            for w in &weights {
                let (one, zero) = (1.0f32, 0.0f32);
                let (w, _w) = w.device_ptr(&self.stream);
                let of = |n: usize| i32::try_from(n).expect("a small size");
                // SAFETY: row-major weights are a transposed matrix for cuBLAS; all buffers have these sizes and outlive the calls.
                let done = unsafe {
                    cublas::gemm_ex(
                        *self.blas.handle(),
                        blas_sys::cublasOperation_t::CUBLAS_OP_T,
                        blas_sys::cublasOperation_t::CUBLAS_OP_N,
                        of(rows),
                        1,
                        of(cols),
                        (&raw const one).cast::<c_void>(),
                        w as *const c_void,
                        blas_sys::cudaDataType::CUDA_R_16BF,
                        of(cols),
                        x as *const c_void,
                        blas_sys::cudaDataType::CUDA_R_16BF,
                        of(cols),
                        (&raw const zero).cast::<c_void>(),
                        y as *mut c_void,
                        blas_sys::cudaDataType::CUDA_R_16BF,
                        of(rows),
                        blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                        blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                    )
                };
                done.expect("a product");
            }
        };
        all();
        self.stream.synchronize().expect("work done");
        self.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).expect("a capture");
        all();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0)).expect("a capture").expect("a graph");
        graph.launch().expect("a launch");
        let repetitions = 20;
        let time = self.milliseconds(|| (0..repetitions).for_each(|_| graph.launch().expect("a launch")));
        time / (repetitions * copies) as f32
    }
}

fn products(yardstick: &Yardstick, copy: f64, asked: &[String]) {
    let device = Products::open(0).expect("a device");
    println!(
        "\nmatrix times vector, group 128, asymmetric; % of the copy's {copy:.0} GB/s; times as fast as cuBLAS in bf16"
    );
    let is_shape = |a: &String| a.contains('x');
    for (rows, cols) in SHAPES {
        if asked.iter().any(is_shape) && !asked.contains(&format!("{rows}x{cols}")) {
            continue;
        }
        let bf16 = yardstick.bf16_gemv(rows, cols);
        let bytes = 2 * rows * cols;
        let rate = bytes as f64 / f64::from(bf16) / 1e6;
        println!("{rows} x {cols}: cuBLAS bf16 {:.2} us, {rate:.0} GB/s, {:.0} %", bf16 * 1e3, 100.0 * rate / copy);
        for case in &CASES {
            let weight = packed(&mut Rng::new(1), rows, cols, case);
            for n in [1, 8] {
                let size = weight.reader().bytes();
                let copies = (WORKING_SET / size).clamp(3, 64);
                let mut matvec = device.of(&weight, DenseWeights::F16, n, copies).expect("a product");
                let rng = &mut Rng::new(6);
                matvec.apply(&(0..n * cols).map(|_| rng.normal()).collect::<Vec<_>>());
                let mut times: Vec<f32> = (0..5).map(|_| matvec.milliseconds(10)).collect();
                times.sort_by(f32::total_cmp);
                let (time, bytes) = (times[2], matvec.bytes());
                let rate = bytes as f64 / f64::from(time) / 1e6;
                println!(
                    "  {:<34} {n} vectors: {:6.2} us, {:.1} MB ({:.3} bits), {rate:.0} GB/s, {:.0} %, {:.1} x",
                    case.name,
                    time * 1e3,
                    bytes as f64 / 1e6,
                    8.0 * bytes as f64 / (rows * cols) as f64,
                    100.0 * rate / copy,
                    bf16 / time,
                );
            }
        }
    }
}

/// The shape of Llama 2 7B. All blocks have the same numbers, but each its own memory on the device.
fn llama(weight: impl Fn(&mut Rng, usize, usize) -> Weight, head: Weight) -> Model {
    let config = ModelConfig {
        architecture: "llama",
        hidden: 4096,
        intermediate: 11008,
        n_blocks: 32,
        n_heads: 32,
        n_kv_heads: 32,
        head_dim: 128,
        vocab: 32000,
        max_positions: 4096,
        rms_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        sliding_window: None,
        tied_head: true,
        attention_bias: false,
        mlp_bias: false,
    };
    let rng = &mut Rng::new(2);
    let block = Block {
        attention_norm: vec![1.0; config.hidden],
        mlp_norm: vec![1.0; config.hidden],
        qk_norm: None,
        linears: Slot::ALL.map(|slot| {
            let (rows, cols) = config.linear_shape(slot);
            Linear { name: slot.name().into(), weight: weight(rng, rows, cols), bias: None }
        }),
    };
    let (blocks, norm) = (vec![block; config.n_blocks], vec![1.0; config.hidden]);
    Model::new(config, arch::ALL[0], head.clone(), blocks, norm, head)
}

fn generation(name: &str, model: &Model, dense: DenseWeights, copy: f64, batches: &[usize]) {
    for &batch in batches {
        let start = Instant::now();
        let capacity = 512;
        let mut decoder = Decoder::new(0, model, DecoderOptions { batch, capacity, dense }).expect("a decoder");
        let loaded = start.elapsed().as_secs_f64();
        let prompts = vec![(1..17).collect::<Vec<u32>>(); batch];
        decoder.generate_greedy(&prompts, 64, &[]).expect("a generation");
        decoder.generate_greedy(&prompts, TOKENS, &[]).expect("a generation");
        let times = decoder.times();
        let step = times.milliseconds / times.n_steps as f64;
        let config = &model.config;
        // Keys and values of the middle of the generation.
        let cache = 4 * config.n_blocks * config.kv_width() * (16 + TOKENS / 2) * batch;
        let bytes = decoder.weight_bytes() + cache;
        let floor = bytes as f64 / copy / 1e6;
        println!(
            "{name}, batch {batch}: {:.0} tokens/s, {step:.3} ms a step; {:.3} GB a step, floor {floor:.3} ms, {:.0} % of the roofline; loaded in {loaded:.1} s",
            1e3 * batch as f64 / step,
            bytes as f64 / 1e9,
            100.0 * floor / step,
        );
    }
}

fn main() {
    let asked: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wants = |name: &str| asked.is_empty() || asked.iter().any(|a| a == name);
    if let Err(error) = tailorq_cuda::open(0, tailorq_cuda::CudaOptions::default()) {
        println!("skipped: {error}");
        return;
    }
    let yardstick = Yardstick::new();
    let copy = yardstick.copy_bandwidth();
    println!("copy on the device: {copy:.0} GB/s read and written");
    if wants("gemv") || asked.iter().any(|a| a.contains('x')) {
        products(&yardstick, copy, &asked);
    }
    let of = |case: &'static Case| move |rng: &mut Rng, rows: usize, cols: usize| packed(rng, rows, cols, case);
    let head = packed(&mut Rng::new(4), 32000, 4096, &CASES[3]);
    if wants("model") {
        println!("\nthe shape of Llama 2 7B, {TOKENS} tokens after 16");
        generation("2 bit, head 4 bit", &llama(of(&PLAIN), head.clone()), DenseWeights::F16, copy, &[1, 8]);
    }
    if wants("rotated") {
        generation(
            "2 bit, rotated, 0.35 % elements, head 4 bit",
            &llama(of(&TACQ), head),
            DenseWeights::F16,
            copy,
            &[1, 8],
        );
    }
    if wants("bf16") {
        let dense = |rng: &mut Rng, rows: usize, cols: usize| -> Weight {
            // Numbers of both signs about 1 / 64.
            let words: Vec<u32> =
                words(rng, rows * cols / 2).into_iter().map(|w| 0x3c00_3c00 | w & 0x80ff_80ff).collect();
            let rows = DenseRows::new(rows, cols, DType::BF16, SharedBytes::from_vec(words)).expect("as many bytes");
            Weight::Stored(Arc::new(rows))
        };
        let head = dense(&mut Rng::new(5), 32000, 4096);
        generation("bf16", &llama(dense, head), DenseWeights::Bf16, copy, &[1]);
    }
}
