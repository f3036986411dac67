//! GGUF: what the builder writes is read back; hostile files are refused with the name of what is wrong.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use std::path::Path;
use tailorq_format::gguf::{Array, Value, blocks};
use tailorq_format::testing::GgufBuilder;
use tailorq_format::{FormatError, GgufFile};
use tailorq_tensor::{DType, Rng, SharedBytes};

fn parse(bytes: Vec<u8>) -> Result<GgufFile, FormatError> {
    GgufFile::parse(Path::new("dir/x.gguf"), SharedBytes::from_vec(bytes))
}

#[track_caller]
fn assert_has(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

/// Asserts that the file is refused with a message that names the file and `parts`.
#[track_caller]
fn refused(bytes: Vec<u8>, parts: &[&str]) {
    let message = parse(bytes).expect_err("a hostile file was accepted").to_string();
    assert_has(&message, &["dir/x.gguf"]);
    assert_has(&message, parts);
}

fn every_value() -> Vec<(&'static str, Value)> {
    let nested = Array::Array(vec![Array::U8(vec![1, 2]), Array::String(vec!["x".into()])]);
    vec![
        ("u8", Value::U8(200)),
        ("i8", Value::I8(-100)),
        ("u16", Value::U16(60_000)),
        ("i16", Value::I16(-30_000)),
        ("u32", Value::U32(4_000_000_000)),
        ("i32", Value::I32(-2_000_000_000)),
        ("f32", Value::F32(0.1)),
        ("bool", Value::Bool(true)),
        ("string", Value::String("grüß".into())),
        ("array", Value::Array(nested)),
        ("u64", Value::U64(u64::MAX)),
        ("i64", Value::I64(i64::MIN)),
        ("f64", Value::F64(0.1)),
        ("strings", Value::Array(Array::String(vec![String::new(), "a\0b".into()]))),
        ("f32s", Value::Array(Array::F32(vec![1.5, -2.0]))),
        ("i16s", Value::Array(Array::I16(vec![-1, 7]))),
        ("bools", Value::Array(Array::Bool(vec![true, false]))),
        ("f64s", Value::Array(Array::F64(vec![]))),
    ]
}

/// A file with every kind of value and one tensor of every type that has a decoder.
fn rich(alignment: u32) -> GgufBuilder {
    let mut rng = Rng::new(7);
    let mut file = GgufBuilder::new().alignment(alignment);
    for (key, value) in every_value() {
        file = file.value(key, value);
    }
    for t in blocks::TYPES.iter().filter(|t| t.decode.is_some()) {
        let bytes = (0..3 * 2 * t.bytes).map(|_| rng.next_u64() as u8).collect();
        file = file.raw(t.name, &[2 * t.weights as u64, 3], t.id, bytes);
    }
    file.dense("norm", DType::F32, &[3], &[1.0, 2.0, 3.0])
}

#[test]
fn every_value_type_is_read_back() {
    for version in [2, 3] {
        let file = parse(rich(64).version(version).build()).unwrap();
        for (key, value) in every_value() {
            assert_eq!(file.metadata().value(key), Some(&value));
        }
        assert_eq!(file.metadata().iter().next().unwrap().0, "general.alignment");
        assert_eq!(file.vector("norm").unwrap(), [1.0, 2.0, 3.0]);
    }
}

#[test]
fn getters_convert_and_explain() {
    let file = parse(rich(32).build()).unwrap();
    let m = file.metadata();
    assert_eq!(m.require::<usize>("u8").unwrap(), 200);
    assert_eq!(m.require::<u64>("u64").unwrap(), u64::MAX);
    assert_eq!(m.require::<i64>("i8").unwrap(), -100);
    assert_eq!(m.require::<f32>("f64").unwrap(), 0.1);
    assert_eq!(m.require::<&str>("string").unwrap(), "grüß");
    assert_eq!(m.require::<&[f32]>("f32s").unwrap(), [1.5, -2.0]);
    assert_eq!(m.require::<Vec<i64>>("i16s").unwrap(), [-1, 7]);
    assert!(m.require::<bool>("bool").unwrap());
    assert_eq!(m.get::<usize>("none").unwrap(), None);
    assert_has(&m.require::<usize>("none").unwrap_err().to_string(), &["dir/x.gguf", "'none'", "is missing"]);
    assert_has(&m.get::<usize>("string").unwrap_err().to_string(), &["dir/x.gguf", "'string'", "is string", "integer"]);
    assert_has(&m.get::<u32>("i8").unwrap_err().to_string(), &["'i8'", "i8 -100", "not negative"]);
    assert_has(&m.get::<&[f32]>("strings").unwrap_err().to_string(), &["array of string", "array of f32"]);
}

#[test]
fn rows_are_decoded_alike_in_any_portion() {
    let file = parse(rich(32).build()).unwrap();
    for tensor in file.tensors().iter().filter(|t| t.dims().len() == 2) {
        let rows = tensor.rows().unwrap();
        let n = rows.cols();
        assert_eq!(rows.bytes(), tensor.bytes().unwrap().len());
        let mut all = vec![0.0; 3 * n];
        rows.read_rows(0, &mut all);
        for r in 0..3 {
            let mut one = vec![0.0; n];
            rows.read_rows(r, &mut one);
            let same = one.iter().zip(&all[r * n..]).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{} row {r}", tensor.name());
        }
        rows.read_rows(3, &mut []);
    }
}

#[test]
fn a_type_without_a_decoder_fails_only_when_fetched() {
    let file = GgufBuilder::new()
        .raw("odd", &[256, 2], 16, vec![0; 132])
        .raw("future", &[7, 3], 9999, vec![0; 5])
        .dense("fine", DType::F16, &[1, 2], &[0.5, -2.0])
        .build();
    let file = parse(file).unwrap();
    let mut out = [0.0; 2];
    file.rows("fine").unwrap().read_rows(0, &mut out);
    assert_eq!(out, [0.5, -2.0]);
    assert_has(&file.rows("odd").err().unwrap().to_string(), &["dir/x.gguf", "'odd'", "IQ2_XXS", "Q4_K"]);
    assert_has(&file.rows("future").err().unwrap().to_string(), &["'future'", "type 9999"]);
    assert_has(&file.rows("none").err().unwrap().to_string(), &["'none'", "is missing"]);
    assert_has(&file.vector("fine").err().unwrap().to_string(), &["'fine'", "expected one"]);
}

#[test]
fn foreign_files_and_versions() {
    refused(b"GGU".to_vec(), &["magic"]);
    refused(b"\x08\0\0\0\0\0\0\0{}".to_vec(), &["not a GGUF file"]);
    refused(GgufBuilder::new().version(1).build(), &["version 1"]);
    refused(GgufBuilder::new().version(4).build(), &["version 4"]);
    refused(GgufBuilder::new().version(3u32.swap_bytes()).build(), &["big-endian"]);
    assert!(parse(GgufBuilder::new().build()).is_ok());
}

/// A file whose bytes at `at` are replaced.
fn patched(file: &GgufBuilder, at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = file.build();
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

#[test]
fn counts_and_lengths_beyond_the_file() {
    let file = GgufBuilder::new().str("key", "value");
    for huge in [u64::MAX, 1 << 40, 1000] {
        refused(patched(&file, 8, &huge.to_le_bytes()), &["tensors", "more than"]);
        refused(patched(&file, 16, &huge.to_le_bytes()), &["metadata pairs", "more than"]);
        refused(patched(&file, 24, &huge.to_le_bytes()), &["bytes of a string", "more than"]);
        refused(patched(&file, 39, &huge.to_le_bytes()), &["bytes of a string", "more than"]);
        let array = GgufBuilder::new().i32s("key", &[1, 2]);
        refused(patched(&array, 43, &huge.to_le_bytes()), &["items of a metadata array", "more than"]);
        let array = GgufBuilder::new().strings("key", &["a", "b"]);
        refused(patched(&array, 43, &huge.to_le_bytes()), &["items of a metadata array", "more than"]);
    }
    // The last string ends with the file.
    refused(patched(&file, 39, &60u64.to_le_bytes()), &["bytes"]);
    refused(patched(&file, 32, b"\xff"), &["not UTF-8"]);
    refused(patched(&file, 35, &77u32.to_le_bytes()), &["'key'", "unknown type 77"]);
    refused(patched(&GgufBuilder::new().i32s("key", &[1]), 39, &77u32.to_le_bytes()), &["'key'", "unknown type 77"]);
}

#[test]
fn deep_arrays_are_refused_without_overflowing_the_stack() {
    let nest = |depth| (0..depth).fold(Array::U8(vec![1]), |inner, _| Array::Array(vec![inner]));
    assert!(parse(GgufBuilder::new().value("key", Value::Array(nest(3))).build()).is_ok());
    refused(GgufBuilder::new().value("key", Value::Array(nest(4))).build(), &["'key'", "deeper"]);
    // A million levels by hand: (array, one item) again and again.
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend([0u64.to_le_bytes(), 1u64.to_le_bytes(), 1u64.to_le_bytes()].concat());
    file.extend(b"k\x09\0\0\0");
    for _ in 0..1_000_000 {
        file.extend(b"\x09\0\0\0\x01\0\0\0\0\0\0\0");
    }
    refused(file, &["'k'", "deeper"]);
}

#[test]
fn dimensions_that_overflow() {
    let with = |dims: &[u64]| GgufBuilder::new().raw("w", dims, 0, vec![0; 64]).build();
    refused(with(&[1, 1, 1, 1, 1]), &["'w'", "5 dimensions"]);
    refused(with(&[u64::MAX, 2]), &["'w'", "impossible"]);
    refused(with(&[1 << 32, 1 << 32]), &["'w'", "impossible"]);
    refused(with(&[1 << 62, 1]), &["'w'", "impossible"]);
    refused(with(&[1 << 40]), &["'w'", "only"]);
    refused(GgufBuilder::new().raw("w", &[100, 2], 12, vec![0; 288]).build(), &["'w'", "rows of 100", "Q4_K"]);
}

#[test]
fn duplicate_keys_and_names() {
    refused(GgufBuilder::new().u32("a", 1).bool("a", true).build(), &["'a'", "twice"]);
    let t = |b: GgufBuilder, name: &str| b.dense(name, DType::F32, &[1], &[0.0]);
    refused(t(t(GgufBuilder::new(), "w"), "w").build(), &["'w'", "twice"]);
}

#[test]
fn offsets_past_the_end_misaligned_or_overlapping() {
    let two = GgufBuilder::new().dense("v", DType::F32, &[8], &[0.0; 8]).dense("w", DType::F32, &[16], &[0.0; 16]);
    assert!(parse(two.build()).is_ok());
    refused(two.clone().offset(4096).build(), &["'w'", "starts at byte 4096"]);
    refused(two.clone().offset(u64::MAX - 31).build(), &["'w'", "starts at byte"]);
    refused(two.clone().offset(64).build(), &["'w'", "needs 64 bytes from byte 64", "only 96"]);
    refused(two.clone().offset(33).build(), &["'w'", "no multiple of 32"]);
    refused(two.offset(0).build(), &["overlaps"]);
    refused(GgufBuilder::new().raw("odd", &[256], 16, vec![]).offset(32).build(), &["'odd'", "starts at byte 32"]);
}

#[test]
fn alignments() {
    for bad in [0, 3, 48] {
        refused(GgufBuilder::new().u32("general.alignment", bad).build(), &["general.alignment", "no power of two"]);
    }
    refused(GgufBuilder::new().str("general.alignment", "x").build(), &["general.alignment", "is string"]);
    let huge = GgufBuilder::new().u32("general.alignment", 1 << 31).dense("w", DType::F32, &[1], &[0.0]);
    refused(huge.build(), &["'w'"]);
    for good in [1, 8, 4096] {
        let file = GgufBuilder::new().alignment(good).dense("w", DType::F32, &[2], &[1.0, 2.0]);
        assert_eq!(parse(file.build()).unwrap().vector("w").unwrap(), [1.0, 2.0]);
    }
}

/// A model in `count` files; file `i` holds tensor `t<i>`.
fn split(dir: &Path, count: u16, edit: impl Fn(u16, GgufBuilder) -> GgufBuilder) {
    for i in 0..count {
        let file = GgufBuilder::new()
            .value("split.no", Value::U16(i))
            .value("split.count", Value::U16(count))
            .value("split.tensors.count", Value::I32(count.into()))
            .u32("only.first", u32::from(i))
            .dense(&format!("t{i}"), DType::F32, &[1], &[f32::from(i)]);
        edit(i, file).write(&dir.join(format!("m-{:05}-of-{count:05}.gguf", i + 1))).unwrap();
    }
}

#[test]
fn split_models_open_from_any_file() {
    let dir = tempfile::tempdir().unwrap();
    split(dir.path(), 3, |_, f| f);
    for name in ["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"] {
        let file = GgufFile::open(dir.path().join(name)).unwrap();
        assert_eq!(file.metadata().require::<usize>("only.first").unwrap(), 0);
        assert_eq!(file.vector("t2").unwrap(), [2.0]);
        assert_eq!(file.tensors().iter().map(|t| t.name()).collect::<Vec<_>>(), ["t0", "t1", "t2"]);
    }
    std::fs::remove_file(dir.path().join("m-00002-of-00003.gguf")).unwrap();
    let missing = GgufFile::open(dir.path().join("m-00001-of-00003.gguf")).unwrap_err().to_string();
    assert_has(&missing, &["m-00002-of-00003.gguf", "is missing"]);
    std::fs::copy(dir.path().join("m-00003-of-00003.gguf"), dir.path().join("m-00002-of-00003.gguf")).unwrap();
    let wrong = GgufFile::open(dir.path().join("m-00001-of-00003.gguf")).unwrap_err().to_string();
    assert_has(&wrong, &["m-00002-of-00003.gguf", "another split"]);
    std::fs::rename(dir.path().join("m-00001-of-00003.gguf"), dir.path().join("renamed.gguf")).unwrap();
    let renamed = GgufFile::open(dir.path().join("renamed.gguf")).unwrap_err().to_string();
    assert_has(&renamed, &["renamed.gguf", "original names"]);
}

#[test]
fn split_models_with_repeated_tensors_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    split(dir.path(), 2, |_, f| f.dense("same", DType::F32, &[1], &[0.0]));
    let error = GgufFile::open(dir.path().join("m-00001-of-00002.gguf")).unwrap_err().to_string();
    assert_has(&error, &["'same'", "twice"]);
}

/// Reads all that an accepted file promises.
fn read_everything(file: &GgufFile) {
    for t in file.tensors() {
        if t.n_elements() > 1 << 20 {
            continue;
        }
        let _ = t.vector();
        if let Ok(rows) = t.rows() {
            rows.read_rows(0, &mut vec![0.0; rows.rows() * rows.cols()]);
        }
    }
}

proptest! {
    #[test]
    fn mutations_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), in_header: bool) {
        let mut file = rich(32).build();
        let n = if in_header { 1500 } else { file.len() };
        for (at, byte) in edits {
            let at = at.index(n);
            file[at] = byte;
        }
        if let Ok(file) = parse(file) {
            read_everything(&file);
        }
    }

    #[test]
    fn every_truncation_is_an_error(cut in any::<prop::sample::Index>()) {
        // The last tensor ends before the last padding, which nobody needs.
        let mut file = rich(32).build();
        let n = file.len() - 20;
        file.truncate(cut.index(n));
        prop_assert!(parse(file).is_err());
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(bytes);
        if let Ok(file) = parse(file) {
            read_everything(&file);
        }
    }
}
