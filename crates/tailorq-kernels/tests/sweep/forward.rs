//! Every forward operation on every device against the scalar reference, awkward shapes first.
//!
//! Tolerances are per element, relative to the size of what was summed: a sum of `k` products of unit normals in f32 is
//! off by about `sqrt(k)` roundings of terms of size 1, so linear operations get `5e-6 * sqrt(k)`.

use super::devices;
use super::inputs::{Sequence, corrected, layouts, normal, packed, positive_definite, rope_table, weights};
use tailorq_kernels::{
    AttentionShape, AttentionSpan, Device, KeyValues, KvBlock, KvType, Strided, StridedMut, reference,
};
use tailorq_tensor::{Bits, Group, Layout, Matrix, Rng, Weight};

/// Fails with the place when `found` is farther than `tolerance` from `expected` anywhere.
fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (i, (&f, &e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance, "{what}: element {i} is {f}, expected {e} within {tolerance}");
    }
}

/// `y` of a linear, over a `y` that holds NaN before.
fn linear(device: &dyn Device, x: &[f32], n: usize, w: &Weight, bias: Option<&[f32]>) -> Vec<f32> {
    let mut y = vec![f32::NAN; n * w.rows()];
    device.linear(x, w, bias, &mut y);
    y
}

#[test]
fn linears_of_every_storage_and_shape() {
    let mut rng = Rng::new(1);
    for (rows, cols) in [(0, 16), (1, 1), (3, 15), (17, 16), (5, 17), (130, 64), (9, 576), (33, 896), (1, 0)] {
        for w in weights(&mut rng, rows, cols) {
            let bias = normal(&mut rng, rows);
            for n in [0, 1, 2, 3, 4, 5, 17, 40] {
                let x = normal(&mut rng, n * cols);
                let bias = (n % 2 == 1).then_some(bias.as_slice());
                let expected = linear(&*reference(), &x, n, &w, bias);
                for device in devices() {
                    let what = format!("{} linear n={n} {w:?}", device.name());
                    let tolerance = 1e-6 + 5e-6 * (cols as f32).sqrt();
                    assert_close(&linear(&*device, &x, n, &w, bias), &expected, tolerance, &what);
                }
            }
        }
    }
}

#[test]
fn large_linears_cross_every_partition() {
    let mut rng = Rng::new(2);
    let two = Layout::new(Bits::Two, Group::Inputs(64));
    for (n, rows, cols) in [(600, 530, 48), (1100, 70, 33), (1, 1500, 200), (4, 700, 576)] {
        let dense: Weight = Matrix::from_vec(rows, cols, normal(&mut rng, rows * cols)).into();
        for w in [dense, packed(&mut rng, rows, cols, two).into()] {
            let (x, bias) = (normal(&mut rng, n * cols), normal(&mut rng, rows));
            let expected = linear(&*reference(), &x, n, &w, Some(&bias));
            for device in devices() {
                let what = format!("{} linear n={n} {w:?}", device.name());
                assert_close(&linear(&*device, &x, n, &w, Some(&bias)), &expected, 5e-5, &what);
            }
        }
    }
}

#[test]
fn chosen_rows_of_a_linear_are_those_rows() {
    let mut rng = Rng::new(3);
    for w in weights(&mut rng, 41, 37) {
        let bias = normal(&mut rng, 41);
        for n in [1, 2, 30] {
            let x = normal(&mut rng, n * 37);
            for rows in [0..0, 7..7, 3..4, 5..41, 0..41] {
                let mut expected = vec![0.0; n * rows.len()];
                reference().linear_rows(&x, &w, Some(&bias), rows.clone(), &mut expected);
                for device in devices() {
                    let mut y = vec![f32::NAN; n * rows.len()];
                    device.linear_rows(&x, &w, Some(&bias), rows.clone(), &mut y);
                    assert_close(&y, &expected, 2e-5, &format!("{} rows {rows:?} of {w:?}", device.name()));
                }
            }
        }
    }
}

