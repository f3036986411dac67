//! Safetensors: what is written is read back, by this crate and by the reference library; damaged files are refused.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use std::path::Path;
use tailorq_format::{FormatError, SafetensorsFile, SafetensorsWriter, StoredType, TensorSet, TensorSpec};
use tailorq_tensor::{DType, ReadRows, SharedBytes};

fn write(specs: &[TensorSpec], data: &[Vec<u8>]) -> Vec<u8> {
    let mut w = SafetensorsWriter::new(Vec::new(), Path::new("memory"), specs, &[("made_by", "a \"test\"")]).unwrap();
    for (spec, bytes) in specs.iter().zip(data) {
        for piece in bytes.chunks(7) {
            w.write(&spec.name, piece).unwrap();
        }
    }
    w.finish().unwrap()
}

fn parse(bytes: &[u8]) -> Result<SafetensorsFile, FormatError> {
    SafetensorsFile::parse(Path::new("dir/x.safetensors"), SharedBytes::from_vec(bytes.to_vec()))
}

/// A file with this header and so many bytes of data.
fn with_header(header: &str, n_data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + n_data, 0);
    file
}

/// The error message of a file with this header.
fn refusal(header: &str, n_data: usize) -> String {
    let message = parse(&with_header(header, n_data)).expect_err(header).to_string();
    assert!(message.contains("dir/x.safetensors"), "{message}");
    message
}

