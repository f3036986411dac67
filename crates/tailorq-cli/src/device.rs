//! The device of this process, chosen on the command line.

use crate::console::Console;
use clap::Args;
use std::sync::{Arc, OnceLock};
use tailorq::{Activations, CudaOptions, Decoders, Device, DeviceChoice, OpenedDevice, Precision};

/// Where every command computes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// Where to compute: cpu, cuda:N, several as cuda:N,M or cuda:all (surveys and Hessians share the data among them, decoding
    /// the blocks), or auto (the first CUDA device if there is one, else the CPU)
    #[arg(long, global = true, default_value_t = DeviceChoice::Auto, value_name = "DEVICE")]
    pub device: DeviceChoice,
    /// Arithmetic of products on a CUDA device: f32, faster and coarser tf32, or bf16, which is tf32 with a backward pass in bf16
    #[arg(long, global = true, default_value_t = Precision::F32, value_name = "TYPE")]
    pub precision: Precision,
    /// Memory of each CUDA device that may be taken, in GiB [default: what is free]
    #[arg(long, global = true, value_name = "GIB", value_parser = clap::value_parser!(u32).range(1..))]
    pub device_memory: Option<u32>,
    /// Memory for what a CUDA device has no room for, in GiB; what is beyond goes to files [default: half of what is free]
    #[arg(long, global = true, value_name = "GIB")]
    pub host_memory: Option<u32>,
}

static CHOSEN: OnceLock<DeviceArgs> = OnceLock::new();

/// Keeps the choice; once, before [`open`].
pub fn choose(args: DeviceArgs) {
    CHOSEN.get_or_init(|| args);
}

fn chosen() -> &'static DeviceArgs {
    CHOSEN.get().expect("main chooses before any command runs")
}

/// The device on which quantities are measured: packed weights meet f32 activations.
pub fn open(console: &Console) -> anyhow::Result<Arc<dyn Device>> {
    open_with(Activations::F32, console)
}

/// The device, whose CPU form rounds activations of packed weights to this type.
pub fn open_with(activations: Activations, console: &Console) -> anyhow::Result<Arc<dyn Device>> {
    let DeviceArgs { device, precision, device_memory, host_memory } = chosen();
    let bytes = |gib: u32| (gib as usize) << 30;
    let free = || tailorq::available_memory().map(|free| free as usize / 2);
    let host_memory = host_memory.map(bytes).or_else(free);
    let options = CudaOptions { precision: *precision, memory: device_memory.map(bytes), host_memory };
    let OpenedDevice { device, passed_over } = tailorq::open_device(device, activations, options)?;
    if let Some(error) = passed_over {
        console.note(&format!("computing on the CPU: {error}"));
    }
    if device.resident().is_some() {
        console.note(&format!("computing on {} (--device cpu for the CPU)", device.name()));
    }
    Ok(device)
}

/// What decodes by itself on the chosen device; `None` where that is the CPU.
pub fn decoders() -> anyhow::Result<Option<Arc<dyn Decoders>>> {
    Ok(tailorq::open_decoders(&chosen().device)?)
}
