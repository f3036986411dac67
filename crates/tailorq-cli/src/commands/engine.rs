//! The flags of `run`, `chat` and `bench` that say how a model computes.

use crate::console::Console;
use clap::Args;
use std::sync::Arc;
use tailorq::{Activations, Device};
use tailorq_runtime::KvType;

/// Precisions while the model runs.
#[derive(Args)]
#[command(next_help_heading = "Precision")]
pub struct EngineArgs {
    /// Precision in which packed weights meet activations: int8 (fast) or f32 (the reference). Weights of other formats
    /// always meet f32
    #[arg(long, default_value_t = Activations::Int8, value_name = "TYPE")]
    pub activations: Activations,
    /// How keys and values are kept: f16, q8 (half of that) or f32 (the reference)
    #[arg(long, default_value_t = KvType::F16, value_name = "TYPE")]
    pub kv: KvType,
}

impl EngineArgs {
    /// The device that computes so.
    pub fn device(&self, console: &Console) -> anyhow::Result<Arc<dyn Device>> {
        crate::device::open_with(self.activations, console)
    }
}
