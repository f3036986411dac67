//! Layers rounded on a CUDA device, against the quantizers on the CPU and against the column loop written down plainly.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may stop where it stands, and says what it found")]

use half::f16;
use std::sync::{Arc, OnceLock};
use tailorq_cuda::{CudaError, CudaOptions};
use tailorq_kernels::{ClipCandidates, Device, ErrorFeedback, KeptElements, Rounded, RoundingJob};
use tailorq_quant::quantize::{Gptq, GridRule, Rtn, proxy_loss};
use tailorq_quant::{
    Clip, ElementMask, LayerPlan, LayerSettings, LayerStats, QuantError, Quantized, Quantizer, TransformSettings,
};
use tailorq_tensor::{Bits, Group, Matrix, PackedMatrix, Rng, ScaleBits};

/// Rows and columns: one of each, fewer than a word of the mask, no multiple of a block, and blocks that are whole.
const SHAPES: [(usize, usize); 8] = [(1, 1), (3, 17), (2, 33), (7, 100), (5, 576), (130, 896), (33, 129), (64, 4864)];

const GROUPS: [Group; 4] = [Group::Inputs(32), Group::Inputs(64), Group::Inputs(128), Group::Row];

/// One device for all tests; `None` where there is none.
fn device() -> Option<Arc<dyn Device>> {
    static DEVICE: OnceLock<Option<Arc<dyn Device>>> = OnceLock::new();
    let open = || match tailorq_cuda::open(0, CudaOptions::default()) {
        Ok(device) => Some(device),
        Err(error @ (CudaError::NoDriver | CudaError::NoLibrary { .. } | CudaError::NoDevice { .. })) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    };
    DEVICE.get_or_init(open).clone()
}

fn normal(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut rng = Rng::new(seed);
    Matrix::from_vec(rows, cols, (0..rows * cols).map(|_| rng.normal()).collect())
}

/// The lower triangle of `sum x x^T` over correlated tokens with a few strong channels and, where there are more than 8, a
/// channel that was never active.
fn hessian(cols: usize, seed: u64) -> Matrix {
    let n_tokens = (2 * cols).clamp(16, 1500);
    let mut rng = Rng::new(seed);
    let mut x = Matrix::zeros(n_tokens, cols);
    for row in x.data_mut().chunks_exact_mut(cols) {
        let mut carried = 0.0;
        for (c, value) in row.iter_mut().enumerate() {
            carried = 0.8 * carried + rng.normal();
            *value = if c == 8 { 0.0 } else { carried * if c % 37 == 5 { 6.0 } else { 1.0 } };
        }
    }
    let mut h = Matrix::zeros(cols, cols);
    tailorq_kernels::cpu().gram(x.data(), &mut h);
    h
}

/// About one element in 40, whole groups of the first row among them.
fn mask(rows: usize, cols: usize, seed: u64) -> ElementMask {
    let mut rng = Rng::new(seed);
    let kept = |i: &usize| (cols >= 64 && (32..64).contains(i)) || rng.below(40) == 0;
    ElementMask::from_indices(rows, cols, (0..rows * cols).filter(kept)).unwrap()
}

fn plan(bits: Bits, group: Group, symmetric: bool, clip: Clip) -> LayerPlan {
    let mut settings = LayerSettings::new(bits, group);
    settings.layout.symmetric = symmetric;
    settings.clip = clip;
    settings.into()
}

fn run(q: &dyn Quantizer, device: &dyn Device, w: &Matrix, h: Option<&Matrix>, plan: &LayerPlan) -> Quantized {
    let stats = LayerStats { hessian: h, n_tokens: 1000, ..LayerStats::default() };
    q.quantize(device, w, &stats, plan).unwrap()
}

/// The share of codes that differ.
fn different(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).filter(|(a, b)| a != b).count() as f64 / a.len() as f64
}

fn codes(m: &PackedMatrix) -> Vec<u8> {
    (0..m.rows()).flat_map(|r| (0..m.cols()).map(move |c| m.code(r, c))).collect()
}

