//! Linears of packed weights with 8-bit activations: every instruction set against their definition in f64.

#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod inputs;

use half::f16;
use inputs::{corrected, layouts, normal, packed};
use std::sync::Arc;
use tailorq_kernels::{Activations, Device, cpu_variants_with};
use tailorq_tensor::{
    Bits, Group, InputTransform, Layout, PackedMatrix, Rng, SharedBytes, TileBits, TileCorrection, TileCorrections,
    Weight,
};

/// Activations that share a scale.
const GROUP: usize = 32;

fn devices() -> Vec<Arc<dyn Device>> {
    cpu_variants_with(Activations::Int8)
}

/// Whether a device rounds the activations of `n` tokens.
fn is_rounded(device: &dyn Device, n: usize) -> bool {
    // More tokens are multiplied with weights in f32 where there is no kernel for panels.
    n <= 12 || device.name().contains("avx512")
}

/// The activations as the kernels see them with the base: rounded to multiples of a 127th of their group's largest.
fn rounded(x: &[f32], cols: usize) -> Vec<f64> {
    let round = |group: &[f32]| -> Vec<f64> {
        let largest = group.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let code = |v: f32| if largest > 0.0 { f64::from((v * (127.0 / largest)).round_ties_even()) } else { 0.0 };
        group.iter().map(|&v| code(v) * f64::from(largest / 127.0)).collect()
    };
    x.chunks(cols).flat_map(|row| row.chunks(GROUP).flat_map(round).collect::<Vec<_>>()).collect()
}

/// What a linear gives by definition, and the sum of the absolute terms, by which its error is judged.
fn expected(x: &[f32], w: &PackedMatrix, bias: Option<&[f32]>, t: usize, r: usize) -> (f64, f64) {
    let cols = w.cols();
    let bias = bias.map_or(0.0, |b| f64::from(b[r]));
    let inputs = match w.transform() {
        Some(transform) => {
            let mut rotated = x[t * cols..(t + 1) * cols].to_vec();
            transform.forward(&mut rotated);
            rotated
        }
        None => x[t * cols..(t + 1) * cols].to_vec(),
    };
    let x_rounded = rounded(&inputs, cols);
    let (mut sum, mut size) = (bias, 1e-6 + bias.abs());
    for c in 0..cols {
        let base = f64::from(w.base_value(r, c));
        let tile = w.tiles().and_then(|tiles| tiles.get(r, c)).unwrap_or(0.0);
        let correction = f64::from(tile) + f64::from(w.elements().and_then(|e| e.get(r, c)).unwrap_or(0.0));
        sum += base * x_rounded[c] + correction * f64::from(x[t * cols + c]);
        // The zero is taken off apart from the code, so both count; the zero of a codebook is its least level.
        let range = match w.levels() {
            Some(levels) => f64::from((levels[levels.len() - 1] - levels[0]).to_f32()),
            None => f64::from(w.layout().bits.max_code()),
        };
        let largest = range * f64::from(w.scales(r)[c / w.layout().group.len(cols)].to_f32());
        size += (largest + correction.abs()) * x_rounded[c].abs();
    }
    (sum, size)
}

fn check(rng: &mut Rng, w: &PackedMatrix, n: usize) {
    let (rows, cols) = (w.rows(), w.cols());
    let x = normal(rng, n * cols);
    let bias = normal(rng, rows);
    let bias = (n % 2 == 1).then_some(bias.as_slice());
    let weight: Weight = w.clone().into();
    for device in devices().into_iter().filter(|d| is_rounded(&**d, n)) {
        let mut y = vec![f32::NAN; n * rows];
        device.linear(&x, &weight, bias, &mut y);
        for (t, r) in (0..n).flat_map(|t| (0..rows).map(move |r| (t, r))) {
            let ((expected, size), found) = (expected(&x, w, bias, t, r), y[t * rows + r]);
            let what = format!("{} {} [{rows}, {cols}] token {t} of {n}, row {r}", device.name(), w.spec());
            assert!(
                (f64::from(found) - expected).abs() <= 2e-6 * size,
                "{what}: {found}, expected {expected} ({size})"
            );
        }
    }
}

#[test]
fn every_layout_and_awkward_shapes() {
    let mut rng = Rng::new(11);
    for (rows, cols) in [(1, 1), (3, 15), (5, 17), (7, 64), (6, 576), (2, 896), (5, 1100)] {
        for layout in layouts() {
            let w = packed(&mut rng, rows, cols, layout);
            for n in [1, 2, 3, 7, 13] {
                check(&mut rng, &w, n);
            }
        }
    }
}

#[test]
fn corrections_see_the_activations_as_they_are() {
    let mut rng = Rng::new(12);
    for layout in layouts() {
        let plain = packed(&mut rng, 9, 600, layout);
        let w = corrected(&mut rng, plain);
        check(&mut rng, &w, 1);
        check(&mut rng, &w, 3);
        check(&mut rng, &w, 14);
        check(&mut rng, &w, 63);
    }
    // The base sees rotated activations, corrections see them as they are.
    let plain = packed(&mut rng, 9, 600, layouts()[0]);
    let w = corrected(&mut rng, plain);
    let rotated = w.with_transform(InputTransform::hadamard(600, 5).unwrap()).unwrap();
    check(&mut rng, &rotated, 1);
    check(&mut rng, &rotated, 120);
    // A row with more elements than are multiplied at once, tiles of four bits, and more than a word of marks.
    let plain = packed(&mut rng, 5, 2600, layouts()[0]);
    let w = corrected(&mut rng, plain);
    for bits in TileBits::ALL {
        let tiles: Vec<Vec<_>> = (0..5)
            .map(|r| {
                let tile = |tile| TileCorrection {
                    tile,
                    scale: f16::from_f32(0.01),
                    codes: std::array::from_fn(|i| if 16 * tile + i < 2600 { (i % 16) as i8 - 8 } else { 0 }),
                };
                (0..163).filter(|t| t % 5 <= r).map(tile).collect()
            })
            .collect();
        let w = w.clone().with_tiles(TileCorrections::from_rows(2600, bits, &tiles).unwrap()).unwrap();
        for n in [2, 20, 150, 300] {
            check(&mut rng, &w, n);
        }
    }
}

