//! Writing safetensors as a stream: the header is known before the first tensor is.
//!
//! Every tensor starts at a multiple of [`ALIGN`] bytes from the start of the file, so that a memory map can lend it to
//! any kernel. The format allows no holes; where a tensor does not end on such a multiple, a tensor of zero bytes named
//! `tailorq.pad.N` fills the gap. Readers of this crate hide them, other readers see small U8 tensors.

use crate::safetensors::{MAX_HEADER, METADATA, StoredType, tensor_bytes};
use crate::{AtomicFile, FormatError, Result};
use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Every tensor starts at a multiple of this many bytes in the file: a cache line, and the widest vector register.
pub const ALIGN: usize = 64;

/// Names of padding tensors begin with this.
pub(crate) const PAD_PREFIX: &str = "tailorq.pad.";

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: StoredType,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A tensor `name` of this type and shape.
    pub fn new(name: impl Into<String>, dtype: impl Into<StoredType>, shape: &[usize]) -> Self {
        TensorSpec { name: name.into(), dtype: dtype.into(), shape: shape.to_vec() }
    }

    /// Bytes of the tensor, or `None` when they overflow.
    pub fn bytes(&self) -> Option<usize> {
        tensor_bytes(self.dtype, &self.shape)
    }
}

struct Entry {
    name: String,
    len: usize,
    is_pad: bool,
}

/// Streams tensors into a safetensors file, in the order in which they were declared.
pub struct SafetensorsWriter<W: Write> {
    out: W,
    path: PathBuf,
    entries: Vec<Entry>,
    current: usize,
    /// Bytes written of the current entry.
    written: usize,
}

impl SafetensorsWriter<AtomicFile> {
    /// Starts the file `path`, which appears when [`SafetensorsWriter::commit`] succeeds.
    pub fn create(path: &Path, specs: &[TensorSpec], metadata: &[(&str, &str)]) -> Result<Self> {
        SafetensorsWriter::new(AtomicFile::create(path)?, path, specs, metadata)
    }

    /// See [`AtomicFile::sync`].
    pub fn sync(&mut self) -> Result<()> {
        self.out.sync()
    }

    /// Checks that every tensor is whole and gives the file its name.
    pub fn commit(self) -> Result<()> {
        self.finish()?.commit()
    }
}

impl<W: Write> SafetensorsWriter<W> {
    /// Writes the header to `out`; `path` only names it in errors. The metadata is preceded by `format: pt`, which
    /// Hugging Face loaders ask for. Fails on a repeated, reserved or impossible tensor.
    pub fn new(mut out: W, path: &Path, specs: &[TensorSpec], metadata: &[(&str, &str)]) -> Result<Self> {
        let (entries, header) = plan(path, specs, metadata)?;
        let length = (header.len() as u64).to_le_bytes();
        out.write_all(&length).and_then(|()| out.write_all(&header)).map_err(|e| FormatError::io(path, "write", e))?;
        Ok(SafetensorsWriter { out, path: path.to_owned(), entries, current: 0, written: 0 })
    }

