//! `--log-samples`: a line for each item.

use anyhow::Context;
use std::cell::RefCell;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tailorq_eval::ItemRecord;

/// A file that gets a line for each item. Writing cannot fail where items are scored, so a failure is kept for the end.
pub(super) struct SampleLog {
    path: PathBuf,
    file: RefCell<BufWriter<File>>,
    failure: RefCell<Option<std::io::Error>>,
}

impl SampleLog {
    pub(super) fn create(path: &Path) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(SampleLog { path: path.to_owned(), file: RefCell::new(BufWriter::new(file)), failure: RefCell::new(None) })
    }

    pub(super) fn write(&self, record: &ItemRecord) {
        let line = serde_json::to_string(record).map_err(std::io::Error::from);
        let written = line.and_then(|line| writeln!(self.file.borrow_mut(), "{line}"));
        if let Err(error) = written {
            self.failure.borrow_mut().get_or_insert(error);
        }
    }

    pub(super) fn finish(self) -> anyhow::Result<()> {
        let failed = self.failure.into_inner().map_or(Ok(()), Err);
        failed
            .and_then(|()| self.file.into_inner().flush())
            .with_context(|| format!("cannot write {}", self.path.display()))
    }
}
