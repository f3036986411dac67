//! Chores of the project: `cargo xtask tidy` checks the house rules, `cargo xtask licences` the dependencies' terms.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a chore talks to a person")]

mod imports;
mod lexer;
mod licences;
mod sources;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask tidy | licences

  tidy      checks the import table, sizes, names and forbidden things; one line an offence
  licences  checks the licence of every dependency against the allow list of deny.toml";

/// The root of the workspace that this xtask was built in.
fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies inside the workspace").to_path_buf()
}

fn main() -> ExitCode {
    let chore = std::env::args().nth(1).unwrap_or_default();
    let found = match chore.as_str() {
        "tidy" => tidy::check(&workspace_root()),
        "licences" => licences::check(&workspace_root()),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match found {
        Ok(offences) if offences.is_empty() => {
            println!("{chore}: the house is in order");
            ExitCode::SUCCESS
        }
        Ok(offences) => {
            for offence in &offences {
                println!("{offence}");
            }
            eprintln!("{chore}: {} offence(s)", offences.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{chore}: {error:#}");
            ExitCode::from(2)
        }
    }
}
