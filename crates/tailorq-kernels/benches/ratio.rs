//! Our operations against the bare crate `gemm` on the same shapes, turn by turn, so that a busy machine slows both
//! alike. Prints the best time of each, GFLOP/s and their ratio: `cargo bench -p tailorq-kernels --bench ratio [-- FILTER]`.
//!
//! With `--processor-time` (Unix) everything runs on one thread and its time on the processor counts, not the clock's:
//! for machines that others use at the same time.
#![allow(clippy::print_stdout, reason = "a benchmark is a program")]

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::Instant;
use tailorq_kernels::{AttentionShape, AttentionSpan, Device, KeyValues, cpu};
use tailorq_tensor::{Bits, Group, Layout, Matrix, PackedMatrix, Rng, Weight};

/// Turns of each measurement.
const TURNS: usize = 12;

/// Which seconds count.
#[derive(Clone, Copy)]
enum Clock {
    Wall(Instant),
    /// This thread's time on the processor.
    Processor,
}

/// Set once, by the arguments.
static CLOCK: OnceLock<Clock> = OnceLock::new();

/// Seconds since some moment.
fn now() -> f64 {
    match CLOCK.get().expect("set in main") {
        Clock::Wall(start) => start.elapsed().as_secs_f64(),
        Clock::Processor => {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: `time` is valid for the call to fill.
            let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
            assert_eq!(failed, 0, "the system counts a thread's time");
            time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
        }
    }
}

/// Best of several turns of two functions, in seconds.
fn race(mut ours: impl FnMut(), mut bare: impl FnMut()) -> (f64, f64) {
    let mut best = (f64::INFINITY, f64::INFINITY);
    for _ in 0..TURNS {
        let start = now();
        ours();
        let middle = now();
        bare();
        best = (best.0.min(middle - start), best.1.min(now() - middle));
    }
    best
}

/// `y[n, rows] = x[n, cols] W^T` by the crate alone, with its own threads.
fn bare_gemm(x: &[f32], w: &[f32], y: &mut [f32], n: usize, rows: usize, cols: usize) {
    assert!(x.len() == n * cols && w.len() == rows * cols && y.len() == n * rows);
    let (rs, threads) = (cols as isize, gemm::Parallelism::Rayon(0));
    // SAFETY: the three matrices fill their slices, and y is mutable and so apart from x and w.
    unsafe {
        gemm::gemm(
            n,
            rows,
            cols,
            y.as_mut_ptr(),
            1,
            rows as isize,
            false,
            x.as_ptr(),
            1,
            rs,
            w.as_ptr(),
            rs,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}

fn normal(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.normal()).collect()
}

fn packed(rng: &mut Rng, rows: usize, cols: usize, bits: Bits) -> Weight {
    let layout = Layout { symmetric: true, ..Layout::new(bits, Group::Inputs(128)) };
    let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(usize::from(bits.max_code()) + 1) as u8).collect();
    let scales = vec![half::f16::from_f32(0.01); rows * layout.group.count(cols)];
    PackedMatrix::pack(rows, cols, layout, &codes, &scales, &[]).expect("scales are finite").into()
}

fn report(name: &str, flops: f64, (ours, bare): (f64, f64)) {
    let rate = |seconds: f64| flops / seconds / 1e9;
    println!(
        "{name:36} ours {:9.3} ms {:7.1} GF/s   gemm {:9.3} ms {:7.1} GF/s   ratio {:.3}",
        ours * 1e3,
        rate(ours),
        bare * 1e3,
        rate(bare),
        bare / ours
    );
}

fn linear(device: &dyn Device, rng: &mut Rng, n: usize, rows: usize, cols: usize, bits: Option<Bits>) {
    let (x, dense) = (normal(rng, n * cols), Matrix::from_vec(rows, cols, normal(rng, rows * cols)));
    let w: Weight = match bits {
        Some(bits) => packed(rng, rows, cols, bits),
        None => dense.clone().into(),
    };
    let (mut y, mut z) = (vec![0.0; n * rows], vec![0.0; n * rows]);
    let times = race(
        || device.linear(black_box(&x), &w, None, &mut y),
        || bare_gemm(black_box(&x), dense.data(), &mut z, n, rows, cols),
    );
    let kind = bits.map_or("f32".into(), |b| format!("{} bit", b.count()));
    report(&format!("linear {n} x {cols} -> {rows} {kind}"), 2.0 * (n * rows * cols) as f64, times);
}

