//! The recipe: everything that decides the bytes of an artifact, and nothing that does not.

use crate::error::PipelineError;
use crate::task::allocation::AllocationSettings;
use crate::task::circuit::CircuitSettings;
use crate::task::uniform::LINEAR_WIDTHS;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use tailorq_quant::survey::Needs;
use tailorq_quant::{AlignedSettings, Clip, DriftCorrection, GridKind, TokenWeight, TransformSettings};
use tailorq_tensor::{Bits, Group, Layout, ScaleBits};

/// Bumped when an old recipe no longer means the same bytes.
pub const RECIPE_SCHEMA: u32 = 4;

/// A quantization run, repeatable byte for byte. Threads, output directory and times are not part of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Schema of the writer: another number means another recipe format.
    pub schema: u32,
    /// Version of tailorq that wrote it.
    pub tailorq: String,
    /// The checkpoint.
    pub model: ModelInput,
    /// How weights become codes.
    pub quantize: QuantizeSettings,
    /// The text that shapes the Hessians; absent for methods that need none.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub calibration: Option<CalibrationInput>,
    /// The weights that stay at 16 bits; absent when there are none.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub circuit: Option<CircuitSettings>,
    /// How bits are spread over the linears; absent when all are alike, or a plan says it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub allocation: Option<AllocationSettings>,
    /// A plan that was made before.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub plan: Option<PlanInput>,
    /// What computed it, and in which precision; absent for the CPU. Another device rounds differently: a run is not resumed
    /// on one, and a repeated recipe gives other bytes there.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub device: Option<String>,
}

/// The plan of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanInput {
    /// As the user wrote it.
    pub file: PathBuf,
    /// SHA-256 of its bytes, hexadecimal.
    pub sha256: String,
}

/// The checkpoint of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelInput {
    /// Path or hub id, as the user wrote it.
    pub source: String,
    /// SHA-256 over the weight files in order, hexadecimal.
    pub sha256: String,
}

/// Whose prediction the loss of a calibration item counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossKind {
    /// The tokens of the completion, after its prompt; all tokens of an item that has no completion.
    #[default]
    Completion,
    /// All tokens, the prompt's too.
    Full,
    /// No label at all: how far the predictions of the model, rounded to nearest on the grid of these settings, are from the
    /// original's (Kullback-Leibler), for each token of a completion, or of the original's own greedy answer to an item
    /// without one (to any item, with [`QuantizeSettings::own_answers`]). At the original itself this has no gradient; at the rounded model, `gradient * (rounded - original)` sums
    /// to twice the divergence, to second order.
    Kl,
}

impl LossKind {
    /// Every kind.
    pub const ALL: [LossKind; 3] = [LossKind::Completion, LossKind::Full, LossKind::Kl];

    /// As in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            LossKind::Completion => "completion",
            LossKind::Full => "full",
            LossKind::Kl => "kl",
        }
    }
}

impl FromStr for LossKind {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let names = LossKind::ALL.map(LossKind::name).join(", ");
        LossKind::ALL
            .into_iter()
            .find(|l| l.name() == s)
            .ok_or_else(|| format!("there is no loss '{s}': use one of {names}"))
    }
}

