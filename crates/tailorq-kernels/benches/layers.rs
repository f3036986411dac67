//! Packed linears over the shapes of real layers, with criterion's statistics: `cargo bench -p tailorq-kernels --bench layers`.
//!
//! Each iteration takes the next of so many distinct matrices that caches hold none of them. `packed.rs` has the same shapes
//! beside the read bandwidth.

mod matrices;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use matrices::{CASES, Case, SHAPES, matrix};
use std::hint::black_box;
use tailorq_kernels::{Activations, cpu_with};
use tailorq_tensor::{Rng, Weight};

/// Bytes of the matrices of one benchmark.
const WORKING_SET: usize = 128 << 20;
/// Tokens of a step of one sequence and of several, and of a prompt.
const TOKENS: [usize; 3] = [1, 4, 128];

/// Throughput counts the bytes of a matrix, corrections included.
fn linears(c: &mut Criterion) {
    let device = cpu_with(Activations::Int8);
    for case in &CASES {
        let mut group = c.benchmark_group(case.name);
        for (rows, cols) in SHAPES {
            let all = working_set(case, rows, cols);
            group.throughput(Throughput::Bytes(all[0].reader().bytes() as u64));
            let mut rng = Rng::new(2);
            for n in TOKENS {
                let x: Vec<f32> = (0..n * cols).map(|_| rng.normal()).collect();
                let (mut y, mut next) = (vec![0.0; n * rows], all.iter().cycle());
                group.bench_function(BenchmarkId::new(format!("{rows} x {cols}"), n), |b| {
                    b.iter(|| device.linear(black_box(&x), next.next().expect("an endless cycle"), None, &mut y));
                });
            }
        }
        group.finish();
    }
}

fn working_set(case: &Case, rows: usize, cols: usize) -> Vec<Weight> {
    let mut rng = Rng::new(1);
    let first = matrix(&mut rng, case, rows, cols);
    let n = WORKING_SET.div_ceil(first.reader().bytes());
    (1..n).map(|_| matrix(&mut rng, case, rows, cols)).chain([first]).collect()
}

criterion_group! {
    name = layers;
    config = Criterion::default().sample_size(10);
    targets = linears
}
criterion_main!(layers);
