//! Items of data sets: where they lie, how they are read, and errors that say which field of which line is amiss.

use crate::error::EvalError;
use crate::hub::{HUB, HubSet};
use crate::task::TaskOptions;
use serde_json::{Map, Value};
use std::fs::File;
use std::path::{Path, PathBuf};

/// The fields of an item.
pub(crate) type Row = Map<String, Value>;

/// The items of a file, or of several that make up one split, in their order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Items {
    files: Vec<PathBuf>,
    rows: Vec<Placed>,
}

/// An item with its file and its line there, from 1.
#[derive(Clone, Debug)]
struct Placed {
    file: usize,
    line: usize,
    row: Row,
}

impl Items {
    /// Reads a file: Parquet by its name, else JSONL, of which empty lines are passed over.
    pub(crate) fn read(path: &Path) -> Result<Self, EvalError> {
        Items::read_all(vec![path.to_owned()])
    }

    /// Reads files one after the other.
    pub(crate) fn read_all(files: Vec<PathBuf>) -> Result<Self, EvalError> {
        let mut items = Items { files, rows: Vec::new() };
        for (file, path) in items.files.iter().enumerate() {
            let rows = if is_parquet(path) { read_parquet(path)? } else { read_jsonl(path)? };
            items.rows.extend(rows.into_iter().map(|(line, row)| Placed { file, line, row }));
        }
        match (&items.rows[..], &items.files[..]) {
            ([], [path, ..]) => Err(EvalError::Data { path: path.clone(), problem: "holds no items".to_owned() }),
            _ => Ok(items),
        }
    }

    /// The first file.
    pub(crate) fn path(&self) -> &Path {
        self.files.first().map_or(Path::new(""), PathBuf::as_path)
    }

    /// The first items, as many as asked for.
    pub(crate) fn limited(mut self, options: &TaskOptions<'_>) -> Self {
        self.rows.truncate(options.items.limit.unwrap_or(usize::MAX));
        self
    }

    /// Number of items.
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The item `index`, which exists.
    pub(crate) fn get(&self, index: usize) -> Item<'_> {
        let Placed { file, line, row } = &self.rows[index];
        Item { row, path: &self.files[*file], line: *line, index }
    }

    /// All items.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = Item<'_>> {
        (0..self.rows.len()).map(|index| self.get(index))
    }
}

/// An item and where it stands.
#[derive(Clone, Copy)]
pub(crate) struct Item<'a> {
    /// Its fields.
    pub(crate) row: &'a Row,
    /// Its file.
    pub(crate) path: &'a Path,
    /// Its line there, from 1.
    pub(crate) line: usize,
    /// Its place among the items, from 0.
    pub(crate) index: usize,
}

impl<'a> Item<'a> {
    /// An error that names file and line.
    pub(crate) fn fail(&self, problem: impl AsRef<str>) -> EvalError {
        let place = if is_parquet(self.path) { "row" } else { "line" };
        let problem = format!("{place} {} (item {}) {}", self.line, self.index, problem.as_ref());
        EvalError::Data { path: self.path.to_owned(), problem }
    }

    /// An error that names the field too, and what there is instead.
    pub(crate) fn lacks(&self, what: &str) -> EvalError {
        let fields: Vec<&str> = self.row.keys().map(String::as_str).collect();
        let fields = if fields.is_empty() { "none".to_owned() } else { fields.join(", ") };
        self.fail(format!("has no {what} (its fields: {fields}); fields have the names of the data set on the hub"))
    }

