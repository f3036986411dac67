//! Dot products and weighted sums of rows, each in a fixed order.

use super::simd::{LANES, Simd, per_isa};

per_isa! {
    /// `out[t] = dot(row t of x, w)`, rows of `w.len()` elements: sixteen lanes by four accumulators, the tail as if
    /// padded with zeros. The sum of a row does not depend on the other rows.
    pub(super) fn dot_tokens(x: &[f32], w: &[f32], out: &mut [f32]) = dot_tokens_body
}

per_isa! {
    /// `out[j] = scale * dot(q, row j of rows)`, where row `j` starts at `j * stride` and is as long as `q`.
    pub(super) fn dot_rows(q: &[f32], rows: &[f32], stride: usize, scale: f32, out: &mut [f32]) = dot_rows_body
}

per_isa! {
    /// `y = scale * sum_j weights[j] * row j of rows`, where row `j` starts at `j * stride` and is as long as `y`.
    pub(super) fn mix_rows(weights: &[f32], rows: &[f32], stride: usize, scale: f32, y: &mut [f32]) = mix_rows_body
}

/// The dot products of `N` rows with `w`.
#[inline(always)]
fn dots<S: Simd, const N: usize>(simd: S, x: [&[f32]; N], w: &[f32]) -> [f32; N] {
    for x in x {
        assert_eq!(x.len(), w.len(), "dot: lengths");
    }
    let (chunks, tail) = w.as_chunks::<LANES>();
    let (fours, rest) = chunks.as_chunks::<4>();
    let mut sums = [[simd.splat(0.0); 4]; N];
    for (i, four) in fours.iter().enumerate() {
        for (lane, w) in four.iter().enumerate() {
            let w = simd.load(w);
            for t in 0..N {
                let x = &x[t].as_chunks::<LANES>().0[4 * i + lane];
                sums[t][lane] = simd.mul_add(simd.load(x), w, sums[t][lane]);
            }
        }
    }
    for (i, w) in rest.iter().enumerate() {
        let w = simd.load(w);
        for t in 0..N {
            let x = &x[t].as_chunks::<LANES>().0[4 * fours.len() + i];
            sums[t][0] = simd.mul_add(simd.load(x), w, sums[t][0]);
        }
    }
    if !tail.is_empty() {
        let w = simd.load_partial(tail, 0.0);
        for t in 0..N {
            let x = simd.load_partial(x[t].as_chunks::<LANES>().1, 0.0);
            sums[t][1] = simd.mul_add(x, w, sums[t][1]);
        }
    }
    let mut out = [0.0; N];
    for t in 0..N {
        let [s0, s1, s2, s3] = sums[t];
        out[t] = simd.sum(simd.add(simd.add(s0, s1), simd.add(s2, s3)));
    }
    out
}

/// `sum a b` in the order of [`dot_tokens`].
#[inline(always)]
pub(super) fn dot_body<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    dots(simd, [a], b)[0]
}

#[inline(always)]
fn dot_tokens_body<S: Simd>(simd: S, x: &[f32], w: &[f32], out: &mut [f32]) {
    let cols = w.len();
    let row = |t: usize| &x[t * cols..(t + 1) * cols];
    let (fours, rest) = out.as_chunks_mut::<4>();
    for (i, four) in fours.iter_mut().enumerate() {
        *four = dots(simd, [row(4 * i), row(4 * i + 1), row(4 * i + 2), row(4 * i + 3)], w);
    }
    for (i, out) in rest.iter_mut().enumerate() {
        *out = dot_body(simd, row(4 * fours.len() + i), w);
    }
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
                let (mut tokens, five) = ([f32::NAN; 5], [&a, &a, &b[..n], &a, &a].concat());
                dot_tokens(isa, &five, &b[..n], &mut tokens);
                assert_eq!(tokens.map(|t| 2.0 * t)[3..], [dots[0]; 2], "four tokens at once add as one does");
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
