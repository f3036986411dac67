//! Grids: what is stored is what errors are measured on, and the clip search finds the best of its candidates.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use half::f16;
use proptest::prelude::*;
use tailorq_quant::Clip;
use tailorq_quant::quantize::{ClipSearch, Grid, GridRule};
use tailorq_tensor::{Bits, Group, Layout, Rng, ScaleBits};

/// With scales of 16 bits.
fn rule(bits: Bits, symmetric: bool) -> GridRule {
    GridRule::new(Layout { symmetric, ..Layout::new(bits, Group::Row) }, Clip::None)
}

fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| rng.normal() * 0.02).collect()
}

/// `sum importance |w - q|^norm` in f64.
fn penalty(grid: Grid, bits: Bits, weights: &[f32], importance: &[f32], norm: f32) -> f64 {
    let error = |w: f32| f64::from((w - grid.value(grid.code(bits, w))).abs());
    weights.iter().zip(importance).map(|(&w, &i)| f64::from(i) * error(w).powf(f64::from(norm))).sum()
}

/// The grid for a share of the range, written down again from the rule in the paper's code with an f16 scale.
fn shrunken(rule: GridRule, weights: &[f32], shrink: f32) -> Grid {
    let mut high = weights.iter().fold(0.0f32, |m, w| m.max(*w));
    let mut low = weights.iter().fold(0.0f32, |m, w| m.min(*w));
    if rule.symmetric {
        high = high.max(-low);
        low = -high;
    }
    let max_code = f32::from(rule.bits.max_code());
    let scale = f16::from_f32(shrink * (high - low) / max_code);
    let scale = match rule.scales {
        ScaleBits::Sixteen => scale,
        ScaleBits::Eight => {
            // The whole range has the next one, others have the nearest.
            let distance = |s: &f16| (s.to_f64() - scale.to_f64()).abs();
            let mut all = (1..248).map(ScaleBits::of_byte);
            match shrink == 1.0 {
                true => all.find(|s| *s >= scale).unwrap(),
                false => all.rev().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap(),
            }
        }
    };
    let zero = (-low * shrink / scale.to_f32()).round_ties_even().clamp(0.0, max_code) as u8;
    Grid { scale, zero: if rule.symmetric { rule.bits.middle() } else { zero } }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn codes_are_nearest(
        bits in prop::sample::select(Bits::ALL.to_vec()),
        symmetric: bool,
        weights in prop::collection::vec(-4.0f32..4.0, 1..70),
        clipped: bool,
        scales in prop::sample::select(ScaleBits::ALL.to_vec()),
    ) {
        let clip = clipped.then(ClipSearch::default);
        let grid = GridRule { clip, scales, ..rule(bits, symmetric) }.fit(&weights, None).unwrap();
        prop_assert!(scales == ScaleBits::Sixteen || ScaleBits::byte(grid.scale).is_some());
        prop_assert!(grid.scale.is_finite() && grid.scale.to_f32() >= 0.0);
        prop_assert!(grid.zero <= bits.max_code());
        prop_assert_eq!(grid.value(grid.zero), 0.0);
        for &w in &weights {
            let code = grid.code(bits, w);
            prop_assert!(code <= bits.max_code());
            let error = f64::from(w) - f64::from(grid.value(code));
            let best = (0..=bits.max_code())
                .map(|c| (f64::from(w) - f64::from(grid.value(c))).abs())
                .fold(f64::INFINITY, f64::min);
            // Dividing by multiplying with the inverse may decide a tie the other way.
            prop_assert!(error.abs() <= best * (1.0 + 1e-5) + 1e-9, "{w}: {} against {best}", error.abs());
        }
    }

    #[test]
    fn clip_search_finds_the_best_candidate(
        bits in prop::sample::select(Bits::ALL.to_vec()),
        symmetric: bool,
        n in 1usize..200,
        seed: u64,
        weighted: bool,
        norm in prop::sample::select(vec![2.0f32, 2.4, 3.0]),
        scales in prop::sample::select(ScaleBits::ALL.to_vec()),
    ) {
        let weights = normal(n, seed);
        let mut rng = Rng::new(!seed);
        let importance: Vec<f32> = (0..n).map(|_| if weighted { rng.uniform() as f32 } else { 1.0 }).collect();
        let plain = GridRule { scales, ..rule(bits, symmetric) };
        let clip = ClipSearch { norm, ..ClipSearch::default() };
        let grid = GridRule { clip: Some(clip), ..plain }.fit(&weights, weighted.then_some(&importance[..])).unwrap();
        let found = penalty(grid, bits, &weights, &importance, norm);
        let best = (0..80)
            .map(|i| penalty(shrunken(plain, &weights, 1.0 - i as f32 / 100.0), bits, &weights, &importance, norm))
            .fold(f64::INFINITY, f64::min);
        let full = penalty(plain.fit(&weights, None).unwrap(), bits, &weights, &importance, norm);
        prop_assert!(found <= full * (1.0 + 5e-4) + 1e-18, "worse than no clipping: {found} against {full}");
        prop_assert!(found <= best * (1.0 + 5e-4) + 1e-18, "{found} against {best}");
    }
}

