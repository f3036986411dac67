//! How bits are spread over a model: what scores its units, and the rule that makes widths of scores.

use crate::error::PipelineError;
use crate::names::by_name;
use crate::task::uniform::LINEAR_WIDTHS;
use serde::{Deserialize, Serialize};
use tailorq_tensor::Bits;

/// The width of a linear that is not quantized.
pub(crate) const HALF: u32 = 16;

/// The methods that take another width for each linear: what a linear costs must follow from its layout alone.
pub(crate) const ALLOCATED_METHODS: [&str; 3] = ["rtn", "gptq", "best"];

/// The methods that weights are tried with: [`DamageSurvey`](tailorq_quant::survey::DamageSurvey) has no statistics for others.
const PROBES: [&str; 2] = ["rtn", "gptq"];

/// The `[allocation]` of a recipe: every linear its own width.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllocationSettings {
    /// From scores to widths.
    pub rule: RuleSettings,
    /// What the scores are.
    pub score: ScoreSettings,
}

by_name! {
    /// What says how much a unit of the model needs its bits.
    AllocationSignal, "allocation signal" {
        /// Information and stability of the outputs of blocks over the prompts (TAQ).
        TaqIs = "taq-is",
        /// What noise as wide as a step of a 4-bit grid on a block's output does to predictions (TAQ-KL).
        TaqKl = "taq-kl",
        /// What quantizing the unit alone costs the task, by [`ScoreSettings::measure`] (TAQO).
        Taqo = "taqo",
        /// The same measurement, over the items' completions unless told otherwise.
        Damage = "damage",
        /// Control: the ends of the model before its middle.
        Depth = "depth",
        /// Control: a seeded draw.
        Random = "random",
    }
}

by_name! {
    /// What gets one width as a whole.
    UnitKind, "unit" {
        /// All linears of a block.
        Block = "block",
        /// q, k and v of a block, and gate and up, as serving engines fuse them; o and down by themselves.
        Fused = "fused",
        /// Each linear.
        Layer = "layer",
    }
}

by_name! {
    /// Whose predictions are compared where a signal compares predictions.
    Span, "span" {
        /// That of the last token of each prompt.
        Last = "last",
        /// Those inside the prompts.
        Prompt = "prompt",
        /// Those of the model's own greedy continuation of each prompt: no labels are read.
        Continuation = "continuation",
        /// Those of the items' completions; all of an item that has none.
        Completion = "completion",
    }
}

by_name! {
    /// What is lost when a unit is quantized.
    MeasureKind, "measure" {
        /// The divergence from the original's predictions, in nats; no labels.
        Divergence = "divergence",
        /// The likelihood of the items' completions, in nats a token: reads labels.
        Likelihood = "likelihood",
        /// Half exact match, half F1 of greedy answers against the items' completions, as TAQO's authors measure: reads
        /// labels, and generates all answers anew for every unit and width.
        Answers = "answers",
    }
}

by_name! {
    /// From scores to widths.
    Rule, "rule" {
        /// The highest share of the scores gets the widest format, all others the narrowest.
        TopShare = "top-share",
        /// The first and last blocks and the highest scores beside them get the widest format, all others the narrowest.
        EndsAndTop = "ends-and-top",
        /// The least sum of damages under a budget, exactly.
        Knapsack = "knapsack",
        /// Down the convex hull of damage and bytes, the rest filled: close to the knapsack, for very many units.
        Hull = "hull",
        /// The same without the fill: a larger budget never takes bytes from a unit.
        HullNested = "hull-nested",
        /// Widths go up one step at a time in the order of scores, until the budget is spent; damages are not compared.
        Ranked = "ranked",
    }
}

impl AllocationSignal {
    /// Whether it looks at nothing of the model but its number of blocks.
    pub fn is_control(self) -> bool {
        matches!(self, AllocationSignal::Depth | AllocationSignal::Random)
    }
}

impl Rule {
    /// Whether a budget decides.
    pub fn is_budgeted(self) -> bool {
        !matches!(self, Rule::TopShare | Rule::EndsAndTop)
    }
}

/// From scores to widths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleSettings {
    /// Which rule.
    pub name: Rule,
    /// For rules with a budget: bits of the linears, counted from bytes of the file (codes, scales, zeros, corrections).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub bits_per_weight: Option<f64>,
    /// For `top-share`: the share of units, from 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub share: Option<f64>,
    /// For `ends-and-top`: blocks at either end.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ends: Option<usize>,
    /// For `ends-and-top`: blocks beside them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub top: Option<usize>,
}

impl RuleSettings {
    /// A rule with a budget.
    pub fn budget(name: Rule, bits_per_weight: f64) -> Self {
        RuleSettings { name, bits_per_weight: Some(bits_per_weight), share: None, ends: None, top: None }
    }

