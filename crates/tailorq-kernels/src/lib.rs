//! About twenty coarse operations, behind one trait: a scalar reference that defines each of them and the fast CPU device.
//!
//! Activations are `[tokens, width]` row-major f32. An operation's result depends on its inputs alone: work is cut into
//! a fixed partition and each task runs sequentially, so that any number of threads gives the same bits.

mod device;

pub use device::{AttentionShape, AttentionSpan, Device, NotPositiveDefinite, RopeTable, Strided, StridedMut};

/// The scalar device that defines every operation.
pub fn reference() -> std::sync::Arc<dyn Device> {
    todo!()
}

/// The fast CPU device, with the instructions that this processor has.
pub fn cpu() -> std::sync::Arc<dyn Device> {
    todo!()
}
