//! Where words go: results to standard output, everything else to standard error.

use anyhow::Context;
use std::io::{self, IsTerminal, Write};

/// What the user wants to see.
#[derive(Clone, Copy, Debug)]
pub struct Console {
    /// One JSON object instead of text for people.
    pub json: bool,
    /// Only results and errors.
    pub quiet: bool,
    verbose: bool,
}

impl Console {
    /// A console as the global options ask for it.
    pub fn new(json: bool, quiet: bool, verbose: bool) -> Self {
        Console { json, quiet, verbose }
    }

    /// A result for people, on standard output (nothing with `--json`).
    pub fn text(&self, text: &str) -> anyhow::Result<()> {
        if self.json { Ok(()) } else { write_out(text) }
    }

    /// The one object of `--json`, on standard output (nothing without).
    pub fn object(&self, value: &impl serde::Serialize) -> anyhow::Result<()> {
        if !self.json {
            return Ok(());
        }
        let text = serde_json::to_string_pretty(value).context("the result cannot be written as JSON")?;
        write_out(&format!("{text}\n"))
    }

    /// Something worth knowing, on standard error unless `--quiet`.
    pub fn note(&self, message: &str) {
        if !self.quiet {
            write_err(&format!("note: {message}\n"));
        }
    }

    /// Something for the curious, on standard error with `--verbose`.
    pub fn detail(&self, message: &str) {
        if self.verbose {
            write_err(&format!("{message}\n"));
        }
    }

    /// Text as it comes, at once: to standard output, or to standard error where that holds the JSON object.
    pub fn stream(&self, text: &str) -> anyhow::Result<()> {
        match (self.json, self.quiet) {
            (false, _) => write_out(text),
            (true, false) => {
                write_err(text);
                Ok(())
            }
            (true, true) => Ok(()),
        }
    }
}

/// Writes and flushes; an error keeps its `io::Error`, by which a closed pipe is known.
fn write_out(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write to standard output")
}

/// Nobody is left to tell when standard error is closed, so errors are dropped.
pub fn write_err(text: &str) {
    let mut err = io::stderr().lock();
    let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
}

/// Whether a person looks at standard error.
pub fn is_watched() -> bool {
    io::stderr().is_terminal()
}
