//! Allocators against brute force, and the promises that all of them keep.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use tailorq_quant::allocate::{
    ALL, AllocateError, Allocation, Allocator, Candidate, DepthOnly, FormatDamage, Fusion, Grain, Hull, Knapsack,
    Random, Ranked, Saliency, SaliencyUnit, Unit, UnitId, find, fuse, units_of,
};
use tailorq_tensor::{InputGroup, LayerId, Rng, Slot};

fn layer(i: usize) -> LayerId {
    LayerId { block_idx: i / 7, slot: Slot::ALL[i % 7] }
}

/// Units with costs and whole-numbered damages, so that sums are exact.
fn units(table: &[Vec<(u64, u32)>]) -> Vec<Unit> {
    let unit = |(i, row): (usize, &Vec<(u64, u32)>)| {
        let candidate = |(format, &(cost_bytes, damage)): (usize, &(u64, u32))| Candidate {
            format,
            cost_bytes,
            damage: f64::from(damage),
        };
        Unit { id: UnitId::Layer(layer(i)), candidates: row.iter().enumerate().map(candidate).collect() }
    };
    table.iter().enumerate().map(unit).collect()
}

fn any_units(n: usize) -> impl Strategy<Value = Vec<Unit>> {
    let row = prop::collection::vec((0u64..40, 0u32..60), 1..=4);
    prop::collection::vec(row, 1..=n).prop_map(|table| units(&table))
}

/// Damages that fall with the bytes, as those of widths do, where hulls matter most.
fn falling_units(n: usize) -> impl Strategy<Value = Vec<Unit>> {
    let row = prop::collection::vec((1u64..20, 0u32..30), 2..=4);
    prop::collection::vec(row, 1..=n).prop_map(|table| {
        let sums = |row: Vec<(u64, u32)>| {
            let total: u32 = row.iter().map(|r| r.1).sum();
            let sum = |(cost, damage): &mut (u64, u32), r: &(u64, u32)| {
                (*cost, *damage) = (*cost + r.0, *damage - r.1);
                Some((*cost, *damage))
            };
            row.iter().scan((0, total), sum).collect()
        };
        units(&table.into_iter().map(sums).collect::<Vec<_>>())
    })
}

fn least_cost(units: &[Unit]) -> u64 {
    units.iter().map(|u| u.candidates.iter().map(|c| c.cost_bytes).min().unwrap()).sum()
}

/// The least damage within the budget, and the least bytes with it, over all plans.
fn brute_force(units: &[Unit], budget: u64) -> Option<(f64, u64)> {
    let mut plans = vec![(0.0, 0u64)];
    for unit in units {
        let extend = |(d, c): (f64, u64)| unit.candidates.iter().map(move |x| (d + x.damage, c + x.cost_bytes));
        plans = plans.into_iter().flat_map(extend).collect();
    }
    plans.retain(|p| p.1 <= budget);
    plans.into_iter().min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)))
}

fn chosen<'a>(units: &'a [Unit], plan: &Allocation) -> Vec<&'a Candidate> {
    units.iter().zip(&plan.chosen).map(|(u, &i)| &u.candidates[i]).collect()
}

