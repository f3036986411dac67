//! What a task is, and which there are.

use crate::cache::Cache;
use crate::calibration::CalibrationItems;
use crate::choice::{ARC_CHALLENGE, ARC_EASY, BOOLQ, HELLASWAG, MMLU, OPENBOOKQA, PIQA, WINOGRANDE};
use crate::completion_nll::{COMPLETION_NLL, GSM8K_NLL};
use crate::error::EvalError;
use crate::generation::{GSM8K, GSM8K_CHAT, GSM8K_COT, JSONL, SPIDER};
use crate::items::ItemRecord;
use crate::llamacpp::{PERPLEXITY_LLAMACPP, PERPLEXITY_LLAMACPP_C4};
use crate::perplexity::{PERPLEXITY, PERPLEXITY_C4};
use crate::prompt::PromptStyle;
use crate::rolling::{ROLLING, WIKITEXT};
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::Path;
use tailorq_model::{ChatTemplate, Decoders, Model, Tokenizer};
use tailorq_runtime::Device;

/// Hears how many of how many steps are done (from 0 of n on) and may stop the work.
pub type Progress<'a> = dyn FnMut(usize, usize) -> ControlFlow<()> + 'a;

/// A model under test.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// For reports and errors: as the user wrote it.
    pub name: &'a str,
    /// The decoder.
    pub model: &'a Model,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Its chat template, if it has one.
    pub template: Option<&'a ChatTemplate>,
    /// Where it runs.
    pub device: &'a dyn Device,
    /// Generates answers with packed weights as they are, where the device has that and it is wanted.
    pub decoders: Option<&'a dyn Decoders>,
}

impl<'a> Subject<'a> {
    /// What generates its answers, unless the device does so operation by operation.
    pub(crate) fn decoders(&self) -> Option<&'a dyn Decoders> {
        self.decoders.filter(|_| self.model.is_packed())
    }
}

/// What tasks may be told; each reads what concerns it.
#[derive(Clone, Copy, Default)]
pub struct TaskOptions<'a> {
    /// The text that perplexity is measured on.
    pub text: Option<&'a str>,
    /// Tokens of a window; each task has its own default.
    pub window: Option<usize>,
    /// Score only the first so many windows.
    pub windows: Option<usize>,
    /// The model that the subject is compared with.
    pub reference: Option<Subject<'a>>,
    /// What tasks of many items read.
    pub items: ItemOptions<'a>,
}

/// What tasks of many items may be told.
#[derive(Clone, Copy, Default)]
pub struct ItemOptions<'a> {
    /// The folder of data sets, or one file.
    pub data: Option<&'a Path>,
    /// Only the first so many items.
    pub limit: Option<usize>,
    /// Examples before each item; each task has its own default.
    pub num_fewshot: Option<usize>,
    /// How tasks whose prompts are text ask.
    pub style: PromptStyle,
    /// Most tokens of a generated answer; each task has its own default.
    pub max_tokens: Option<usize>,
    /// Texts that end an answer, beside those of the task.
    pub stop: &'a [String],
    /// Prompts of the task `jsonl` are continued as they are, and not asked as a chat.
    pub plain: bool,
    /// What models were calibrated on, which is refused as test items.
    pub calibration: &'a [CalibrationItems],
    /// Calibration items are scored all the same.
    pub allow_calibration_items: bool,
    /// Where finished items are kept and read from.
    pub cache: Option<Cache<'a>>,
    /// Hears of every item, in the order of the file.
    pub log: Option<&'a dyn Fn(&ItemRecord)>,
}

/// A score, and everything that is worth telling beside it.
#[derive(Clone, Debug, Serialize)]
pub struct TaskResult {
    /// The score.
    pub value: f64,
    /// Tokens that were scored.
    pub tokens: usize,
    /// Further numbers of the task, in the order in which they are shown.
    #[serde(flatten)]
    pub details: serde_json::Map<String, serde_json::Value>,
    /// How many results of items, windows or documents came from the cache, those of the reference included.
    #[serde(skip)]
    pub cached: usize,
    /// Results of the parts of a task (groups and subjects), under their names; they stand beside the task's own.
    #[serde(skip)]
    pub parts: Vec<(String, serde_json::Map<String, serde_json::Value>)>,
}

impl TaskResult {
    /// A result without parts.
    pub(crate) fn new(value: f64, tokens: usize, details: serde_json::Map<String, serde_json::Value>) -> Self {
        TaskResult { value, tokens, details, cached: 0, parts: Vec::new() }
    }

