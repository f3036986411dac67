//! Softmax over a vocabulary that is seen in chunks.

use crate::cpu::elementwise::rows_per_task;
use crate::cpu::exp::exp;
use crate::cpu::simd::{Isa, LANES, Simd, per_isa};
use crate::{LogSumExp, shapes};
use rayon::prelude::*;

pub(in crate::cpu) fn log_sum_exp(isa: Isa, logits: &[f32], sums: &mut [LogSumExp]) {
    let width = shapes::logits(logits, sums.len());
    if width > 0 {
        logits.par_chunks_exact(width).zip(sums).with_min_len(rows_per_task(width)).for_each(|(row, sum)| {
            let (max, total) = sum_exp(isa, row);
            sum.merge(max, f64::from(total));
        });
    }
}

pub(in crate::cpu) fn softmax_weighted(isa: Isa, weights: &[f32], log_sums: &[f64], logits: &mut [f32]) {
    let width = shapes::softmax(weights, log_sums, logits);
    if width > 0 {
        let rows = logits.par_chunks_exact_mut(width).zip(weights).zip(log_sums);
        rows.with_min_len(rows_per_task(width)).for_each(|((row, &weight), &log_sum)| {
            scaled_exp(isa, row, log_sum as f32, weight);
        });
    }
}

pub(in crate::cpu) fn divergence(
    isa: Isa,
    weights: &[f32],
    (reference, reference_log_sums): (&[f32], &[f64]),
    (logits, log_sums): (&mut [f32], &[f64]),
    divergences: &mut [f64],
) {
    let width = shapes::divergence(weights, (reference, reference_log_sums), (logits, log_sums), divergences);
    if width > 0 {
        let rows = logits.par_chunks_exact_mut(width).zip(reference.par_chunks_exact(width)).zip(divergences);
        rows.with_min_len(rows_per_task(width)).enumerate().for_each(|(r, ((logits, reference), divergence))| {
            let sums = (reference_log_sums[r] as f32, log_sums[r] as f32);
            *divergence += f64::from(diverge(isa, weights[r], reference, logits, sums));
        });
    }
}

per_isa! {
    /// The largest element and `sum exp(x - largest)`.
    pub(in crate::cpu) fn sum_exp(row: &[f32]) -> (f32, f32) = sum_exp_body
}

per_isa! {
    /// `row = factor * exp(row - minus)`.
    pub(in crate::cpu) fn scaled_exp(row: &mut [f32], minus: f32, factor: f32) = scaled_exp_body
}

per_isa! {
    /// `logits = weight (q - p)`; returns `sum p ln(p / q)`.
    fn diverge(weight: f32, reference: &[f32], logits: &mut [f32], log_sums: (f32, f32)) -> f32 = diverge_body
}

#[inline(always)]
fn sum_exp_body<S: Simd>(simd: S, row: &[f32]) -> (f32, f32) {
    let (chunks, tail) = row.as_chunks::<LANES>();
    let mut max = simd.load_partial(tail, f32::NEG_INFINITY);
    for chunk in chunks {
        max = simd.max(simd.load(chunk), max);
    }
    let largest = simd.largest(max);
    // Where all are infinitely small their sum is 0, not that of differences that are no numbers.
    let max = simd.splat(if largest == f32::NEG_INFINITY { 0.0 } else { largest });
    let mut sum = simd.splat(0.0);
    for chunk in chunks {
        sum = simd.add(sum, exp(simd, simd.sub(simd.load(chunk), max)));
    }
    if !tail.is_empty() {
        sum = simd.add(sum, exp(simd, simd.sub(simd.load_partial(tail, f32::NEG_INFINITY), max)));
    }
    (largest, simd.sum(sum))
}

#[inline(always)]
fn scaled_exp_body<S: Simd>(simd: S, row: &mut [f32], minus: f32, factor: f32) {
    let (minus, factor) = (simd.splat(minus), simd.splat(factor));
    let value = |x| simd.mul(factor, exp(simd, simd.sub(x, minus)));
    let (chunks, tail) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        simd.store(value(simd.load(chunk)), chunk);
    }
    if !tail.is_empty() {
        simd.store_partial(value(simd.load_partial(tail, 0.0)), tail);
    }
}

#[inline(always)]
fn diverge_body<S: Simd>(simd: S, weight: f32, reference: &[f32], logits: &mut [f32], log_sums: (f32, f32)) -> f32 {
    let (p_sum, q_sum, weight) = (simd.splat(log_sums.0), simd.splat(log_sums.1), simd.splat(weight));
    let mut sum = simd.splat(0.0);
    let mut pair = |x: S::F, y: S::F| {
        let (ln_p, ln_q) = (simd.sub(y, p_sum), simd.sub(x, q_sum));
        let p = exp(simd, ln_p);
        sum = simd.mul_add(p, simd.sub(ln_p, ln_q), sum);
        simd.mul(weight, simd.sub(exp(simd, ln_q), p))
    };
    let (chunks, tail) = logits.as_chunks_mut::<LANES>();
    let (references, reference_tail) = reference.as_chunks::<LANES>();
    for (chunk, reference) in chunks.iter_mut().zip(references) {
        let value = pair(simd.load(chunk), simd.load(reference));
        simd.store(value, chunk);
    }
    if !tail.is_empty() {
        // Lanes beyond the end: far below any logit, so that both probabilities are 0 and their difference is not used.
        let value = pair(simd.load_partial(tail, -1e30), simd.load_partial(reference_tail, -1e30));
        simd.store_partial(value, tail);
    }
    simd.sum(sum)
}
