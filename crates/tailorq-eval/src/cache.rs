//! Finished items in a file, so that an evaluation that was stopped goes on where it was.
//!
//! A file belongs to one task, one model and one list of items with all that decides their results: its first line says
//! which, and its name has a hash of that line, so that other models, items and options have other files. Each further
//! line is a finished item. Lines are only ever added; what a killed process left of its last line is cut off.

use crate::error::EvalError;
use crate::task::TaskOptions;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Where finished items are kept and whose they are.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a> {
    /// The folder of the files.
    pub folder: &'a Path,
    /// The SHA-256 of the model's files.
    pub model: &'a str,
    /// That of the reference's, if there is a reference.
    pub reference: Option<&'a str>,
}

/// Which model's items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// The model's.
    Subject,
    /// The reference's.
    Reference,
}

/// The hash of all that decides the results of some items.
pub(crate) struct Contents {
    hasher: Sha256,
}

impl Contents {
    /// `settings` are what all items have in common.
    pub(crate) fn new(settings: &Value) -> Self {
        let hasher = Sha256::new().chain_update(settings.to_string()).chain_update("\n");
        Contents { hasher }
    }

    /// Adds an item: everything about it that a model sees, as JSON so that no two items look alike.
    pub(crate) fn add(&mut self, item: &Value) {
        self.hasher.update(item.to_string());
        self.hasher.update("\n");
    }
}

/// The finished items of a task.
#[derive(Debug)]
pub(crate) struct Finished {
    /// What is known of each item.
    values: HashMap<usize, Value>,
    /// How many of them were asked for.
    served: Cell<usize>,
    /// Absent where nothing is kept.
    kept: Option<(PathBuf, File)>,
}

impl Finished {
    /// Nothing is known, and nothing will be kept.
    pub(crate) fn nothing() -> Self {
        Finished { values: HashMap::new(), served: Cell::new(0), kept: None }
    }

    /// These are known, and nothing will be kept.
    #[cfg(test)]
    pub(crate) fn of(values: HashMap<usize, Value>) -> Self {
        Finished { values, served: Cell::new(0), kept: None }
    }

    /// Opens the file of these items, if a cache is asked for.
    pub(crate) fn open(
        task: &'static str,
        options: &TaskOptions<'_>,
        whose: Whose,
        contents: Contents,
    ) -> Result<Self, EvalError> {
        let cache = options.items.cache.as_ref();
        let model = cache.and_then(|cache| if whose == Whose::Subject { Some(cache.model) } else { cache.reference });
        let (Some(cache), Some(model)) = (cache, model) else {
            return Ok(Finished::nothing());
        };
        let header = json!({
            "tailorq_eval_cache": 1,
            "tailorq": env!("CARGO_PKG_VERSION"),
            "task": task,
            "model": model,
            "contents": hex(&contents.hasher.finalize()),
        });
        let header = header.to_string();
        let name = format!("{task}-{}.jsonl", &hex(&Sha256::digest(&header))[..16]);
        Finished::open_file(&cache.folder.join(name), &header)
    }

    fn open_file(path: &Path, header: &str) -> Result<Self, EvalError> {
        let fail = |problem: String| EvalError::Cache { path: path.to_owned(), problem };
        let io = |e: std::io::Error| fail(format!("cannot be used: {e}; give another --cache"));
        path.parent().map_or(Ok(()), std::fs::create_dir_all).map_err(io)?;
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(fail("is in use by another evaluation of the same items: wait for it".to_owned()));
            }
            Err(TryLockError::Error(e)) => return Err(io(e)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io)?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let text = std::str::from_utf8(&bytes[..whole])
            .map_err(|e| fail(format!("is damaged ({e}): delete it to score its items anew")))?;
        let values = if whole == 0 { HashMap::new() } else { read_lines(path, text, header)? };
        file.set_len(whole as u64).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        let mut finished = Finished { values, served: Cell::new(0), kept: Some((path.to_owned(), file)) };
        if whole == 0 {
            finished.write(header)?;
        }
        Ok(finished)
    }

    /// What was kept of an item, as `read` understands it.
    pub(crate) fn get<T>(
        &self,
        index: usize,
        read: impl FnOnce(&Map<String, Value>) -> Option<T>,
    ) -> Result<Option<T>, EvalError> {
        let Some(value) = self.values.get(&index) else { return Ok(None) };
        match (value.as_object().and_then(read), &self.kept) {
            (Some(known), _) => {
                self.served.set(self.served.get() + 1);
                Ok(Some(known))
            }
            (None, None) => Ok(None),
            (None, Some((path, _))) => {
                let problem =
                    format!("has no result for item {index} that can be read: delete it to score its items anew");
                Err(EvalError::Cache { path: path.clone(), problem })
            }
        }
    }

    /// How many results were taken from what was kept.
    pub(crate) fn served(&self) -> usize {
        self.served.get()
    }

    /// Whether an item is finished.
    pub(crate) fn has(&self, index: usize) -> bool {
        self.values.contains_key(&index)
    }

    /// Keeps an item that was not.
    pub(crate) fn keep(&mut self, index: usize, mut value: Map<String, Value>) -> Result<(), EvalError> {
        if self.kept.is_none() || self.has(index) {
            return Ok(());
        }
        value.insert("index".to_owned(), index.into());
        let value = Value::from(value);
        self.write(&value.to_string())?;
        self.values.insert(index, value);
        Ok(())
    }

    /// The numbers of an item: those that were kept, or new ones.
    pub(crate) fn numbers<const N: usize>(
        &mut self,
        index: usize,
        compute: impl FnOnce() -> Result<[f64; N], EvalError>,
    ) -> Result<[f64; N], EvalError> {
        let read = |kept: &Map<String, Value>| {
            let numbers: Option<Vec<f64>> = kept.get("numbers")?.as_array()?.iter().map(read_exact).collect();
            numbers?.try_into().ok()
        };
        if let Some(known) = self.get(index, read)? {
            return Ok(known);
        }
        let numbers = compute()?;
        let written: Vec<Value> = numbers.iter().map(|number| exact(*number)).collect();
        self.keep(index, [("numbers".to_owned(), written.into())].into_iter().collect())?;
        Ok(numbers)
    }

    fn write(&mut self, line: &str) -> Result<(), EvalError> {
        let Some((path, file)) = &mut self.kept else { return Ok(()) };
        // One call, so that a line is there whole or, if the process dies in it, without its end.
        file.write_all(format!("{line}\n").as_bytes()).map_err(|e| EvalError::Cache {
            path: path.clone(),
            problem: format!("cannot be written: {e}; free some space or give another --cache"),
        })
    }
}

