//! Named settings: a published method is a point in the space of settings, and so is what works best here.

use crate::recipe::{LossKind, QuantizeSettings};
use crate::task::allocation::{
    AllocationSettings, AllocationSignal, MeasureKind, Rule, RuleSettings, ScoreSettings, Span,
};
use crate::task::circuit::{CircuitSettings, Reference};
use crate::task::needs_of;
use tailorq_quant::quantize::Salient;
use tailorq_quant::{AlignedSettings, CircuitSignal, Clip, GridKind, TransformSettings};
use tailorq_tensor::{Bits, Group};

/// A name for settings.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// As on the command line, where it stands for a method.
    pub name: &'static str,
    /// One line for help texts.
    pub about: &'static str,
    settings: fn() -> Method,
}

/// What a method fixes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Method {
    /// How weights become codes.
    pub quantize: QuantizeSettings,
    /// The weights that stay at 16 bits, if any.
    pub circuit: Option<CircuitSettings>,
    /// How bits are spread over the linears; all alike without one.
    pub allocation: Option<AllocationSettings>,
}

impl Method {
    /// Whether anything in it reads the task's gradients, and with them the loss and a survey.
    pub fn reads_gradients(&self) -> bool {
        needs_of(&self.quantize, self.circuit.as_ref()).is_some()
    }

    /// Whether anything in it may read a Hessian: the quantizer, a reference run of GPTQ, or what measures widths.
    pub fn reads_hessian(&self) -> bool {
        let quantizer = tailorq_quant::find(&self.quantize.method);
        quantizer.is_none_or(|q| q.needs().hessian) || self.circuit.is_some() || self.allocation.is_some()
    }
}