    /// A rule with its usual numbers where none are given: a quarter of the units; two blocks at each end and eight beside them.
    pub fn of(name: Rule, bits_per_weight: Option<f64>, share: Option<f64>) -> Self {
        let none = RuleSettings { name, bits_per_weight, share, ends: None, top: None };
        match name {
            Rule::TopShare => RuleSettings { share: Some(share.unwrap_or(0.25)), ..none },
            Rule::EndsAndTop => RuleSettings { ends: Some(2), top: Some(8), ..none },
            _ => none,
        }
    }

    /// The TAQ papers' share.
    pub fn share(share: f64) -> Self {
        RuleSettings { name: Rule::TopShare, bits_per_weight: None, share: Some(share), ends: None, top: None }
    }

    /// Refuses a rule without its numbers, and numbers that another rule reads.
    pub fn check(&self) -> Result<(), PipelineError> {
        let name = self.name.name();
        let fail = |problem: String| Err(PipelineError::Settings(problem));
        let budget = self.bits_per_weight;
        match (self.name.is_budgeted(), budget) {
            (true, None) => return fail(format!("rule {name} needs a budget: give --bits-per-weight")),
            (true, Some(b)) if !(b.is_finite() && b > 0.0 && b <= 64.0) => {
                return fail(format!("the budget is {b} bits per weight: use a number such as 2.5"));
            }
            (false, Some(_)) => {
                return fail(format!(
                    "rule {name} chooses by scores alone and knows no budget: leave --bits-per-weight out, or use --rule knapsack"
                ));
            }
            _ => {}
        }
        match (self.name == Rule::TopShare, self.share) {
            (true, Some(share)) if (0.0..=1.0).contains(&share) => {}
            (true, _) => return fail("rule top-share needs a share of units from 0 to 1, such as 0.25".into()),
            (false, Some(_)) => return fail(format!("rule {name} reads no share: use --rule top-share")),
            _ => {}
        }
        match (self.name == Rule::EndsAndTop, self.ends.is_some(), self.top.is_some()) {
            (true, true, true) | (false, false, false) => Ok(()),
            (true, ..) => {
                fail("rule ends-and-top needs the blocks at each end and the top ones: 2 and 8 in TAQO".into())
            }
            (false, ..) => fail(format!("rule {name} reads no ends and top: use --rule ends-and-top")),
        }
    }
}

/// What the scores are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreSettings {
    /// What is looked at.
    pub signal: AllocationSignal,
    /// What gets one width as a whole.
    pub unit: UnitKind,
    /// Widths to choose from, ascending: those of codes, and 16 for linears that stay as they are, which is taken to cost
    /// nothing.
    pub widths: Vec<u32>,
    /// Items of the calibration that are looked at, evenly over those that the seed chose; of each only the prompt, unless
    /// `span` or `measure` say otherwise.
    pub prompts: usize,
    /// Whose predictions are compared.
    pub span: Span,
    /// What is lost, for measured damages.
    pub measure: MeasureKind,
    /// For measured damages: the method that makes the weights which are tried, `rtn` or `gptq` (with the Hessian of
    /// these prompts).
    pub probe: String,
    /// Leave the first token of each prompt, an attention sink, out of information and stability, and bring the sampled
    /// vectors to one length. The TAQ papers do not.
    pub without_sinks: bool,
    /// For noise, samples of tokens, and the random control.
    pub seed: u64,
}

impl Default for ScoreSettings {
    /// Divergence over the model's own continuations, each block at each width.
    fn default() -> Self {
        ScoreSettings {
            signal: AllocationSignal::Damage,
            unit: UnitKind::Block,
            widths: LINEAR_WIDTHS.map(Bits::count).to_vec(),
            prompts: 16,
            span: Span::Continuation,
            measure: MeasureKind::Divergence,
            probe: "rtn".into(),
            without_sinks: true,
            seed: 0,
        }
    }
}

impl ScoreSettings {
    /// The usual settings for a signal: statistics of activations want more prompts than measurements do, and `damage` looks
    /// at the items' completions where TAQO looks at the model's own answers.
    pub fn of(signal: AllocationSignal) -> Self {
        let usual = ScoreSettings { signal, ..ScoreSettings::default() };
        match signal {
            AllocationSignal::TaqIs => ScoreSettings { prompts: 128, ..usual },
            AllocationSignal::Damage => ScoreSettings { span: Span::Completion, ..usual },
            _ => usual,
        }
    }

    /// Whether damages are measured with quantized weights.
    pub fn is_measured(&self) -> bool {
        matches!(self.signal, AllocationSignal::Taqo | AllocationSignal::Damage)
    }

    /// Whether the model must see text.
    pub fn reads_data(&self) -> bool {
        !self.signal.is_control()
    }

