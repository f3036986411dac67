//! RTN and GPTQ: against a textbook version in f64, against each other, and on awkward input.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod direct;

use direct::{cpu, hessian, normal};
use std::sync::Arc;
use tailorq_quant::quantize::{ALL, Best, Gptq, Grid, GridRule, Half, HeldOut, Rtn, proxy_loss};
use tailorq_quant::{
    Clip, ElementMask, GridKind, LayerPlan, LayerSettings, LayerStats, Note, QuantError, Quantized, Quantizer, find,
};
use tailorq_tensor::{Bits, Group, Matrix, PackedMatrix, ScaleBits};

fn settings(bits: Bits, group: Group) -> LayerSettings {
    LayerSettings::new(bits, group)
}

fn run(q: &dyn Quantizer, w: &Matrix, h: Option<&Matrix>, n_tokens: usize, s: &LayerSettings) -> Quantized {
    q.quantize(cpu().as_ref(), w, &LayerStats { hessian: h, n_tokens, ..LayerStats::default() }, &(*s).into()).unwrap()
}

fn bytes(m: &PackedMatrix) -> Vec<u8> {
    let p = m.parts();
    let optional = [&p.codes_high, &p.zeros].into_iter().flatten().flat_map(|b| b.to_vec());
    p.codes.iter().copied().chain(p.scales.to_vec()).chain(optional).collect()
}

fn codes(m: &PackedMatrix) -> Vec<u8> {
    (0..m.rows()).flat_map(|r| (0..m.cols()).map(move |c| m.code(r, c))).collect()
}

/// The methods that make codes and grids.
const PACKING: [&dyn Quantizer; 2] = [&Rtn, &Gptq];

const GROUPS: [Group; 4] = [Group::Inputs(32), Group::Inputs(64), Group::Inputs(128), Group::Row];

/// The textbook: inverse and Cholesky by the definition, then one column of the whole matrix after another, in f64.
mod textbook {
    use super::direct::factor;
    use super::*;

    /// Codes `[rows, cols]` in natural order, and what becomes of the weights. Kept elements have no say in the grid, stay
    /// as they are when their turn comes, and leave no error.
    pub fn gptq(w: &Matrix, h: &Matrix, s: &LayerSettings, kept: &dyn Fn(usize, usize) -> bool) -> (Vec<u8>, Vec<f64>) {
        let (rows, cols) = (w.rows(), w.cols());
        let u = factor(h, s.damping);
        let rule = GridRule::new(s.layout, s.clip);
        let cost: Vec<f32> = (0..cols).map(|j| (1.0 / (u[j][j] * u[j][j])) as f32).collect();
        let len = s.layout.group.len(cols);
        let max = f64::from(s.layout.bits.max_code());
        let mut codes = vec![0u8; rows * cols];
        let mut values = vec![0.0; rows * cols];
        for r in 0..rows {
            let mut row: Vec<f64> = w.row(r).iter().map(|v| f64::from(*v)).collect();
            let mut grid = None;
            for j in 0..cols {
                if j % len == 0 {
                    let rest = || (j..(j + len).min(cols)).filter(|&c| !kept(r, c));
                    let group: Vec<f32> = rest().map(|c| row[c] as f32).collect();
                    let cost: Vec<f32> = rest().map(|c| cost[c]).collect();
                    grid = Some(rule.fit(&group, (s.clip == Clip::Hessian).then_some(&cost[..])).unwrap());
                }
                let grid = grid.unwrap();
                let (scale, zero) = (grid.scale.to_f64(), f64::from(grid.zero));
                let code = if scale > 0.0 { ((row[j] / scale).round() + zero).clamp(0.0, max) } else { zero };
                codes[r * cols + j] = code as u8;
                let value = if kept(r, j) { row[j] } else { (code - zero) * scale };
                values[r * cols + j] = value;
                let error = (row[j] - value) / u[j][j];
                for k in j + 1..cols {
                    row[k] -= error * u[j][k];
                }
            }
        }
        (codes, values)
    }
}