/// All methods, quantizers by themselves first.
pub const PRESETS: &[Preset] = &[
    Preset { name: "rtn", about: "round to nearest; no calibration", settings: || plain("rtn") },
    Preset { name: "gptq", about: "GPTQ: error feedback through the Hessian of the inputs", settings: gptq },
    Preset {
        name: "gptq-hadamard",
        about: "GPTQ after a random rotation of the inputs, which leaves no outliers to the grid",
        settings: || rotated(gptq()),
    },
    Preset {
        name: "gptq-codebook",
        about: "the same with a codebook for each matrix and one scale a row: 2.02 bits a weight and the like",
        settings: || codebook(gptq()),
    },
    Preset {
        name: "best",
        about: "per matrix the best of rounding and several GPTQs, judged on held-out items",
        settings: || baseline("best", |s| s.true_sequential = true),
    },
    Preset {
        name: "half",
        about: "linears stay at 16 bits; for the tables alone, and as a control",
        settings: || plain("half"),
    },
    Preset {
        name: "tacq",
        about: "GPTQ around the weights that carry the task, which stay at 16 bits; the others are rotated",
        settings: tacq,
    },
    Preset {
        name: "tacq-plain",
        about: "the same without a rotation, and chosen by the product of TACQ's two signals",
        settings: tacq_plain,
    },
    Preset {
        name: "tacq-hadamard",
        about: "tacq-plain after a rotation of the other weights: tacq with the product of signals",
        settings: || rotated(tacq_plain()),
    },
    Preset {
        name: "aligned",
        about: "2-bit GPTQ with 4-bit corrections of the 5 % of the 16-weight tiles that gain most",
        settings: || aligned("aligned", AlignedSettings::default()),
    },
    Preset {
        name: "aligned-task",
        about: "aligned, with tiles ranked by squared gradients of the task",
        settings: || aligned("aligned-task", AlignedSettings::default()),
    },
    Preset {
        name: "aligned-paper",
        about: "the memory-aligned paper as written: another name of aligned-paper-50",
        settings: || aligned("aligned", AlignedSettings::paper(50, Salient::Mean4)),
    },
    Preset {
        name: "aligned-paper-50",
        about: "the memory-aligned paper as written: means of four in 50 of 128 columns' worth of tiles",
        settings: || aligned("aligned", AlignedSettings::paper(50, Salient::Mean4)),
    },
    Preset {
        name: "aligned-paper-100",
        about: "the same with 100 of 128",
        settings: || aligned("aligned", AlignedSettings::paper(100, Salient::Mean4)),
    },
    Preset {
        name: "aligned-true8-50",
        about: "the memory-aligned paper read as true 8 bit in 50 of 128 columns' worth of tiles (4.7 bits a weight)",
        settings: || aligned("aligned", AlignedSettings::paper(50, Salient::EightBit)),
    },
    Preset {
        name: "aligned-true8-100",
        about: "the same with 100 of 128 (7.0 bits a weight)",
        settings: || aligned("aligned", AlignedSettings::paper(100, Salient::EightBit)),
    },
    Preset {
        name: "slim-llm",
        about: "SliM-LLM: column blocks of mixed widths around 2 or 3 bits (simulated at 16 bits)",
        settings: || baseline("slim-llm", |_| ()),
    },
    Preset {
        name: "spqr",
        about: "SpQR: groups of 16 with 3-bit scales, outliers at 16 bits (simulated)",
        settings: || baseline("spqr", |s| (s.damping, s.act_order) = (1.0, true)),
    },
    Preset {
        name: "squeezellm",
        about: "SqueezeLLM: a table of levels a row by the Fisher information, sparse outliers (simulated)",
        settings: || baseline("squeezellm", |s| (s.group, s.loss) = (Group::Row, LossKind::Full)),
    },
    Preset {
        name: "awq",
        about: "AWQ: inputs scaled by their activations, clipped groups (simulated)",
        settings: || baseline("awq", |_| ()),
    },
    Preset {
        name: "billm",
        about: "BiLLM: one bit a weight, salient columns twice; 3 bits a weight in all (simulated)",
        settings: || baseline("billm", |_| ()),
    },
    Preset {
        name: "pb-llm",
        about: "PB-LLM: a tenth of the weights at 8 bits, the rest at one; 2.7 bits in all (simulated)",
        settings: || baseline("pb-llm", |s| s.group = Group::Row),
    },
    Preset { name: "tacq-paper", about: "TACQ as its authors run it", settings: tacq_paper },
    Preset {
        name: "taqo",
        about: "GPTQ with a width for each block under a budget, by the measured divergence of the model's own answers",
        settings: || budgeted(AllocationSignal::Taqo),
    },
    Preset {
        name: "taq",
        about: "the same by information and stability of activations over the task's prompts",
        settings: || budgeted(AllocationSignal::TaqIs),
    },
    Preset {
        name: "taq-kl",
        about: "the same by what noise on each block does to the predictions",
        settings: || budgeted(AllocationSignal::TaqKl),
    },
    Preset {
        name: "depth",
        about: "control for these: the ends of the model get the bits",
        settings: || budgeted(AllocationSignal::Depth),
    },
    Preset {
        name: "random",
        about: "control for these: drawn blocks get the bits",
        settings: || budgeted(AllocationSignal::Random),
    },
    Preset {
        name: "taq-paper",
        about: "TAQ as its authors run it (zero points are rounded, theirs are not): a quarter of the blocks 8 bits, others 4",
        settings: taq_paper,
    },
    Preset { name: "taq-kl-paper", about: "TAQ-KL as its authors run it, likewise", settings: taq_kl_paper },
    Preset {
        name: "taqo-paper",
        about: "TAQO by answers against labels, likewise; the ends and the top 8 blocks at 16 bits, others 4",
        settings: taqo_paper,
    },
];

impl Preset {
    /// The preset of that name.
    pub fn find(name: &str) -> Option<&'static Preset> {
        PRESETS.iter().find(|p| p.name == name)
    }

    /// Its settings.
    pub fn method(&self) -> Method {
        (self.settings)()
    }
}

/// A quantizer with the default settings.
fn plain(method: &str) -> Method {
    Method { quantize: QuantizeSettings { method: method.into(), ..QuantizeSettings::default() }, ..Method::default() }
}

fn gptq() -> Method {
    Method::default()
}

/// The method with its base in the rotated domain.
fn rotated(method: Method) -> Method {
    let quantize = QuantizeSettings { transform: Some(TransformSettings::hadamard(0)), ..method.quantize };
    Method { quantize, ..method }
}

/// The same on codebooks, with one scale a row.
fn codebook(method: Method) -> Method {
    let method = rotated(method);
    let quantize = QuantizeSettings { grid: GridKind::Codebook, group: Group::Row, ..method.quantize };
    Method { quantize, ..method }
}

