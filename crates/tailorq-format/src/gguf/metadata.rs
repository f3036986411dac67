//! The typed key-value pairs of a GGUF file.

use super::cursor::Cursor;
use crate::error::DAMAGED;
use crate::{FormatError, Result};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Arrays nest at most this deep; real files do not nest them at all.
const MAX_DEPTH: usize = 4;

/// The type ids of arrays and strings, which are not plain numbers.
const STRING: u32 = 8;
const ARRAY: u32 = 9;

macro_rules! values {
    ($($variant:ident($type:ty) = $id:literal, $name:literal;)*) => {
        /// A metadata value.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Value {
            $(#[doc = concat!("`", $name, "`")] $variant($type),)*
            /// `bool`, one byte.
            Bool(bool),
            /// `string`
            String(String),
            /// `array`
            Array(Array),
        }

        /// A metadata array; its items have one type.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Array {
            $(#[doc = concat!("Items of `", $name, "`.")] $variant(Vec<$type>),)*
            /// Items of `bool`.
            Bool(Vec<bool>),
            /// Items of `string`.
            String(Vec<String>),
            /// Items of `array`; the items' own types may differ.
            Array(Vec<Array>),
        }

        impl Value {
            /// The type's id in the file.
            pub fn type_id(&self) -> u32 {
                match self {
                    $(Value::$variant(_) => $id,)*
                    Value::Bool(_) => 7,
                    Value::String(_) => STRING,
                    Value::Array(_) => ARRAY,
                }
            }

            fn read(cursor: &mut Cursor<'_>, path: &Path, key: &str, type_id: u32) -> Result<Self> {
                Ok(match type_id {
                    $($id => Value::$variant(<$type>::from_le_bytes(cursor.array(VALUE)?)),)*
                    7 => Value::Bool(cursor.array::<1>(VALUE)?[0] != 0),
                    STRING => Value::String(cursor.string(VALUE)?.to_owned()),
                    ARRAY => Value::Array(Array::read(cursor, path, key, 1)?),
                    other => return Err(FormatError::key(path, key, format!("has the unknown type {other}; {DAMAGED}"))),
                })
            }
        }

        impl Array {
            /// The id of the items' type in the file.
            pub fn item_type_id(&self) -> u32 {
                match self {
                    $(Array::$variant(_) => $id,)*
                    Array::Bool(_) => 7,
                    Array::String(_) => STRING,
                    Array::Array(_) => ARRAY,
                }
            }

            /// Number of items.
            pub fn len(&self) -> usize {
                match self {
                    $(Array::$variant(v) => v.len(),)*
                    Array::Bool(v) => v.len(),
                    Array::String(v) => v.len(),
                    Array::Array(v) => v.len(),
                }
            }

            fn read(cursor: &mut Cursor<'_>, path: &Path, key: &str, depth: usize) -> Result<Self> {
                let item_type = cursor.u32(VALUE)?;
                Ok(match item_type {
                    $($id => {
                        const SIZE: usize = size_of::<$type>();
                        let n = cursor.count(SIZE, ITEMS)?;
                        let (items, _) = cursor.take(n * SIZE, VALUE)?.as_chunks::<SIZE>();
                        Array::$variant(items.iter().map(|b| <$type>::from_le_bytes(*b)).collect())
                    })*
                    7 => {
                        let n = cursor.count(1, ITEMS)?;
                        Array::Bool(cursor.take(n, VALUE)?.iter().map(|b| *b != 0).collect())
                    }
                    STRING => {
                        // A string takes at least the eight bytes of its length.
                        let n = cursor.count(8, ITEMS)?;
                        let strings = (0..n).map(|_| cursor.string("a string of an array").map(str::to_owned));
                        Array::String(strings.collect::<Result<_>>()?)
                    }
                    ARRAY if depth < MAX_DEPTH => {
                        let n = cursor.count(12, ITEMS)?;
                        Array::Array((0..n).map(|_| Array::read(cursor, path, key, depth + 1)).collect::<Result<_>>()?)
                    }
                    ARRAY => {
                        let problem = format!("nests arrays deeper than {MAX_DEPTH}; {DAMAGED}");
                        return Err(FormatError::key(path, key, problem));
                    }
                    other => {
                        let problem = format!("is an array of the unknown type {other}; {DAMAGED}");
                        return Err(FormatError::key(path, key, problem));
                    }
                })
            }

            /// All items when they are integers, widened.
            fn integers(&self) -> Option<Vec<i64>> {
                match self {
                    Array::U8(v) => Some(v.iter().map(|&n| n.into()).collect()),
                    Array::I8(v) => Some(v.iter().map(|&n| n.into()).collect()),
                    Array::U16(v) => Some(v.iter().map(|&n| n.into()).collect()),
                    Array::I16(v) => Some(v.iter().map(|&n| n.into()).collect()),
                    Array::U32(v) => Some(v.iter().map(|&n| n.into()).collect()),
                    Array::I32(v) => Some(v.iter().map(|&n| n.into()).collect()),
                    Array::U64(v) => v.iter().map(|&n| i64::try_from(n).ok()).collect(),
                    Array::I64(v) => Some(v.clone()),
                    _ => None,
                }
            }
        }

        fn type_name(id: u32) -> &'static str {
            match id {
                $($id => $name,)*
                7 => "bool",
                STRING => "string",
                _ => "array",
            }
        }
    };
}

