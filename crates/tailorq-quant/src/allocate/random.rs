//! The control that knows nothing at all.

use super::ranked::walk;
use super::units::fronts;
use super::{AllocateError, Allocation, Allocator, Unit};
use tailorq_tensor::Rng;

/// Upgrades units in an order drawn from a seed, as [`super::Ranked`] does. The same seed gives the same order for the
/// same set of units, whatever the order in which they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Random {
    /// Seed of the order.
    pub seed: u64,
}

impl Allocator for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn allocate(&self, units: &[Unit], budget: u64) -> Result<Allocation, AllocateError> {
        let fronts = fronts(units)?;
        let mut order: Vec<usize> = (0..fronts.len()).collect();
        Rng::new(self.seed).shuffle(&mut order);
        walk(&fronts, &order, budget)
    }
}
