//! The controls beside a method: what the same bytes buy without its idea.
//!
//! A method has shown something when it beats all of them at its own size: plain rounding, GPTQ at three dampings (of which
//! the usual 0.01 is far from the best for models with attention sinks), uniform widths with finer groups, the same share of
//! weights kept at random or by `|w| sqrt(H)`, the same bytes spread at random or by depth, as many tiles drawn, and the method
//! itself on general text of as many tokens.

use crate::estimate::predicted_size;
use crate::presets::Method;
use crate::recipe::{LossKind, QuantizeSettings, Recipe};
use crate::task::allocation::{ALLOCATED_METHODS, AllocationSettings, AllocationSignal, ScoreSettings};
use crate::task::circuit::{CircuitSettings, Reference};
use crate::task::uniform::{LINEAR_WIDTHS, counted_bytes, groups, uniform_bytes};
use tailorq_model::Model;
use tailorq_quant::quantize::{Saliency, Unit};
use tailorq_quant::{AlignedSettings, CircuitSignal, Clip, GridKind};
use tailorq_tensor::{Group, Layout};

/// The dampings at which GPTQ stands beside every method.
const DAMPINGS: [f64; 3] = [0.01, 0.1, 1.0];

/// A uniform layout that takes more than the method still stands beside it up to this factor: where none is close below, the
/// method lies between two.
const NEAR_ABOVE: f64 = 1.05;

/// A control.
pub(super) struct Variant {
    /// For tables.
    pub(super) name: String,
    /// Its settings; `None` for the method itself on general text.
    pub(super) settings: Option<Method>,
}

impl Variant {
    fn new(name: String, settings: Method) -> Self {
        Variant { name, settings: Some(settings) }
    }

    /// A quantizer by itself.
    fn plain(name: String, quantize: QuantizeSettings) -> Self {
        Variant::new(name, Method { quantize, ..Method::default() })
    }
}

/// The controls of an arm, by its settled recipe; none for an arm that quantizes nothing.
pub(super) fn controls(model: &Model, recipe: &Recipe, general: bool) -> Vec<Variant> {
    let own = &recipe.quantize;
    if own.method == "half" {
        return Vec::new();
    }
    let bytes = bytes_of(model, recipe);
    let plain = uniform_settings(model, &base_settings(own), (bytes, own.group));
    let layout = match &recipe.allocation {
        Some(_) => plain.first().map_or_else(|| own.layout(), QuantizeSettings::layout),
        None => Layout { symmetric: own.symmetric, ..own.layout() },
    };
    let mut all: Vec<Variant> = plain.into_iter().map(uniform).collect();
    if ALLOCATED_METHODS.contains(&own.method.as_str()) && (own.transform.is_some() || !own.grid.is_affine()) {
        // Rotation and codebook are no idea of the method's, if it has another beside them.
        all.extend(uniform_settings(model, &without_loss(own), (bytes, own.group)).into_iter().map(uniform));
    }
    all.extend(sweep(own, layout));
    all.extend(masks(recipe));
    all.extend(widths(recipe));
    all.extend(random_tiles(own));
    if general && recipe.calibration.is_some() {
        all.push(Variant { name: "on general text".into(), settings: None });
    }
    all
}

fn uniform(quantize: QuantizeSettings) -> Variant {
    let rotated = if quantize.transform.is_some() { " rotated" } else { "" };
    let codebook = if quantize.grid.is_affine() { "" } else { " codebook" };
    let (method, bits, group) = (&quantize.method, quantize.bits.count(), quantize.group);
    Variant::plain(format!("{method}{rotated}{codebook} {bits} bits group {group} (near equal bytes)"), quantize)
}

/// Rounding and GPTQ at all dampings.
fn sweep(own: &QuantizeSettings, layout: Layout) -> Vec<Variant> {
    let plain = |method: &str, damping: f64| QuantizeSettings {
        method: method.into(),
        damping,
        clip: if own.clip == Clip::None { Clip::None } else { Clip::default() },
        ..plain_settings(own, layout)
    };
    let group = layout.group;
    let rounded = plain("rtn", QuantizeSettings::default().damping);
    let mut all = vec![Variant::plain(format!("rtn group {group}"), rounded)];
    let damped = |d| Variant::plain(format!("gptq group {group} damping {d}"), plain("gptq", d));
    all.extend(DAMPINGS.map(damped));
    all
}

/// `0.35`, of a share.
fn percent(share: f64) -> String {
    let percent = format!("{:.4}", 100.0 * share);
    percent.trim_end_matches('0').trim_end_matches('.').into()
}

/// Of a circuit: as many weights by chance, and by a criterion that knows no task.
fn masks(recipe: &Recipe) -> Vec<Variant> {
    let (own, Some(circuit)) = (&recipe.quantize, &recipe.circuit) else { return Vec::new() };
    let of = |(what, signal): (&str, CircuitSignal)| {
        let circuit = CircuitSettings { signal, reference: Reference::Rtn, ..*circuit };
        let name = format!("{what} of {} %, group {}", percent(circuit.keep), own.group);
        let (quantize, allocation) = (without_loss(own), recipe.allocation.clone());
        Variant::new(name, Method { quantize, circuit: Some(circuit), allocation })
    };
    let signals = [("random mask", CircuitSignal::Random), ("|w|sqrt(H) mask", CircuitSignal::MagnitudeHessian)];
    signals.map(of).into()
}