#[test]
fn extremes_set_the_range() {
    let grid = rule(Bits::Two, false).fit(&[-1.0, 0.25, 2.0], None).unwrap();
    assert_eq!(grid, Grid { scale: f16::from_f32(1.0), zero: 1 });
    // The range always contains 0.
    let grid = rule(Bits::Two, false).fit(&[1.5, 2.0, 3.0], None).unwrap();
    assert_eq!(grid, Grid { scale: f16::from_f32(1.0), zero: 0 });
    let grid = rule(Bits::Two, false).fit(&[-3.0, -2.0], None).unwrap();
    assert_eq!(grid, Grid { scale: f16::from_f32(1.0), zero: 3 });
    let grid = rule(Bits::Two, true).fit(&[-1.5, 0.5], None).unwrap();
    assert_eq!(grid, Grid { scale: f16::from_f32(1.0), zero: 2 });
}

#[test]
fn eight_bit_scales_of_whole_ranges_are_rounded_up() {
    for bits in Bits::ALL {
        let fine = rule(bits, false);
        let coarse = GridRule { scales: ScaleBits::Eight, ..fine };
        for seed in 0..50 {
            let weights = normal(64, seed);
            let [fine, coarse] = [fine, coarse].map(|r| r.fit(&weights, None).unwrap().scale.to_f32());
            // The next that is stored: an eighth of its power of two at most.
            assert!(coarse >= fine && coarse <= fine * 1.1251 + 2f32.powi(-17), "{coarse}, {fine}");
        }
    }
}

/// With the search for the range the error is about that of scales of 16 bits, without it a tenth more.
#[test]
fn eight_bit_scales_cost_little_error() {
    let search = Some(ClipSearch::default());
    for (bits, clip, range) in [
        (Bits::Two, search, 0.97..1.0),
        (Bits::Three, search, 0.99..1.02),
        (Bits::Four, search, 1.01..1.05),
        (Bits::Six, None, 1.05..1.12),
        (Bits::Eight, None, 1.05..1.12),
    ] {
        for group in [64, 128] {
            let energy = |scales| -> f64 {
                let rule = GridRule { clip, scales, ..rule(bits, false) };
                let of_group = |seed| {
                    // Groups of all sizes within a power of two, which scales round differently.
                    let size = (seed as f32 / 2000.0).exp2();
                    let weights: Vec<f32> = normal(group, seed).into_iter().map(|w| w * size).collect();
                    let error = penalty(rule.fit(&weights, None).unwrap(), bits, &weights, &vec![1.0; group], 2.0);
                    error / f64::from(size * size)
                };
                (0..2000).map(of_group).sum()
            };
            let ratio = energy(ScaleBits::Eight) / energy(ScaleBits::Sixteen);
            println!("{bits:?}, group {group}: {:+.2} %", 100.0 * (ratio - 1.0));
            assert!(range.contains(&ratio), "{bits:?}, group {group}: {ratio}");
        }
    }
}

