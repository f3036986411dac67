//! A device with its one stream, its memory, and its compiled kernels.
//!
//! All work goes through a single stream, so that an operation sees what those before it wrote, and memory that is given back
//! while work is under way is reused only after it. Operations have no way to fail but for a broken device or one that is
//! full: that ends the program with words about it, as a failed allocation of the processor's memory does.

use crate::cubin;
use crate::error::CudaError;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{CudaContext, CudaGraph, CudaStream, result};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// A source of kernels, compiled as one module.
#[derive(Debug)]
pub(crate) struct Source {
    /// For messages.
    pub(crate) name: &'static str,
    /// CUDA C++.
    pub(crate) code: &'static str,
}

/// What every source begins with.
pub(crate) const PRELUDE: &str = include_str!("kernels/prelude.cuh");

/// Every source, for the test that compiles them all.
#[cfg(test)]
pub(crate) const SOURCES: &[&Source] = &[
    &crate::device::SOURCE,
    &crate::attention::SOURCE,
    &crate::cached::SOURCE,
    &crate::factor::SOURCE,
    &crate::rotation::SOURCE,
    &crate::rounding::SOURCE,
    &crate::staging::SOURCE,
    &crate::decode::SOURCES[0],
    &crate::decode::SOURCES[1],
    &crate::decode::SOURCES[2],
    &crate::decode::SOURCES[3],
    &crate::decode::SOURCES[4],
    &crate::decode::SOURCES[5],
    &crate::decode::SOURCES[6],
    &crate::decode::SOURCES[7],
    &crate::decode::SOURCES[8],
    &crate::decode::SOURCES[9],
    &crate::decode::SOURCES[10],
    &crate::decode::SOURCES[11],
    &crate::decode::SOURCES[12],
    &crate::decode::SOURCES[13],
    &crate::decode::SOURCES[14],
    &crate::decode::SOURCES[15],
    &crate::decode::SOURCES[16],
    &crate::decode::SOURCES[17],
    &crate::decode::STEP,
];

/// See the module.
pub(crate) struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// `sm_90`.
    arch: String,
    name: String,
    /// Streaming multiprocessors.
    pub(crate) n_processors: u32,
    /// Bytes of shared memory that a block can have.
    pub(crate) shared_a_block: u32,
    /// Bytes of shared memory that all blocks on a processor can have.
    pub(crate) shared_a_processor: u32,
    /// Of these, what the device takes for itself for each block.
    pub(crate) shared_reserved: u32,
    /// Registers that all blocks on a processor can have.
    pub(crate) registers_a_processor: u32,
    /// Bytes of all buffers.
    held: AtomicUsize,
    functions: Mutex<HashMap<(&'static str, &'static str), Function>>,
    modules: Mutex<HashMap<&'static str, Module>>,
    /// By the number of another device: whether it can be copied from.
    reached: Mutex<HashMap<usize, bool>>,
}

#[derive(Clone, Copy)]
struct Module(sys::CUmodule);

// SAFETY: a handle of the driver, which may be used from any thread.
unsafe impl Send for Module {}

/// A compiled kernel. It lives as long as the process.
#[derive(Clone, Copy)]
pub(crate) struct Function(sys::CUfunction);

// SAFETY: a handle of the driver, which may be used from any thread.
unsafe impl Send for Function {}

