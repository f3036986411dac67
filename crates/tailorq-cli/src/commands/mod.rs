//! The subcommands, one file each, and what several of them share.

pub mod bench;
pub mod chat;
pub mod compare;
pub mod demo;
pub mod engine;
pub mod eval;
pub mod inspect;
pub mod plan;
pub mod plot;
pub mod probe;
pub mod quantize;
pub mod run;
pub mod sampling;
pub mod score;
pub mod survey;

use crate::console::Console;
use anyhow::Context;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tailorq::{OpenedModel, PipelineError};

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

/// Puts what was given in its place.
fn set<T: Clone>(place: &mut T, given: Option<&T>) {
    if let Some(given) = given {
        place.clone_from(given);
    }
}

/// Settings that contradict each other, which exit as wrong usage does.
fn wrong_settings(problem: &str) -> anyhow::Error {
    PipelineError::Settings(problem.into()).into()
}

/// One mebibyte, for sizes in tables.
const MIB: f64 = 1024.0 * 1024.0;

/// A path that recipes, reports and JSON can hold: clap refuses what is not UTF-8 before this is called.
#[allow(clippy::unnecessary_wraps, reason = "clap wants a parser that could fail")]
fn utf8_path(path: &str) -> Result<PathBuf, std::convert::Infallible> {
    Ok(PathBuf::from(path))
}

/// A sentence for tables in which a source that is itself quantized stands for the original.
fn quantized_source(stored_as: &str) -> String {
    format!("(the original is itself a quantized file, {stored_as}: its own loss is part of both)\n")
}