fn unpacked(w: &Matrix, plan: &LayerPlan, r: &Rounded) -> Vec<u8> {
    let planes = (r.codes.clone(), r.codes_high.clone());
    let layout = plan.settings.layout;
    codes(&PackedMatrix::from_planes(w.rows(), w.cols(), layout, planes, r.scales.clone(), &r.zeros).unwrap())
}

/// Every part of a packed matrix.
fn bytes(q: &Quantized) -> Vec<Vec<u8>> {
    let m = q.weight.packed().unwrap();
    let parts = m.parts();
    let optional = [&parts.codes_high, &parts.zeros].map(|p| p.as_ref().map_or_else(Vec::new, |b| b.to_vec()));
    let mut all = vec![parts.codes.to_vec(), parts.scales.to_vec()];
    all.extend(optional);
    if let Some(elements) = m.elements() {
        let parts = elements.parts();
        all.extend([&parts.counts, &parts.cols, &parts.values].map(|p| p.to_vec()));
    }
    all
}

fn close(a: f64, b: f64, relative: f64, what: &str) {
    assert!((a - b).abs() <= relative * a.abs().max(b.abs()) + 1e-12, "{what}: {a} and {b}");
}

#[test]
fn rounding_to_nearest_gives_the_same_bytes() {
    let (Some(gpu), cpu) = (device(), tailorq_kernels::cpu()) else { return };
    for (i, (rows, cols)) in SHAPES.into_iter().enumerate() {
        let (w, kept) = (normal(rows, cols, i as u64), Arc::new(mask(rows, cols, 77)));
        for (bits, group) in Bits::ALL.into_iter().flat_map(|b| GROUPS.map(|g| (b, g))) {
            for (symmetric, clip, keeps) in [
                (false, Clip::None, false),
                (true, Clip::None, true),
                (false, Clip::Magnitude, true),
                (true, Clip::Magnitude, false),
                (false, Clip::Magnitude, false),
            ] {
                let mut plan = plan(bits, group, symmetric, clip);
                plan.kept = keeps.then(|| kept.clone());
                plan.settings.layout.scales = ScaleBits::ALL[(i + usize::from(keeps)) % 2];
                let [a, b] = [&cpu, &gpu].map(|d| run(&Rtn, d.as_ref(), &w, None, &plan));
                let what = format!("[{rows}, {cols}], {:?}, {clip:?}, kept: {keeps}", plan.settings.layout);
                assert_eq!(bytes(&a), bytes(&b), "{what}");
                close(a.relative_error, b.relative_error, 1e-12, &what);
            }
        }
    }
}

/// What a job needs beside the weights, made on the CPU.
struct Prepared {
    upper: Matrix,
    inverse_diagonal: Vec<f32>,
    importance: Vec<f32>,
    dead: Vec<bool>,
    added: f64,
}

fn prepared(h: &Matrix) -> Prepared {
    let n = h.cols();
    let diagonal: Vec<f64> = (0..n).map(|i| f64::from(h.row(i)[i])).collect();
    let added = 0.01 * diagonal.iter().sum::<f64>() / n as f64;
    let mut upper = h.clone();
    for (i, d) in diagonal.iter().enumerate() {
        upper.row_mut(i)[i] = (if *d == 0.0 { 100.0 * added } else { *d } + added) as f32;
    }
    tailorq_kernels::cpu().inverse_cholesky_upper(&mut upper).unwrap();
    let inverse_diagonal: Vec<f32> = (0..n).map(|i| 1.0 / upper.row(i)[i]).collect();
    let importance = inverse_diagonal.iter().map(|d| d * d).collect();
    Prepared { upper, inverse_diagonal, importance, dead: diagonal.iter().map(|d| *d == 0.0).collect(), added }
}

/// What the plain loop gives, one code a byte.
#[derive(Default)]
struct Plain {
    codes: Vec<u8>,
    scales: Vec<f16>,
    zeros: Vec<u8>,
    corrections: Vec<f16>,
    weight_energy: f64,
    error_energy: f64,
    loss: f64,
}