#[test]
fn agrees_with_the_textbook() {
    let (mut same, mut total) = (0, 0);
    for (i, cols) in [17, 130, 288].into_iter().enumerate() {
        for (bits, group) in
            [(Bits::Two, Group::Inputs(32)), (Bits::Three, Group::Inputs(128)), (Bits::Four, Group::Row)]
        {
            for (symmetric, clip) in
                [(false, Clip::Hessian), (true, Clip::Hessian), (false, Clip::Magnitude), (true, Clip::None)]
            {
                let w = normal(40, cols, i as u64);
                let h = hessian(cols, 4 * cols, 7 + i as u64);
                let mut s = settings(bits, group);
                s.layout.symmetric = symmetric;
                s.layout.scales = if symmetric { ScaleBits::Eight } else { ScaleBits::Sixteen };
                s.clip = clip;
                let expected = textbook::gptq(&w, &h, &s, &|_, _| false).0;
                let found = codes(run(&Gptq, &w, Some(&h), 4 * cols, &s).weight.packed().unwrap());
                let n_same = expected.iter().zip(&found).filter(|(a, b)| a == b).count();
                // One rounding that falls the other way changes what follows in its row, so a case alone may differ more.
                assert!(n_same * 100 >= expected.len() * 99, "{cols} {bits:?} {group}: {n_same} of {}", expected.len());
                same += n_same;
                total += expected.len();
            }
        }
    }
    assert!(same * 1000 >= total * 999, "{same} of {total} codes agree");
}

/// Every seventh element of most rows, and all of one row.
fn is_kept(r: usize, c: usize) -> bool {
    r == 3 || (!r.is_multiple_of(4) && (r + c).is_multiple_of(7))
}

fn mask(rows: usize, cols: usize) -> Arc<ElementMask> {
    let indices = (0..rows * cols).filter(|i| is_kept(i / cols, i % cols));
    Arc::new(ElementMask::from_indices(rows, cols, indices).unwrap())
}

#[test]
fn kept_elements_are_those_of_the_textbook() {
    for (cols, clip) in [(17, Clip::Magnitude), (130, Clip::None), (288, Clip::Hessian)] {
        let (w, h) = (normal(40, cols, 11), hessian(cols, 4 * cols, 12));
        let s = LayerSettings { clip, ..settings(Bits::Two, Group::Inputs(64)) };
        let (codes_expected, values) = textbook::gptq(&w, &h, &s, &is_kept);
        let plan = LayerPlan { settings: s, kept: Some(mask(40, cols)) };
        let stats = LayerStats { hessian: Some(&h), n_tokens: 4 * cols, ..LayerStats::default() };
        let found = Gptq.quantize(cpu().as_ref(), &w, &stats, &plan).unwrap();
        assert_eq!(found.weight.packed().unwrap().elements().unwrap().len(), plan.kept.as_ref().unwrap().len());
        let all = codes(found.weight.packed().unwrap());
        let (mut same, mut n) = (0, 0);
        for r in 0..40 {
            // Rows in which no rounding fell the other way: there kept values are the compensated ones, to 16 bits.
            let row =
                |codes: &[u8]| (0..cols).filter(|&c| !is_kept(r, c)).map(|c| codes[r * cols + c]).collect::<Vec<_>>();
            if row(&all) != row(&codes_expected) {
                continue;
            }
            same += 1;
            for c in (0..cols).filter(|&c| is_kept(r, c)) {
                let (value, expected) = (f64::from(found.weight.packed().unwrap().value(r, c)), values[r * cols + c]);
                assert!((value - expected).abs() < 3e-3, "({r}, {c}): {value}, expected {expected}");
                n += usize::from((expected - f64::from(w.row(r)[c])).abs() > 0.05);
            }
        }
        assert!(same >= 36, "{same} of 40 rows agree");
        assert!(n > 0, "some kept values took in errors of earlier columns");
        // What it says of its loss counts the kept values.
        let measured = proxy_loss(cpu().as_ref(), &w, found.weight.packed().unwrap(), &h, 4 * cols);
        assert!((found.proxy_loss.unwrap() / measured - 1.0).abs() < 5e-3);
    }
}