/// How weights become codes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizeSettings {
    /// Name in the quantizers' registry, such as `rtn` or `gptq`.
    pub method: String,
    /// Code width of the linears.
    pub bits: Bits,
    /// Inputs that share a scale.
    pub group: Group,
    /// Symmetric grid: no zeros are stored.
    pub symmetric: bool,
    /// How the range of each group is found.
    pub clip: Clip,
    /// Added to the Hessian's diagonal, as a share of its mean.
    pub damping: f64,
    /// Quantize columns in the order of falling Hessian diagonal.
    pub act_order: bool,
    /// How much each token counts in the Hessian.
    pub token_weight: TokenWeight,
    /// Which tokens the loss of a gradient counts, where one is read.
    pub loss: LossKind,
    /// For [`LossKind::Kl`]: the original's own greedy answers take the place of completions, also where items have some.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own_answers: bool,
    /// How much weights make up for what quantized predecessors did to their inputs, 0 to 1.
    #[serde(default)]
    pub drift_inputs: f64,
    /// The same for the residual stream, in linears that write to it.
    #[serde(default)]
    pub drift_residual: f64,
    /// How much of the correlations between inputs is disbelieved: the Hessian's elements off the diagonal are multiplied by
    /// `1 - shrink`, 0 to 1.
    #[serde(default)]
    pub shrink: f64,
    /// Later linears of a block see the quantized earlier ones.
    pub true_sequential: bool,
    /// Code width of the embedding: 4, 6, 8, or 16 for half precision.
    pub embedding_bits: u32,
    /// Inputs that share a scale in the embedding; by its width when absent.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub embedding_group: Option<Group>,
    /// Code width of an untied head: 4, 6, 8, or 16 for half precision.
    pub head_bits: u32,
    /// Inputs that share a scale in an untied head; by its width when absent.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub head_group: Option<Group>,
    /// Width of stored scales, of linears and of tables of 4 bits. Wider tables have scales of 16: with 8 their error would grow
    /// by a tenth, as much as is saved.
    #[serde(skip_serializing_if = "ScaleBits::is_sixteen", default)]
    pub scale_bits: ScaleBits,
    /// What codes of linears stand for; codebooks for methods that can.
    #[serde(skip_serializing_if = "GridKind::is_affine", default)]
    pub grid: GridKind,
    /// What is done to the inputs of linears before they meet their packed base, for methods that can; nothing when absent.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub transform: Option<TransformSettings>,
    /// Salient tiles, for the methods that begin with `aligned` alone.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub aligned: Option<AlignedSettings>,
}

impl Default for QuantizeSettings {
    fn default() -> Self {
        QuantizeSettings {
            method: "gptq".into(),
            bits: Bits::Three,
            group: Group::Inputs(128),
            symmetric: false,
            clip: Clip::default(),
            damping: 0.01,
            act_order: false,
            token_weight: TokenWeight::default(),
            loss: LossKind::default(),
            own_answers: false,
            drift_inputs: 0.0,
            drift_residual: 0.0,
            shrink: 0.0,
            true_sequential: true,
            embedding_bits: 8,
            embedding_group: None,
            head_bits: 8,
            head_group: None,
            scale_bits: ScaleBits::default(),
            grid: GridKind::Affine,
            transform: None,
            aligned: None,
        }
    }
}

impl QuantizeSettings {
    /// Layout of the linears. With codebooks, widths above 4 bits are symmetric grids.
    pub fn layout(&self) -> Layout {
        let symmetric = self.symmetric || self.grid == GridKind::Codebook;
        Layout { symmetric, scales: self.scale_bits, ..Layout::new(self.bits, self.group) }
    }

    /// Both drift corrections.
    pub fn drift(&self) -> DriftCorrection {
        DriftCorrection { inputs: self.drift_inputs, residual: self.drift_residual }
    }

    /// Layout of the embedding, or `None` for half precision.
    pub fn embedding_layout(&self) -> Option<Layout> {
        table_layout(self.embedding_bits, self.embedding_group, self.scale_bits)
    }

    /// Layout of an untied head, or `None` for half precision.
    pub fn head_layout(&self) -> Option<Layout> {
        table_layout(self.head_bits, self.head_group, self.scale_bits)
    }

    /// What a survey must hold for them.
    pub fn survey_needs(&self) -> Needs {
        let square = tailorq_quant::find(&self.method).is_some_and(|q| q.needs().square);
        Needs { token_energies: self.token_weight.reads_gradients(), square, ..Needs::default() }
    }

