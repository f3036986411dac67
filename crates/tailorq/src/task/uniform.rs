//! Bytes of linears, and a budget without an allocation: one layout for all linears, and for a circuit or salient tiles the
//! share that the rest buys.

use crate::blocks::layer_settings;
use crate::error::PipelineError;
use crate::recipe::QuantizeSettings;
use crate::task::allocation::ALLOCATED_METHODS;
use crate::task::circuit::{CircuitSettings, MOST_KEPT};
use tailorq_model::Model;
use tailorq_quant::quantize::{Salient, Unit};
use tailorq_quant::{AlignedSettings, LayerSettings};
use tailorq_tensor::{Bits, ElementCorrections, Group, Layout, PackedSpec};

/// The widths of linears. Every kernel has 6 bits too, but for embedding and head.
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

/// Bytes in the file of a linear of this shape: codes, scales and zeros, the codebook and salient tiles, or two for each weight
/// at 16 bits. What a circuit keeps comes on top. Every prediction of sizes counts with this.
pub(crate) fn linear_bytes(settings: &LayerSettings, (rows, cols): (usize, usize)) -> u64 {
    if settings.half {
        return 2 * (rows * cols) as u64;
    }
    let layout = settings.layout;
    let base = PackedSpec { codebook: settings.has_codebook(), ..PackedSpec::base(rows, cols, layout) };
    let tiles = settings.aligned.map_or(0, |a| a.bytes(layout, rows, cols));
    (base.bytes() + tiles) as u64
}

/// What the linears of these settings are in the file, by their method.
fn stored_settings(settings: &QuantizeSettings) -> LayerSettings {
    match tailorq_quant::find(&settings.method) {
        Some(method) if method.stores_half() => LayerSettings::half(),
        _ if has_tiles(settings) => {
            LayerSettings { aligned: Some(settings.aligned.unwrap_or_default()), ..layer_settings(settings) }
        }
        _ => layer_settings(settings),
    }
}

/// Whether some tiles are salient.
fn has_tiles(settings: &QuantizeSettings) -> bool {
    settings.method.starts_with("aligned")
}

