//! Selections by share and rank against sorting.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use tailorq_quant::allocate::{
    AllocateError, Grain, Saliency, SaliencyUnit, Swap, Threshold, TopShare, double_pointer, ends_and_top, top_blocks,
    top_per_block,
};

fn saliency(values: &[f32]) -> Saliency {
    Saliency { grain: Grain::Element, unit: SaliencyUnit::LossDelta, values: values.to_vec() }
}

fn threshold(layers: &[Saliency], k: u64) -> Result<Threshold, AllocateError> {
    let mut first = TopShare::default();
    layers.iter().try_for_each(|s| first.add(s))?;
    let mut second = first.refine(k)?;
    layers.iter().try_for_each(|s| second.add(s))?;
    second.threshold()
}

/// The `k` largest of all by a stable sort.
fn sorted(all: &[f32], k: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..all.len()).collect();
    places.sort_by(|&a, &b| all[b].partial_cmp(&all[a]).unwrap());
    places.truncate(k);
    places.sort_unstable();
    places
}

/// Many equal scores, both zeros, negatives, subnormals, and neighbours that differ in the last bits only.
fn score() -> impl Strategy<Value = f32> {
    let finite = any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |x| x.is_finite());
    let near = (0u32..70_000).prop_map(|i| f32::from_bits(0x3f80_0000 + i));
    let few = prop::sample::select(vec![0.0, -0.0, 1.0, -1.0, 1e-42, -1e-42, f32::MAX, f32::MIN]);
    prop_oneof![finite, near, few]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_top_share_is_that_of_a_sort(
        layers in prop::collection::vec(prop::collection::vec(score(), 0..60), 1..6), share in 0.0f64..=1.0,
    ) {
        let all = layers.concat();
        let k = (share * all.len() as f64).floor() as usize;
        let layers: Vec<Saliency> = layers.iter().map(|l| saliency(l)).collect();
        let mut threshold = threshold(&layers, k as u64).unwrap();
        let (mut selected, mut first) = (Vec::new(), 0);
        if k > 0 {
            let mut falling = all.clone();
            falling.sort_by(|a, b| b.partial_cmp(a).unwrap());
            prop_assert_eq!(threshold.score(), Some(falling[k - 1] + 0.0));
        }
        for layer in &layers {
            threshold.select(layer, &mut |i| selected.push(first + i));
            first += layer.values.len();
        }
        prop_assert_eq!(selected, sorted(&all, k));
    }

    #[test]
    fn the_top_of_blocks_is_that_of_sorts(scores in prop::collection::vec(score(), 0..100), block in 1usize..20, k in 0usize..20) {
        let flags = top_per_block(&saliency(&scores), block, k).unwrap();
        let expected = scores.chunks(block).flat_map(|chunk| {
            let top = sorted(chunk, k);
            (0..chunk.len()).map(move |i| top.contains(&i))
        });
        prop_assert_eq!(flags, expected.collect::<Vec<_>>());
    }

    #[test]
    fn swaps_keep_the_mean_and_the_objective_decides(
        scores in prop::collection::vec(-9i32..9, 1..12), wanted in 0usize..7, first in 0usize..2,
    ) {
        let scores: Vec<f64> = scores.into_iter().map(f64::from).collect();
        let count = |swaps: &[Swap], kind| swaps.iter().filter(|&&s| s == kind).count();
        let mut objective = |swaps: &[Swap]| -> Result<f64, AllocateError> {
            Ok((count(swaps, Swap::Up) as f64 - wanted as f64).abs())
        };
        let (swaps, value) = double_pointer(&scores, first, &mut objective).unwrap();
        let n_swaps = count(&swaps, Swap::Up);
        prop_assert_eq!(n_swaps, count(&swaps, Swap::Down));
        prop_assert_eq!(n_swaps, wanted.max(first).min(scores.len() / 2));
        prop_assert_eq!(value, (n_swaps as f64 - wanted as f64).abs());
        let of = |kind| scores.iter().zip(&swaps).filter(move |(_, s)| **s == kind).map(|(x, _)| *x);
        let others = of(Swap::Keep).chain(of(Swap::Down)).fold(f64::NEG_INFINITY, f64::max);
        prop_assert!(of(Swap::Up).all(|x| x >= others));
        let others = of(Swap::Keep).chain(of(Swap::Up)).fold(f64::INFINITY, f64::min);
        prop_assert!(of(Swap::Down).all(|x| x <= others));
    }
}

