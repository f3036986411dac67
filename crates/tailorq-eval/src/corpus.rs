//! The texts that perplexity is reported on, WikiText-2 and C4, where they lie in a folder of data sets.

use crate::data::{Items, folder_of_sets, is_hub, read_split};
use crate::error::EvalError;
use crate::hub::HubSet;
use crate::task::TaskOptions;
use std::borrow::Cow;
use std::path::Path;

/// A text with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Corpus {
    /// The test part of WikiText-2, raw, as its file has it.
    WikiText2,
    /// Documents of C4, an empty line apart.
    C4,
}

impl Corpus {
    /// The folder under `--data`.
    fn folder(self) -> &'static str {
        match self {
            Corpus::WikiText2 => "wikitext2",
            Corpus::C4 => "c4",
        }
    }

    /// Names under which the whole text is kept.
    fn files(self) -> &'static [&'static str] {
        match self {
            Corpus::WikiText2 => &["wiki.test.raw.txt", "wiki.test.raw", "test.txt"],
            Corpus::C4 => &["test.txt"],
        }
    }

    /// Reads it from the folder of data sets or, where the hub has it as rows, from there.
    pub(crate) fn read(self, task: &'static str, options: &TaskOptions<'_>) -> Result<String, EvalError> {
        let input = "a folder of data sets with wikitext2/ and c4/ (--data DIR)";
        let data = options.items.data.ok_or(EvalError::MissingInput { task, input })?;
        if is_hub(data) {
            return match self {
                Corpus::WikiText2 => {
                    Ok(self.joined(&Items::read_all(HubSet::find(task, self.folder())?.split(&["test"])?)?)?)
                }
                Corpus::C4 => {
                    let input = "c4/test.txt in a folder (--data DIR): the hub has C4 as compressed JSON only, in parts of \
                                 hundreds of megabytes";
                    Err(EvalError::MissingInput { task, input })
                }
            };
        }
        let folder = folder_of_sets(task, data, self.folder())?;
        match self.files().iter().map(|name| folder.join(name)).find(|path| path.is_file()) {
            Some(path) => read_text(&path),
            None => {
                let of = format!("the text ({} or rows with 'text')", self.files().join(", "));
                self.joined(&read_split(&folder, &["test"], &of)?)
            }
        }
    }

    /// The text from the rows of a data set.
    fn joined(self, rows: &Items) -> Result<String, EvalError> {
        let texts: Vec<&str> = rows.iter().map(|row| row.text("text")).collect::<Result<_, EvalError>>()?;
        Ok(match self {
            // A row is a line; the hub has the blank lines, which hold a space in the file, empty.
            Corpus::WikiText2 => texts.iter().map(|line| if line.is_empty() { " \n" } else { line }).collect(),
            Corpus::C4 => texts.join("\n\n"),
        })
    }
}

fn read_text(path: &Path) -> Result<String, EvalError> {
    let fail = |problem: String| EvalError::Data { path: path.to_owned(), problem };
    let text = std::fs::read_to_string(path).map_err(|e| fail(format!("cannot be read: {e}")))?;
    if text.is_empty() { Err(fail("is empty: there is nothing to score".to_owned())) } else { Ok(text) }
}

/// The text of `--text`, or else the corpus of the folder of data sets.
pub(crate) fn text_or_corpus<'a>(
    task: &'static str,
    corpus: Corpus,
    options: &TaskOptions<'a>,
) -> Result<Cow<'a, str>, EvalError> {
    let input = "a text to score (--text FILE, or --data DIR with wikitext2/wiki.test.raw.txt)";
    match (options.text, options.items.data) {
        (Some(text), _) => Ok(Cow::Borrowed(text)),
        (None, Some(data)) if !data.is_file() => Ok(Cow::Owned(corpus.read(task, options)?)),
        (None, _) => Err(EvalError::MissingInput { task, input }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::ItemOptions;

    fn read(corpus: Corpus, data: &Path) -> Result<String, EvalError> {
        let items = ItemOptions { data: Some(data), ..ItemOptions::default() };
        corpus.read("perplexity", &TaskOptions { items, ..TaskOptions::default() })
    }

    #[test]
    fn rows_are_the_text_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        };
        let missing = read(Corpus::WikiText2, dir.path()).unwrap_err().to_string();
        assert!(missing.contains("wiki.test.raw.txt") && missing.contains("wikitext2"), "{missing}");
        write(
            "wikitext2/test.jsonl",
            "{\"text\": \"\"}\n{\"text\": \" = A = \\n\"}\n{\"text\": \"\"}\n{\"text\": \" b \\n\"}\n",
        );
        let raw = " \n = A = \n \n b \n";
        assert_eq!(read(Corpus::WikiText2, dir.path()).unwrap(), raw);
        write("wikitext2/wiki.test.raw", "the file comes first");
        assert_eq!(read(Corpus::WikiText2, dir.path()).unwrap(), "the file comes first");
        write("c4/test.jsonl", "{\"text\": \"one\"}\n{\"text\": \"two\"}\n");
        assert_eq!(read(Corpus::C4, dir.path()).unwrap(), "one\n\ntwo");
        write("c4/test.txt", "");
        assert!(read(Corpus::C4, dir.path()).unwrap_err().to_string().contains("empty"));
        let own = read(Corpus::C4, &dir.path().join("c4")).unwrap_err().to_string();
        assert!(own.contains("the folder above"), "{own}");
        let on_hub = read(Corpus::C4, Path::new("hub")).unwrap_err().to_string();
        assert!(on_hub.contains("c4/test.txt") && on_hub.contains("--data DIR"), "{on_hub}");
    }
}
