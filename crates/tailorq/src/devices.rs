//! Which device a run computes on.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use tailorq_cuda::{CudaError, CudaOptions};
use tailorq_kernels::{Activations, Device};

/// A device, as a user names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device if there is one that works, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda(0)),
            _ => s
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(DeviceChoice::Cuda)
                .ok_or_else(|| format!("there is no device '{s}': use auto, cpu, cuda or cuda:N")),
        }
    }
}

/// An opened device.
pub struct OpenedDevice {
    /// To compute with.
    pub device: Arc<dyn Device>,
    /// Why an automatic choice passed over a CUDA device that is there.
    pub passed_over: Option<CudaError>,
}

/// Opens the device. `activations` are those of packed weights on the CPU; a CUDA device computes with the precision of
/// `options`.
pub fn open_device(
    choice: DeviceChoice,
    activations: Activations,
    options: CudaOptions,
) -> Result<OpenedDevice, CudaError> {
    let cpu = |passed_over| OpenedDevice { device: tailorq_kernels::cpu_with(activations), passed_over };
    let cuda = |device| OpenedDevice { device, passed_over: None };
    match choice {
        DeviceChoice::Cpu => Ok(cpu(None)),
        DeviceChoice::Cuda(ordinal) => tailorq_cuda::open(ordinal, options).map(cuda),
        // A machine without a device, or with one that cannot serve, has a CPU.
        DeviceChoice::Auto => {
            Ok(tailorq_cuda::open(0, options).map_or_else(|error| cpu((!error.is_absence()).then_some(error)), cuda))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        for (name, choice) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda:0", DeviceChoice::Cuda(0)),
            ("cuda:12", DeviceChoice::Cuda(12)),
        ] {
            assert_eq!(name.parse(), Ok(choice));
            assert_eq!(choice.to_string(), name);
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:x"] {
            assert!(bad.parse::<DeviceChoice>().unwrap_err().contains("cuda:N"), "{bad}");
        }
    }
}
