//! Reading safetensors: one file, or a Hugging Face directory with one or many shards.
//!
//! The layout is `u64 n`, `n` bytes of JSON, data. Everything the JSON claims is checked when the file is opened: the
//! tensors lie inside the file, one after the other with neither holes nor overlaps, and each has the bytes that its
//! shape and type ask for. Afterwards a tensor is a range of the memory map.

use crate::error::{DAMAGED, printable};
use crate::json::{UniqueMap, unique_entries};
use crate::map::map_file;
use crate::writer::PAD_PREFIX;
use crate::{FormatError, Result};
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::{Component, Path, PathBuf};
use tailorq_tensor::{DType, DenseRows, SharedBytes};

/// Largest header that is read, as in the reference implementation.
pub(crate) const MAX_HEADER: usize = 100_000_000;

/// The name under which the header holds free-form metadata.
pub(crate) const METADATA: &str = "__metadata__";

macro_rules! stored_types {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $size:literal;)*) => {
        /// Element types of safetensors files.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum StoredType { $($(#[$doc])* $variant,)* }

        impl StoredType {
            /// All types.
            pub const ALL: &'static [StoredType] = &[$(StoredType::$variant,)*];

            /// The name in the header.
            pub fn name(self) -> &'static str {
                match self { $(StoredType::$variant => $name,)* }
            }

            /// Bytes of one element.
            pub fn size(self) -> usize {
                match self { $(StoredType::$variant => $size,)* }
            }

            /// The type that the header calls `name`.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(StoredType::$variant),)* _ => None }
            }
        }
    };
}

stored_types! {
    /// One byte, 0 or 1.
    Bool = "BOOL", 1;
    /// 8-bit unsigned.
    U8 = "U8", 1;
    /// 8-bit signed.
    I8 = "I8", 1;
    /// 8-bit float, 5 exponent bits.
    F8E5M2 = "F8_E5M2", 1;
    /// 8-bit float, 4 exponent bits.
    F8E4M3 = "F8_E4M3", 1;
    /// 8-bit power of two.
    F8E8M0 = "F8_E8M0", 1;
    /// 16-bit unsigned.
    U16 = "U16", 2;
    /// 16-bit signed.
    I16 = "I16", 2;
    /// Half precision.
    F16 = "F16", 2;
    /// Upper half of single precision.
    BF16 = "BF16", 2;
    /// 32-bit unsigned.
    U32 = "U32", 4;
    /// 32-bit signed.
    I32 = "I32", 4;
    /// Single precision.
    F32 = "F32", 4;
    /// 64-bit unsigned.
    U64 = "U64", 8;
    /// 64-bit signed.
    I64 = "I64", 8;
    /// Double precision.
    F64 = "F64", 8;
    /// Two f32: real and imaginary part.
    C64 = "C64", 8;
}

impl StoredType {
    /// The dense weight type, `None` for integers and exotic floats.
    pub fn dense(self) -> Option<DType> {
        match self {
            StoredType::F32 => Some(DType::F32),
            StoredType::F16 => Some(DType::F16),
            StoredType::BF16 => Some(DType::BF16),
            _ => None,
        }
    }
}

impl From<DType> for StoredType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => StoredType::F32,
            DType::F16 => StoredType::F16,
            DType::BF16 => StoredType::BF16,
        }
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Bytes of a tensor, or `None` on overflow.
pub(crate) fn tensor_bytes(dtype: StoredType, shape: &[usize]) -> Option<usize> {
    // A zero anywhere makes the tensor empty, but the other sizes must still not overflow: that is a damaged shape.
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?.checked_mul(dtype.size())
}

/// One tensor of an open file. Cloning the bytes copies no data.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    /// Its name.
    pub name: &'a str,
    /// Element type.
    pub dtype: StoredType,
    /// Sizes, outermost first.
    pub shape: &'a [usize],
    /// Little-endian elements, row-major.
    pub bytes: SharedBytes,
    /// The file that holds it.
    pub file: &'a Path,
}