#[test]
fn one_hot_inputs_read_packed_values_exactly() {
    let mut rng = Rng::new(4);
    for layout in layouts() {
        for cols in [1, 17, 40, 130] {
            let base = packed(&mut rng, 6, cols, layout);
            let m = corrected(&mut rng, base);
            let w: Weight = m.clone().into();
            for device in devices() {
                for hot in 0..cols {
                    let mut x = vec![0.0; cols];
                    x[hot] = 1.0;
                    let expected: Vec<f32> = (0..6).map(|r| m.value(r, hot)).collect();
                    assert_eq!(linear(&*device, &x, 1, &w, None), expected, "{} {layout:?}", device.name());
                }
            }
        }
    }
}

#[test]
fn embeddings_are_rows_of_the_table() {
    let mut rng = Rng::new(5);
    for w in weights(&mut rng, 19, 33) {
        for ids in [vec![], vec![18], vec![0, 3, 3, 18, 7]] {
            let mut expected = vec![0.0; ids.len() * 33];
            reference().embed(&ids, &w, &mut expected);
            for device in devices() {
                let mut y = vec![f32::NAN; ids.len() * 33];
                device.embed(&ids, &w, &mut y);
                assert_eq!(y, expected, "{} {w:?}", device.name());
            }
        }
    }
}

#[test]
fn norms() {
    let mut rng = Rng::new(6);
    for (n, cols) in [(0, 16), (1, 1), (3, 15), (17, 16), (3, 17), (70, 576), (5, 896)] {
        let (x, weight) = (normal(&mut rng, n * cols), normal(&mut rng, cols));
        let mut expected = vec![0.0; n * cols];
        reference().rms_norm(&x, &weight, 1e-6, &mut expected);
        for device in devices() {
            let mut y = vec![f32::NAN; n * cols];
            device.rms_norm(&x, &weight, 1e-6, &mut y);
            assert_close(&y, &expected, 1e-5, &format!("{} rms_norm {n} x {cols}", device.name()));
        }
    }
}

#[test]
fn rotary_embeddings() {
    let mut rng = Rng::new(7);
    for (n, heads, half) in [(0, 1, 4), (1, 1, 1), (3, 2, 15), (17, 3, 16), (5, 14, 32), (300, 2, 64)] {
        let table = rope_table(64, half);
        let positions: Vec<u32> = (0..n).map(|_| rng.below(64) as u32).collect();
        let x = normal(&mut rng, n * heads * 2 * half);
        let mut expected = x.clone();
        reference().rope(&mut expected, &table, &positions);
        for device in devices() {
            let mut y = x.clone();
            device.rope(&mut y, &table, &positions);
            assert_close(&y, &expected, 2e-6, &format!("{} rope {n} x {heads} x {half}", device.name()));
        }
    }
}

#[test]
fn gates_and_sums() {
    let mut rng = Rng::new(8);
    for n in [0, 1, 15, 16, 17, 1000, 40_000] {
        let (gate, up) = (normal(&mut rng, n), normal(&mut rng, n));
        let wide: Vec<f32> = gate.iter().map(|g| 8.0 * g).collect();
        let (mut gated, mut sum) = (wide.clone(), up.clone());
        reference().swiglu(&mut gated, &up);
        reference().add(&gate, &mut sum);
        for device in devices() {
            let (mut g, mut s) = (wide.clone(), up.clone());
            device.swiglu(&mut g, &up);
            device.add(&gate, &mut s);
            assert_close(&g, &gated, 2e-5, &format!("{} swiglu {n}", device.name()));
            assert_eq!(s, sum, "{} add {n}", device.name());
        }
    }
}

#[test]
fn extreme_gates() {
    let gate = [f32::NEG_INFINITY, -1e30, -200.0, -100.0, -88.0, -0.0, 0.0, 88.0, 100.0, 1e30, f32::INFINITY, f32::NAN];
    let up = [1.0; 12];
    for device in devices() {
        let mut g = gate;
        device.swiglu(&mut g, &up);
        // silu(-inf) is -inf * 0: no number; the reference agrees.
        assert!(g[0].is_nan() && g[11].is_nan(), "{}: {g:?}", device.name());
        assert!(g[1..5].iter().all(|v| v.abs() < 1e-35), "{}: {g:?}", device.name());
        assert_close(&g[5..10], &gate[5..10], 0.0, &device.name());
        assert_eq!(g[10], f32::INFINITY);
    }
}

