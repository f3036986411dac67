//! What a quantized weight is stored as: packed, or at 16 bits.

use super::rows::{ROWS_PER_TASK, check_finite};
use super::{LayerStats, Note, Quantized, proxy_loss};
use crate::QuantError;
use rayon::prelude::*;
use std::sync::Arc;
use tailorq_kernels::Device;
use tailorq_tensor::{DType, DenseRows, Matrix, PackedMatrix, ReadRows, SharedBytes, Weight};

/// The largest finite f16.
const LARGEST_F16: f32 = 65504.0;

/// The matrix that takes the place of a layer's weight.
#[derive(Clone, Debug)]
pub enum QuantizedWeight {
    /// Codes and grids.
    Packed(Box<PackedMatrix>),
    /// Values at 16 bits: a layer that a plan leaves alone, or the values of a method whose own format is not stored.
    Dense(DenseRows),
}

impl QuantizedWeight {
    /// `values` at 16 bits: bfloat16 where that is exact for all of them (the checkpoint was), else half precision, rounded
    /// to nearest even.
    ///
    /// # Errors
    /// [`QuantError::NonFiniteWeight`]; [`QuantError::HalfOverflow`] of a value that half precision cannot hold.
    pub fn half(values: &Matrix) -> Result<Self, QuantError> {
        check_finite(values, 0, values.rows())?;
        let is_exact = values.data().iter().all(|w| w.to_bits() & 0xffff == 0);
        // What is not beyond the last f16 by more than half a step is rounded to it.
        if let Some(at) = values.data().iter().position(|w| !is_exact && half::f16::from_f32(*w).is_infinite()) {
            let (row, col) = (at / values.cols(), at % values.cols());
            return Err(QuantError::HalfOverflow { row, col, value: values.data()[at], largest: LARGEST_F16 });
        }
        let dtype = if is_exact { DType::BF16 } else { DType::F16 };
        let bytes = SharedBytes::from_vec(dtype.encode(values.data()));
        let dense = DenseRows::new(values.rows(), values.cols(), dtype, bytes);
        Ok(QuantizedWeight::Dense(dense.expect("there are as many elements as values")))
    }

    /// The rows, whatever the storage.
    pub fn reader(&self) -> &dyn ReadRows {
        match self {
            QuantizedWeight::Packed(m) => m.as_ref(),
            QuantizedWeight::Dense(m) => m,
        }
    }

    /// Codes and grids, where there are any.
    pub fn packed(&self) -> Option<&PackedMatrix> {
        match self {
            QuantizedWeight::Packed(m) => Some(m),
            QuantizedWeight::Dense(_) => None,
        }
    }

    /// The values as f32.
    pub fn to_matrix(&self) -> Matrix {
        let reader = self.reader();
        let mut values = Matrix::zeros(reader.rows(), reader.cols());
        reader.read_rows(0, values.data_mut());
        values
    }
}

impl From<PackedMatrix> for QuantizedWeight {
    fn from(matrix: PackedMatrix) -> Self {
        QuantizedWeight::Packed(Box::new(matrix))
    }
}

impl From<QuantizedWeight> for Weight {
    fn from(weight: QuantizedWeight) -> Self {
        match weight {
            QuantizedWeight::Packed(m) => (*m).into(),
            QuantizedWeight::Dense(m) => Weight::Stored(Arc::new(m)),
        }
    }
}

/// `values` at 16 bits in place of `weights`, with everything measured on what is stored. `counted_bits` is
/// [`Quantized::counted_bits`].
pub(super) fn stored_at_half(
    device: &dyn Device,
    weights: &Matrix,
    values: &Matrix,
    stats: &LayerStats<'_>,
    (notes, counted_bits): (Vec<Note>, Option<u64>),
) -> Result<Quantized, QuantError> {
    let weight = QuantizedWeight::half(values)?;
    let proxy_loss = stats.hessian.map(|h| proxy_loss(device, weights, weight.reader(), h, stats.n_tokens));
    let relative_error = relative_error(weights, weight.reader());
    Ok(Quantized { weight, proxy_loss, relative_error, notes, counted_bits })
}

/// `|W - Q|_F / |W|_F`; 0 for a matrix of zeros.
pub(super) fn relative_error(weights: &Matrix, quantized: &dyn ReadRows) -> f64 {
    let cols = weights.cols();
    let parts: Vec<(f64, f64)> = weights
        .data()
        .par_chunks((ROWS_PER_TASK * cols).max(1))
        .enumerate()
        .map(|(task, w)| {
            let mut q = vec![0.0; w.len()];
            quantized.read_rows(task * ROWS_PER_TASK, &mut q);
            w.iter().zip(&q).fold((0.0, 0.0), |(energy, error), (&w, &q)| {
                let (w, q) = (f64::from(w), f64::from(q));
                (energy + w * w, error + (w - q) * (w - q))
            })
        })
        .collect();
    let (energy, error) = parts.iter().fold((0.0, 0.0), |(a, b), (c, d)| (a + c, b + d));
    if energy > 0.0 { (error / energy).sqrt() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brain_floats_stay_exact_and_others_become_half() {
        let exact = Matrix::from_vec(1, 3, vec![1.0, -0.5, (1u128 << 100) as f32]);
        let QuantizedWeight::Dense(rows) = QuantizedWeight::half(&exact).unwrap() else { panic!() };
        assert_eq!((rows.dtype(), rows.bytes()), (DType::BF16, 6));
        let rounded = Matrix::from_vec(2, 2, vec![0.1, 65519.0, 0.0, 1e-9]);
        let stored = QuantizedWeight::half(&rounded).unwrap();
        assert_eq!(stored.reader().encoding(), "F16");
        assert_eq!(stored.to_matrix().data(), [half::f16::from_f32(0.1).to_f32(), 65504.0, 0.0, 0.0]);
        let beyond = Matrix::from_vec(2, 2, vec![0.1, 1.0, 0.0, -65520.0]);
        assert!(matches!(QuantizedWeight::half(&beyond), Err(QuantError::HalfOverflow { row: 1, col: 1, .. })));
        let bad = Matrix::from_vec(1, 2, vec![0.1, f32::NAN]);
        assert!(matches!(QuantizedWeight::half(&bad), Err(QuantError::NonFiniteWeight { row: 0, col: 1, .. })));
    }
}