#[track_caller]
fn assert_has(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

fn tensors() -> impl Strategy<Value = Vec<(TensorSpec, Vec<u8>)>> {
    let one = (0..StoredType::ALL.len(), prop::collection::vec(0usize..6, 0..4), any::<u8>());
    prop::collection::vec(one, 0..12).prop_map(|all| {
        let specs = all.into_iter().enumerate().map(|(i, (dtype, shape, seed))| {
            let spec = TensorSpec::new(format!("layer.{i}.\"ü\""), StoredType::ALL[dtype], &shape);
            let bytes = (0..spec.bytes().unwrap()).map(|b| seed.wrapping_add(b as u8)).collect();
            (spec, bytes)
        });
        specs.collect()
    })
}

proptest! {
    #[test]
    fn written_tensors_are_read_back(tensors in tensors()) {
        let (specs, data): (Vec<_>, Vec<_>) = tensors.into_iter().unzip();
        let file = write(&specs, &data);
        prop_assert_eq!(&file, &write(&specs, &data));
        let ours = parse(&file).unwrap();
        prop_assert_eq!(ours.metadata().get("made_by").map(String::as_str), Some("a \"test\""));
        prop_assert_eq!(ours.metadata().get("format").map(String::as_str), Some("pt"));
        // Empty tensors share an offset with their successor, so the order is only fixed among the others.
        let order: Vec<_> = specs.iter().filter(|s| s.bytes() != Some(0)).map(|s| s.name.clone()).collect();
        let read: Vec<_> = ours.iter().filter(|t| !t.bytes.is_empty()).map(|t| t.name.to_owned()).collect();
        prop_assert_eq!(order, read);
        prop_assert_eq!(ours.names().len(), specs.len());
        let reference = safetensors::SafeTensors::deserialize(&file).unwrap();
        let base = file.as_ptr() as usize;
        for (spec, bytes) in specs.iter().zip(&data) {
            let view = ours.get(&spec.name).unwrap();
            prop_assert!(view.expect(spec.dtype, &spec.shape).is_ok());
            prop_assert_eq!(&*view.bytes, &bytes[..]);
            let theirs = reference.tensor(&spec.name).unwrap();
            prop_assert_eq!(theirs.data(), &bytes[..]);
            prop_assert_eq!(theirs.shape(), &spec.shape[..]);
            prop_assert_eq!((theirs.data().as_ptr() as usize - base) % 64, 0);
        }
    }

    #[test]
    fn files_of_the_reference_library_are_read(values in prop::collection::vec(any::<f32>(), 1..20)) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![values.len()], &bytes).unwrap();
        let file = safetensors::serialize([("b", &view), ("a", &view)], None).unwrap();
        let ours = parse(&file).unwrap();
        let read = ours.get("a").unwrap().to_vector().unwrap();
        prop_assert!(read.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn mutations_never_panic(tensors in tensors(), edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>(), truncate: bool) {
        let (specs, data): (Vec<_>, Vec<_>) = tensors.into_iter().unzip();
        let mut file = write(&specs, &data);
        for (at, byte) in edits {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if truncate {
            file.truncate(cut.index(file.len()));
        }
        if let Ok(open) = parse(&file) {
            // What was accepted must be readable in full.
            // Touch every byte: one outside the map would fault.
            let total: usize = open.iter().map(|t| t.bytes.to_vec().len()).sum();
            prop_assert!(total <= file.len());
            for t in open.iter() {
                let _ = t.dense_rows().map(|r| r.read_rows(0, &mut vec![0.0; r.rows() * r.cols()]));
                let _ = t.to_vector();
            }
        }
    }

    #[test]
    fn every_truncation_is_an_error(tensors in tensors(), cut in any::<prop::sample::Index>()) {
        let (specs, data): (Vec<_>, Vec<_>) = tensors.into_iter().unzip();
        let file = write(&specs, &data);
        let cut = cut.index(file.len());
        prop_assert!(parse(&file[..cut]).is_err());
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), json in "[{}\\[\\]\":,a-z0-9]{0,80}") {
        prop_assert!(parse(&bytes).is_err());
        let _ = parse(&with_header(&json, 16));
    }
}

#[test]
fn short_and_foreign_files() {
    assert_has(&parse(b"").unwrap_err().to_string(), &["0 bytes"]);
    assert_has(&parse(b"1234567").unwrap_err().to_string(), &["7 bytes"]);
    assert_has(&parse(&100u64.to_le_bytes()).unwrap_err().to_string(), &["header of 100 bytes", "only 8"]);
    assert_has(&parse(&[0xff; 64]).unwrap_err().to_string(), &["18446744073709551615"]);
    assert_has(&parse(&(1u64 << 40).to_le_bytes()).unwrap_err().to_string(), &["more than any"]);
    assert_has(&refusal("hello", 0), &["not a valid safetensors header"]);
    assert_has(&refusal("[1,2]", 0), &["not a valid safetensors header"]);
    assert_has(&refusal("{} {}", 0), &["not a valid safetensors header"]);
    assert_has(&refusal("{\"a\":1}", 0), &["tensor 'a'"]);
    assert!(parse(&with_header("{}", 0)).is_ok());
}

#[test]
fn lies_about_offsets_and_shapes() {
    let t = |dtype: &str, shape: &str, at: &str| {
        format!("{{\"w\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":{at}}}}}")
    };
    assert!(parse(&with_header(&t("F32", "[2]", "[0,8]"), 8)).is_ok());
    assert_has(&refusal(&t("F32", "[2]", "[0,8]"), 7), &["'w'", "only 7"]);
    assert_has(&refusal(&t("F32", "[2]", "[0,8]"), 9), &["holds 9 bytes", "end at byte 8"]);
    assert_has(&refusal(&t("F32", "[2]", "[8,0]"), 8), &["'w'", "after its end"]);
    assert_has(&refusal(&t("F32", "[3]", "[0,8]"), 8), &["'w'", "12 bytes"]);
    assert_has(&refusal(&t("F32", "[2]", "[4,12]"), 12), &["'w'", "begins at byte 4"]);
    assert_has(&refusal(&t("Q7", "[2]", "[0,8]"), 8), &["'w'", "unknown type 'Q7'"]);
    assert_has(&refusal(&t("F32", "[4294967296,4294967296]", "[0,0]"), 0), &["'w'", "impossible shape"]);
    assert_has(&refusal(&t("F32", "[4611686018427387904]", "[0,0]"), 0), &["'w'", "impossible shape"]);
    assert_has(&refusal(&t("F32", "[-1]", "[0,8]"), 8), &["'w'"]);
    assert_has(&refusal(&t("F32", "[1e3]", "[0,8]"), 8), &["'w'"]);
    assert_has(&refusal(&t("F32", "[2]", "[0,18446744073709551615]"), 8), &["'w'", "only 8"]);
    assert_has(&refusal("{\"w\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8), &["'w'", "data_offsets"]);
}

#[test]
fn overlaps_holes_and_duplicates() {
    let two = |a: &str, b: &str, second: &str| {
        format!(
            "{{\"a\":{{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":{a}}},\"{second}\":{{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":{b}}}}}"
        )
    };
    assert!(parse(&with_header(&two("[4,8]", "[0,4]", "b"), 8)).is_ok());
    assert_has(&refusal(&two("[0,4]", "[2,6]", "b"), 6), &["'b'", "begins at byte 2", "ends at 4"]);
    assert_has(&refusal(&two("[0,4]", "[0,4]", "b"), 4), &["begins at byte 0"]);
    assert_has(&refusal(&two("[0,4]", "[6,10]", "b"), 10), &["'b'", "begins at byte 6"]);
    assert_has(&refusal(&two("[0,4]", "[4,8]", "a"), 8), &["'a' occurs twice"]);
    // The same name, spelled with an escape.
    assert_has(&refusal(&two("[0,4]", "[4,8]", "\\u0061"), 8), &["'a' occurs twice"]);
    let meta = "{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}}";
    assert_has(&refusal(meta, 0), &["'k' occurs twice"]);
    let field = "{\"w\":{\"dtype\":\"U8\",\"shape\":[1],\"shape\":[1],\"data_offsets\":[0,1]}}";
    assert_has(&refusal(field, 1), &["'w'", "duplicate field"]);
}

