//! `tailorq probe`: logits in a file, or gradients.

use crate::console::Console;
use crate::progress::Progress;
use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use tailorq::{GradientOutput, OpenedModel};

/// Write the logits of some tokens to a safetensors file, to compare engines.
///
/// The file holds `tokens` (I32 [n]) and `logits` (F32 [n, vocabulary]); row i predicts what follows token i. A text is
/// tokenized as the model's tokenizer does it by default (with its BOS token, if it adds one) and without a chat
/// template.
///
/// With --gradients it runs backward instead: the mean next-token cross-entropy of the tokens, and the Frobenius norm of
/// its gradient with respect to every linear's weight. --output then takes the gradients themselves, `grad.NAME`.
#[derive(Args)]
#[command(after_help = "Examples:
  tailorq probe ./my-model --text \"The capital of France is\" --output logits.safetensors
  echo '[1, 504, 3575]' > ids.json && tailorq probe model.gguf --tokens ids.json --output logits.safetensors
  tailorq probe model.gguf --text \"Some text\" --gradients --json
  tailorq probe ./my-model --text \"Some text\" --gradients --gradient-rows 4 --output gradients.safetensors")]
pub struct ProbeArgs {
    /// Directory, GGUF file or hub id
    model: String,
    #[command(flatten)]
    input: Input,
    /// The file to write (safetensors)
    #[arg(long, value_name = "FILE", required_unless_present = "gradients")]
    output: Option<PathBuf>,
    /// Loss and norms of its gradients instead of logits
    #[arg(long)]
    gradients: bool,
    /// Write only the first so many output rows of each gradient
    #[arg(long, value_name = "N", requires = "gradients", requires = "output")]
    gradient_rows: Option<NonZeroUsize>,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Input {
    /// A text to tokenize
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    text: Option<String>,
    /// A file with a flat JSON array of token ids
    #[arg(long, value_name = "FILE.json")]
    tokens: Option<PathBuf>,
}

/// Runs the command.
pub fn execute(args: &ProbeArgs, console: &Console) -> anyhow::Result<()> {
    let given = args.input.tokens.as_deref().map(read_tokens).transpose()?;
    let opened = super::open(&args.model, console)?;
    let vocab = opened.model.config.vocab;
    let tokens = match (&given, &args.input.text) {
        (Some(ids), _) => tailorq::check_tokens(ids, vocab)?,
        (None, text) => opened.tokenizer.encode(text.as_deref().unwrap_or_default(), true)?,
    };
    match &args.output {
        Some(output) if !args.gradients => logits(args, &opened, &tokens, output, console),
        _ => gradients(args, &opened, &tokens, console),
    }
}

fn logits(
    args: &ProbeArgs,
    opened: &OpenedModel,
    tokens: &[u32],
    output: &Path,
    console: &Console,
) -> anyhow::Result<()> {
    let device = crate::device::open(console)?;
    let progress = Progress::new(console, "probe", tokens.len());
    let step = &mut |done, total| progress.step(done, total);
    tailorq::probe(&opened.model, device.as_ref(), tokens, output, step)
        .with_context(|| format!("cannot probe {}", args.model))?;
    drop(progress);
    let (output, vocab) = (output.display().to_string(), opened.model.config.vocab);
    console.object(&json!({ "model": args.model, "output": output, "tokens": tokens.len(), "vocab": vocab }))?;
    console.text(&format!("{output}: tokens [{n}], logits [{n}, {vocab}]\n", n = tokens.len()))
}

fn gradients(args: &ProbeArgs, opened: &OpenedModel, tokens: &[u32], console: &Console) -> anyhow::Result<()> {
    let device = crate::device::open(console)?;
    let progress = Progress::new(console, "gradients", opened.model.blocks.len());
    let step = &mut |done, total| progress.step(done, total);
    let rows = args.gradient_rows.map(NonZeroUsize::get);
    let output = args.output.as_deref().map(|path| GradientOutput { path, rows });
    let found = tailorq::probe_gradients(&opened.model, device.as_ref(), tokens, output, step)
        .with_context(|| format!("cannot probe {}", args.model))?;
    drop(progress);
    let norms: serde_json::Map<String, Value> =
        found.gradient_norms.iter().map(|(name, norm)| (name.clone(), json!(norm))).collect();
    console.object(&json!({
        "model": args.model,
        "tokens": tokens.len(),
        "mean_cross_entropy": found.mean_cross_entropy,
        "gradient_norms": norms,
        "output": args.output.as_ref().map(|path| path.display().to_string()),
    }))?;
    let mut text = format!("mean cross-entropy {:.6} nats a token\n", found.mean_cross_entropy);
    for (name, norm) in &found.gradient_norms {
        text += &format!("{norm:12.6e}  {name}\n");
    }
    console.text(&text)
}

fn read_tokens(path: &Path) -> anyhow::Result<Vec<i64>> {
    let text = super::read_text(path)?;
    serde_json::from_str(&text).with_context(|| format!("{} is no flat JSON array of token ids", path.display()))
}
