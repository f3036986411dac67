//! From scores and a rule to the settings of every linear.

use crate::error::{PipelineError, output_error};
use crate::task::allocation::{Rule, RuleSettings, UnitKind};
use crate::task::plan::Exceptions;
use crate::task::scores::{Scores, at_width};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use tailorq_quant::LayerSettings;
use tailorq_quant::allocate::{self, AllocateError, Allocation, Ranked, Unit, ends_and_top, top_blocks};

/// What a plan comes to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanSummary {
    /// Bits per weight of the linears, codes, scales and zeros; corrections for kept weights are not part of it.
    pub bits_per_weight: f64,
    /// The same in bytes.
    pub bytes: u64,
    /// The sum of predicted damages.
    pub damage: f64,
    /// How many units got each width.
    pub units: BTreeMap<u32, usize>,
    /// The width of each unit, in the order of the model.
    pub widths: Vec<(String, u32)>,
}

/// A plan.
pub(crate) struct Planned {
    pub(crate) layers: BTreeMap<String, LayerSettings>,
    pub(crate) summary: PlanSummary,
}

/// Makes a plan file of a score file; takes milliseconds. Nothing but the two decides it.
pub fn plan(scores: &Path, rule: &RuleSettings, output: &Path) -> Result<PlanSummary, PipelineError> {
    let scores = Scores::read(scores)?;
    rule.check()?;
    let planned = allocate_widths(&scores, rule, 0)?;
    if let Some(dir) = output.parent().filter(|d| !d.as_os_str().is_empty() && !d.is_dir()) {
        return Err(output_error(dir, &std::io::Error::from(std::io::ErrorKind::NotFound)));
    }
    Exceptions { layers: planned.layers, ..Exceptions::default() }.write(
        output,
        &scores.model.sha256,
        &scores.tailorq,
    )?;
    Ok(planned.summary)
}

/// The width of every linear. `reserved` bytes of a budget are for something else.
pub(crate) fn allocate_widths(scores: &Scores, rule: &RuleSettings, reserved: u64) -> Result<Planned, PipelineError> {
    let units = scores.units();
    let allocation = match rule.bits_per_weight {
        Some(bits_per_weight) => {
            let total = (bits_per_weight * scores.n_weights as f64 / 8.0).floor() as u64;
            let budget = total.saturating_sub(reserved);
            under_budget(scores, rule.name, &units, budget)
                .map_err(|e| in_bits(e, scores, (bits_per_weight, reserved)))?
        }
        None => by_score(scores, rule)?,
    };
    let mut layers = BTreeMap::new();
    let mut summary = PlanSummary {
        bits_per_weight: allocation.cost_bytes as f64 * 8.0 / scores.n_weights as f64,
        bytes: allocation.cost_bytes,
        damage: allocation.damage,
        units: BTreeMap::new(),
        widths: Vec::new(),
    };
    for (unit, &chosen) in scores.units.iter().zip(&allocation.chosen) {
        let bits = unit.candidates[chosen].bits;
        layers.extend(unit.layers.iter().map(|name| (name.clone(), at_width(scores.base, bits))));
        *summary.units.entry(bits).or_default() += 1;
        summary.widths.push((unit.name.clone(), bits));
    }
    Ok(Planned { layers, summary })
}

fn under_budget(scores: &Scores, rule: Rule, units: &[Unit], budget: u64) -> Result<Allocation, AllocateError> {
    if rule == Rule::Ranked {
        let mut order: Vec<usize> = (0..units.len()).collect();
        order.sort_by(|&a, &b| {
            scores.units[b].score.total_cmp(&scores.units[a].score).then(units[a].id.cmp(&units[b].id))
        });
        return Ranked { order: order.into_iter().map(|i| units[i].id).collect() }.allocate(units, budget);
    }
    let allocator = allocate::find(rule.name()).expect("rules with a budget are named like their allocators");
    allocator.allocate(units, budget)
}

/// The widest format for chosen units, the narrowest for all others.
fn by_score(scores: &Scores, rule: &RuleSettings) -> Result<Allocation, PipelineError> {
    let values: Vec<f64> = scores.units.iter().map(|u| u.score).collect();
    let wide = match (rule.name, rule.share, rule.ends, rule.top) {
        (Rule::TopShare, Some(share), ..) => top_blocks(&values, share),
        (Rule::EndsAndTop, _, Some(ends), Some(top)) if scores.score.unit == UnitKind::Block => {
            ends_and_top(&values, ends, top)
        }
        _ => {
            let problem = "rule ends-and-top chooses blocks: score them with --unit block";
            return Err(PipelineError::Settings(problem.into()));
        }
    };
    let wide = wide.map_err(|e| PipelineError::Settings(e.to_string()))?;
    let mut allocation = Allocation { chosen: Vec::new(), cost_bytes: 0, damage: 0.0 };
    for (unit, wide) in scores.units.iter().zip(wide) {
        let chosen = if wide { unit.candidates.len() - 1 } else { 0 };
        allocation.cost_bytes += unit.candidates[chosen].bytes;
        allocation.damage += unit.candidates[chosen].damage;
        allocation.chosen.push(chosen);
    }
    Ok(allocation)
}

/// The error of a budget that cannot be met, in the units in which it was given.
fn in_bits(error: AllocateError, scores: &Scores, (asked, reserved): (f64, u64)) -> PipelineError {
    let AllocateError::Impossible { least, .. } = error else {
        return PipelineError::Settings(error.to_string());
    };
    // Rounded up, so that the number named here can be met.
    let least = ((least + reserved) as f64 * 8.0 / scores.n_weights as f64 * 1000.0).ceil() / 1000.0;
    let widths: Vec<String> = scores.score.widths.iter().map(u32::to_string).collect();
    let kept = if reserved > 0 { ", with the weights that are kept at 16 bits" } else { "" };
    PipelineError::Settings(format!(
        "a budget of {asked} bits per weight cannot be met: the least possible is {least} (widths {}, group {}{kept}); \
         raise --bits-per-weight, admit narrower --widths or use a coarser --group",
        widths.join(", "),
        scores.base.layout.group
    ))
}

/// The widths of a summary's units in one line: `2 bits x 10, 4 bits x 14`.
pub(crate) fn counts(summary: &PlanSummary) -> String {
    let count = |(bits, n): (&u32, &usize)| format!("{bits} bits x {n}");
    summary.units.iter().map(count).collect::<Vec<_>>().join(", ")
}
