//! Tiny GGUF files for tests, valid or deliberately not.

use crate::gguf::{Array, Value};
use std::io;
use std::path::Path;
use tailorq_tensor::DType;

/// Builds the bytes of a GGUF file.
#[derive(Clone, Debug)]
pub struct GgufBuilder {
    version: u32,
    alignment: usize,
    pairs: Vec<(String, Value)>,
    tensors: Vec<BuilderTensor>,
}

#[derive(Clone, Debug)]
struct BuilderTensor {
    name: String,
    dims: Vec<u64>,
    type_id: u32,
    /// Overrides the running offset.
    offset: Option<u64>,
    bytes: Vec<u8>,
}

impl Default for GgufBuilder {
    fn default() -> Self {
        GgufBuilder::new()
    }
}

impl GgufBuilder {
    /// An empty file of version 3.
    pub fn new() -> Self {
        GgufBuilder { version: 3, alignment: 32, pairs: Vec::new(), tensors: Vec::new() }
    }

    /// Sets the version.
    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// Aligns the data to `alignment` and writes the key that says so.
    pub fn alignment(mut self, alignment: u32) -> Self {
        self.alignment = alignment as usize;
        self.value("general.alignment", Value::U32(alignment))
    }

    /// Adds a metadata pair; keys may repeat.
    pub fn value(mut self, key: &str, value: Value) -> Self {
        self.pairs.push((key.into(), value));
        self
    }

    /// Adds a u32.
    pub fn u32(self, key: &str, value: u32) -> Self {
        self.value(key, Value::U32(value))
    }

    /// Adds an f32.
    pub fn f32(self, key: &str, value: f32) -> Self {
        self.value(key, Value::F32(value))
    }

    /// Adds a bool.
    pub fn bool(self, key: &str, value: bool) -> Self {
        self.value(key, Value::Bool(value))
    }

    /// Adds a string.
    pub fn str(self, key: &str, value: &str) -> Self {
        self.value(key, Value::String(value.into()))
    }

    /// Adds an array of strings.
    pub fn strings<S: AsRef<str>>(self, key: &str, values: &[S]) -> Self {
        let strings = values.iter().map(|s| s.as_ref().to_owned()).collect();
        self.value(key, Value::Array(Array::String(strings)))
    }

    /// Adds an array of i32.
    pub fn i32s(self, key: &str, values: &[i32]) -> Self {
        self.value(key, Value::Array(Array::I32(values.to_vec())))
    }

    /// Adds a dense tensor of this shape, outermost first as in a checkpoint: `[rows, cols]` or `[len]`.
    pub fn dense(self, name: &str, dtype: DType, shape: &[usize], values: &[f32]) -> Self {
        let type_id = match dtype {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 30,
        };
        let dims: Vec<u64> = shape.iter().rev().map(|&d| d as u64).collect();
        self.raw(name, &dims, type_id, dtype.encode(values))
    }

    /// Adds a tensor of any type, dimensions innermost first as in the file; nothing is checked.
    pub fn raw(mut self, name: &str, dims: &[u64], type_id: u32, bytes: Vec<u8>) -> Self {
        self.tensors.push(BuilderTensor { name: name.into(), dims: dims.to_vec(), type_id, offset: None, bytes });
        self
    }

    /// Replaces the offset of the last tensor by a lie.
    pub fn offset(mut self, offset: u64) -> Self {
        if let Some(last) = self.tensors.last_mut() {
            last.offset = Some(offset);
        }
        self
    }

    /// The bytes of the file.
    pub fn build(&self) -> Vec<u8> {
        let alignment = self.alignment.max(1);
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            push_string(&mut file, key);
            file.extend(value.type_id().to_le_bytes());
            push_value(&mut file, value);
        }
        let mut at = 0;
        for t in &self.tensors {
            push_string(&mut file, &t.name);
            file.extend((t.dims.len() as u32).to_le_bytes());
            file.extend(t.dims.iter().flat_map(|d| d.to_le_bytes()));
            file.extend(t.type_id.to_le_bytes());
            file.extend(t.offset.unwrap_or(at as u64).to_le_bytes());
            at += t.bytes.len().next_multiple_of(alignment);
        }
        for t in &self.tensors {
            file.resize(file.len().next_multiple_of(alignment), 0);
            file.extend(&t.bytes);
        }
        file.resize(file.len().next_multiple_of(alignment), 0);
        file
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        std::fs::write(path, self.build())
    }
}

fn push_string(file: &mut Vec<u8>, text: &str) {
    file.extend((text.len() as u64).to_le_bytes());
    file.extend(text.as_bytes());
}

fn push_value(file: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(n) => file.extend(n.to_le_bytes()),
        Value::I8(n) => file.extend(n.to_le_bytes()),
        Value::U16(n) => file.extend(n.to_le_bytes()),
        Value::I16(n) => file.extend(n.to_le_bytes()),
        Value::U32(n) => file.extend(n.to_le_bytes()),
        Value::I32(n) => file.extend(n.to_le_bytes()),
        Value::F32(n) => file.extend(n.to_le_bytes()),
        Value::U64(n) => file.extend(n.to_le_bytes()),
        Value::I64(n) => file.extend(n.to_le_bytes()),
        Value::F64(n) => file.extend(n.to_le_bytes()),
        Value::Bool(b) => file.push(u8::from(*b)),
        Value::String(s) => push_string(file, s),
        Value::Array(a) => push_array(file, a),
    }
}

fn push_array(file: &mut Vec<u8>, array: &Array) {
    file.extend(array.item_type_id().to_le_bytes());
    file.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => file.extend(v),
        Array::I8(v) => file.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::U16(v) => file.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::I16(v) => file.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::U32(v) => file.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::I32(v) => file.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::F32(v) => file.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::U64(v) => file.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::I64(v) => file.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::F64(v) => file.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::Bool(v) => file.extend(v.iter().map(|b| u8::from(*b))),
        Array::String(v) => v.iter().for_each(|s| push_string(file, s)),
        Array::Array(v) => v.iter().for_each(|a| push_array(file, a)),
    }
}
