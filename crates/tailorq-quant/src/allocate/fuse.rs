//! Units that share a format because something downstream wants them to.

use super::{AllocateError, Candidate, Unit, UnitId};
use std::collections::BTreeMap;
use tailorq_tensor::{InputGroup, LayerId};

/// Which layers share a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fusion {
    /// q, k and v of a block, and gate and up: serving engines run each of these as one matrix.
    SharedInput,
    /// All of a block, as the TAQ family allocates.
    Block,
}

impl Fusion {
    /// The unit that a layer goes into.
    fn target(self, layer: LayerId) -> UnitId {
        match (self, layer.slot.input_group()) {
            (Fusion::Block, _) => UnitId::Block(layer.block_idx),
            (Fusion::SharedInput, group @ (InputGroup::Attention | InputGroup::Mlp)) => {
                UnitId::Fused(layer.block_idx, group)
            }
            (Fusion::SharedInput, _) => UnitId::Layer(layer),
        }
    }
}

/// Makes one unit of the layers that share a format: its candidates are the formats that all of them offer, in the order of
/// the lowest layer's; bytes and damages add. Units come out in the order of their ids. Layers of a group that are not
/// among the units do not count, and [`UnitId::contains`] says which layers a unit's choice is for.
///
/// # Errors
/// When a unit is not a single layer, is listed twice, or the layers of a group have no format in common.
pub fn fuse(units: &[Unit], fusion: Fusion) -> Result<Vec<Unit>, AllocateError> {
    let mut layers: Vec<(LayerId, &Unit)> = Vec::new();
    for unit in units {
        let UnitId::Layer(layer) = unit.id else { return Err(AllocateError::NotALayer { unit: unit.id }) };
        layers.push((layer, unit));
    }
    // Members in the order of their ids, so that sums are the same whatever the order of the input.
    layers.sort_by_key(|(layer, _)| *layer);
    if let Some(pair) = layers.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(AllocateError::UnitTwice { unit: pair[0].1.id });
    }
    let mut fused: BTreeMap<UnitId, Vec<Candidate>> = BTreeMap::new();
    for (layer, unit) in layers {
        let target = fusion.target(layer);
        match fused.get_mut(&target) {
            None => {
                fused.insert(target, unit.candidates.clone());
            }
            Some(sums) => {
                *sums = sums.iter().filter_map(|sum| add(*sum, &unit.candidates)).collect();
                if sums.is_empty() {
                    return Err(AllocateError::NothingInCommon { unit: target });
                }
            }
        }
    }
    Ok(fused.into_iter().map(|(id, candidates)| Unit { id, candidates }).collect())
}

/// The sum with the candidate of the same format, if there is one.
fn add(sum: Candidate, candidates: &[Candidate]) -> Option<Candidate> {
    let other = candidates.iter().find(|c| c.format == sum.format)?;
    // Costs that exceed 64 bits are reported by the allocators, which add up all of them.
    let cost_bytes = sum.cost_bytes.saturating_add(other.cost_bytes);
    Some(Candidate { cost_bytes, damage: sum.damage + other.damage, ..sum })
}
