//! Packed matrices survive a file, and a file that does not match its layout is refused.
#![allow(clippy::unwrap_used)]

use half::f16;
use proptest::prelude::*;
use std::path::Path;
use tailorq_format::{SafetensorsWriter, StoredType, TensorSet, TensorSpec, packed_specs, packed_tensors, read_packed};
use tailorq_tensor::{Bits, Group, Layout, PackedMatrix, Rng};

fn random(rows: usize, cols: usize, layout: Layout, seed: u64) -> PackedMatrix {
    let mut rng = Rng::new(seed);
    let levels = usize::from(layout.bits.max_code()) + 1;
    let groups = rows * layout.group.count(cols);
    let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(levels) as u8).collect();
    let scales: Vec<f16> = (0..groups).map(|_| f16::from_f64(rng.uniform())).collect();
    let n_zeros = if layout.symmetric { 0 } else { groups };
    let zeros: Vec<u8> = (0..n_zeros).map(|_| rng.below(levels) as u8).collect();
    PackedMatrix::pack(rows, cols, layout, &codes, &scales, &zeros).unwrap()
}

/// Writes tensors to `model.safetensors` in `dir`.
fn write(dir: &Path, tensors: &[(TensorSpec, Vec<u8>)]) -> TensorSet {
    let specs: Vec<_> = tensors.iter().map(|(s, _)| s.clone()).collect();
    let mut w = SafetensorsWriter::create(&dir.join("model.safetensors"), &specs, &[]).unwrap();
    for (spec, bytes) in tensors {
        w.write(&spec.name, bytes).unwrap();
    }
    w.commit().unwrap();
    TensorSet::open_dir(dir).unwrap()
}

fn tensors(matrix: &PackedMatrix) -> Vec<(TensorSpec, Vec<u8>)> {
    packed_tensors("w", matrix).into_iter().map(|(s, b)| (s, b.to_vec())).collect()
}

fn layouts() -> Vec<Layout> {
    let groups = [Group::Inputs(32), Group::Inputs(64), Group::Inputs(128), Group::Row];
    let mut all = Vec::new();
    for bits in Bits::ALL {
        for group in groups {
            all.extend([true, false].map(|symmetric| Layout { bits, group, symmetric }));
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_layout_survives_a_file(layout in prop::sample::select(layouts()), rows in 0usize..6, cols in 1usize..300, seed: u64) {
        let matrix = random(rows, cols, layout, seed);
        let specs = packed_specs("w", rows, cols, layout);
        prop_assert_eq!(specs.iter().map(|s| s.bytes().unwrap()).sum::<usize>(), layout.bytes(rows, cols));
        let dir = tempfile::tempdir().unwrap();
        let set = write(dir.path(), &tensors(&matrix));
        let read = read_packed(&set, "w", rows, cols, layout).unwrap();
        let (mut a, mut b) = (vec![0.0; cols], vec![0.0; cols]);
        for r in 0..rows {
            matrix.unpack_row(r, &mut a);
            read.unpack_row(r, &mut b);
            prop_assert_eq!(&a, &b);
        }
        // The parts lie in the map where the file has them.
        for (spec, part) in packed_tensors("w", &read) {
            prop_assert!(part.is_empty() || (part.as_ptr() as usize).is_multiple_of(64), "{}", spec.name);
        }
    }
}

#[test]
fn mismatches_name_file_and_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout { bits: Bits::Three, group: Group::Inputs(32), symmetric: false };
    let good = tensors(&random(2, 40, layout, 1));
    let message = |set: &TensorSet, rows, cols, layout| {
        let message = read_packed(set, "w", rows, cols, layout).unwrap_err().to_string();
        assert!(message.contains(dir.path().to_str().unwrap()), "{message}");
        message
    };
    let set = write(dir.path(), &good);
    assert!(read_packed(&set, "w", 2, 40, layout).is_ok());
    for (rows, cols) in [(3, 40), (2, 64), (2, usize::MAX), (usize::MAX, 40), (0, 0)] {
        let text = message(&set, rows, cols, layout);
        assert!(text.contains("'w.codes'") && text.contains("config.json") || text.contains("expected"), "{text}");
    }
    let text = message(&set, 2, 40, Layout { bits: Bits::Two, ..layout });
    assert!(text.contains("'w.codes_high'"), "{text}");
    let text = message(&set, 2, 40, Layout { symmetric: true, ..layout });
    assert!(text.contains("'w.zeros'"), "{text}");
    for (i, (spec, _)) in good.iter().enumerate() {
        let mut less = good.clone();
        less.remove(i);
        let text = message(&write(dir.path(), &less), 2, 40, layout);
        assert!(text.contains(&format!("'{}' is missing", spec.name)), "{text}");
    }
    let mut retyped = good.clone();
    retyped[0].0.dtype = StoredType::I32;
    let text = message(&write(dir.path(), &retyped), 2, 40, layout);
    assert!(text.contains("'w.codes'") && text.contains("I32"), "{text}");
    for bad in [f16::NAN, f16::INFINITY, f16::from_f32(-1.0)] {
        let mut scaled = good.clone();
        let at = scaled.iter().position(|(s, _)| s.name == "w.scales").unwrap();
        scaled[at].1[2..4].copy_from_slice(&bad.to_le_bytes());
        let text = message(&write(dir.path(), &scaled), 2, 40, layout);
        assert!(text.contains("'w'") && text.contains("scale 1 is"), "{text}");
    }
}