    /// The result, of which so much came from the cache.
    pub(crate) fn with_cached(self, cached: usize) -> Self {
        TaskResult { cached, ..self }
    }
}

/// An option that some tasks read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "TaskOptions and ItemOptions say what they mean")]
pub enum TaskOption {
    Text,
    Window,
    Windows,
    Reference,
    Data,
    Limit,
    NumFewshot,
    ApplyChatTemplate,
    FewshotAsMultiturn,
    MaxTokens,
    Stop,
    Plain,
    AllowCalibrationItems,
    LogSamples,
}

impl TaskOption {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            TaskOption::Text => "--text",
            TaskOption::Window => "--window",
            TaskOption::Windows => "--windows",
            TaskOption::Reference => "--reference",
            TaskOption::Data => "--data",
            TaskOption::Limit => "--limit",
            TaskOption::NumFewshot => "--num-fewshot",
            TaskOption::ApplyChatTemplate => "--apply-chat-template",
            TaskOption::FewshotAsMultiturn => "--fewshot-as-multiturn",
            TaskOption::MaxTokens => "--max-tokens",
            TaskOption::Stop => "--stop",
            TaskOption::Plain => "--plain",
            TaskOption::AllowCalibrationItems => "--allow-calibration-items",
            TaskOption::LogSamples => "--log-samples",
        }
    }
}

/// Options of `given` that only some of `tasks` read, each with the names of those that do not. One that none reads is an
/// error: whoever gave it would believe that it decided something.
pub fn partly_read(
    tasks: &[&'static dyn Task],
    given: &[TaskOption],
) -> Result<Vec<(TaskOption, Vec<&'static str>)>, EvalError> {
    let mut partly = Vec::new();
    let names = |tasks: &mut dyn Iterator<Item = &&'static dyn Task>| tasks.map(|t| t.name()).collect::<Vec<_>>();
    for &option in given {
        let reads = |task: &&&'static dyn Task| task.reads().contains(&option);
        let others = names(&mut tasks.iter().filter(|task| !reads(task)));
        if others.len() == tasks.len() {
            let readers = names(&mut ALL.iter().filter(reads)).join(", ");
            return Err(EvalError::UnreadOption { option: option.name(), tasks: others.join(", "), readers });
        }
        if !others.is_empty() {
            partly.push((option, others));
        }
    }
    Ok(partly)
}

/// One way to score a model.
pub trait Task: Sync {
    /// As on the command line and in reports.
    fn name(&self) -> &'static str;
    /// One sentence for help texts.
    fn about(&self) -> &'static str;
    /// The harness' version of the task whose rules it follows; of a task of its own, how often its rules have changed.
    fn version(&self) -> u32 {
        1
    }
    /// That of a part of it.
    fn version_of_part(&self, _part: &str) -> u32 {
        1
    }
    /// The options that it reads; others change nothing.
    fn reads(&self) -> &'static [TaskOption];
    /// Reads everything that the task reads, and fails where [`Task::run`] would fail before it computes: inputs that are
    /// missing or damaged, a template that is, test items that were calibration items. Cheap beside a run.
    fn check(&self, subject: &Subject<'_>, options: &TaskOptions<'_>) -> Result<(), EvalError>;
    /// Scores the subject.
    fn run(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<TaskResult, EvalError>;
}

/// Whether more is better in a metric (`acc,none`): all but those of surprise.
pub fn higher_is_better(metric: &str) -> bool {
    let name = metric.split(',').next().unwrap_or(metric);
    !(name.ends_with("perplexity") || name == "nll" || name == "bits_per_byte")
}

/// Every task.
pub const ALL: &[&dyn Task] = &[
    PERPLEXITY,
    PERPLEXITY_C4,
    PERPLEXITY_LLAMACPP,
    PERPLEXITY_LLAMACPP_C4,
    WIKITEXT,
    ROLLING,
    ARC_EASY,
    ARC_CHALLENGE,
    PIQA,
    BOOLQ,
    OPENBOOKQA,
    WINOGRANDE,
    HELLASWAG,
    MMLU,
    GSM8K,
    GSM8K_COT,
    GSM8K_CHAT,
    GSM8K_NLL,
    COMPLETION_NLL,
    SPIDER,
    JSONL,
];

/// The task of this name, or an error that lists those that exist.
pub fn find(name: &str) -> Result<&'static dyn Task, EvalError> {
    ALL.iter().copied().find(|t| t.name() == name).ok_or_else(|| EvalError::UnknownTask {
        name: name.to_owned(),
        known: ALL.iter().map(|t| t.name()).collect::<Vec<_>>().join(", "),
    })
}
