//! Matrix times vector on packed weights against the read bandwidth of the same threads in the same run.
//!
//! `cargo bench -p tailorq-kernels --bench packed [-- THREADS... NAMES... SHAPES...]`: counts of threads, parts of names of
//! cases, shapes as `896x4864`; `cached` takes one matrix of few rows again and again, and prints the best round: what the
//! arithmetic takes where memory does not matter. For each shape and layout: enough distinct matrices that
//! the cache holds none of them, read once each inside one parallel region in which every thread has its share of the rows.
//! Rounds of all programs alternate; medians are printed.
#![allow(clippy::print_stdout, reason = "a benchmark is a program")]

use half::f16;
use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;
use tailorq_kernels::{Activations, Device, cpu_with, read_all};
use tailorq_tensor::{
    Bits, ElementCorrections, Group, Layout, PackedMatrix, PackedParts, Rng, SharedBytes, TILE, TileBits,
    TileCorrection, TileCorrections, Weight,
};

/// Bytes of the matrices of one program.
const WORKING_SET: usize = 192 << 20;
/// Bytes of the buffer that is read to measure the bandwidth.
const BUFFER: usize = 512 << 20;
/// Bytes of the matrix that lies in the second-level cache, and how often a round reads it.
const CACHED: (usize, usize) = (1 << 20, 40);
/// Rounds; medians of them are printed.
const ROUNDS: usize = 9;

struct Case {
    name: &'static str,
    bits: Bits,
    group: usize,
    tiles: f64,
    elements: f64,
}

const CASES: [Case; 5] = [
    Case { name: "2 bit, group 128", bits: Bits::Two, group: 128, tiles: 0.0, elements: 0.0 },
    Case { name: "2 bit, group 64", bits: Bits::Two, group: 64, tiles: 0.0, elements: 0.0 },
    Case { name: "2 bit, 2 % tiles, 0.35 % elements", bits: Bits::Two, group: 128, tiles: 0.02, elements: 0.0035 },
    Case { name: "3 bit, group 128", bits: Bits::Three, group: 128, tiles: 0.0, elements: 0.0 },
    Case { name: "4 bit, group 64", bits: Bits::Four, group: 64, tiles: 0.0, elements: 0.0 },
];

/// (outputs, inputs).
const SHAPES: [(usize, usize); 6] =
    [(4864, 896), (896, 4864), (8960, 1536), (1536, 8960), (18944, 3584), (3584, 18944)];

fn matrix(rng: &mut Rng, case: &Case, rows: usize, cols: usize) -> Weight {
    let layout = Layout { bits: case.bits, group: Group::Inputs(case.group), symmetric: false };
    let tiles = cols.div_ceil(TILE);
    let words: Vec<u32> = (0..rows * tiles * case.bits.words_per_tile()).map(|_| rng.next_u64() as u32).collect();
    let highs: Vec<u16> = (0..rows * tiles).map(|_| rng.next_u64() as u16).collect();
    let groups = layout.group.count(cols);
    let scales: Vec<f16> = (0..rows * groups).map(|_| f16::from_f32(0.01 + rng.uniform() as f32 * 0.01)).collect();
    let zeros: Vec<u8> = (0..rows * layout.zero_bytes_per_row(cols)).map(|_| rng.next_u64() as u8).collect();
    let parts = PackedParts {
        codes: SharedBytes::from_vec(words),
        codes_high: (case.bits == Bits::Three).then(|| SharedBytes::from_vec(highs)),
        scales: SharedBytes::from_vec(scales),
        zeros: Some(SharedBytes::from_vec(zeros)),
    };
    let mut m = PackedMatrix::new(rows, cols, layout, parts).expect("a valid matrix");
    if case.tiles > 0.0 {
        let mut all = vec![Vec::new(); rows];
        for row in &mut all {
            for tile in (0..tiles).filter(|_| rng.uniform() < case.tiles).collect::<Vec<_>>() {
                let codes = std::array::from_fn(|_| rng.below(256) as u8 as i8);
                row.push(TileCorrection { tile, scale: f16::from_f32(0.001), codes });
            }
        }
        m = m
            .with_tiles(TileCorrections::from_rows(cols, TileBits::Eight, &all).expect("valid tiles"))
            .expect("same shape");
    }
    if case.elements > 0.0 {
        let mut all = vec![Vec::new(); rows];
        for row in &mut all {
            for col in (0..cols).filter(|_| rng.uniform() < case.elements).collect::<Vec<_>>() {
                row.push((col, f16::from_f32(0.1)));
            }
        }
        m = m.with_elements(ElementCorrections::from_rows(cols, &all).expect("valid elements")).expect("same shape");
    }
    m.into()
}

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
fn cached(device: &dyn Device, rng: &mut Rng, case: &Case, rows: usize, cols: usize) {
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

fn main() {
    // Numbers are counts of threads; a word chooses cases by their names.
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let arguments: Vec<usize> = words.iter().filter_map(|a| a.parse().ok()).collect();
    let shapes: Vec<_> = words.iter().filter_map(|a| shape(a)).collect();
    let names: Vec<&String> =
        words.iter().filter(|a| !(a.parse::<usize>().is_ok() || shape(a).is_some() || *a == "cached")).collect();
    let chosen = |case: &&Case| names.is_empty() || names.iter().any(|n| case.name.contains(n.as_str()));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = if arguments.is_empty() { vec![1, cores.min(2)] } else { arguments };
    let (device, mut rng) = (cpu_with(Activations::Int8), Rng::new(1));
    if words.iter().any(|w| w == "cached") {
        for case in CASES.iter().filter(chosen) {
            for (rows, cols) in SHAPES.into_iter().filter(|s| shapes.is_empty() || shapes.contains(s)) {
                cached(&*device, &mut rng, case, rows, cols);
            }
        }
        return;
    }
    let buffer: Vec<f32> = (0..BUFFER / size_of::<f32>()).map(|i| i as f32).collect();
    println!(
        "{}; medians of {ROUNDS} rounds; GB/s of bytes stored, and share of the read bandwidth beside it",
        device.name()
    );
    for case in CASES.iter().filter(chosen) {
        for (rows, cols) in SHAPES.into_iter().filter(|s| shapes.is_empty() || shapes.contains(s)) {
            let first = matrix(&mut rng, case, rows, cols);
            let n = WORKING_SET.div_ceil(first.reader().bytes());
            let all: Vec<Weight> = (1..n).map(|_| matrix(&mut rng, case, rows, cols)).chain([first]).collect();
            let bytes: usize = all.iter().map(|w| w.reader().bytes()).sum();
            let x: Vec<f32> = (0..cols).map(|_| rng.normal()).collect();
            for &threads in &threads {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
                let (mut reads, mut products) = (Vec::new(), Vec::new());
                for _ in 0..ROUNDS {
                    reads.push(BUFFER as f64 / 1e9 / read(&pool, &buffer));
                    let seconds = region(&pool, |thread| {
                        let mut y = vec![0.0; rows];
                        multiply(&*device, &all, &x, &mut y, thread, threads);
                    });
                    products.push(bytes as f64 / 1e9 / seconds);
                }
                let (read, product) = (median(reads), median(products));
                println!(
                    "{:34} {rows:5} x {cols:5}  {threads} thread(s)  {product:6.1} of {read:6.1} GB/s  {:4.0} %",
                    case.name,
                    100.0 * product / read
                );
            }
        }
    }
}