/// The column loop in f32, with the CPU's own grids; a block's errors go to the columns behind it in one sum.
fn plainly(w: &Matrix, p: &Prepared, plan: &LayerPlan) -> Plain {
    let (layout, cols) = (plan.settings.layout, w.cols());
    let (rule, len) = (GridRule::new(layout, plan.settings.clip), layout.group.len(cols));
    let importance = (plan.settings.clip == Clip::Hessian).then_some(&p.importance);
    let mut out = Plain { codes: vec![0; w.len()], ..Plain::default() };
    for r in 0..w.rows() {
        let mut row = w.row(r).to_vec();
        let kept = |c: usize| plan.kept.as_ref().is_some_and(|m| m.row(r).contains(&(c as u32)));
        let (mut grid, mut errors) = (None, vec![0.0f32; cols]);
        for j in 0..cols {
            if j % 128 == 0 && j > 0 {
                for (k, value) in row.iter_mut().enumerate().skip(j) {
                    let sum = (j - 128..j).fold(0.0f32, |s, i| errors[i].mul_add(p.upper.row(i)[k], s));
                    *value -= sum;
                }
            }
            if j % len == 0 {
                let rest: Vec<usize> = (j..(j + len).min(cols)).filter(|&c| !kept(c)).collect();
                let weights: Vec<f32> = rest.iter().map(|&c| row[c]).collect();
                let factors = importance.map(|i| rest.iter().map(|&c| i[c]).collect::<Vec<_>>());
                let fitted = rule.fit(&weights, factors.as_deref()).unwrap();
                out.scales.push(fitted.scale);
                out.zeros.push(fitted.zero);
                grid = Some(fitted);
            }
            let grid = grid.unwrap();
            let code = grid.code(layout.bits, row[j]);
            let mut value = grid.value(code);
            if kept(j) {
                let correction = f16::from_f32(row[j] - value);
                out.corrections.push(correction);
                value += correction.to_f32();
            }
            out.codes[r * cols + j] = code;
            let error = (row[j] - value) * p.inverse_diagonal[j];
            errors[j] = error;
            let later = j + 1..(j / 128 * 128 + 128).min(cols);
            for (value, u) in row[later.clone()].iter_mut().zip(&p.upper.row(j)[later]) {
                *value = (-error).mul_add(*u, *value);
            }
            let (weight, difference) = (f64::from(w.row(r)[j]), f64::from(w.row(r)[j]) - f64::from(value));
            out.weight_energy += weight * weight;
            out.error_energy += difference * difference;
            if !p.dead[j] {
                out.loss += f64::from(error).powi(2) - p.added * difference * difference;
            }
        }
    }
    out
}

fn on_device(gpu: &dyn Device, w: &Matrix, p: &Prepared, plan: &LayerPlan) -> Option<Rounded> {
    let (clip, mut starts, mut columns) = (plan.settings.clip, vec![0], Vec::new());
    for r in 0..w.rows() {
        columns.extend(plan.kept.iter().flat_map(|m| m.row(r)));
        starts.push(columns.len());
    }
    let rule = GridRule::new(plan.settings.layout, clip);
    let factors: Vec<f32> = rule.clip.iter().flat_map(|c| c.factors()).collect();
    gpu.round_layer(&RoundingJob {
        weights: w,
        feedback: Some(ErrorFeedback {
            upper: &p.upper,
            inverse_diagonal: &p.inverse_diagonal,
            dead: &p.dead,
            added: p.added,
        }),
        layout: plan.settings.layout,
        clip: rule.clip.map(|c| ClipCandidates {
            factors: &factors,
            norm: c.norm,
            importance: (clip == Clip::Hessian).then_some(&p.importance[..]),
        }),
        kept: plan.kept.as_ref().map(|_| KeptElements { starts: &starts, columns: &columns }),
    })
}

