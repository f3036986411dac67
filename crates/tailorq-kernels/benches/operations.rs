//! Times of the operations on the CPU device, with criterion's statistics, at the sizes of a 0.5B model.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use tailorq_kernels::{AttentionShape, AttentionSpan, KeyValues, cpu};
use tailorq_tensor::{Matrix, Rng, Weight};

/// Hidden size, size of the feed-forward, tokens of a window.
const HIDDEN: usize = 896;
const FEED_FORWARD: usize = 4864;
const TOKENS: usize = 2048;

fn normal(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.normal()).collect()
}

/// Throughput counts multiplications and additions.
fn linears(c: &mut Criterion) {
    let (device, rng) = (cpu(), &mut Rng::new(1));
    let mut group = c.benchmark_group("linear");
    for (n, cols, rows) in [(1, HIDDEN, FEED_FORWARD), (TOKENS, HIDDEN, FEED_FORWARD), (TOKENS, FEED_FORWARD, HIDDEN)] {
        let w: Weight = Matrix::from_vec(rows, cols, normal(rng, rows * cols)).into();
        let (x, mut y) = (normal(rng, n * cols), vec![0.0; n * rows]);
        group.throughput(Throughput::Elements(2 * (n * rows * cols) as u64));
        group.bench_function(format!("{n} x {cols} -> {rows}"), |b| {
            b.iter(|| device.linear(black_box(&x), &w, None, &mut y));
        });
    }
    group.finish();
}

fn statistics(c: &mut Criterion) {
    let (device, rng) = (cpu(), &mut Rng::new(2));
    let x = normal(rng, TOKENS * HIDDEN);
    let mut h = Matrix::zeros(HIDDEN, HIDDEN);
    c.bench_function("gram", |b| b.iter(|| device.gram(black_box(&x), &mut h)));
    let mut h = Matrix::zeros(HIDDEN, HIDDEN);
    device.gram(&x, &mut h);
    c.bench_function("inverse cholesky", |b| {
        b.iter_batched_ref(|| h.clone(), |h| device.inverse_cholesky_upper(h), BatchSize::LargeInput);
    });
}

fn rows(c: &mut Criterion) {
    let (device, rng) = (cpu(), &mut Rng::new(3));
    let (x, weight, mut y) = (normal(rng, TOKENS * HIDDEN), normal(rng, HIDDEN), vec![0.0; TOKENS * HIDDEN]);
    c.bench_function("rms_norm", |b| b.iter(|| device.rms_norm(black_box(&x), &weight, 1e-6, &mut y)));
    c.bench_function("swiglu", |b| b.iter(|| device.swiglu(&mut y, black_box(&x))));
    let shape = AttentionShape { heads: 14, kv_heads: 2, head_dim: 64, window: None };
    let (keys, values) = (normal(rng, TOKENS * 128), normal(rng, TOKENS * 128));
    for n in [1, TOKENS] {
        c.bench_function(&format!("attention {n} of {TOKENS}"), |b| {
            b.iter(|| {
                let span = AttentionSpan {
                    rows: 0..n,
                    source: KeyValues::Rows { keys: &keys, values: &values },
                    past: TOKENS - n,
                };
                device.attention(shape, black_box(&x[..n * HIDDEN]), &[span], &mut y[..n * HIDDEN]);
            });
        });
    }
}

criterion_group! {
    name = operations;
    config = Criterion::default().sample_size(10);
    targets = linears, statistics, rows
}
criterion_main!(operations);
