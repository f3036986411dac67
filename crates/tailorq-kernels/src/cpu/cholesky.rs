//! The upper triangular factor of an inverse, `H^-1 = U^T U`, without the inverse.
//!
//! With `J` the reversal of the order of rows, `J H J = L L^T` gives `H = R R^T` for the upper triangular `R = J L J`, and
//! so `U = R^-1 = J L^-1 J`: one Cholesky factorization and one triangular inverse.

use crate::NotPositiveDefinite;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{self, LltError};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{MatMut, Par};
use tailorq_tensor::Matrix;

pub(super) fn inverse_cholesky_upper(h: &mut Matrix) -> Result<(), NotPositiveDefinite> {
    let n = h.cols();
    assert_eq!(h.rows(), n, "inverse_cholesky_upper: H is square");
    // Element (a, b) of J H J, a >= b, is the mirror image of (n-1-b, n-1-a), which the lower triangle holds at
    // (n-1-b) n + (n-1-a): the elements in reverse order are J H J column by column.
    h.data_mut().reverse();
    let mut l = MatMut::from_column_major_slice_mut(h.data_mut(), n, n);
    let mut memory = MemBuffer::new(factor::cholesky_in_place_scratch::<f32>(n, Par::Seq, Default::default()));
    let stack = MemStack::new(&mut memory);
    factor::cholesky_in_place(l.as_mut(), Default::default(), Par::Seq, stack, Default::default())
        .map_err(|LltError::NonPositivePivot { index }| NotPositiveDefinite { pivot: index })?;
    let mut inverse = vec![0.0; n * n];
    let into = MatMut::from_column_major_slice_mut(&mut inverse, n, n);
    invert_lower_triangular(into, l.as_ref(), Par::Seq);
    for (i, row) in h.data_mut().chunks_exact_mut(n.max(1)).enumerate() {
        row[..i].fill(0.0);
        for (j, u) in row.iter_mut().enumerate().skip(i) {
            *u = inverse[(n - 1 - j) * n + (n - 1 - i)];
        }
    }
    Ok(())
}
