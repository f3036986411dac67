//! Which device a run computes on.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use tailorq_cuda::{CudaDecoders, CudaError, CudaOptions};
use tailorq_kernels::{Activations, Device};
use tailorq_model::Decoders;

/// A device, or several, as a user names them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device if there is one that works, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA devices of these numbers, which share the work; the first leads.
    Cuda(Vec<usize>),
    /// All CUDA devices.
    CudaAll,
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(ordinals) => {
                let numbers: Vec<String> = ordinals.iter().map(usize::to_string).collect();
                write!(f, "cuda:{}", numbers.join(","))
            }
            DeviceChoice::CudaAll => f.write_str("cuda:all"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => return Ok(DeviceChoice::Auto),
            "cpu" => return Ok(DeviceChoice::Cpu),
            "cuda" => return Ok(DeviceChoice::Cuda(vec![0])),
            "cuda:all" => return Ok(DeviceChoice::CudaAll),
            _ => {}
        }
        let unknown = || format!("there is no device '{s}': use auto, cpu, cuda, cuda:N, cuda:N,M,... or cuda:all");
        let numbers = s.strip_prefix("cuda:").ok_or_else(unknown)?.split(',').map(str::parse);
        let ordinals = numbers.collect::<Result<Vec<usize>, _>>().map_err(|_| unknown())?;
        match ordinals.iter().enumerate().find(|(i, o)| ordinals[..*i].contains(o)) {
            Some((_, twice)) => Err(format!("device {twice} is named twice in '{s}': name each once")),
            None => Ok(DeviceChoice::Cuda(ordinals)),
        }
    }
}

impl DeviceChoice {
    /// The numbers of CUDA devices; none for the CPU.
    fn ordinals(&self) -> Result<Vec<usize>, CudaError> {
        match self {
            DeviceChoice::Cpu => Ok(Vec::new()),
            DeviceChoice::Auto => Ok(vec![0]),
            DeviceChoice::Cuda(ordinals) => Ok(ordinals.clone()),
            DeviceChoice::CudaAll => match tailorq_cuda::count()? {
                0 => Err(CudaError::NoDevice { ordinal: 0, count: 0 }),
                n => Ok((0..n).collect()),
            },
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
    choice: &DeviceChoice,
    activations: Activations,
    options: CudaOptions,
) -> Result<OpenedDevice, CudaError> {
    let cpu = |passed_over| OpenedDevice { device: tailorq_kernels::cpu_with(activations), passed_over };
    let found = match (choice, choice.ordinals()) {
        (DeviceChoice::Cpu, _) => return Ok(cpu(None)),
        (_, ordinals) => ordinals.and_then(|ordinals| tailorq_cuda::open_several(&ordinals, options)),
    };
    match found {
        Ok(device) => Ok(OpenedDevice { device, passed_over: None }),
        // A machine without a device, or with one that cannot serve, has a CPU.
        Err(error) if *choice == DeviceChoice::Auto => Ok(cpu((!error.is_absence()).then_some(error))),
        Err(error) => Err(error),
    }
}

/// What decodes by itself on the chosen device; `None` where that is the CPU.
pub fn open_decoders(choice: &DeviceChoice) -> Result<Option<Arc<dyn Decoders>>, CudaError> {
    let ordinals = choice.ordinals()?;
    if ordinals.is_empty() {
        return Ok(None);
    }
    match CudaDecoders::new(&ordinals) {
        Ok(decoders) => Ok(Some(Arc::new(decoders))),
        // Whoever opens the device says why an automatic choice passed it over.
        Err(_) if *choice == DeviceChoice::Auto => Ok(None),
        Err(error) => Err(error),
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
            ("cuda:0", DeviceChoice::Cuda(vec![0])),
            ("cuda:12", DeviceChoice::Cuda(vec![12])),
            ("cuda:2,0,1", DeviceChoice::Cuda(vec![2, 0, 1])),
            ("cuda:all", DeviceChoice::CudaAll),
        ] {
            assert_eq!(name.parse().as_ref(), Ok(&choice));
            assert_eq!(choice.to_string(), name);
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(vec![0])));
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:0,", "cuda:0,x", "all"] {
            assert!(bad.parse::<DeviceChoice>().unwrap_err().contains("cuda:N"), "{bad}");
        }
        assert!("cuda:1,0,1".parse::<DeviceChoice>().unwrap_err().contains("1 is named twice"));
    }
}