fn check_sums(units: &[Unit], plan: &Allocation) {
    let chosen = chosen(units, plan);
    assert_eq!(plan.cost_bytes, chosen.iter().map(|c| c.cost_bytes).sum::<u64>());
    assert_eq!(plan.damage, chosen.iter().map(|c| c.damage).sum::<f64>());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn never_over_budget_and_never_worse_with_more(units in prop_oneof![any_units(9), falling_units(9)]) {
        let least = least_cost(&units);
        for allocator in ALL {
            let mut damage = f64::INFINITY;
            for budget in least..least + 120 {
                let plan = allocator.allocate(&units, budget).unwrap();
                check_sums(&units, &plan);
                prop_assert!(plan.cost_bytes <= budget, "{} at {budget}", allocator.name());
                prop_assert!(plan.damage <= damage, "{} at {budget}: {} > {damage}", allocator.name(), plan.damage);
                damage = plan.damage;
            }
            if least > 0 {
                let error = allocator.allocate(&units, least - 1).unwrap_err();
                prop_assert_eq!(error, AllocateError::Impossible { least, budget: least - 1 });
            }
        }
    }

    #[test]
    fn the_knapsack_is_exact(units in prop_oneof![any_units(6), falling_units(6)], extra in 0u64..150) {
        let budget = least_cost(&units) + extra;
        let plan = Knapsack.allocate(&units, budget).unwrap();
        prop_assert_eq!(Some((plan.damage, plan.cost_bytes)), brute_force(&units, budget));
    }

    #[test]
    fn the_hull_is_optimal_at_its_own_size_and_the_fill_only_helps(units in falling_units(6), extra in 0u64..150) {
        let budget = least_cost(&units) + extra;
        let bare = Hull { fill: false }.allocate(&units, budget).unwrap();
        prop_assert_eq!(bare.damage, brute_force(&units, bare.cost_bytes).unwrap().0);
        let filled = Hull { fill: true }.allocate(&units, budget).unwrap();
        prop_assert!(filled.damage <= bare.damage);
        // One step more of the hull would be above the budget: the optimum lies between.
        prop_assert!(brute_force(&units, budget).unwrap().0 <= filled.damage);
    }

    #[test]
    fn plans_nest(units in prop_oneof![any_units(9), falling_units(9)], seed in 0u64..5) {
        let least = least_cost(&units);
        let nesting: [&dyn Allocator; 3] = [&Hull { fill: false }, &DepthOnly, &Random { seed }];
        for allocator in nesting {
            let mut last: Option<Allocation> = None;
            for budget in least..least + 120 {
                let plan = allocator.allocate(&units, budget).unwrap();
                if let Some(last) = last {
                    let pairs = chosen(&units, &last).into_iter().zip(chosen(&units, &plan));
                    pairs.for_each(|(a, b)| assert!(a.cost_bytes <= b.cost_bytes && a.damage >= b.damage));
                }
                last = Some(plan);
            }
        }
    }

    #[test]
    fn the_order_of_units_and_candidates_does_not_matter(
        units in prop_oneof![any_units(9), falling_units(9)], extra in 0u64..150, seed in 0u64..1000,
    ) {
        let budget = least_cost(&units) + extra;
        let mut rng = Rng::new(seed);
        let mut shuffled = units.clone();
        rng.shuffle(&mut shuffled);
        shuffled.iter_mut().for_each(|u| rng.shuffle(&mut u.candidates));
        for allocator in ALL {
            let plan = |units: &[Unit]| {
                let plan = allocator.allocate(units, budget).unwrap();
                let mut formats: Vec<_> =
                    units.iter().zip(chosen(units, &plan)).map(|(u, c)| (u.id, c.format)).collect();
                formats.sort();
                formats
            };
            prop_assert_eq!(plan(&units), plan(&shuffled), "{}", allocator.name());
        }
    }

    #[test]
    fn fusing_keeps_sums(units in falling_units(21), extra in 0u64..300) {
        for fusion in [Fusion::SharedInput, Fusion::Block] {
            let common: Vec<Unit> = units.iter().map(|u| Unit { candidates: u.candidates[..2].to_vec(), ..*u }).collect();
            let fused = fuse(&common, fusion).unwrap();
            prop_assert_eq!(least_cost(&fused), least_cost(&common));
            let plan = Knapsack.allocate(&fused, least_cost(&common) + extra).unwrap();
            let format = |id: LayerId| {
                let at = fused.iter().position(|u| u.id.contains(id)).unwrap();
                fused[at].candidates[plan.chosen[at]].format
            };
            let layers = common.iter().enumerate().map(|(i, u)| &u.candidates[format(layer(i))]);
            prop_assert_eq!(layers.clone().map(|c| c.cost_bytes).sum::<u64>(), plan.cost_bytes);
            prop_assert_eq!(layers.map(|c| c.damage).sum::<f64>(), plan.damage);
        }
    }
}

