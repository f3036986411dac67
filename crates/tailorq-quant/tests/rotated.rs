//! Quantizing in the rotated domain: the same as the plain method on explicitly rotated matrices, worth it where inputs stand
//! out, and kind to kept elements.
#![allow(clippy::unwrap_used)]

mod direct;

use direct::{cpu, hessian, normal};
use std::sync::Arc;
use tailorq_quant::quantize::{ALL, Awq, Best, Gptq, HeldOut, Rtn, proxy_loss};
use tailorq_quant::{
    Clip, ElementMask, GridKind, LayerPlan, LayerSettings, LayerStats, Note, QuantError, Quantized, Quantizer,
    TransformSettings,
};
use tailorq_tensor::{Bits, Group, InputTransform, Layout, Matrix, PackedMatrix};

fn rotated(settings: LayerSettings) -> LayerSettings {
    LayerSettings { transform: Some(TransformSettings::hadamard(7)), ..settings }
}

fn run(q: &dyn Quantizer, w: &Matrix, h: &Matrix, n_tokens: usize, plan: &LayerPlan) -> Quantized {
    let held_out = q.needs().held_out.then_some(HeldOut { hessian: h, n_tokens });
    let stats = LayerStats { hessian: Some(h), n_tokens, held_out, ..LayerStats::default() };
    q.quantize(cpu().as_ref(), w, &stats, plan).unwrap()
}

fn packed(quantized: &Quantized) -> &PackedMatrix {
    quantized.weight.packed().unwrap()
}

/// Weights with a few inputs ten times as large, as language models have them.
fn with_outliers(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut w = normal(rows, cols, seed);
    for r in 0..rows {
        (0..cols).filter(|c| c % 29 == 3).for_each(|c| w.row_mut(r)[c] *= 10.0);
    }
    w
}

fn transposed(m: &Matrix) -> Matrix {
    let data = (0..m.cols()).flat_map(|c| (0..m.rows()).map(move |r| m.row(r)[c])).collect();
    Matrix::from_vec(m.cols(), m.rows(), data)
}

fn rotate(t: &InputTransform, m: &Matrix) -> Matrix {
    let mut m = m.clone();
    (0..m.rows()).for_each(|r| t.forward(m.row_mut(r)));
    m
}

/// All of a matrix of which the lower triangle is given.
fn whole(h: &Matrix) -> Matrix {
    let n = h.cols();
    Matrix::from_vec(n, n, (0..n * n).map(|i| h.row((i / n).max(i % n))[(i / n).min(i % n)]).collect())
}

#[test]
fn it_is_the_plain_method_on_rotated_matrices() {
    for (cols, bits, group) in
        [(96, Bits::Two, Group::Inputs(32)), (130, Bits::Three, Group::Row), (192, Bits::Two, Group::Inputs(64))]
    {
        let (w, h, n) = (with_outliers(70, cols, 1), hessian(cols, 500, 2), 500);
        let plain = LayerSettings::new(bits, group);
        let t = InputTransform::hadamard(cols, 7).unwrap();
        let (w_rotated, h_rotated) = (rotate(&t, &w), rotate(&t, &transposed(&rotate(&t, &whole(&h)))));
        for q in [&Rtn as &dyn Quantizer, &Gptq] {
            let found = run(q, &w, &h, n, &rotated(plain).into());
            let expected = run(q, &w_rotated, &h_rotated, n, &plain.into());
            let (found_base, expected_base) = (packed(&found).parts(), packed(&expected).parts());
            assert_eq!(found_base.codes[..], expected_base.codes[..], "{} {cols}", q.name());
            assert_eq!(found_base.scales[..], expected_base.scales[..]);
            assert_eq!(packed(&found).transform(), Some(&t));
            // Losses of one measure in both domains, and true of what is stored.
            let (a, b) = (found.proxy_loss.unwrap(), expected.proxy_loss.unwrap());
            assert!((a / b - 1.0).abs() < 2e-3, "{} {cols}: {a}, rotated {b}", q.name());
            assert!((found.relative_error / expected.relative_error - 1.0).abs() < 1e-4);
            assert_eq!(a, proxy_loss(cpu().as_ref(), &w, packed(&found), &h, n));
        }
    }
}

#[test]
fn rotation_pays_where_inputs_stand_out() {
    let (cols, n) = (320, 900);
    let (w, h) = (with_outliers(64, cols, 3), hessian(cols, n, 4));
    for bits in [Bits::Two, Bits::Three] {
        for q in [&Rtn as &dyn Quantizer, &Gptq, &Best] {
            let plain = LayerSettings::new(bits, Group::Inputs(64));
            let [before, after] = [plain, rotated(plain)].map(|s| run(q, &w, &h, n, &s.into()));
            let (before, after) = (before.proxy_loss.unwrap(), after.proxy_loss.unwrap());
            assert!(after < 0.6 * before, "{} {bits:?}: {before} to {after}", q.name());
        }
    }
}