    /// The value of a field, if there is one that is not null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.row.get(key).filter(|value| !value.is_null())
    }

    /// A text field.
    pub(crate) fn text(&self, key: &str) -> Result<&'a str, EvalError> {
        self.get(key).and_then(Value::as_str).ok_or_else(|| self.lacks(&format!("text '{key}'")))
    }

    /// A field that is a list of texts.
    pub(crate) fn texts(&self, key: &str) -> Result<Vec<&'a str>, EvalError> {
        self.get(key).and_then(texts).ok_or_else(|| self.lacks(&format!("list of texts '{key}'")))
    }

    /// A field that is a number from 0, as a number or as its digits.
    pub(crate) fn number(&self, key: &str) -> Result<usize, EvalError> {
        let number = match self.get(key) {
            Some(Value::String(digits)) => digits.trim().parse().ok(),
            Some(value) => value.as_u64().and_then(|n| usize::try_from(n).ok()),
            None => None,
        };
        number.ok_or_else(|| self.lacks(&format!("number from 0 on '{key}'")))
    }

    /// Choices under `choices.text` with labels under `choices.label`, and the place of `answerKey` among the labels.
    pub(crate) fn labelled_choices(&self) -> Result<(Vec<&'a str>, usize), EvalError> {
        let choices = self.get("choices").ok_or_else(|| self.lacks("'choices'"))?;
        let list = |key: &str| {
            let list = choices.get(key).and_then(texts);
            list.ok_or_else(|| self.lacks(&format!("list of texts 'choices.{key}'")))
        };
        let (choices, labels) = (list("text")?, list("label")?);
        let key = self.text("answerKey")?.trim_start();
        let gold = labels.iter().position(|label| *label == key);
        let gold = gold.ok_or_else(|| {
            self.fail(format!(
                "has no choice with the label '{key}' of its 'answerKey' (labels: {})",
                labels.join(", ")
            ))
        })?;
        Ok((choices, gold))
    }
}

fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet"))
}

fn read_parquet(path: &Path) -> Result<Vec<(usize, Row)>, EvalError> {
    let fail = |problem: String| EvalError::Data { path: path.to_owned(), problem };
    let file = File::open(path).map_err(|e| fail(format!("cannot be read: {e}")))?;
    let rows = crate::parquet::read(file).map_err(|e| fail(e.to_string()))?;
    Ok(rows.into_iter().enumerate().map(|(idx, row)| (idx + 1, row)).collect())
}

fn read_jsonl(path: &Path) -> Result<Vec<(usize, Row)>, EvalError> {
    let fail = |problem: String| EvalError::Data { path: path.to_owned(), problem };
    let bytes = std::fs::read(path).map_err(|e| fail(format!("cannot be read: {e}")))?;
    let text = String::from_utf8(bytes).map_err(|e| fail(format!("is no UTF-8 text: {e}; save it as UTF-8")))?;
    let mut rows = Vec::new();
    for (line_idx, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let number = line_idx + 1;
        let row = serde_json::from_str(line).map_err(|e| {
            fail(format!("line {number} is not a JSON object: {e}; every line has to hold one item whole"))
        })?;
        rows.push((number, row));
    }
    Ok(rows)
}

fn texts(value: &Value) -> Option<Vec<&str>> {
    value.as_array()?.iter().map(Value::as_str).collect()
}

/// Where the items of a data set are.
#[derive(Clone, Debug)]
pub(crate) enum DataSet {
    /// In a folder of this machine.
    Folder(PathBuf),
    /// On the hub, or in its cache.
    Hub(HubSet<'static>),
}

impl DataSet {
    /// The data set `name` in the folder of data sets, or on the hub if that is what the folder is called and there is none
    /// of that name.
    pub(crate) fn open(task: &'static str, name: &str, options: &TaskOptions<'_>) -> Result<Self, EvalError> {
        let input = "a folder of data sets (--data DIR), or --data hub";
        let data = options.items.data.ok_or(EvalError::MissingInput { task, input })?;
        if is_hub(data) {
            return Ok(DataSet::Hub(HubSet::find(task, name)?));
        }
        if hub_id(data).is_some() {
            let input = "the data set that its prompts are made for: --data hub, or a folder (only jsonl, completion_nll and rolling \
                         read --data hub:ORG/NAME)";
            return Err(EvalError::MissingInput { task, input });
        }
        Ok(DataSet::Folder(folder_of_sets(task, data, name)?))
    }