/// Sizes and shapes of layers as in 80 blocks of a 70B model, damages as sensitivities over four orders of magnitude.
fn large(fusion: Option<Fusion>) -> Vec<Unit> {
    let mut rng = Rng::new(3);
    let shapes = [8192 * 8192, 1024 * 8192, 1024 * 8192, 8192 * 8192, 28672 * 8192, 28672 * 8192, 8192 * 28672];
    let unit = |i: usize| {
        let weights = shapes[i % 7] as f64;
        let sensitivity = weights.powf(0.9) * f64::from(rng.normal()).exp();
        let candidate = |bits: usize| Candidate {
            format: bits,
            // Scales of f16 and zeros in groups of 128, as packed layouts have.
            cost_bytes: shapes[i % 7] / 8 * bits as u64 + shapes[i % 7] / 128 * 2 + shapes[i % 7] / 1024 * bits as u64,
            damage: sensitivity * 4f64.powi(-(bits as i32)),
        };
        Unit { id: UnitId::Layer(layer(i)), candidates: [2, 3, 4, 8].map(candidate).to_vec() }
    };
    let layers: Vec<Unit> = (0..560).map(unit).collect();
    fusion.map_or(layers.clone(), |fusion| fuse(&layers, fusion).unwrap())
}

#[test]
fn the_knapsack_takes_models_of_any_size() {
    for fusion in [None, Some(Fusion::SharedInput), Some(Fusion::Block)] {
        let units = large(fusion);
        for percent in [101, 110, 125, 137, 150, 200, 300] {
            let budget = least_cost(&units) * percent / 100;
            let exact = Knapsack.allocate(&units, budget).unwrap();
            let hull = Hull { fill: true }.allocate(&units, budget).unwrap();
            assert!(exact.cost_bytes <= budget && exact.damage <= hull.damage);
            // The hull is near: its distance is bounded by one step, of which there are hundreds.
            assert!(hull.damage <= exact.damage * 1.05, "{percent} %: {} {}", hull.damage, exact.damage);
        }
    }
}

/// Costs without a common measure: partial plans cannot share sums, so that bounds alone keep the search small.
#[test]
fn the_knapsack_needs_no_common_measure() {
    let mut units = large(None);
    let mut rng = Rng::new(9);
    for candidate in units.iter_mut().flat_map(|u| &mut u.candidates) {
        candidate.cost_bytes += rng.below(10_007) as u64;
    }
    for percent in [104, 125, 170] {
        let budget = least_cost(&units) * percent / 100;
        let exact = Knapsack.allocate(&units, budget).unwrap();
        let hull = Hull { fill: true }.allocate(&units, budget).unwrap();
        assert!(exact.cost_bytes <= budget && exact.damage <= hull.damage);
    }
}

/// Damages that fall by as much as the bytes rise leave nothing but filling the budget, which the exact plan does to the byte.
#[test]
fn the_knapsack_fills_a_budget_where_all_bytes_are_worth_the_same() {
    let shapes: [u64; 7] = [331_776, 110_592, 110_592, 331_776, 884_736, 884_736, 884_736];
    let unit = |i: usize| {
        let candidate = |bits: u64| {
            let cost_bytes = shapes[i % 7] / 8 * bits + shapes[i % 7] / 128 * 2 + 96 * bits;
            Candidate { format: bits as usize, cost_bytes, damage: 1e9 - cost_bytes as f64 }
        };
        Unit { id: UnitId::Layer(layer(i)), candidates: [2, 3, 4, 8].map(candidate).to_vec() }
    };
    let units: Vec<Unit> = (0..70).map(unit).collect();
    let budget = least_cost(&units) * 3 / 2 / 96 * 96;
    assert_eq!(Knapsack.allocate(&units, budget).unwrap().cost_bytes, budget);
}

#[test]
fn depth_only_protects_the_ends_first() {
    let table: Vec<_> = (0..6).map(|_| vec![(2, 9), (3, 4), (4, 1)]).collect();
    let mut blocks = units(&table);
    blocks.iter_mut().enumerate().for_each(|(b, unit)| unit.id = UnitId::Block(b));
    let plan = |budget| DepthOnly.allocate(&blocks, budget).unwrap().chosen;
    assert_eq!(plan(12), [0; 6]);
    assert_eq!(plan(15), [1, 1, 0, 0, 0, 1]);
    assert_eq!(plan(19), [2, 1, 1, 1, 1, 1]);
    assert_eq!(plan(100), [2; 6]);
    let order: Vec<UnitId> = [3, 1, 0, 2, 5, 4].map(UnitId::Block).to_vec();
    assert_eq!(Ranked { order: order.clone() }.allocate(&blocks, 14).unwrap().chosen, [0, 1, 0, 1, 0, 0]);
    let twice = Ranked { order: [&order[..5], &order[..1]].concat() };
    assert!(matches!(twice.allocate(&blocks, 14), Err(AllocateError::Settings(_))));
    assert!(matches!(Ranked { order: vec![] }.allocate(&blocks, 14), Err(AllocateError::Settings(_))));
}

