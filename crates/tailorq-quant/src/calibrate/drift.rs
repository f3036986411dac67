//! What quantized predecessors did to a layer's inputs, and weights that make up for it.
//!
//! GPTQ asks for `Q x` close to `W x` on the inputs `x` that the quantized model gives, which are not those `y` that the
//! weights were made for. What should be close is `Q x` and `W y` (GPTAQ, Li et al. 2025, arXiv 2504.02692; Qronos, Zhang et
//! al. 2025, arXiv 2505.11695). Without rounding the best weights for that are `W* = W + W D (H + a I)^-1` with
//! `D = sum (y - x) x^T` and `H = sum x x^T`, ridge regression towards `W`; they are quantized in the place of `W`. A layer
//! that writes to the residual stream can make up for the stream's own drift `s - r` as well: `sum (s - r) x^T` joins `W D`.

use super::tokens::{TokenWeight, token_weights};
use std::ops::Range;
use tailorq_kernels::{Device, GradientSums};
use tailorq_tensor::{Matrix, Weight};

/// How much of the drift weights make up for, each from 0 (nothing) to 1 (all that the regression finds).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DriftCorrection {
    /// Of the drift of a layer's own inputs.
    pub inputs: f64,
    /// Of the drift of the residual stream, in layers that write to it.
    pub residual: f64,
}

impl DriftCorrection {
    /// Whether anything is made up for.
    pub fn is_on(self) -> bool {
        self.inputs > 0.0 || self.residual > 0.0
    }
}

/// The sums over tokens for one Hessian.
#[derive(Clone, Debug)]
pub(super) struct DriftSums {
    /// `sum x (y - x)^T`, `[in, in]`: the transpose of `D`.
    inputs: Matrix,
    /// `sum (s - r) x^T`, `[hidden, in]`.
    residual: Option<Matrix>,
}

/// What one micro-batch adds.
pub(super) struct Drift<'a> {
    /// The inputs with quantized predecessors, `[tokens, in]`.
    pub(super) quantized: &'a Matrix,
    /// Those of the original model.
    pub(super) original: &'a Matrix,
    /// The residual streams (quantized, original) before the layer writes to it, for layers that do.
    pub(super) streams: Option<(&'a Matrix, &'a Matrix)>,
}

impl DriftSums {
    /// Nothing yet, for `width` inputs; `hidden` is the width of the stream for layers that write to it.
    pub(super) fn new(width: usize, hidden: Option<usize>) -> Self {
        DriftSums { inputs: Matrix::zeros(width, width), residual: hidden.map(|h| Matrix::zeros(h, width)) }
    }

    /// Takes in some tokens, weighed as those of the Hessian.
    pub(super) fn add(
        &mut self,
        device: &dyn Device,
        drift: &Drift<'_>,
        (kind, energies, spans): (TokenWeight, Option<&[f32]>, &[Range<usize>]),
    ) {
        let weights = token_weights(device, kind, drift.quantized, energies, spans);
        let moved = |from: &Matrix, to: &Matrix| {
            let mut difference = to.clone();
            for (t, &weight) in weights.iter().enumerate() {
                let pairs = difference.row_mut(t).iter_mut().zip(from.row(t));
                pairs.for_each(|(to, from)| *to = (*to - from) * weight);
            }
            difference
        };
        let whole = 0..drift.quantized.rows();
        let all = std::slice::from_ref(&whole);
        let sum = |a: &Matrix, b: &Matrix, into: &mut Matrix| {
            let sums = GradientSums { sum: Some(into), ..GradientSums::default() };
            device.weight_gradients_matrix(a, b, all, sums);
        };
        sum(drift.quantized, &moved(drift.quantized, drift.original), &mut self.inputs);
        if let (Some((quantized, original)), Some(residual)) = (drift.streams, &mut self.residual) {
            sum(&moved(quantized, original), drift.quantized, residual);
        }
    }

    /// Takes in what a peer of `device` has summed of other tokens.
    pub(super) fn merge(&mut self, device: &dyn Device, other: &DriftSums) {
        device.add_from_peer(&other.inputs, &mut self.inputs);
        if let (Some(residual), Some(other)) = (&mut self.residual, &other.residual) {
            device.add_from_peer(other, residual);
        }
    }

    /// The weights to quantize in the place of `weights` `[out, in]`, given the lower triangle of the Hessian; `None` when
    /// it cannot be factored with this damping, a share of its mean diagonal.
    pub(super) fn targets(
        &self,
        device: &dyn Device,
        weights: &Matrix,
        hessian: &Matrix,
        (correction, damping): (DriftCorrection, f64),
    ) -> Option<Matrix> {
        let (rows, cols) = (weights.rows(), weights.cols());
        let mut pull = vec![0.0f32; rows * cols];
        device.linear(weights.data(), &Weight::from(self.inputs.clone()), None, &mut pull);
        pull.iter_mut().for_each(|p| *p *= correction.inputs as f32);
        if let Some(residual) = self.residual.as_ref().filter(|r| r.rows() == rows) {
            let factor = correction.residual as f32;
            pull.iter_mut().zip(residual.data()).for_each(|(p, r)| *p += factor * r);
        }
        // H^-1 = U^T U, so the pull goes through both factors.
        let upper = Weight::from(inverse_factor(device, hessian, damping)?);
        let mut half = vec![0.0f32; rows * cols];
        device.linear(&pull, &upper, None, &mut half);
        let mut targets = weights.clone();
        device.linear_backward(&half, &upper, targets.data_mut());
        targets.data().iter().all(|w| w.is_finite()).then_some(targets)
    }
}