#[test]
fn keeping_elements_helps_and_their_outliers_do_not_widen_the_grid() {
    let (cols, n) = (256, 600);
    let (mut w, h) = (normal(30, cols, 13), hessian(cols, n, 14));
    for r in 0..30 {
        (0..cols).filter(|&c| is_kept(r, c)).for_each(|c| w.row_mut(r)[c] *= 30.0);
    }
    let stats = LayerStats { hessian: Some(&h), n_tokens: n, ..LayerStats::default() };
    for q in PACKING {
        for (group, act_order) in [(Group::Inputs(64), false), (Group::Row, false), (Group::Inputs(32), true)] {
            let s = LayerSettings { act_order, ..settings(Bits::Three, group) };
            let with = q.quantize(cpu().as_ref(), &w, &stats, &LayerPlan { settings: s, kept: Some(mask(30, cols)) });
            let (with, without) = (with.unwrap(), run(q, &w, Some(&h), n, &s));
            let [a, b] = [&with, &without].map(|q| q.proxy_loss.unwrap());
            assert!(a < 0.1 * b, "{} {group} {act_order}: {a} with, {b} without", q.name());
            let none = ElementMask::from_indices(30, cols, []).unwrap();
            let plan = LayerPlan { settings: s, kept: Some(Arc::new(none)) };
            let empty = q.quantize(cpu().as_ref(), &w, &stats, &plan).unwrap();
            assert_eq!(
                bytes(empty.weight.packed().unwrap()),
                bytes(without.weight.packed().unwrap()),
                "an empty mask changes nothing"
            );
        }
        let plan = LayerPlan { settings: settings(Bits::Two, Group::Row), kept: Some(mask(29, cols)) };
        assert!(matches!(q.quantize(cpu().as_ref(), &w, &stats, &plan), Err(QuantError::Settings(_))));
    }
}

#[test]
fn beats_rounding_on_correlated_inputs() {
    let (cols, n_tokens) = (320, 700);
    let (w, h) = (normal(70, cols, 1), hessian(cols, n_tokens, 2));
    for bits in Bits::ALL {
        for group in GROUPS {
            for act_order in [false, true] {
                let s = LayerSettings { act_order, ..settings(bits, group) };
                let rounded = run(&Rtn, &w, Some(&h), n_tokens, &s);
                let fitted = run(&Gptq, &w, Some(&h), n_tokens, &s);
                let [a, b] = [&rounded, &fitted].map(|q| q.proxy_loss.unwrap());
                assert!(b < 0.8 * a, "{bits:?} {group} act_order {act_order}: gptq {b}, rtn {a}");
                assert!(fitted.notes.is_empty());
            }
        }
    }
}

/// The loss that GPTQ adds up on its way is the one measured on its result.
#[test]
fn loss_is_what_it_says() {
    for (cols, act_order, damping) in [(17, false, 0.01), (300, false, 0.01), (300, true, 0.1), (576, false, 1e-4)] {
        let (w, h) = (normal(33, cols, 3), hessian(cols, 3 * cols, 4));
        let s = LayerSettings { act_order, damping, ..settings(Bits::Three, Group::Inputs(64)) };
        let q = run(&Gptq, &w, Some(&h), 3 * cols, &s);
        let measured = proxy_loss(cpu().as_ref(), &w, q.weight.packed().unwrap(), &h, 3 * cols);
        let claimed = q.proxy_loss.unwrap();
        assert!((claimed / measured - 1.0).abs() < 2e-3, "{cols}: {claimed} against {measured}");
        // And that one is the quadratic form.
        let mut direct = 0.0;
        for r in 0..w.rows() {
            let e: Vec<f64> =
                (0..cols).map(|c| f64::from(w.row(r)[c] - q.weight.packed().unwrap().value(r, c))).collect();
            for i in 0..cols {
                let row: f64 = (0..cols).map(|j| f64::from(h.row(i.max(j))[i.min(j)]) * e[j]).sum();
                direct += e[i] * row;
            }
        }
        direct /= (3 * cols) as f64;
        assert!((measured / direct - 1.0).abs() < 1e-4, "{cols}: {measured} against {direct}");
    }
}

#[test]
fn relative_error_is_what_it_says() {
    let w = normal(65, 100, 8);
    let h = hessian(100, 300, 9);
    for q in PACKING {
        let done = run(q, &w, Some(&h), 300, &settings(Bits::Three, Group::Inputs(32)));
        let (mut error, mut energy) = (0.0, 0.0);
        for r in 0..65 {
            for c in 0..100 {
                error += f64::from(w.row(r)[c] - done.weight.packed().unwrap().value(r, c)).powi(2);
                energy += f64::from(w.row(r)[c]).powi(2);
            }
        }
        let expected = (error / energy).sqrt();
        assert!((done.relative_error / expected - 1.0).abs() < 1e-6, "{}", q.name());
    }
}

