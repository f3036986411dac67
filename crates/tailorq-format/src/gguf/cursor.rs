//! A little-endian reader that never runs past its bytes.

use crate::error::DAMAGED;
use crate::{FormatError, Result};
use std::path::Path;

/// Reads forward through the header of a file.
pub(super) struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(path: &'a Path, bytes: &'a [u8]) -> Self {
        Cursor { path, bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Bytes left in the file.
    pub(super) fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(super) fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        if n > self.remaining() {
            let problem = format!("ends inside {what}: byte {} needs {n} more, {} are left", self.at, self.remaining());
            return Err(FormatError::file(self.path, problem, DAMAGED));
        }
        let taken = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let taken = self.take(N, what)?;
        Ok(taken.try_into().expect("take returns as many bytes as asked"))
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things that take at least `least` bytes each, so that it can be checked against what is left of the
    /// file before anything is allocated.
    pub(super) fn count(&mut self, least: usize, what: &str) -> Result<usize> {
        let n = self.u64(what)?;
        if n > (self.remaining() / least) as u64 {
            let problem = format!("claims {n} {what}, more than its {} bytes can hold", self.bytes.len());
            return Err(FormatError::file(self.path, problem, DAMAGED));
        }
        Ok(n as usize)
    }

    /// A u64 length and so many bytes of UTF-8.
    pub(super) fn string(&mut self, what: &str) -> Result<&'a str> {
        let start = self.at;
        let n = self.count(1, "bytes of a string")?;
        std::str::from_utf8(self.take(n, what)?)
            .map_err(|e| FormatError::file(self.path, format!("{what} at byte {start} is not UTF-8: {e}"), DAMAGED))
    }
}
