//! The Lagrangian on the lower convex hulls: the engine for any number of units.
//!
//! Shoham and Gersho (1988), "Efficient bit allocation for an arbitrary set of quantizers": minimizing
//! `damage + lambda * bytes` unit by unit gives, for every `lambda`, the best plan of its size. All these plans are met in
//! turn by going down the units' convex hulls by the largest gain a byte, which needs no search for `lambda` and ends, for
//! a given budget, at the last plan that fits: off the optimum by less than one step of one unit.

use super::units::{Front, allocation, fronts, left_after_cheapest};
use super::{AllocateError, Allocation, Allocator, Unit};

/// How many size limits the fill tries at most.
const MOST_LIMITS: usize = 64;

/// Steps down the hulls, the most gain a byte first, until one does not fit. `O(n log n)` for `n` candidates.
///
/// Without `fill` plans nest: a larger budget never gives a unit fewer bytes. With it some of what is left (less than the
/// step that did not fit) is spent on cheaper upgrades, so that plans no longer nest, while the total damage still never
/// rises with the budget: what is left buys less than the step that did not fit, since that one has the most gain a byte,
/// and among plans that stop at the same step the fill takes the best of a set that only grows with what is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hull {
    /// Spend what is left.
    pub fill: bool,
}

impl Allocator for Hull {
    fn name(&self) -> &'static str {
        if self.fill { "hull" } else { "hull-nested" }
    }

    fn allocate(&self, units: &[Unit], budget: u64) -> Result<Allocation, AllocateError> {
        let fronts = fronts(units)?;
        let steps = steps(&fronts);
        let mut descent = Descent::new(&fronts, &steps, budget)?;
        if self.fill {
            let upgrade = best_fill(&fronts, &steps[descent.n_taken..], &descent);
            for (front_idx, level) in upgrade.moves {
                descent.levels[front_idx] = level;
            }
        }
        Ok(allocation(&fronts, &descent.levels))
    }
}

/// From one corner of a unit's hull to the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub front_idx: usize,
    /// The point of the front that it leads to.
    pub to: usize,
    pub cost: u64,
    pub gain: f64,
    /// Gain a byte; never rises along a hull.
    pub slope: f64,
}

/// The steps of all hulls by falling slope, ties by unit. Those of one unit keep their order.
pub(super) fn steps(fronts: &[Front]) -> Vec<Step> {
    let mut steps = Vec::new();
    for (front_idx, front) in fronts.iter().enumerate() {
        let corners = corners(front);
        // Rounding must not turn the order of two steps of one unit.
        let mut least = f64::INFINITY;
        for pair in corners.windows(2) {
            let (cost, gain) = difference(front, pair[0], pair[1]);
            least = least.min(gain / cost as f64);
            steps.push(Step { front_idx, to: pair[1], cost, gain, slope: least });
        }
    }
    steps.sort_by(|a, b| b.slope.total_cmp(&a.slope).then(a.front_idx.cmp(&b.front_idx)).then(a.to.cmp(&b.to)));
    steps
}

/// Bytes more and damage less of point `b` than of point `a`.
pub(super) fn difference(front: &Front, a: usize, b: usize) -> (u64, f64) {
    (front.points[b].cost - front.points[a].cost, front.points[a].damage - front.points[b].damage)
}

/// The points of a front that lie on its lower convex hull, in the order of their costs.
fn corners(front: &Front) -> Vec<usize> {
    let slope = |a, b| {
        let (cost, gain) = difference(front, a, b);
        gain / cost as f64
    };
    let mut corners: Vec<usize> = Vec::new();
    for p in 0..front.points.len() {
        while let [.., a, b] = corners[..]
            && slope(a, b) <= slope(b, p)
        {
            corners.pop();
        }
        corners.push(p);
    }
    corners
}

/// Where the steps that fit lead to.
#[derive(Clone, Debug)]
pub(super) struct Descent {
    /// A point for each front.
    pub levels: Vec<usize>,
    /// Steps taken, the first ones of all.
    pub n_taken: usize,
    /// Bytes of the budget that are not used.
    pub left: u64,
}

impl Descent {
    /// Takes steps until one does not fit.
    pub fn new(fronts: &[Front], steps: &[Step], budget: u64) -> Result<Self, AllocateError> {
        let left = left_after_cheapest(fronts, budget)?;
        let mut descent = Descent { levels: vec![0; fronts.len()], n_taken: 0, left };
        for step in steps {
            let Some(left) = descent.left.checked_sub(step.cost) else { break };
            descent.left = left;
            descent.levels[step.front_idx] = step.to;
            descent.n_taken += 1;
        }
        Ok(descent)
    }
}

/// Upgrades beyond the descent: for each front at most one new point.
#[derive(Clone, Debug, Default)]
pub(super) struct Upgrade {
    pub moves: Vec<(usize, usize)>,
    pub cost: u64,
    pub gain: f64,
}

impl Upgrade {
    /// More gain, or as much for fewer bytes.
    fn beats(&self, other: &Upgrade) -> bool {
        self.gain > other.gain || (self.gain == other.gain && self.cost < other.cost)
    }
}

/// The best of these that fits in what is left: one upgrade of one unit to any of its points; and, for each limit on the
/// size of a step, the remaining steps no larger than that, taken in order until one does not fit. The limits do not
/// depend on what is left, so neither do the sequences, and a larger rest takes at least as much of each.
pub(super) fn best_fill(fronts: &[Front], rest: &[Step], descent: &Descent) -> Upgrade {
    let mut best = Upgrade::default();
    for (front_idx, (front, &level)) in fronts.iter().zip(&descent.levels).enumerate() {
        for to in level + 1..front.points.len() {
            let (cost, gain) = difference(front, level, to);
            let upgrade = Upgrade { moves: vec![(front_idx, to)], cost, gain };
            if cost <= descent.left && upgrade.beats(&best) {
                best = upgrade;
            }
        }
    }
    for limit in limits(rest) {
        let upgrade = small_steps(fronts.len(), rest, limit, descent.left);
        if upgrade.beats(&best) {
            best = upgrade;
        }
    }
    best
}

/// The sizes of the steps, at most [`MOST_LIMITS`] of them spread evenly over their ranks.
fn limits(rest: &[Step]) -> Vec<u64> {
    let mut sizes: Vec<u64> = rest.iter().map(|s| s.cost).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let stride = sizes.len().div_ceil(MOST_LIMITS).max(1);
    sizes.into_iter().step_by(stride).collect()
}

/// Takes the steps no larger than `limit` in order until one does not fit. A unit one of whose steps is larger stops there.
fn small_steps(n_fronts: usize, rest: &[Step], limit: u64, mut left: u64) -> Upgrade {
    let mut upgrade = Upgrade::default();
    let mut stopped = vec![false; n_fronts];
    for step in rest {
        if stopped[step.front_idx] || step.cost > limit {
            stopped[step.front_idx] = true;
            continue;
        }
        if step.cost > left {
            break;
        }
        left -= step.cost;
        upgrade.cost += step.cost;
        upgrade.gain += step.gain;
        // A later step of the same unit comes later in the list and so overwrites this one.
        upgrade.moves.push((step.front_idx, step.to));
    }
    upgrade
}
