//! The operations of tailorq on an NVIDIA GPU.
//!
//! Nothing here is needed to build or to start the program: the driver and the toolkit's libraries are looked for when a
//! device is opened, and kernels are compiled then, once for a processor (`cubin.rs`). [`CudaError`] says what is missing.

mod cubin;
mod error;
mod gpu;

pub use error::CudaError;
