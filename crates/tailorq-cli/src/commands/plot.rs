//! `tailorq plot`: one linear of several models as a picture.

use crate::console::Console;
use anyhow::Context;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use tailorq::{OpenedModel, Window};

/// Draw the weights of one linear in several models side by side, to an SVG file
///
/// The first model is the original; below each other one stands its error against it. The window is 256 by 256 weights
/// unless told otherwise.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tailorq plot model.gguf ./paper ./aligned --layer model.layers.10.mlp.up_proj --output up.svg
  tailorq plot ./my-model ./q2 --layer model.layers.0.self_attn.q_proj --rows 0..64 --cols 128..192 --output q.svg")]
pub struct PlotArgs {
    /// The original and its quantized forms: directories, GGUF files or hub ids
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<String>,
    /// Checkpoint name of the linear, as `tailorq inspect --json` lists it
    #[arg(long, value_name = "NAME")]
    layer: String,
    /// Outputs to draw
    #[arg(long, value_name = "FROM..TO", default_value = "0..256", value_parser = parse_range)]
    rows: std::ops::Range<usize>,
    /// Inputs to draw
    #[arg(long, value_name = "FROM..TO", default_value = "0..256", value_parser = parse_range)]
    cols: std::ops::Range<usize>,
    /// The file to write
    #[arg(short, long, value_name = "FILE.svg", value_parser = super::utf8_path)]
    output: PathBuf,
}

fn parse_range(s: &str) -> Result<std::ops::Range<usize>, String> {
    let range = s.split_once("..").and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
    range.filter(|r| !r.is_empty()).ok_or_else(|| format!("'{s}' is no range: use FROM..TO, such as 0..256"))
}

/// Runs the command.
pub fn execute(args: &PlotArgs, console: &Console) -> anyhow::Result<()> {
    let opened: Vec<OpenedModel> =
        args.models.iter().map(|m| super::open(m, console)).collect::<anyhow::Result<_>>()?;
    let models: Vec<_> = args.models.iter().map(String::as_str).zip(opened.iter().map(|o| &o.model)).collect();
    let window = Window { rows: args.rows.clone(), cols: args.cols.clone() };
    let svg = tailorq::plot_layer(&models, &args.layer, &window)?;
    std::fs::write(&args.output, &svg).with_context(|| format!("cannot write {}", args.output.display()))?;
    console.object(&json!({ "output": args.output, "bytes": svg.len() }))?;
    console.text(&format!("wrote {}: {} models, {} KiB\n", args.output.display(), models.len(), svg.len() / 1024))
}