#[test]
fn is_rounding_when_inputs_are_independent() {
    for cols in [17, 200, 576] {
        let mut identity = Matrix::zeros(cols, cols);
        (0..cols).for_each(|i| identity.row_mut(i)[i] = 1.0);
        let w = normal(5, cols, 11);
        for group in GROUPS {
            for act_order in [false, true] {
                let s = LayerSettings { act_order, clip: Clip::Magnitude, ..settings(Bits::Two, group) };
                let [a, b] = [&Rtn as &dyn Quantizer, &Gptq].map(|q| run(q, &w, Some(&identity), 1, &s));
                assert_eq!(
                    bytes(a.weight.packed().unwrap()),
                    bytes(b.weight.packed().unwrap()),
                    "{cols} {group} {act_order}"
                );
                assert!((a.proxy_loss.unwrap() / b.proxy_loss.unwrap() - 1.0).abs() < 1e-4);
            }
        }
    }
}

#[test]
fn awkward_shapes() {
    for (rows, cols) in [(0, 40), (1, 1), (1, 17), (1, 576), (65, 33), (3, 576), (130, 129)] {
        let (w, h) = (normal(rows, cols, 21), hessian(cols, 2 * cols + 5, 22));
        for bits in Bits::ALL {
            for group in GROUPS {
                for (symmetric, act_order) in [(false, false), (true, true)] {
                    let mut s = LayerSettings { act_order, ..settings(bits, group) };
                    s.layout.symmetric = symmetric;
                    for q in PACKING {
                        let done = run(q, &w, Some(&h), 10, &s);
                        assert_eq!(
                            (done.weight.packed().unwrap().rows(), done.weight.packed().unwrap().cols()),
                            (rows, cols)
                        );
                        // An error as large as the weights would mean that codes went to wrong places.
                        let bound = if bits == Bits::Two { 0.95 } else { 0.6 };
                        assert!(
                            done.relative_error < bound,
                            "{} {rows}x{cols} {s:?}: {}",
                            q.name(),
                            done.relative_error
                        );
                    }
                }
            }
        }
    }
}

/// Columns come back to their places: with 8 bits every weight is near its own value.
#[test]
fn act_order_round_trip() {
    let cols = 300;
    let mut w = normal(9, cols, 31);
    // Values that tell columns apart.
    for r in 0..9 {
        w.row_mut(r).iter_mut().enumerate().for_each(|(c, v)| *v = c as f32 + 0.1 * *v);
    }
    let h = hessian(cols, 900, 32);
    let s = LayerSettings { act_order: true, ..settings(Bits::Eight, Group::Inputs(32)) };
    let done = run(&Gptq, &w, Some(&h), 900, &s);
    for r in 0..9 {
        for c in 0..cols {
            let (weight, value) = (w.row(r)[c], done.weight.packed().unwrap().value(r, c));
            assert!((weight - value).abs() < 16.0 * 300.0 / 255.0, "({r}, {c}): {weight} became {value}");
        }
    }
    assert!(done.relative_error < 0.02, "{}", done.relative_error);
}

#[test]
fn threads_do_not_matter() {
    let (w, h) = (normal(300, 320, 41), hessian(320, 800, 42));
    for q in PACKING {
        for act_order in [false, true] {
            let s = LayerSettings { act_order, ..settings(Bits::Three, Group::Inputs(128)) };
            let results = [1, 2, 3].map(|n| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
                pool.install(|| run(q, &w, Some(&h), 800, &s))
            });
            for other in &results[1..] {
                assert_eq!(
                    bytes(results[0].weight.packed().unwrap()),
                    bytes(other.weight.packed().unwrap()),
                    "{}",
                    q.name()
                );
                assert_eq!(results[0].proxy_loss, other.proxy_loss);
                assert_eq!(results[0].relative_error, other.relative_error);
            }
        }
    }
}

