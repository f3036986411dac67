//! One GGUF file: header, tensor infos and the bytes they point to.

use super::blocks::{BlockType, Decode, block_type, decodable};
use super::cursor::Cursor;
use super::metadata::Metadata;
use crate::error::DAMAGED;
use crate::map::map_file;
use crate::{FormatError, Result};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use tailorq_tensor::{ReadRows, SharedBytes};

/// ggml tensors have at most four dimensions.
const MAX_DIMS: u32 = 4;

/// Alignment of the data unless the metadata says otherwise.
const DEFAULT_ALIGNMENT: usize = 32;

/// A file, checked.
pub(super) struct Part {
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<GgufTensor>,
}

impl Part {
    pub(super) fn open(path: &Path) -> Result<Self> {
        Part::parse(path, map_file(path)?)
    }

    pub(super) fn parse(path: &Path, bytes: SharedBytes) -> Result<Self> {
        let mut cursor = Cursor::new(path, &bytes);
        check_version(path, &mut cursor)?;
        // An info is at least a name's length, the number of dimensions, a type and an offset; a pair is at least a key's
        // length, a type and a byte.
        let n_tensors = cursor.count(24, "tensors")?;
        let n_pairs = cursor.count(13, "metadata pairs")?;
        let metadata = Metadata::read(&mut cursor, path, n_pairs)?;
        let infos = (0..n_tensors).map(|_| read_info(&mut cursor, path)).collect::<Result<Vec<_>>>()?;
        let alignment = alignment(path, &metadata)?;
        let start = cursor.position().checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
        // A file without tensors may end before the padding.
        let data = bytes.slice(start.min(bytes.len())..bytes.len());
        let data = data.ok_or_else(|| FormatError::damaged(path, "ends before its data"))?;
        let tensors = place(path, infos, alignment, &data)?;
        Ok(Part { metadata, tensors })
    }
}

fn check_version(path: &Path, cursor: &mut Cursor<'_>) -> Result<()> {
    if cursor.array::<4>("the magic number")? != *b"GGUF" {
        return Err(FormatError::file(path, "is not a GGUF file", "give a GGUF file or a checkpoint directory"));
    }
    let version = cursor.u32("the version")?;
    match version {
        2 | 3 => Ok(()),
        _ if version.swap_bytes() <= 3 => {
            Err(FormatError::file(path, "is a big-endian GGUF file", "convert it to little-endian"))
        }
        _ => {
            let problem = format!("has GGUF version {version}");
            Err(FormatError::file(path, problem, "versions 2 and 3 are read: convert the model again"))
        }
    }
}

fn alignment(path: &Path, metadata: &Metadata) -> Result<usize> {
    const KEY: &str = "general.alignment";
    let alignment = metadata.get::<u32>(KEY)?.map_or(DEFAULT_ALIGNMENT, |a| a as usize);
    if alignment.is_power_of_two() {
        Ok(alignment)
    } else {
        Err(FormatError::key(path, KEY, format!("is {alignment}, which is no power of two; {DAMAGED}")))
    }
}

/// What the file says of a tensor, before its data is checked.
struct Info {
    name: String,
    dims: Vec<usize>,
    type_id: u32,
    offset: u64,
}

fn read_info(cursor: &mut Cursor<'_>, path: &Path) -> Result<Info> {
    const INFO: &str = "a tensor info";
    let name = cursor.string("a tensor name")?.to_owned();
    let n_dims = cursor.u32(INFO)?;
    if n_dims > MAX_DIMS {
        return Err(FormatError::tensor(path, &name, format!("has {n_dims} dimensions"), DAMAGED));
    }
    let sizes = (0..n_dims).map(|_| cursor.u64(INFO)).collect::<Result<Vec<_>>>()?;
    // Signed 64-bit counts are ggml's own limit; a product beyond it is no shape at all.
    let elements = sizes.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|&n| i64::try_from(n).is_ok());
    let dims: Option<Vec<usize>> = sizes.iter().map(|&d| usize::try_from(d).ok()).collect();
    let (Some(dims), Some(_)) = (dims, elements) else {
        return Err(FormatError::tensor(path, &name, format!("has the impossible dimensions {sizes:?}"), DAMAGED));
    };
    Ok(Info { name, dims, type_id: cursor.u32(INFO)?, offset: cursor.u64(INFO)? })
}

