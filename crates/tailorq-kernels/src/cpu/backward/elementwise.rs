//! Backward of norm and gated unit, row by row and element by element.

use crate::cpu::dot::dot_body;
use crate::cpu::elementwise::{CHUNK, rows_per_task};
use crate::cpu::exp::exp;
use crate::cpu::simd::{Isa, LANES, Simd, per_isa};
use crate::shapes;
use rayon::prelude::*;

pub(in crate::cpu) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    shapes::rows_of(weight.len(), x, dy);
    shapes::rows_of(weight.len(), x, dx);
    let task = rows_per_task(weight.len()) * weight.len().max(1);
    let parts = dx.par_chunks_mut(task).zip(x.par_chunks(task)).zip(dy.par_chunks(task));
    parts.for_each(|((dx, x), dy)| norm_rows(isa, x, weight, eps, dy, dx));
}

pub(in crate::cpu) fn swiglu(isa: Isa, dy: &[f32], gate: &mut [f32], up: &mut [f32]) {
    assert!(dy.len() == gate.len() && dy.len() == up.len(), "swiglu_backward: dy, gate and up have the same shape");
    let parts = gate.par_chunks_mut(CHUNK).zip(up.par_chunks_mut(CHUNK)).zip(dy.par_chunks(CHUNK));
    parts.for_each(|((gate, up), dy)| gates(isa, dy, gate, up));
}

per_isa! {
    /// Some rows of `weight.len()` elements.
    fn norm_rows(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) = norm_body
}

per_isa! {
    /// Gradients in the places of gate and up.
    fn gates(dy: &[f32], gate: &mut [f32], up: &mut [f32]) = gates_body
}

/// See the reference for the formula.
#[inline(always)]
fn norm_body<S: Simd>(simd: S, x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let width = weight.len();
    let (weights, weight_tail) = weight.as_chunks::<LANES>();
    let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
    for ((x, dy), dx) in rows {
        let scale = 1.0 / (dot_body(simd, x, x) / width as f32 + eps).sqrt();
        let ((x, x_tail), (dy, dy_tail)) = (x.as_chunks::<LANES>(), dy.as_chunks::<LANES>());
        let mut sum = simd.splat(0.0);
        for ((x, dy), w) in x.iter().zip(dy).zip(weights) {
            sum = simd.mul_add(simd.mul(simd.load(w), simd.load(dy)), simd.load(x), sum);
        }
        let part = |tail: &[f32]| simd.load_partial(tail, 0.0);
        let (w_last, dy_last, x_last) = (part(weight_tail), part(dy_tail), part(x_tail));
        sum = simd.mul_add(simd.mul(w_last, dy_last), x_last, sum);
        let pull = simd.splat(-scale * scale * scale * (simd.sum(sum) / width as f32));
        let scale = simd.splat(scale);
        let (dx, dx_tail) = dx.as_chunks_mut::<LANES>();
        for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(weights) {
            let direct = simd.mul_add(simd.mul(simd.load(w), simd.load(dy)), scale, simd.load(dx));
            simd.store(simd.mul_add(pull, simd.load(x), direct), dx);
        }
        if !dx_tail.is_empty() {
            let direct = simd.mul_add(simd.mul(w_last, dy_last), scale, part(dx_tail));
            simd.store_partial(simd.mul_add(pull, x_last, direct), dx_tail);
        }
    }
}

#[inline(always)]
fn gates_body<S: Simd>(simd: S, dy: &[f32], gate: &mut [f32], up: &mut [f32]) {
    let (dys, dy_tail) = dy.as_chunks::<LANES>();
    let (gates, gate_tail) = gate.as_chunks_mut::<LANES>();
    let (ups, up_tail) = up.as_chunks_mut::<LANES>();
    for ((dy, gate), up) in dys.iter().zip(gates).zip(ups) {
        let (g, u) = gate_pair(simd, simd.load(dy), simd.load(gate), simd.load(up));
        simd.store(g, gate);
        simd.store(u, up);
    }
    if !dy_tail.is_empty() {
        let part = |tail: &[f32]| simd.load_partial(tail, 0.0);
        let (g, u) = gate_pair(simd, part(dy_tail), part(gate_tail), part(up_tail));
        simd.store_partial(g, gate_tail);
        simd.store_partial(u, up_tail);
    }
}

/// With `s = 1 / (1 + exp(-gate))`: `dy up s (1 + gate (1 - s))` and `dy gate s`.
#[inline(always)]
fn gate_pair<S: Simd>(simd: S, dy: S::F, gate: S::F, up: S::F) -> (S::F, S::F) {
    let one = simd.splat(1.0);
    let sigmoid = simd.div(one, simd.add(one, exp(simd, simd.sub(simd.splat(0.0), gate))));
    let slope = simd.mul(sigmoid, simd.mul_add(gate, simd.sub(one, sigmoid), one));
    (simd.mul(simd.mul(dy, up), slope), simd.mul(dy, simd.mul(gate, sigmoid)))
}