    /// The narrowest width, which is one of codes: there are two at least. Panics on widths that [`ScoreSettings::check`]
    /// refuses.
    pub(crate) fn narrowest(&self) -> Bits {
        Bits::try_from(self.widths[0]).expect("widths were checked")
    }

    /// Refuses what no model can be scored with.
    pub fn check(&self) -> Result<(), PipelineError> {
        let fail = |problem: String| Err(PipelineError::Settings(problem));
        if self.widths.len() < 2 || self.widths.windows(2).any(|w| w[0] >= w[1]) {
            return fail(format!("the widths are {:?}: list at least two, ascending, such as 2,3,4,8", self.widths));
        }
        let is_width = |w: u32| w == HALF || LINEAR_WIDTHS.map(Bits::count).contains(&w);
        if let Some(width) = self.widths.iter().find(|&&w| !is_width(w)) {
            return fail(format!("no linear has {width} bits: use widths of 2, 3, 4, 8 and 16"));
        }
        if self.prompts == 0 && self.reads_data() {
            return fail("scores of no prompts at all are none: use --prompts 16".into());
        }
        if i64::try_from(self.seed).is_err() {
            return fail(format!("the seed of scores is {}: a recipe holds numbers up to {}", self.seed, i64::MAX));
        }
        if !self.is_measured() {
            return Ok(());
        }
        if !PROBES.contains(&self.probe.as_str()) {
            return fail(format!("there is no method '{}' to try weights with: use rtn or gptq", self.probe));
        }
        match (self.measure, self.span) {
            (MeasureKind::Divergence, _) | (_, Span::Completion) => Ok(()),
            (measure, span) => fail(format!(
                "measure {} reads the items' completions, not the span {}: use --span completion",
                measure.name(),
                span.name()
            )),
        }
    }
}

impl AllocationSettings {
    /// The usual settings for a signal, with a budget.
    pub fn of(signal: AllocationSignal, bits_per_weight: Option<f64>) -> Self {
        let rule = if signal.is_control() { Rule::Ranked } else { Rule::Knapsack };
        AllocationSettings { rule: RuleSettings::of(rule, bits_per_weight, None), score: ScoreSettings::of(signal) }
    }

    /// See [`RuleSettings::check`] and [`ScoreSettings::check`].
    pub fn check(&self) -> Result<(), PipelineError> {
        self.rule.check()?;
        self.score.check()?;
        if self.rule.name == Rule::EndsAndTop && self.score.unit != UnitKind::Block {
            return Err(PipelineError::Settings("rule ends-and-top chooses blocks: use --unit block".into()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_files_and_commands() {
        for signal in AllocationSignal::ALL {
            assert_eq!(signal.name().parse(), Ok(*signal));
            assert_eq!(serde_json::to_value(signal).unwrap(), signal.name());
        }
        let error = "magic".parse::<Rule>().unwrap_err();
        assert!(error.contains("magic") && error.contains("ends-and-top"), "{error}");
    }

    #[test]
    fn settings_that_cannot_work_are_refused() {
        let good =
            AllocationSettings { rule: RuleSettings::budget(Rule::Knapsack, 2.5), score: ScoreSettings::default() };
        good.check().unwrap();
        type Change = fn(&mut AllocationSettings);
        let bad: [(Change, &str); 12] = [
            (|a| a.rule.bits_per_weight = None, "--bits-per-weight"),
            (|a| a.rule.bits_per_weight = Some(f64::NAN), "NaN"),
            (|a| a.rule.bits_per_weight = Some(-1.0), "-1"),
            (|a| a.rule.share = Some(0.25), "top-share"),
            (|a| a.rule.top = Some(8), "ends-and-top"),
            (|a| a.rule.name = Rule::TopShare, "knows no budget"),
            (|a| a.score.widths = vec![4, 2], "ascending"),
            (|a| a.score.widths = vec![4, 5], "no linear has 5 bits"),
            (|a| a.score.widths = vec![4, 6], "no linear has 6 bits"),
            (|a| a.score.prompts = 0, "--prompts"),
            (|a| a.score.probe = "magic".into(), "magic"),
            (|a| a.score.measure = MeasureKind::Answers, "--span completion"),
        ];
        for (change, words) in bad {
            let mut settings = good.clone();
            change(&mut settings);
            let error = settings.check().unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
        }
        let share = AllocationSettings { rule: RuleSettings::share(1.5), ..good.clone() };
        assert!(share.check().is_err());
        let ends =
            RuleSettings { name: Rule::EndsAndTop, ends: Some(2), top: Some(8), bits_per_weight: None, share: None };
        let layers = ScoreSettings { unit: UnitKind::Layer, ..ScoreSettings::default() };
        assert!(AllocationSettings { rule: ends, score: layers }.check().is_err());
    }
}