impl TensorView<'_> {
    /// Fails unless the tensor has this type and shape.
    pub fn expect(&self, dtype: StoredType, shape: &[usize]) -> Result<()> {
        if self.dtype == dtype && self.shape == shape {
            return Ok(());
        }
        let problem = format!("is {} {:?}, expected {dtype} {shape:?}", self.dtype, self.shape);
        Err(self.error(problem, "the file does not match its configuration"))
    }

    /// A weight `[rows, cols]` in F32, F16 or BF16, left in the memory map.
    pub fn dense_rows(&self) -> Result<DenseRows> {
        let &[rows, cols] = self.shape else {
            return Err(self.error(format!("has shape {:?}, expected two dimensions", self.shape), WRONG_MODEL));
        };
        let rows = DenseRows::new(rows, cols, self.dense_type()?, self.bytes.clone());
        rows.ok_or_else(|| self.error("has the wrong number of bytes", DAMAGED))
    }

    /// A vector in F32, F16 or BF16 as f32.
    pub fn to_vector(&self) -> Result<Vec<f32>> {
        let &[len] = self.shape else {
            return Err(self.error(format!("has shape {:?}, expected one dimension", self.shape), WRONG_MODEL));
        };
        let mut values = vec![0.0; len];
        self.dense_type()?.decode(&self.bytes, &mut values);
        Ok(values)
    }

    fn dense_type(&self) -> Result<DType> {
        self.dtype.dense().ok_or_else(|| {
            self.error(
                format!("has type {}", self.dtype),
                "weights are read in F32, F16 or BF16: convert the checkpoint",
            )
        })
    }

    fn error(&self, problem: impl Into<String>, remedy: &str) -> FormatError {
        FormatError::tensor(self.file, self.name, problem, remedy)
    }
}

const WRONG_MODEL: &str = "check that the checkpoint belongs to its config.json";

#[derive(Debug)]
struct Entry {
    name: String,
    dtype: StoredType,
    shape: Vec<usize>,
    bytes: SharedBytes,
}

/// One open safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    metadata: BTreeMap<String, String>,
    /// In the order of the data; the padding of our own writer is left out.
    entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
}

impl SafetensorsFile {
    /// Maps and validates a file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        SafetensorsFile::parse(path, map_file(path)?)
    }

    /// Validates bytes that are already in memory; `path` only names them in errors.
    pub fn parse(path: &Path, bytes: SharedBytes) -> Result<Self> {
        let (header, data) = split_header(path, &bytes)?;
        let header: Header = serde_json::from_slice(&header)
            .map_err(|e| FormatError::damaged(path, format!("the header is not a valid safetensors header: {e}")))?;
        let Header { metadata, tensors } = header;
        let entries = check_entries(path, tensors, &data)?;
        let by_name = entries.iter().enumerate().map(|(i, e)| (e.name.clone(), i)).collect();
        Ok(SafetensorsFile { path: path.to_owned(), metadata, entries, by_name })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The free-form metadata of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Tensor names in the order of the data.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.iter().map(|e| e.name.as_str())
    }

    /// The tensor `name`.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.by_name.get(name).map(|&i| self.view(i))
    }

    /// All tensors in the order of the data.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        (0..self.entries.len()).map(|i| self.view(i))
    }

    fn view(&self, i: usize) -> TensorView<'_> {
        let e = &self.entries[i];
        TensorView { name: &e.name, dtype: e.dtype, shape: &e.shape, bytes: e.bytes.clone(), file: &self.path }
    }
}

