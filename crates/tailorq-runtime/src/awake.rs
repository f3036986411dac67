//! Keeping the threads ready where they do the work.

use tailorq_kernels::{Device, awake};

/// Runs `body`, whose many short operations are on `device`. Where the threads of the pool compute them, they do not sleep in between
/// ([`awake`]); where the device computes by itself, they are left alone.
pub fn awake_on<R>(device: &dyn Device, body: impl FnOnce() -> R) -> R {
    if device.resident().is_some() { body() } else { awake(body) }
}
