//! The matrix entropy of a set of vectors: in how many directions they spread.

use faer::Par;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{self, ComputeEigenvectors};
use faer::{Mat, MatRef};
use rayon::prelude::*;
use tailorq_tensor::Matrix;

/// Inside the logarithm, as in the TAQ authors' script.
const FLOOR: f64 = 1e-12;

/// `-sum p_i ln(p_i + 1e-12)`, where `p` are the eigenvalues of the covariance of the rows of `vectors` `[r, d]` as shares
/// of their sum. At most `ln(min(r - 1, d))`; 0 for rows that are all the same. `None` when an element is not
/// finite or the eigenvalues cannot be found.
///
/// The non-zero eigenvalues of `Z^T Z` and `Z Z^T` are the same, so the smaller of the two is what is decomposed, in f64.
pub fn matrix_entropy(vectors: &Matrix) -> Option<f64> {
    if vectors.data().iter().any(|x| !x.is_finite()) {
        return None;
    }
    let centred = centred(vectors);
    let values: Vec<f64> = eigenvalues(&gram(&centred))?.into_iter().map(|x| x.max(0.0)).collect();
    let total: f64 = values.iter().sum();
    if total <= 0.0 {
        return Some(0.0);
    }
    Some(values.iter().map(|x| x / total).map(|p| -p * (p + FLOOR).ln()).sum())
}

/// Divides every row by its root mean square, so that tokens of massive activations count like any other. Rows of zeros stay.
pub fn normalize_rows(vectors: &mut Matrix) {
    for i in 0..vectors.rows() {
        let row = vectors.row_mut(i);
        let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let size = (squares / row.len() as f64).sqrt();
        if size > 0.0 {
            row.iter_mut().for_each(|x| *x = (f64::from(*x) / size) as f32);
        }
    }
}

/// Vectors whose dot products are wanted: the rows less their mean, or the columns of that, whichever are fewer.
fn centred(vectors: &Matrix) -> Vec<Vec<f64>> {
    let (r, d) = (vectors.rows(), vectors.cols());
    let mut mean = vec![0.0; d];
    for i in 0..r {
        mean.iter_mut().zip(vectors.row(i)).for_each(|(m, &x)| *m += f64::from(x) / r as f64);
    }
    let element = |i: usize, j: usize| f64::from(vectors.row(i)[j]) - mean[j];
    if r <= d {
        (0..r).map(|i| (0..d).map(|j| element(i, j)).collect()).collect()
    } else {
        (0..d).map(|j| (0..r).map(|i| element(i, j)).collect()).collect()
    }
}

/// All dot products. Each row is computed by one thread, so their number does not matter.
fn gram(vectors: &[Vec<f64>]) -> Mat<f64> {
    let n = vectors.len();
    let dot = |a: &[f64], b: &[f64]| {
        // Eight partial sums, always the same ones, let the compiler use vector registers.
        let mut sums = [0.0; 8];
        let (a, a_rest) = a.as_chunks::<8>();
        let (b, b_rest) = b.as_chunks::<8>();
        for (a, b) in a.iter().zip(b) {
            sums.iter_mut().zip(a.iter().zip(b)).for_each(|(s, (a, b))| *s += a * b);
        }
        let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
        sums.iter().sum::<f64>() + rest
    };
    let rows: Vec<Vec<f64>> =
        (0..n).into_par_iter().map(|i| (0..=i).map(|j| dot(&vectors[i], &vectors[j])).collect()).collect();
    Mat::from_fn(n, n, |i, j| rows[i.max(j)][i.min(j)])
}

