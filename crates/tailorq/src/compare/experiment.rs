//! The experiment file: what is compared, on what, and how it is measured.

use super::error::CompareError;
use crate::inputs::CalibrationRequest;
use crate::presets::{Method, PRESETS, Preset};
use crate::recipe::QuantizeSettings;
use crate::task::allocation::AllocationSettings;
use crate::task::circuit::CircuitSettings;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{DeserializeOwned, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeSet;
use std::fmt::Formatter;
use std::path::{Path, PathBuf};
use tailorq_eval::task;
use tailorq_tensor::Bits;

/// An experiment file. Relative paths in it start at the file's own directory.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// Directory, GGUF file or hub id of the original model.
    pub model: String,
    /// Where results and everything that is kept between runs go.
    pub output: PathBuf,
    /// The task's data.
    pub calibration: CalibrationTable,
    /// General text, for the control that calibrates on it; no such control without.
    #[serde(default)]
    pub general: Option<GeneralTable>,
    /// Sizes.
    #[serde(default)]
    pub budgets: Budgets,
    /// Each chooses its own calibration items.
    #[serde(default = "one_seed")]
    pub seeds: Vec<u64>,
    /// What is compared.
    pub methods: Vec<MethodTable>,
    /// Run the controls beside each method.
    #[serde(default = "yes")]
    pub controls: bool,
    /// Keep each arm's artifact after it was measured.
    #[serde(default)]
    pub keep_artifacts: bool,
    /// How models are measured: `[evaluation]`, or several `[[evaluation]]` with a name each.
    #[serde(deserialize_with = "one_or_many")]
    pub evaluation: Vec<EvaluationTable>,
    /// The file.
    #[serde(skip)]
    path: PathBuf,
}

fn one_seed() -> Vec<u64> {
    vec![0]
}

fn yes() -> bool {
    true
}

fn many_samples() -> usize {
    128
}

/// One table, or an array of them.
fn one_or_many<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<EvaluationTable>, D::Error> {
    struct OneOrMany;
    impl<'de> Visitor<'de> for OneOrMany {
        type Value = Vec<EvaluationTable>;

        fn expecting(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
            f.write_str("a table [evaluation], or several [[evaluation]]")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            EvaluationTable::deserialize(MapAccessDeserializer::new(map)).map(|one| vec![one])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
            Vec::deserialize(SeqAccessDeserializer::new(seq))
        }
    }
    from.deserialize_any(OneOrMany)
}

/// `[calibration]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationTable {
    /// Text file or JSONL.
    pub file: PathBuf,
    /// Items or windows to take.
    #[serde(default = "many_samples")]
    pub samples: usize,
    /// Longest item; without it 2048 or the model's context, whichever is shorter.
    #[serde(default)]
    pub sequence_length: Option<usize>,
    /// Take marks like `<<48/2=24>>` out of the completions.
    #[serde(default)]
    pub drop_calculator_marks: bool,
    /// Share of the items that come from `[general]`, 0 to 1.
    #[serde(default)]
    pub mix: f64,
}

/// `[general]`: what is not given is so that there are about as many tokens as in `[calibration]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GeneralTable {
    /// Text file or JSONL.
    pub file: PathBuf,
    /// Items or windows to take.
    #[serde(default)]
    pub samples: Option<usize>,
    /// Longest item.
    #[serde(default)]
    pub sequence_length: Option<usize>,
}

/// `[budgets]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budgets {
    /// Widths of codes. For a method that allocates, the bytes that all linears would take at this width.
    #[serde(default)]
    pub bits: Vec<Bits>,
    /// Bits of the linears, counted from bytes of the file.
    #[serde(default)]
    pub bits_per_weight: Vec<f64>,
}

/// `[[methods]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MethodTable {
    /// Name of a preset.
    pub preset: String,
    /// How tables and charts call it; the preset's name without.
    #[serde(default)]
    pub name: Option<String>,
    /// Over the preset's settings: keys of a recipe's `[quantize]`. With `bits` here, budgets do not concern the method.
    #[serde(default)]
    pub quantize: toml::Table,
    /// Keys of a recipe's `[circuit]`.
    #[serde(default)]
    pub circuit: toml::Table,
    /// Keys of a recipe's `[allocation]`.
    #[serde(default)]
    pub allocation: toml::Table,
    /// Data of its own in the place of the experiment's `[calibration]`, all keys anew: what is a model worth on one task that was
    /// made for another?
    #[serde(default)]
    pub calibration: Option<CalibrationTable>,
    /// Whether this method has its controls beside it; as the experiment says without.
    #[serde(default)]
    pub controls: Option<bool>,
}

