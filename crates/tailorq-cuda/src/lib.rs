//! The operations of tailorq on an NVIDIA GPU.
//!
//! Nothing here is needed to build or to start the program: the driver and the toolkit's libraries are looked for when a
//! device is opened, and kernels are compiled then, once for a processor (`cubin.rs`). [`CudaError`] says what is missing.

mod attention;
mod blas;
mod cached;
mod constants;
mod cubin;
pub mod decode;
mod device;
mod error;
mod factor;
mod gpu;
mod matrices;
mod rotation;
mod rounding;
mod staging;
mod weights;

pub use decode::CudaDecoders;
pub use device::{CudaOptions, Precision};
pub use error::CudaError;

use std::sync::Arc;
use tailorq_kernels::Device;

/// Opens device number `ordinal`.
pub fn open(ordinal: usize, options: CudaOptions) -> Result<Arc<dyn Device>, CudaError> {
    open_several(&[ordinal], options)
}

/// Opens the first of some devices, with the others as its peers ([`Device::peers`]). The memory of each is bounded alike; they
/// share the host's.
pub fn open_several(ordinals: &[usize], options: CudaOptions) -> Result<Arc<dyn Device>, CudaError> {
    let Some((&first, others)) = ordinals.split_first() else {
        return Err(CudaError::NoDevice { ordinal: 0, count: 0 });
    };
    let host_memory = options.host_memory.map(|bytes| bytes / ordinals.len());
    let options = CudaOptions { host_memory, ..options };
    let open = |&ordinal: &usize| Ok(Arc::new(device::Cuda::open(ordinal, options)?) as Arc<dyn Device>);
    let peers = others.iter().map(open).collect::<Result<_, CudaError>>()?;
    let mut device = device::Cuda::open(first, options)?;
    device.peers = peers;
    Ok(Arc::new(device))
}

/// How many devices the driver knows.
pub fn count() -> Result<usize, CudaError> {
    gpu::count()
}
