//! Prepared launches and graphs of them, and how their blocks share a processor.
//!
//! On devices on which a kernel may begin before the one in front of it has ended, the kernels of a step of one token take turns
//! in two roles. An even one takes more than half of a processor's shared memory, an odd one more than half of its registers, held
//! by a few idle warps, and one of each fits: so a processor never has two blocks of one kernel while another has none, and always
//! one of the next kernel, which fetches weights meanwhile. (Half of each for all kernels lets blocks pile up:
//! docs/performance.md.) Steps of several tokens need the room for their vectors, and a processor has one block at a time.

use crate::error::CudaError;
use crate::gpu::{Function, Gpu, Grid, Source};
use cudarc::driver::CudaGraph;
use std::any::Any;
use std::sync::Arc;

/// Bytes of shared memory that a kernel may have declared itself.
pub(super) const OWN_SHARED: u32 = 1 << 10;

/// Threads of a block that work, for every kernel of a step; the kernels are compiled for it.
pub(super) const BLOCK_THREADS: u32 = 384;

/// Threads of a block at most, and registers of a thread at most, as `SHARED_AMONG` in `decode_parts.cuh` says.
const MOST_THREADS: u32 = 896;
const MOST_REGISTERS: u32 = 72;

/// Parts of a processor.
const PARTS: u32 = 4;

/// How a kernel is meant to lie on the processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    /// With others: `STEP_KERNEL` has made it.
    Shared,
    /// Alone.
    Alone,
}

/// Bytes of dynamic shared memory of a block that shares its processor; none where kernels do not overlap.
pub(super) fn half(gpu: &Gpu) -> Option<u32> {
    let beside = 2 * (gpu.shared_reserved + OWN_SHARED);
    (gpu.shared_a_processor / 2).checked_sub(beside).filter(|_| gpu.can_overlap())
}

/// Bytes of dynamic shared memory of a block that has a processor for itself.
pub(super) fn whole(gpu: &Gpu) -> u32 {
    gpu.shared_a_block - OWN_SHARED
}

/// Threads of a block of which there is no room for two beside one another, but for one beside an even one.
fn odd_threads(gpu: &Gpu, function: Function) -> Option<u32> {
    // A processor has four parts, which share out its registers and a block's warps; a thread's come by eights.
    let (room, one) = (gpu.registers_a_processor / PARTS / 32, gpu.registers(function).next_multiple_of(8));
    let even = BLOCK_THREADS.div_ceil(32 * PARTS) * MOST_REGISTERS;
    let warps = (room / 2 / one + 1).max(BLOCK_THREADS.div_ceil(32 * PARTS));
    let threads = 32 * PARTS * warps;
    (one <= MOST_REGISTERS && warps * one + even <= room && threads <= MOST_THREADS).then_some(threads)
}

/// A kernel with its arguments, ready to be started any number of times.
pub(super) struct Launch {
    function: Function,
    /// Of a block in an odd place that shares its processor, if that can be.
    odd_threads: Option<u32>,
    blocks: u32,
    shared: u32,
    params: Box<dyn Any>,
}

impl Launch {
    /// A kernel that deals its work out to its blocks, of which there are as many as processors at least, with `shared` bytes of
    /// shared memory. `params` is its one argument, a structure of the same layout.
    pub(super) fn new<T: Copy + 'static>(
        gpu: &Gpu,
        kernel: (&'static Source, &'static str, Sharing),
        shared: u32,
        params: T,
    ) -> Launch {
        let function = gpu.function(kernel.0, kernel.1);
        gpu.allow_shared(function, whole(gpu));
        // Kernels that want the same of a processor follow one another on it without a pause.
        gpu.prefer_shared(function);
        let shares = kernel.2 == Sharing::Shared && half(gpu).is_some_and(|half| shared <= half);
        let odd_threads = if shares { odd_threads(gpu, function) } else { None };
        Launch { function, odd_threads, blocks: gpu.n_processors, shared, params: Box::new(params) }
    }

    /// With so many blocks, if that is more.
    pub(super) fn blocks(mut self, n: usize) -> Launch {
        self.blocks = self.blocks.max(n as u32);
        self
    }

    /// `place`: among the launches of a graph whose kernels share processors.
    fn start(&mut self, gpu: &Gpu, place: Option<usize>) {
        let params: *mut dyn Any = &raw mut *self.params;
        let (threads, shared) = match (place, self.odd_threads) {
            (Some(place), Some(threads)) if place % 2 == 1 => (threads, self.shared),
            // With what the device reserves and the kernel declares this is more than half.
            (Some(_), Some(_)) => (BLOCK_THREADS, gpu.shared_a_processor / 2),
            // So much that there is no room for a second block of any kernel.
            _ => (BLOCK_THREADS, self.shared.max(gpu.shared_a_block / 7 * 4)),
        };
        let grid = Grid { blocks: (self.blocks, 1, 1), threads, shared };
        // SAFETY: the constructor's caller passed what the kernel takes, and keeps the buffers that it names alive.
        unsafe { gpu.launch_overlapping(self.function, grid, params.cast()) };
    }
}

/// Launches in order, as one graph.
pub(super) struct Graph {
    graph: CudaGraph,
    gpu: Arc<Gpu>,
    /// The graph has copies of the arguments; these are kept for those who look at it in a debugger.
    _launches: Vec<Launch>,
}

impl Graph {
    /// Of launches with one token: kernels share processors where they can.
    pub(super) fn new(gpu: &Arc<Gpu>, mut launches: Vec<Launch>, has_one_token: bool) -> Result<Graph, CudaError> {
        let place = |i: usize| has_one_token.then_some(i);
        let start = || launches.iter_mut().enumerate().for_each(|(i, launch)| launch.start(gpu, place(i)));
        let graph = gpu.capture(start)?;
        Ok(Graph { graph, gpu: gpu.clone(), _launches: launches })
    }

    pub(super) fn launch(&self) {
        self.gpu.replay(&self.graph);
    }
}
