//! `tailorq survey`: what a task's data and gradients say of every weight, gathered once for many plans.

use super::quantize::{DataArgs, parse_bits};
use super::wrong_settings;
use crate::console::Console;
use crate::observer::ConsoleObserver;
use anyhow::Context;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use tailorq::{Bits, Clip, Group, LossKind, Needs, QuantizeSettings, SurveyRequest};

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
    /// What is differentiated: the loss of the completions' tokens, of all tokens (full), or without labels the divergence from
    /// the original's predictions (kl), measured at the model rounded to nearest, because at the original it has no
    /// gradient; items without a completion get the original's own greedy answer of up to 64 tokens
    #[arg(long, value_name = "completion|full|kl", default_value = "completion")]
    loss: LossKind,
    /// For --loss kl: bits of the rounded model, as of the quantization that will read the survey [default: 3]
    #[arg(short, long, value_name = "N", value_parser = parse_bits)]
    bits: Option<Bits>,
    /// For --loss kl: inputs that share a scale, likewise [default: 128]
    #[arg(short, long, value_name = "32|64|128|row", visible_alias = "group-size")]
    group: Option<Group>,
    /// For --loss kl: how each group's range is found, likewise [default: magnitude]
    #[arg(long, value_name = "none|magnitude|hessian")]
    clip: Option<Clip>,
    /// For --loss kl: a symmetric grid, likewise
    #[arg(long)]
    sym: bool,
}

impl SurveyArgs {
    fn settings(&self) -> anyhow::Result<QuantizeSettings> {
        let has_grid = self.bits.is_some() || self.group.is_some() || self.clip.is_some() || self.sym;
        if has_grid && self.loss != LossKind::Kl {
            let problem =
                "gradients of labels are those of the original: --bits, --group, --clip and --sym belong to --loss kl";
            return Err(wrong_settings(problem));
        }
        let usual = QuantizeSettings::default();
        Ok(QuantizeSettings {
            loss: self.loss,
            bits: self.bits.unwrap_or(usual.bits),
            group: self.group.unwrap_or(usual.group),
            clip: self.clip.unwrap_or(usual.clip),
            symmetric: self.sym,
            ..usual
        })
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
