//! What a signal says, and whether it may be compared across layers.

use super::{AllocateError, Candidate, Unit, UnitId};

/// What one score stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Grain {
    /// A linear.
    Layer,
    /// A transformer block.
    Block,
    /// An output of a linear.
    Row,
    /// 16 consecutive inputs of one output.
    Tile,
    /// A weight.
    Element,
}

/// What scores are measured in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SaliencyUnit {
    /// A predicted change of the loss, the same measure for all layers.
    LossDelta,
    /// Comparable only with scores of the same [`Saliency`].
    Relative,
}

/// Scores, the largest the most worth protecting.
#[derive(Clone, Debug, PartialEq)]
pub struct Saliency {
    /// What one score stands for.
    pub grain: Grain,
    /// What scores are measured in.
    pub unit: SaliencyUnit,
    /// One a grain, in the order of the weights (row-major) or of the layers or blocks.
    pub values: Vec<f32>,
}

impl Saliency {
    /// Refuses scores that `reader` may not compare with those of other layers.
    pub(super) fn check_comparable(&self, reader: &'static str) -> Result<(), AllocateError> {
        match self.unit {
            SaliencyUnit::LossDelta => Ok(()),
            SaliencyUnit::Relative => Err(AllocateError::Relative { reader }),
        }
    }
}

/// What a format would cost and do, for every unit.
#[derive(Clone, Copy, Debug)]
pub struct FormatDamage<'a> {
    /// The caller's number of the format.
    pub format: usize,
    /// Bytes of each unit.
    pub costs: &'a [u64],
    /// Predicted damage of each unit, at the grain of layers or blocks.
    pub damages: &'a Saliency,
}

/// Units with the candidates that these formats make.
///
/// # Errors
/// [`AllocateError::Relative`] when damages are not changes of a loss; [`AllocateError::Settings`] when lengths or grains
/// do not fit.
pub fn units_of(ids: &[UnitId], formats: &[FormatDamage<'_>]) -> Result<Vec<Unit>, AllocateError> {
    for f in formats {
        f.damages.check_comparable("an allocator under a budget")?;
        if !matches!(f.damages.grain, Grain::Layer | Grain::Block) {
            let problem = format!("damages of format {} are finer than units: sum them over each unit", f.format);
            return Err(AllocateError::Settings(problem));
        }
        if f.costs.len() != ids.len() || f.damages.values.len() != ids.len() {
            let (n, costs, damages) = (ids.len(), f.costs.len(), f.damages.values.len());
            let problem = format!(
                "format {} has {costs} costs and {damages} damages for {n} units: give one each a unit",
                f.format
            );
            return Err(AllocateError::Settings(problem));
        }
    }
    let candidate = |i: usize, f: &FormatDamage<'_>| Candidate {
        format: f.format,
        cost_bytes: f.costs[i],
        damage: f64::from(f.damages.values[i]),
    };
    let unit = |(i, &id): (usize, &UnitId)| Unit { id, candidates: formats.iter().map(|f| candidate(i, f)).collect() };
    Ok(ids.iter().enumerate().map(unit).collect())
}