/// On a base of 2 bits.
fn aligned(method: &str, aligned: AlignedSettings) -> Method {
    let quantize = QuantizeSettings {
        method: method.into(),
        bits: Bits::Two,
        aligned: Some(aligned),
        ..QuantizeSettings::default()
    };
    Method { quantize, ..Method::default() }
}

/// A published method as its authors' code runs it: statistics of a block are gathered before any of its linears is
/// quantized.
fn baseline(method: &str, change: fn(&mut QuantizeSettings)) -> Method {
    let mut quantize =
        QuantizeSettings { method: method.into(), true_sequential: false, ..QuantizeSettings::default() };
    change(&mut quantize);
    Method { quantize, ..Method::default() }
}

/// What works best here: the base is rotated, and `|w|` times the gradient chooses alone. The error of rounding, TACQ's other
/// factor, says less once a rotation has made the errors of all weights alike.
fn tacq() -> Method {
    let circuit = CircuitSettings { signal: CircuitSignal::Msg, ..CircuitSettings::default() };
    rotated(Method { circuit: Some(circuit), ..Method::default() })
}

fn tacq_plain() -> Method {
    Method { circuit: Some(CircuitSettings::default()), ..Method::default() }
}

/// Embedding and head at 16 bits, which these authors do not quantize.
fn whole_tables(quantize: QuantizeSettings) -> QuantizeSettings {
    QuantizeSettings { embedding_bits: 16, head_bits: 16, ..quantize }
}

/// One grid a row, clip search, the loss of prompt and answer, and a full run of GPTQ as the reference
/// (The-Inscrutable-X/TACQ, `evaluate_llama3_8b.sh`).
fn tacq_paper() -> Method {
    Method {
        quantize: whole_tables(QuantizeSettings {
            group: Group::Row,
            clip: Clip::Magnitude,
            loss: LossKind::Full,
            ..QuantizeSettings::default()
        }),
        circuit: Some(CircuitSettings {
            keep: 0.0035,
            signal: CircuitSignal::Tacq,
            reference: Reference::Gptq,
            seed: 0,
        }),
        ..Method::default()
    }
}

/// Bits per weight of the methods with a budget, where none is given.
const BUDGET: f64 = 3.0;

/// GPTQ with widths under a budget.
fn budgeted(signal: AllocationSignal) -> Method {
    Method { allocation: Some(AllocationSettings::of(signal, Some(BUDGET))), ..Method::default() }
}

/// Rounding to nearest, extremes as they are, groups of 128, two widths (LeVi et al. 2025, arXiv 2511.06516, and their script).
/// Their zero points are not rounded, which no packed layout can store: here they are codes.
fn paper(rule: RuleSettings, score: ScoreSettings) -> Method {
    let quantize =
        whole_tables(QuantizeSettings { method: "rtn".into(), clip: Clip::None, ..QuantizeSettings::default() });
    let score = ScoreSettings { without_sinks: false, ..score };
    Method { quantize, allocation: Some(AllocationSettings { rule, score }), ..Method::default() }
}

fn taq_paper() -> Method {
    let signal = AllocationSignal::TaqIs;
    paper(
        RuleSettings::share(0.25),
        ScoreSettings { signal, prompts: 256, widths: vec![4, 8], ..ScoreSettings::default() },
    )
}

fn taq_kl_paper() -> Method {
    let (signal, span) = (AllocationSignal::TaqKl, Span::Last);
    paper(
        RuleSettings::share(0.25),
        ScoreSettings { signal, span, prompts: 256, widths: vec![4, 8], ..ScoreSettings::default() },
    )
}

fn taqo_paper() -> Method {
    let rule = RuleSettings { name: Rule::EndsAndTop, ends: Some(2), top: Some(8), bits_per_weight: None, share: None };
    let (signal, span, measure) = (AllocationSignal::Taqo, Span::Completion, MeasureKind::Answers);
    let widths = vec![4, 16];
    paper(rule, ScoreSettings { signal, span, measure, widths, prompts: 32, ..ScoreSettings::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_valid_and_found_by_its_name() {
        for preset in PRESETS {
            let method = preset.method();
            method.quantize.check().unwrap();
            method.circuit.as_ref().map_or(Ok(()), CircuitSettings::check).unwrap();
            method.allocation.as_ref().map_or(Ok(()), AllocationSettings::check).unwrap();
            assert_eq!(Preset::find(preset.name).unwrap().about, preset.about);
        }
        assert!(Preset::find("magic").is_none());
    }
}
