//! From a budget to a plan: which unit of the model gets which of the formats that it could have.
//!
//! Pure calculation over plain numbers: no tensors, no files, no clock. Every allocator is deterministic, keeps the budget to
//! the byte, and gives the same plan whatever the order of the units; ties go to the lower [`UnitId`]. Allocators that
//! turn units, candidates and a budget into a choice implement [`Allocator`] and are listed in [`ALL`]; a new one is
//! one file and one line there. The others select by share or rank: [`TopShare`] over scores of all layers,
//! [`top_per_block`] inside a matrix, [`top_blocks`] and [`ends_and_top`] among blocks, [`double_pointer`] among
//! column blocks of one matrix.

mod depth_only;
mod double_pointer;
mod fuse;
mod hull;
mod knapsack;
mod random;
mod ranked;
mod saliency;
mod top_blocks;
mod top_per_block;
mod top_share;
mod units;

pub use depth_only::DepthOnly;
pub use double_pointer::{Swap, double_pointer};
pub use fuse::{Fusion, fuse};
pub use hull::Hull;
pub use knapsack::Knapsack;
pub use random::Random;
pub use ranked::Ranked;
pub use saliency::{FormatDamage, Grain, Saliency, SaliencyUnit, units_of};
pub use top_blocks::{ends_and_top, top_blocks};
pub use top_per_block::top_per_block;
pub use top_share::{Threshold, TopShare, TopShareRefined};
pub use units::{Allocation, Candidate, Unit, UnitId};

use thiserror::Error;

/// All allocators of units under a budget, in the order of help texts.
pub const ALL: &[&dyn Allocator] =
    &[&Hull { fill: true }, &Hull { fill: false }, &Knapsack, &DepthOnly, &Random { seed: 0 }];

/// The allocator of that name.
pub fn find(name: &str) -> Option<&'static dyn Allocator> {
    ALL.iter().copied().find(|a| a.name() == name)
}

/// Chooses one candidate for every unit.
pub trait Allocator: Sync {
    /// Name in recipes and on the command line.
    fn name(&self) -> &'static str;

    /// A choice whose costs sum to at most `budget` bytes. The total predicted damage never rises with the budget. The
    /// candidates that are not worth their bytes (another of the same unit costs no more and damages no more) are
    /// never chosen.
    ///
    /// # Errors
    /// [`AllocateError::Impossible`] when even the cheapest candidates exceed the budget, others when the units are unfit.
    fn allocate(&self, units: &[Unit], budget: u64) -> Result<Allocation, AllocateError>;
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum AllocateError {
    /// The cheapest candidates of all units exceed the budget.
    #[error(
        "the budget of {budget} bytes cannot be met: the cheapest formats take {least} bytes; raise the budget to at least that, or admit narrower formats"
    )]
    Impossible {
        /// The smallest budget that has a plan, in bytes.
        least: u64,
        /// The budget asked for, in bytes.
        budget: u64,
    },
    /// A unit has nothing to choose from.
    #[error("{unit} has no candidate format: give it at least one, or leave the unit out")]
    NoCandidate {
        /// The unit.
        unit: UnitId,
    },
    /// Two units have one name.
    #[error("{unit} is listed twice: list every unit once")]
    UnitTwice {
        /// The unit.
        unit: UnitId,
    },
    /// Two candidates of a unit have one format.
    #[error("{unit} lists format {format} twice: list every format once")]
    FormatTwice {
        /// The unit.
        unit: UnitId,
        /// The format's number.
        format: usize,
    },
    /// A damage is NaN or infinite.
    #[error("{unit} in format {format} has a predicted damage of {damage}: measure it again on finite activations")]
    DamageNotFinite {
        /// The unit.
        unit: UnitId,
        /// The format's number.
        format: usize,
        /// The damage.
        damage: f64,
    },
    /// The bytes of all units do not fit a 63-bit number.
    #[error("the units' costs sum to 2^63 bytes or more: check the costs of {unit} and those before it")]
    CostOverflow {
        /// Where the sum exceeded the limit.
        unit: UnitId,
    },
    /// Layers that shall share a format have none in common.
    #[error("the layers of {unit} have no format in common and so cannot share one: offer them the same formats")]
    NothingInCommon {
        /// The unit that they would form.
        unit: UnitId,
    },
    /// Units of a kind that cannot be fused.
    #[error("{unit} cannot be fused: only single layers can, fuse before anything else")]
    NotALayer {
        /// The unit.
        unit: UnitId,
    },
    /// Scores that mean something only beside others of their own layer were to be compared across layers.
    #[error(
        "{reader} compares across layers, and these scores are relative to their own layer: use a signal that predicts a change of the loss, or choose inside each layer"
    )]
    Relative {
        /// Who would have compared them.
        reader: &'static str,
    },
    /// A score is NaN or infinite.
    #[error("score {index} is {value}: scores must be finite; survey again without the samples that overflow")]
    ScoreNotFinite {
        /// Place of the score, counted over everything that was handed in.
        index: u64,
        /// The score.
        value: f64,
    },
    /// The second pass over the scores differs from the first.
    #[error("the second pass over the scores is not like the first ({what}): hand in the same scores twice")]
    PassesDiffer {
        /// What was counted differently.
        what: &'static str,
    },
    /// The exact search would need more partial plans than it may hold.
    #[error("the exact plan needs more than {limit} partial plans: use the allocator hull, or fuse units")]
    TooHard {
        /// How many it may hold.
        limit: usize,
    },
    /// A setting is out of its range.
    #[error("{0}")]
    Settings(String),
}
