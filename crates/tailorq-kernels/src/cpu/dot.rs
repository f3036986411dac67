//! Dot products of rows, each in a fixed order.

use super::simd::{LANES, Simd, per_isa};
use half::f16;

per_isa! {
    /// `out[t] = dot(row t of x, w)`, rows of `w.len()` elements: sixteen lanes by four accumulators, the tail as if
    /// padded with zeros. The sum of a row does not depend on the other rows.
    pub(super) fn dot_tokens(x: &[f32], w: &[f32], out: &mut [f32]) = dot_tokens_body
}

/// Elements in which rows are stored.
pub(super) trait Stored: Copy {
    /// What fills a vector behind the end of a row.
    const ZERO: Self;

    /// Sixteen of them as f32.
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::F;

    /// The first lanes of a short slice, 0 in the others.
    #[inline(always)]
    fn load_partial<S: Simd>(simd: S, from: &[Self]) -> S::F {
        let mut lanes = [Self::ZERO; LANES];
        lanes[..from.len()].copy_from_slice(from);
        Self::load(simd, &lanes)
    }
}

impl Stored for f32 {
    const ZERO: Self = 0.0;

    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::F {
        simd.load(from)
    }
}

impl Stored for f16 {
    const ZERO: Self = f16::ZERO;

    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::F {
        simd.load_f16(from)
    }
}

impl Stored for i8 {
    const ZERO: Self = 0;

    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::F {
        simd.load_i8(from)
    }
}

/// The dot products of `N` rows with `w`.
#[inline(always)]
pub(super) fn dots<S: Simd, T: Stored, const N: usize>(simd: S, x: [&[f32]; N], w: &[T]) -> [f32; N] {
    for x in x {
        assert_eq!(x.len(), w.len(), "dot: lengths");
    }
    let (chunks, tail) = w.as_chunks::<LANES>();
    let (fours, rest) = chunks.as_chunks::<4>();
    let mut sums = [[simd.splat(0.0); 4]; N];
    for (i, four) in fours.iter().enumerate() {
        for (lane, w) in four.iter().enumerate() {
            let w = T::load(simd, w);
            for t in 0..N {
                let x = &x[t].as_chunks::<LANES>().0[4 * i + lane];
                sums[t][lane] = simd.mul_add(simd.load(x), w, sums[t][lane]);
            }
        }
    }
    for (i, w) in rest.iter().enumerate() {
        let w = T::load(simd, w);
        for t in 0..N {
            let x = &x[t].as_chunks::<LANES>().0[4 * fours.len() + i];
            sums[t][0] = simd.mul_add(simd.load(x), w, sums[t][0]);
        }
    }
    if !tail.is_empty() {
        let w = T::load_partial(simd, tail);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::Isa;

    #[test]
    fn dots_of_all_lengths() {
        let mut rng = tailorq_tensor::Rng::new(1);
        for n in (0..70).chain([127, 128, 129, 576]) {
            let a: Vec<f32> = (0..n).map(|_| rng.normal()).collect();
            let b: Vec<f32> = (0..n).map(|_| rng.normal()).collect();
            for isa in Isa::available() {
                let (mut tokens, five) = ([f32::NAN; 5], [&a[..], &a, &b, &a, &a].concat());
                dot_tokens(isa, &five, &b, &mut tokens);
                assert_eq!(tokens[3], tokens[4], "four tokens at once add as one does");
                let exact: f64 = a.iter().zip(&b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                assert!((exact - f64::from(tokens[0])).abs() < 1e-4, "{} dot of {n}", isa.name());
            }
        }
    }
}
