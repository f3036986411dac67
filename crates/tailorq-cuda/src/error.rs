//! What can go wrong before the first operation runs.

use thiserror::Error;

/// Why there is no CUDA device to work with.
#[derive(Debug, Error)]
pub enum CudaError {
    /// The driver's library cannot be loaded.
    #[error("no CUDA device: the NVIDIA driver (libcuda) is not installed; use --device cpu")]
    NoDriver,
    /// A library of the CUDA toolkit cannot be loaded.
    #[error(
        "no CUDA device: the library {name} was not found; install the CUDA 13 toolkit's run-time libraries and name their folder in LD_LIBRARY_PATH, or use --device cpu"
    )]
    NoLibrary {
        /// As the linker calls it.
        name: &'static str,
    },
    /// The machine has fewer devices.
    #[error("there is no CUDA device {ordinal}: the driver knows {count}; use a lower number or --device cpu")]
    NoDevice {
        /// What was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The processor lacks instructions that the kernels use.
    #[error(
        "CUDA device {ordinal} ({name}) has compute capability {major}.{minor}; 8.0 or higher is needed: use --device cpu"
    )]
    TooOld {
        /// Which device.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Compute capability.
        major: i32,
        /// Compute capability.
        minor: i32,
    },
    /// The driver refused something.
    #[error(
        "the CUDA driver refused to {what}: {error}; is the driver recent enough for CUDA 13, and the device free?"
    )]
    Driver {
        /// What was tried.
        what: &'static str,
        /// What it said.
        error: String,
    },
    /// A kernel did not compile, which its tests should have found.
    #[error("kernel source {source_name} does not compile for {arch}: {log}")]
    Compile {
        /// File of the source.
        source_name: &'static str,
        /// Target.
        arch: String,
        /// The compiler's words.
        log: String,
    },
    /// A model that a device has no room for.
    #[error(
        "the CUDA device {name} has {} MiB free, and its part of the model with {sequences} sequences of {capacity} tokens takes about {}: use fewer tokens or sequences, share it among several devices (--device cuda:0,1), or use --device cpu",
        free >> 20,
        needed >> 20
    )]
    Full {
        /// The device's name.
        name: String,
        /// Bytes that it would take.
        needed: usize,
        /// Bytes that are free.
        free: usize,
        /// Sequences at once.
        sequences: usize,
        /// Tokens of each.
        capacity: usize,
    },
    /// A model or a request that the kernels do not serve.
    #[error("the CUDA device does not compute {what}; use --device cpu, or --activations f32 where a command has that")]
    Unsupported {
        /// What was asked for.
        what: String,
    },
}

impl CudaError {
    /// Whether there simply is no device that could serve, as on most machines.
    pub fn is_absence(&self) -> bool {
        use CudaError::{NoDevice, NoDriver, NoLibrary, TooOld};
        matches!(self, NoDriver | NoLibrary { .. } | NoDevice { .. } | TooOld { .. })
    }
}
