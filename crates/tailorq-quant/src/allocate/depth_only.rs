//! The control that knows nothing but depth.

use super::ranked::walk;
use super::units::fronts;
use super::{AllocateError, Allocation, Allocator, Unit};

/// Upgrades the first and the last blocks first, then their neighbours, inwards, as [`super::Ranked`] does. A signal
/// that does not beat this has found no more than that the ends of a model are fragile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DepthOnly;

impl Allocator for DepthOnly {
    fn name(&self) -> &'static str {
        "depth-only"
    }

    fn allocate(&self, units: &[Unit], budget: u64) -> Result<Allocation, AllocateError> {
        let fronts = fronts(units)?;
        let last = fronts.iter().map(|f| f.id.block_idx()).max().unwrap_or(0);
        let mut order: Vec<usize> = (0..fronts.len()).collect();
        order.sort_by_key(|&i| {
            let block_idx = fronts[i].id.block_idx();
            (block_idx.min(last - block_idx), fronts[i].id)
        });
        walk(&fronts, &order, budget)
    }
}
