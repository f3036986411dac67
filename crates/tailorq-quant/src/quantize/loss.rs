//! The loss that calibrated methods minimise, measured after the fact.

use super::rows::ROWS_PER_TASK;
use rayon::prelude::*;
use tailorq_kernels::{Device, Strided, StridedMut};
use tailorq_tensor::{Matrix, ReadRows};

/// Columns of the Hessian in one panel.
const PANEL: usize = 128;

/// `tr(E H E^T) / n_tokens` with `E = W - Q`: the squared error of the layer's output per calibration token, summed over
/// outputs. `weights` and `quantized` are `[out, in]`; of `hessian` `[in, in]` the lower triangle is read.
pub fn proxy_loss(
    device: &dyn Device,
    weights: &Matrix,
    quantized: &dyn ReadRows,
    hessian: &Matrix,
    n_tokens: usize,
) -> f64 {
    let (n_rows, cols) = (weights.rows(), weights.cols());
    assert_eq!((hessian.rows(), hessian.cols()), (cols, cols), "the Hessian belongs to another input");
    let mut errors = Matrix::zeros(n_rows, cols);
    errors.data_mut().par_chunks_mut(cols.max(1)).enumerate().for_each(|(r, row)| {
        quantized.read_rows(r, row);
        for (q, w) in row.iter_mut().zip(weights.row(r)) {
            *q = w - *q;
        }
    });
    if let Some(loss) = device.quadratic_loss(&errors, hessian) {
        return loss / n_tokens.max(1) as f64;
    }
    let loss: f64 = (0..cols).step_by(PANEL).map(|first| panel_loss(device, &errors, hessian, first)).sum();
    loss / n_tokens.max(1) as f64
}

/// The part of the quadratic form in which the smaller of the two column indices lies in the panel at `first`.
fn panel_loss(device: &dyn Device, errors: &Matrix, hessian: &Matrix, first: usize) -> f64 {
    let cols = hessian.cols();
    let width = PANEL.min(cols - first);
    // x^T H x = 2 x^T (L + D / 2) x with the strict lower triangle L and the diagonal D.
    let mut panel = vec![0.0f32; (cols - first) * width];
    for (i, row) in panel.chunks_exact_mut(width).enumerate() {
        let n = width.min(i + 1);
        row[..n].copy_from_slice(&hessian.row(first + i)[first..first + n]);
        if i < width {
            row[i] *= 0.5;
        }
    }
    let panel = Strided { data: &panel, rows: cols - first, cols: width, stride: width };
    let parts: Vec<f64> = errors
        .data()
        .par_chunks(ROWS_PER_TASK * cols)
        .map(|rows| {
            let n = rows.len() / cols;
            let mut product = vec![0.0f32; n * width];
            let a = Strided { data: &rows[first..], rows: n, cols: cols - first, stride: cols };
            let c = StridedMut { data: &mut product, rows: n, cols: width, stride: width };
            device.matmul_sequential(1.0, a, panel, 0.0, c);
            let pairs = product.chunks_exact(width).zip(rows.chunks_exact(cols));
            pairs.map(|(p, e)| dot(p, &e[first..first + width])).sum::<f64>()
        })
        .collect();
    2.0 * parts.iter().sum::<f64>()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
