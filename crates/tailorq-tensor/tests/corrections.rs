//! Element corrections: they are added where they belong and nowhere else, and bytes that do not form any are refused.
#![allow(clippy::unwrap_used)]

use half::f16;
use proptest::prelude::*;
use tailorq_tensor::{
    Bits, ElementCorrections, ElementParts, Group, Layout, PackError, PackedMatrix, ReadRows, Rng, SharedBytes,
};

const TWO: Layout = Layout::new(Bits::Two, Group::Inputs(32));

fn base(rows: usize, cols: usize, rng: &mut Rng) -> PackedMatrix {
    let groups = rows * TWO.group.count(cols);
    let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(4) as u8).collect();
    let scales: Vec<f16> = (0..groups).map(|_| f16::from_f64(rng.uniform())).collect();
    let zeros: Vec<u8> = (0..groups).map(|_| rng.below(4) as u8).collect();
    PackedMatrix::pack(rows, cols, TWO, &codes, &scales, &zeros).unwrap()
}

/// Corrections of about `share` of all elements: none for a share of 0, all for 1.
fn random(rows: usize, cols: usize, share: f64, rng: &mut Rng) -> Vec<Vec<(usize, f16)>> {
    let row = |rng: &mut Rng| {
        (0..cols).filter(|_| rng.uniform() < share).collect::<Vec<_>>().into_iter().map(|c| (c, value(rng))).collect()
    };
    (0..rows).map(|_| row(rng)).collect()
}

/// Any finite half, subnormals and both zeros too.
fn value(rng: &mut Rng) -> f16 {
    f16::from_bits(rng.below(0x7c00) as u16 | (rng.below(2) as u16) << 15)
}

/// The parts with `edit` done to them.
fn edited(parts: &ElementParts, edit: impl FnOnce(&mut ElementParts)) -> ElementParts {
    let mut parts = parts.clone();
    edit(&mut parts);
    parts
}

fn numbers<T: bytemuck::NoUninit + Send + Sync>(all: &[T]) -> SharedBytes {
    SharedBytes::from_vec(all.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn corrections_are_added_to_the_base(
        rows in 0usize..6, cols in 0usize..200, share in prop::sample::select(vec![0.0, 0.02, 0.5, 1.0]), seed: u64,
    ) {
        let mut rng = Rng::new(seed);
        let matrix = base(rows, cols, &mut rng);
        let chosen = random(rows, cols, share, &mut rng);
        let elements = ElementCorrections::from_rows(cols, &chosen).unwrap();
        let n: usize = chosen.iter().map(Vec::len).sum();
        prop_assert_eq!((elements.rows(), elements.cols(), elements.len()), (rows, cols, n));
        prop_assert_eq!(elements.bytes(), 2 * rows + 4 * n);
        let corrected = matrix.clone().with_elements(elements).unwrap();
        prop_assert_eq!(corrected.bytes(), matrix.bytes() + 2 * rows + 4 * n);
        prop_assert_eq!(corrected.spec().corrections.elements, Some(n));
        let mut all = vec![f32::NAN; rows * cols];
        corrected.read_rows(0, &mut all);
        for r in 0..rows {
            let read: Vec<_> = corrected.elements().unwrap().row(r).collect();
            let given: Vec<_> = chosen[r].iter().map(|&(c, v)| (c, v.to_f32())).collect();
            prop_assert_eq!(&read, &given);
            let elements = corrected.elements().unwrap();
            let of_row = &elements.rows_of()[elements.starts()[r]..elements.starts()[r + 1]];
            prop_assert!(of_row.iter().all(|of| usize::from(*of) == r % 256));
            for c in 0..cols {
                let added = given.iter().find(|e| e.0 == c).map(|e| e.1);
                prop_assert_eq!(corrected.elements().unwrap().get(r, c), added);
                let expected = matrix.value(r, c) + added.unwrap_or(0.0);
                prop_assert_eq!(corrected.base_value(r, c), matrix.value(r, c));
                prop_assert_eq!(corrected.value(r, c), expected);
                prop_assert_eq!(all[r * cols + c], expected);
            }
        }
    }

    /// Panels with, without and with empty corrections stack to the rows of all of them.
    #[test]
    fn panels_stack(panels in prop::collection::vec((0usize..4, prop::option::of(0.0f64..1.0)), 1..5), cols in 0usize..50, seed: u64) {
        let mut rng = Rng::new(seed);
        let corrected = |&(rows, share): &(usize, Option<f64>), rng: &mut Rng| {
            let matrix = base(rows, cols, rng);
            match share {
                None => matrix,
                Some(share) => {
                    let chosen = random(rows, cols, share, rng);
                    matrix.with_elements(ElementCorrections::from_rows(cols, &chosen).unwrap()).unwrap()
                }
            }
        };
        let parts: Vec<_> = panels.iter().map(|p| corrected(p, &mut rng)).collect();
        let stacked = PackedMatrix::stack(&parts);
        prop_assert_eq!(stacked.elements().is_some(), panels.iter().any(|p| p.1.is_some()));
        let mut expected = Vec::new();
        for part in &parts {
            let mut rows = vec![0.0; part.rows() * cols];
            part.read_rows(0, &mut rows);
            expected.extend(rows);
        }
        let mut found = vec![f32::NAN; expected.len()];
        stacked.read_rows(0, &mut found);
        prop_assert_eq!(found, expected);
    }
}

/// Above 65,535 columns counts and columns take four bytes; a full row fits its count at any width.
#[test]
fn wide_matrices() {
    for (cols, width) in [(65_535, 2), (65_536, 4), (70_001, 4)] {
        let last = (cols - 1, f16::from_f32(3.0));
        let full = (0..cols).map(|c| (c, f16::from_f32((c % 7) as f32))).collect();
        let elements = ElementCorrections::from_rows(cols, &[vec![(0, f16::ONE), last], vec![], full]).unwrap();
        assert_eq!(ElementCorrections::index_bytes(cols), width);
        assert_eq!(elements.bytes(), 3 * width + (cols + 2) * (width + 2));
        assert_eq!(elements.row(0).collect::<Vec<_>>(), [(0, 1.0), (cols - 1, 3.0)]);
        assert_eq!((elements.row(1).len(), elements.row(2).len()), (0, cols));
        let again = ElementCorrections::new(3, cols, elements.parts().clone()).unwrap();
        let (mut a, mut b) = (vec![0.0; cols], vec![0.0; cols]);
        for r in 0..3 {
            elements.add_to_row(r, &mut a);
            again.add_to_row(r, &mut b);
        }
        assert_eq!(a, b);
        assert_eq!(a[cols - 1], 3.0 + ((cols - 1) % 7) as f32);
    }
}

#[test]
fn known_bytes() {
    let rows = [vec![(3, f16::from_f32(-1.5)), (258, f16::ONE)], vec![], vec![(0, f16::from_f32(2.0))]];
    let elements = ElementCorrections::from_rows(300, &rows).unwrap();
    assert_eq!(elements.parts().counts[..], [2, 0, 0, 0, 1, 0]);
    assert_eq!(elements.parts().cols[..], [3, 0, 2, 1, 0, 0]);
    assert_eq!(elements.parts().values[..], [0x00, 0xbe, 0x00, 0x3c, 0x00, 0x40]);
}

#[test]
fn bad_rows_are_refused() {
    let one = f16::ONE;
    let refused = |row: Vec<(usize, f16)>| ElementCorrections::from_rows(10, &[vec![], row]).unwrap_err();
    let column = |col| PackError::ElementColumn { row: 1, col, cols: 10 };
    assert_eq!(refused(vec![(4, one), (2, one)]), column(2));
    assert_eq!(refused(vec![(4, one), (4, one)]), column(4));
    assert_eq!(refused(vec![(10, one)]), column(10));
    // A column that would be a legal one once cut to 16 bits.
    assert_eq!(refused(vec![(65_536 + 4, one)]), column(65_536 + 4));
    assert_eq!(refused((0..65_536 + 3).map(|i| (i % 10, one)).collect()), column(0));
    for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
        assert!(matches!(refused(vec![(4, one), (7, bad)]), PackError::ElementValue { row: 1, col: 7, .. }));
    }
    let two_rows = ElementCorrections::from_rows(10, &[vec![], vec![]]).unwrap();
    for (rows, cols) in [(3, 10), (2, 11), (0, 10)] {
        let error = base(rows, cols, &mut Rng::new(1)).with_elements(two_rows.clone()).unwrap_err();
        assert_eq!(error, PackError::OtherShape { found: (2, 10), expected: (rows, cols) });
    }
}