/// Attention over ragged spans: (rows, past) each.
fn check_attention(rng: &mut Rng, shape: AttentionShape, spans: &[(std::ops::Range<usize>, usize)], n: usize) {
    let width = shape.heads * shape.head_dim;
    let q = normal(rng, n * width);
    let sequences: Vec<Sequence> = spans
        .iter()
        .map(|(rows, past)| Sequence::random(rng, rows.clone(), *past, shape.kv_heads * shape.head_dim))
        .collect();
    let spans: Vec<_> = sequences.iter().map(Sequence::span).collect();
    let mut expected = vec![7.0; n * width];
    reference().attention(shape, &q, &spans, &mut expected);
    for device in devices() {
        // Rows of no span keep what they had.
        let mut y = vec![7.0; n * width];
        device.attention(shape, &q, &spans, &mut y);
        assert_close(&y, &expected, 1e-5, &format!("{} attention {shape:?}", device.name()));
    }
    for kind in KvType::ALL {
        check_cached(shape, &q, &sequences, kind);
    }
}

/// The same sequences in caches: a device against the reference on what is stored, and the reference against the plain rows.
fn check_cached(shape: AttentionShape, q: &[f32], sequences: &[Sequence], kind: KvType) {
    let caches: Vec<KvBlock> = sequences.iter().map(|s| s.cached(kind, shape.kv_heads, shape.head_dim)).collect();
    let plain: Vec<_> = sequences.iter().map(Sequence::span).collect();
    let spans: Vec<_> = (plain.iter().zip(&caches))
        .map(|(span, block)| AttentionSpan { source: KeyValues::Cache(block), ..span.clone() })
        .collect();
    let attend = |device: &dyn Device, spans: &[AttentionSpan<'_>]| {
        let mut y = vec![7.0; q.len()];
        device.attention(shape, q, spans, &mut y);
        y
    };
    let expected = attend(&*reference(), &spans);
    // Errors of the keys move the scores by the query's length times half a step of up to 4 / 127.
    let tolerance = match kind {
        KvType::F32 => 0.0,
        KvType::F16 => 0.02,
        KvType::Q8 => 0.3,
    };
    assert_close(&expected, &attend(&*reference(), &plain), tolerance, &format!("{kind} {shape:?}"));
    for device in devices() {
        let what = format!("{} attention over {kind}, {shape:?}", device.name());
        assert_close(&attend(&*device, &spans), &expected, 1e-5, &what);
        if kind == KvType::F32 {
            assert_eq!(attend(&*device, &spans), attend(&*device, &plain), "{what}: a cache changes no bit");
        }
    }
}

#[test]
fn attention_over_ragged_spans() {
    let mut rng = Rng::new(9);
    for (heads, kv_heads, head_dim) in [(1, 1, 1), (2, 1, 15), (4, 4, 16), (6, 2, 17), (14, 2, 64), (9, 3, 64)] {
        for window in [None, Some(1), Some(5), Some(64)] {
            let shape = AttentionShape { heads, kv_heads, head_dim, window };
            check_attention(&mut rng, shape, &[], 0);
            check_attention(&mut rng, shape, &[(0..1, 0)], 1);
            // A step of several sequences, with threads and without.
            check_attention(&mut rng, shape, &[(0..1, 200), (1..2, 0), (2..3, 31), (3..4, 32), (4..5, 700)], 5);
            check_attention(&mut rng, shape, &[(0..1, 40), (1..2, 0), (2..2, 9), (2..4, 133)], 4);
            check_attention(&mut rng, shape, &[(30..31, 3), (0..17, 0), (17..29, 5)], 32);
        }
    }
}

#[test]
fn attention_over_several_tiles() {
    let mut rng = Rng::new(10);
    for window in [None, Some(100)] {
        let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 32, window };
        check_attention(&mut rng, shape, &[(0..150, 0), (150..220, 90)], 220);
    }
}

#[test]
fn attention_with_large_scores_stays_finite() {
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 2, window: None };
    let keys = [0.0, 0.0, 300.0, 0.0, -300.0, 0.0];
    let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    for device in devices() {
        let span = AttentionSpan { rows: 0..1, source: KeyValues::Rows { keys: &keys, values: &values }, past: 2 };
        let mut y = [0.0; 2];
        device.attention(shape, &[300.0, 0.0], &[span], &mut y);
        assert_eq!(y, [3.0, 4.0], "{}", device.name());
    }
}

