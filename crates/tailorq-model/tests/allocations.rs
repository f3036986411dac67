//! A step of decoding asks the allocator for nothing: everything it writes lies in buffers that are there.
//!
//! This file has a binary of its own, because it counts the allocations of the whole process.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::alloc::{GlobalAlloc, Layout as Bytes, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use tailorq_kernels::{Activations, Device, KvType};
use tailorq_model::testing::TinyModel;
use tailorq_model::{KvCache, Model, Workspace, open};
use tailorq_tensor::{Bits, Group, Layout, PackedMatrix, Rng, Slot, Weight};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Bytes) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller keeps the promises of this method.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Bytes) {
        // SAFETY: the caller keeps the promises of this method.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Bytes, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller keeps the promises of this method.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The counter is everybody's, so tests come one after the other.
static ALONE: Mutex<()> = Mutex::new(());

fn allocations(f: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    f();
    ALLOCATIONS.load(Ordering::SeqCst) - before
}

/// A tiny model whose linears and head have 2 and 8 bits.
fn packed(architecture: &str) -> Model {
    let dir = tempfile::tempdir().unwrap();
    TinyModel::new(architecture, 5).unwrap().write_directory(dir.path()).unwrap();
    let mut model = open(dir.path().to_str().unwrap()).unwrap().model;
    let mut rng = Rng::new(1);
    let mut pack = |w: &Weight, bits: Bits| -> Weight {
        let layout = Layout { symmetric: true, ..Layout::new(bits, Group::Inputs(32)) };
        let (rows, cols) = (w.rows(), w.cols());
        let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(usize::from(bits.max_code()) + 1) as u8).collect();
        let scales = vec![half::f16::from_f32(0.3 / f32::from(bits.max_code())); rows * cols.div_ceil(32)];
        PackedMatrix::pack(rows, cols, layout, &codes, &scales, &[]).unwrap().into()
    };
    for block in &mut model.blocks {
        for slot in Slot::ALL {
            let linear = block.linear_mut(slot);
            linear.weight = pack(&linear.weight, Bits::Two);
        }
    }
    model.head = pack(&model.head, Bits::Eight);
    model
}

/// What the linears of one step ask for, called by themselves.
fn of_the_linears(model: &Model, device: &dyn Device, n: usize) -> usize {
    let linears = model.blocks.iter().flat_map(|b| &b.linears).map(|l| &l.weight);
    linears
        .chain([&model.head])
        .map(|w| {
            let (x, mut y) = (vec![0.5; n * w.cols()], vec![0.0; n * w.rows()]);
            allocations(|| device.linear(&x, w, None, &mut y))
        })
        .sum()
}

#[test]
fn steps_of_one_and_of_several_sequences() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    const STEPS: usize = 70;
    let device = tailorq_kernels::cpu_with(Activations::Int8);
    for (architecture, threads) in [("qwen2", 1), ("qwen3", 1), ("llama", 2)] {
        let model = packed(architecture);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for (kv, n) in [(KvType::F16, 1), (KvType::F32, 1), (KvType::Q8, 1), (KvType::F16, 5)] {
            pool.install(|| {
                let mut caches = vec![KvCache::with(kv); n];
                let mut workspace = Workspace::new();
                for (i, cache) in caches.iter_mut().enumerate() {
                    cache.reserve(&model, STEPS + 40);
                    let prompt: Vec<u32> = (1..20 + i as u32).collect();
                    model.read_prompt(&*device, &prompt, cache, &mut workspace);
                }
                let next = vec![7; n];
                model.step(&*device, &next, &mut caches, &mut workspace);
                let linears = of_the_linears(&model, &*device, n);
                let steps = allocations(|| {
                    for _ in 0..STEPS {
                        model.step(&*device, &next, &mut caches, &mut workspace);
                    }
                });
                // Nothing is asked for but by linears, and those ask for no more than when they are alone. Threads beside the
                // first make buffers of their own at their first task, whenever that comes.
                let extra = steps - STEPS * linears;
                let what = format!("{architecture} {kv}, {n} sequences: {extra} beside {linears} a step by linears");
                assert!(extra <= 8 * (threads - 1), "{what}");
                assert_eq!(caches[0].len(), 19 + 1 + STEPS);
            });
        }
    }
}

#[test]
fn without_room_a_step_asks_once_a_page() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let device = tailorq_kernels::cpu_with(Activations::Int8);
    let model = packed("llama");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        let (mut caches, mut workspace) = ([KvCache::with(KvType::F16)], Workspace::new());
        let mut step = || model.step(&*device, &[3], &mut caches, &mut workspace).len();
        step();
        let linears = of_the_linears(&model, &*device, 1);
        let asking: Vec<usize> =
            (1..3 * tailorq_kernels::KV_PAGE).filter(|_| allocations(|| _ = step()) > linears).collect();
        assert_eq!(asking, [tailorq_kernels::KV_PAGE, 2 * tailorq_kernels::KV_PAGE]);
    });
}
