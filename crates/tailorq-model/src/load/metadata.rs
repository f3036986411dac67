//! GGUF metadata with errors that name the file.

use crate::error::ModelError;
use std::path::Path;

/// The metadata of one GGUF file.
#[derive(Clone, Copy)]
pub(crate) struct Metadata<'a> {
    inner: &'a tailorq_format::gguf::Metadata,
    path: &'a Path,
}

impl<'a> Metadata<'a> {
    pub(crate) fn new(file: &'a tailorq_format::GgufFile) -> Self {
        Metadata { inner: file.metadata(), path: file.path() }
    }

    /// An error about the file as a whole.
    pub(crate) fn problem(&self, problem: &str) -> ModelError {
        ModelError::File { path: self.path.to_owned(), problem: problem.to_owned() }
    }

    /// A value that may be absent; a value of another type is an error.
    pub(crate) fn string(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        Ok(self.inner.get(key)?)
    }

    /// An unsigned integer of any width.
    pub(crate) fn uint(&self, key: &str) -> Result<Option<u64>, ModelError> {
        Ok(self.inner.get(key)?)
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>, ModelError> {
        Ok(self.inner.get(key)?)
    }

    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        Ok(self.inner.get(key)?)
    }

    pub(crate) fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>, ModelError> {
        let strings: Option<&[String]> = self.inner.get(key)?;
        Ok(strings.map(|s| s.iter().map(String::as_str).collect()))
    }

    pub(crate) fn floats(&self, key: &str) -> Result<Option<&'a [f32]>, ModelError> {
        Ok(self.inner.get(key)?)
    }

    pub(crate) fn ints(&self, key: &str) -> Result<Option<Vec<i64>>, ModelError> {
        Ok(self.inner.get(key)?)
    }
}