impl Gpu {
    /// Opens device number `ordinal`.
    pub(crate) fn open(ordinal: usize) -> Result<Arc<Gpu>, CudaError> {
        let driver = refused;
        let count = count_for(ordinal)?;
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal).map_err(driver("open the device"))?;
        let name = context.name().map_err(driver("name the device"))?;
        let (major, minor) = context.compute_capability().map_err(driver("tell the compute capability"))?;
        if major < 8 {
            return Err(CudaError::TooOld { ordinal, name, major, minor });
        }
        let stream = context.new_stream().map_err(driver("make a stream"))?;
        let attribute = Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let n_processors = context.attribute(attribute).map_err(driver("count processors"))?.max(1) as u32;
        let shared = |attribute| context.attribute(attribute).map_err(driver("tell its shared memory"));
        let shared_a_block =
            shared(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?.max(48 << 10) as u32;
        let shared_a_processor =
            shared(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?.max(0) as u32;
        let shared_reserved = shared(Attribute::CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK)?.max(0) as u32;
        let attribute = Attribute::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR;
        let registers = context.attribute(attribute).map_err(driver("count registers"))?;
        let registers_a_processor = registers.max(0) as u32;
        keep_freed_memory(&context).map_err(driver("set up the memory pool"))?;
        Ok(Arc::new(Gpu {
            context,
            stream,
            arch: format!("sm_{major}{minor}"),
            name,
            n_processors,
            shared_a_block,
            shared_a_processor,
            shared_reserved,
            registers_a_processor,
            held: AtomicUsize::new(0),
            functions: Mutex::default(),
            modules: Mutex::default(),
            reached: Mutex::default(),
        }))
    }

    /// The device's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The device's number.
    pub(crate) fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Makes the context current on this thread; before every call of the driver.
    pub(crate) fn enter(&self) {
        must("enter the context", self.context.bind_to_thread());
    }

    /// Free and total memory of the device, in bytes.
    pub(crate) fn memory(&self) -> (usize, usize) {
        self.enter();
        must("ask for free memory", self.context.mem_get_info())
    }

    /// Bytes of all buffers.
    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Memory that was given back and is more than this goes back to the system when the stream is waited for.
    pub(crate) fn keep_at_most(&self, bytes: usize) {
        must("set up the memory pool", set_release_threshold(&self.context, bytes as u64));
    }

    /// Waits until all work is done.
    pub(crate) fn synchronize(&self) {
        self.enter();
        must("finish the work under way", self.stream.synchronize());
    }

    /// Memory that holds whatever it held.
    pub(crate) fn allocate(self: &Arc<Self>, bytes: usize) -> Buffer {
        self.enter();
        // The driver refuses nothing; an empty matrix still needs an address.
        let size = bytes.max(1);
        // SAFETY: the stream is alive as long as `self`, of which the buffer holds a share.
        let allocate = || unsafe { result::malloc_async(self.stream.cu_stream(), size) };
        // What work under way will give back is there once it is done.
        let allocated = allocate().or_else(|_| {
            self.synchronize();
            allocate()
        });
        let ptr = allocated.unwrap_or_else(|e| {
            let (free, total) = self.memory();
            let mib = |b: usize| b >> 20;
            panic!(
                "the CUDA device has no room for {} MiB more ({} of {} MiB free): {}; use fewer or shorter samples, or --device cpu",
                mib(size),
                mib(free),
                mib(total),
                describe(e)
            )
        });
        self.held.fetch_add(bytes, Ordering::Relaxed);
        Buffer { ptr, bytes, gpu: self.clone() }
    }

    /// Memory of zeros.
    pub(crate) fn zeros(self: &Arc<Self>, bytes: usize) -> Buffer {
        let buffer = self.allocate(bytes);
        if bytes > 0 {
            // SAFETY: the buffer is that long.
            must("clear memory", unsafe { result::memset_d8_async(buffer.ptr, 0, bytes, self.stream.cu_stream()) });
        }
        buffer
    }

    /// A copy of `data` on the device.
    pub(crate) fn upload<T: Copy>(self: &Arc<Self>, data: &[T]) -> Buffer {
        let buffer = self.allocate(size_of_val(data));
        self.write(&buffer, 0, data);
        buffer
    }

    /// Writes `data` from byte `at` on.
    pub(crate) fn write<T: Copy>(&self, buffer: &Buffer, at: usize, data: &[T]) {
        assert!(at + size_of_val(data) <= buffer.bytes, "the buffer is shorter than what is written");
        if data.is_empty() {
            return;
        }
        self.enter();
        // SAFETY: the range lies inside the buffer; from pageable memory the driver has read all of `data` when it returns.
        must("copy to the device", unsafe {
            result::memcpy_htod_async(buffer.ptr + at as u64, data, self.stream.cu_stream())
        });
    }

    /// Reads from byte `at` on, after all work so far.
    pub(crate) fn read<T: Copy>(&self, buffer: &Buffer, at: usize, out: &mut [T]) {
        assert!(at + size_of_val(out) <= buffer.bytes, "the buffer is shorter than what is read");
        if out.is_empty() {
            return;
        }
        self.enter();
        // SAFETY: the range lies inside the buffer, and the stream is waited for before `out` is looked at.
        must("copy from the device", unsafe {
            result::memcpy_dtoh_async(out, buffer.ptr + at as u64, self.stream.cu_stream())
        });
        self.synchronize();
    }

    /// Copies `bytes` between places of the device that do not overlap.
    pub(crate) fn copy(&self, to: u64, from: u64, bytes: usize) {
        if bytes == 0 {
            return;
        }
        self.enter();
        // SAFETY: callers pass addresses inside live buffers, which the stream's order keeps alive.
        must("copy on the device", unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) });
    }

    /// Copies bytes from another device's memory, after all work so far of both; what the other does next comes after the copy.
    pub(crate) fn receive(&self, to: u64, other: &Gpu, from: u64, bytes: usize) {
        if bytes == 0 {
            return;
        }
        if !self.reaches(other) {
            let mut through = vec![0u8; bytes];
            other.read_at(from, &mut through);
            self.write_at(to, &through);
            return;
        }
        self.wait_for(other);
        self.enter();
        let contexts = (self.context.cu_ctx(), other.context.cu_ctx());
        // SAFETY: callers pass addresses inside live buffers of both, which the order of both streams keeps alive.
        must("copy between devices", unsafe {
            let stream = self.stream.cu_stream();
            match self.ordinal() == other.ordinal() {
                true => result::memcpy_dtod_async(to, from, bytes, stream),
                false => result::memcpy_peer_async(contexts.0, to, contexts.1, from, bytes, stream),
            }
        });
        other.wait_for(self);
    }

    /// What is started from here on waits for all that was started on `other`.
    fn wait_for(&self, other: &Gpu) {
        other.enter();
        let reached = must("record an event", other.stream.record_event(None));
        self.enter();
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and event are alive; the driver keeps what it needs of the event.
        must("order two streams", unsafe {
            result::stream::wait_event(self.stream.cu_stream(), reached.cu_event(), flags)
        });
    }

    /// Whether copies from `other` need not go through the host. The first time its memory is opened to this device.
    fn reaches(&self, other: &Gpu) -> bool {
        let mut known = self.reached.lock().expect("no thread panics while it looks up a device");
        if self.context.ordinal() == other.context.ordinal() {
            return true;
        }
        *known.entry(other.context.ordinal()).or_insert_with(|| {
            other.enter();
            open_memory(&other.context, &self.context).unwrap_or(false)
        })
    }

    fn read_at(&self, from: u64, out: &mut [u8]) {
        self.enter();
        // SAFETY: the caller's range is alive, and the stream is waited for before `out` is looked at.
        must("copy from the device", unsafe { result::memcpy_dtoh_async(out, from, self.stream.cu_stream()) });
        self.synchronize();
    }

    fn write_at(&self, to: u64, data: &[u8]) {
        self.enter();
        // SAFETY: the caller's range is alive; from pageable memory the driver has read all when it returns.
        must("copy to the device", unsafe { result::memcpy_htod_async(to, data, self.stream.cu_stream()) });
    }

    /// Memory that was given back goes back to the system.
    pub(crate) fn give_back_unused(&self) {
        self.synchronize();
        // SAFETY: the device is open.
        must("set up the memory pool", unsafe {
            result::device::get_default_mem_pool(self.context.cu_device())
                .and_then(|pool| sys::cuMemPoolTrimTo(pool, 0).result())
        });
    }

    /// The kernel `name` of `source`, compiled when it is first asked for.
    pub(crate) fn function(&self, source: &'static Source, name: &'static str) -> Function {
        let key = (source.name, name);
        if let Some(found) = self.functions.lock().expect("no thread panics while it looks up a kernel").get(&key) {
            return *found;
        }
        let module = self.module(source).unwrap_or_else(|e| panic!("{e}"));
        self.enter();
        let c_name = CString::new(name).expect("kernel names hold no zero byte");
        // SAFETY: modules are never unloaded.
        let function = Function(must("find a kernel", unsafe { result::module::get_function(module.0, c_name) }));
        self.functions.lock().expect("no thread panics while it stores a kernel").insert(key, function);
        function
    }

    /// Compiles and loads what later operations use, so that what is wrong with it shows now.
    pub(crate) fn load(&self, sources: &[&'static Source]) -> Result<(), CudaError> {
        sources.iter().try_for_each(|source| self.module(source).map(|_| ()))
    }

    /// The kernels of `source`, compiled and loaded when they are first asked for.
    fn module(&self, source: &'static Source) -> Result<Module, CudaError> {
        let mut modules = self.modules.lock().expect("no thread panics while it compiles");
        if let Some(module) = modules.get(source.name) {
            return Ok(*module);
        }
        let image = cubin::compiled(source, &self.arch)?;
        self.enter();
        // SAFETY: the image is what the compiler returned for this device, whole.
        let loaded = unsafe { result::module::load_data(image.as_ptr().cast()) };
        let module = Module(loaded.map_err(|e| CudaError::Driver { what: "load kernels", error: describe(e) })?);
        modules.insert(source.name, module);
        Ok(module)
    }

    /// Starts `function`. `args` are copied before this returns.
    ///
    /// # Safety
    /// The arguments are of the kernel's types, in its order, and their addresses hold what the kernel reads and writes.
    pub(crate) unsafe fn launch(&self, function: Function, grid: Grid, args: &mut [*mut c_void]) {
        if grid.blocks.0 == 0 || grid.blocks.1 == 0 || grid.blocks.2 == 0 {
            return;
        }
        self.enter();
        let threads = (grid.threads, 1, 1);
        // SAFETY: as the caller promises.
        let started = unsafe {
            result::launch_kernel(function.0, grid.blocks, threads, grid.shared, self.stream.cu_stream(), args)
        };
        must("start a kernel", started);
    }

    /// Lets a kernel use more shared memory than the 48 KiB that every kernel has.
    pub(crate) fn allow_shared(&self, function: Function, bytes: u32) {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        self.set_attribute("raise the limit of shared memory", function, attribute, bytes as i32);
    }

    /// Lets a kernel's processors use as much of their nearest memory as shared memory as they can.
    pub(crate) fn prefer_shared(&self, function: Function) {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        self.set_attribute("divide the nearest memory", function, attribute, 100);
    }

    /// Registers of a thread.
    pub(crate) fn registers(&self, function: Function) -> u32 {
        self.enter();
        let (mut n, attribute) = (0, sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_NUM_REGS);
        // SAFETY: the function is alive, and the number has a place.
        must("count registers", unsafe { sys::cuFuncGetAttribute(&raw mut n, attribute, function.0).result() });
        n.max(1) as u32
    }

    fn set_attribute(&self, what: &str, function: Function, attribute: sys::CUfunction_attribute, value: i32) {
        self.enter();
        // SAFETY: the function is alive.
        must(what, unsafe { result::function::set_function_attribute(function.0, attribute, value) });
    }
}