    /// Refuses settings that no layout or method has.
    pub fn check(&self) -> Result<(), PipelineError> {
        let fail = |message: String| Err(PipelineError::Settings(message));
        let Some(method) = tailorq_quant::find(&self.method) else {
            let names: Vec<_> = tailorq_quant::quantize::ALL.iter().map(|q| q.name()).collect();
            return fail(format!("there is no method '{}': use one of {}", self.method, names.join(", ")));
        };
        if !LINEAR_WIDTHS.contains(&self.bits) {
            return fail(format!("no linear has {} bits: use 2, 3, 4 or 8", self.bits.count()));
        }
        match self.transform {
            Some(_) if !method.rotates() => {
                return fail(format!("{} knows no input transform: leave it out, or use rtn or gptq", self.method));
            }
            None if self.grid == GridKind::Codebook && !method.rotates() => {
                return fail(format!("{} knows no codebooks: use an affine grid, or rtn or gptq", self.method));
            }
            Some(transform) if i64::try_from(transform.seed).is_err() => {
                return fail(format!("the seed of the transform is {}: use one below 2^63", transform.seed));
            }
            _ => {}
        }
        // Where all is simulated or stays at 16 bits, the tables alone would have them, and the bytes of a format that does not exist.
        if !self.scale_bits.is_sixteen() && method.stores_half() {
            return fail(format!("{} stores no codes of linears: leave out --scale-bits", self.method));
        }
        if !(self.damping.is_finite() && (0.0..=100.0).contains(&self.damping)) {
            return fail(format!("damping is {}: use a share of the mean diagonal from 0 to 100", self.damping));
        }
        match &self.aligned {
            Some(_) if !self.method.starts_with("aligned") => {
                return fail(format!("{} has no salient tiles: use a method that begins with aligned", self.method));
            }
            Some(aligned) => aligned.check(self.layout()).map_err(|e| PipelineError::Settings(e.to_string()))?,
            None => {}
        }
        if self.own_answers && self.loss != LossKind::Kl {
            return fail("the model's own answers are no labels: use --own-answers with --loss kl".into());
        }
        for (what, share) in [("inputs", self.drift_inputs), ("residual", self.drift_residual)] {
            if !(0.0..=1.0).contains(&share) {
                return fail(format!("the drift correction of the {what} is {share}: use 0 to 1"));
            }
        }
        if !(0.0..=1.0).contains(&self.shrink) {
            return fail(format!("the shrinkage of correlations is {}: use 0 to 1", self.shrink));
        }
        if self.drift().is_on() && (method.needs().held_out || self.shrink > 0.0) {
            return fail("drift is corrected from all items and all correlations: leave out best and --shrink".into());
        }
        if self.drift().is_on() && !self.true_sequential {
            return fail("drift is corrected input by input: leave true_sequential on".into());
        }
        for (what, bits) in [("embedding", self.embedding_bits), ("head", self.head_bits)] {
            if ![4, 6, 8, 16].contains(&bits) {
                return fail(format!("{what} bits are {bits}: use 4, 6, 8 or 16"));
            }
        }
        Ok(())
    }
}

/// Layout of a table at 4, 6 or 8 bits, in groups of 32, 64 and 128 unless told otherwise; `None` for half precision.
fn table_layout(bits: u32, group: Option<Group>, scales: ScaleBits) -> Option<Layout> {
    let bits = Bits::try_from(bits).ok()?;
    let by_width = match bits {
        Bits::Eight => 128,
        Bits::Six => 64,
        _ => 32,
    };
    let scales = if bits <= Bits::Four { scales } else { ScaleBits::Sixteen };
    Some(Layout { scales, ..Layout::new(bits, group.unwrap_or(Group::Inputs(by_width))) })
}

/// The calibration of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationInput {
    /// As the user wrote it.
    pub file: PathBuf,
    /// SHA-256 of its bytes, hexadecimal.
    pub sha256: String,
    /// Items (or windows of a text) taken.
    pub samples: usize,
    /// Longest item in tokens; window length of a text.
    pub sequence_length: usize,
    /// Chooses the items.
    pub seed: u64,
    /// Take marks like `<<48/2=24>>`, which GSM8K's training items carry, out of the completions.
    #[serde(default)]
    pub drop_calculator_marks: bool,
    /// Text of other kinds among the items, so that the rest of the model is not forgotten.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub general: Option<GeneralInput>,
}

/// General text that is blended into the calibration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GeneralInput {
    /// Text file or JSONL, as the user wrote it.
    pub file: PathBuf,
    /// SHA-256 of its bytes, hexadecimal.
    pub sha256: String,
    /// Its share of the items, from 0 to 1.
    pub mix: f64,
}

