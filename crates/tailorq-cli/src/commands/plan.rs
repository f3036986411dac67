//! `tailorq plan`: from scores and a budget to the width of every linear.

use super::quantize::parse_share;
use crate::console::Console;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use tailorq::{PlanSummary, Rule, RuleSettings};

/// Make a plan of scores: the width of every linear under a budget
///
/// Reads the file of `tailorq score` and nothing else, so that another budget costs milliseconds until packing. The budget counts
/// codes, scales and zeros as they lie in the file, and is never exceeded.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tailorq plan --scores scores.json --bits-per-weight 2.5 --output plan.safetensors
  tailorq plan --scores scores.json --rule top-share --share 25% --output plan.safetensors")]
pub struct PlanArgs {
    /// Scores of the model's units
    #[arg(long, value_name = "FILE")]
    scores: PathBuf,
    /// Bits a weight of the linears may take in the file
    #[arg(long, value_name = "X")]
    bits_per_weight: Option<f64>,
    /// The least sum of damages (knapsack), the same along convex hulls (hull; hull-nested: more budget never takes from a
    /// unit), or the scores' order alone: ranked, or without a budget top-share and ends-and-top
    #[arg(long, value_name = "RULE", default_value = "knapsack")]
    rule: Rule,
    /// For --rule top-share: share of the units that get the widest format [default: 25%]
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    share: Option<f64>,
    /// The file to write (safetensors)
    #[arg(short, long, value_name = "FILE", value_parser = super::utf8_path)]
    output: PathBuf,
}

/// Runs the command.
pub fn execute(args: &PlanArgs, console: &Console) -> anyhow::Result<()> {
    let rule = RuleSettings::of(args.rule, args.bits_per_weight, args.share);
    let summary = tailorq::plan(&args.scores, &rule, &args.output)?;
    console.object(&json!({ "output": args.output, "rule": args.rule, "plan": summary }))?;
    console.text(&text(&summary, args))
}

fn text(summary: &PlanSummary, args: &PlanArgs) -> String {
    let mut text: String = summary.widths.iter().map(|(unit, bits)| format!("{unit:<18}{bits:>3} bits\n")).collect();
    text.push_str(&format!(
        "{:.4} bits per weight of the linears, predicted damage {:.4e}\nwrote {}\n",
        summary.bits_per_weight,
        summary.damage,
        args.output.display()
    ));
    text
}