#[test]
fn bad_weights_are_placed() {
    let h = hessian(64, 100, 51);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut w = normal(200, 64, 52);
        w.row_mut(150)[7] = bad;
        w.row_mut(199)[1] = bad;
        for q in PACKING {
            let stats = LayerStats { hessian: Some(&h), n_tokens: 100, ..LayerStats::default() };
            let error = q.quantize(cpu().as_ref(), &w, &stats, &settings(Bits::Four, Group::Row).into()).unwrap_err();
            assert!(matches!(error, QuantError::NonFiniteWeight { row: 150, col: 7, .. }), "{error}");
        }
    }
    let mut w = normal(3, 64, 53);
    w.row_mut(2)[40] = 1e7;
    for q in PACKING {
        let stats = LayerStats { hessian: Some(&h), n_tokens: 100, ..LayerStats::default() };
        let error = q.quantize(cpu().as_ref(), &w, &stats, &settings(Bits::Two, Group::Inputs(32)).into()).unwrap_err();
        assert!(matches!(error, QuantError::ScaleOverflow { row: 2, group: 1, .. }), "{error}");
    }
}

#[test]
fn bad_statistics_are_refused() {
    let w = normal(3, 40, 61);
    let s = settings(Bits::Three, Group::Inputs(32));
    let quantize = |h: Option<&Matrix>, s: &LayerSettings| {
        Gptq.quantize(
            cpu().as_ref(),
            &w,
            &LayerStats { hessian: h, n_tokens: 9, ..LayerStats::default() },
            &(*s).into(),
        )
        .unwrap_err()
    };
    assert!(matches!(quantize(None, &s), QuantError::HessianMissing { quantizer: "gptq" }));
    for bad in [f32::NAN, f32::INFINITY] {
        let mut h = hessian(40, 100, 62);
        h.row_mut(30)[4] = bad;
        assert!(matches!(quantize(Some(&h), &s), QuantError::HessianNotFinite { row: 30, col: 4 }));
    }
    // The strict upper triangle is nobody's business.
    let mut h = hessian(40, 100, 62);
    let clean = run(&Gptq, &w, Some(&h), 100, &s);
    (0..40).for_each(|i| h.row_mut(i)[i + 1..].fill(f32::NAN));
    let dirty = run(&Gptq, &w, Some(&h), 100, &s);
    assert_eq!(bytes(clean.weight.packed().unwrap()), bytes(dirty.weight.packed().unwrap()));
    assert!(proxy_loss(cpu().as_ref(), &w, dirty.weight.packed().unwrap(), &h, 100).is_finite());
    for damping in [-0.1, f64::NAN, f64::INFINITY] {
        assert!(matches!(quantize(Some(&h), &LayerSettings { damping, ..s }), QuantError::Settings(_)));
    }
}

/// An indefinite matrix is damped until it can be factored, and every step of that is told.
#[test]
fn damping_is_raised_and_told() {
    let mut h = Matrix::from_vec(2, 2, vec![1.0, 0.0, 2.0, 1.0]);
    let w = normal(4, 2, 71);
    let s = settings(Bits::Four, Group::Row);
    let raised = run(&Gptq, &w, Some(&h), 1, &s).notes;
    let steps: Vec<(f64, f64)> = raised
        .iter()
        .map(|n| match n {
            Note::DampingRaised { from, to } => (*from, *to),
            other => panic!("unexpected {other}"),
        })
        .collect();
    assert_eq!(steps.first(), Some(&(0.01, 0.1)));
    // An eigenvalue of -1 needs a damping above 1; whether 1 itself fails is a matter of rounding.
    assert!(steps.len() == 2 || steps.len() == 3, "{steps:?}");
    // A damping of 0 can be raised as well.
    let from_zero = run(&Gptq, &w, Some(&h), 1, &LayerSettings { damping: 0.0, ..s }).notes;
    assert_eq!(from_zero.first(), Some(&Note::DampingRaised { from: 0.0, to: 1e-3 }));
    // Beyond help: rounded, and told.
    h.row_mut(1)[0] = 1e9;
    let given_up = run(&Gptq, &w, Some(&h), 1, &s);
    assert_eq!(given_up.notes.len(), 7);
    assert!(matches!(given_up.notes.last(), Some(Note::FellBackToRtn { .. })));
    assert_eq!(bytes(given_up.weight.packed().unwrap()), bytes(run(&Rtn, &w, None, 0, &s).weight.packed().unwrap()));
}