#[test]
fn clipping_pays_at_few_bits() {
    let weights = normal(128, 3);
    let ones = vec![1.0; 128];
    let plain = rule(Bits::Two, false).fit(&weights, None).unwrap();
    let clipped = GridRule { clip: Some(ClipSearch::default()), ..rule(Bits::Two, false) }.fit(&weights, None).unwrap();
    let [before, after] = [plain, clipped].map(|g| penalty(g, Bits::Two, &weights, &ones, 2.4));
    assert!(after < 0.8 * before, "{after} against {before}");
}

#[test]
fn importance_moves_the_grid() {
    // One outlier that does not matter: the search gives it up for the others.
    let mut weights = normal(64, 9);
    weights[17] = 0.3;
    let mut importance = vec![1.0; 64];
    importance[17] = 0.0;
    let rule = GridRule { clip: Some(ClipSearch::default()), ..rule(Bits::Three, false) };
    let heeded = rule.fit(&weights, None).unwrap();
    let ignored = rule.fit(&weights, Some(&importance)).unwrap();
    assert!(ignored.scale < heeded.scale, "{} against {}", ignored.scale, heeded.scale);
}

#[test]
fn zeros_need_no_scale() {
    for bits in Bits::ALL {
        for symmetric in [false, true] {
            let fitted = GridRule { clip: Some(ClipSearch::default()), ..rule(bits, symmetric) };
            let grid = fitted.fit(&[0.0, -0.0, 0.0], None).unwrap();
            assert_eq!(grid.scale, f16::ZERO);
            assert_eq!(grid.code(bits, 0.0), grid.zero);
            // A weight that arrives later (spread errors) still becomes the code of zero.
            assert_eq!(grid.code(bits, 7.0), grid.zero);
        }
    }
}

#[test]
fn tiny_weights_keep_a_scale() {
    for clip in [None, Some(ClipSearch::default())] {
        let grid = GridRule { clip, ..rule(Bits::Three, false) }.fit(&[1e-9, -1e-9, 1e-30], None).unwrap();
        assert_eq!(grid.scale, f16::from_bits(1));
        assert_eq!(grid.value(grid.code(Bits::Three, 1e-9)), 0.0);
        let smallest = f16::from_bits(1).to_f32();
        assert_eq!(grid.value(grid.code(Bits::Three, smallest)), smallest);
    }
}

#[test]
fn scales_of_eight_bits_have_an_end() {
    let rule = GridRule { scales: ScaleBits::Eight, ..rule(Bits::Two, false) };
    assert_eq!(rule.fit(&[-1e4, 1.6e5], None).unwrap().scale.to_f32(), 57344.0);
    let overflow = rule.fit(&[-1e4, 1.8e5], None).unwrap_err();
    assert!((63e3..64e3).contains(&overflow.scale), "{}", overflow.scale);
    // The smallest holds what is smaller still.
    assert_eq!(rule.fit(&[1e-9, -1e-9], None).unwrap().scale.to_f32(), 2f32.powi(-17));
}

#[test]
fn huge_weights_are_refused() {
    let overflow = rule(Bits::Two, false).fit(&[-2e5, 2e5], None).unwrap_err();
    assert!(overflow.scale > 65504.0);
    // The same range fits with more codes, and an overflowing range is caught as well.
    assert!(rule(Bits::Eight, false).fit(&[-2e5, 2e5], None).is_ok());
    assert!(rule(Bits::Eight, true).fit(&[-3e38, 3e38], None).unwrap_err().scale.is_infinite());
}
