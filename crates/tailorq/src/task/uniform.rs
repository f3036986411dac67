//! A budget without an allocation: one layout for all linears, and for a circuit the share of weights that the rest buys.

use crate::error::PipelineError;
use crate::recipe::QuantizeSettings;
use crate::task::circuit::{CircuitSettings, MOST_KEPT};
use tailorq_model::Model;
use tailorq_tensor::{Bits, ElementCorrections, Group, Layout};

/// The widths that budgets, allocations and controls choose among for linears unless told otherwise. 6 bits are left to those
/// who ask for them: every kernel has that width, but it was made for embedding and head.
pub(crate) const LINEAR_WIDTHS: [Bits; 4] = [Bits::Two, Bits::Three, Bits::Four, Bits::Eight];

/// All groups, the smallest first.
pub(crate) fn groups() -> impl Iterator<Item = Group> {
    Group::SIZES.map(Group::Inputs).into_iter().chain([Group::Row])
}

/// Shapes of all linears.
pub(crate) fn shapes(model: &Model) -> impl Iterator<Item = (usize, usize)> {
    model.blocks.iter().flat_map(|b| &b.linears).map(|l| (l.weight.rows(), l.weight.cols()))
}

/// Weights of all linears.
pub(crate) fn n_weights(model: &Model) -> u64 {
    shapes(model).map(|(rows, cols)| (rows * cols) as u64).sum()
}

/// Bytes of all linears in one layout.
pub(crate) fn layout_bytes(model: &Model, layout: Layout) -> u64 {
    shapes(model).map(|(rows, cols)| layout.bytes(rows, cols) as u64).sum()
}

/// Bytes that a circuit takes beside the codes: a count for each row, and a column and a value for each kept weight, where
/// columns take what they take in the widest matrix. Exact but for models whose matrices straddle 65 535 columns.
pub(crate) fn circuit_bytes(model: &Model, circuit: &CircuitSettings) -> u64 {
    let n_kept = (circuit.keep * n_weights(model) as f64).floor() as u64;
    let (rows, each) = kept_costs(model);
    rows + n_kept * each
}

/// Bytes of the counts of all rows, and of each kept weight.
fn kept_costs(model: &Model) -> (u64, u64) {
    let rows = shapes(model).map(|(rows, cols)| (rows * ElementCorrections::index_bytes(cols)) as u64).sum();
    let index = shapes(model).map(|(_, cols)| ElementCorrections::index_bytes(cols)).max().unwrap_or(0);
    (rows, index as u64 + 2)
}

/// Settles widths so that the linears take at most `bits_per_weight`, counted from bytes of the file. Without a circuit: the
/// widest codes that fit, and with them the smallest group. With one: the widest codes that fit with the group as it
/// is, and as large a circuit as fits beside them. Returns what was settled, in words.
pub(crate) fn settle(
    model: &Model,
    bits_per_weight: f64,
    quantize: &mut QuantizeSettings,
    circuit: Option<&mut CircuitSettings>,
) -> Result<String, PipelineError> {
    if !(bits_per_weight.is_finite() && bits_per_weight > 0.0) {
        let problem = format!("the budget is {bits_per_weight} bits per weight: use a number such as 2.5");
        return Err(PipelineError::Settings(problem));
    }
    let n_weights = n_weights(model);
    let budget = (bits_per_weight * n_weights as f64 / 8.0).floor() as u64;
    let groups = match circuit {
        None => groups().collect(),
        Some(_) => vec![quantize.group],
    };
    let (rows, each) = if circuit.is_some() { kept_costs(model) } else { (0, 1) };
    let widest_first = LINEAR_WIDTHS.into_iter().rev();
    let layouts = widest_first.flat_map(|bits| groups.iter().map(move |&group| (bits, group)));
    let at = |(bits, group)| QuantizeSettings { bits, group, ..quantize.clone() };
    let levels = |s: &QuantizeSettings| (shapes(model).count() * s.level_bytes()) as u64;
    let size = |s: QuantizeSettings| (s.layout(), layout_bytes(model, s.layout()) + levels(&s) + rows);
    let sized: Vec<(Layout, u64)> = layouts.map(at).map(size).collect();
    let Some((layout, bytes)) = sized.iter().find(|(_, bytes)| *bytes <= budget) else {
        let least = sized.iter().map(|(_, bytes)| *bytes).min().unwrap_or(0) as f64 * 8.0 / n_weights as f64;
        return Err(PipelineError::Settings(format!(
            "a budget of {bits_per_weight} bits per weight cannot be met: the least possible is {} with these settings",
            (least * 1000.0).ceil() / 1000.0
        )));
    };
    (quantize.bits, quantize.group) = (layout.bits, layout.group);
    let mut words = format!("{bits_per_weight} bits per weight: {layout} for all linears");
    if let Some(circuit) = circuit {
        // Six digits are what a reader of the recipe can take in; cutting the rest keeps the budget.
        let share = ((budget - bytes) / each) as f64 / n_weights as f64;
        circuit.keep = ((share * 1e6).floor() / 1e6).min(MOST_KEPT);
        words.push_str(&format!(", and {:.4} % of the weights at 16 bits", 100.0 * circuit.keep));
    }
    Ok(words)
}
