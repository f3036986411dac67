//! `tailorq probe`: logits in a file.

use crate::console::Console;
use crate::progress::Progress;
use anyhow::Context;
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Write the logits of some tokens to a safetensors file, to compare engines.
///
/// The file holds `tokens` (I32 [n]) and `logits` (F32 [n, vocabulary]); row i predicts what follows token i. A text is
/// tokenized as the model's tokenizer does it by default (with its BOS token, if it adds one) and without a chat
/// template.
#[derive(Args)]
#[command(after_help = "Examples:
  tailorq probe ./my-model --text \"The capital of France is\" --output logits.safetensors
  echo '[1, 504, 3575]' > ids.json && tailorq probe model.gguf --tokens ids.json --output logits.safetensors")]
pub struct ProbeArgs {
    /// Directory, GGUF file or hub id
    model: String,
    #[command(flatten)]
    input: Input,
    /// The file to write (safetensors)
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
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
    let device = tailorq::cpu();
    let progress = Progress::new(console, "probe", tokens.len());
    let step = &mut |done, total| progress.step(done, total);
    tailorq::probe(&opened.model, device.as_ref(), &tokens, &args.output, step)
        .with_context(|| format!("cannot probe {}", args.model))?;
    drop(progress);
    let output = args.output.display().to_string();
    console.object(&json!({ "model": args.model, "output": output, "tokens": tokens.len(), "vocab": vocab }))?;
    console.text(&format!("{output}: tokens [{n}], logits [{n}, {vocab}]\n", n = tokens.len()))
}

fn read_tokens(path: &Path) -> anyhow::Result<Vec<i64>> {
    let text = super::read_text(path)?;
    serde_json::from_str(&text).with_context(|| format!("{} is no flat JSON array of token ids", path.display()))
}
