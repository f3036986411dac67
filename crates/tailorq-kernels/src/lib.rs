//! About two dozen coarse operations, forward and backward, behind one trait: a scalar reference that defines each of them and the fast CPU device.
//!
//! Activations are `[tokens, width]` row-major f32. An operation's result depends on its inputs alone: work is cut into
//! a fixed partition and each task runs sequentially, so that any number of threads gives the same bits.

mod cpu;
mod device;
mod kv;
mod reference;
mod resident;
mod rounding;
mod shapes;

pub use cpu::awake;
pub use device::{
    AttentionShape, AttentionSpan, Device, GradientSums, Heads, HeadsMut, LogSumExp, NotPositiveDefinite, RopeTable,
    Strided, StridedMut,
};

pub use resident::{PutAway, Resident};
pub use rounding::{ClipCandidates, ErrorFeedback, KeptElements, Rounded, RoundingJob};

pub use kv::{KV_PAGE, KeyValues, KvBlock, KvType, Part};

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// In what precision packed weights meet the activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// As they are: the weights are read to f32. The reference of accuracy, and what quantization and evaluation use.
    #[default]
    F32,
    /// Rounded to 8 bits with a scale for every 32 inputs, and multiplied with the codes as integers: what decoding uses.
    /// Corrections of the weights see the activations as they are.
    Int8,
}

impl Activations {
    /// Every precision.
    pub const ALL: [Activations; 2] = [Activations::F32, Activations::Int8];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Activations::F32 => "f32",
            Activations::Int8 => "int8",
        }
    }
}

impl fmt::Display for Activations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Activations {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let known = Activations::ALL.into_iter().find(|a| a.name() == s);
        known.ok_or_else(|| format!("there are no '{s}' activations: use f32 or int8"))
    }
}

/// The scalar device that defines every operation.
pub fn reference() -> Arc<dyn Device> {
    Arc::new(reference::Reference)
}

/// The fast CPU device, with the instructions that this processor has.
pub fn cpu() -> Arc<dyn Device> {
    Arc::new(cpu::Cpu::variants().swap_remove(0))
}

/// The fast CPU device, whose linears with packed weights read activations in this precision.
pub fn cpu_with(activations: Activations) -> Arc<dyn Device> {
    Arc::new(cpu::Cpu::variants().swap_remove(0).with(activations))
}

/// The fast CPU device with `n` more of its kind as its peers: what several devices share among them can be seen, and tested, where
/// there is no more than a CPU. It is no faster.
pub fn cpu_with_peers(n: usize) -> Arc<dyn Device> {
    Arc::new(cpu::Cpu::variants().swap_remove(0).beside(n))
}

/// The CPU device once for each instruction set of this processor that it has code for, the best first. For tests.
pub fn cpu_variants() -> Vec<Arc<dyn Device>> {
    cpu_variants_with(Activations::F32)
}

/// As [`cpu_variants`], with activations of this precision.
pub fn cpu_variants_with(activations: Activations) -> Vec<Arc<dyn Device>> {
    cpu::Cpu::variants().into_iter().map(|cpu| Arc::new(cpu.with(activations)) as Arc<dyn Device>).collect()
}

/// Reads all of `data` once with every thread of the current pool, as fast as the memory gives it: the yardstick of kernels
/// that are bound by reading. The result depends on all elements and means nothing.
pub fn read_all(data: &[f32]) -> u32 {
    cpu::read_all(data)
}
