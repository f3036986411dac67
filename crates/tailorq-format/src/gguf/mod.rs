//! Reading GGUF (versions 2 and 3), in one file or split.
//!
//! `"GGUF"`, version, counts, metadata, tensor infos, padding, data; all little-endian. Everything is checked when the
//! file is opened except what cannot be known of a type without a decoder: such a tensor only fails when it is fetched.

pub mod blocks;
mod cursor;
mod header;
mod metadata;

pub use blocks::BlockType;
pub use header::GgufTensor;
pub use metadata::{Array, FromValue, Metadata, Value};

use crate::{FormatError, Result};
use header::Part;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tailorq_tensor::{ReadRows, SharedBytes};

/// An open GGUF model.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    metadata: Metadata,
    /// In file order, split files one after the other.
    tensors: Vec<GgufTensor>,
    by_name: HashMap<String, usize>,
}

impl GgufFile {
    /// Maps and validates a file. Any file of a split model opens the whole model.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let part = Part::open(path)?;
        match part.metadata.get::<usize>("split.count")? {
            None | Some(0 | 1) => GgufFile::join(path, vec![part]),
            Some(count) => GgufFile::open_split(path, count),
        }
    }

    /// Validates bytes that are already in memory; `path` only names them in errors.
    pub fn parse(path: &Path, bytes: SharedBytes) -> Result<Self> {
        let part = Part::parse(path, bytes)?;
        if let Some(count @ 2..) = part.metadata.get::<usize>("split.count")? {
            let problem = format!("is one of {count} files");
            return Err(FormatError::file(path, problem, "open it by its path, beside the other files"));
        }
        GgufFile::join(path, vec![part])
    }

    fn open_split(path: &Path, count: usize) -> Result<Self> {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let stem = split_stem(name, count).ok_or_else(|| {
            let problem = format!("is one of {count} files, but its name does not end in -00001-of-{count:05}.gguf");
            FormatError::file(path, problem, "give the files of the model their original names")
        })?;
        let mut parts = Vec::new();
        for i in 0..count {
            let part_path = path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", i + 1));
            if !part_path.exists() {
                return Err(FormatError::file(&part_path, "is missing", "fetch all files of the split model"));
            }
            let part = Part::open(&part_path)?;
            let no = part.metadata.require::<usize>("split.no")?;
            if no != i || part.metadata.require::<usize>("split.count")? != count {
                let problem = format!("says that it is number {} of another split", no.saturating_add(1));
                return Err(FormatError::file(&part_path, problem, "fetch all files of the split model together"));
            }
            parts.push(part);
        }
        let file = GgufFile::join(path, parts)?;
        if let Some(n) = file.metadata.get::<usize>("split.tensors.count")?
            && n != file.tensors.len()
        {
            let problem = format!("announces {n} tensors, its {count} files hold {}", file.tensors.len());
            return Err(FormatError::file(path, problem, "fetch all files of the split model together"));
        }
        Ok(file)
    }

    /// The metadata of the first part and the tensors of all.
    fn join(path: &Path, parts: Vec<Part>) -> Result<Self> {
        let mut tensors = Vec::new();
        let mut by_name = HashMap::new();
        let mut metadata = None;
        for part in parts {
            metadata.get_or_insert(part.metadata);
            for tensor in part.tensors {
                if by_name.insert(tensor.name().to_owned(), tensors.len()).is_some() {
                    return Err(FormatError::tensor(
                        tensor.file(),
                        tensor.name(),
                        "occurs twice",
                        crate::error::DAMAGED,
                    ));
                }
                tensors.push(tensor);
            }
        }
        let metadata = metadata.ok_or_else(|| FormatError::damaged(path, "has no parts"))?;
        Ok(GgufFile { path: path.to_owned(), metadata, tensors, by_name })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata; of a split model, that of its first file.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors in file order.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The tensor `name`.
    pub fn get(&self, name: &str) -> Option<&GgufTensor> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// The tensor `name`; its absence is an error.
    pub fn require(&self, name: &str) -> Result<&GgufTensor> {
        self.get(name).ok_or_else(|| {
            FormatError::tensor(&self.path, name, "is missing", "the file is incomplete or of another architecture")
        })
    }

    /// The weight `name`, decoded row by row as it is read.
    pub fn rows(&self, name: &str) -> Result<Arc<dyn ReadRows>> {
        self.require(name)?.rows()
    }

    /// The vector `name` as f32.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        self.require(name)?.vector()
    }
}

/// The part of a split file's name before `-00001-of-00003.gguf`.
fn split_stem(name: &str, count: usize) -> Option<&str> {
    let front = name.strip_suffix(&format!("-of-{count:05}.gguf"))?;
    let (stem, number) = front.rsplit_once('-')?;
    (number.len() >= 5 && number.bytes().all(|b| b.is_ascii_digit())).then_some(stem)
}
