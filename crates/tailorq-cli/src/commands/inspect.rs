//! `tailorq inspect`: what a model is made of.

use crate::console::Console;
use clap::Args;
use tailorq::{Inspection, Share, StoredMatrix};

/// Show what a model is made of: sizes, layouts, bits per weight from bytes.
///
/// Reads headers, norms and (of a packed artifact) scales, but no weights. Bits per weight count everything that is stored for a matrix:
/// codes, scales, zeros. Embedding and head are shown apart and are part of the total; the last line divides the
/// whole file by all weights.
#[derive(Args)]
#[command(after_help = "Examples:
  tailorq inspect ./my-model
  tailorq inspect model.gguf --layers
  tailorq inspect ./my-model --json | jq .total.bits_per_weight")]
pub struct InspectArgs {
    /// Directory, GGUF file or hub id
    model: String,
    /// One line for every matrix instead of one for each kind
    #[arg(long)]
    layers: bool,
}

/// Runs the command.
pub fn execute(args: &InspectArgs, console: &Console) -> anyhow::Result<()> {
    let opened = super::open(&args.model, console)?;
    let inspection = tailorq::inspect(&opened);
    console.object(&inspection)?;
    let mut text = summary(&inspection);
    text.push('\n');
    text.push_str(&if args.layers { layer_lines(&inspection.matrices) } else { kind_lines(&inspection.matrices) });
    text.push('\n');
    text.push_str(&shares(&inspection));
    console.text(&text)
}

fn summary(m: &Inspection) -> String {
    let heads = format!("{} heads of {}, {} for keys and values", m.heads, m.head_dim, m.kv_heads);
    let head = if m.tied_head { "head tied to the embedding" } else { "head of its own" };
    let template = if m.chat_template { "yes" } else { "no" };
    format!(
        "model          {}\narchitecture   {}, {} blocks\nwidths         {} hidden, {} feed-forward; {heads}\nvocabulary     {}, {head}\ncontext        {}\nchat template  {template}\nparameters     {}\n",
        m.path,
        m.architecture,
        m.blocks,
        m.hidden,
        m.intermediate,
        m.vocab,
        m.context,
        grouped(m.parameters),
    )
}

fn header(first: &str) -> String {
    format!("{first:<44} {:>16} {:<36} {:>8}\n", "shape", "stored as", "bits")
}

fn layer_lines(matrices: &[StoredMatrix]) -> String {
    let lines = matrices.iter().map(|m| line(&m.name, m, m.bits_per_weight));
    header("matrix") + &lines.collect::<String>()
}

/// One line for matrices of the same name (block number aside), shape and encoding, in order of first appearance.
fn kind_lines(matrices: &[StoredMatrix]) -> String {
    let mut kinds: Vec<(String, &StoredMatrix, usize, usize)> = Vec::new();
    for m in matrices {
        let kind = kind_of(&m.name);
        let same = |k: &&mut (String, &StoredMatrix, usize, usize)| {
            k.0 == kind && (k.1.rows, k.1.cols) == (m.rows, m.cols) && k.1.encoding == m.encoding
        };
        match kinds.iter_mut().find(same) {
            Some(known) => (known.2, known.3) = (known.2 + 1, known.3 + m.bytes),
            None => kinds.push((kind, m, 1, m.bytes)),
        }
    }
    let lines = kinds.iter().map(|(kind, m, n, bytes)| {
        let name = if *n > 1 { format!("{n} x {kind}") } else { m.name.clone() };
        line(&name, m, *bytes as f64 * 8.0 / (m.rows * m.cols * n).max(1) as f64)
    });
    header("matrices") + &lines.collect::<String>()
}

fn line(name: &str, m: &StoredMatrix, bits: f64) -> String {
    format!("{name:<44} {:>16} {:<36} {bits:>8.3}\n", format!("{} x {}", m.rows, m.cols), m.encoding)
}

/// The name with `N` for the block: `model.layers.N.mlp.down_proj`.
fn kind_of(name: &str) -> String {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    name.split('.').map(|part| if is_number(part) { "N" } else { part }).collect::<Vec<_>>().join(".")
}

fn shares(m: &Inspection) -> String {
    let line = |name: &str, share: &Share| {
        let (parameters, bytes) = (grouped(share.parameters), grouped(share.bytes));
        format!("{name:<14} {parameters:>18} {bytes:>18} {:>10.3}\n", share.bits_per_weight)
    };
    let mut text = format!("{:<14} {:>18} {:>18} {:>10}\n", "", "parameters", "bytes", "bits");
    text.push_str(&line("linears", &m.linears));
    text.push_str(&line("embedding", &m.embedding));
    if let Some(head) = &m.head {
        text.push_str(&line("head", head));
    }
    text.push_str(&line("total", &m.total));
    let file_bytes = usize::try_from(m.file_bytes).unwrap_or(usize::MAX);
    let file = Share { parameters: m.parameters, bytes: file_bytes, bits_per_weight: m.file_bits_per_weight };
    text.push_str(&line("file", &file));
    text
}

/// `1,234,567`.
fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped_by_thousands() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn block_numbers_do_not_make_kinds() {
        assert_eq!(kind_of("model.layers.12.mlp.down_proj"), "model.layers.N.mlp.down_proj");
        assert_eq!(kind_of("lm_head"), "lm_head");
    }
}
