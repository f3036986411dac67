//! The subcommands, one file each, and what several of them share.

pub mod chat;
pub mod demo;
pub mod eval;
pub mod inspect;
pub mod probe;
pub mod quantize;
pub mod run;
pub mod sampling;

use crate::console::Console;
use anyhow::Context;
use std::path::Path;
use std::time::Instant;
use tailorq::OpenedModel;

/// Opens a model and says how long it took.
fn open(source: &str, console: &Console) -> anyhow::Result<OpenedModel> {
    let started = Instant::now();
    let opened = tailorq::open(source).with_context(|| format!("cannot open the model '{source}'"))?;
    console.detail(&format!("opened {source} in {:.2} s", started.elapsed().as_secs_f64()));
    Ok(opened)
}

/// A text file, whole.
fn read_text(path: &Path) -> anyhow::Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    String::from_utf8(bytes).with_context(|| format!("{} is no UTF-8 text", path.display()))
}
