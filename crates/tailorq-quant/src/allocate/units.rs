//! The nouns of allocation, and each unit's candidates reduced to those worth their bytes.

use super::AllocateError;
use std::cmp::Ordering;
use std::fmt;
use tailorq_tensor::{InputGroup, LayerId};

/// What gets one format as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UnitId {
    /// All linears of a transformer block.
    Block(usize),
    /// The linears of a block that read one input, as engines serve them: q, k and v, or gate and up.
    Fused(usize, InputGroup),
    /// One linear.
    Layer(LayerId),
}

impl UnitId {
    /// The transformer block that it lies in.
    pub fn block_idx(self) -> usize {
        match self {
            UnitId::Block(b) | UnitId::Fused(b, _) => b,
            UnitId::Layer(layer) => layer.block_idx,
        }
    }

    /// Whether this linear belongs to it.
    pub fn contains(self, layer: LayerId) -> bool {
        match self {
            UnitId::Block(b) => layer.block_idx == b,
            UnitId::Fused(b, group) => layer.block_idx == b && layer.slot.input_group() == group,
            UnitId::Layer(id) => layer == id,
        }
    }

    /// By block, then by the first linear in it, then by size.
    fn order(self) -> (usize, usize, usize) {
        match self {
            UnitId::Block(b) => (b, 0, 0),
            UnitId::Fused(b, group) => (b, group.slots()[0].index(), 1),
            UnitId::Layer(layer) => (layer.block_idx, layer.slot.index(), 2),
        }
    }
}

impl Ord for UnitId {
    fn cmp(&self, other: &Self) -> Ordering {
        self.order().cmp(&other.order())
    }
}

impl PartialOrd for UnitId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for UnitId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UnitId::Block(b) => write!(f, "block {b}"),
            UnitId::Fused(b, group) => {
                let names: Vec<_> = group.slots().iter().map(|s| s.name()).collect();
                write!(f, "block {b} {}", names.join("+"))
            }
            UnitId::Layer(layer) => layer.fmt(f),
        }
    }
}

/// A format that a unit could have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The caller's number of the format: an index into its list of layouts, or a width in bits.
    pub format: usize,
    /// Bytes of the unit in this format, everything included.
    pub cost_bytes: u64,
    /// What the format is predicted to do to the loss; finite, the same measure for all units.
    pub damage: f64,
}

/// Something that gets one of its candidates.
#[derive(Clone, Debug, PartialEq)]
pub struct Unit {
    /// Its name, unique among the units.
    pub id: UnitId,
    /// What it could become; at least one, every format at most once.
    pub candidates: Vec<Candidate>,
}

/// A plan: one candidate for every unit.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    /// For each unit, in the order in which the units came, the index of its candidate.
    pub chosen: Vec<usize>,
    /// The sum of the chosen candidates' bytes.
    pub cost_bytes: u64,
    /// The sum of their damages, added in the order of [`UnitId`].
    pub damage: f64,
}

/// A candidate that is worth its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub candidate_idx: usize,
    pub cost: u64,
    pub damage: f64,
}

/// A unit's candidates with costs rising and damages falling, both strictly. The first is the cheapest there is.
#[derive(Clone, Debug)]
pub(super) struct Front {
    pub unit_idx: usize,
    pub id: UnitId,
    pub points: Vec<Point>,
}

/// The fronts of all units in the order of their ids, and the checks that every allocator needs.
pub(super) fn fronts(units: &[Unit]) -> Result<Vec<Front>, AllocateError> {
    let mut fronts =
        units.iter().enumerate().map(|(i, unit)| front(i, unit)).collect::<Result<Vec<Front>, AllocateError>>()?;
    fronts.sort_by_key(|f| f.id);
    if let Some(pair) = fronts.windows(2).find(|pair| pair[0].id == pair[1].id) {
        return Err(AllocateError::UnitTwice { unit: pair[0].id });
    }
    let mut total = 0u64;
    for front in &fronts {
        let dearest = front.points.last().map_or(0, |p| p.cost);
        let sum = total.checked_add(dearest).filter(|&sum| sum <= i64::MAX as u64);
        total = sum.ok_or(AllocateError::CostOverflow { unit: front.id })?;
    }
    Ok(fronts)
}

fn front(unit_idx: usize, unit: &Unit) -> Result<Front, AllocateError> {
    let id = unit.id;
    if unit.candidates.is_empty() {
        return Err(AllocateError::NoCandidate { unit: id });
    }
    if let Some(c) = unit.candidates.iter().find(|c| !c.damage.is_finite()) {
        return Err(AllocateError::DamageNotFinite { unit: id, format: c.format, damage: c.damage });
    }
    let mut formats: Vec<usize> = unit.candidates.iter().map(|c| c.format).collect();
    formats.sort_unstable();
    if let Some(pair) = formats.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(AllocateError::FormatTwice { unit: id, format: pair[0] });
    }
    let mut order: Vec<usize> = (0..unit.candidates.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (&unit.candidates[a], &unit.candidates[b]);
        a.cost_bytes.cmp(&b.cost_bytes).then(a.damage.total_cmp(&b.damage)).then(a.format.cmp(&b.format))
    });
    let mut points: Vec<Point> = Vec::new();
    for candidate_idx in order {
        let Candidate { cost_bytes: cost, damage, .. } = unit.candidates[candidate_idx];
        if points.last().is_none_or(|p| damage < p.damage) {
            points.push(Point { candidate_idx, cost, damage });
        }
    }
    Ok(Front { unit_idx, id, points })
}

/// The bytes that are left of the budget when every unit has its cheapest candidate.
pub(super) fn left_after_cheapest(fronts: &[Front], budget: u64) -> Result<u64, AllocateError> {
    let least = fronts.iter().map(|f| f.points[0].cost).sum();
    budget.checked_sub(least).ok_or(AllocateError::Impossible { least, budget })
}

/// The plan that gives front `i` its point `levels[i]`.
pub(super) fn allocation(fronts: &[Front], levels: &[usize]) -> Allocation {
    let mut plan = Allocation { chosen: vec![0; fronts.len()], cost_bytes: 0, damage: 0.0 };
    for (front, &level) in fronts.iter().zip(levels) {
        let point = front.points[level];
        plan.chosen[front.unit_idx] = point.candidate_idx;
        plan.cost_bytes += point.cost;
        plan.damage += point.damage;
    }
    plan
}