/// `U` with `(H + a I)^-1 = U^T U`. Inputs that were never active get the mean diagonal, and nothing pulls at them.
fn inverse_factor(device: &dyn Device, hessian: &Matrix, damping: f64) -> Option<Matrix> {
    let cols = hessian.cols();
    let diagonal = (0..cols).map(|i| f64::from(hessian.row(i)[i]));
    let n_active = diagonal.clone().filter(|d| *d > 0.0).count();
    let mean = if n_active > 0 { diagonal.sum::<f64>() / n_active as f64 } else { 1.0 };
    let mut damped = hessian.clone();
    for i in 0..cols {
        let place = &mut damped.row_mut(i)[i];
        let diagonal = if *place == 0.0 { mean } else { f64::from(*place) };
        *place = (diagonal + damping * mean) as f32;
    }
    device.inverse_cholesky_upper(&mut damped).ok()?;
    Some(damped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_tensor::Rng;

    fn normal(rows: usize, cols: usize, rng: &mut Rng) -> Matrix {
        Matrix::from_vec(rows, cols, (0..rows * cols).map(|_| rng.normal()).collect())
    }

    /// `a b^T`.
    fn product(a: &Matrix, b: &Matrix) -> Matrix {
        let dot = |r: usize, c: usize| a.row(r).iter().zip(b.row(c)).map(|(x, y)| x * y).sum::<f32>();
        Matrix::from_vec(
            a.rows(),
            b.rows(),
            (0..a.rows() * b.rows()).map(|i| dot(i / b.rows(), i % b.rows())).collect(),
        )
    }

    /// Inputs that were mixed linearly are unmixed, and a stream that drifted linearly is brought back.
    #[test]
    fn linear_drift_is_undone() {
        let device = tailorq_kernels::cpu();
        let mut rng = Rng::new(1);
        let (tokens, cols, rows) = (400, 24, 10);
        let (original, w) = (normal(tokens, cols, &mut rng), normal(rows, cols, &mut rng));
        let mut mixing = normal(cols, cols, &mut rng);
        for i in 0..cols {
            mixing.row_mut(i).iter_mut().for_each(|m| *m *= 0.05);
            mixing.row_mut(i)[i] += 1.0;
        }
        let quantized = product(&original, &mixing);
        let lost = normal(rows, cols, &mut rng);
        let stream = normal(tokens, rows, &mut rng);
        let mut drifted = stream.clone();
        let loss = product(&quantized, &lost);
        drifted.data_mut().iter_mut().zip(loss.data()).for_each(|(s, l)| *s -= l);
        let mut hessian = Matrix::zeros(cols, cols);
        device.gram(quantized.data(), &mut hessian);
        let mut sums = DriftSums::new(cols, Some(rows));
        let both = DriftCorrection { inputs: 1.0, residual: 1.0 };
        for (kind, spans) in [
            (TokenWeight::Uniform, vec![0..3, 3..tokens]),
            (TokenWeight::InverseNorm, vec![0..7, 7..tokens]),
            (TokenWeight::WithoutFirst, vec![0..7, 7..tokens]),
            (TokenWeight::Uniform, vec![0..tokens / 2, tokens / 2..tokens]),
        ] {
            let mut hessian = Matrix::zeros(cols, cols);
            super::super::tokens::add_hessian(device.as_ref(), (&quantized, None), (kind, false, &spans), &mut hessian);
            sums = DriftSums::new(cols, Some(rows));
            let drift = Drift { quantized: &quantized, original: &original, streams: Some((&drifted, &stream)) };
            sums.add(device.as_ref(), &drift, (kind, None, &spans));
            let targets = sums.targets(device.as_ref(), &w, &hessian, (both, 1e-6)).unwrap();
            // drifted + targets x = stream + W y
            let (found, wanted) = (product(&quantized, &targets), product(&original, &w));
            for i in 0..tokens * rows {
                let (a, b) = (drifted.data()[i] + found.data()[i], stream.data()[i] + wanted.data()[i]);
                assert!((a - b).abs() < 2e-3, "{}: {a} {b}", kind.name());
            }
        }
        let off = sums.targets(device.as_ref(), &w, &hessian, (DriftCorrection::default(), 1e-6)).unwrap();
        assert_eq!(off.data(), w.data());
        let stiff = sums.targets(device.as_ref(), &w, &hessian, (both, 1e6)).unwrap();
        let moved = stiff.data().iter().zip(w.data()).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(moved < 1e-4, "a stiff ridge keeps the weights: {moved}");
    }
}
