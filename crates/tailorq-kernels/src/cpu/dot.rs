//! Dot products and weighted sums of rows, each in a fixed order.

use super::simd::{LANES, Simd, per_isa};

per_isa! {
    /// `sum a b`: sixteen lanes by four accumulators, the tail as if padded with zeros.
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 = dot_body
}

per_isa! {
    /// `out[j] = scale * dot(q, row j of rows)`, where row `j` starts at `j * stride` and is as long as `q`.
    pub(super) fn dot_rows(q: &[f32], rows: &[f32], stride: usize, scale: f32, out: &mut [f32]) = dot_rows_body
}

per_isa! {
    /// `y = scale * sum_j weights[j] * row j of rows`, where row `j` starts at `j * stride` and is as long as `y`.
    pub(super) fn mix_rows(weights: &[f32], rows: &[f32], stride: usize, scale: f32, y: &mut [f32]) = mix_rows_body
}

#[inline(always)]
pub(super) fn dot_body<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot: lengths");
    let (a, a_tail) = a.as_chunks::<LANES>();
    let (b, b_tail) = b.as_chunks::<LANES>();
    let (a_fours, a_rest) = a.as_chunks::<4>();
    let (b_fours, b_rest) = b.as_chunks::<4>();
    let zero = simd.splat(0.0);
    let [mut s0, mut s1, mut s2, mut s3] = [zero; 4];
    for (a, b) in a_fours.iter().zip(b_fours) {
        s0 = simd.mul_add(simd.load(&a[0]), simd.load(&b[0]), s0);
        s1 = simd.mul_add(simd.load(&a[1]), simd.load(&b[1]), s1);
        s2 = simd.mul_add(simd.load(&a[2]), simd.load(&b[2]), s2);
        s3 = simd.mul_add(simd.load(&a[3]), simd.load(&b[3]), s3);
    }
    for (a, b) in a_rest.iter().zip(b_rest) {
        s0 = simd.mul_add(simd.load(a), simd.load(b), s0);
    }
    if !a_tail.is_empty() {
        s1 = simd.mul_add(simd.load_partial(a_tail, 0.0), simd.load_partial(b_tail, 0.0), s1);
    }
    simd.sum(simd.add(simd.add(s0, s1), simd.add(s2, s3)))
}

#[inline(always)]
fn dot_rows_body<S: Simd>(simd: S, q: &[f32], rows: &[f32], stride: usize, scale: f32, out: &mut [f32]) {
    for (j, out) in out.iter_mut().enumerate() {
        *out = scale * dot_body(simd, q, &rows[j * stride..j * stride + q.len()]);
    }
}

#[inline(always)]
fn mix_rows_body<S: Simd>(simd: S, weights: &[f32], rows: &[f32], stride: usize, scale: f32, y: &mut [f32]) {
    let mut at = 0;
    let (fours, rest) = y.as_chunks_mut::<{ 4 * LANES }>();
    for y in fours {
        let mut sums = [simd.splat(0.0); 4];
        for (j, &w) in weights.iter().enumerate() {
            let row = &rows[j * stride + at..j * stride + at + 4 * LANES];
            let (row, _) = row.as_chunks::<LANES>();
            let w = simd.splat(w);
            for (sum, row) in sums.iter_mut().zip(row) {
                *sum = simd.mul_add(w, simd.load(row), *sum);
            }
        }
        let (y, _) = y.as_chunks_mut::<LANES>();
        for (y, sum) in y.iter_mut().zip(sums) {
            simd.store(simd.mul(sum, simd.splat(scale)), y);
        }
        at += 4 * LANES;
    }
    for y in rest.chunks_mut(LANES) {
        let mut sum = simd.splat(0.0);
        for (j, &w) in weights.iter().enumerate() {
            let row = &rows[j * stride + at..j * stride + at + y.len()];
            sum = simd.mul_add(simd.splat(w), simd.load_partial(row, 0.0), sum);
        }
        simd.store_partial(simd.mul(sum, simd.splat(scale)), y);
        at += y.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::Isa;

    #[test]
    fn dots_and_mixes_of_all_lengths() {
        let mut rng = tailorq_tensor::Rng::new(1);
        for n in (0..70).chain([127, 128, 129, 576]) {
            let a: Vec<f32> = (0..n).map(|_| rng.normal()).collect();
            let b: Vec<f32> = (0..n * 3).map(|_| rng.normal()).collect();
            for isa in Isa::available() {
                let mut dots = [f32::NAN; 3];
                dot_rows(isa, &a, &b, n, 2.0, &mut dots);
                let mut mix = vec![f32::NAN; n];
                mix_rows(isa, &[1.0, -2.0, 0.5], &b, n, 2.0, &mut mix);
                for j in 0..3 {
                    let exact: f64 = a.iter().zip(&b[j * n..]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                    assert!((2.0 * exact - f64::from(dots[j])).abs() < 1e-4, "{} dot of {n}", isa.name());
                }
                for (i, &found) in mix.iter().enumerate() {
                    let exact = 2.0 * (b[i] - 2.0 * b[n + i] + 0.5 * b[2 * n + i]);
                    assert!((exact - found).abs() < 1e-5, "{} mix of {n} at {i}", isa.name());
                }
            }
        }
    }
}
