//! A directory with tiny models, and the command run in it.
#![allow(dead_code, reason = "each test binary uses some of it")]
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tailorq_model::testing::TinyModel;

/// What a test works in. The command sees no cache of the hub but `cache` in it.
pub struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// With these models, by name.
    pub fn with_models(models: &[(&str, &TinyModel)]) -> Self {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        for (name, model) in models {
            model.write_directory(&place.path(name)).unwrap();
        }
        place
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), content).unwrap();
    }

    /// The command in this place, with all its streams piped.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tailorq"));
        command.args(args).current_dir(self.dir());
        command.env("HF_HUB_CACHE", self.path("cache")).env("HF_HUB_OFFLINE", "1");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs the command with `input` on standard input.
    pub fn run_with(&self, args: &[&str], input: &str) -> Output {
        let mut child = self.command(args).spawn().unwrap();
        // A command that fails early may not read its input.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.run_with(args, "")
    }

    /// Runs the command, which must succeed, and reads its standard output as one JSON object.
    pub fn json(&self, args: &[&str]) -> Value {
        let output = self.run(&[args, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Runs the command, which must fail with this code, leave standard output empty and say `words`.
    pub fn fails(&self, code: i32, args: &[&str], words: &[&str]) {
        let output = self.run(args);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {message}");
        assert!(output.stdout.is_empty(), "{args:?}: {}", text(&output.stdout));
        let is_error = message.lines().any(|line| line.starts_with("error: "));
        assert!(is_error && !message.contains("panicked"), "{args:?}: {message}");
        for word in words {
            assert!(message.contains(word), "{args:?}: no '{word}' in: {message}");
        }
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
