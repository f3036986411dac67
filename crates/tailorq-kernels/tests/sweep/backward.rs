//! Every backward operation on every device against the scalar reference, and the same bits for any number of threads.
use super::devices;
use super::inputs::{normal, rope_table, weights};
use std::ops::Range;
use tailorq_kernels::{AttentionShape, Device, GradientSums, Heads, HeadsMut, LogSumExp, reference};
use tailorq_tensor::{Matrix, Rng};

/// Runs `f` on the reference and on every device with pools of several sizes: close to the one, the same bits in all.
fn check(what: &str, tolerance: f32, f: impl Fn(&dyn Device) -> Vec<f32> + Sync) {
    let expected = f(&*reference());
    for device in devices() {
        let run =
            |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| f(&*device));
        let found = run(1);
        assert_eq!(found.len(), expected.len(), "{what}");
        for (i, (&a, &b)) in found.iter().zip(&expected).enumerate() {
            assert!((a - b).abs() <= tolerance, "{} {what}: element {i} is {a}, expected {b}", device.name());
        }
        let bits = |v: &[f32]| -> Vec<u32> { v.iter().map(|x| x.to_bits()).collect() };
        for threads in [2, 3] {
            assert!(bits(&run(threads)) == bits(&found), "{} {what}: {threads} threads", device.name());
        }
    }
}

#[test]
fn linears() {
    let mut rng = Rng::new(1);
    for (n, rows, cols) in [(0, 3, 16), (1, 1, 1), (5, 17, 33), (40, 130, 64), (300, 9, 300)] {
        for w in weights(&mut rng, rows, cols) {
            let (dy, before) = (normal(&mut rng, n * rows), normal(&mut rng, n * cols));
            check(&format!("linear_backward {n} {w:?}"), 1e-4, |device| {
                let mut dx = before.clone();
                device.linear_backward(&dy, &w, &mut dx);
                if rows > 8 {
                    device.linear_backward_rows(&dy[..n * 3], &w, 5..8, &mut dx);
                }
                dx
            });
        }
    }
    let w = Matrix::from_vec(1200, 20, normal(&mut rng, 24_000)).into();
    let dy = normal(&mut rng, 3 * 1200);
    check("linear_backward over several panels", 3e-4, |device| {
        let mut dx = vec![0.0; 60];
        device.linear_backward(&dy, &w, &mut dx);
        dx
    });
}

#[test]
fn weight_gradients() {
    let mut rng = Rng::new(2);
    for (out, cols) in [(1, 1), (5, 17), (300, 33), (16, 520)] {
        let (dy, x) = (normal(&mut rng, 40 * out), normal(&mut rng, 40 * cols));
        let before = Matrix::from_vec(out, cols, normal(&mut rng, out * cols));
        for which in [7, 1, 2, 4, 0] {
            check(&format!("weight_gradients {out} x {cols}, sums {which}"), 5e-3, |device| {
                let mut sums = [before.clone(), before.clone(), before.clone()];
                let [sum, absolute, square] = &mut sums;
                let into = GradientSums {
                    sum: (which & 1 != 0).then_some(sum),
                    absolute: (which & 2 != 0).then_some(absolute),
                    square: (which & 4 != 0).then_some(square),
                };
                device.weight_gradients(&dy, &x, &[3..20, 20..20, 20..21, 25..40], into);
                sums.into_iter().flat_map(Matrix::into_vec).collect()
            });
        }
    }
}