#[test]
fn random_plans_follow_the_seed() {
    let units = units(&vec![vec![(2, 9), (3, 4)]; 40]);
    let plan = |seed| Random { seed }.allocate(&units, 100).unwrap().chosen;
    assert_eq!(plan(1), plan(1));
    assert_ne!(plan(1), plan(2));
    assert_eq!(plan(1).iter().sum::<usize>(), 20);
}

#[test]
fn unfit_units_are_refused() {
    let good = units(&[vec![(2, 9), (3, 4)], vec![(1, 1)]]);
    let spoilt = |spoil: &dyn Fn(&mut Vec<Unit>)| {
        let mut units = good.clone();
        spoil(&mut units);
        let errors: Vec<AllocateError> = ALL.iter().map(|a| a.allocate(&units, 100).unwrap_err()).collect();
        assert!(errors.windows(2).all(|pair| pair[0].to_string() == pair[1].to_string()));
        errors[0].to_string()
    };
    assert!(spoilt(&|u| u[1].candidates.clear()).contains("block 0 k has no candidate"));
    assert!(spoilt(&|u| u[1].id = u[0].id).contains("block 0 q is listed twice"));
    assert!(spoilt(&|u| u[0].candidates[1].format = 0).contains("format 0 twice"));
    assert!(spoilt(&|u| u[0].candidates[1].damage = f64::NAN).contains("NaN"));
    assert!(spoilt(&|u| u.iter_mut().for_each(|u| u.candidates[0].cost_bytes = u64::MAX / 2)).contains("2^63"));
    let none: &[Unit] = &[];
    assert!(ALL.iter().all(|a| a.allocate(none, 0).unwrap().chosen.is_empty()));
    assert!(ALL.iter().all(|a| find(a.name()).unwrap().name() == a.name()));
}

#[test]
fn fusing_takes_common_formats_and_single_layers() {
    let mut all = units(&vec![vec![(2, 9), (3, 4)]; 14]);
    let ids: Vec<UnitId> = fuse(&all, Fusion::SharedInput).unwrap().iter().map(|u| u.id).collect();
    let fused = |b| {
        let single = |slot| UnitId::Layer(LayerId { block_idx: b, slot });
        let group = |g| UnitId::Fused(b, g);
        [group(InputGroup::Attention), single(Slot::O), group(InputGroup::Mlp), single(Slot::Down)]
    };
    assert_eq!(ids, [fused(0), fused(1)].concat());
    all[1].candidates.remove(0);
    let q_k_v = &fuse(&all, Fusion::SharedInput).unwrap()[0];
    assert_eq!(q_k_v.candidates, [Candidate { format: 1, cost_bytes: 9, damage: 12.0 }]);
    all[2].candidates.remove(1);
    let error = fuse(&all, Fusion::SharedInput).unwrap_err().to_string();
    assert!(error.contains("block 0 q+k+v"), "{error}");
    all[0].id = UnitId::Block(0);
    assert!(matches!(fuse(&all, Fusion::Block), Err(AllocateError::NotALayer { .. })));
}

#[test]
fn damages_must_be_changes_of_a_loss() {
    let ids = [UnitId::Block(0), UnitId::Block(1)];
    let saliency = |grain, unit| Saliency { grain, unit, values: vec![1.0, 2.0] };
    let made = |damages: &Saliency, costs: &[u64]| units_of(&ids, &[FormatDamage { format: 4, costs, damages }]);
    let units = made(&saliency(Grain::Block, SaliencyUnit::LossDelta), &[5, 6]).unwrap();
    assert_eq!(units[1].candidates, [Candidate { format: 4, cost_bytes: 6, damage: 2.0 }]);
    let relative = made(&saliency(Grain::Block, SaliencyUnit::Relative), &[5, 6]).unwrap_err();
    assert!(relative.to_string().contains("relative to their own layer"));
    assert!(made(&saliency(Grain::Tile, SaliencyUnit::LossDelta), &[5, 6]).is_err());
    assert!(made(&saliency(Grain::Block, SaliencyUnit::LossDelta), &[5]).is_err());
}