    /// The items to be tested on, as many as asked for.
    pub(crate) fn items(&self, options: &TaskOptions<'_>) -> Result<Items, EvalError> {
        Ok(self.split(&["test"], "the items")?.limited(options))
    }

    /// The items of the first of `names` that there is. `what` is what they are called when there are none.
    pub(crate) fn split(&self, names: &[&str], what: &str) -> Result<Items, EvalError> {
        match self {
            DataSet::Folder(folder) => read_split(folder, names, what),
            DataSet::Hub(set) => Items::read_all(set.split(names)?),
        }
    }
}

/// Whether data sets are to be read from the hub.
pub(crate) fn is_hub(data: &Path) -> bool {
    data == Path::new(HUB) && !data.exists()
}

/// The id in `hub:ORG/NAME`.
fn hub_id(data: &Path) -> Option<&str> {
    data.to_str().filter(|_| !data.exists())?.strip_prefix("hub:")
}

/// The folder of the data set `name` in the folder `data` of all of them; says so where one of the wrong depth was given.
pub(crate) fn folder_of_sets(task: &'static str, data: &Path, name: &str) -> Result<PathBuf, EvalError> {
    let fail = |problem: String| Err(EvalError::Data { path: data.to_owned(), problem });
    let folder = data.join(name);
    if data.is_file() {
        return fail(format!(
            "is one file, and task {task} reads a folder of data sets: give the folder above {name}/test.jsonl"
        ));
    }
    if !folder.exists() && data.file_name().is_some_and(|own| own == name) {
        return fail(format!(
            "is the data set itself: task {task} reads {name}/test.jsonl, so give the folder above it"
        ));
    }
    Ok(folder)
}

/// The items of one's own, as many as asked for: those of a file, of `DIR/<task>/test.jsonl` beside other data sets, or of a
/// data set of the hub by its id.
pub(crate) fn own_items(task: &'static str, options: &TaskOptions<'_>) -> Result<Items, EvalError> {
    let input = "items of your own (--data FILE.jsonl, DIR with a folder of the task's name and test.jsonl in it, or hub:ORG/NAME)";
    let missing = EvalError::MissingInput { task, input };
    let data = options.items.data.ok_or(missing)?;
    if is_hub(data) {
        return Err(EvalError::MissingInput { task, input });
    }
    let items = if let Some(id) = hub_id(data) {
        Items::read_all(HubSet::of_id(task, id)?.split(&["test", "validation", "train"])?)?
    } else if !data.is_dir() {
        Items::read(data)?
    } else if data.join(task).is_dir() {
        read_split(&data.join(task), &["test"], "the items")?
    } else {
        let problem = format!(
            "is a folder, and task {task} reads items of your own: give their file, or put it beside the data sets as {task}/test.jsonl"
        );
        return Err(EvalError::Data { path: data.to_owned(), problem });
    };
    Ok(items.limited(options))
}

/// The items of a folder: of the first of `names` that it has, such as `test` for `test.jsonl`, `test.parquet` or
/// `test-00000-of-00002.parquet` and its like. `what` is what they are called when there are none.
pub(crate) fn read_split(folder: &Path, names: &[&str], what: &str) -> Result<Items, EvalError> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    files.sort_unstable();
    if let Some(found) = names.iter().map(|name| split_files(&files, name)).find(|found| !found.is_empty()) {
        return Items::read_all(found.into_iter().map(|file| folder.join(file)).collect());
    }
    let other = names[1..].iter().map(|name| format!(", nor does {name}.jsonl")).collect::<String>();
    let problem = format!(
        "does not exist{other}, nor a .parquet of that name: {what} are read from there, one JSON object a line with the \
         fields of the data set on the hub; --data names the folder above"
    );
    Err(EvalError::Data { path: folder.join(format!("{}.jsonl", names[0])), problem })
}