/// A share of the weights, those that stand out among them.
fn mask(w: &Matrix) -> Arc<ElementMask> {
    let cols = w.cols();
    let kept =
        (0..w.rows() * cols).filter(|i| i / cols == 5 || (!(i / cols).is_multiple_of(3) && w.data()[*i].abs() > 12.0));
    Arc::new(ElementMask::from_indices(w.rows(), cols, kept).unwrap())
}

#[test]
fn kept_elements_lower_the_loss_and_are_exact_without_a_hessian() {
    let (cols, n) = (200, 700);
    let (w, h) = (with_outliers(40, cols, 5), hessian(cols, n, 6));
    let settings = rotated(LayerSettings::new(Bits::Two, Group::Inputs(128)));
    let plan = LayerPlan { settings, kept: Some(mask(&w)) };
    for q in [&Rtn as &dyn Quantizer, &Gptq] {
        let without = run(q, &w, &h, n, &settings.into());
        let with = run(q, &w, &h, n, &plan);
        assert_eq!(packed(&with).elements().unwrap().len(), plan.kept.as_ref().unwrap().len());
        let (before, after) = (without.proxy_loss.unwrap(), with.proxy_loss.unwrap());
        assert!(after < 0.8 * before, "{}: {before} to {after}", q.name());
    }
    let rounded = Rtn.quantize(cpu().as_ref(), &w, &LayerStats::default(), &plan).unwrap();
    let mask = plan.kept.as_ref().unwrap();
    for (r, c) in (0..w.rows()).flat_map(|r| mask.row(r).iter().map(move |&c| (r, c as usize))) {
        let (value, weight) = (packed(&rounded).value(r, c), w.row(r)[c]);
        assert!((value - weight).abs() <= 2e-3 * weight.abs().max(1.0), "({r}, {c}): {value}, {weight}");
    }
    // A row that is kept whole has nothing left to lose.
    let row: Vec<f32> = (0..cols).map(|c| packed(&rounded).value(5, c)).collect();
    assert!(row.iter().zip(w.row(5)).all(|(q, w)| (q - w).abs() < 2e-2));
}

#[test]
fn awkward_layers_are_quantized_all_the_same() {
    let n = 300;
    for cols in [1, 3, 33, 100] {
        let (w, mut h) = (normal(5, cols, 8), hessian(cols, n, 9));
        let dead = (cols > 3).then_some(cols / 2);
        if let Some(dead) = dead {
            (0..cols).for_each(|c| h.row_mut(dead.max(c))[dead.min(c)] = 0.0);
        }
        for q in [&Rtn as &dyn Quantizer, &Gptq, &Best] {
            let found = run(q, &w, &h, n, &rotated(LayerSettings::new(Bits::Four, Group::Inputs(32))).into());
            assert!(found.relative_error < 0.15, "{} {cols}: {}", q.name(), found.relative_error);
            if let (Some(dead), "gptq") = (dead, q.name()) {
                assert_eq!(found.notes, [Note::DeadColumns { count: 1 }]);
                // Its weights are not thrown away.
                let lost = (0..5).all(|r| (packed(&found).value(r, dead) - w.row(r)[dead]).abs() < 0.5);
                assert!(lost);
            }
        }
    }
    let empty = run(
        &Gptq,
        &Matrix::zeros(0, 64),
        &hessian(64, n, 1),
        n,
        &rotated(LayerSettings::new(Bits::Two, Group::Row)).into(),
    );
    assert_eq!((packed(&empty).rows(), empty.relative_error), (0, 0.0));
}

fn on_codebook(settings: LayerSettings) -> LayerSettings {
    LayerSettings {
        layout: Layout { symmetric: true, ..settings.layout },
        grid: GridKind::Codebook,
        ..rotated(settings)
    }
}

#[test]
fn a_codebook_beats_affine_grids_of_one_scale_a_row() {
    let (cols, n) = (512, 1200);
    let (w, h) = (with_outliers(64, cols, 12), hessian(cols, n, 13));
    for (bits, most) in [(Bits::Two, 0.9), (Bits::Three, 0.95), (Bits::Four, 1.0)] {
        for q in [&Rtn as &dyn Quantizer, &Gptq] {
            let affine = run(q, &w, &h, n, &rotated(LayerSettings::new(bits, Group::Row)).into());
            let found = run(q, &w, &h, n, &on_codebook(LayerSettings::new(bits, Group::Row)).into());
            let (before, after) = (affine.proxy_loss.unwrap(), found.proxy_loss.unwrap());
            assert!(after < most * before, "{} {bits:?}: {before} to {after}", q.name());
            let m = packed(&found);
            assert_eq!(m.bytes(), 64 * (cols * bits.count() as usize / 8 + 2) + (2 << bits.count()));
            let levels: Vec<f32> = m.levels().unwrap().iter().map(|l| l.to_f32()).collect();
            assert!(levels.windows(2).all(|l| l[0] < l[1]), "{levels:?}");
            assert_eq!(after, proxy_loss(cpu().as_ref(), &w, m, &h, n));
        }
    }
}