/// Of an allocation: as many bytes, or as many wide units, by chance and by depth alone.
fn widths(recipe: &Recipe) -> Vec<Variant> {
    let Some(allocation) = &recipe.allocation else { return Vec::new() };
    let signals = [AllocationSignal::Random, AllocationSignal::Depth];
    let of = |signal: AllocationSignal| {
        let usual = AllocationSettings::of(signal, allocation.rule.bits_per_weight);
        let rule = if allocation.rule.name.is_budgeted() { usual.rule } else { allocation.rule.clone() };
        let ScoreSettings { unit, widths, .. } = allocation.score.clone();
        let score = ScoreSettings { unit, widths, ..usual.score };
        let allocation = Some(AllocationSettings { rule, score });
        let (quantize, circuit) = (without_loss(&recipe.quantize), recipe.circuit);
        Variant::new(format!("{} widths", signal.name()), Method { quantize, circuit, allocation })
    };
    signals.into_iter().filter(|&s| s != allocation.score.signal).map(of).collect()
}

/// Of salient tiles: as many by chance.
fn random_tiles(own: &QuantizeSettings) -> Option<Variant> {
    let aligned = own.aligned.filter(|a| a.share > 0.0 && a.saliency != Saliency::Random)?;
    let units = if aligned.unit == Unit::Tile { "tiles" } else { "weights" };
    let name = format!("random {units} of {} %, group {}", percent(aligned.share), own.group);
    let aligned = Some(AlignedSettings { saliency: Saliency::Random, ..aligned });
    Some(Variant::plain(name, QuantizeSettings { method: "aligned".into(), aligned, ..without_loss(own) }))
}

/// Bytes of the linears; what its own format would take for a method whose values are stored in a larger one.
fn bytes_of(model: &Model, recipe: &Recipe) -> u64 {
    counted_bytes(model, &recipe.quantize).unwrap_or_else(|| predicted_size(model, recipe).linear_bytes)
}

/// The width and group with the most bytes that are not more than these, and those with the least that are more, if near or if
/// there are no others.
fn uniform_settings(model: &Model, base: &QuantizeSettings, (bytes, own_group): (u64, Group)) -> Vec<QuantizeSettings> {
    let at = |(bits, group)| QuantizeSettings { bits, group, ..base.clone() };
    let all = LINEAR_WIDTHS.into_iter().flat_map(|bits| groups().map(move |group| (bits, group)));
    let sized: Vec<(u64, QuantizeSettings)> = all.map(at).map(|s| (uniform_bytes(model, &s), s)).collect();
    // Of equal ones (short rows are one group of any size) the method's own group.
    let below = sized.iter().filter(|(b, _)| *b <= bytes).max_by_key(|(b, s)| (*b, s.group == own_group));
    // There is always one, even if not a near one.
    let near = |b: u64| b > bytes && (below.is_none() || b as f64 <= NEAR_ABOVE * bytes as f64);
    // Where one is exactly as large there is nothing to bracket.
    let above = sized.iter().filter(|(b, _)| near(*b)).min_by_key(|(b, _)| *b);
    let above = above.filter(|_| below.is_none_or(|(b, _)| *b < bytes));
    below.into_iter().chain(above).map(|(_, s)| s.clone()).collect()
}

/// The method's own quantizer without what is special about it, grid and rotation included, or GPTQ for one that has widths
/// of its own.
fn base_settings(own: &QuantizeSettings) -> QuantizeSettings {
    if ALLOCATED_METHODS.contains(&own.method.as_str()) {
        QuantizeSettings { grid: GridKind::Affine, transform: None, ..without_loss(own) }
    } else {
        QuantizeSettings { method: "gptq".into(), ..plain_settings(own, own.layout()) }
    }
}

/// The defaults with the method's grid and tables.
fn plain_settings(own: &QuantizeSettings, layout: Layout) -> QuantizeSettings {
    QuantizeSettings {
        bits: layout.bits,
        group: layout.group,
        symmetric: own.symmetric,
        embedding_bits: own.embedding_bits,
        embedding_group: own.embedding_group,
        head_bits: own.head_bits,
        head_group: own.head_group,
        scale_bits: own.scale_bits,
        ..QuantizeSettings::default()
    }
}

/// The settings with the usual loss where none is read, so that arms which differ in nothing else are one.
fn without_loss(own: &QuantizeSettings) -> QuantizeSettings {
    let loss = if own.token_weight.reads_gradients() { own.loss } else { LossKind::default() };
    let own_answers = own.own_answers && loss == LossKind::Kl;
    QuantizeSettings { loss, own_answers, ..own.clone() }
}
