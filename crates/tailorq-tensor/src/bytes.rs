//! Bytes that are shared, not copied: a range of a memory map or of a vector, cheap to clone.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

/// A range of immutable bytes that keeps its owner (a memory map, a vector) alive.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl SharedBytes {
    /// All bytes of `owner`.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        let len = (*owner).as_ref().len();
        SharedBytes { owner, range: 0..len }
    }

    /// Takes over a vector of plain numbers; the bytes keep the alignment of `T`.
    pub fn from_vec<T: bytemuck::NoUninit + Send + Sync>(values: Vec<T>) -> Self {
        SharedBytes::new(Arc::new(PodVec(values)))
    }

    /// The bytes `range` of these bytes, or `None` when the range does not lie within.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.len() {
            return None;
        }
        let start = self.range.start + range.start;
        Some(SharedBytes { owner: Arc::clone(&self.owner), range: start..start + (range.end - range.start) })
    }

    /// These bytes as numbers, or `None` when length or alignment do not fit `T`. No bytes are no numbers, wherever they lie.
    pub fn cast<T: bytemuck::AnyBitPattern>(&self) -> Option<&[T]> {
        if self.is_empty() {
            return Some(&[]);
        }
        bytemuck::try_cast_slice(self).ok()
    }
}

impl Deref for SharedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedBytes({} bytes)", self.range.len())
    }
}

struct PodVec<T>(Vec<T>);

impl<T: bytemuck::NoUninit> AsRef<[u8]> for PodVec<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}
