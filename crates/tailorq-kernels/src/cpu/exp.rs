//! The exponential on lanes, and what is made of it: softmax and the gated unit.

use super::simd::{LANES, Simd, per_isa};

per_isa! {
    /// Replaces scores by `exp(score - largest)` and returns their sum; the caller divides by it once, at the end.
    pub(super) fn softmax_unscaled(row: &mut [f32]) -> f32 = softmax_body
}

per_isa! {
    /// `gate = gate / (1 + exp(-gate)) * up`.
    pub(super) fn swiglu(gate: &mut [f32], up: &[f32]) = swiglu_body
}

/// `exp(x)` to 2 ulp where the result is a normal number; gradual underflow to 0, overflow to infinity, NaN stays NaN.
///
/// Reduction by `n = round(x / ln 2)` with ln 2 in two parts, then the polynomial of Cephes' `expf` (Moshier).
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: S::F) -> S::F {
    let c = |value| simd.splat(value);
    // Outside these bounds the result is 0 or infinity anyway; within them the powers of two below exist.
    let x = simd.max(c(-104.0), simd.min(c(89.0), x));
    let n = round(simd, simd.mul(x, c(std::f32::consts::LOG2_E)));
    let r = simd.mul_add(n, c(-0.693_359_4), x);
    let r = simd.mul_add(n, c(2.121_944_4e-4), r);
    let mut p = c(1.987_569_1e-4);
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = simd.mul_add(p, r, c(coefficient));
    }
    let p = simd.add(simd.mul_add(simd.mul(r, r), p, r), c(1.0));
    // 2^n in two factors: n reaches 128, and -150 on the way to a subnormal result.
    let half = round(simd, simd.mul(n, c(0.5)));
    let rest = simd.sub(n, half);
    simd.mul(simd.mul(p, simd.exp2_integer(half)), simd.exp2_integer(rest))
}

/// The nearest integer for `|x| < 2^22`: adding and taking away 1.5 * 2^23 leaves no bits after the point.
#[inline(always)]
fn round<S: Simd>(simd: S, x: S::F) -> S::F {
    let magic = simd.splat(12_582_912.0);
    simd.sub(simd.add(x, magic), magic)
}

#[inline(always)]
fn softmax_body<S: Simd>(simd: S, row: &mut [f32]) -> f32 {
    let (chunks, tail) = row.as_chunks_mut::<LANES>();
    let mut max = simd.load_partial(tail, f32::NEG_INFINITY);
    for chunk in chunks.iter() {
        max = simd.max(simd.load(chunk), max);
    }
    let max = simd.splat(simd.largest(max));
    let mut sum = simd.splat(0.0);
    for chunk in chunks {
        let e = exp(simd, simd.sub(simd.load(chunk), max));
        simd.store(e, chunk);
        sum = simd.add(sum, e);
    }
    if !tail.is_empty() {
        let e = exp(simd, simd.sub(simd.load_partial(tail, f32::NEG_INFINITY), max));
        simd.store_partial(e, tail);
        sum = simd.add(sum, e);
    }
    simd.sum(sum)
}

#[inline(always)]
fn swiglu_body<S: Simd>(simd: S, gate: &mut [f32], up: &[f32]) {
    let (gates, gate_tail) = gate.as_chunks_mut::<LANES>();
    let (ups, up_tail) = up.as_chunks::<LANES>();
    for (gate, up) in gates.iter_mut().zip(ups) {
        let value = silu_times(simd, simd.load(gate), simd.load(up));
        simd.store(value, gate);
    }
    if !gate_tail.is_empty() {
        let value = silu_times(simd, simd.load_partial(gate_tail, 0.0), simd.load_partial(up_tail, 0.0));
        simd.store_partial(value, gate_tail);
    }
}

#[inline(always)]
fn silu_times<S: Simd>(simd: S, gate: S::F, up: S::F) -> S::F {
    let e = exp(simd, simd.sub(simd.splat(0.0), gate));
    simd.mul(simd.div(gate, simd.add(simd.splat(1.0), e)), up)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::Isa;

    #[inline(always)]
    fn exp_slice<S: Simd>(simd: S, x: &[f32; LANES], y: &mut [f32; LANES]) {
        simd.store(exp(simd, simd.load(x)), y);
    }

    per_isa! { fn run(x: &[f32; LANES], y: &mut [f32; LANES]) = exp_slice }

    #[test]
    fn two_ulp_over_the_whole_range() {
        for isa in Isa::available() {
            let mut worst = 0.0f64;
            for i in 0..60_000 {
                let x: [f32; LANES] = std::array::from_fn(|l| -87.3 + (i * LANES + l) as f32 * (176.0 / 960_000.0));
                let mut y = [0.0; LANES];
                run(isa, &x, &mut y);
                for (x, y) in x.into_iter().zip(y) {
                    let exact = f64::from(x).exp();
                    let ulp = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
                    worst = worst.max((f64::from(y) - exact).abs() / ulp);
                }
            }
            assert!(worst < 2.0, "{}: {worst} ulp", isa.name());
        }
    }

    #[test]
    fn the_ends_of_the_range() {
        let mut x = [0.0; LANES];
        x[..8].copy_from_slice(&[f32::NEG_INFINITY, -1e30, -105.0, 88.8, 1e30, f32::INFINITY, f32::NAN, -0.0]);
        for isa in Isa::available() {
            let mut y = [f32::NAN; LANES];
            run(isa, &x, &mut y);
            assert_eq!(y[..3], [0.0; 3], "{}", isa.name());
            assert_eq!(y[3..6], [f32::INFINITY; 3], "{}", isa.name());
            assert!(y[6].is_nan(), "{}", isa.name());
            assert_eq!(y[7], 1.0, "{}", isa.name());
        }
    }

    #[test]
    fn a_nan_score_reaches_every_weight() {
        for isa in Isa::available() {
            for at in [0, 17, 33] {
                let mut row = [1.0; 34];
                row[at] = f32::NAN;
                assert!(softmax_unscaled(isa, &mut row).is_nan(), "{} at {at}", isa.name());
            }
        }
    }
}