#[test]
fn deep_nesting_is_refused_without_overflowing_the_stack() {
    let deep = format!("{{\"w\":{{\"x\":{}", "[".repeat(1_000_000));
    refusal(&deep, 0);
    refusal(&"[".repeat(1_000_000), 0);
}

#[test]
fn the_writer_refuses_misuse() {
    let path = Path::new("out.safetensors");
    let spec = |name: &str, n| TensorSpec::new(name, StoredType::U8, &[n]);
    let plan = |specs: &[TensorSpec]| SafetensorsWriter::new(Vec::new(), path, specs, &[]).err().unwrap().to_string();
    assert_has(&plan(&[spec("a", 1), spec("a", 1)]), &["'a'", "declared twice", "out.safetensors"]);
    assert_has(&plan(&[spec("__metadata__", 1)]), &["reserved"]);
    assert_has(&plan(&[spec("tailorq.pad.0", 1)]), &["reserved"]);
    assert_has(&plan(&[TensorSpec::new("a", StoredType::U64, &[usize::MAX])]), &["'a'", "impossible"]);
    assert_has(&plan(&[spec("a", usize::MAX / 4), spec("b", usize::MAX / 2)]), &["'b'", "too large"]);
    let specs = [spec("a", 3), spec("b", 2)];
    let mut w = SafetensorsWriter::new(Vec::new(), path, &specs, &[]).unwrap();
    assert_has(&w.write("b", &[1]).unwrap_err().to_string(), &["'b'", "before 'a' is whole"]);
    assert_has(&w.write("a", &[1; 4]).unwrap_err().to_string(), &["'a'", "3 bytes left"]);
    w.write("a", &[1; 3]).unwrap();
    w.write("b", &[1]).unwrap();
    assert_has(&w.write("a", &[1]).unwrap_err().to_string(), &["'a'"]);
    assert_has(&w.finish().unwrap_err().to_string(), &["'b'", "1 bytes early"]);
}

