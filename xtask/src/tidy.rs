//! Walks the workspace and hands each file to the rules.

use crate::{imports, sources};
use anyhow::{Context, Result};
use std::fmt;
use std::path::Path;

/// A broken rule, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Offence {
    /// Path from the root of the workspace, with forward slashes.
    pub path: String,
    /// Line, from 1.
    pub line: usize,
    /// Short name of the rule.
    pub rule: &'static str,
    /// What to do.
    pub remedy: String,
}

impl Offence {
    /// An offence at `path:line`.
    pub fn new(path: &str, line: usize, rule: &'static str, remedy: impl Into<String>) -> Self {
        Offence { path: path.into(), line, rule, remedy: remedy.into() }
    }
}

impl fmt::Display for Offence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.path, self.line, self.rule, self.remedy)
    }
}

/// One file of the workspace that the rules look at.
#[derive(Debug)]
pub struct File {
    /// Path from the root of the workspace, with forward slashes.
    pub path: String,
    /// The whole text.
    pub text: String,
}

/// Folders that hold no source of ours: builds, git, a virtual environment, what the demo leaves.
const SKIPPED: [&str; 4] = ["target", "tailorq-demo", ".git", ".venv"];

/// Files whose text is somebody else's or is made by a machine.
const FOREIGN: [&str; 3] = ["Cargo.lock", "LICENSE-APACHE", "LICENSE-MIT"];

/// All offences in the workspace at `root`, sorted by path and line.
pub fn check(root: &Path) -> Result<Vec<Offence>> {
    let mut files = Vec::new();
    collect(root, "", &mut files)?;
    let mut offences = check_files(&files)?;
    offences.sort();
    Ok(offences)
}

fn check_files(files: &[File]) -> Result<Vec<Offence>> {
    let mut offences = Vec::new();
    for file in files {
        offences.extend(sources::check_text(file));
        if file.path.ends_with(".rs") {
            offences.extend(sources::check_rust(file));
        }
    }
    offences.extend(imports::check(files)?);
    Ok(offences)
}

/// Reads every UTF-8 file below `root/folder`, in the order of their names. Other files are data and have no rules.
fn collect(root: &Path, folder: &str, files: &mut Vec<File>) -> Result<()> {
    let at = root.join(folder);
    let mut entries = std::fs::read_dir(&at)
        .and_then(|entries| entries.collect::<std::io::Result<Vec<_>>>())
        .with_context(|| format!("cannot list {}", at.display()))?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        let kind = entry.file_type().with_context(|| format!("cannot look at {path}"))?;
        if kind.is_dir() && !SKIPPED.contains(&name.as_str()) {
            collect(root, &path, files)?;
        } else if kind.is_file() && !FOREIGN.contains(&name.as_str()) {
            // A worktree's `.git` is a file with a path of the machine: not ours either.
            if SKIPPED.contains(&name.as_str()) {
                continue;
            }
            let bytes = std::fs::read(root.join(&path)).with_context(|| format!("cannot read {path}"))?;
            if let Ok(text) = String::from_utf8(bytes) {
                files.push(File { path, text });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tidy_holds_for_this_workspace() {
        let offences = check(&crate::workspace_root()).unwrap();
        let lines: Vec<String> = offences.iter().map(Offence::to_string).collect();
        assert!(lines.is_empty(), "the house rules are broken:\n{}", lines.join("\n"));
    }

    #[test]
    fn an_offending_workspace_on_disk_is_found_out() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("crates/tailorq-tensor/Cargo.toml", "[package]\nname = \"tailorq-tensor\"\n");
        write("crates/tailorq-tensor/src/lib.rs", "#![forbid(unsafe_code)]\nfn undocumented() {}\n");
        write("crates/tailorq-tensor/src/utils.rs", "//! Odds and ends.\n");
        write("target/debug/build/made.rs", "no rule looks here");
        write(".git", "gitdir: elsewhere");
        std::fs::write(dir.path().join("weights.bin"), [0xff, 0xfe, 0x00]).unwrap();
        let found: Vec<String> = check(dir.path()).unwrap().iter().map(|o| format!("{}:{}", o.path, o.rule)).collect();
        assert_eq!(found, ["crates/tailorq-tensor/src/lib.rs:file docs", "crates/tailorq-tensor/src/utils.rs:name"]);
    }

    #[test]
    fn an_offence_reads_as_one_line_that_editors_can_follow() {
        let offence = Offence::new("crates/x/src/lib.rs", 7, "name", "rename it");
        assert_eq!(offence.to_string(), "crates/x/src/lib.rs:7: name: rename it");
    }
}