/// `[evaluation]`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationTable {
    /// Stands behind the names of its tasks in tables: `perplexity c4`. Not needed where no other table has the same tasks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Names of tasks.
    pub tasks: Vec<String>,
    /// The folder of data sets, or one file.
    #[serde(default)]
    pub data: Option<PathBuf>,
    /// Only the first so many items.
    #[serde(default)]
    pub limit: Option<usize>,
    /// Examples before each item; each task has its own default.
    #[serde(default)]
    pub num_fewshot: Option<usize>,
    /// Ask tasks whose prompts are text through the model's chat template.
    #[serde(default)]
    pub apply_chat_template: bool,
    /// With the chat template, every example is a turn of the user and one of the assistant.
    #[serde(default)]
    pub fewshot_as_multiturn: bool,
    /// Most tokens of a generated answer.
    #[serde(default)]
    pub max_tokens: Option<usize>,
    /// Texts that end a generated answer.
    #[serde(default)]
    pub stop: Vec<String>,
    /// Continue prompts of the task `jsonl` as they are.
    #[serde(default)]
    pub plain: bool,
    /// The text that perplexity is measured on.
    #[serde(default)]
    pub text: Option<PathBuf>,
    /// Tokens of a window.
    #[serde(default)]
    pub window: Option<usize>,
    /// Only the first so many windows.
    #[serde(default)]
    pub windows: Option<usize>,
    /// Score items that are among the calibration items.
    #[serde(default)]
    pub allow_calibration_items: bool,
}

impl Experiment {
    /// Reads and checks an experiment file.
    pub fn read(path: &Path) -> Result<Self, CompareError> {
        let fail = |problem: String| CompareError::Experiment { path: path.to_path_buf(), problem };
        let text = std::fs::read_to_string(path).map_err(|e| fail(format!("cannot be read: {e}")))?;
        let mut experiment: Experiment =
            toml::from_str(&text).map_err(|e| fail(format!("is no experiment: {}", e.to_string().trim_end())))?;
        experiment.path = path.to_path_buf();
        experiment.check().map_err(fail)?;
        Ok(experiment)
    }

    /// What serde cannot see; the error begins with the key.
    fn check(&self) -> Result<(), String> {
        if self.methods.is_empty() {
            return Err("methods: is empty: add [[methods]] with a preset such as \"gptq\"".into());
        }
        if self.seeds.is_empty() || self.seeds.iter().any(|&s| i64::try_from(s).is_err()) {
            return Err(format!("seeds: needs at least one number, none above {}", i64::MAX));
        }
        for CalibrationTable { mix, .. } in self.calibrations() {
            if !(0.0..=1.0).contains(mix) || (*mix > 0.0 && self.general.is_none()) {
                return Err(format!(
                    "calibration.mix: is {mix}: use a share from 0 to 1, and say in [general] of what text"
                ));
            }
        }
        let Budgets { bits, bits_per_weight } = &self.budgets;
        if let Some(bad) = bits_per_weight.iter().find(|b| !(b.is_finite() && **b > 0.0 && **b <= 64.0)) {
            return Err(format!("budgets.bits_per_weight: {bad} is no budget: use a number such as 2.5"));
        }
        let mut names = BTreeSet::new();
        for method in &self.methods {
            let settings = method.settings()?;
            let own = method.fixes_size() || !settings.has_budget();
            if bits.is_empty() && bits_per_weight.is_empty() && !own {
                return Err(format!(
                    "budgets: is empty, and method {} needs one: add [budgets] with bits = [2, 3] or bits_per_weight = [2.5]",
                    method.label()
                ));
            }
            if !names.insert(method.label()) {
                let name = method.label();
                return Err(format!("methods: two are called {name}: give one of them another `name`"));
            }
        }
        self.check_evaluation()
    }

    fn check_evaluation(&self) -> Result<(), String> {
        let mut titles = BTreeSet::new();
        for table in &self.evaluation {
            for name in &table.tasks {
                task::find(name).map_err(|e| format!("evaluation.tasks: {e}"))?;
                if !titles.insert(table.title(name)) {
                    return Err(format!(
                        "evaluation: {} is there twice: give one of the [[evaluation]] tables another `name`",
                        table.title(name)
                    ));
                }
            }
        }
        if self.evaluation.is_empty() || self.evaluation.iter().any(|table| table.tasks.is_empty()) {
            return Err("evaluation.tasks: is empty: name at least one, such as \"perplexity\"".into());
        }
        Ok(())
    }

