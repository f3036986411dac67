//! The controls beside a method: what the same bytes buy without its idea.
//!
//! A method has shown something when it beats all of them at its own size: plain rounding, GPTQ at three dampings (of which
//! the usual 0.01 is far from the best for models with attention sinks), uniform widths with finer groups, the same share of
//! weights kept at random or by `|w| sqrt(H)`, and the method itself on general text.

use crate::estimate::predicted_size;
use crate::presets::Method;
use crate::recipe::{LossKind, QuantizeSettings, Recipe};
use crate::task::allocation::ALLOCATED_METHODS;
use crate::task::circuit::{CircuitSettings, Reference};
use crate::task::uniform::{LINEAR_WIDTHS, counted_bytes, groups, uniform_bytes};
use tailorq_model::Model;
use tailorq_quant::{CircuitSignal, Clip};
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

/// The controls of an arm, by its settled recipe; none for an arm that quantizes nothing.
pub(super) fn controls(model: &Model, recipe: &Recipe, general: bool) -> Vec<Variant> {
    let own = &recipe.quantize;
    if own.method == "half" {
        return Vec::new();
    }
    let bytes = bytes_of(model, recipe);
    let base = base_settings(own);
    let uniform = uniform_settings(model, &base, (bytes, own.group));
    let layout = match &recipe.allocation {
        Some(_) => uniform.first().map_or_else(|| own.layout(), QuantizeSettings::layout),
        None => own.layout(),
    };
    let mut all = Vec::new();
    let mut add = |name: String, settings: Method| all.push(Variant { name, settings: Some(settings) });
    for quantize in uniform {
        let name =
            format!("{} {} bits group {} (near equal bytes)", base.method, quantize.bits.count(), quantize.group);
        add(name, Method { quantize, ..Method::default() });
    }
    let plain = |method: &str, damping: f64| QuantizeSettings {
        method: method.into(),
        damping,
        clip: if own.clip == Clip::None { Clip::None } else { Clip::default() },
        ..plain_settings(own, layout)
    };
    let group = layout.group;
    let at = |quantize| Method { quantize, ..Method::default() };
    add(format!("rtn group {group}"), at(plain("rtn", QuantizeSettings::default().damping)));
    for damping in DAMPINGS {
        add(format!("gptq group {group} damping {damping}"), at(plain("gptq", damping)));
    }
    if let Some(circuit) = &recipe.circuit {
        let of = |signal| CircuitSettings { signal, reference: Reference::Rtn, ..*circuit };
        for (what, signal) in
            [("random mask", CircuitSignal::Random), ("|w|sqrt(H) mask", CircuitSignal::MagnitudeHessian)]
        {
            let percent = format!("{:.4}", 100.0 * circuit.keep);
            let percent = percent.trim_end_matches('0').trim_end_matches('.');
            let name = format!("{what} of {percent} %, group {}", own.group);
            let quantize = without_loss(own);
            add(name, Method { quantize, circuit: Some(of(signal)), allocation: recipe.allocation.clone() });
        }
    }
    if general && recipe.calibration.is_some() {
        all.push(Variant { name: "on general text".into(), settings: None });
    }
    all
}

/// Bytes of the linears; what its own format would take for a method whose values are stored in a larger one.
fn bytes_of(model: &Model, recipe: &Recipe) -> u64 {
    counted_bytes(model, &recipe.quantize).unwrap_or_else(|| predicted_size(model, recipe).linear_bytes)
}

/// The width and group with the most bytes that are not more than these, and those with the least that are more, if near.
fn uniform_settings(model: &Model, base: &QuantizeSettings, (bytes, own_group): (u64, Group)) -> Vec<QuantizeSettings> {
    let at = |(bits, group)| QuantizeSettings { bits, group, ..base.clone() };
    let all = LINEAR_WIDTHS.into_iter().flat_map(|bits| groups().map(move |group| (bits, group)));
    let sized: Vec<(u64, QuantizeSettings)> = all.map(at).map(|s| (uniform_bytes(model, &s), s)).collect();
    // Of equal ones (short rows are one group of any size) the method's own group.
    let below = sized.iter().filter(|(b, _)| *b <= bytes).max_by_key(|(b, s)| (*b, s.group == own_group));
    let near = |b: u64| b > bytes && b as f64 <= NEAR_ABOVE * bytes as f64;
    // Where one is exactly as large there is nothing to bracket.
    let above = sized.iter().filter(|(b, _)| near(*b)).min_by_key(|(b, _)| *b);
    let above = above.filter(|_| below.is_none_or(|(b, _)| *b < bytes));
    below.into_iter().chain(above).map(|(_, s)| s.clone()).collect()
}

/// The method's own quantizer without what is special about it, or GPTQ for one that has widths of its own.
fn base_settings(own: &QuantizeSettings) -> QuantizeSettings {
    if ALLOCATED_METHODS.contains(&own.method.as_str()) {
        without_loss(own)
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
        ..QuantizeSettings::default()
    }
}

/// The settings with the usual loss where none is read, so that arms which differ in nothing else are one.
fn without_loss(own: &QuantizeSettings) -> QuantizeSettings {
    let loss = if own.token_weight.reads_gradients() { own.loss } else { LossKind::default() };
    QuantizeSettings { loss, ..own.clone() }
}