impl CalibrationInput {
    /// The same wherever its files lie: their hashes tell what they are.
    pub(crate) fn without_paths(&self) -> Self {
        let general = self.general.clone().map(|g| GeneralInput { file: PathBuf::new(), ..g });
        CalibrationInput { file: PathBuf::new(), general, ..self.clone() }
    }
}

impl Recipe {
    /// Reads a recipe file.
    pub fn read(path: &Path) -> Result<Self, PipelineError> {
        let fail = |problem: String| PipelineError::Recipe { path: path.to_path_buf(), problem };
        let text = std::fs::read_to_string(path).map_err(|e| fail(format!("cannot be read: {e}")))?;
        let recipe: Recipe = toml::from_str(&text).map_err(|e| fail(format!("is not a recipe: {e}")))?;
        if recipe.schema != RECIPE_SCHEMA {
            return Err(fail(format!(
                "has schema {}, this tailorq reads schema {RECIPE_SCHEMA}: use the tailorq that wrote it ({})",
                recipe.schema, recipe.tailorq
            )));
        }
        recipe.quantize.check()?;
        recipe.circuit.as_ref().map_or(Ok(()), CircuitSettings::check)?;
        recipe.allocation.as_ref().map_or(Ok(()), AllocationSettings::check)?;
        Ok(recipe)
    }

    /// The recipe as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a recipe holds only what TOML can say")
    }

    /// Refuses inputs that are not those which `expected` (a recipe being repeated) names.
    pub fn check_inputs(&self, expected: &Recipe) -> Result<(), PipelineError> {
        let fail = |path: &Path, what: &str| {
            let problem = format!("is not the {what} that the recipe was made with: its SHA-256 differs");
            Err(PipelineError::Recipe { path: path.to_path_buf(), problem })
        };
        if self.model.sha256 != expected.model.sha256 {
            return fail(Path::new(&self.model.source), "checkpoint");
        }
        match (&self.plan, &expected.plan) {
            (Some(here), Some(there)) if here.sha256 != there.sha256 => return fail(&here.file, "plan"),
            _ => {}
        }
        let (Some(here), Some(there)) = (&self.calibration, &expected.calibration) else { return Ok(()) };
        if here.sha256 != there.sha256 {
            return fail(&here.file, "calibration file");
        }
        match (&here.general, &there.general) {
            (Some(here), Some(there)) if here.sha256 != there.sha256 => fail(&here.file, "general text"),
            _ => Ok(()),
        }
    }

    /// What differs between two recipes, a line each: `quantize.bits: 3 here, 2 there`.
    pub fn differences(&self, there: &Recipe) -> Vec<String> {
        let (mut mine, mut theirs) = (Vec::new(), Vec::new());
        for (recipe, out) in [(self, &mut mine), (there, &mut theirs)] {
            let table = toml::Table::try_from(recipe).expect("a recipe holds only what TOML can say");
            flatten("", &toml::Value::Table(table), out);
        }
        let find = |list: &[(String, String)], key: &str| {
            list.iter().find(|(k, _)| k == key).map_or("nothing".into(), |(_, v)| v.clone())
        };
        let mut keys: Vec<&String> = mine.iter().chain(&theirs).map(|(k, _)| k).collect();
        keys.sort();
        keys.dedup();
        keys.into_iter()
            .map(|k| (k, find(&mine, k), find(&theirs, k)))
            .filter(|(_, a, b)| a != b)
            .map(|(k, a, b)| format!("{k}: {a} here, {b} there"))
            .collect()
    }
}

fn flatten(prefix: &str, value: &toml::Value, out: &mut Vec<(String, String)>) {
    match value {
        toml::Value::Table(table) => {
            for (key, inner) in table {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&path, inner, out);
            }
        }
        other => out.push((prefix.to_string(), other.to_string())),
    }
}