#[test]
fn an_uncommitted_file_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let specs = [TensorSpec::new("a", DType::F32, &[2])];
    let mut w = SafetensorsWriter::create(&path, &specs, &[]).unwrap();
    w.write("a", &[0; 4]).unwrap();
    assert!(w.commit().is_err());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_reported_with_its_remedy() {
    // /dev/full refuses every write as a full disk does.
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut w = SafetensorsWriter::new(
        std::io::BufWriter::with_capacity(1 << 16, full),
        Path::new("out/model.safetensors"),
        &[TensorSpec::new("a", StoredType::U8, &[1 << 20])],
        &[],
    )
    .unwrap();
    let error = w.write("a", &vec![0; 1 << 20]).unwrap_err().to_string();
    assert_has(&error, &["out/model.safetensors", "free some disk space"]);
}

/// A checkpoint of two shards.
fn shards(dir: &Path, index: &str) {
    for (shard, name, value) in [("a.safetensors", "w", 1.0f32), ("b.safetensors", "v", 2.0)] {
        let specs = [TensorSpec::new(name, DType::F32, &[2, 1]), TensorSpec::new("bias", DType::BF16, &[1])];
        let mut w = SafetensorsWriter::create(&dir.join(shard), &specs, &[]).unwrap();
        w.write(name, &[value.to_le_bytes(), value.to_le_bytes()].concat()).unwrap();
        w.write("bias", &DType::BF16.encode(&[value])).unwrap();
        w.commit().unwrap();
    }
    std::fs::write(dir.join("model.safetensors.index.json"), format!("{{\"weight_map\":{index}}}")).unwrap();
}

#[test]
fn shards_follow_the_index() {
    let dir = tempfile::tempdir().unwrap();
    shards(dir.path(), r#"{"v":"b.safetensors","w":"a.safetensors","bias":"b.safetensors"}"#);
    let set = TensorSet::open_dir(dir.path()).unwrap();
    assert_eq!(set.names().collect::<Vec<_>>(), ["w", "v", "bias"]);
    assert_eq!(set.vector("bias", 1).unwrap(), [2.0]);
    let rows = set.dense_rows("w", 2, 1).unwrap();
    let mut out = [0.0; 2];
    rows.read_rows(0, &mut out);
    assert_eq!(out, [1.0, 1.0]);
    assert_has(&set.dense_rows("w", 1, 2).unwrap_err().to_string(), &["a.safetensors", "'w'", "[2, 1]", "[1, 2]"]);
    assert_has(&set.require("nothing").unwrap_err().to_string(), &["'nothing'", "is missing"]);
    assert_has(&set.vector("w", 2).unwrap_err().to_string(), &["'w'"]);
}

#[test]
fn bad_indexes_are_refused() {
    let refused = |index: &str, parts: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        shards(dir.path(), index);
        assert_has(&TensorSet::open_dir(dir.path()).expect_err(index).to_string(), parts);
    };
    refused(r#"{"w":"c.safetensors"}"#, &["c.safetensors", "is missing", "fetch the missing shard"]);
    refused(r#"{"x":"a.safetensors"}"#, &["a.safetensors", "'x'", "not in this shard"]);
    refused(r#"{"w":"../a.safetensors"}"#, &["outside its directory"]);
    refused(r#"{"w":"/etc/passwd"}"#, &["outside its directory"]);
    refused(r#"{"w":""}"#, &["outside its directory"]);
    refused(r#"{"w":"a.safetensors","w":"b.safetensors"}"#, &["'w' occurs twice"]);
    refused(r#"{"w":3}"#, &["index.json"]);
    refused(r#"[]"#, &["index.json"]);
}

#[test]
fn a_directory_without_a_checkpoint_says_what_it_lacks() {
    let dir = tempfile::tempdir().unwrap();
    assert_has(&TensorSet::open(dir.path()).unwrap_err().to_string(), &["model.safetensors.index.json"]);
    std::fs::write(dir.path().join("pytorch_model.bin"), b"x").unwrap();
    assert_has(&TensorSet::open(dir.path()).unwrap_err().to_string(), &["convert the PyTorch checkpoint"]);
    assert_has(&TensorSet::open(dir.path().join("none")).unwrap_err().to_string(), &["none", "check the path"]);
    std::fs::write(dir.path().join("model.safetensors"), b"").unwrap();
    assert_has(&TensorSet::open(dir.path()).unwrap_err().to_string(), &["is empty"]);
}
