//! Prepared launches and graphs of them.

use crate::error::CudaError;
use crate::gpu::{Function, Gpu, Grid, Source};
use cudarc::driver::CudaGraph;
use std::any::Any;
use std::sync::Arc;

/// Bytes of shared memory that a kernel may have declared itself.
pub(super) const OWN_SHARED: u32 = 1 << 10;

/// Threads of a block of every kernel of a step; the kernels are compiled for it.
pub(super) const BLOCK_THREADS: u32 = 512;

/// A kernel with its arguments, ready to be started any number of times.
pub(super) struct Launch {
    function: Function,
    grid: Grid,
    params: Box<dyn Any>,
}

impl Launch {
    /// A kernel that deals its work out to its blocks, of which there are as many as processors at least, with `shared` bytes of
    /// shared memory. `params` is its one argument, a structure of the same layout.
    ///
    /// Whatever it needs, a block takes so much of a processor's shared memory that there is no room for a second one
    /// (`begin_early` in `decode_parts.cuh`).
    pub(super) fn new<T: Copy + 'static>(
        gpu: &Gpu,
        kernel: (&'static Source, &'static str),
        shared: u32,
        params: T,
    ) -> Launch {
        let function = gpu.function(kernel.0, kernel.1);
        gpu.allow_shared(function, gpu.shared_a_block - OWN_SHARED);
        // Kernels that want the same of a processor follow one another on it without a pause.
        gpu.prefer_shared(function);
        let shared = shared.max(gpu.shared_a_block / 7 * 4);
        let grid = Grid { blocks: (gpu.n_processors, 1, 1), threads: BLOCK_THREADS, shared };
        Launch { function, grid, params: Box::new(params) }
    }

    /// With so many blocks, if that is more.
    pub(super) fn blocks(mut self, n: usize) -> Launch {
        self.grid.blocks.0 = self.grid.blocks.0.max(n as u32);
        self
    }

    fn start(&mut self, gpu: &Gpu) {
        let params: *mut dyn Any = &raw mut *self.params;
        // SAFETY: the constructor's caller passed what the kernel takes, and keeps the buffers that it names alive.
        unsafe { gpu.launch_overlapping(self.function, self.grid, params.cast()) };
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
    pub(super) fn new(gpu: &Arc<Gpu>, mut launches: Vec<Launch>) -> Result<Graph, CudaError> {
        let graph = gpu.capture(|| launches.iter_mut().for_each(|launch| launch.start(gpu)))?;
        Ok(Graph { graph, gpu: gpu.clone(), _launches: launches })
    }

    pub(super) fn launch(&self) {
        self.gpu.replay(&self.graph);
    }
}