/// Of a symmetric matrix, in ascending order.
fn eigenvalues(matrix: &Mat<f64>) -> Option<Vec<f64>> {
    let n = matrix.nrows();
    let mut values = faer::Col::<f64>::zeros(n);
    let request = evd::self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::No, Par::Seq, Default::default());
    let mut buffer = MemBuffer::new(request);
    let matrix: MatRef<'_, f64> = matrix.as_ref();
    let stack = MemStack::new(&mut buffer);
    let diagonal = values.as_mut().as_diagonal_mut();
    evd::self_adjoint_evd(matrix, diagonal, None, Par::Seq, stack, Default::default()).ok()?;
    Some(values.iter().copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_tensor::Rng;

    fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
        let mut rng = Rng::new(seed);
        Matrix::from_vec(rows, cols, (0..rows * cols).map(|_| rng.normal()).collect())
    }

    fn in_pairs(rows: usize, cols: usize, vectors: &[(f32, Vec<f32>)]) -> Matrix {
        let mut m = Matrix::zeros(rows, cols);
        for (i, (size, v)) in vectors.iter().enumerate() {
            // Two rows of opposite signs keep the mean at 0 and give one eigenvalue of 2 size^2 |v|^2.
            for (row, sign) in [(2 * i, 1.0), (2 * i + 1, -1.0)] {
                m.row_mut(row).iter_mut().zip(v).for_each(|(x, v)| *x = sign * size * v);
            }
        }
        m
    }

    /// Orthogonal vectors of sizes 1, 2 and 3: shares of 1, 4 and 9 of 14, on either side of square.
    #[test]
    fn known_spectra_have_known_entropies() {
        let axis = |n: usize, i: usize| (0..n).map(|j| f32::from(u8::from(i == j))).collect::<Vec<_>>();
        let expected: f64 = [1.0, 4.0, 9.0].iter().map(|x| x / 14.0).map(|p: f64| -p * p.ln()).sum();
        for cols in [4, 50] {
            let vectors: Vec<_> = (0..3).map(|i| (i as f32 + 1.0, axis(cols, i))).collect();
            let found = matrix_entropy(&in_pairs(6, cols, &vectors)).unwrap();
            assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        }
    }

    #[test]
    fn neither_side_nor_mean_nor_scale_matters() {
        let m = random(40, 17, 1);
        let entropy = matrix_entropy(&m).unwrap();
        assert!(entropy > 2.0 && entropy < 17f64.ln());
        let moved =
            Matrix::from_vec(40, 17, m.data().iter().enumerate().map(|(i, x)| 4.0 * x + (i % 17) as f32).collect());
        assert!((matrix_entropy(&moved).unwrap() - entropy).abs() < 1e-5);
        // The same rows in a wider space, where the other side is the smaller.
        let mut wide = Matrix::zeros(40, 60);
        (0..40).for_each(|i| wide.row_mut(i)[..17].copy_from_slice(m.row(i)));
        assert!((matrix_entropy(&wide).unwrap() - entropy).abs() < 1e-8);
        assert!(matrix_entropy(&random(20, 4000, 2)).unwrap() > 0.999 * 19f64.ln());
    }

    #[test]
    fn degenerate_sets() {
        assert_eq!(matrix_entropy(&Matrix::from_vec(3, 2, vec![1.0, 2.0, 1.0, 2.0, 1.0, 2.0])), Some(0.0));
        assert_eq!(matrix_entropy(&Matrix::zeros(0, 4)), Some(0.0));
        assert_eq!(matrix_entropy(&Matrix::from_vec(1, 2, vec![1.0, f32::NAN])), None);
        assert_eq!(matrix_entropy(&Matrix::from_vec(1, 2, vec![1.0, f32::INFINITY])), None);
    }

    #[test]
    fn normalized_rows_have_size_one() {
        let mut m = random(5, 8, 3);
        m.row_mut(2).iter_mut().for_each(|x| *x *= 1000.0);
        m.row_mut(4).fill(0.0);
        let before = m.row(2)[3] / m.row(2)[5];
        normalize_rows(&mut m);
        for i in 0..4 {
            let square: f32 = m.row(i).iter().map(|x| x * x).sum::<f32>() / 8.0;
            assert!((square - 1.0).abs() < 1e-5);
        }
        assert!((m.row(2)[3] / m.row(2)[5] - before).abs() < 1e-5 * before.abs());
        assert_eq!(m.row(4), [0.0; 8]);
    }
}