/// Within a block of columns no sum is taken in another order than on the CPU, so nothing may differ; behind it, products do.
#[test]
fn error_feedback_is_the_plain_loop() {
    let Some(gpu) = device() else { return };
    let mut worst = 0.0f64;
    for (i, (rows, cols)) in [(1, 1), (3, 17), (7, 100), (40, 128), (9, 576), (30, 896)].into_iter().enumerate() {
        let (w, p) = (normal(rows, cols, 40 + i as u64), prepared(&hessian(cols, 50)));
        let kept = Arc::new(mask(rows, cols, 78));
        for (bits, group) in [Bits::Two, Bits::Three, Bits::Four, Bits::Eight].into_iter().zip(GROUPS) {
            for clip in [Clip::None, Clip::Magnitude, Clip::Hessian] {
                for (symmetric, keeps) in [(false, false), (true, true), (false, true)] {
                    let mut plan = plan(bits, group, symmetric, clip);
                    plan.kept = keeps.then(|| kept.clone());
                    plan.settings.layout.scales = ScaleBits::ALL[(i + usize::from(symmetric)) % 2];
                    let what = format!("[{rows}, {cols}], {:?}, {clip:?}, kept: {keeps}", plan.settings.layout);
                    let (a, b) = (plainly(&w, &p, &plan), on_device(gpu.as_ref(), &w, &p, &plan).unwrap());
                    let codes = unpacked(&w, &plan, &b);
                    assert_eq!(a.corrections.len(), b.corrections.len(), "{what}");
                    close(a.weight_energy, b.weight_energy, 1e-12, &what);
                    if cols <= 128 {
                        assert_eq!((&a.codes, &a.zeros, &a.scales), (&codes, &b.zeros, &b.scales), "{what}");
                        assert_eq!(a.corrections, b.corrections, "{what}");
                        close(a.error_energy, b.error_energy, 1e-9, &what);
                        close(a.loss, b.loss, 1e-6, &what);
                    } else {
                        let share = different(&a.codes, &codes);
                        worst = worst.max(share);
                        assert!(share <= 0.03, "{what}: {share} of the codes differ");
                        // One tie that falls the other way changes what the rest of its row loses.
                        let tolerance = 0.15 / rows as f64;
                        close(a.error_energy, b.error_energy, tolerance, &what);
                        close(a.loss, b.loss, tolerance, &what);
                    }
                }
            }
        }
    }
    println!("at most {worst:.5} of the codes differ");
}

/// Factors of two libraries: codes may differ after a tie, what is lost may not.
#[test]
fn gptq_loses_what_it_loses_on_the_cpu() {
    let (Some(gpu), cpu) = (device(), tailorq_kernels::cpu()) else { return };
    let (mut worst_share, mut worst_loss) = (0.0f64, 0.0f64);
    for (i, (rows, cols)) in [(200, 33), (200, 896), (130, 2432)].into_iter().enumerate() {
        let (w, h) = (normal(rows, cols, 60 + i as u64), hessian(cols, 61));
        let kept = Arc::new(mask(rows, cols, 79));
        for (bits, group) in [Bits::Two, Bits::Three, Bits::Four, Bits::Eight].into_iter().zip(GROUPS) {
            for (symmetric, clip, keeps, rotates) in [
                (false, Clip::Hessian, false, false),
                (true, Clip::Magnitude, true, false),
                (false, Clip::None, true, false),
                (false, Clip::Hessian, true, true),
            ] {
                let mut plan = plan(bits, group, symmetric, clip);
                plan.kept = keeps.then(|| kept.clone());
                plan.settings.transform = rotates.then(|| TransformSettings::hadamard(1));
                let [a, b] = [&cpu, &gpu].map(|d| run(&Gptq, d.as_ref(), &w, Some(&h), &plan));
                let what = format!("[{rows}, {cols}], {:?}, {clip:?}, {keeps}, {rotates}", plan.settings.layout);
                assert_eq!(a.notes, b.notes, "{what}");
                let (share, losses) = (
                    different(&codes(a.weight.packed().unwrap()), &codes(b.weight.packed().unwrap())),
                    [&a, &b].map(|q| q.proxy_loss.unwrap()),
                );
                worst_share = worst_share.max(share);
                worst_loss = worst_loss.max((losses[1] / losses[0] - 1.0).abs());
                close(losses[0], losses[1], 0.005, &what);
                close(a.relative_error, b.relative_error, 0.005, &what);
                assert!(share <= 0.25, "{what}: {share} of the codes differ");
                // What it says of itself is what the CPU finds in its packed weights.
                let found = proxy_loss(cpu.as_ref(), &w, b.weight.reader(), &h, 1000);
                close(found, losses[1], 5e-3, &what);
            }
        }
    }
    println!("at most {worst_share:.5} of the codes and {worst_loss:.6} of the loss differ");
}

