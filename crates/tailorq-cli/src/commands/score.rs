//! `tailorq score`: how much each unit of a model needs its bits, once, for many plans.

use super::quantize::{DataArgs, GridArgs};
use super::{set, wrong_settings};
use crate::console::Console;
use crate::observer::ConsoleObserver;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use tailorq::{AllocationSignal, MeasureKind, QuantizeSettings, ScoreRequest, ScoreSettings, Scores, Span, UnitKind};

/// Score the blocks or linears of a model for a task, once, for many budgets
///
/// Writes every unit with the exact bytes and the predicted damage of each width to a JSON file. `tailorq plan` makes a plan of
/// it for any budget in milliseconds, and `tailorq quantize --scores FILE` does both on the way. Grid options (group,
/// symmetry, clip) must be those of the quantization.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tailorq score model.gguf --signal taqo --task-data task.jsonl --output scores.json
  tailorq plan --scores scores.json --bits-per-weight 2.5 --output plan.safetensors
  tailorq quantize model.gguf --plan plan.safetensors --task-data task.jsonl --output model-2.5bit")]
pub struct ScoreCommand {
    /// Directory, GGUF file or hub id
    model: String,
    /// What is looked at: information and stability of activations over the prompts (taq-is), noise on the outputs of blocks
    /// (taq-kl), quantizing each unit alone, measured over the model's own answers (taqo) or the items' completions
    /// (damage), or nothing (depth, random: controls)
    #[arg(long, value_name = "SIGNAL", default_value = "taqo")]
    signal: AllocationSignal,
    #[command(flatten)]
    score: ScoreArgs,
    #[command(flatten)]
    grid: GridArgs,
    #[command(flatten)]
    data: DataArgs,
    /// The file to write (JSON)
    #[arg(short, long, value_name = "FILE", value_parser = super::utf8_path)]
    output: PathBuf,
}

/// How units are scored; what is not given is as the signal or the method has it.
#[derive(Args, Debug)]
pub(super) struct ScoreArgs {
    /// What gets one width as a whole: block, layer, or fused (q/k/v and gate/up share one) [default: block]
    #[arg(long, value_name = "block|layer|fused")]
    unit: Option<UnitKind>,
    /// Widths to choose from of 2, 3, 4, 8 and 16 [default: 2,3,4,8; papers: 4,8 or 4,16]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    widths: Option<Vec<u32>>,
    /// Calibration items that scores look at, by default only at their prompts [default: 16; taq: 128; papers: 256 or 32]
    #[arg(long, value_name = "N")]
    prompts: Option<usize>,
    /// Whose predictions are compared: of the last token of each prompt (last), in the prompts (prompt), of the model's own
    /// answers (continuation) or of the items' completions [default: continuation; damage: completion]
    #[arg(long, value_name = "last|prompt|continuation|completion")]
    span: Option<Span>,
    /// What a quantized unit is charged with: divergence from the original's predictions, the likelihood of the completions,
    /// or wrong answers (half exact match, half F1; slow) [default: divergence; taqo-paper: answers]
    #[arg(long, value_name = "divergence|likelihood|answers")]
    measure: Option<MeasureKind>,
    /// Method that makes the weights which are tried: rtn, or gptq with the Hessian of these prompts [default: rtn]
    #[arg(long, value_name = "METHOD")]
    probe: Option<String>,
    /// Seed of noise, samples and the random control [default: 0]
    #[arg(long, value_name = "N")]
    score_seed: Option<u64>,
}

impl ScoreArgs {
    /// Puts what was given over the settings.
    pub(super) fn apply(&self, settings: &mut ScoreSettings) {
        set(&mut settings.unit, self.unit.as_ref());
        set(&mut settings.widths, self.widths.as_ref());
        set(&mut settings.prompts, self.prompts.as_ref());
        set(&mut settings.span, self.span.as_ref());
        set(&mut settings.measure, self.measure.as_ref());
        set(&mut settings.probe, self.probe.as_ref());
        set(&mut settings.seed, self.score_seed.as_ref());
        // What reads completions can look at nothing else.
        if self.span.is_none() && settings.measure != MeasureKind::Divergence {
            settings.span = Span::Completion;
        }
    }

    /// Whether anything was given.
    pub(super) fn is_given(&self) -> bool {
        let ScoreArgs { unit, widths, prompts, span, measure, probe, score_seed } = self;
        unit.is_some()
            || widths.is_some()
            || prompts.is_some()
            || span.is_some()
            || measure.is_some()
            || probe.is_some()
            || score_seed.is_some()
    }
}

/// Runs the command.
pub fn execute(args: &ScoreCommand, console: &Console) -> anyhow::Result<()> {
    if args.grid.bits.is_some() {
        let problem = "scores are made for several widths: give --widths 2,3,4,8 instead of --bits";
        return Err(wrong_settings(problem));
    }
    let (mut settings, mut score) = (QuantizeSettings::default(), ScoreSettings::of(args.signal));
    args.grid.apply(&mut settings);
    args.score.apply(&mut score);
    let request = ScoreRequest { model: args.model.clone(), calibration: args.data.request(), settings, score };
    let device = crate::device::open(console)?;
    let observer = ConsoleObserver::new(console);
    let start = Instant::now();
    let scores = tailorq::score(device.as_ref(), &request, &args.output, &observer)?;
    drop(observer);
    let seconds = start.elapsed().as_secs_f64();
    console.object(&json!({ "output": args.output, "seconds": seconds, "units": scores.units }))?;
    console.text(&format!("{}wrote {} in {seconds:.0} s\n", table(&scores), args.output.display()))
}

/// Score and damages of each unit.
fn table(scores: &Scores) -> String {
    let widths: String = scores.score.widths.iter().map(|w| format!("{:>12}", format!("{w} bits"))).collect();
    let mut text = format!("{:<18}{:>12}{widths}   (score; predicted damage)\n", "unit", "score");
    for unit in &scores.units {
        let damages: String = unit.candidates.iter().map(|c| format!("{:>12.4e}", c.damage)).collect();
        text.push_str(&format!("{:<18}{:>12.4}{damages}\n", unit.name, unit.score));
    }
    text
}