impl Gpu {
    /// Starts `function`, whose one argument lies at `params`, so that it may begin before the launch before it has ended,
    /// where the device can do that: such kernels wait by themselves.
    ///
    /// # Safety
    /// As for [`Gpu::launch`]; the argument has the layout of the kernel's.
    pub(crate) unsafe fn launch_overlapping(&self, function: Function, grid: Grid, params: *mut c_void) {
        self.enter();
        let (x, y, z) = grid.blocks;
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut overlap,
            numAttrs: u32::from(self.can_overlap()),
        };
        let mut args = [params];
        // SAFETY: as the caller promises; configuration and attribute outlive the call, which copies the argument.
        let started = unsafe {
            sys::cuLaunchKernelEx(&raw const config, function.0, args.as_mut_ptr(), std::ptr::null_mut()).result()
        };
        must("start a kernel", started);
    }

    /// Whether a kernel may begin before the one in front of it has ended.
    pub(crate) fn can_overlap(&self) -> bool {
        self.arch.as_str() >= "sm_90" || self.arch.len() > 5
    }

    /// What `work` starts, as a graph; nothing of it runs.
    pub(crate) fn capture(&self, work: impl FnOnce()) -> Result<CudaGraph, CudaError> {
        let failed = |e| CudaError::Driver { what: "record a graph", error: describe(e) };
        self.enter();
        self.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(failed)?;
        work();
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(failed)?;
        Ok(graph.expect("something was started"))
    }

    /// Runs a graph after all work so far.
    pub(crate) fn replay(&self, graph: &CudaGraph) {
        must("run a graph", graph.launch());
    }

    /// Milliseconds that the device takes for what `work` starts.
    pub(crate) fn milliseconds(&self, work: impl FnOnce()) -> f32 {
        self.enter();
        let event = || must("record an event", self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)));
        let start = event();
        work();
        let end = event();
        must("measure time", start.elapsed_ms(&end))
    }
}

