//! Small random models with items to calibrate on, and what tests of whole runs share.
#![allow(dead_code, reason = "each test binary uses some of it")]
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use tailorq::{CalibrationRequest, Observer, Outcome, PipelineError, QuantizeRequest, Silent};
use tailorq_model::testing::TinyModel;

/// A directory with a tiny model, `model`, and what a test puts beside it.
pub struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    pub fn with_model(model: &TinyModel) -> Self {
        let bench = Bench { dir: tempfile::tempdir().unwrap() };
        model.write_directory(&bench.path("model")).unwrap();
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// Calibration on `samples` of the items in `file`.
    pub fn calibration(&self, file: &str, samples: usize) -> CalibrationRequest {
        CalibrationRequest {
            file: self.path(file),
            samples,
            sequence_length: None,
            seed: 3,
            drop_calculator_marks: false,
            general: None,
        }
    }

    /// The model into `output`, by the default settings and without calibration.
    pub fn plain_request(&self, output: &str) -> QuantizeRequest {
        QuantizeRequest::new(self.path("model").display().to_string(), self.path(output))
    }
}

pub fn question(i: usize) -> String {
    format!("what is {i} plus {}?", i * 7)
}

pub fn answer(i: usize) -> String {
    format!("it is {}", i * 8)
}

/// A line of a file of items.
pub fn item(i: usize) -> String {
    format!("{{\"prompt\": \"{}\", \"completion\": \"{}\"}}\n", question(i), answer(i))
}

pub fn items(range: Range<usize>) -> String {
    range.map(item).collect()
}

pub fn quantize(request: &QuantizeRequest) -> Result<Outcome, PipelineError> {
    tailorq::quantize(tailorq::cpu().as_ref(), request, &Silent)
}

/// Every file of a directory by name, with its bytes.
pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries.map(|e| (e.file_name().to_string_lossy().into_owned(), std::fs::read(e.path()).unwrap())).collect()
}

/// Fails with the names of the files that differ.
pub fn assert_same(a: &BTreeMap<String, Vec<u8>>, b: &BTreeMap<String, Vec<u8>>, what: &str) {
    let differing: Vec<_> = a.keys().chain(b.keys()).filter(|name| a.get(*name) != b.get(*name)).collect();
    assert!(differing.is_empty(), "{what}: {differing:?} differ");
}

/// Asks to stop at the `n`-th look.
pub struct StopAfter {
    n: u64,
    looks: AtomicU64,
}

impl StopAfter {
    pub fn new(n: u64) -> Self {
        StopAfter { n, looks: AtomicU64::new(0) }
    }
}

impl Observer for StopAfter {
    fn stage(&self, _: &str, _: u64) {}
    fn progress(&self, _: u64, _: &str) {}
    fn note(&self, _: &str) {}
    fn cancelled(&self) -> bool {
        self.looks.fetch_add(1, Ordering::Relaxed) + 1 >= self.n
    }
}