values! {
    U8(u8) = 0, "u8";
    I8(i8) = 1, "i8";
    U16(u16) = 2, "u16";
    I16(i16) = 3, "i16";
    U32(u32) = 4, "u32";
    I32(i32) = 5, "i32";
    F32(f32) = 6, "f32";
    U64(u64) = 10, "u64";
    I64(i64) = 11, "i64";
    F64(f64) = 12, "f64";
}

const VALUE: &str = "a metadata value";
const ITEMS: &str = "items of a metadata array";

impl Array {
    /// Whether there are no items.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Value {
    /// The type as a message names it: `u32`, `array of string`, ...
    pub fn type_name(&self) -> String {
        match self {
            Value::Array(a) => format!("array of {}", type_name(a.item_type_id())),
            _ => type_name(self.type_id()).to_owned(),
        }
    }

    /// Any integer type, widened.
    fn integer(&self) -> Option<i128> {
        match *self {
            Value::U8(n) => Some(n.into()),
            Value::I8(n) => Some(n.into()),
            Value::U16(n) => Some(n.into()),
            Value::I16(n) => Some(n.into()),
            Value::U32(n) => Some(n.into()),
            Value::I32(n) => Some(n.into()),
            Value::U64(n) => Some(n.into()),
            Value::I64(n) => Some(n.into()),
            _ => None,
        }
    }
}

/// What [`Metadata::get`] can turn a value into. Integers are read from any integer type that can hold them.
pub trait FromValue<'a>: Sized {
    /// What messages call it.
    const WANTED: &'static str;
    /// The value, or `None` when its type or range does not fit.
    fn from_value(value: &'a Value) -> Option<Self>;
}

macro_rules! from_value {
    ($($type:ty, $wanted:literal, $value:ident => $result:expr;)*) => {$(
        impl<'a> FromValue<'a> for $type {
            const WANTED: &'static str = $wanted;
            fn from_value($value: &'a Value) -> Option<Self> {
                $result
            }
        }
    )*};
}

from_value! {
    usize, "an integer that is not negative", v => v.integer()?.try_into().ok();
    u64, "an integer that is not negative", v => v.integer()?.try_into().ok();
    u32, "a 32-bit integer that is not negative", v => v.integer()?.try_into().ok();
    i64, "an integer", v => v.integer()?.try_into().ok();
    bool, "a bool", v => match v { Value::Bool(b) => Some(*b), _ => None };
    f32, "a float", v => match v { Value::F32(x) => Some(*x), Value::F64(x) => Some(*x as f32), _ => None };
    f64, "a float", v => match v { Value::F32(x) => Some((*x).into()), Value::F64(x) => Some(*x), _ => None };
    &'a str, "a string", v => match v { Value::String(s) => Some(s), _ => None };
    &'a [String], "an array of strings", v => match v { Value::Array(Array::String(s)) => Some(s), _ => None };
    &'a [f32], "an array of f32", v => match v { Value::Array(Array::F32(x)) => Some(x), _ => None };
    Vec<i64>, "an array of integers", v => match v { Value::Array(a) => a.integers(), _ => None };
}

/// All metadata of a file.
#[derive(Clone, Debug)]
pub struct Metadata {
    path: PathBuf,
    entries: Vec<(String, Value)>,
    by_key: HashMap<String, usize>,
}

impl Metadata {
    /// Reads `n` pairs.
    pub(super) fn read(cursor: &mut Cursor<'_>, path: &Path, n: usize) -> Result<Self> {
        let mut metadata = Metadata { path: path.to_owned(), entries: Vec::new(), by_key: HashMap::new() };
        for i in 0..n {
            let key = cursor.string("a metadata key")?;
            let type_id = cursor.u32(VALUE)?;
            let value = Value::read(cursor, path, key, type_id)?;
            if metadata.by_key.insert(key.to_owned(), i).is_some() {
                return Err(FormatError::key(path, key, format!("occurs twice; {DAMAGED}")));
            }
            metadata.entries.push((key.to_owned(), value));
        }
        Ok(metadata)
    }

    /// The value of `key` as stored.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.by_key.get(key).map(|&i| &self.entries[i].1)
    }

    /// The value of `key`, `None` when the file does not have it. Another type than `T` is an error.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        T::from_value(value).map(Some).ok_or_else(|| {
            let found = match value.integer() {
                Some(n) => format!("{} {n}", value.type_name()),
                None => value.type_name(),
            };
            FormatError::key(&self.path, key, format!("is {found}, expected {}; convert the model again", T::WANTED))
        })
    }

    /// The value of `key`; its absence is an error as well.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T> {
        self.get(key)?.ok_or_else(|| {
            let problem =
                format!("is missing, expected {}; convert the model again with a current converter", T::WANTED);
            FormatError::key(&self.path, key, problem)
        })
    }

    /// All pairs in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }
}
