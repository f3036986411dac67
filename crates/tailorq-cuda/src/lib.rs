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
mod rounding;
mod staging;
mod weights;

pub use device::{CudaOptions, Precision};
pub use error::CudaError;

use std::sync::Arc;
use tailorq_kernels::Device;

/// Opens device number `ordinal`.
pub fn open(ordinal: usize, options: CudaOptions) -> Result<Arc<dyn Device>, CudaError> {
    Ok(Arc::new(device::Cuda::open(ordinal, options)?))
}
