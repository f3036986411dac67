//! What is fitted to a memory: matrices that are put away and come back, weights in several types, Hessians of rounded inputs.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may stop where it stands, and says when it is skipped"
)]

use std::ops::ControlFlow;
use std::sync::Arc;
use tailorq_cuda::{CudaOptions, Precision};
use tailorq_kernels::{Device, GradientSums};
use tailorq_model::testing::TinyModel;
use tailorq_quant::survey::{Loss, Needs, Survey, SurveySample};
use tailorq_tensor::{DType, DenseRows, Matrix, Rng, SharedBytes, Weight};

/// The device, unless there is none.
fn cuda(options: CudaOptions) -> Option<Arc<dyn Device>> {
    match tailorq_cuda::open(0, options) {
        Ok(device) => Some(device),
        Err(error) if error.is_absence() => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn normal(rng: &mut Rng, rows: usize, cols: usize) -> Matrix {
    Matrix::from_vec(rows, cols, (0..rows * cols).map(|_| rng.normal()).collect())
}

#[test]
fn what_is_put_away_comes_back_in_half_precision() {
    let Some(device) = cuda(CudaOptions::default()) else { return };
    let (resident, mut rng) = (device.resident().unwrap(), Rng::new(1));
    // More matrices than buffers, some in several pieces, one row longer than the others' sum of sizes.
    let shapes = [(1, 1), (3, 7), (2048, 4096), (5000, 4099), (1, 1 << 20), (0, 5), (300, 4096), (2048, 4096), (9, 9)];
    let mut matrices: Vec<Matrix> = shapes.iter().map(|&(r, c)| normal(&mut rng, r, c)).collect();
    for m in &mut matrices {
        for r in 0..m.rows() {
            // Rows of all sizes.
            let factor = 2.0f32.powi((r as i32 * 37) % 150 - 75);
            m.row_mut(r).iter_mut().for_each(|v| *v *= factor);
        }
    }
    matrices[1].row_mut(1).fill(0.0);
    let away: Vec<_> = matrices.iter().map(|m| resident.put_away(m).unwrap()).collect();
    for (m, away) in matrices.iter().zip(&away).rev() {
        let back = away.bring_back();
        assert_eq!((back.rows(), back.cols()), (m.rows(), m.cols()));
        for r in 0..m.rows() {
            let largest = m.row(r).iter().fold(0.0f32, |l, v| l.max(v.abs()));
            for (found, expected) in back.row(r).iter().zip(m.row(r)) {
                let bound = (expected.abs() * 2.0f32.powi(-11)).max(largest * 2.0f32.powi(-38));
                assert!((found - expected).abs() <= bound, "{found} for {expected} in a row up to {largest}");
            }
        }
    }
    let strange = Matrix::from_vec(1, 4, vec![1.0, f32::INFINITY, f32::NAN, -2.0]);
    let back = resident.put_away(&strange).unwrap().bring_back();
    assert_eq!((back.data()[0], back.data()[1], back.data()[3]), (1.0, f32::INFINITY, -2.0));
    assert!(back.data()[2].is_nan() && !device.is_finite(&back) && device.is_finite(&matrices[2]));
    let Some(narrow) = cuda(CudaOptions { host_memory: Some(1000), ..CudaOptions::default() }) else { return };
    let resident = narrow.resident().unwrap();
    let first = resident.put_away(&matrices[8]);
    assert!(first.is_some() && resident.put_away(&matrices[6]).is_none(), "no more than was allowed");
}

#[test]
fn weights_arrive_as_they_are_stored() {
    for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
        let Some(device) = cuda(CudaOptions { precision, ..CudaOptions::default() }) else { return };
        let mut rng = Rng::new(2);
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let values = normal(&mut rng, 700, 901);
            let bytes = SharedBytes::from_vec(dtype.encode(values.data()));
            let weight = Weight::Stored(Arc::new(DenseRows::new(700, 901, dtype, bytes).unwrap()));
            assert_eq!(device.dense_matrix(&weight), weight.to_matrix(), "{precision} {dtype}");
            let encoded = device.encode_bf16(&values);
            assert_eq!(encoded, DType::BF16.encode(values.data()));
        }
    }
}

