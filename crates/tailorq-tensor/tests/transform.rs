//! The input transform: orthonormal for every width, undone by its inverse, and what it does to a packed matrix.
#![allow(clippy::unwrap_used)]

use half::f16;
use tailorq_tensor::{
    Bits, ElementCorrections, Group, InputTransform, Layout, MeanTile, PackError, PackedMatrix, Rng, TileBits,
    TileCorrection, TileCorrections, TransformKind, TransformSpec,
};

/// Widths of real models, and awkward ones.
const WIDTHS: [usize; 16] = [0, 1, 2, 3, 7, 16, 33, 48, 64, 100, 129, 577, 576, 896, 1000, 1536];

fn spec(block: usize, seed: u64) -> TransformSpec {
    TransformSpec { kind: TransformKind::Hadamard, seed, block }
}

/// Every block that a width can have.
fn blocks(width: usize) -> impl Iterator<Item = usize> {
    (0..20).map(|k| 1 << k).filter(move |b| *b <= width.max(1))
}

/// `T` by its definition in f64, `[width, width]`: signs and Walsh functions block by block, then the overlapping pass.
fn explicit(t: &InputTransform) -> Vec<Vec<f64>> {
    let (n, block) = (t.width(), t.block());
    let whole = n - n % block;
    let pass = |first: usize, signs: &[f32], columns: &mut Vec<Vec<f64>>| {
        for column in columns.iter_mut() {
            let old: Vec<f64> = (0..block).map(|i| column[first + i] * f64::from(signs[i])).collect();
            for i in 0..block {
                let sign = |j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                column[first + i] = (0..block).map(|j| sign(j) * old[j]).sum();
            }
        }
    };
    let mut columns: Vec<Vec<f64>> = (0..n).map(|c| (0..n).map(|r| f64::from(u8::from(r == c))).collect()).collect();
    for first in (0..whole).step_by(block) {
        pass(first, &t.signs()[first..], &mut columns);
    }
    if whole < n {
        pass(n - block, &t.signs()[whole..], &mut columns);
    }
    (0..n).map(|r| columns.iter().map(|c| c[r]).collect()).collect()
}

fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| rng.normal()).collect()
}

#[test]
fn widths_get_their_blocks() {
    let expected = [
        (576, 64),
        (896, 128),
        (1536, 512),
        (2048, 2048),
        (4096, 4096),
        (4864, 256),
        (8960, 256),
        (18944, 512),
        (16384, 4096),
        (0, 1),
        (1, 1),
        (3, 2),
        (48, 32),
        (100, 64),
        (577, 512),
        (9999, 4096),
    ];
    for (width, block) in expected {
        assert_eq!(InputTransform::hadamard(width, 1).unwrap().block(), block, "{width}");
    }
}

#[test]
fn it_is_what_its_definition_says() {
    for width in [1, 2, 5, 48, 96, 100, 192, 257] {
        for block in blocks(width) {
            let t = InputTransform::new(width, spec(block, 3)).unwrap();
            let (matrix, x) = (explicit(&t), normal(width, 4));
            let mut rotated = x.clone();
            t.forward(&mut rotated);
            for (row, y) in matrix.iter().zip(&rotated) {
                let expected: f64 = row.iter().zip(&x).map(|(t, x)| t * f64::from(*x)).sum();
                assert!((expected - f64::from(*y)).abs() < 2e-6 * (width as f64).sqrt(), "{width}/{block}");
            }
        }
    }
}

#[test]
fn rows_and_columns_are_orthonormal() {
    for width in [5, 48, 100, 192] {
        for block in blocks(width) {
            let matrix = explicit(&InputTransform::new(width, spec(block, 5)).unwrap());
            for (i, a) in matrix.iter().enumerate() {
                for (j, b) in matrix.iter().enumerate() {
                    let dot: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                    assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-6, "{width}/{block}: {i} {j} {dot}");
                }
            }
        }
    }
}

#[test]
fn backward_undoes_forward_and_lengths_stay() {
    for width in WIDTHS {
        for block in blocks(width) {
            let t = InputTransform::new(width, spec(block, 8)).unwrap();
            let x = normal(width, 9);
            let energy = |x: &[f32]| x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
            let mut y = x.clone();
            t.forward(&mut y);
            assert!((energy(&y) - energy(&x)).abs() <= 1e-5 * energy(&x), "{width}/{block}");
            assert!(width < 64 || block == 1 || y != x);
            t.backward(&mut y);
            let close = y.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(close, "{width}/{block}");
        }
    }
}

#[test]
fn an_outlier_is_spread_over_all_that_its_block_reaches() {
    for width in [576, 577, 896, 1536, 1000] {
        let t = InputTransform::hadamard(width, 1).unwrap();
        for at in [0, width / 2, width - 1] {
            let mut x = vec![0.0; width];
            x[at] = 1.0;
            t.forward(&mut x);
            let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            // A Gaussian of that many numbers reaches about four times its deviation.
            assert!(largest < 4.5 / (t.block() as f32).sqrt(), "{width}, {at}: {largest}");
        }
    }
}

#[test]
fn seeds_matter_and_are_all_that_matters() {
    let rotated = |seed| {
        let mut x = normal(600, 2);
        InputTransform::hadamard(600, seed).unwrap().forward(&mut x);
        x
    };
    assert_eq!(rotated(u64::MAX), rotated(u64::MAX));
    assert_ne!(rotated(0), rotated(1));
    assert_eq!(InputTransform::hadamard(600, 1), InputTransform::hadamard(600, 1));
    assert_ne!(InputTransform::hadamard(600, 1), InputTransform::hadamard(600, 2));
    assert_ne!(InputTransform::hadamard(600, 1), InputTransform::hadamard(300, 1));
}