/// The matrix has them, a byte for each group less, and the losses are those of what is stored.
#[test]
fn scales_of_eight_bits_are_those_that_codes_were_chosen_for() {
    let (w, h) = (normal(20, 200, 81), hessian(200, 800, 82));
    for (q, group) in PACKING.into_iter().flat_map(|q| GROUPS.map(|g| (q, g))) {
        for grid in [GridKind::Affine, GridKind::Codebook] {
            let mut s = LayerSettings { grid, ..settings(Bits::Two, group) };
            s.layout.symmetric = grid == GridKind::Codebook;
            let half = run(q, &w, Some(&h), 800, &s);
            s.layout.scales = ScaleBits::Eight;
            let byte = run(q, &w, Some(&h), 800, &s);
            let [half, matrix] = [&half, &byte].map(|q| q.weight.packed().unwrap());
            assert_eq!((matrix.layout(), matrix.bytes()), (s.layout, half.bytes() - 20 * group.count(200)));
            let loss = proxy_loss(cpu().as_ref(), &w, matrix, &h, 800);
            assert!((byte.proxy_loss.unwrap() / loss - 1.0).abs() < 1e-3, "{loss} {:?}", byte.proxy_loss);
            // Codes of RTN are the nearest on the stored grid.
            let nearest = |r: usize, c: usize| {
                let g = c / group.len(200);
                let grid = Grid { scale: matrix.scales(r)[g], zero: matrix.zero(r, g) };
                grid.code(Bits::Two, w.row(r)[c])
            };
            if q.name() == "rtn" && grid == GridKind::Affine {
                assert!((0..20 * 200).all(|i| matrix.code(i / 200, i % 200) == nearest(i / 200, i % 200)));
            }
        }
    }
    for q in ALL.iter().filter(|q| q.stores_half() && q.name() != "half") {
        let mut s = settings(Bits::Two, Group::Inputs(128));
        s.layout.scales = ScaleBits::Eight;
        let stats = LayerStats { hessian: Some(&h), n_tokens: 800, ..LayerStats::default() };
        let error = q.quantize(cpu().as_ref(), &w, &stats, &s.into()).unwrap_err().to_string();
        assert!(error.contains(q.name()) && error.contains("--scale-bits"), "{error}");
    }
}

/// Inputs that were never active are rounded to nearest; the others do not notice them.
#[test]
fn dead_columns_are_rounded() {
    let cols = 96;
    let dead = [0usize, 13, 50, 95];
    let full = hessian(cols, 300, 81);
    let mut h = full.clone();
    for i in 0..cols {
        for j in 0..=i {
            if dead.contains(&i) || dead.contains(&j) {
                h.row_mut(i)[j] = 0.0;
            }
        }
    }
    let w = normal(20, cols, 82);
    for act_order in [false, true] {
        let s = LayerSettings { act_order, ..settings(Bits::Four, Group::Inputs(32)) };
        let done = run(&Gptq, &w, Some(&h), 300, &s);
        assert_eq!(done.notes, [Note::DeadColumns { count: 4 }]);
        for r in 0..20 {
            for c in dead {
                let error = (w.row(r)[c] - done.weight.packed().unwrap().value(r, c)).abs();
                let grid_step = done.weight.packed().unwrap().scales(r)[c / 32].to_f32();
                let range = f32::from(15 - done.weight.packed().unwrap().zero(r, c / 32))
                    .min(f32::from(done.weight.packed().unwrap().zero(r, c / 32)));
                assert!(
                    error <= 0.5001 * grid_step || w.row(r)[c].abs() > range * grid_step,
                    "({r}, {c}): {error} at a step of {grid_step}"
                );
            }
        }
        let measured = proxy_loss(cpu().as_ref(), &w, done.weight.packed().unwrap(), &h, 300);
        assert!((done.proxy_loss.unwrap() / measured - 1.0).abs() < 2e-3);
    }
    // Nothing was ever active: every input is dead, and the layer is rounded.
    let s = LayerSettings { clip: Clip::Magnitude, ..settings(Bits::Four, Group::Row) };
    let silent = run(&Gptq, &w, Some(&Matrix::zeros(cols, cols)), 300, &s);
    assert_eq!(silent.proxy_loss, Some(0.0));
    let rounded = run(&Rtn, &w, None, 0, &s);
    assert_eq!(bytes(silent.weight.packed().unwrap()), bytes(rounded.weight.packed().unwrap()));
}

