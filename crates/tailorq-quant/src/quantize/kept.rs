//! What is stored for kept elements beside a rotated base: not what the base leaves of each, but what leaves the least error of the
//! row's output.

use crate::simd::{LANES, Simd};
use half::f16;
use tailorq_tensor::Matrix;

/// Rounds of coordinate descent; few rows change anything after the fourth.
const ROUNDS: usize = 16;

/// Kept elements of a row whose part of the Hessian is gathered: 16 MiB.
const MOST_GATHERED: usize = 2048;

/// The corrections `c` at the `kept` columns, in f16, that make `(e - c) (H + added I) (e - c)^T` least, for the errors `e` of one
/// row: coordinate descent, one element after another, from the corrections that leave no error there. No step raises it.
pub(super) fn least_error(hessian: &Matrix, added: f64, kept: &[u32], errors: Vec<f32>) -> Vec<f16> {
    match Simd::detect() {
        // SAFETY: `Simd::detect` has found these instructions.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => unsafe { descend_avx512(hessian, added, kept, errors) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { descend_avx2(hessian, added, kept, errors) },
        Simd::Portable => descend(hessian, added, kept, errors),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn descend_avx512(hessian: &Matrix, added: f64, kept: &[u32], errors: Vec<f32>) -> Vec<f16> {
    descend(hessian, added, kept, errors)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn descend_avx2(hessian: &Matrix, added: f64, kept: &[u32], errors: Vec<f32>) -> Vec<f16> {
    descend(hessian, added, kept, errors)
}

/// Nothing is fused, and sums have as many parts everywhere: all instruction sets give the same bits.
#[inline(always)]
fn descend(hessian: &Matrix, added: f64, kept: &[u32], mut errors: Vec<f32>) -> Vec<f16> {
    let of = |i: usize| (kept[i] as usize, hessian.row(kept[i] as usize));
    let before: Vec<f32> = kept.iter().map(|&c| errors[c as usize]).collect();
    let mut corrections: Vec<f16> = before.iter().map(|e| f16::from_f32(*e)).collect();
    for ((&c, before), correction) in kept.iter().zip(&before).zip(&corrections) {
        errors[c as usize] = before - correction.to_f32();
    }
    // Half the slope along each kept element.
    let slope = |i: usize| -> f64 {
        let (column, row) = of(i);
        dot(row, &errors) + added * f64::from(errors[column])
    };
    let mut slopes: Vec<f64> = (0..kept.len()).map(slope).collect();
    let among = among_kept(hessian, kept);
    for _ in 0..ROUNDS {
        let mut changed = false;
        for i in 0..kept.len() {
            let (column, row) = of(i);
            let curvature = f64::from(row[column]) + added;
            let best = corrections[i].to_f64() + slopes[i] / curvature;
            // The nearest f16 is the best one of a parabola; one that overflows is no better than the old.
            let new = f16::from_f64(best);
            if new == corrections[i] || !new.is_finite() {
                continue;
            }
            let step = corrections[i].to_f64() - new.to_f64();
            corrections[i] = new;
            let own = slopes[i] + step * curvature;
            match among.get(i * kept.len()..(i + 1) * kept.len()) {
                Some(row) => add_times(&mut slopes, step, row),
                None => slopes.iter_mut().zip(kept).for_each(|(slope, &c)| *slope += step * f64::from(row[c as usize])),
            }
            slopes[i] = own;
            changed = true;
        }
        if !changed {
            break;
        }
    }
    corrections
}

/// The Hessian of the kept elements of a row alone, side by side, so that steps read it in order; nothing for very many.
fn among_kept(hessian: &Matrix, kept: &[u32]) -> Vec<f32> {
    if kept.len() > MOST_GATHERED {
        return Vec::new();
    }
    kept.iter().flat_map(|&r| kept.iter().map(move |&c| hessian.row(r as usize)[c as usize])).collect()
}

/// `slopes += step * row`.
#[inline(always)]
fn add_times(slopes: &mut [f64], step: f64, row: &[f32]) {
    for (slope, h) in slopes.iter_mut().zip(row) {
        *slope += step * f64::from(*h);
    }
}

/// The sum of products, in as many partial sums as fill a vector: one alone would wait for itself.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let (wide_a, rest_a) = a.as_chunks::<LANES>();
    let (wide_b, rest_b) = b.as_chunks::<LANES>();
    let mut sums = [0.0f64; LANES];
    for (a, b) in wide_a.iter().zip(wide_b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    let rest: f64 = rest_a.iter().zip(rest_b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_tensor::Rng;

    /// The minimum over the kept elements by hand, and that it is one.
    #[test]
    fn kept_elements_make_the_error_least() {
        let n = 24;
        let mut rng = Rng::new(3);
        let x: Vec<f32> = (0..n * 60).map(|_| rng.normal()).collect();
        let mut h = Matrix::zeros(n, n);
        for (r, c) in (0..n * n).map(|i| (i / n, i % n)) {
            h.row_mut(r)[c] = (0..60).map(|t| x[t * n + r] * x[t * n + c] + x[t * n]).sum();
        }
        for (r, c) in (0..n * n).map(|i| (i / n, i % n)).filter(|(r, c)| r < c) {
            let low = h.row(c)[r];
            h.row_mut(r)[c] = low;
        }
        let errors: Vec<f32> = (0..n).map(|_| 0.1 * rng.normal()).collect();
        let kept = [1u32, 4, 5, 17];
        let loss = |c: &[f32]| -> f64 {
            let mut e = errors.clone();
            kept.iter().zip(c).for_each(|(&k, c)| e[k as usize] -= c);
            let product = |r: usize| -> f64 { h.row(r).iter().zip(&e).map(|(h, e)| f64::from(h * e)).sum() };
            (0..n).map(|r| f64::from(e[r]) * (product(r) + 0.5 * f64::from(e[r]))).sum()
        };
        let found: Vec<f32> = least_error(&h, 0.5, &kept, errors.clone()).iter().map(|c| c.to_f32()).collect();
        let exact: Vec<f32> = kept.iter().map(|&k| errors[k as usize]).collect();
        assert!(loss(&found) < 0.9 * loss(&exact), "{} {}", loss(&found), loss(&exact));
        for i in 0..kept.len() {
            for step in [-1e-3, 1e-3] {
                let mut other = found.clone();
                other[i] += step;
                assert!(loss(&other) > loss(&found), "{i} {step}");
            }
        }
    }

    /// One element after another, as it is written down, at every length around a vector's, gathered or not.
    #[test]
    fn all_instruction_sets_take_the_same_steps() {
        for (n, n_kept) in [(5, 3), (40, 17), (100, 64), (2300, 2100)] {
            let mut rng = Rng::new(n as u64);
            let diagonal = |r: usize, c: usize| if r == c { 40.0 } else { 0.0 };
            let mut h = Matrix::zeros(n, n);
            for (r, c) in (0..n * n).map(|i| (i / n, i % n)).filter(|(r, c)| r >= c) {
                let value = 0.3 * rng.normal() + diagonal(r, c);
                (h.row_mut(r)[c], h.row_mut(c)[r]) = (value, value);
            }
            let errors: Vec<f32> = (0..n).map(|_| 0.1 * rng.normal()).collect();
            let kept: Vec<u32> = (0..n_kept as u32).map(|i| i + u32::from(i > 1)).collect();
            let found = least_error(&h, 0.5, &kept, errors.clone());
            assert_eq!(found, descend(&h, 0.5, &kept, errors));
        }
    }
}
