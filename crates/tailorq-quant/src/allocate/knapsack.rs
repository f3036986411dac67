//! The multiple-choice knapsack, exactly.
//!
//! Dynamic programming over partial plans, of which only those are kept that no other of the same units undercuts in
//! both bytes and damage and whose bound leaves hope (Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack
//! problem"; Dyer, Riha and Walker 1995). The bound is the Lagrangian at the slope of the hull's first step that does not
//! fit: there, a plan's damage exceeds the unattainable optimum by the sum over units of the *regret*, how far
//! `damage + slope * bytes` of its choice is above the unit's best, plus `slope` times the bytes it leaves. The hull's own
//! plan is only a little above that optimum, so any partial plan whose regrets exceed the difference is dropped, and units
//! all of whose other choices do so never branch.

use super::hull::{Descent, Step, best_fill, steps};
use super::units::{Front, Point, allocation, fronts};
use super::{AllocateError, Allocation, Allocator, Unit};

/// Partial plans held at most: 40 bytes for each that one unit adds, and 16 for each kept, over all units.
const MOST_PLANS: usize = 1 << 23;

/// Room for rounding in bounds, which must not drop the best plan: relative to the bound, and to the damages in it.
const SLACK: [f64; 2] = [1e-9, 1e-15];

/// The plan of least total damage within the budget, and of least bytes among those: exact, no cost is rounded.
///
/// `O(n s log s)` for `n` candidates and `s` partial plans at once, of which there are at most as many as distinct sums of
/// costs. The bound leaves few of them: 80 blocks or 560 layers with 4 candidates take a millisecond or two, and about a
/// second where damages are proportional to costs, so that no choice is better than another and only filling the budget
/// counts. If costs have no common measure either, more may be needed than can be held: an error, not an approximation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knapsack;

impl Allocator for Knapsack {
    fn name(&self) -> &'static str {
        "knapsack"
    }

    fn allocate(&self, units: &[Unit], budget: u64) -> Result<Allocation, AllocateError> {
        let fronts = fronts(units)?;
        let steps = steps(&fronts);
        let descent = Descent::new(&fronts, &steps, budget)?;
        let mut levels = descent.levels.clone();
        let Some(step) = steps.get(descent.n_taken) else {
            // Everything fits: all units have their least damage.
            return Ok(allocation(&fronts, &levels));
        };
        let fill = best_fill(&fronts, &steps[descent.n_taken..], &descent);
        let gap = step.slope * descent.left as f64 - fill.gain;
        for &(front_idx, level) in &fill.moves {
            levels[front_idx] = level;
        }
        if descent.left > 0 {
            let search = Search::new(&fronts, &descent, step, gap);
            if let Some(moves) = search.run(fill.gain, fill.cost, MOST_PLANS)? {
                levels.clone_from(&descent.levels);
                for (front_idx, level) in moves {
                    levels[front_idx] = level;
                }
            }
        }
        Ok(allocation(&fronts, &levels))
    }
}

/// A choice of a unit, relative to the hull's plan.
#[derive(Clone, Copy, Debug)]
struct Choice {
    level: usize,
    cost: i64,
    damage: f64,
    /// How far its Lagrangian is above the least; not negative.
    regret: f64,
}

/// A unit that has more than one choice left.
#[derive(Clone, Debug)]
struct Branch {
    front_idx: usize,
    /// In the order of costs.
    choices: Vec<Choice>,
    /// Least and most bytes that this branch and those after it can add.
    rest: [i64; 2],
}

impl Branch {
    fn span(&self) -> i64 {
        self.choices[self.choices.len() - 1].cost - self.choices[0].cost
    }
}

/// Choices for the branches so far, relative to the hull's plan.
#[derive(Clone, Copy, Debug)]
struct Partial {
    cost: i64,
    damage: f64,
    regret: f64,
    /// Its place in the arena of decisions.
    decision: usize,
}

/// The last choice of a partial plan.
#[derive(Clone, Copy, Debug)]
struct Decision {
    /// The decision before it; the first decision is its own parent.
    parent: usize,
    level: usize,
}

struct Search {
    branches: Vec<Branch>,
    slope: f64,
    /// Bytes that the hull's plan leaves.
    left: i64,
    /// How far the best known plan is above the bound, with room for rounding.
    gap: f64,
}

impl Search {
    fn new(fronts: &[Front], descent: &Descent, step: &Step, gap: f64) -> Self {
        let range = |f: &Front| f.points[0].damage - f.points[f.points.len() - 1].damage;
        let damages: f64 = fronts.iter().map(range).sum();
        let room = SLACK[0] * (gap.abs() + step.slope * descent.left as f64) + SLACK[1] * damages;
        let left = i64::try_from(descent.left).unwrap_or(i64::MAX);
        let mut search = Search { branches: Vec::new(), slope: step.slope, left, gap: gap.max(0.0) + room };
        for (front_idx, front) in fronts.iter().enumerate() {
            let choices = search.choices(&front.points, descent.levels[front_idx]);
            if choices.len() > 1 {
                search.branches.push(Branch { front_idx, choices, rest: [0, 0] });
            }
        }
        // Large units first: what the small ones after them can still reach then rules most partial plans out.
        search.branches.sort_by(|a, b| b.span().cmp(&a.span()).then(a.front_idx.cmp(&b.front_idx)));
        let mut rest = [0, 0];
        for branch in search.branches.iter_mut().rev() {
            rest[0] += branch.choices[0].cost;
            rest[1] += branch.choices[branch.choices.len() - 1].cost;
            branch.rest = rest;
        }
        search
    }