/// What a header says, before any check but that of unique names.
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Header, A::Error> {
        let mut metadata = BTreeMap::new();
        let entries = unique_entries(map, |name, map| {
            if name == METADATA {
                let pairs: Option<UniqueMap<String>> = map.next_value()?;
                metadata.extend(pairs.into_iter().flat_map(|p| p.0));
                return Ok(None);
            }
            let tensor = map.next_value::<RawTensor>();
            tensor.map(Some).map_err(|e| A::Error::custom(format!("tensor '{}': {e}", printable(name))))
        })?;
        let tensors = entries.into_iter().filter_map(|(name, tensor)| Some((name, tensor?))).collect();
        Ok(Header { metadata, tensors })
    }
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header and the data of a file.
fn split_header(path: &Path, bytes: &SharedBytes) -> Result<(SharedBytes, SharedBytes)> {
    let Some(length) = bytes.first_chunk::<8>() else {
        return Err(FormatError::damaged(path, format!("has {} bytes, too few for a safetensors file", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER as u64 {
        let problem = format!("claims a header of {length} bytes, more than any safetensors file has");
        return Err(FormatError::file(path, problem, "check that this is a safetensors file, and fetch it again"));
    }
    let end = 8 + length as usize;
    match (bytes.slice(8..end), bytes.slice(end..bytes.len())) {
        (Some(header), Some(data)) => Ok((header, data)),
        _ => {
            let problem = format!("claims a header of {length} bytes, but the file has only {}", bytes.len());
            Err(FormatError::damaged(path, problem))
        }
    }
}

/// Checks every claim about the data and resolves it to ranges, in the order of the data.
fn check_entries(path: &Path, tensors: Vec<(String, RawTensor)>, data: &SharedBytes) -> Result<Vec<Entry>> {
    let mut checked = Vec::with_capacity(tensors.len());
    for (name, raw) in tensors {
        let fail = |problem: String| FormatError::tensor(path, &name, problem, DAMAGED);
        let dtype = StoredType::from_name(&raw.dtype).ok_or_else(|| {
            let problem = format!("has the unknown type '{}'", printable(&raw.dtype));
            FormatError::tensor(path, &name, problem, "convert the checkpoint to F32, F16 or BF16")
        })?;
        let (begin, end) = raw.data_offsets;
        if begin > end {
            return Err(fail(format!("begins at {begin} after its end {end}")));
        }
        if end > data.len() as u64 {
            return Err(fail(format!("ends at byte {end} of the data, but the file holds only {}", data.len())));
        }
        let shape: Option<Vec<usize>> = raw.shape.iter().map(|&d| usize::try_from(d).ok()).collect();
        let expected = shape.as_ref().and_then(|s| tensor_bytes(dtype, s));
        let (Some(shape), Some(expected)) = (shape, expected) else {
            return Err(fail(format!("has the impossible shape {:?}", raw.shape)));
        };
        if expected as u64 != end - begin {
            return Err(fail(format!("is {dtype} {shape:?}, {expected} bytes, but is given {}", end - begin)));
        }
        let range = begin as usize..end as usize;
        let bytes = data.slice(range.clone()).ok_or_else(|| fail("lies outside the file".into()))?;
        checked.push((range, Entry { name, dtype, shape, bytes }));
    }
    checked.sort_by_key(|(range, _)| (range.start, range.end));
    let mut at = 0;
    for (range, entry) in &checked {
        if range.start != at {
            let problem = format!("begins at byte {} of the data, but the one before it ends at {at}", range.start);
            return Err(FormatError::tensor(path, &entry.name, problem, DAMAGED));
        }
        at = range.end;
    }
    if at != data.len() {
        let problem = format!("holds {} bytes of data, but its tensors end at byte {at}", data.len());
        return Err(FormatError::damaged(path, problem));
    }
    Ok(checked.into_iter().map(|(_, e)| e).filter(|e| !e.name.starts_with(PAD_PREFIX)).collect())
}

/// The tensors of a checkpoint, whether in one file or in shards.
#[derive(Debug)]
pub struct TensorSet {
    place: PathBuf,
    files: Vec<SafetensorsFile>,
    /// By file, then by place in the file.
    order: Vec<(usize, usize)>,
    by_name: HashMap<String, (usize, usize)>,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

impl TensorSet {
    /// Opens a safetensors file or a directory that holds a checkpoint.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() { TensorSet::open_dir(path) } else { Ok(TensorSet::single(SafetensorsFile::open(path)?)) }
    }

    /// Opens `model.safetensors` or the shards of `model.safetensors.index.json` in `dir`.
    pub fn open_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let single = dir.join("model.safetensors");
        if single.exists() {
            return Ok(TensorSet { place: dir.to_owned(), ..TensorSet::single(SafetensorsFile::open(single)?) });
        }
        let index = dir.join("model.safetensors.index.json");
        if index.exists() {
            return TensorSet::open_shards(dir, &index);
        }
        let problem = "has neither model.safetensors nor model.safetensors.index.json";
        let remedy = if dir.join("pytorch_model.bin").exists() || dir.join("pytorch_model.bin.index.json").exists() {
            "convert the PyTorch checkpoint to safetensors (transformers: save_pretrained)"
        } else {
            "give the directory of a Hugging Face checkpoint"
        };
        Err(FormatError::file(dir, problem, remedy))
    }

    fn single(file: SafetensorsFile) -> Self {
        let order: Vec<_> = (0..file.entries.len()).map(|i| (0, i)).collect();
        let by_name = file.by_name.iter().map(|(n, &i)| (n.clone(), (0, i))).collect();
        TensorSet { place: file.path.clone(), files: vec![file], order, by_name }
    }

    fn open_shards(dir: &Path, index_path: &Path) -> Result<Self> {
        let text = std::fs::read(index_path).map_err(|e| FormatError::io(index_path, "read", e))?;
        let index: Index = serde_json::from_slice(&text)
            .map_err(|e| FormatError::damaged(index_path, format!("is not a valid shard index: {e}")))?;
        let map = index.weight_map.0;
        let shards: BTreeSet<&str> = map.iter().map(|(_, shard)| shard.as_str()).collect();
        let mut files = Vec::with_capacity(shards.len());
        for shard in &shards {
            let path = shard_path(dir, shard).ok_or_else(|| {
                let problem = format!("names the shard '{}' outside its directory", printable(shard));
                FormatError::file(index_path, problem, "a shard is a file beside the index: do not use this checkpoint")
            })?;
            if !path.exists() {
                let problem = format!("is missing, though {} names it", index_path.display());
                return Err(FormatError::file(&path, problem, "fetch the missing shard"));
            }
            files.push(SafetensorsFile::open(path)?);
        }
        let file_idx: HashMap<&str, usize> = shards.iter().enumerate().map(|(i, s)| (*s, i)).collect();
        let mut by_name = HashMap::with_capacity(map.len());
        for (name, shard) in &map {
            let f = file_idx[shard.as_str()];
            if name.starts_with(PAD_PREFIX) {
                continue;
            }
            let Some(&t) = files[f].by_name.get(name) else {
                let problem = format!("is not in this shard, though {} says so", index_path.display());
                return Err(FormatError::tensor(files[f].path(), name, problem, "fetch index and shards together"));
            };
            by_name.insert(name.clone(), (f, t));
        }
        let mut order: Vec<_> = by_name.values().copied().collect();
        order.sort_unstable();
        Ok(TensorSet { place: dir.to_owned(), files, order, by_name })
    }

    /// The directory or file.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// The open files, in the order of their names.
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// Tensor names: by shard name, then in the order of the data.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.order.iter().map(|&(f, t)| self.files[f].entries[t].name.as_str())
    }

    /// All tensors in the order of [`TensorSet::names`].
    pub fn iter(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        self.order.iter().map(|&(f, t)| self.files[f].view(t))
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// The tensor `name`.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.by_name.get(name).map(|&(f, t)| self.files[f].view(t))
    }

    /// The tensor `name`; its absence is an error.
    pub fn require(&self, name: &str) -> Result<TensorView<'_>> {
        self.get(name).ok_or_else(|| FormatError::tensor(&self.place, name, "is missing", WRONG_MODEL))
    }

    /// The weight `name` as `[rows, cols]`.
    pub fn dense_rows(&self, name: &str, rows: usize, cols: usize) -> Result<DenseRows> {
        let view = self.require(name)?;
        if view.shape != [rows, cols] {
            let problem = format!("has shape {:?}, expected [{rows}, {cols}]", view.shape);
            return Err(view.error(problem, WRONG_MODEL));
        }
        view.dense_rows()
    }

    /// The vector `name` of `len` elements as f32.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let view = self.require(name)?;
        if view.shape != [len] {
            return Err(view.error(format!("has shape {:?}, expected [{len}]", view.shape), WRONG_MODEL));
        }
        view.to_vector()
    }
}

/// Where a shard lies, or `None` when its name leads out of the directory.
fn shard_path(dir: &Path, shard: &str) -> Option<PathBuf> {
    let relative = Path::new(shard);
    let inside = !shard.is_empty() && relative.components().all(|c| matches!(c, Component::Normal(_)));
    inside.then(|| dir.join(relative))
}