/// 16 bits are exact where bfloat16 is, and near where it is not; a kept element is no exception.
#[test]
fn half_keeps_the_layer() {
    let (w, h) = (normal(70, 40, 15), hessian(40, 100, 16));
    let s = settings(Bits::Two, Group::Row);
    let done = run(&Half, &w, Some(&h), 100, &s);
    assert_eq!(done.weight.reader().bytes(), 2 * 70 * 40);
    assert!(done.weight.packed().is_none() && done.counted_bits.is_none());
    assert!(done.relative_error > 0.0 && done.relative_error < 5e-4, "{}", done.relative_error);
    assert!(done.proxy_loss.unwrap() < 1e-6 * run(&Rtn, &w, Some(&h), 100, &s).proxy_loss.unwrap());
    let exact = done.weight.to_matrix().into_vec().iter().map(|v| f32::from_bits(v.to_bits() & 0xffff_0000)).collect();
    let exact = Matrix::from_vec(70, 40, exact);
    let again = run(&Half, &exact, None, 0, &s);
    assert_eq!((again.weight.to_matrix(), again.relative_error), (exact, 0.0));
    assert_eq!(again.weight.reader().encoding(), "BF16");
    let plan = LayerPlan { settings: s, kept: Some(mask(70, 40)) };
    let kept = Half.quantize(cpu().as_ref(), &w, &LayerStats::default(), &plan).unwrap();
    assert_eq!(kept.weight.to_matrix(), done.weight.to_matrix());
}

#[test]
fn names_find_methods() {
    for q in ALL {
        assert_eq!(find(q.name()).map(|f| f.name()), Some(q.name()));
    }
    assert!(find("magic").is_none());
    assert!(!Rtn.needs().hessian && Gptq.needs().hessian && !Half.needs().hessian);
}

/// A grid chosen for what errors cost loses less of the layer's output, in both column orders.
#[test]
fn clipping_by_the_hessian_loses_less() {
    let (w, h) = (normal(48, 256, 1), hessian(256, 1024, 2));
    for bits in [Bits::Two, Bits::Three] {
        for act_order in [false, true] {
            let loss = |clip| {
                let s = LayerSettings { clip, act_order, ..settings(bits, Group::Inputs(64)) };
                run(&Gptq, &w, Some(&h), 1024, &s).proxy_loss.unwrap()
            };
            let [none, magnitude, hessian] = Clip::ALL.map(loss);
            assert!(hessian < 0.97 * magnitude, "{bits:?}, act-order {act_order}: {none} {magnitude} {hessian}");
        }
    }
}

/// Without a Hessian there is nothing to weigh by: the grids are those of the search by magnitude.
#[test]
fn rounding_clips_by_magnitude() {
    let w = normal(8, 96, 3);
    let codes_of = |clip| {
        let s = LayerSettings { clip, ..settings(Bits::Two, Group::Inputs(32)) };
        codes(run(&Rtn, &w, None, 0, &s).weight.packed().unwrap())
    };
    assert_eq!(codes_of(Clip::Hessian), codes_of(Clip::Magnitude));
    assert_ne!(codes_of(Clip::Hessian), codes_of(Clip::None));
}