    /// The experiment's calibration and those of methods that have their own.
    fn calibrations(&self) -> impl Iterator<Item = &CalibrationTable> {
        std::iter::once(&self.calibration).chain(self.methods.iter().filter_map(|m| m.calibration.as_ref()))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path of the file as seen from here.
    pub(super) fn locate(&self, path: &Path) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("")).join(path)
    }

    /// Where results go.
    pub fn output_dir(&self) -> PathBuf {
        self.locate(&self.output)
    }

    /// The model as seen from here: a path that exists, or else a hub id as it stands.
    pub fn model_source(&self) -> String {
        let local = self.locate(Path::new(&self.model));
        let is_path = self.model.ends_with(".gguf") || self.model.starts_with(['.', '/']);
        if is_path || local.exists() { local.to_string_lossy().into_owned() } else { self.model.clone() }
    }

    /// The data that an arm is calibrated on: the method's own, if it has any, or else everybody's.
    pub(super) fn calibration(&self, own: Option<&CalibrationTable>, seed: u64) -> CalibrationRequest {
        let table = own.unwrap_or(&self.calibration);
        let CalibrationTable { file, samples, sequence_length, drop_calculator_marks, mix } = table;
        let blended = self.general.as_ref().filter(|_| *mix > 0.0);
        CalibrationRequest {
            file: self.locate(file),
            samples: *samples,
            sequence_length: *sequence_length,
            seed,
            drop_calculator_marks: *drop_calculator_marks,
            general: blended.map(|text| (self.locate(&text.file), *mix)),
        }
    }

    /// A path as the experiment file has it, given as seen from here.
    pub(super) fn as_written(&self, path: &Path) -> PathBuf {
        let mut known = self.calibrations().map(|c| &c.file).chain(self.general.as_ref().map(|g| &g.file));
        known.find(|file| self.locate(file) == path).cloned().unwrap_or_else(|| path.to_path_buf())
    }
}

impl Method {
    /// Whether a budget can change its size.
    pub(super) fn has_budget(&self) -> bool {
        let fixed = ["half", "billm", "pb-llm"].contains(&self.quantize.method.as_str());
        !fixed && self.allocation.as_ref().is_none_or(|a| a.rule.name.is_budgeted())
    }
}

impl EvaluationTable {
    /// How tables and results call a task of it.
    pub(super) fn title(&self, task: &str) -> String {
        self.name.as_ref().map_or_else(|| task.to_owned(), |name| format!("{task} {name}"))
    }
}

impl MethodTable {
    /// How tables and charts call it.
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.preset)
    }

    /// Whether its settings say its size, so that budgets do not concern it.
    pub(super) fn fixes_size(&self) -> bool {
        let rule = self.allocation.get("rule").and_then(toml::Value::as_table);
        self.quantize.contains_key("bits") || rule.is_some_and(|r| r.contains_key("bits_per_weight"))
    }

    /// The preset's settings with the file's over them.
    pub(super) fn settings(&self) -> Result<Method, String> {
        let at = |table: &str| format!("methods.{table} of {}", self.label());
        let preset = Preset::find(&self.preset).ok_or_else(|| {
            let known: Vec<_> = PRESETS.iter().map(|p| p.name).collect();
            format!("methods: there is no preset '{}': use one of {}", self.preset, known.join(", "))
        })?;
        let Method { quantize, circuit, allocation } = preset.method();
        let allocation = match (allocation, self.allocation.is_empty()) {
            (None, false) => {
                return Err(format!(
                    "{}: {} does not allocate: start from taqo or another preset that does",
                    at("allocation"),
                    self.preset
                ));
            }
            (None, true) => None,
            (Some(settings), _) => Some(over(&settings, &self.allocation, &at("allocation"))?),
        };
        let circuit = match (circuit, self.circuit.is_empty()) {
            (None, true) => None,
            (circuit, _) => Some(over(&circuit.unwrap_or_default(), &self.circuit, &at("circuit"))?),
        };
        let quantize: QuantizeSettings = over(&quantize, &self.quantize, &at("quantize"))?;
        quantize.check().map_err(|e| format!("{}: {e}", at("quantize")))?;
        circuit.as_ref().map_or(Ok(()), CircuitSettings::check).map_err(|e| format!("{}: {e}", at("circuit")))?;
        let checked = allocation.as_ref().map_or(Ok(()), AllocationSettings::check);
        checked.map_err(|e| format!("{}: {e}", at("allocation")))?;
        Ok(Method { quantize, circuit, allocation })
    }
}

/// `settings` with the keys of `changes` in their place.
fn over<T: Serialize + DeserializeOwned>(settings: &T, changes: &toml::Table, at: &str) -> Result<T, String> {
    let mut table = toml::Table::try_from(settings).expect("settings hold only what TOML can say");
    merge(&mut table, changes);
    table.try_into().map_err(|e: toml::de::Error| format!("{at}: {}", e.message()))
}

fn merge(table: &mut toml::Table, changes: &toml::Table) {
    for (key, value) in changes {
        match (table.get_mut(key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(changes)) => merge(inner, changes),
            _ => {
                table.insert(key.clone(), value.clone());
            }
        }
    }
}