/// With bf16 products of the backward pass are coarser than those of the forward pass, which are as with tf32.
#[test]
fn bf16_rounds_the_backward_pass() {
    let options = CudaOptions { precision: Precision::Bf16, ..CudaOptions::default() };
    let Some(device) = cuda(options) else { return };
    let mut rng = Rng::new(11);
    let (x, w, dy) = (normal(&mut rng, 50, 600), normal(&mut rng, 500, 600), normal(&mut rng, 50, 500));
    // Of `a b`, by rows and columns.
    let off = |found: &Matrix, a: &dyn Fn(usize, usize) -> f32, b: &dyn Fn(usize, usize) -> f32, n: usize| {
        let (mut error, mut size) = (0.0, 0.0);
        for (r, c) in (0..found.len()).map(|i| (i / found.cols(), i % found.cols())) {
            let exact: f64 = (0..n).map(|k| f64::from(a(r, k)) * f64::from(b(k, c))).sum();
            error += (f64::from(found.row(r)[c]) - exact).powi(2);
            size += exact.powi(2);
        }
        (error / size).sqrt()
    };
    let weight = Weight::from(w.clone());
    let forward = off(&device.linear_matrix(&x, &weight, None, 0..500), &|r, k| x.row(r)[k], &|k, c| w.row(c)[k], 600);
    let mut dx = Matrix::zeros(50, 600);
    device.linear_backward_matrix(&dy, &weight, 0..500, &mut dx);
    let backward = off(&dx, &|r, k| dy.row(r)[k], &|k, c| w.row(k)[c], 500);
    let mut sum = Matrix::zeros(500, 600);
    let sums = GradientSums { sum: Some(&mut sum), ..GradientSums::default() };
    let all = 0..50;
    device.weight_gradients_matrix(&dy, &x, std::slice::from_ref(&all), sums);
    let gradient = off(&sum, &|r, k| dy.row(k)[r], &|k, c| x.row(k)[c], 50);
    assert!(forward < 1.2e-3, "{forward}");
    for found in [backward, gradient] {
        assert!(forward < found && found < 5e-3, "{found}, forward {forward}");
    }
}

/// Hessians of more inputs than tokens are singular: with the usual damping they have a factor at every precision.
#[test]
fn hessians_of_rounded_inputs_are_definite() {
    let mut rng = Rng::new(3);
    let (n, cols) = (900, 2500);
    let mut x = normal(&mut rng, n, cols);
    (0..n).for_each(|t| x.row_mut(t)[17] *= 300.0);
    let expected =
        |i: usize, j: usize| -> f64 { (0..n).map(|t| f64::from(x.row(t)[i]) * f64::from(x.row(t)[j])).sum() };
    for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
        let Some(device) = cuda(CudaOptions { precision, ..CudaOptions::default() }) else { return };
        let mut h = Matrix::zeros(cols, cols);
        device.gram_matrix(&x, &mut h);
        device.gram_matrix(&x, &mut h);
        let bound = if precision == Precision::F32 { 1e-5 } else { 1e-3 };
        for (i, j) in [(0, 0), (17, 17), (17, 3), (2499, 17), (2499, 2499), (2100, 2050), (2047, 0), (2048, 2047)] {
            let size = (expected(i, i) * expected(j, j)).sqrt();
            let off = f64::from(h.row(i)[j]) - 2.0 * expected(i, j);
            assert!(off.abs() <= 2.0 * bound * size, "{precision}: {i}, {j} off by {off}");
            assert!(i == j || h.row(j)[i] == 0.0, "{precision}: the upper triangle is kept");
        }
        let mean = (0..cols).map(|i| f64::from(h.row(i)[i])).sum::<f64>() / cols as f64;
        (0..cols).for_each(|i| h.row_mut(i)[i] += (0.01 * mean) as f32);
        assert_eq!(device.inverse_cholesky_upper(&mut h), Ok(()), "{precision}");
    }
}

/// A survey whose streams find no room on the device, nor most of them beside it, says the same.
#[test]
fn surveys_in_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    TinyModel::new("llama", 7).unwrap().write_directory(dir.path()).unwrap();
    let model = tailorq_model::open(dir.path().to_str().unwrap()).unwrap().model;
    let mut rng = Rng::new(6);
    let ids = |rng: &mut Rng| (0..700).map(|_| rng.below(256) as u32).collect();
    let samples: Vec<_> = (0..12).map(|_| SurveySample { ids: ids(&mut rng), scored: None }).collect();
    let needs = Needs { absolute: true, ..Needs::default() };
    let run = |device: &dyn Device, tape_bytes: usize| -> (f64, Vec<f32>) {
        let survey = Survey { device, model: &model, loss: Loss::CrossEntropy, needs: &needs, tape_bytes };
        let mut all = Vec::new();
        let summary = survey.run(&samples, None, &mut |stats| {
            stats.layers.iter().for_each(|l| all.extend_from_slice(l.absolute.as_ref().unwrap().data()));
            Ok(ControlFlow::Continue(()))
        });
        (summary.unwrap().mean_loss.unwrap(), all)
    };
    let Some(device) = cuda(CudaOptions { memory: Some(2 << 30), ..CudaOptions::default() }) else { return };
    let (expected_loss, expected) = run(&*device, usize::MAX);
    // Streams of 12 samples are 6 batches of 358 KB.
    for tape_bytes in [0, 500_000, 3_000_000] {
        let (loss, found) = run(&*device, tape_bytes);
        assert!((loss - expected_loss).abs() < 1e-5 * expected_loss, "{loss}, {expected_loss}");
        let norm = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let off: Vec<f32> = found.iter().zip(&expected).map(|(f, e)| f - e).collect();
        assert!(norm(&off) < 1e-3 * norm(&expected), "{tape_bytes}: {} of {}", norm(&off), norm(&expected));
    }
}
