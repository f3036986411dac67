//! Upgrades in a given order of units: the family of "protect these first".

use super::units::{Front, allocation, fronts, left_after_cheapest};
use super::{AllocateError, Allocation, Unit, UnitId};
use std::collections::HashMap;

/// Units in the order in which they are upgraded, the most deserving first.
///
/// All units start with their cheapest candidate. Each in turn gets its next better one, and when all have it the next round
/// begins, until an upgrade does not fit. Plans nest, and mix no more than two neighbouring widths: the control to which
/// an allocation that looks at damages must be held. Damages are read only to leave candidates out that are no better than
/// cheaper ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranked {
    /// Every unit once.
    pub order: Vec<UnitId>,
}

impl Ranked {
    /// The plan within `budget` bytes.
    ///
    /// # Errors
    /// As [`super::Allocator::allocate`]; [`AllocateError::Settings`] when the order is not one of these units.
    pub fn allocate(&self, units: &[Unit], budget: u64) -> Result<Allocation, AllocateError> {
        let fronts = fronts(units)?;
        let mut places: HashMap<UnitId, usize> = fronts.iter().enumerate().map(|(i, f)| (f.id, i)).collect();
        let order: Option<Vec<usize>> = self.order.iter().map(|id| places.remove(id)).collect();
        match order {
            Some(order) if places.is_empty() => walk(&fronts, &order, budget),
            _ => {
                let problem = "the order must name every unit exactly once: rank the units that are to be allocated";
                Err(AllocateError::Settings(problem.into()))
            }
        }
    }
}

/// Rounds of upgrades over fronts in this order.
pub(super) fn walk(fronts: &[Front], order: &[usize], budget: u64) -> Result<Allocation, AllocateError> {
    let mut left = left_after_cheapest(fronts, budget)?;
    let mut levels = vec![0; fronts.len()];
    let n_rounds = fronts.iter().map(|f| f.points.len()).max().unwrap_or(1);
    'rounds: for to in 1..n_rounds {
        for &i in order {
            let points = &fronts[i].points;
            if to >= points.len() {
                continue;
            }
            let Some(rest) = left.checked_sub(points[to].cost - points[to - 1].cost) else { break 'rounds };
            left = rest;
            levels[i] = to;
        }
    }
    Ok(allocation(fronts, &levels))
}