#[test]
fn rows_and_elements() {
    let mut rng = Rng::new(3);
    for (n, width) in [(0, 16), (1, 1), (3, 15), (17, 16), (300, 72)] {
        let (x, dy, before) = (normal(&mut rng, n * width), normal(&mut rng, n * width), normal(&mut rng, n * width));
        let weight = normal(&mut rng, width);
        check(&format!("rms_norm_backward {n} x {width}"), 5e-5, |device| {
            let mut dx = before.clone();
            device.rms_norm_backward(&x, &weight, 1e-5, &dy, &mut dx);
            dx
        });
        check(&format!("swiglu_backward {n} x {width}"), 5e-5, |device| {
            let (mut gate, mut up) = (x.iter().map(|x| 8.0 * x).collect::<Vec<_>>(), before.clone());
            device.swiglu_backward(&dy, &mut gate, &mut up);
            [gate, up].concat()
        });
    }
    for (n, heads, half) in [(0, 1, 4), (3, 2, 15), (300, 2, 16)] {
        let (table, dx) = (rope_table(64, half), normal(&mut rng, n * heads * 2 * half));
        let positions: Vec<u32> = (0..n).map(|_| rng.below(64) as u32).collect();
        check("rope_backward", 2e-6, |device| {
            let mut dx = dx.clone();
            device.rope_backward(&mut dx, &table, &positions);
            dx
        });
        for device in devices() {
            let mut there_and_back = dx.clone();
            device.rope(&mut there_and_back, &table, &positions);
            device.rope_backward(&mut there_and_back, &table, &positions);
            assert!(
                dx.iter().zip(there_and_back).all(|(a, b)| (a - b).abs() < 1e-5),
                "a rotation's transpose undoes it"
            );
        }
    }
}

fn check_attention(rng: &mut Rng, shape: AttentionShape, spans: &[Range<usize>], n: usize) {
    let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let [q, dy] = [normal(rng, n * width), normal(rng, n * width)];
    let [k, v] = [normal(rng, n * kv_width), normal(rng, n * kv_width)];
    check(&format!("attention_backward {shape:?} {spans:?}"), 1e-4, |device| {
        // Rows of no span keep what they had.
        let (mut dq, mut dk, mut dv) = (vec![7.0; n * width], vec![7.0; n * kv_width], vec![7.0; n * kv_width]);
        let gradients = HeadsMut { q: &mut dq, k: &mut dk, v: &mut dv };
        device.attention_backward(shape, Heads { q: &q, k: &k, v: &v }, spans, &dy, gradients);
        [dq, dk, dv].concat()
    });
}

#[test]
fn attention() {
    let mut rng = Rng::new(4);
    for (heads, kv_heads, head_dim) in [(1, 1, 1), (2, 1, 15), (6, 2, 16)] {
        for window in [None, Some(1), Some(5), Some(70)] {
            let shape = AttentionShape { heads, kv_heads, head_dim, window };
            check_attention(&mut rng, shape, &[], 0);
            check_attention(&mut rng, shape, &[30..31, 0..17, 17..17, 18..29], 33);
            check_attention(&mut rng, shape, &[0..290, 290..300], 300);
        }
    }
}

#[test]
fn vocabularies_in_chunks() {
    let mut rng = Rng::new(5);
    for (n, words, chunk) in [(0, 10, 4), (1, 1, 1), (3, 100, 33), (40, 70, 17)] {
        let logits: Vec<f32> = normal(&mut rng, n * words).iter().map(|x| 5.0 * x).collect();
        let other = normal(&mut rng, n * words);
        let weights = normal(&mut rng, n);
        check(&format!("softmax and divergence {n} x {words}"), 3e-5, |device| {
            let of = |from: &[f32], words: Range<usize>, all: usize| -> Vec<f32> {
                from.chunks(all).flat_map(|row| row[words.clone()].to_vec()).collect()
            };
            let mut sums = [vec![LogSumExp::default(); n], vec![LogSumExp::default(); n]];
            let chunks = || (0..words).step_by(chunk).map(|at| at..(at + chunk).min(words));
            for part in chunks() {
                device.log_sum_exp(&of(&logits, part.clone(), words), &mut sums[0]);
                device.log_sum_exp(&of(&other, part, words), &mut sums[1]);
            }
            let values = |sums: &[LogSumExp]| -> Vec<f64> { sums.iter().map(|s| s.value()).collect() };
            let (a, b) = (values(&sums[0]), values(&sums[1]));
            let (mut out, mut divergences) = (Vec::new(), vec![0.0; n]);
            for part in chunks() {
                let mut p = of(&logits, part.clone(), words);
                device.softmax_weighted(&weights, &a, &mut p);
                let (mut d, reference) = (of(&logits, part.clone(), words), of(&other, part, words));
                device.divergence_backward(&weights, (&reference, &b), (&mut d, &a), &mut divergences);
                out.extend(p.into_iter().chain(d));
            }
            assert!(divergences.iter().all(|d| *d >= -1e-5), "{divergences:?}");
            out.extend(a.iter().chain(&b).chain(&divergences).map(|&x| x as f32));
            out
        });
    }
}