/// The files of a split among sorted `files`: one of its name, or all of a numbered series.
pub(crate) fn split_files<'a>(files: &'a [String], name: &str) -> Vec<&'a str> {
    for extension in ["jsonl", "parquet"] {
        let whole = format!("{name}.{extension}");
        if let Some(file) = files.iter().find(|file| **file == whole) {
            return vec![file];
        }
        let number = |file: &str| -> Option<(usize, usize)> {
            let (at, of) = file.strip_prefix(name)?.strip_prefix('-')?.strip_suffix(extension)?.split_once("-of-")?;
            Some((at.parse().ok()?, of.strip_suffix('.')?.parse().ok()?))
        };
        let numbered: Vec<(usize, usize, &str)> =
            files.iter().filter_map(|file| number(file).map(|(at, of)| (at, of, file.as_str()))).collect();
        // A series that lacks a file is none.
        if !numbered.is_empty() && numbered.iter().enumerate().all(|(i, (at, of, _))| *at == i && *of == numbered.len())
        {
            return numbered.into_iter().map(|(_, _, file)| file).collect();
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files that pyarrow wrote, with snappy, zstd, gzip and Brotli, beside the same rows as JSON.
    fn data(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
    }

    #[test]
    fn parquet_rows_are_those_of_jsonl() {
        let split = read_split(&data(""), &["gone", "arc"], "the items").unwrap();
        assert_eq!(split.path(), data("arc.jsonl"), "JSON lines come first");
        let folder = tempfile::tempdir().unwrap();
        for name in ["arc-00000-of-00002.parquet", "arc-00001-of-00002.parquet"] {
            let lone = read_split(folder.path(), &["arc"], "the items");
            assert!(lone.is_err(), "a series that is not whole is none");
            std::fs::copy(data(name), folder.path().join(name)).unwrap();
        }
        let parquet = read_split(folder.path(), &["arc"], "the items").unwrap();
        assert_eq!(parquet.len(), split.len());
        for (a, b) in parquet.iter().zip(split.iter()) {
            assert_eq!((a.row, a.index), (b.row, b.index));
        }
        let last = parquet.get(3).text("gone").unwrap_err().to_string();
        assert!(last.contains("arc-00001-of-00002.parquet row 1 (item 3) has no text 'gone'"), "{last}");
    }

    /// The first two rows, compressed in two other ways.
    #[test]
    fn gzip_is_read_and_what_is_not_says_so() {
        let [known, expected] = [data("arc-gzip.parquet"), data("arc.jsonl")].map(|path| Items::read(&path).unwrap());
        assert_eq!(known.len(), 2);
        for (a, b) in known.iter().zip(expected.iter()) {
            assert_eq!((a.row, a.index), (b.row, b.index));
        }
        let error = Items::read(&data("arc-brotli.parquet")).unwrap_err().to_string();
        assert!(error.contains("arc-brotli.parquet is compressed with Brotli"), "{error}");
        assert!(error.contains("write it with snappy, zstd, gzip") && !error.contains("anew"), "{error}");
    }

    #[test]
    fn damaged_parquet_is_an_error_that_names_the_file() {
        let whole = std::fs::read(data("arc-00000-of-00002.parquet")).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bad.parquet");
        let cuts = (0..whole.len()).step_by(97).map(|len| whole[..len].to_vec());
        let flips = (0..whole.len()).step_by(61).map(|at| {
            let mut bytes = whole.clone();
            bytes[at] ^= 0xff;
            bytes
        });
        for (bytes, must_fail) in cuts.map(|b| (b, true)).chain(flips.map(|b| (b, false))) {
            std::fs::write(&path, bytes).unwrap();
            match Items::read(&path) {
                Ok(_) => assert!(!must_fail, "a part of a file is none"),
                Err(error) => assert!(error.to_string().contains("bad.parquet"), "{error}"),
            }
        }
    }
}
