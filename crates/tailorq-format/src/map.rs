//! Opening a file as shared, memory-mapped bytes.

use crate::{FormatError, Result};
use memmap2::Mmap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use tailorq_tensor::SharedBytes;

/// Maps the file at `path` for reading. Directories, devices and empty files are refused.
pub(crate) fn map_file(path: &Path) -> Result<SharedBytes> {
    let file = File::open(path).map_err(|e| FormatError::io(path, "open", e))?;
    let metadata = file.metadata().map_err(|e| FormatError::io(path, "inspect", e))?;
    if !metadata.is_file() {
        return Err(FormatError::file(path, "is not a regular file", "give the path of a file"));
    }
    if metadata.len() == 0 {
        return Err(FormatError::damaged(path, "is empty"));
    }
    // SAFETY: the map is read-only and private to readers; as with every memory-mapped checkpoint, nobody may shorten or
    // rewrite the file in place while it is open. Our own writers never do: they write elsewhere and rename.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| FormatError::io(path, "map", e))?;
    Ok(SharedBytes::new(Arc::new(map)))
}