fn read_lines(path: &Path, text: &str, header: &str) -> Result<HashMap<usize, Value>, EvalError> {
    let fail = |problem: String| EvalError::Cache { path: path.to_owned(), problem };
    let mut lines = text.lines();
    if lines.next() != Some(header) {
        let problem = "belongs to other items, another model or another version of tailorq: delete it, or give another \
                       --cache";
        return Err(fail(problem.to_owned()));
    }
    let mut values = HashMap::new();
    for (line_idx, line) in lines.enumerate() {
        let damaged = || fail(format!("is damaged in line {}: delete it to score its items anew", line_idx + 2));
        let value: Value = serde_json::from_str(line).map_err(|_| damaged())?;
        let index = value.get("index").and_then(Value::as_u64).and_then(|index| usize::try_from(index).ok());
        values.insert(index.ok_or_else(damaged)?, value);
    }
    Ok(values)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A number as a text that is read back as the very same number.
pub(crate) fn exact(number: f64) -> Value {
    number.to_string().into()
}

/// A number that [`exact`] wrote.
pub(crate) fn read_exact(value: &Value) -> Option<f64> {
    value.as_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = r#"{"tailorq_eval_cache":1}"#;

    fn open(path: &Path, header: &str) -> Result<Finished, EvalError> {
        Finished::open_file(path, header)
    }

    fn item(number: f64) -> Map<String, Value> {
        [("x".to_owned(), exact(number))].into_iter().collect()
    }

    fn known(finished: &Finished) -> Vec<Option<f64>> {
        (0..3).map(|i| finished.get(i, |item| read_exact(item.get("x")?)).unwrap()).collect()
    }

    #[test]
    fn what_was_kept_comes_back_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/cache.jsonl");
        let mut finished = open(&path, HEADER).unwrap();
        let number = -0.1 - 1e-17 - std::f64::consts::PI / 7.0;
        finished.keep(2, item(number)).unwrap();
        finished.keep(2, item(1.0)).unwrap();
        finished.keep(0, item(f64::MIN_POSITIVE)).unwrap();
        assert!(open(&path, HEADER).unwrap_err().to_string().contains("in use"));
        drop(finished);
        let finished = open(&path, HEADER).unwrap();
        assert_eq!(known(&finished), [Some(f64::MIN_POSITIVE), None, Some(number)], "the first result stays");
        assert_eq!([0, 1, 2].map(|i| finished.has(i)), [true, false, true]);
    }

    #[test]
    fn a_torn_line_goes_and_its_item_is_kept_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache.jsonl");
        let mut finished = open(&path, HEADER).unwrap();
        finished.keep(0, item(0.5)).unwrap();
        finished.keep(1, item(1.5)).unwrap();
        drop(finished);
        let whole = std::fs::read(&path).unwrap();
        for len in 0..whole.len() {
            std::fs::write(&path, &whole[..len]).unwrap();
            let mut finished = open(&path, HEADER).unwrap();
            let lines = whole[..len].iter().filter(|byte| **byte == b'\n').count();
            assert_eq!(known(&finished), [(lines > 1).then_some(0.5), None, None], "{len} bytes");
            finished.keep(0, item(0.5)).unwrap();
            finished.keep(1, item(1.5)).unwrap();
            drop(finished);
            assert_eq!(std::fs::read(&path).unwrap(), whole, "{len} bytes");
        }
    }

    #[test]
    fn foreign_and_damaged_files_are_refused_and_left_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache.jsonl");
        for (content, words) in [
            ("{\"other\":1}\n".to_owned(), "another model"),
            (format!("{HEADER}\nno JSON\n"), "line 2"),
            (format!("{HEADER}\n{{\"index\":0}}\n{{\"index\":-3}}\n"), "line 3"),
            (format!("{HEADER}\n{{\"x\":\"1\"}}\n"), "line 2"),
        ] {
            std::fs::write(&path, &content).unwrap();
            let message = open(&path, HEADER).unwrap_err().to_string();
            assert!(message.contains("cache.jsonl") && message.contains(words), "{message}");
            assert!(message.contains("delete it"), "{message}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
        }
        std::fs::write(&path, format!("{HEADER}\n{{\"index\":0,\"x\":1}}\n")).unwrap();
        let finished = open(&path, HEADER).unwrap();
        assert!(finished.get(0, |item| read_exact(item.get("x")?)).unwrap_err().to_string().contains("item 0"));
    }
}