#[test]
fn quadratic_losses_are_those_of_the_cpu() {
    let (Some(gpu), cpu) = (device(), tailorq_kernels::cpu()) else { return };
    for (rows, cols) in [(1, 1), (7, 100), (130, 896)] {
        let (w, h) = (normal(rows, cols, 5), hessian(cols, 6));
        let q = run(&Rtn, cpu.as_ref(), &w, None, &plan(Bits::Two, Group::Row, false, Clip::None));
        let [a, b] = [&cpu, &gpu].map(|d| proxy_loss(d.as_ref(), &w, q.weight.reader(), &h, 10));
        close(a, b, 1e-5, "loss");
    }
}

#[test]
fn what_is_wrong_is_said_as_on_the_cpu() {
    let (Some(gpu), cpu) = (device(), tailorq_kernels::cpu()) else { return };
    let h = hessian(300, 9);
    let stats = LayerStats { hessian: Some(&h), n_tokens: 10, ..LayerStats::default() };
    for value in [f32::NAN, f32::INFINITY, 3.0e38, 1.0e6] {
        let mut w = normal(70, 300, 8);
        w.row_mut(66)[257] = value;
        for quantizer in [&Rtn as &dyn Quantizer, &Gptq] {
            let plan = plan(Bits::Two, Group::Inputs(64), false, Clip::Hessian);
            let [a, b] = [&cpu, &gpu].map(|d| quantizer.quantize(d.as_ref(), &w, &stats, &plan));
            let says = |r: Result<Quantized, QuantError>| r.map(|_| ()).unwrap_err().to_string();
            let (a, b) = (says(a), says(b));
            if value.is_finite() && quantizer.name() == "gptq" {
                // The scale is that of a weight with the errors of others, whose last bits are those of the factor.
                let says = "above the largest that is stored";
                assert!(a.contains(says) && b.contains(says), "{a}\n{b}");
            } else {
                assert_eq!(a, b);
            }
        }
    }
}

/// The largest element of `U^T U H - I` in some columns.
fn residue(u: &Matrix, h: &Matrix) -> f64 {
    let n = h.cols();
    let full = |i: usize, j: usize| f64::from(h.row(i.max(j))[i.min(j)]);
    let mut worst = 0.0f64;
    for j in (0..n).step_by(n.div_ceil(7)) {
        let column: Vec<f64> = (0..n).map(|k| full(k, j)).collect();
        let uh: Vec<f64> = (0..n).map(|i| (i..n).map(|k| f64::from(u.row(i)[k]) * column[k]).sum()).collect();
        for i in 0..n {
            let found: f64 = (0..=i).map(|k| f64::from(u.row(k)[i]) * uh[k]).sum();
            worst = worst.max((found - f64::from(u8::from(i == j))).abs());
        }
    }
    worst
}

/// As closely as on the CPU, over the boundaries of panels; and with the pivot of a matrix that is not definite.
#[test]
fn factors_invert() {
    let (Some(gpu), cpu) = (device(), tailorq_kernels::cpu()) else { return };
    for n in [1, 2, 33, 128, 300, 1023, 1300] {
        let mut h = hessian(n, 3);
        for i in 0..n {
            h.row_mut(i)[i] += 100.0;
        }
        let [a, b] = [&cpu, &gpu].map(|d| {
            let mut u = h.clone();
            d.inverse_cholesky_upper(&mut u).unwrap();
            u
        });
        let (expected, found) = (residue(&a, &h), residue(&b, &h));
        assert!(expected < 0.02 && found <= 4.0 * expected + 1e-4, "{n}: {found}, on the CPU {expected}");
        assert!((0..n).all(|i| b.row(i)[..i].iter().all(|v| *v == 0.0)), "{n}: zeros below");
        let bad = n / 3;
        h.row_mut(bad)[bad] = -1e9;
        assert_eq!(gpu.inverse_cholesky_upper(&mut h.clone()), cpu.inverse_cholesky_upper(&mut h.clone()), "{n}");
    }
}