#[test]
fn many_groups_and_no_rows() {
    let mut rng = Rng::new(13);
    for (bits, group, cols) in
        [(Bits::Two, 32, 4864), (Bits::Eight, 128, 8960), (Bits::Three, 128, 4864), (Bits::Four, 64, 2100)]
    {
        let layout = Layout::new(bits, Group::Inputs(group));
        for (rows, n) in [(5, 1), (0, 2), (71, 25), (0, 13)] {
            let w = packed(&mut rng, rows, cols, layout);
            check(&mut rng, &w, n);
        }
    }
}

/// Levels that are integers of one byte or of two times a power of two.
fn codebook(bits: Bits, is_wide: bool) -> SharedBytes {
    let n = usize::from(bits.max_code()) + 1;
    let level = |i: usize| 3.0 * ((i as f32 + 0.5) / n as f32 - 0.5);
    let levels: Vec<f16> = (0..n).map(|i| f16::from_f32(level(i) + if is_wide { 0.001 } else { 0.0 })).collect();
    SharedBytes::from_vec(levels)
}

#[test]
fn codebooks_are_integers() {
    let mut rng = Rng::new(16);
    for layout in layouts().into_iter().filter(Layout::has_codebooks) {
        for (is_wide, (rows, cols)) in
            [(false, (1, 1)), (true, (3, 15)), (false, (5, 17)), (true, (6, 576)), (false, (2, 896)), (true, (5, 1100))]
        {
            let w = packed(&mut rng, rows, cols, layout).with_levels(codebook(layout.bits, is_wide)).unwrap();
            for n in [1, 2, 3, 7, 13, 40] {
                check(&mut rng, &w, n);
            }
            let rotated = w.with_transform(InputTransform::hadamard(cols, 5).unwrap()).unwrap();
            let fixed = corrected(&mut rng, rotated);
            check(&mut rng, &fixed, 1);
        }
    }
}

#[test]
fn a_token_and_a_row_are_the_same_alone_and_among_others() {
    let mut rng = Rng::new(14);
    let layout = |symmetric| Layout { symmetric, ..Layout::new(Bits::Two, Group::Inputs(128)) };
    let plain = packed(&mut rng, 37, 896, layout(false));
    let book = packed(&mut rng, 37, 896, layout(true)).with_levels(codebook(Bits::Two, true)).unwrap();
    let fixed = corrected(&mut rng, plain.clone());
    let x = normal(&mut rng, 12 * 896);
    for w in [plain, fixed, book].map(Weight::from) {
        for device in devices() {
            let mut all = vec![0.0; 12 * 37];
            device.linear(&x, &w, None, &mut all);
            for n in [1, 2, 5] {
                for t in 0..12 - n {
                    let mut some = vec![0.0; n * 20];
                    device.linear_rows(&x[t * 896..(t + n) * 896], &w, None, 9..29, &mut some);
                    for (k, row) in some.chunks(20).enumerate() {
                        let of_all = &all[(t + k) * 37 + 9..(t + k) * 37 + 29];
                        assert_eq!(row, of_all, "{} {n} tokens from {t} of {w:?}", device.name());
                    }
                }
            }
        }
    }
}

#[test]
fn single_rows_of_a_large_matrix_are_those_of_all() {
    let mut rng = Rng::new(16);
    // More bytes than a task has at least.
    let (rows, cols) = (401, 896);
    let layout = Layout::new(Bits::Two, Group::Inputs(128));
    let w: Weight = packed(&mut rng, rows, cols, layout).into();
    let x = normal(&mut rng, cols);
    for device in devices() {
        let mut all = vec![0.0; rows];
        device.linear(&x, &w, None, &mut all);
        for range in [0..1, 5..6, 400..401, 7..12] {
            let mut some = vec![0.0; range.len()];
            device.linear_rows(&x, &w, None, range.clone(), &mut some);
            assert_eq!(some, all[range], "{}", device.name());
        }
    }
}

#[test]
fn activations_that_are_not_numbers_stay_so() {
    let mut rng = Rng::new(15);
    let layout = Layout::new(Bits::Two, Group::Inputs(64));
    let w: Weight = packed(&mut rng, 4, 200, layout).into();
    for (device, poison) in devices().into_iter().flat_map(|d| [(Arc::clone(&d), f32::NAN), (d, f32::INFINITY)]) {
        let mut x = normal(&mut rng, 200);
        x[150] = poison;
        let mut y = vec![0.0; 4];
        device.linear(&x, &w, None, &mut y);
        assert!(y.iter().all(|y| y.is_nan()), "{}: {y:?}", device.name());
        // Denormal activations are as good as zero.
        device.linear(&[1e-40; 200], &w, None, &mut y);
        assert!(y.iter().all(|y| y.abs() < 1e-30), "{}: {y:?}", device.name());
    }
}