/// X^T X by the crate computes both triangles; flops count the lower one.
fn gram(device: &dyn Device, rng: &mut Rng, n: usize, cols: usize) {
    let x = normal(rng, n * cols);
    let transposed: Vec<f32> = (0..cols * n).map(|i| x[(i % n) * cols + i / n]).collect();
    let (mut h, mut z) = (Matrix::zeros(cols, cols), vec![0.0; cols * cols]);
    let times = race(
        || device.gram(black_box(&x), &mut h),
        || bare_gemm(black_box(&transposed), &transposed, &mut z, cols, cols, n),
    );
    report(&format!("gram {n} x {cols}"), (n * cols * (cols + 1)) as f64, times);
}

/// Against a product with as many operations: (1/3 + 1/3) n^3 of Cholesky and triangular inverse.
fn cholesky(device: &dyn Device, rng: &mut Rng, cols: usize) {
    let x = normal(rng, 2 * cols * cols);
    let mut h = Matrix::zeros(cols, cols);
    device.gram(&x, &mut h);
    let a = normal(rng, cols * cols);
    let mut z = vec![0.0; cols * cols / 3];
    let times = race(
        || {
            let mut u = h.clone();
            device.inverse_cholesky_upper(&mut u).expect("the ridge is positive");
        },
        || bare_gemm(black_box(&a), &a[..cols / 3 * cols], &mut z[..cols * (cols / 3)], cols, cols / 3, cols),
    );
    report(&format!("inverse cholesky {cols}"), 2.0 / 3.0 * (cols as f64).powi(3), times);
}

/// Causal attention of one prompt, against one product with as many operations.
fn attention(device: &dyn Device, rng: &mut Rng, n: usize, heads: usize, kv_heads: usize, past: usize) {
    let shape = AttentionShape { heads, kv_heads, head_dim: 64, window: None };
    let (q, all) = (normal(rng, n * heads * 64), n + past);
    let (keys, values) = (normal(rng, all * kv_heads * 64), normal(rng, all * kv_heads * 64));
    let mut y = vec![0.0; n * heads * 64];
    let seen: usize = (0..n).map(|i| past + i + 1).sum();
    let rows = (4 * heads * 64 * seen / (2 * n * 512)).max(1);
    let (a, mut z) = (normal(rng, n.max(rows) * 512), vec![0.0; n * rows]);
    let times = race(
        || {
            let span = AttentionSpan { rows: 0..n, source: KeyValues::Rows { keys: &keys, values: &values }, past };
            device.attention(shape, black_box(&q), &[span], &mut y);
        },
        || bare_gemm(black_box(&a[..n * 512]), &a[..rows * 512], &mut z, n, rows, 512),
    );
    report(&format!("attention {n} after {past}, {heads}/{kv_heads}"), (4 * heads * 64 * seen) as f64, times);
}

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let clock = if std::env::args().any(|a| a == "--processor-time") {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread();
        pool.build_global().expect("the first pool");
        Clock::Processor
    } else {
        Clock::Wall(Instant::now())
    };
    assert!(CLOCK.set(clock).is_ok(), "set here alone");
    let wanted = |name: &str| name.contains(filter.as_str());
    let (device, rng) = (cpu(), &mut Rng::new(1));
    let device = &*device;
    println!("{}, {} threads", device.name(), rayon::current_num_threads());
    if wanted("linear") {
        for (n, cols, rows) in [
            (2048, 896, 4864),
            (2048, 4864, 896),
            (2048, 896, 896),
            (2048, 4096, 4096),
            (2048, 896, 128),
            (2048, 576, 576),
        ] {
            linear(device, rng, n, rows, cols, None);
        }
        linear(device, rng, 2048, 4864, 896, Some(Bits::Three));
        linear(device, rng, 128, 4864, 896, None);
        linear(device, rng, 16, 4864, 896, None);
    }
    if wanted("decode") {
        for n in [1, 2, 4, 5, 8, 16] {
            linear(device, rng, n, 4864, 896, None);
            linear(device, rng, n, 4864, 896, Some(Bits::Two));
            linear(device, rng, n, 4864, 896, Some(Bits::Three));
        }
    }
    if wanted("gram") {
        gram(device, rng, 2048, 896);
        gram(device, rng, 2048, 4864);
    }
    if wanted("cholesky") {
        cholesky(device, rng, 896);
        cholesky(device, rng, 4864);
    }
    if wanted("attention") {
        attention(device, rng, 2048, 14, 2, 0);
        attention(device, rng, 2048, 9, 3, 0);
        attention(device, rng, 1, 14, 2, 2047);
    }
}