#[test]
fn hostile_blocks_and_widths_are_refused() {
    for (width, block) in [(64, 0), (64, 3), (64, 128), (0, 2), (64, usize::MAX), (usize::MAX, 64), ((1 << 20) + 1, 1)]
    {
        let error = InputTransform::new(width, spec(block, 1)).unwrap_err();
        assert!(matches!(error, PackError::Transform(_)), "{width}/{block}: {error}");
    }
}

fn base(rows: usize, cols: usize, bits: Bits, seed: u64) -> PackedMatrix {
    let mut rng = Rng::new(seed);
    let layout = Layout::new(bits, Group::Inputs(32));
    let n_codes = usize::from(bits.max_code()) + 1;
    let groups = rows * layout.group.count(cols);
    let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(n_codes) as u8).collect();
    let scales: Vec<f16> = (0..groups).map(|_| f16::from_f64(rng.uniform())).collect();
    let zeros: Vec<u8> = (0..groups).map(|_| rng.below(n_codes) as u8).collect();
    PackedMatrix::pack(rows, cols, layout, &codes, &scales, &zeros).unwrap()
}

/// Weights are the base times `T`, plus corrections that the transform does not touch.
#[test]
fn a_rotated_matrix_is_its_base_times_the_transform_plus_corrections() {
    for cols in [1, 48, 100, 192] {
        let (rows, t) = (3, InputTransform::hadamard(cols, 6).unwrap());
        let plain = base(rows, cols, Bits::Two, 5);
        let elements: Vec<Vec<(usize, f16)>> =
            (0..rows).map(|r| (0..cols).step_by(7).map(|c| (c, f16::from_f32((r + c) as f32))).collect()).collect();
        let elements = ElementCorrections::from_rows(cols, &elements).unwrap();
        let mut codes = [0; 16];
        codes[0] = 5;
        let tile = TileCorrection { tile: 0, scale: f16::from_f32(0.5), codes };
        let tiles = TileCorrections::from_rows(cols, TileBits::Four, &[vec![], vec![tile], vec![]]).unwrap();
        let rotated = plain.clone().with_transform(t.clone()).unwrap();
        let rotated = rotated.with_elements(elements.clone()).unwrap().with_tiles(tiles.clone()).unwrap();
        assert_eq!((rotated.transform(), rotated.spec().transform), (Some(&t), Some(t.spec())));
        assert_eq!(rotated.bytes(), plain.bytes() + elements.bytes() + tiles.bytes());
        let matrix = explicit(&t);
        let mut row = vec![f32::NAN; cols];
        for r in 0..rows {
            rotated.unpack_row(r, &mut row);
            for c in 0..cols {
                assert_eq!(rotated.base_value(r, c), plain.value(r, c));
                assert_eq!(rotated.value(r, c), row[c]);
                let base: f64 = (0..cols).map(|k| f64::from(plain.value(r, k)) * matrix[k][c]).sum();
                let corrections = tiles.get(r, c).unwrap_or(0.0) + elements.get(r, c).unwrap_or(0.0);
                let expected = base + f64::from(corrections);
                assert!((expected - f64::from(row[c])).abs() < 1e-4, "({r}, {c}) of {cols}: {expected}, {}", row[c]);
            }
        }
        // The other side of it: the same products from rotated activations.
        let x = normal(cols, 7);
        let mut y = x.clone();
        t.forward(&mut y);
        let dot = |a: &dyn Fn(usize) -> f32, b: &[f32]| -> f64 {
            b.iter().enumerate().map(|(i, b)| f64::from(a(i)) * f64::from(*b)).sum()
        };
        let by_parts = dot(&|c| plain.value(0, c), &y) + dot(&|c| elements.get(0, c).unwrap_or(0.0), &x);
        assert!((by_parts - dot(&|c| rotated.value(0, c), &x)).abs() < 1e-3);
    }
}

#[test]
fn panels_stack_with_their_transform() {
    let t = InputTransform::hadamard(100, 6).unwrap();
    let panels = [1, 2].map(|seed| base(2, 100, Bits::Three, seed).with_transform(t.clone()).unwrap());
    let stacked = PackedMatrix::stack(&panels);
    assert_eq!(stacked.transform(), Some(&t));
    assert_eq!(stacked.value(3, 50), panels[1].value(1, 50));
}

#[test]
fn means_and_other_widths_are_refused() {
    let two = base(2, 100, Bits::Two, 1);
    let t = InputTransform::hadamard(100, 1).unwrap();
    let other = two.clone().with_transform(InputTransform::hadamard(99, 1).unwrap()).unwrap_err();
    assert!(matches!(other, PackError::Transform(_)), "{other}");
    let scales = vec![f16::ONE; 8];
    let means = vec![vec![MeanTile { tile: 0, means: [1; 4] }], vec![]];
    let error = two.clone().with_transform(t.clone()).unwrap().pack_mean4(&scales, &means).unwrap_err();
    assert!(matches!(error, PackError::Mean4(_)), "{error}");
    let error = two.pack_mean4(&scales, &means).unwrap().with_transform(t).unwrap_err();
    assert!(matches!(error, PackError::Transform(_)), "{error}");
}
