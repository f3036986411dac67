//! `tailorq compare`: methods at budgets and seeds, with controls, in one table.

use super::MIB;
use crate::console::Console;
use crate::observer::ConsoleObserver;
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;
use tailorq::compare::{Experiment, Finished, Planned, compare, plan};

/// Compare methods at several sizes on one model and task, beside the controls that make a claim believable
///
/// Quantizes and measures every method of an experiment file at every budget and seed, and with them (unless the file says
/// `controls = false`) uniform widths of nearly equal bytes, rounding, GPTQ at dampings 0.01, 0.1 and 1, random and
/// |w| sqrt(H) masks where weights are kept, and the method itself on general text where there is some. Equal recipes run
/// once. Stop it at any time: the same command goes on. Writes results.json, results.md, results.svg and timings.json.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tailorq compare experiment.toml --dry-run
  tailorq compare experiment.toml

An experiment file (paths start where it lies; keys of [methods.quantize], [methods.circuit] and [methods.allocation] are
those of a recipe.toml):
  model = \"model.gguf\"
  output = \"comparison\"
  seeds = [0, 1, 2]
  [calibration]
  file = \"task.jsonl\"
  samples = 128
  [general]
  file = \"c4.txt\"
  [budgets]
  bits = [2, 3]
  [[methods]]
  preset = \"tacq\"
  [[methods]]
  preset = \"tacq\"
  name = \"tacq 1%\"
  circuit = { keep = 0.01 }
  [evaluation]
  tasks = [\"completion_nll\", \"perplexity\"]
  data = \"held-out.jsonl\"
  text = \"wiki.test.raw\"
  windows = 40")]
pub struct CompareArgs {
    /// The experiment file
    #[arg(value_name = "EXPERIMENT.toml", value_parser = super::utf8_path)]
    experiment: PathBuf,
    /// List the arms with their predicted sizes, and write nothing
    #[arg(long)]
    dry_run: bool,
}

/// Runs the command.
pub fn execute(args: &CompareArgs, console: &Console) -> anyhow::Result<()> {
    let experiment = Experiment::read(&args.experiment)?;
    if args.dry_run {
        let planned = plan(&experiment)?;
        planned.arms.notes.iter().for_each(|note| console.note(note));
        console.object(&planned_object(&planned))?;
        return console.text(&planned_text(&planned));
    }
    let observer = ConsoleObserver::new(console);
    let Finished { results, files, table } = compare(crate::device::open(console)?.as_ref(), &experiment, &observer)?;
    drop(observer);
    console.object(&json!({ "files": files, "results": results }))?;
    let written: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
    console.text(&format!("{table}\nwrote {}\n", written.join(", ")))
}

fn planned_object(planned: &Planned) -> Value {
    let arm = |arm: &tailorq::compare::Arm| {
        json!({
            "key": arm.key,
            "title": arm.title,
            "recipe": arm.recipe,
            "predicted_bytes": arm.predicted_bytes,
            "predicted_bits_per_weight": arm.predicted_bits_per_weight,
            "has_result": planned.finished.contains(&arm.key),
        })
    };
    let row = |row: &tailorq::compare::Row| {
        let arms: Vec<&str> = row.arms.iter().map(|&at| planned.arms.arms[at].key.as_str()).collect();
        json!({ "method": row.method, "budget": row.budget, "control_of": row.control_of, "arms": arms })
    };
    let arms: Vec<Value> = planned.arms.arms.iter().map(arm).collect();
    let rows: Vec<Value> = planned.arms.rows.iter().map(row).collect();
    json!({ "dry_run": true, "arms": arms, "rows": rows, "notes": planned.arms.notes })
}

fn planned_text(planned: &Planned) -> String {
    let arms = &planned.arms.arms;
    let widest = arms.iter().map(|a| a.title.chars().count()).max().unwrap_or(0);
    let mut text = format!("{} arms, of which {} have a result:\n", arms.len(), planned.finished.len());
    for arm in arms {
        let done = if planned.finished.contains(&arm.key) { "  done" } else { "" };
        text.push_str(&format!(
            "  {:<widest$}  {:>9.1} MiB  {:>7.3} bits per weight{done}\n",
            arm.title,
            arm.predicted_bytes as f64 / MIB,
            arm.predicted_bits_per_weight
        ));
    }
    text + "nothing was written; sizes are predicted, those of simulated methods as the file holds them\n"
}