/// SHA-256 over the bytes of files in order, hexadecimal. Calls `read` with the bytes taken since the last call.
pub fn hash_files<P: AsRef<Path>>(files: &[P], mut read: impl FnMut(usize)) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    for file in files {
        let mut file = std::fs::File::open(file)?;
        loop {
            let n = file.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            hasher.update(&buffer[..n]);
            read(n);
        }
    }
    Ok(hex(&hasher.finalize()))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::allocation::{Rule, RuleSettings, ScoreSettings};

    fn recipe() -> Recipe {
        Recipe {
            schema: RECIPE_SCHEMA,
            tailorq: "0.1.0".into(),
            model: ModelInput { source: "org/name".into(), sha256: "00".into() },
            quantize: QuantizeSettings {
                transform: Some(TransformSettings::hadamard(3)),
                grid: GridKind::Codebook,
                head_group: Some(Group::Inputs(64)),
                ..QuantizeSettings::default()
            },
            calibration: Some(CalibrationInput {
                file: "a.jsonl".into(),
                sha256: "11".into(),
                samples: 128,
                sequence_length: 2048,
                seed: 7,
                drop_calculator_marks: true,
                general: Some(GeneralInput { file: "b.txt".into(), sha256: "22".into(), mix: 0.25 }),
            }),
            circuit: Some(CircuitSettings::default()),
            allocation: Some(AllocationSettings {
                rule: RuleSettings::budget(Rule::Knapsack, 2.5),
                score: ScoreSettings::default(),
            }),
            plan: Some(PlanInput { file: "plan.safetensors".into(), sha256: "22".into() }),
            device: Some("cuda NVIDIA H200, f32".into()),
        }
    }

    #[test]
    fn a_recipe_survives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.toml");
        std::fs::write(&path, recipe().to_toml()).unwrap();
        assert_eq!(Recipe::read(&path).unwrap(), recipe());
    }

    #[test]
    fn scales_of_eight_bits_are_in_every_layout_of_few_bits() {
        let settings =
            QuantizeSettings { scale_bits: ScaleBits::Eight, embedding_bits: 4, head_bits: 8, ..recipe().quantize };
        settings.check().unwrap();
        for layout in [Some(settings.layout()), settings.embedding_layout()] {
            assert_eq!(layout.unwrap().scales, ScaleBits::Eight);
        }
        assert_eq!(settings.head_layout().unwrap().scales, ScaleBits::Sixteen);
        let toml = Recipe { quantize: settings.clone(), ..recipe() }.to_toml();
        assert!(toml.contains("scale_bits = 8") && !recipe().to_toml().contains("scale_bits"), "{toml}");
        assert_eq!(toml::from_str::<Recipe>(&toml).unwrap().quantize, settings);
        assert!(toml::from_str::<Recipe>(&toml.replace("scale_bits = 8", "scale_bits = 4")).is_err());
    }

    #[test]
    fn differences_name_the_key_and_both_values() {
        let mut other = recipe();
        other.quantize.bits = Bits::Two;
        other.calibration = None;
        let found = recipe().differences(&other);
        assert!(found.contains(&"quantize.bits: 3 here, 2 there".to_string()), "{found:?}");
        assert!(found.iter().any(|d| d.starts_with("calibration.seed: 7 here, nothing")), "{found:?}");
    }

    #[test]
    fn settings_that_no_layout_has_are_refused() {
        for change in [
            (|s: &mut QuantizeSettings| s.method = "magic".into()) as fn(&mut QuantizeSettings),
            |s| s.damping = f64::NAN,
            |s| s.damping = -1.0,
            |s| s.head_bits = 5,
            |s| s.bits = Bits::Six,
            |s| s.own_answers = true,
            |s| (s.method, s.grid) = ("awq".into(), GridKind::Codebook),
            |s| (s.method, s.scale_bits) = ("awq".into(), ScaleBits::Eight),
            |s| (s.method, s.transform) = ("awq".into(), Some(TransformSettings::hadamard(0))),
            |s| s.transform = Some(TransformSettings::hadamard(u64::MAX)),
        ] {
            let mut settings = QuantizeSettings::default();
            change(&mut settings);
            assert!(settings.check().is_err());
        }
        assert!(toml::from_str::<Recipe>(&recipe().to_toml().replace("bits = 3", "bits = 5")).is_err());
        assert!(toml::from_str::<Recipe>(&recipe().to_toml().replace("group = 128", "group = 100")).is_err());
    }
}
