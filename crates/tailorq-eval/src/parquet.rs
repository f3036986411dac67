//! Rows of Parquet files as the JSON objects that a JSONL copy of the data set would have.

use crate::data::Row;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Number, Value};
use std::fs::File;

/// Why a file gives no rows.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// The file is whole, but this program does not have what its columns are compressed with.
    #[error(
        "is compressed with {0}, which cannot be read; write it with snappy, zstd, gzip or no compression, or its rows as JSON lines \
         (.jsonl)"
    )]
    Compression(&'static str),
    #[error("cannot be read as Parquet: {0}; fetch it anew, or write its rows as JSON lines (.jsonl)")]
    Damaged(#[from] ParquetError),
}

/// All rows of a file in their order.
pub(crate) fn read(file: File) -> Result<Vec<Row>, ReadError> {
    let reader = SerializedFileReader::new(file)?;
    let columns = reader.metadata().row_groups().iter().flat_map(|group| group.columns());
    if let Some(unknown) = columns.map(|column| column.compression()).find_map(unreadable) {
        return Err(ReadError::Compression(unknown));
    }
    reader.get_row_iter(None)?.map(|row| Ok(object(&row?)?)).collect()
}

/// The name of a compression that the crate was built without.
fn unreadable(compression: Compression) -> Option<&'static str> {
    match compression {
        Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_) | Compression::GZIP(_) => None,
        Compression::LZO => Some("LZO"),
        Compression::BROTLI(_) => Some("Brotli"),
        Compression::LZ4 | Compression::LZ4_RAW => Some("LZ4"),
    }
}

fn object(row: &parquet::record::Row) -> Result<Row, ParquetError> {
    row.get_column_iter().map(|(name, field)| Ok((name.clone(), value(field)?))).collect()
}

fn value(field: &Field) -> Result<Value, ParquetError> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(truth) => (*truth).into(),
        Field::Byte(number) => (*number).into(),
        Field::Short(number) => (*number).into(),
        Field::Int(number) => (*number).into(),
        Field::Long(number) => (*number).into(),
        Field::UByte(number) => (*number).into(),
        Field::UShort(number) => (*number).into(),
        Field::UInt(number) => (*number).into(),
        Field::ULong(number) => (*number).into(),
        Field::Float16(number) => float(f64::from(number.to_f32())),
        Field::Float(number) => float(f64::from(*number)),
        Field::Double(number) => float(*number),
        Field::Str(text) => text.as_str().into(),
        // Written without a note that they are text.
        Field::Bytes(bytes) => bytes.as_utf8()?.into(),
        Field::Group(row) => object(row)?.into(),
        Field::ListInternal(list) => list.elements().iter().map(value).collect::<Result<Vec<_>, _>>()?.into(),
        Field::MapInternal(map) => {
            let entry = |(key, of_key): &(Field, Field)| match value(key)? {
                Value::String(key) => Ok((key, value(of_key)?)),
                other => Ok((other.to_string(), value(of_key)?)),
            };
            map.entries().iter().map(entry).collect::<Result<Row, ParquetError>>()?.into()
        }
        Field::Decimal(_) | Field::Date(_) | Field::TimeMillis(_) | Field::TimeMicros(_) => field.to_string().into(),
        Field::TimestampMillis(_) | Field::TimestampMicros(_) => field.to_string().into(),
    })
}

/// JSON has no NaN and no infinity.
fn float(number: f64) -> Value {
    Number::from_f64(number).map_or(Value::Null, Value::Number)
}
