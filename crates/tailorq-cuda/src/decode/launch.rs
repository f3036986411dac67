//! Prepared launches and graphs of them, and how their blocks share a processor.
//!
//! On devices on which a kernel may begin before the one in front of it has ended, the kernels of a step of one token take turns
//! in two roles. An even one takes more than half of a processor's shared memory, an odd one more than half of its registers, and
//! one of each fits: so a processor never has two blocks of one kernel while another has none, and always one of the next
//! kernel, which fetches weights meanwhile. (Half of each for all kernels lets blocks pile up: docs/performance.md.) Steps of
//! several tokens need the room for their vectors, and a processor has one block at a time.

use crate::error::CudaError;
use crate::gpu::{Function, Gpu, Grid, Source};
use cudarc::driver::CudaGraph;
use std::any::Any;
use std::sync::Arc;

/// Bytes of shared memory that a kernel may have declared itself.
pub(super) const OWN_SHARED: u32 = 1 << 10;

/// Threads of a block of every kernel of a step; the kernels are compiled for it.
pub(super) const BLOCK_THREADS: u32 = 384;

/// Names of a kernel in `decode_*.cu`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    /// For any place.
    pub(super) any: &'static str,
    /// For odd places beside another kernel, where there is such a form.
    pub(super) odd: Option<&'static str>,
}

impl Names {
    /// A kernel that shares no processor.
    pub(super) const fn alone(any: &'static str) -> Names {
        Names { any, odd: None }
    }
}

/// The names of a kernel that `STEP_KERNEL` has made.
macro_rules! pair {
    ($name:literal) => {
        $crate::decode::launch::Names { any: $name, odd: Some(concat!($name, "_odd")) }
    };
}
pub(super) use pair;

/// Bytes of dynamic shared memory of a block that shares its processor; none where kernels do not overlap.
pub(super) fn half(gpu: &Gpu) -> Option<u32> {
    let beside = 2 * (gpu.shared_reserved + OWN_SHARED);
    (gpu.shared_a_processor / 2).checked_sub(beside).filter(|_| gpu.can_overlap())
}

/// Bytes of dynamic shared memory of a block that has a processor for itself.
pub(super) fn whole(gpu: &Gpu) -> u32 {
    gpu.shared_a_block - OWN_SHARED
}

/// A kernel with its arguments, ready to be started any number of times.
pub(super) struct Launch {
    function: Function,
    odd: Option<Function>,
    blocks: u32,
    shared: u32,
    params: Box<dyn Any>,
}

impl Launch {
    /// A kernel that deals its work out to its blocks, of which there are as many as processors at least, with `shared` bytes of
    /// shared memory. `params` is its one argument, a structure of the same layout.
    pub(super) fn new<T: Copy + 'static>(
        gpu: &Gpu,
        kernel: (&'static Source, Names),
        shared: u32,
        params: T,
    ) -> Launch {
        let function = |name| {
            let function = gpu.function(kernel.0, name);
            gpu.allow_shared(function, whole(gpu));
            // Kernels that want the same of a processor follow one another on it without a pause.
            gpu.prefer_shared(function);
            function
        };
        let fits = half(gpu).is_some_and(|half| shared <= half);
        let odd = kernel.1.odd.filter(|_| fits).map(function);
        Launch { function: function(kernel.1.any), odd, blocks: gpu.n_processors, shared, params: Box::new(params) }
    }

    /// With so many blocks, if that is more.
    pub(super) fn blocks(mut self, n: usize) -> Launch {
        self.blocks = self.blocks.max(n as u32);
        self
    }

    /// `place`: among the launches of a graph whose kernels share processors.
    fn start(&mut self, gpu: &Gpu, place: Option<usize>) {
        let params: *mut dyn Any = &raw mut *self.params;
        let (function, shared) = match (place, self.odd) {
            (Some(place), Some(odd)) if place % 2 == 1 => (odd, self.shared),
            // With what the device reserves and the kernel declares this is more than half.
            (Some(_), Some(_)) => (self.function, gpu.shared_a_processor / 2),
            // So much that there is no room for a second block of any kernel.
            _ => (self.function, self.shared.max(gpu.shared_a_block / 7 * 4)),
        };
        let grid = Grid { blocks: (self.blocks, 1, 1), threads: BLOCK_THREADS, shared };
        // SAFETY: the constructor's caller passed what the kernel takes, and keeps the buffers that it names alive.
        unsafe { gpu.launch_overlapping(function, grid, params.cast()) };
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
