//! File formats of tailorq: safetensors, GGUF, packed matrices and atomic writing.
//!
//! This crate knows names and bytes, not meaning. Readers validate everything at the door (a file is hostile until its
//! header has been checked) and then lend ranges of the memory map; writers stream, and a file appears under its name
//! only when it is whole.

pub mod container;
mod error;
pub mod gguf;
mod json;
mod map;
pub mod packed;
pub mod safetensors;
#[doc(hidden)]
pub mod testing;
pub mod writer;

pub use container::{AtomicFile, write_atomic};
pub use error::FormatError;
pub use gguf::GgufFile;
pub use packed::{FORMAT_VERSION, format_version, packed_specs, packed_tensors, read_packed};
pub use safetensors::{SafetensorsFile, StoredType, TensorSet, TensorView};
pub use writer::{SafetensorsWriter, TensorSpec};

/// Results of this crate.
pub type Result<T, E = FormatError> = std::result::Result<T, E>;
