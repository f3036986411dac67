//! `tailorq eval`: measure a model.

mod log;
mod measure;
mod overall;
mod results;
mod table;

use crate::console::Console;
use anyhow::ensure;
use clap::Args;
use log::SampleLog;
use measure::{check, measure};
use results::Findings;
use std::cell::OnceCell;
use std::path::PathBuf;
use std::time::Instant;
use tailorq::{Activations, Device, OpenedModel};
use tailorq_eval::{
    Cache, CalibrationItems, ItemOptions, ItemRecord, PromptStyle, Subject, Task, TaskOption, TaskOptions, partly_read,
    task,
};

/// Measure a model by tasks: perplexity on a text, answers to a data set's questions, likelihoods of your own completions.
///
/// Perplexity follows the definition of papers on quantization: the text is one stream of tokens, cut into windows
/// without overlap (a shorter rest is dropped), each scored on its own; the value is exp of the mean negative
/// log-likelihood. With `--reference`, the mean KL divergence of the model's predictions from the reference's (in nats a
/// token) and the share of tokens on which both find the same word most likely, over the same tokens. The rules of all
/// tasks are in docs/evaluation.md.
#[derive(Args)]
#[command(after_help = after_help())]
pub struct EvalArgs {
    /// Directory, GGUF file or hub id
    model: String,
    /// What to measure; several are separated by commas
    #[arg(long, visible_alias = "tasks", value_name = "TASK", value_delimiter = ',', default_value = "perplexity")]
    task: Vec<String>,
    /// The text that perplexity is measured on (UTF-8) [default: WikiText-2 of --data]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of a window, at least 2 [default: the task's, 2048 for perplexity]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    window: Option<u32>,
    /// Score only the first N windows [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    windows: Option<u32>,
    /// Folder of data sets (`gsm8k/test.jsonl` or `.parquet`, `spider/...`, `wikitext2/wiki.test.raw.txt`), or `hub` (without a folder of
    /// that name): Parquet files of the hub, from its cache or fetched (HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN). The tasks jsonl,
    /// completion_nll and rolling read a file, or `<task>/test.jsonl` of the folder, or `hub:ORG/NAME`
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Score only the first N items [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Examples before each item [default: the task's; papers give MMLU 5]
    #[arg(long, value_name = "N")]
    num_fewshot: Option<u32>,
    /// Ask choices, gsm8k and gsm8k_cot through the model's chat template, examples and question as one turn
    #[arg(long, visible_alias = "apply_chat_template")]
    apply_chat_template: bool,
    /// With the chat template, make every example a turn of the user and one of the assistant
    #[arg(long, visible_alias = "fewshot_as_multiturn", requires = "apply_chat_template")]
    fewshot_as_multiturn: bool,
    /// Most tokens of a generated answer [default: the task's, mostly 256]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// Text that ends a generated answer, beside those of the task; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Continue the prompts of the task jsonl as they are instead of asking them as a chat
    #[arg(long)]
    plain: bool,
    /// Write one JSON object for each item into this file
    #[arg(long, value_name = "FILE")]
    log_samples: Option<PathBuf>,
    /// Keep finished items in this folder, and go on from those that are in it
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Score items that the model was calibrated on, by its report.json, instead of refusing them
    #[arg(long)]
    allow_calibration_items: bool,
    /// Compare with this model (usually the original)
    #[arg(long, value_name = "MODEL")]
    reference: Option<String>,
    /// Precision in which packed weights meet activations: f32, or int8 as `run` has it [default: f32; on a GPU half precision
    /// while answers are generated, with f16 keys and values, as `run` has it there]. The reference always has f32
    #[arg(long, value_name = "TYPE")]
    activations: Option<Activations>,
}

fn after_help() -> String {
    let mut help = String::from("Tasks:\n");
    let width = task::ALL.iter().map(|task| task.name().len()).max().unwrap_or(0);
    for task in task::ALL {
        help.push_str(&format!("  {:<width$} {}\n", task.name(), task.about()));
    }
    help + "
Examples:
  tailorq eval ./my-model --task perplexity --text wiki.test.raw
  tailorq eval ./my-model --text wiki.test.raw --window 1024 --windows 8 --json
  tailorq eval ./my-model --text held-out.txt --reference original.gguf
  tailorq eval ./my-model --tasks arc_easy,piqa,boolq --data data --reference original.gguf
  tailorq eval ./my-model --tasks mmlu --num-fewshot 5 --data data --json
  tailorq eval ./my-model --tasks perplexity,perplexity_c4,wikitext --data data
  tailorq eval ./my-model --tasks jsonl --data hub:ORG/NAME --max-tokens 32
  tailorq eval ./my-model --tasks gsm8k_nll,gsm8k,spider --data data --limit 200 --log-samples items.jsonl
  tailorq eval ./my-model --tasks mmlu,gsm8k --data data --cache finished   (stopped? repeat it)
  tailorq eval ./my-model --tasks jsonl --data mine.jsonl --max-tokens 32 --stop $'\\n'"
}

/// Runs the command.
pub fn execute(args: &EvalArgs, console: &Console) -> anyhow::Result<()> {
    let started = Instant::now();
    let tasks = find_tasks(&args.task)?;
    for (option, tasks) in partly_read(&tasks, &args.given())? {
        console.note(&format!("{} changes nothing for {}", option.name(), tasks.join(", ")));
    }
    let text = args.text.as_deref().map(super::read_text).transpose()?;
    if let (Some(text), Some(path)) = (&text, &args.text) {
        ensure!(!text.is_empty(), "{} is empty: there is nothing to score", path.display());
    }
    let opened = super::open(&args.model, console)?;
    let reference = args.reference.as_deref().map(|source| super::open(source, console)).transpose()?;
    let calibration = calibration_items([Some(&opened), reference.as_ref()])?;
    let activations = args.activations.unwrap_or(Activations::F32);
    let device = crate::device::open_with(activations, console)?;
    let decoders = match device.resident() {
        Some(_) if args.activations.is_none() => crate::device::decoders()?,
        Some(_) => super::engine::refuse_int8(args.activations).map(|()| None)?,
        None => None,
    };
    // On the CPU the original is measured with f32 activations whatever its copy is measured with.
    let exact = if device.resident().is_some() { device.clone() } else { tailorq::cpu() };
    let computed = (device.as_ref(), activations);
    let hashes = args.cache.as_ref().map(|_| model_hashes(&opened, reference.as_ref(), computed)).transpose()?;
    let cache = args.cache.as_deref().zip(hashes.as_ref());
    // Opened when nothing stands in the way any more: the log of an earlier run is not lost to a mistake in the command.
    let log: OnceCell<SampleLog> = OnceCell::new();
    let write = |record: &ItemRecord| {
        if let Some(log) = log.get() {
            log.write(record);
        }
    };
    let options = TaskOptions {
        text: text.as_deref(),
        window: args.window.map(|n| n as usize),
        windows: args.windows.map(|n| n as usize),
        reference: reference.as_ref().map(|opened| subject(opened, exact.as_ref())),
        items: ItemOptions {
            calibration: &calibration,
            cache: cache.map(|(folder, (model, reference))| Cache { folder, model, reference: reference.as_deref() }),
            log: Some(&write),
            ..args.items()
        },
    };
    let model = Subject { decoders: decoders.as_deref(), ..subject(&opened, device.as_ref()) };
    check(&tasks, &model, &options)?;
    if let Some(path) = &args.log_samples {
        let created = SampleLog::create(path)?;
        log.get_or_init(|| created);
    }
    let (measured, outcome) = measure(&tasks, &model, &options, console);
    let logged = log.into_inner().map_or(Ok(()), SampleLog::finish);
    let found = Findings { model: &args.model, measured: &measured, stopped: outcome.as_ref().err(), started };
    found.notes(console);
    if !measured.is_empty() {
        console.object(&found.object())?;
        console.text(&found.table())?;
    }
    outcome.map_err(|stopped| stopped.error)?;
    logged
}

impl EvalArgs {
    /// The options that were given, of those that not every task reads.
    fn given(&self) -> Vec<TaskOption> {
        let given = [
            (TaskOption::Text, self.text.is_some()),
            (TaskOption::Window, self.window.is_some()),
            (TaskOption::Windows, self.windows.is_some()),
            (TaskOption::Reference, self.reference.is_some()),
            (TaskOption::Data, self.data.is_some()),
            (TaskOption::Limit, self.limit.is_some()),
            (TaskOption::NumFewshot, self.num_fewshot.is_some()),
            (TaskOption::ApplyChatTemplate, self.apply_chat_template),
            (TaskOption::FewshotAsMultiturn, self.fewshot_as_multiturn),
            (TaskOption::MaxTokens, self.max_tokens.is_some()),
            (TaskOption::Stop, !self.stop.is_empty()),
            (TaskOption::Plain, self.plain),
            (TaskOption::AllowCalibrationItems, self.allow_calibration_items),
            (TaskOption::LogSamples, self.log_samples.is_some()),
        ];
        given.into_iter().filter(|(_, is_given)| *is_given).map(|(option, _)| option).collect()
    }

    /// What the command line says about items.
    fn items(&self) -> ItemOptions<'_> {
        ItemOptions {
            data: self.data.as_deref(),
            limit: self.limit.map(|n| n as usize),
            num_fewshot: self.num_fewshot.map(|n| n as usize),
            style: match (self.apply_chat_template, self.fewshot_as_multiturn) {
                (false, _) => PromptStyle::Text,
                (true, false) => PromptStyle::Chat,
                (true, true) => PromptStyle::ChatOfTurns,
            },
            max_tokens: self.max_tokens.map(|n| n as usize),
            stop: &self.stop,
            plain: self.plain,
            allow_calibration_items: self.allow_calibration_items,
            ..ItemOptions::default()
        }
    }
}

/// What the models were calibrated on, as far as their reports tell.
fn calibration_items(models: [Option<&OpenedModel>; 2]) -> anyhow::Result<Vec<CalibrationItems>> {
    let items = models.into_iter().flatten().map(|opened| Ok(tailorq::calibration_items(opened)?));
    items.filter_map(Result::transpose).collect()
}

/// By what the cache tells models apart.
fn model_hashes(
    opened: &OpenedModel,
    reference: Option<&OpenedModel>,
    (device, activations): (&dyn Device, Activations),
) -> anyhow::Result<(String, Option<String>)> {
    let mut hash = tailorq::model_sha256(opened)?;
    // Another precision is another model.
    if let Some(signature) = device.signature() {
        hash = format!("{hash} {signature}");
    } else if activations != Activations::F32 {
        hash = format!("{hash} {activations}");
    }
    Ok((hash, reference.map(tailorq::model_sha256).transpose()?))
}

fn subject<'a>(opened: &'a OpenedModel, device: &'a dyn Device) -> Subject<'a> {
    Subject {
        name: &opened.files.source,
        model: &opened.model,
        tokenizer: &opened.tokenizer,
        template: opened.template.as_ref(),
        device,
        decoders: None,
    }
}

fn find_tasks(names: &[String]) -> anyhow::Result<Vec<&'static dyn Task>> {
    let mut tasks: Vec<&'static dyn Task> = Vec::new();
    for name in names {
        let task = task::find(name.trim())?;
        // Asking twice gives one answer.
        if !tasks.iter().any(|t| t.name() == task.name()) {
            tasks.push(task);
        }
    }
    Ok(tasks)
}
