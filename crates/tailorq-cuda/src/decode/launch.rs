//! Prepared launches and graphs of them.

use crate::error::CudaError;
use crate::gpu::{Function, Gpu, Grid, Source};
use cudarc::driver::CudaGraph;
use std::any::Any;
use std::sync::Arc;

/// Bytes of shared memory that a kernel may have declared itself.
pub(super) const OWN_SHARED: u32 = 1 << 10;

/// A kernel with its arguments, ready to be started any number of times.
pub(super) struct Launch {
    function: Function,
    grid: Grid,
    params: Box<dyn Any>,
}

impl Launch {
    /// `params` is the kernel's one argument, a structure of the same layout.
    pub(super) fn new<T: Copy + 'static>(
        gpu: &Gpu,
        source: &'static Source,
        name: &'static str,
        grid: Grid,
        params: T,
    ) -> Launch {
        let function = gpu.function(source, name);
        gpu.allow_shared(function, gpu.shared_a_block - OWN_SHARED);
        // Kernels that want the same of a processor can be there at once.
        gpu.prefer_shared(function);
        Launch { function, grid, params: Box::new(params) }
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
