//! Every operation gives the same bits with any number of threads, at shapes that fill several tiles of each partition.

#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod inputs;

use inputs::{Sequence, corrected, normal, packed, positive_definite, rope_table};
use tailorq_kernels::{Activations, AttentionShape, Device, cpu_variants, cpu_variants_with};
use tailorq_tensor::{Bits, Group, Layout, Matrix, Rng, Weight};

/// Runs `f` on every device with pools of several sizes and compares the bits.
fn assert_same_bits(what: &str, f: impl Fn(&dyn Device) -> Vec<f32> + Sync) {
    for device in cpu_variants().into_iter().chain(cpu_variants_with(Activations::Int8)) {
        let bits = |threads| -> Vec<u32> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| f(&*device)).into_iter().map(f32::to_bits).collect()
        };
        let one = bits(1);
        assert!(!one.is_empty());
        for threads in [2, 3, 5] {
            assert!(bits(threads) == one, "{}: {what} differs with {threads} threads", device.name());
        }
    }
}

#[test]
fn linears() {
    let mut rng = Rng::new(1);
    for (n, rows, cols) in [(1, 3000, 96), (3, 1000, 130), (40, 700, 65), (1100, 600, 33)] {
        let layout = Layout::new(Bits::Three, Group::Inputs(32));
        let dense: Weight = Matrix::from_vec(rows, cols, normal(&mut rng, rows * cols)).into();
        let plain = packed(&mut rng, rows, cols, layout);
        let fixed = corrected(&mut rng, plain.clone());
        for w in [dense, plain.into(), fixed.into()] {
            let (x, bias) = (normal(&mut rng, n * cols), normal(&mut rng, rows));
            assert_same_bits(&format!("linear n={n} {w:?}"), |device| {
                let mut y = vec![0.0; n * rows];
                device.linear(&x, &w, Some(&bias), &mut y);
                y
            });
        }
    }
}

#[test]
fn attention() {
    let mut rng = Rng::new(2);
    let shape = AttentionShape { heads: 6, kv_heads: 2, head_dim: 16, window: None };
    let spans = [(0..300, 0), (300..301, 700), (301..340, 20)];
    let sequences: Vec<_> = spans.into_iter().map(|(rows, past)| Sequence::random(&mut rng, rows, past, 32)).collect();
    let q = normal(&mut rng, 340 * 96);
    for window in [None, Some(70)] {
        assert_same_bits("attention", |device| {
            let spans: Vec<_> = sequences.iter().map(Sequence::span).collect();
            let mut y = vec![0.0; 340 * 96];
            device.attention(AttentionShape { window, ..shape }, &q, &spans, &mut y);
            y
        });
    }
}

#[test]
fn rows_and_elements() {
    let mut rng = Rng::new(3);
    let (n, width) = (500, 128);
    let (x, weight, up) = (normal(&mut rng, n * width), normal(&mut rng, width), normal(&mut rng, n * width));
    let (table, positions) = (rope_table(n, 32), (0..n as u32).collect::<Vec<_>>());
    let embedding: Weight = Matrix::from_vec(n, width, up.clone()).into();
    assert_same_bits("rms_norm", |device| {
        let mut y = vec![0.0; n * width];
        device.rms_norm(&x, &weight, 1e-5, &mut y);
        y
    });
    assert_same_bits("rope, swiglu and add", |device| {
        let mut y = x.clone();
        device.rope(&mut y, &table, &positions);
        device.swiglu(&mut y, &up);
        device.add(&x, &mut y);
        y
    });
    assert_same_bits("embed", |device| {
        let mut y = vec![0.0; n * width];
        device.embed(&positions, &embedding, &mut y);
        y
    });
}

#[test]
fn gram() {
    let mut rng = Rng::new(4);
    let (n, cols) = (400, 600);
    let x = normal(&mut rng, n * cols);
    assert_same_bits("gram", |device| {
        let mut h = Matrix::zeros(cols, cols);
        device.gram(&x, &mut h);
        device.gram(&x[..cols * 3], &mut h);
        h.into_vec()
    });
}

#[test]
fn inverse_factor() {
    let mut rng = Rng::new(5);
    for n in [130, 700] {
        let h = positive_definite(&mut rng, n, 1.0);
        assert_same_bits("inverse_cholesky_upper", |device| {
            let mut u = h.clone();
            device.inverse_cholesky_upper(&mut u).unwrap();
            u.into_vec()
        });
    }
}
