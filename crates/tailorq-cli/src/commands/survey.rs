//! `tailorq survey`: what a task's data and gradients say of every weight, gathered once for many plans.

use super::quantize::DataArgs;
use crate::console::Console;
use crate::observer::ConsoleObserver;
use anyhow::Context;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use tailorq::{LossKind, Needs, SurveyRequest};

/// Run a task's data forward and backward through a model once, for many quantizations
///
/// Writes what signals read (sums of gradients, energies of tokens and inputs) to one file. `tailorq quantize --survey FILE`
/// with the same model, data and loss then starts from there: another share of kept weights or another width costs no new
/// pass. Memory holds one block's statistics; the size of the file is printed first.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tailorq survey model.gguf --task-data task.jsonl --output task.survey
  tailorq quantize model.gguf --method tacq --bits 2 --task-data task.jsonl --survey task.survey --output q2
  tailorq quantize model.gguf --method tacq --bits 2 --keep 1% --task-data task.jsonl --survey task.survey --output q2k")]
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
    /// Tokens that the loss counts: those of the completion, or all (full)
    #[arg(long, value_name = "completion|full", default_value = "completion")]
    loss: LossKind,
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
    let request = SurveyRequest { model: args.model.clone(), calibration, loss: args.loss, needs };
    let device = tailorq::cpu();
    let observer = ConsoleObserver::new(console);
    let start = Instant::now();
    let loss = tailorq::survey(device.as_ref(), &request, &args.output, &observer)?;
    drop(observer);
    let seconds = start.elapsed().as_secs_f64();
    let bytes = std::fs::metadata(&args.output)?.len();
    console.object(&json!({ "output": args.output, "bytes": bytes, "loss": loss, "seconds": seconds }))?;
    let mib = bytes as f64 / super::MIB;
    let loss = loss.map_or(String::new(), |loss| format!("; the data's loss is {loss:.4} nats a token"));
    console.text(&format!("wrote {} in {seconds:.0} s: {mib:.1} MiB{loss}\n", args.output.display()))
}