#[test]
fn settings_as_files_write_them() {
    let read = |text: &str| serde_json::from_str::<LayerSettings>(text);
    let defaults = read(r#"{"layout":{"bits":3,"group":128,"symmetric":false}}"#).unwrap();
    assert_eq!(defaults, LayerSettings::new(Bits::Three, Group::Inputs(128)));
    let other = LayerSettings { act_order: true, damping: 0.05, clip: Clip::None, ..defaults };
    assert_eq!(read(&serde_json::to_string(&other).unwrap()).unwrap(), other);
    assert!(!serde_json::to_string(&other).unwrap().contains("half"));
    let half = LayerSettings::half();
    assert!(half.half && read(&serde_json::to_string(&half).unwrap()).unwrap() == half);
    assert!(read(r#"{"layout":{"bits":3,"group":128,"symmetric":false},"dampng":1}"#).is_err());
    assert!(read(r#"{"layout":{"bits":5,"group":128,"symmetric":false}}"#).is_err());
}

/// Seconds of processor time of this process so far; on a busy machine they say more than the clock.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 14 and 15, counted behind the command's closing bracket; 100 ticks a second on Linux.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    fields.iter().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Times, on demand: `cargo test -p tailorq-quant --test methods -- --ignored --nocapture timing`.
#[test]
#[ignore = "a measurement"]
fn timing() {
    let report = |what: String, work: &mut dyn FnMut()| {
        let (clock, cpu) = (std::time::Instant::now(), cpu_seconds());
        work();
        println!("{what}: {:.3} s, {:.2} cpu-s", clock.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    };
    for (rows, cols) in [(896, 896), (4864, 896), (896, 4864)] {
        let w = normal(rows, cols, 91);
        let n_tokens = cols / 2 + 2000;
        let h = hessian(cols, n_tokens, 92);
        report(format!("factor {cols}"), &mut || {
            let mut damped = h.clone();
            (0..cols).for_each(|i| damped.row_mut(i)[i] *= 1.01);
            cpu().inverse_cholesky_upper(&mut damped).unwrap();
        });
        for bits in [Bits::Two, Bits::Three] {
            for q in PACKING {
                for clip in Clip::ALL {
                    let s = LayerSettings { clip, ..settings(bits, Group::Inputs(128)) };
                    let stats =
                        LayerStats { hessian: q.needs().hessian.then_some(&h), n_tokens, ..LayerStats::default() };
                    report(format!("{rows}x{cols} {bits:?} {} clip {}", q.name(), clip.name()), &mut || {
                        q.quantize(cpu().as_ref(), &w, &stats, &s.into()).unwrap();
                    });
                }
            }
        }
    }
}

/// A sample dominated by one token's direction: GPTQ on it is worse than rounding on other tokens, and `best` is not.
#[test]
fn best_is_never_worse_than_rounding_on_held_out_tokens() {
    let cols = 96;
    let w = normal(24, cols, 21);
    let unrelated = |tokens: usize, seed: u64| {
        let mut h = Matrix::zeros(cols, cols);
        cpu().gram(normal(tokens, cols, seed).data(), &mut h);
        h
    };
    let (held, mut seen) = (unrelated(500, 22), unrelated(12, 24));
    let sink = normal(1, cols, 23).into_vec();
    for i in 0..cols {
        (0..=i).for_each(|j| seen.row_mut(i)[j] += 1e4 * sink[i] * sink[j]);
    }
    let normalised = unrelated(400, 25);
    let stats = LayerStats {
        hessian: Some(&seen),
        n_tokens: 62,
        held_out: Some(HeldOut { hessian: &held, n_tokens: 500 }),
        normalised: Some(&normalised),
        ..LayerStats::default()
    };
    let s = LayerSettings { damping: 1e-4, ..settings(Bits::Three, Group::Inputs(32)) };
    let best = Best.quantize(cpu().as_ref(), &w, &stats, &s.into()).unwrap();
    let judged = |q: &Quantized| proxy_loss(cpu().as_ref(), &w, q.weight.reader(), &held, 500);
    let [rtn, gptq] =
        [&Rtn as &dyn Quantizer, &Gptq].map(|q| q.quantize(cpu().as_ref(), &w, &stats, &s.into()).unwrap());
    assert!(judged(&gptq) > judged(&rtn), "the trap works: {} {}", judged(&gptq), judged(&rtn));
    assert!(judged(&best) <= judged(&rtn) && judged(&best) <= judged(&gptq));
    let Some(Note::Chosen { choice, held_out_loss, rounding_loss }) = best.notes.last() else { panic!() };
    assert_eq!((*held_out_loss, *rounding_loss), (judged(&best), judged(&rtn)), "{choice}");
    let without = LayerStats { held_out: None, ..stats };
    let error = Best.quantize(cpu().as_ref(), &w, &without, &s.into()).unwrap_err();
    assert!(matches!(error, QuantError::HeldOutMissing { .. }));
}
