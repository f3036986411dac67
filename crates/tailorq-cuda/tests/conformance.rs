//! The sweep of operations over a CUDA device, in f32.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may stop where it stands, and says when it is skipped"
)]

#[path = "../../tailorq-kernels/tests/inputs/mod.rs"]
mod inputs;
#[path = "../../tailorq-kernels/tests/sweep/mod.rs"]
mod sweep;

use std::sync::{Arc, OnceLock};
use tailorq_cuda::{CudaError, CudaOptions};
use tailorq_kernels::Device;

/// One device for all tests; none where there is none.
fn devices() -> Vec<Arc<dyn Device>> {
    static DEVICE: OnceLock<Option<Arc<dyn Device>>> = OnceLock::new();
    let open = || match tailorq_cuda::open(0, CudaOptions::default()) {
        Ok(device) => Some(device),
        Err(error @ (CudaError::NoDriver | CudaError::NoLibrary { .. } | CudaError::NoDevice { .. })) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    };
    DEVICE.get_or_init(open).iter().cloned().collect()
}
