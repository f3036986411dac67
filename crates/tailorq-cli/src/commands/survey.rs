//! `tailorq survey`: what a task's data and gradients say of every weight, gathered once for many plans.

use super::quantize::{DataArgs, GridArgs};
use super::wrong_settings;
use crate::console::Console;
use crate::observer::ConsoleObserver;
use anyhow::Context;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use tailorq::{LossKind, Needs, QuantizeSettings, SurveyRequest};

/// Run a task's data forward and backward through a model once, for many quantizations
///
/// Writes what signals read (sums of gradients, energies of tokens and inputs) to one file. `tailorq quantize --survey FILE`
/// with the same model, data and loss then starts from there: another share of kept weights or another width costs no new
/// pass. Memory holds one block's statistics; the size of the file is printed first.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tailorq survey model.gguf --task-data task.jsonl --output task.survey
  tailorq quantize model.gguf --method tacq --bits 2 --task-data task.jsonl --survey task.survey --output q2
  tailorq quantize model.gguf --method tacq --bits 2 --keep 1% --task-data task.jsonl --survey task.survey --output q2k
  tailorq survey model.gguf --loss kl --bits 2 --transform hadamard --task-data task.jsonl --output kl.survey
  tailorq quantize model.gguf --method tacq-hadamard --loss kl --bits 2 --task-data task.jsonl --survey kl.survey --output q2h")]
pub struct SurveyArgs {
    /// Directory, GGUF file or hub id
    model: String,
    #[command(flatten)]
    data: DataArgs,
    /// The file to write (safetensors)
    #[arg(short, long, value_name = "FILE", value_parser = super::utf8_path)]
    output: PathBuf,
    /// What to gather: sums over items of |gradient| (absolute) and of its square, the energy of each token's output
    /// gradient (tokens, for --token-weight gradient) and of each input (inputs, for --signal magnitude-hessian)
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "absolute,tokens",
          value_parser = ["absolute", "square", "tokens", "inputs"])]
    gather: Vec<String>,
    /// What is differentiated: the loss of the completions' tokens, of all tokens (full), or without labels the divergence from
    /// the original's predictions (kl), measured at the model rounded to nearest, because at the original it has no
    /// gradient; items without a completion get the original's own greedy answer of up to 64 tokens. The grid (bits, group, ...)
    /// must then be that of the quantization that reads the survey
    #[arg(long, value_name = "completion|full|kl", default_value = "completion")]
    loss: LossKind,
    /// With --loss kl, take the original's own answers also for items that have completions
    #[arg(long)]
    own_answers: bool,
    #[command(flatten)]
    grid: GridArgs,
}

impl SurveyArgs {
    /// Of the grid a survey reads what rounding to nearest does, and that only to diverge from.
    fn settings(&self) -> anyhow::Result<QuantizeSettings> {
        let usual = QuantizeSettings { loss: self.loss, own_answers: self.own_answers, ..QuantizeSettings::default() };
        let mut settings = usual.clone();
        self.grid.apply(&mut settings);
        let QuantizeSettings { bits, group, symmetric, clip, grid, transform, .. } = settings.clone();
        let rounding = QuantizeSettings { bits, group, symmetric, clip, grid, transform, ..usual.clone() };
        if settings != rounding {
            return Err(wrong_settings(
                "a survey rounds linears to nearest: of the grid only --bits, --group, --sym, --clip, --grid and --transform \
                 matter, give the others to quantize",
            ));
        }
        if self.loss != LossKind::Kl && rounding != usual {
            return Err(wrong_settings(
                "gradients of labels are those of the original: --bits, --group, --clip, --sym, --grid and --transform belong to \
                 --loss kl",
            ));
        }
        Ok(settings)
    }
}

/// Runs the command.
pub fn execute(args: &SurveyArgs, console: &Console) -> anyhow::Result<()> {
    let wants = |name: &str| args.gather.iter().any(|g| g == name);
    let needs = Needs {
        absolute: wants("absolute"),
        square: wants("square"),
        token_energies: wants("tokens"),
        input_energies: wants("inputs"),
        ..Needs::default()
    };
    let calibration = args.data.request().context("a survey needs the task's data: give --task-data FILE")?;
    let request = SurveyRequest { model: args.model.clone(), calibration, settings: args.settings()?, needs };
    let device = crate::device::open(console)?;
    let observer = ConsoleObserver::new(console);
    let start = Instant::now();
    let loss = tailorq::survey(device.as_ref(), &request, &args.output, &observer)?;
    drop(observer);
    let seconds = start.elapsed().as_secs_f64();
    let bytes = std::fs::metadata(&args.output)?.len();
    console.object(&json!({ "output": args.output, "bytes": bytes, "loss": loss, "seconds": seconds }))?;
    let mib = bytes as f64 / super::MIB;
    let what = match args.loss {
        LossKind::Kl => "the rounded model diverges by",
        LossKind::Completion | LossKind::Full => "the data's loss is",
    };
    let loss = loss.map_or(String::new(), |loss| format!("; {what} {loss:.4} nats a token"));
    console.text(&format!("wrote {} in {seconds:.0} s: {mib:.1} MiB{loss}\n", args.output.display()))
}