    /// Appends bytes to the tensor `name`: the current one, or the next once the current one is whole. A tensor may come
    /// in any number of pieces.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        loop {
            let Some(entry) = self.entries.get(self.current) else {
                return Err(self.misuse(name, "was not declared, or comes too late".into()));
            };
            if entry.is_pad {
                self.write_pad()?;
                continue;
            }
            let left = entry.len - self.written;
            if entry.name == name {
                if bytes.len() > left {
                    return Err(self.misuse(name, format!("has {left} bytes left, {} were given", bytes.len())));
                }
                self.out.write_all(bytes).map_err(|e| FormatError::io(&self.path, "write", e))?;
                self.written += bytes.len();
                return Ok(());
            }
            if left > 0 {
                let problem = format!("comes before '{}' is whole ({left} bytes are missing)", entry.name);
                return Err(self.misuse(name, problem));
            }
            self.advance();
        }
    }

    /// Checks that every tensor is whole and returns the output, flushed.
    pub fn finish(mut self) -> Result<W> {
        while let Some(entry) = self.entries.get(self.current) {
            if entry.is_pad {
                self.write_pad()?;
            } else if self.written < entry.len {
                let problem = format!("ends {} bytes early", entry.len - self.written);
                return Err(self.misuse(&entry.name, problem));
            } else {
                self.advance();
            }
        }
        self.out.flush().map_err(|e| FormatError::io(&self.path, "write", e))?;
        Ok(self.out)
    }

    fn write_pad(&mut self) -> Result<()> {
        let zeros = [0u8; ALIGN];
        let len = self.entries[self.current].len;
        self.out.write_all(&zeros[..len]).map_err(|e| FormatError::io(&self.path, "write", e))?;
        self.advance();
        Ok(())
    }

    fn advance(&mut self) {
        self.current += 1;
        self.written = 0;
    }

    fn misuse(&self, name: &str, problem: String) -> FormatError {
        FormatError::tensor(&self.path, name, problem, "write the tensors whole and in the order declared")
    }
}

/// The tensors with their padding, and the header padded with spaces so that the data starts aligned.
fn plan(path: &Path, specs: &[TensorSpec], metadata: &[(&str, &str)]) -> Result<(Vec<Entry>, Vec<u8>)> {
    let mut entries = Vec::with_capacity(specs.len());
    let mut names = HashSet::with_capacity(specs.len());
    let mut header = String::from("{");
    push_metadata(&mut header, metadata);
    let (mut at, mut n_pads) = (0usize, 0);
    for spec in specs {
        let fail = |problem: &str| FormatError::tensor(path, &spec.name, problem, "choose another name or shape");
        if spec.name == METADATA || spec.name.starts_with(PAD_PREFIX) {
            return Err(fail("has a reserved name"));
        }
        if !names.insert(spec.name.as_str()) {
            return Err(fail("is declared twice"));
        }
        let pad = at.next_multiple_of(ALIGN) - at;
        if pad > 0 {
            let name = format!("{PAD_PREFIX}{n_pads}");
            push_tensor(&mut header, &name, StoredType::U8, &[pad], at..at + pad);
            entries.push(Entry { name, len: pad, is_pad: true });
            n_pads += 1;
            at += pad;
        }
        let len = spec.bytes().ok_or_else(|| fail("has an impossible shape"))?;
        // Room for one more padding keeps every sum above from overflowing.
        let end = at.checked_add(len).filter(|end| *end <= isize::MAX as usize - ALIGN);
        let end = end.ok_or_else(|| fail("makes the file too large"))?;
        push_tensor(&mut header, &spec.name, spec.dtype, &spec.shape, at..end);
        entries.push(Entry { name: spec.name.clone(), len, is_pad: false });
        at = end;
    }
    header.push('}');
    let mut header = header.into_bytes();
    header.resize((8 + header.len()).next_multiple_of(ALIGN) - 8, b' ');
    if header.len() > MAX_HEADER {
        return Err(FormatError::file(path, "needs a header above 100 MB", "write the tensors in several shards"));
    }
    Ok((entries, header))
}

fn push_metadata(header: &mut String, metadata: &[(&str, &str)]) {
    *header += &format!("{}:{{\"format\":\"pt\"", quoted(METADATA));
    for (key, value) in metadata.iter().filter(|(key, _)| *key != "format") {
        *header += &format!(",{}:{}", quoted(key), quoted(value));
    }
    header.push('}');
}

fn push_tensor(header: &mut String, name: &str, dtype: StoredType, shape: &[usize], at: std::ops::Range<usize>) {
    let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    *header += &format!(
        ",{}:{{\"dtype\":\"{dtype}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
        quoted(name),
        sizes.join(","),
        at.start,
        at.end
    );
}

/// A JSON string.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