    /// The choices of a unit whose regret alone does not rule them out.
    fn choices(&self, points: &[Point], level: usize) -> Vec<Choice> {
        let base = points[level];
        let choice = |(level, p): (usize, &Point)| {
            let cost = p.cost as i64 - base.cost as i64;
            let damage = p.damage - base.damage;
            Choice { level, cost, damage, regret: (damage + self.slope * cost as f64).max(0.0) }
        };
        let choices = points.iter().enumerate().map(choice);
        choices.filter(|c| c.level == level || c.regret <= self.gap).collect()
    }

    /// The levels of the best plan, if it is better than one that gains `gain` over the hull's for `cost` bytes.
    fn run(&self, gain: f64, cost: u64, most_plans: usize) -> Result<Option<Vec<(usize, usize)>>, AllocateError> {
        let mut decisions = vec![Decision { parent: 0, level: 0 }];
        let mut plans = vec![Partial { cost: 0, damage: 0.0, regret: 0.0, decision: 0 }];
        for (i, branch) in self.branches.iter().enumerate() {
            let rest = self.branches.get(i + 1).map_or([0, 0], |b| b.rest);
            let room = most_plans.saturating_sub(decisions.len());
            let extended = self.extend(&plans, branch, rest, room);
            let extended = extended.ok_or(AllocateError::TooHard { limit: most_plans })?;
            plans = undercut(extended, &mut decisions);
        }
        // Damages fall along the plans, so the last one has the least, and the least bytes with it.
        let Some(best) = plans.last() else { return Ok(None) };
        let is_better = -best.damage > gain || (-best.damage == gain && best.cost < cost as i64);
        Ok(is_better.then(|| self.trace(&decisions, best.decision)))
    }

    /// All plans with one branch more that have hope, each with the level it chose; `None` if they are more than `most`.
    fn extend(&self, plans: &[Partial], branch: &Branch, rest: [i64; 2], most: usize) -> Option<Vec<(Partial, usize)>> {
        let mut extended = Vec::new();
        for choice in &branch.choices {
            for plan in plans {
                let cost = plan.cost + choice.cost;
                let damage = plan.damage + choice.damage;
                let regret = plan.regret + choice.regret;
                // What stays unused even if all later branches take their largest choices.
                let unused = (self.left - cost - rest[1]).max(0);
                if cost + rest[0] <= self.left && regret + self.slope * unused as f64 <= self.gap {
                    if extended.len() == most {
                        return None;
                    }
                    extended.push((Partial { cost, damage, regret, decision: plan.decision }, choice.level));
                }
            }
        }
        Some(extended)
    }

    /// The level of every branch's front.
    fn trace(&self, decisions: &[Decision], mut last: usize) -> Vec<(usize, usize)> {
        let mut moves = Vec::new();
        for branch in self.branches.iter().rev() {
            let Decision { parent, level } = decisions[last];
            moves.push((branch.front_idx, level));
            last = parent;
        }
        moves
    }
}

/// The plans that no other undercuts, costs rising and damages falling, and the record of their choices.
fn undercut(mut plans: Vec<(Partial, usize)>, decisions: &mut Vec<Decision>) -> Vec<Partial> {
    // Stable, so that among equals the narrower choice stays first.
    plans.sort_by(|(a, _), (b, _)| a.cost.cmp(&b.cost).then(a.damage.total_cmp(&b.damage)));
    let mut kept: Vec<Partial> = Vec::new();
    for (plan, level) in plans {
        if kept.last().is_none_or(|k| plan.damage < k.damage) {
            decisions.push(Decision { parent: plan.decision, level });
            kept.push(Partial { decision: decisions.len() - 1, ..plan });
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocate::{Candidate, UnitId};
    use tailorq_tensor::Rng;

    /// Sums of random numbers that shall meet a target: no bound helps, and no two sums are alike.
    #[test]
    fn what_is_too_hard_is_an_error() {
        let mut rng = Rng::new(1);
        let unit = |b: usize| {
            let cost = 1_000_000_000 + rng.below(1_000_000_000) as u64;
            let candidate = |format, cost| Candidate { format, cost_bytes: cost, damage: -(cost as f64) };
            Unit { id: UnitId::Block(b), candidates: vec![candidate(0, 0), candidate(1, cost)] }
        };
        let units: Vec<Unit> = (0..40).map(unit).collect();
        let fronts = fronts(&units).unwrap();
        let steps = steps(&fronts);
        let descent = Descent::new(&fronts, &steps, 30_123_456_789).unwrap();
        let step = &steps[descent.n_taken];
        let search = Search::new(&fronts, &descent, step, step.slope * descent.left as f64);
        let found = search.run(0.0, 0, 10_000);
        assert_eq!(found, Err(AllocateError::TooHard { limit: 10_000 }));
    }
}