/// Error feedback through a codebook: every value is the nearest level to what the weight had become, and the loss is true.
#[test]
fn a_codebook_goes_through_error_feedback_in_groups_and_any_order() {
    let (cols, n) = (200, 700);
    let (w, h) = (normal(40, cols, 14), hessian(cols, n, 15));
    for group in [Group::Inputs(32), Group::Inputs(128), Group::Row] {
        for act_order in [false, true] {
            for clip in [Clip::None, Clip::Magnitude, Clip::Hessian] {
                let s = LayerSettings {
                    transform: None,
                    act_order,
                    clip,
                    ..on_codebook(LayerSettings::new(Bits::Three, group))
                };
                let plan = LayerPlan { settings: s, kept: Some(mask(&w)) };
                let found = run(&Gptq, &w, &h, n, &plan);
                let rounded = run(&Rtn, &w, &h, n, &plan);
                let (found_loss, rounded_loss) = (found.proxy_loss.unwrap(), rounded.proxy_loss.unwrap());
                assert!(found_loss < 0.8 * rounded_loss, "{group} {act_order} {clip:?}: {found_loss} {rounded_loss}");
                let measured = proxy_loss(cpu().as_ref(), &w, packed(&found), &h, n);
                assert!((found_loss / measured - 1.0).abs() < 5e-3, "{found_loss} {measured}");
            }
        }
    }
}

#[test]
fn codebooks_are_for_narrow_codes_without_zeros() {
    let (w, h) = (normal(8, 64, 1), hessian(64, 100, 2));
    let wide = run(&Gptq, &w, &h, 100, &on_codebook(LayerSettings::new(Bits::Eight, Group::Row)).into());
    assert!(packed(&wide).levels().is_none() && wide.relative_error < 0.01);
    let zeros = LayerSettings { grid: GridKind::Codebook, ..LayerSettings::new(Bits::Two, Group::Row) };
    let stats = LayerStats { hessian: Some(&h), n_tokens: 100, ..LayerStats::default() };
    let error = Gptq.quantize(cpu().as_ref(), &w, &stats, &zeros.into()).unwrap_err();
    assert!(matches!(error, QuantError::Settings(_)) && error.to_string().contains("symmetric"), "{error}");
    let symmetric = LayerSettings { transform: None, ..on_codebook(LayerSettings::new(Bits::Two, Group::Row)) };
    let error = Awq.quantize(cpu().as_ref(), &w, &stats, &symmetric.into()).unwrap_err();
    assert!(error.to_string().contains("codebook"), "{error}");
}

#[test]
fn six_bits_lie_between_four_and_eight() {
    let (w, h) = (normal(30, 100, 16), hessian(100, 400, 17));
    let error = |bits| run(&Gptq, &w, &h, 400, &LayerSettings::new(bits, Group::Inputs(64)).into()).relative_error;
    let [four, six, eight] = [Bits::Four, Bits::Six, Bits::Eight].map(error);
    assert!(six < 0.3 * four && eight < 0.3 * six, "{four} {six} {eight}");
}

#[test]
fn threads_change_no_bit() {
    let (w, h) = (with_outliers(150, 192, 10), hessian(192, 400, 11));
    for settings in [rotated, on_codebook].map(|with| with(LayerSettings::new(Bits::Two, Group::Inputs(64)))) {
        same_for_all_threads(&w, &h, &LayerPlan { settings, kept: Some(mask(&w)) });
    }
}

fn same_for_all_threads(w: &Matrix, h: &Matrix, plan: &LayerPlan) {
    let bytes = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let found = pool.install(|| run(&Gptq, w, h, 400, plan));
        let m = packed(&found);
        let elements = m.elements().unwrap().parts().values.to_vec();
        let levels = m.levels().map(<[half::f16]>::to_vec);
        (m.parts().codes.to_vec(), m.parts().scales.to_vec(), levels, elements, found.proxy_loss.unwrap().to_bits())
    };
    assert_eq!(bytes(1), bytes(3));
}

#[test]
fn methods_that_cannot_rotate_refuse_and_bad_blocks_are_refused() {
    let (w, h) = (normal(4, 64, 1), hessian(64, 100, 2));
    let settings = rotated(LayerSettings::new(Bits::Two, Group::Inputs(32)));
    let refused = |q: &dyn Quantizer, settings: LayerSettings| {
        let held_out = Some(HeldOut { hessian: &h, n_tokens: 100 });
        let stats =
            LayerStats { hessian: Some(&h), n_tokens: 100, square: Some(&w), held_out, ..LayerStats::default() };
        q.quantize(cpu().as_ref(), &w, &stats, &settings.into()).err()
    };
    for q in ALL.iter().filter(|q| !q.rotates() && q.name() != "half") {
        let aligned = q.name().starts_with("aligned").then(Default::default);
        let error = refused(*q, LayerSettings { aligned, ..settings });
        let message = error.map_or(String::new(), |e| e.to_string());
        assert!(message.contains(q.name()) && message.contains("transform"), "{}: {message}", q.name());
    }
    for block in [0, 3, 128] {
        let transform = Some(TransformSettings { block: Some(block), ..TransformSettings::hadamard(0) });
        let error = refused(&Gptq, LayerSettings { transform, ..settings }).unwrap();
        assert!(matches!(error, QuantError::Pack(_)), "{error}");
    }
}