/// Bytes of all linears with the same settings.
pub(crate) fn uniform_bytes(model: &Model, settings: &QuantizeSettings) -> u64 {
    let stored = stored_settings(settings);
    shapes(model).map(|shape| linear_bytes(&stored, shape)).sum()
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

/// Bytes that all linears would take in the method's own format, where another is stored.
pub(crate) fn counted_bytes(model: &Model, settings: &QuantizeSettings) -> Option<u64> {
    let (method, layer) = (tailorq_quant::find(&settings.method)?, layer_settings(settings));
    let bits: Option<u64> = shapes(model).map(|shape| method.counted_bits(shape, &layer)).sum();
    bits.map(|bits| bits.div_ceil(8))
}

/// Inputs and outputs of a matrix that stands for all where a message comes before a model.
const USUAL_SIDE: usize = 4096;

/// Why no budget can settle the size of these settings, in words, for methods that have just one.
pub(crate) fn one_size(settings: &QuantizeSettings) -> Option<String> {
    let aligned = settings.aligned.unwrap_or_default();
    let is_mean4 = aligned.salient == Salient::Mean4 && aligned.unit == Unit::Tile;
    let name = settings.method.as_str();
    if ALLOCATED_METHODS.contains(&name) || (has_tiles(settings) && !is_mean4) {
        return None;
    }
    let shape = (USUAL_SIDE, USUAL_SIDE);
    let counted = tailorq_quant::find(name).and_then(|q| q.counted_bits(shape, &layer_settings(settings)));
    let bits = counted.unwrap_or_else(|| 8 * linear_bytes(&stored_settings(settings), shape));
    let bits = bits as f64 / (USUAL_SIDE * USUAL_SIDE) as f64;
    Some(match name {
        "half" | "billm" | "pb-llm" => format!("method {name} has one size, about {bits:.2} bits per weight"),
        _ if has_tiles(settings) => {
            format!("means of four have one size, about {bits:.2} bits per weight, whatever the share of tiles")
        }
        _ => format!(
            "method {name} has one size for each width, about {bits:.2} bits per weight at {} bits: choose it by --bits",
            settings.bits.count()
        ),
    })
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
    if let Some(problem) = one_size(quantize) {
        return Err(PipelineError::Settings(format!("{problem}; leave --bits-per-weight out")));
    }
    let n_weights = n_weights(model);
    let budget = (bits_per_weight * n_weights as f64 / 8.0).floor() as u64;
    if has_tiles(quantize) {
        if circuit.is_some() {
            let problem = "a budget does not say how much of it is for salient tiles and how much for kept weights: give \
                           --bits, --tile-share and --keep instead";
            return Err(PipelineError::Settings(problem.into()));
        }
        return settle_tiles(model, (bits_per_weight, budget), quantize);
    }
    let groups = match circuit {
        None => groups().collect(),
        Some(_) => vec![quantize.group],
    };
    let (rows, each) = if circuit.is_some() { kept_costs(model) } else { (0, 1) };
    let widest_first = LINEAR_WIDTHS.into_iter().rev();
    let layouts = widest_first.flat_map(|bits| groups.iter().map(move |&group| (bits, group)));
    let at = |(bits, group)| QuantizeSettings { bits, group, ..quantize.clone() };
    let size = |s: QuantizeSettings| (s.layout(), uniform_bytes(model, &s) + rows);
    let sized: Vec<(Layout, u64)> = layouts.map(at).map(size).collect();
    let Some((layout, bytes)) = sized.iter().find(|(_, bytes)| *bytes <= budget) else {
        return Err(impossible(bits_per_weight, sized.iter().map(|(_, bytes)| *bytes), n_weights));
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

/// The widest codes that fit with the group as it is beside a bitmap, and as many salient tiles as fit beside them. Where tiles
/// stand in the place of codes and not on top of them the width stays as it is too.
fn settle_tiles(
    model: &Model,
    (bits_per_weight, budget): (f64, u64),
    quantize: &mut QuantizeSettings,
) -> Result<String, PipelineError> {
    /// Shares are multiples of a millionth, as those of circuits.
    const STEPS: u32 = 1_000_000;
    let aligned = quantize.aligned.unwrap_or_default();
    let widths = match aligned.salient {
        Salient::Corrections => LINEAR_WIDTHS.to_vec(),
        Salient::Mean4 | Salient::EightBit => vec![quantize.bits],
    };
    let at = |bits: Bits, step: u32| QuantizeSettings {
        bits,
        aligned: Some(AlignedSettings { share: f64::from(step) / f64::from(STEPS), ..aligned }),
        ..quantize.clone()
    };
    let bytes = |bits: Bits, step: u32| uniform_bytes(model, &at(bits, step));
    let Some(&bits) = widths.iter().rev().find(|&&bits| bytes(bits, 1) <= budget) else {
        return Err(impossible(bits_per_weight, widths.iter().map(|&bits| bytes(bits, 1)), n_weights(model)));
    };
    // The first share that is too large, by halving: bytes never fall with the share.
    let (mut fits, mut beyond) = (1, STEPS + 1);
    while beyond - fits > 1 {
        let middle = fits + (beyond - fits) / 2;
        if bytes(bits, middle) <= budget { fits = middle } else { beyond = middle }
    }
    *quantize = at(bits, fits);
    let share = 100.0 * f64::from(fits) / f64::from(STEPS);
    Ok(format!("{bits_per_weight} bits per weight: {}, and {share:.4} % of the tiles are salient", quantize.layout()))
}

/// The error of a budget below all of these sizes.
fn impossible(bits_per_weight: f64, sizes: impl Iterator<Item = u64>, n_weights: u64) -> PipelineError {
    let least = sizes.min().unwrap_or(0) as f64 * 8.0 / n_weights as f64;
    // Rounded up, so that the number named here can be met.
    PipelineError::Settings(format!(
        "a budget of {bits_per_weight} bits per weight cannot be met: the least possible is {} with these settings",
        (least * 1000.0).ceil() / 1000.0
    ))
}