/// Blocks and threads of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) blocks: (u32, u32, u32),
    pub(crate) threads: u32,
    /// Dynamic shared memory in bytes.
    pub(crate) shared: u32,
}

impl Grid {
    /// One thread an element.
    pub(crate) fn elements(n: usize) -> Grid {
        Grid { blocks: (n.div_ceil(256).try_into().expect("fewer than 2^40 elements"), 1, 1), threads: 256, shared: 0 }
    }

    /// One block of so many threads a row.
    pub(crate) fn rows(n: usize, threads: u32) -> Grid {
        Grid { blocks: (n.try_into().expect("fewer than 2^32 rows"), 1, 1), threads, shared: 0 }
    }
}

/// Starts a kernel: `launch!(gpu, &SOURCE, "name", grid, a, b, c)`. The arguments are values of the kernel's types.
macro_rules! launch {
    ($gpu:expr, $source:expr, $name:literal, $grid:expr $(, $arg:expr)* $(,)?) => {{
        let gpu: &$crate::gpu::Gpu = &$gpu;
        let function = gpu.function($source, $name);
        // Each argument lives in a tuple of its own name until the launch has copied it.
        #[allow(unused_mut)]
        let mut args: Vec<*mut std::ffi::c_void> = Vec::new();
        $crate::gpu::launch!(@args gpu, function, $grid, args, $($arg),*);
    }};
    (@args $gpu:ident, $function:ident, $grid:expr, $args:ident, ) => {
        // SAFETY: there is nothing to pass.
        unsafe { $gpu.launch($function, $grid, &mut $args) };
    };
    (@args $gpu:ident, $function:ident, $grid:expr, $args:ident, $($arg:expr),+) => {
        $crate::gpu::launch!(@bind $gpu, $function, $grid, $args, $($arg),+);
    };
    (@bind $gpu:ident, $function:ident, $grid:expr, $args:ident, $head:expr $(, $tail:expr)*) => {{
        let mut value = $head;
        $args.push((&raw mut value).cast());
        $crate::gpu::launch!(@bind $gpu, $function, $grid, $args $(, $tail)*);
    }};
    (@bind $gpu:ident, $function:ident, $grid:expr, $args:ident) => {
        // SAFETY: every call passes what the kernel's signature asks for, buffers that outlive the launch in stream order
        // and are as long as the shapes say.
        unsafe { $gpu.launch($function, $grid, &mut $args) };
    };
}
pub(crate) use launch;

