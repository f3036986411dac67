//! Packed matrices survive a file, and a file that does not match its layout is refused.
#![allow(clippy::unwrap_used)]

use half::f16;
use proptest::prelude::*;
use std::path::Path;
use tailorq_format::{
    SafetensorsWriter, StoredType, TensorSet, TensorSpec, format_version, packed_specs, packed_tensors, read_packed,
};
use tailorq_tensor::{
    Bits, CorrectionSpec, ElementCorrections, Group, Layout, PackedMatrix, PackedSpec, ReadRows, Rng,
};

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

/// Corrections of a fifth of the elements, in some rows none.
fn elements(rows: usize, cols: usize, seed: u64) -> ElementCorrections {
    let mut rng = Rng::new(seed);
    let mut row = |r: usize| {
        let share = 0.3 * (r % 3) as f64;
        let chosen: Vec<usize> = (0..cols).filter(|_| rng.uniform() < share).collect();
        chosen.into_iter().map(|c| (c, f16::from_f32(rng.normal()))).collect()
    };
    let all: Vec<Vec<_>> = (0..rows).map(&mut row).collect();
    ElementCorrections::from_rows(cols, &all).unwrap()
}

fn all_values(matrix: &PackedMatrix) -> Vec<f32> {
    let mut all = vec![f32::NAN; matrix.rows() * matrix.cols()];
    matrix.read_rows(0, &mut all);
    all
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
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_layout_survives_a_file(
        layout in prop::sample::select(layouts()), rows in 0usize..6, cols in 1usize..300, corrected: bool, seed: u64,
    ) {
        let mut matrix = random(rows, cols, layout, seed);
        if corrected {
            matrix = matrix.with_elements(elements(rows, cols, seed)).unwrap();
        }
        let spec = matrix.spec();
        let specs = packed_specs("w", &spec);
        prop_assert_eq!(specs.iter().map(|s| s.bytes().unwrap()).sum::<usize>(), matrix.bytes());
        prop_assert_eq!(format_version([&spec]), if corrected { 2 } else { 1 });
        let dir = tempfile::tempdir().unwrap();
        let set = write(dir.path(), &tensors(&matrix));
        let read = read_packed(&set, "w", &spec).unwrap();
        prop_assert_eq!(read.spec(), spec);
        prop_assert_eq!(all_values(&read), all_values(&matrix));
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
        let message = read_packed(set, "w", &PackedSpec::base(rows, cols, layout)).unwrap_err().to_string();
        assert!(message.contains(dir.path().to_str().unwrap()), "{message}");
        message
    };
    let set = write(dir.path(), &good);
    assert!(read_packed(&set, "w", &PackedSpec::base(2, 40, layout)).is_ok());
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

#[test]
fn corrections_that_the_configuration_does_not_describe_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout { bits: Bits::Two, group: Group::Inputs(32), symmetric: true };
    let matrix = random(3, 40, layout, 1).with_elements(elements(3, 40, 2)).unwrap();
    let (spec, good) = (matrix.spec(), tensors(&matrix));
    let n = spec.corrections.elements.unwrap();
    let message = |set: &TensorSet, spec: &PackedSpec| {
        let message = read_packed(set, "w", spec).unwrap_err().to_string();
        assert!(message.contains(dir.path().to_str().unwrap()), "{message}");
        message
    };
    let set = write(dir.path(), &good);
    assert_eq!(all_values(&read_packed(&set, "w", &spec).unwrap()), all_values(&matrix));
    let text = message(&set, &PackedSpec::base(3, 40, layout));
    assert!(text.contains("'w.element_counts' is there") && text.contains("quantize again"), "{text}");
    for wrong in [0, n - 1, n + 1, usize::MAX] {
        let text = message(&set, &PackedSpec { corrections: CorrectionSpec { elements: Some(wrong) }, ..spec });
        assert!(text.contains("'w.element_cols'") && text.contains("expected"), "{text}");
    }
    for part in ["element_counts", "element_cols", "element_values"] {
        let less: Vec<_> = good.iter().filter(|(s, _)| s.name != format!("w.{part}")).cloned().collect();
        let text = message(&write(dir.path(), &less), &spec);
        assert!(text.contains(&format!("'w.{part}' is missing")), "{text}");
    }
    let damage = |part: &str, at: usize, bytes: [u8; 2]| {
        let mut damaged = good.clone();
        let tensor = damaged.iter_mut().find(|(s, _)| s.name == format!("w.{part}")).unwrap();
        tensor.1[at..at + 2].copy_from_slice(&bytes);
        message(&write(dir.path(), &damaged), &spec)
    };
    for (part, at, bytes, expected) in [
        ("element_counts", 0, 9u16.to_le_bytes(), "ask for"),
        ("element_cols", 2, 40u16.to_le_bytes(), "column 40"),
        ("element_cols", 2, 0u16.to_le_bytes(), "column 0"),
        ("element_values", 2, f16::NAN.to_le_bytes(), "NaN"),
    ] {
        let text = damage(part, at, bytes);
        assert!(text.contains("'w'") && text.contains(expected) && text.contains("damaged"), "{text}");
    }
}

#[test]
fn a_wide_matrix_survives_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let (cols, layout) = (65_600, Layout { bits: Bits::Two, group: Group::Row, symmetric: true });
    let rows = [vec![(1, f16::ONE), (65_599, f16::from_f32(-2.0))], vec![(65_536, f16::ONE)]];
    let elements = ElementCorrections::from_rows(cols, &rows).unwrap();
    let matrix = random(2, cols, layout, 1).with_elements(elements).unwrap();
    let set = write(dir.path(), &tensors(&matrix));
    assert_eq!(set.get("w.element_cols").unwrap().dtype, StoredType::U32);
    assert_eq!(all_values(&read_packed(&set, "w", &matrix.spec()).unwrap()), all_values(&matrix));
}