#[test]
fn hostile_parts_are_refused() {
    let rows = [vec![(3, f16::ONE), (7, f16::ONE)], vec![(1, f16::ONE)]];
    let good = ElementCorrections::from_rows(10, &rows).unwrap().parts().clone();
    let refused =
        |edit: &dyn Fn(&mut ElementParts)| ElementCorrections::new(2, 10, edited(&good, |p| edit(p))).unwrap_err();
    let size = |part, found, expected| PackError::CorrectionSize { part, found, expected };
    assert_eq!(refused(&|p| p.counts = numbers(&[2u16])), size("element_counts", 2, 4));
    // Counts that ask for more or less than there is.
    assert_eq!(refused(&|p| p.counts = numbers(&[2u16, 2])), size("element_cols", 6, 8));
    assert_eq!(refused(&|p| p.counts = numbers(&[65_535u16, 65_535])), size("element_cols", 6, 262_140));
    assert_eq!(refused(&|p| p.counts = numbers(&[2u16, 0])), size("element_cols", 6, 4));
    assert_eq!(refused(&|p| p.values = numbers(&[1u16, 2])), size("element_values", 4, 6));
    assert_eq!(refused(&|p| p.values = numbers(&[1u8; 5])), size("element_values", 5, 6));
    // The same columns under other counts are out of order.
    let column = |row, col| PackError::ElementColumn { row, col, cols: 10 };
    assert_eq!(refused(&|p| p.counts = numbers(&[3u16, 0])), column(0, 1));
    assert_eq!(refused(&|p| p.cols = numbers(&[3u16, 10, 1])), column(0, 10));
    assert_eq!(refused(&|p| p.cols = numbers(&[3u16, 3, 1])), column(0, 3));
    let nan = refused(&|p| p.values = numbers(&[f16::ONE, f16::ONE, f16::NAN]));
    assert!(matches!(nan, PackError::ElementValue { row: 1, col: 1, .. }), "{nan}");
    // Sizes that overflow, and parts that start at an odd byte.
    for rows in [usize::MAX, usize::MAX / 2 + 2] {
        assert!(ElementCorrections::new(rows, 10, good.clone()).is_err());
    }
    let shift = |part: &SharedBytes| {
        let mut bytes = vec![0u64; 2 + part.len() / 8];
        bytemuck::cast_slice_mut(&mut bytes)[1..1 + part.len()].copy_from_slice(part);
        SharedBytes::from_vec(bytes).slice(1..1 + part.len()).unwrap()
    };
    assert_eq!(refused(&|p| p.counts = shift(&p.counts)), PackError::Misaligned("element_counts"));
    assert_eq!(refused(&|p| p.cols = shift(&p.cols)), PackError::Misaligned("element_cols"));
    assert_eq!(refused(&|p| p.values = shift(&p.values)), PackError::Misaligned("element_values"));
}
