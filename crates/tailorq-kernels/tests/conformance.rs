//! The sweep of operations over every variant of the CPU device.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod inputs;
mod sweep;

use std::sync::Arc;
use tailorq_kernels::{Device, cpu_variants};

fn devices() -> Vec<Arc<dyn Device>> {
    let devices = cpu_variants();
    assert!(!devices.is_empty());
    devices
}