/// Memory of the device.
pub(crate) struct Buffer {
    ptr: sys::CUdeviceptr,
    bytes: usize,
    gpu: Arc<Gpu>,
}

impl Buffer {
    /// Its address.
    pub(crate) fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Its length.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// The same bytes in memory of their own.
    pub(crate) fn duplicate(&self) -> Buffer {
        let copy = self.gpu.allocate(self.bytes);
        self.gpu.copy(copy.ptr, self.ptr, self.bytes);
        copy
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.gpu.held.fetch_sub(self.bytes, Ordering::Relaxed);
        if self.gpu.context.bind_to_thread().is_ok() {
            // SAFETY: allocated on this stream, freed once; work under way comes first. A failure here would be that of a
            // device which the next operation reports.
            let _ = unsafe { result::free_async(self.ptr, self.gpu.stream.cu_stream()) };
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes on {}", self.bytes, self.gpu.name)
    }
}

fn refused(what: &'static str) -> impl Fn(result::DriverError) -> CudaError {
    move |e| CudaError::Driver { what, error: describe(e) }
}

/// How many devices the driver knows.
pub(crate) fn count() -> Result<usize, CudaError> {
    count_for(0)
}

/// The same, when device number `ordinal` is looked for.
fn count_for(ordinal: usize) -> Result<usize, CudaError> {
    libraries()?;
    result::init().map_err(|e| {
        use sys::CUresult::{CUDA_ERROR_NO_DEVICE, CUDA_ERROR_STUB_LIBRARY};
        // A driver without a device, as where none is given to this process.
        let nothing_there = [CUDA_ERROR_NO_DEVICE, CUDA_ERROR_STUB_LIBRARY].contains(&e.0);
        if nothing_there { CudaError::NoDevice { ordinal, count: 0 } } else { refused("start")(e) }
    })?;
    Ok(result::device::get_count().map_err(refused("count devices"))?.max(0) as usize)
}

/// Whether all libraries can be loaded.
fn libraries() -> Result<(), CudaError> {
    // SAFETY: loading these libraries runs their initialisers, which have no preconditions.
    let (driver, nvrtc, cublas, cusolver) = unsafe {
        (
            sys::is_culib_present(),
            cudarc::nvrtc::sys::is_culib_present(),
            cudarc::cublas::sys::is_culib_present(),
            cudarc::cusolver::sys::is_culib_present(),
        )
    };
    if !driver {
        return Err(CudaError::NoDriver);
    }
    for (present, name) in [(nvrtc, "libnvrtc"), (cublas, "libcublas"), (cusolver, "libcusolver")] {
        if !present {
            return Err(CudaError::NoLibrary { name });
        }
    }
    Ok(())
}

/// Memory that was given back stays with the process, so that taking it again costs nothing.
fn keep_freed_memory(context: &CudaContext) -> Result<(), result::DriverError> {
    set_release_threshold(context, u64::MAX)
}

/// Bytes that the pool may hold and not give back.
fn set_release_threshold(context: &CudaContext, mut bytes: u64) -> Result<(), result::DriverError> {
    context.bind_to_thread()?;
    // SAFETY: the device is open, the attribute takes a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut bytes).cast()).result()
    }
}

