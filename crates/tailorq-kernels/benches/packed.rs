//! Matrix times vector on packed weights against the read bandwidth of the same threads in the same run.
//!
//! `cargo bench -p tailorq-kernels --bench packed [-- THREADS... NAMES... SHAPES...]`: counts of threads, parts of names of
//! cases, shapes as `896x4864`; `cached` takes one matrix of few rows again and again, and prints the best round: what the
//! arithmetic takes where memory does not matter; `avx-vnni`, `avx2` or `portable` take that variant of the device. For each shape and layout: enough distinct matrices that
//! the cache holds none of them, read once each inside one parallel region in which every thread has its share of the rows.
//! Rounds of reading and of multiplying alternate; medians are printed, of the share that each round has of the read before it.
#![allow(clippy::print_stdout, reason = "a benchmark is a program")]

mod matrices;

use matrices::{CASES, Case, SHAPES, matrix};
use std::hint::black_box;
use std::sync::{Arc, Barrier};
use std::time::Instant;
use tailorq_kernels::{Activations, Device, cpu_variants_with, cpu_with, read_all};
use tailorq_tensor::{Rng, Weight};

/// Bytes of the matrices of one program.
const WORKING_SET: usize = 192 << 20;
/// Bytes of the buffer that is read to measure the bandwidth.
const BUFFER: usize = 512 << 20;
/// Bytes of the matrix that lies in the second-level cache, and how often a round reads it.
const CACHED: (usize, usize) = (1 << 20, 40);
/// Variants of the device that can be asked for.
const VARIANTS: [&str; 3] = ["avx-vnni", "avx2", "portable"];
/// Rounds; medians of them are printed.
const ROUNDS: usize = 9;

/// Seconds of `work(thread)` on every thread of a pool at once, from the first start to the last end. Operations that a
/// thread calls may divide themselves among the threads; as all are busy, nobody takes the other half.
fn region(pool: &rayon::ThreadPool, work: impl Fn(usize) + Sync) -> f64 {
    let barrier = Barrier::new(pool.current_num_threads());
    let times = pool.broadcast(|context| {
        barrier.wait();
        let start = Instant::now();
        work(context.index());
        (start, Instant::now())
    });
    let first = times.iter().map(|t| t.0).min().expect("a thread");
    let last = times.iter().map(|t| t.1).max().expect("a thread");
    (last - first).as_secs_f64()
}

/// Seconds in which all threads of a pool together read the buffer.
fn read(pool: &rayon::ThreadPool, buffer: &[f32]) -> f64 {
    pool.install(|| {
        let start = Instant::now();
        black_box(read_all(buffer));
        start.elapsed().as_secs_f64()
    })
}

fn multiply(device: &dyn Device, all: &[Weight], x: &[f32], y: &mut [f32], thread: usize, threads: usize) {
    for w in all {
        let share = w.rows().div_ceil(threads).next_multiple_of(4);
        let rows = (thread * share).min(w.rows())..((thread + 1) * share).min(w.rows());
        let n = rows.len();
        device.linear_rows(x, w, None, rows, &mut y[..n]);
    }
    black_box(y);
}

/// `ROWSxCOLS`.
fn shape(word: &str) -> Option<(usize, usize)> {
    let (rows, cols) = word.split_once('x')?;
    Some((rows.parse().ok()?, cols.parse().ok()?))
}

/// GB/s of one thread from the second-level cache.
fn cached(device: &dyn Device, rng: &mut Rng, case: &Case, (rows, cols): (usize, usize)) {
    let rows = rows.min(CACHED.0 * 4 / cols);
    let w = matrix(rng, case, rows, cols);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
    let (x, mut y) = ((0..cols).map(|_| rng.normal()).collect::<Vec<f32>>(), vec![0.0; rows]);
    let best = pool.install(|| {
        let round = |_| {
            let start = Instant::now();
            for _ in 0..CACHED.1 {
                device.linear_rows(&x, &w, None, 0..rows, &mut y);
            }
            start.elapsed().as_secs_f64()
        };
        (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min)
    });
    let bytes = (CACHED.1 * w.reader().bytes()) as f64;
    println!("{:34} {rows:5} x {cols:5}  cached  {:6.1} GB/s", case.name, bytes / best / 1e9);
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What the command line asks for.
struct Arguments {
    threads: Vec<usize>,
    shapes: Vec<(usize, usize)>,
    /// Parts of names of cases; all, when there are none.
    names: Vec<String>,
    device: Arc<dyn Device>,
    cached: bool,
}

impl Arguments {
    fn read() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let device = cpu_with(Activations::Int8);
        let mut all = Arguments { threads: vec![], shapes: vec![], names: vec![], device, cached: false };
        for word in std::env::args().skip(1).filter(|a| !a.starts_with('-')) {
            if let Ok(threads) = word.parse() {
                all.threads.push(threads);
            } else if let Some(shape) = shape(&word) {
                all.shapes.push(shape);
            } else if VARIANTS.contains(&word.as_str()) {
                let variants = cpu_variants_with(Activations::Int8);
                let variant = variants.into_iter().find(|d| d.name().contains(&word));
                all.device = variant.expect("a variant that this processor has");
            } else if word == "cached" {
                all.cached = true;
            } else {
                all.names.push(word);
            }
        }
        if all.threads.is_empty() {
            all.threads = vec![1, cores.min(2)];
        }
        all
    }

    fn wants(&self, case: &Case) -> bool {
        self.names.is_empty() || self.names.iter().any(|n| case.name.contains(n.as_str()))
    }
}

/// From memory, beside reads of it.
fn cold(arguments: &Arguments, rng: &mut Rng, buffer: &[f32], case: &Case, (rows, cols): (usize, usize)) {
    let first = matrix(rng, case, rows, cols);
    let n = WORKING_SET.div_ceil(first.reader().bytes());
    let all: Vec<Weight> = (1..n).map(|_| matrix(rng, case, rows, cols)).chain([first]).collect();
    let bytes: usize = all.iter().map(|w| w.reader().bytes()).sum();
    let x: Vec<f32> = (0..cols).map(|_| rng.normal()).collect();
    for &threads in &arguments.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        let (mut reads, mut products, mut shares) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let read = BUFFER as f64 / 1e9 / read(&pool, buffer);
            let seconds = region(&pool, |thread| {
                let mut y = vec![0.0; rows];
                multiply(&*arguments.device, &all, &x, &mut y, thread, threads);
            });
            let product = bytes as f64 / 1e9 / seconds;
            reads.push(read);
            products.push(product);
            shares.push(100.0 * product / read);
        }
        let (read, product, share) = (median(reads), median(products), median(shares));
        println!(
            "{:34} {rows:5} x {cols:5}  {threads} thread(s)  {product:6.1} of {read:6.1} GB/s  {share:4.0} %",
            case.name
        );
    }
}

fn main() {
    let (arguments, mut rng) = (Arguments::read(), Rng::new(1));
    let buffer: Vec<f32> = (0..BUFFER / size_of::<f32>()).map(|i| i as f32).collect();
    println!(
        "{}; medians of {ROUNDS} rounds; GB/s of bytes stored, and share of the read bandwidth beside it",
        arguments.device.name()
    );
    for case in CASES.iter().filter(|case| arguments.wants(case)) {
        for shape in SHAPES.into_iter().filter(|s| arguments.shapes.is_empty() || arguments.shapes.contains(s)) {
            match arguments.cached {
                true => cached(&*arguments.device, &mut rng, case, shape),
                false => cold(&arguments, &mut rng, &buffer, case, shape),
            }
        }
    }
}