#[test]
fn gram_adds_to_the_lower_triangle_only() {
    let mut rng = Rng::new(11);
    for (n, cols) in [(0, 5), (1, 1), (3, 15), (17, 16), (40, 17), (9, 300), (64, 576)] {
        let x = normal(&mut rng, n * cols);
        let before = Matrix::from_vec(cols, cols, normal(&mut rng, cols * cols));
        let mut expected = before.clone();
        reference().gram(&x, &mut expected);
        for device in devices() {
            let mut h = before.clone();
            device.gram(&x, &mut h);
            assert_close(h.data(), expected.data(), 1e-4, &format!("{} gram {n} x {cols}", device.name()));
            for i in 0..cols {
                assert_eq!(h.row(i)[i + 1..], before.row(i)[i + 1..], "{}: the upper triangle is kept", device.name());
            }
        }
    }
}

#[test]
fn inverse_factor() {
    let mut rng = Rng::new(12);
    for n in [0, 1, 2, 15, 16, 17, 100, 129, 300] {
        let h = positive_definite(&mut rng, n, 0.1);
        let mut expected = h.clone();
        reference().inverse_cholesky_upper(&mut expected).unwrap();
        for device in devices() {
            let mut u = h.clone();
            device.inverse_cholesky_upper(&mut u).unwrap();
            let largest = expected.data().iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let what = format!("{} inverse_cholesky_upper {n}", device.name());
            assert_close(u.data(), expected.data(), 1e-4 * largest, &what);
        }
    }
}

#[test]
fn inverse_factor_inverts() {
    let h = Matrix::from_vec(2, 2, vec![4.0, f32::NAN, 2.0, 3.0]);
    for device in devices().into_iter().chain([reference()]) {
        let mut u = h.clone();
        device.inverse_cholesky_upper(&mut u).unwrap();
        // H^-1 = [[3, -2], [-2, 4]] / 8 = U^T U with U = [[a, b], [0, c]].
        let (a, b, c) = (u.data()[0], u.data()[1], u.data()[3]);
        assert_eq!(u.data()[2], 0.0);
        assert_close(&[a * a, a * b, b * b + c * c], &[3.0 / 8.0, -2.0 / 8.0, 4.0 / 8.0], 1e-6, &device.name());
    }
}

#[test]
fn matrices_that_have_no_factor() {
    let mut rng = Rng::new(13);
    for n in [1, 17, 300] {
        for (value, at) in [(-1.0, n - 1), (0.0, n / 2), (f32::NAN, 0), (f32::INFINITY, n - 1)] {
            let mut h = positive_definite(&mut rng, n, 1.0);
            h.row_mut(at)[at] = value;
            for device in devices().into_iter().chain([reference()]) {
                let error = device.inverse_cholesky_upper(&mut h.clone()).unwrap_err();
                assert_eq!(error.pivot, n - 1 - at, "{}: {value} at {at} of {n}", device.name());
            }
        }
    }
}

#[test]
fn products_of_strided_matrices() {
    let mut rng = Rng::new(14);
    for (m, k, n) in [(0, 3, 2), (1, 1, 1), (3, 0, 2), (17, 5, 16), (40, 128, 33), (1, 300, 17), (128, 64, 1)] {
        for (alpha, beta) in [(1.0, 0.0), (-1.0, 1.0), (0.5, -2.0)] {
            let (sa, sb, sc) = (k + 3, n, n + 5);
            let (a, b) = (normal(&mut rng, m * sa), normal(&mut rng, k * sb));
            // A zero beta must not read C.
            let c = if beta == 0.0 { vec![f32::NAN; m * sc] } else { normal(&mut rng, m * sc) };
            let run = |device: &dyn Device| {
                let mut c = c.clone();
                let a = Strided { data: &a, rows: m, cols: k, stride: sa };
                let b = Strided { data: &b, rows: k, cols: n, stride: sb };
                let into = StridedMut { data: &mut c, rows: m, cols: n, stride: sc };
                device.matmul_sequential(alpha, a, b, beta, into);
                c
            };
            let expected = run(&*reference());
            for device in devices() {
                let found = run(&*device);
                for r in 0..m {
                    let row = r * sc..r * sc + n;
                    assert_close(&found[row.clone()], &expected[row], 5e-5, &format!("{m} x {k} x {n}"));
                }
            }
        }
    }
}
