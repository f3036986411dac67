//! A packed matrix with corrections is, to every operation of every device, the dense matrix of its values: bit for bit.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod inputs;

use inputs::{corrected, layouts, normal, packed};
use tailorq_kernels::{cpu_variants, reference};
use tailorq_tensor::{Bits, Group, Layout, Matrix, PackedMatrix, Rng, Weight};

/// The matrix and its values, one by one.
fn both(m: PackedMatrix) -> (Weight, Weight) {
    let values = (0..m.rows()).flat_map(|r| (0..m.cols()).map(move |c| (r, c))).map(|(r, c)| m.value(r, c)).collect();
    let dense = Matrix::from_vec(m.rows(), m.cols(), values);
    (m.into(), dense.into())
}

#[test]
fn linears_forward_and_backward() {
    let mut rng = Rng::new(1);
    let two = Layout::new(Bits::Two, Group::Inputs(64));
    for (rows, cols) in [(1, 1), (5, 17), (41, 130), (300, 200), (9, 576)] {
        let base = packed(&mut rng, rows, cols, two);
        let (w, dense) = both(corrected(&mut rng, base));
        for n in [1, 5, 12, 13, 40] {
            let (x, bias) = (normal(&mut rng, n * cols), normal(&mut rng, rows));
            let (dy, before) = (normal(&mut rng, n * rows), normal(&mut rng, n * cols));
            for device in cpu_variants().into_iter().chain([reference()]) {
                let what = format!("{} n={n} [{rows}, {cols}]", device.name());
                let forward = |w: &Weight| {
                    let mut y = vec![f32::NAN; n * rows];
                    device.linear(&x, w, Some(&bias), &mut y);
                    y
                };
                assert_eq!(forward(&w), forward(&dense), "linear, {what}");
                let chosen = |w: &Weight| {
                    let mut y = vec![f32::NAN; n * (rows - rows / 2)];
                    device.linear_rows(&x, w, None, rows / 2..rows, &mut y);
                    y
                };
                assert_eq!(chosen(&w), chosen(&dense), "linear_rows, {what}");
                let backward = |w: &Weight| {
                    let mut dx = before.clone();
                    device.linear_backward(&dy, w, &mut dx);
                    dx
                };
                assert_eq!(backward(&w), backward(&dense), "linear_backward, {what}");
            }
        }
    }
}

#[test]
fn embeddings() {
    let mut rng = Rng::new(2);
    for layout in layouts() {
        let base = packed(&mut rng, 19, 45, layout);
        let (table, dense) = both(corrected(&mut rng, base));
        let ids = [0, 1, 2, 3, 3, 18, 7];
        for device in cpu_variants().into_iter().chain([reference()]) {
            let embed = |w: &Weight| {
                let mut y = vec![f32::NAN; ids.len() * 45];
                device.embed(&ids, w, &mut y);
                y
            };
            assert_eq!(embed(&table), embed(&dense), "{} {layout:?}", device.name());
        }
    }
}
