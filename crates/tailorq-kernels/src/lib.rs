//! About two dozen coarse operations, forward and backward, behind one trait: a scalar reference that defines each of them and the fast CPU device.
//!
//! Activations are `[tokens, width]` row-major f32. An operation's result depends on its inputs alone: work is cut into
//! a fixed partition and each task runs sequentially, so that any number of threads gives the same bits.

mod cpu;
mod device;
mod reference;
mod shapes;

pub use device::{
    AttentionShape, AttentionSpan, Device, GradientSums, Heads, HeadsMut, LogSumExp, NotPositiveDefinite, RopeTable,
    Strided, StridedMut,
};

use std::sync::Arc;

/// The scalar device that defines every operation.
pub fn reference() -> Arc<dyn Device> {
    Arc::new(reference::Reference)
}

/// The fast CPU device, with the instructions that this processor has.
pub fn cpu() -> Arc<dyn Device> {
    Arc::new(cpu::Cpu::variants().swap_remove(0))
}

/// The CPU device once for each instruction set of this processor that it has code for, the best first. For tests.
pub fn cpu_variants() -> Vec<Arc<dyn Device>> {
    cpu::Cpu::variants().into_iter().map(|cpu| Arc::new(cpu) as Arc<dyn Device>).collect()
}