/// Resolves the infos to bytes. Tensors whose type can be decoded must lie inside the data and must not overlap.
fn place(path: &Path, infos: Vec<Info>, alignment: usize, data: &SharedBytes) -> Result<Vec<GgufTensor>> {
    let file: Arc<Path> = path.into();
    let mut names = HashSet::with_capacity(infos.len());
    let mut tensors = Vec::with_capacity(infos.len());
    let mut ranges = Vec::with_capacity(infos.len());
    for info in infos {
        let fail = |problem: String| FormatError::tensor(path, &info.name, problem, DAMAGED);
        if !names.insert(info.name.clone()) {
            return Err(fail("occurs twice".into()));
        }
        if !info.offset.is_multiple_of(alignment as u64) {
            return Err(fail(format!("starts at byte {} of the data, no multiple of {alignment}", info.offset)));
        }
        if info.offset > data.len() as u64 {
            return Err(fail(format!("starts at byte {} of the data, which has only {}", info.offset, data.len())));
        }
        let start = info.offset as usize;
        let block_type = block_type(info.type_id);
        let bytes = match block_type {
            Some(t) if t.decode.is_some() => {
                let len = stored_bytes(t, &info.dims).map_err(&fail)?;
                let end = start.checked_add(len).filter(|&end| end <= data.len()).ok_or_else(|| {
                    fail(format!("needs {len} bytes from byte {start} of the data, which has only {}", data.len()))
                })?;
                ranges.push((start, end, tensors.len()));
                data.slice(start..end)
            }
            _ => None,
        };
        tensors.push(GgufTensor {
            name: info.name,
            dims: info.dims,
            type_id: info.type_id,
            block_type,
            bytes,
            file: Arc::clone(&file),
        });
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        if pair[1].0 < pair[0].1 {
            let (this, before): (&GgufTensor, &GgufTensor) = (&tensors[pair[1].2], &tensors[pair[0].2]);
            let problem = format!("overlaps tensor '{}'", crate::error::printable(&before.name));
            return Err(FormatError::tensor(path, &this.name, problem, DAMAGED));
        }
    }
    Ok(tensors)
}

/// Bytes of a tensor of this type.
fn stored_bytes(t: &BlockType, dims: &[usize]) -> Result<usize, String> {
    let row = dims.first().copied().unwrap_or(1);
    if !row.is_multiple_of(t.weights) {
        return Err(format!("has rows of {row}, which {} blocks of {} cannot hold", t.name, t.weights));
    }
    let blocks = dims.iter().product::<usize>() / t.weights;
    blocks.checked_mul(t.bytes).ok_or_else(|| format!("has the impossible dimensions {dims:?}"))
}

/// One tensor of an open file.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    name: String,
    dims: Vec<usize>,
    type_id: u32,
    block_type: Option<&'static BlockType>,
    /// `None` when the type has no decoder.
    bytes: Option<SharedBytes>,
    file: Arc<Path>,
}

impl GgufTensor {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sizes as the file gives them, innermost first: a weight `[rows, cols]` has `[cols, rows]`.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Number of weights.
    pub fn n_elements(&self) -> usize {
        self.dims.iter().product()
    }

    /// The number of its type.
    pub fn type_id(&self) -> u32 {
        self.type_id
    }

    /// The name of its type, `type 99` when it has none.
    pub fn type_name(&self) -> String {
        self.block_type.map_or_else(|| format!("type {}", self.type_id), |t| t.name.to_owned())
    }

    /// Its type, when it is a known one.
    pub fn block_type(&self) -> Option<&'static BlockType> {
        self.block_type
    }

    /// The file that holds it.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Its bytes as stored. Fails for a type without a decoder, whose size is not trusted.
    pub fn bytes(&self) -> Result<&SharedBytes> {
        Ok(self.decoder()?.2)
    }

    /// The weight as `[rows, cols]`, left in the memory map and decoded panel by panel to exactly the f32 values that its
    /// blocks stand for.
    pub fn rows(&self) -> Result<Arc<dyn ReadRows>> {
        let &[cols, rows] = self.dims.as_slice() else {
            let problem = format!("has dimensions {:?}, expected two", self.dims);
            return Err(FormatError::tensor(&self.file, &self.name, problem, WRONG_MODEL));
        };
        let (block_type, decode, bytes) = self.decoder()?;
        let row_bytes = cols / block_type.weights * block_type.bytes;
        Ok(Arc::new(BlockRows { rows, cols, row_bytes, block_type, decode, bytes: bytes.clone() }))
    }

    /// The whole tensor of one dimension as f32.
    pub fn vector(&self) -> Result<Vec<f32>> {
        let &[len] = self.dims.as_slice() else {
            let problem = format!("has dimensions {:?}, expected one", self.dims);
            return Err(FormatError::tensor(&self.file, &self.name, problem, WRONG_MODEL));
        };
        let (_, decode, bytes) = self.decoder()?;
        let mut values = vec![0.0; len];
        decode(bytes, &mut values);
        Ok(values)
    }

    fn decoder(&self) -> Result<(&'static BlockType, Decode, &SharedBytes)> {
        if let (Some(t), Some(bytes)) = (self.block_type, &self.bytes)
            && let Some(decode) = t.decode
        {
            return Ok((t, decode, bytes));
        }
        let problem = format!("has type {}, which cannot be decoded", self.type_name());
        let remedy = format!("use a file whose tensors are {}", decodable().join(", "));
        Err(FormatError::tensor(&self.file, &self.name, problem, remedy))
    }
}

const WRONG_MODEL: &str = "the file is of another architecture than its metadata says";

/// A weight in blocks, decoded as it is read.
struct BlockRows {
    rows: usize,
    cols: usize,
    /// Stored bytes of a row, whole blocks.
    row_bytes: usize,
    block_type: &'static BlockType,
    decode: Decode,
    bytes: SharedBytes,
}

impl ReadRows for BlockRows {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn bytes(&self) -> usize {
        self.bytes.len()
    }
    fn read_rows(&self, first: usize, out: &mut [f32]) {
        let n_rows = out.len().checked_div(self.cols).unwrap_or(0);
        assert_eq!(out.len(), n_rows * self.cols, "read_rows: whole rows");
        (self.decode)(&self.bytes[first * self.row_bytes..(first + n_rows) * self.row_bytes], out);
    }
    fn encoding(&self) -> String {
        self.block_type.name.to_owned()
    }
}