/// Lets `by` read and write what `owner` allocates; `false` where the hardware cannot.
fn open_memory(owner: &CudaContext, by: &CudaContext) -> Result<bool, result::DriverError> {
    let mut can = 0;
    // SAFETY: both devices are open; the description outlives the call.
    unsafe {
        sys::cuDeviceCanAccessPeer(&raw mut can, by.cu_device(), owner.cu_device()).result()?;
        if can == 0 {
            return Ok(false);
        }
        let pool = result::device::get_default_mem_pool(owner.cu_device())?;
        let type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        let location = sys::CUmemLocation { type_, id: by.cu_device() };
        let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let access = sys::CUmemAccessDesc { location, flags };
        sys::cuMemPoolSetAccess(pool, &raw const access, 1).result()?;
    }
    Ok(true)
}

/// The driver's words for an error.
pub(crate) fn describe(error: result::DriverError) -> String {
    error.error_string().map_or_else(|_| format!("{error:?}"), |s| s.to_string_lossy().into_owned())
}

/// Ends the program when the device is broken: see the module.
pub(crate) fn must<T>(what: &str, result: Result<T, result::DriverError>) -> T {
    result
        .unwrap_or_else(|e| panic!("the CUDA device could not {what}: {}; try again, or use --device cpu", describe(e)))
}