#[test]
fn the_top_share_refuses_what_it_cannot_compare() {
    let relative = Saliency { unit: SaliencyUnit::Relative, ..saliency(&[1.0]) };
    let error = TopShare::default().add(&relative).unwrap_err().to_string();
    assert!(error.contains("compares across layers"), "{error}");
    let error = TopShare::default().add(&saliency(&[1.0, f32::NAN])).unwrap_err().to_string();
    assert!(error.contains("score 1 is NaN"), "{error}");
    assert!(matches!(threshold(&[saliency(&[1.0])], 2), Err(AllocateError::Settings(_))));
    let mut first = TopShare::default();
    first.add(&saliency(&[1.0, 2.0, 3.0])).unwrap();
    assert_eq!((first.n_scores(), first.count_of(0.7).unwrap()), (3, 2));
    assert!(first.count_of(1.1).is_err() && first.count_of(f64::NAN).is_err());
    for other in [[1.0, 2.0, 9.0].as_slice(), &[1.0, 2.0]] {
        let mut second = first.clone().refine(1).unwrap();
        second.add(&saliency(other)).unwrap();
        assert!(matches!(second.threshold(), Err(AllocateError::PassesDiffer { .. })));
    }
}

#[test]
fn blocks_by_share_and_beside_the_ends() {
    let flags = |bits: &str| bits.chars().map(|c| c == '1').collect::<Vec<_>>();
    assert_eq!(top_blocks(&[3.0, 1.0, 3.0, 2.0, 0.0], 0.25).unwrap(), flags("10100"));
    assert_eq!(top_blocks(&[1.0; 5], 0.25).unwrap(), flags("11000"));
    assert_eq!(top_blocks(&[1.0; 100], 0.07).unwrap().iter().filter(|&&x| x).count(), 7);
    assert_eq!(top_blocks(&[], 0.25).unwrap(), flags(""));
    assert!(top_blocks(&[1.0], 1.5).is_err() && top_blocks(&[f64::NAN], 0.5).is_err());
    assert_eq!(ends_and_top(&[9.0, 0.0, 1.0, 4.0, 4.0, 5.0, 0.0, 0.0], 2, 2).unwrap(), flags("11010111"));
    assert_eq!(ends_and_top(&[0.0; 3], 2, 8).unwrap(), flags("111"));
    assert_eq!(ends_and_top(&[0.0; 9], 0, 1).unwrap(), flags("100000000"));
    assert!(ends_and_top(&[f64::INFINITY], 2, 8).is_err());
}

#[test]
fn objectives_may_fail_and_must_be_finite() {
    let mut fails = |_: &[Swap]| -> Result<f64, AllocateError> { Err(AllocateError::Settings("no".into())) };
    assert_eq!(double_pointer(&[1.0, 2.0], 1, &mut fails), Err(AllocateError::Settings("no".into())));
    let mut nan = |_: &[Swap]| -> Result<f64, AllocateError> { Ok(f64::NAN) };
    assert!(matches!(double_pointer(&[1.0, 2.0], 1, &mut nan), Err(AllocateError::ScoreNotFinite { .. })));
    assert!(top_per_block(&saliency(&[1.0]), 0, 1).is_err());
    assert!(top_per_block(&saliency(&[f32::INFINITY]), 4, 1).is_err());
}
