//! Data sets on the Hugging Face hub: under which id lm-evaluation-harness reads the items of a task, and which of their
//! files hold a split.

use crate::data::split_files;
use crate::error::EvalError;
use std::path::PathBuf;
use tailorq_model::data_set_files;

/// What `--data` is called to read from the hub.
pub(crate) const HUB: &str = "hub";

/// A data set's own files, or else those that the hub makes of every data set.
const REVISIONS: [&str; 2] = ["main", "refs/convert/parquet"];

/// A data set of the hub.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HubSet<'a> {
    /// The folder that it has under `--data`.
    name: &'a str,
    /// Its id.
    repo: &'a str,
    /// Which part of it, where it has several.
    config: Option<&'a str>,
    /// The split that is tested on: where test items have no answers, the validation items.
    test: &'a str,
}

const fn set<'a>(name: &'a str, repo: &'a str, config: Option<&'a str>, test: &'a str) -> HubSet<'a> {
    HubSet { name, repo, config, test }
}

/// As in the harness' task files.
const SETS: &[HubSet<'static>] = &[
    set("arc_easy", "allenai/ai2_arc", Some("ARC-Easy"), "test"),
    set("arc_challenge", "allenai/ai2_arc", Some("ARC-Challenge"), "test"),
    set("piqa", "baber/piqa", None, "validation"),
    set("boolq", "aps/super_glue", Some("boolq"), "validation"),
    set("openbookqa", "allenai/openbookqa", Some("main"), "test"),
    set("winogrande", "allenai/winogrande", Some("winogrande_xl"), "validation"),
    set("hellaswag", "Rowan/hellaswag", None, "validation"),
    set("mmlu", "cais/mmlu", Some("all"), "test"),
    set("gsm8k", "openai/gsm8k", Some("main"), "test"),
    set("wikitext2", "Salesforce/wikitext", Some("wikitext-2-raw-v1"), "test"),
];

impl HubSet<'static> {
    /// The data set that a task keeps under `name`.
    pub(crate) fn find(task: &'static str, name: &str) -> Result<HubSet<'static>, EvalError> {
        let input = "files of its own: it has no data set on the hub that holds all it reads (--data DIR)";
        SETS.iter().copied().find(|set| set.name == name).ok_or(EvalError::MissingInput { task, input })
    }
}

impl<'a> HubSet<'a> {
    /// A data set by its id, `ORG/NAME` or `ORG/NAME:CONFIG`.
    pub(crate) fn of_id(task: &'static str, id: &'a str) -> Result<Self, EvalError> {
        let (repo, config) = id.split_once(':').map_or((id, None), |(repo, config)| (repo, Some(config)));
        let is_id = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(['/', '\\']);
        match repo.split_once('/') {
            Some((organization, name)) if is_id(organization) && is_id(name) => Ok(set(task, repo, config, "test")),
            _ => {
                let input = "a data set's id after 'hub:' (--data hub:ORG/NAME, or hub:ORG/NAME:CONFIG)";
                Err(EvalError::MissingInput { task, input })
            }
        }
    }

    /// The files of the first of `splits` that the data set has. `test` is the split that is tested on.
    pub(crate) fn split(&self, splits: &[&str]) -> Result<Vec<PathBuf>, EvalError> {
        let select = |files: &[String]| {
            let split = |name: &&str| self.select(if *name == "test" { self.test } else { name }, files);
            splits.iter().map(split).find(|found| !found.is_empty()).unwrap_or_default()
        };
        data_set_files(self.repo, &REVISIONS, &select).map_err(|error| EvalError::HubData {
            split: splits[0].to_owned(),
            repo: self.repo.to_owned(),
            config: self.config.map_or(String::new(), |c| format!(" {c}")),
            name: self.name.to_owned(),
            source: Box::new(error),
        })
    }

    /// The Parquet files of a split: `CONFIG/test-00000-of-00001.parquet` and its like, or `CONFIG/test/0000.parquet`, in one
    /// folder. Without a config the folder may have any name.
    fn select(&self, split: &str, files: &[String]) -> Vec<String> {
        let folder_of = |file: &str| file.rsplit_once('/').map_or(String::new(), |(folder, _)| folder.to_owned());
        let mut folders: Vec<String> = files.iter().map(|f| folder_of(f)).collect();
        folders.dedup();
        folders.retain(|folder| self.config.is_none_or(|config| folder.split('/').any(|part| part == config)));
        for folder in folders {
            let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
            let of_folder = files.iter().filter(|file| folder_of(file) == folder && file.ends_with(".parquet"));
            let names: Vec<String> = of_folder.map(|file| file[prefix.len()..].to_owned()).collect();
            let mut found = split_files(&names, split);
            if found.is_empty() && folder.rsplit('/').next() == Some(split) {
                found = numbered(&names);
            }
            if !found.is_empty() {
                return found.into_iter().map(|name| format!("{prefix}{name}")).collect();
            }
        }
        Vec::new()
    }
}

/// `0000.parquet`, `0001.parquet` and so on without a gap, of sorted names.
fn numbered(names: &[String]) -> Vec<&str> {
    let number = |name: &str| name.strip_suffix(".parquet").and_then(|stem| stem.parse::<usize>().ok());
    let found: Vec<&str> = names.iter().map(String::as_str).filter(|name| number(name).is_some()).collect();
    let is_whole = found.iter().enumerate().all(|(i, name)| number(name) == Some(i));
    if is_whole { found } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selected(name: &str, split: &str, files: &[&str]) -> Vec<String> {
        let mut files: Vec<String> = files.iter().map(|f| (*f).to_owned()).collect();
        files.sort_unstable();
        HubSet::find("task", name).unwrap().select(split, &files)
    }

    #[test]
    fn splits_are_found_in_the_layouts_of_the_hub() {
        let arc = [
            "ARC-Challenge/test-00000-of-00001.parquet",
            "ARC-Easy/test-00000-of-00001.parquet",
            "ARC-Easy/train-00000-of-00001.parquet",
            "README.md",
        ];
        assert_eq!(selected("arc_easy", "test", &arc), ["ARC-Easy/test-00000-of-00001.parquet"]);
        assert_eq!(selected("arc_challenge", "test", &arc), ["ARC-Challenge/test-00000-of-00001.parquet"]);
        assert!(selected("arc_challenge", "train", &arc).is_empty());
        let parts = ["data/validation-00000-of-00002.parquet", "data/validation-00001-of-00002.parquet"];
        assert_eq!(selected("hellaswag", "validation", &parts), parts);
        assert!(selected("hellaswag", "validation", &parts[..1]).is_empty(), "not a part of a split");
        let converted = ["main/test/0000.parquet", "main/test/0001.parquet", "main/train/0000.parquet"];
        assert_eq!(selected("gsm8k", "test", &converted), converted[..2]);
        assert!(selected("gsm8k", "test", &["main/test/0001.parquet"]).is_empty());
        assert_eq!(selected("piqa", "test", &["test.jsonl", "test.parquet"]), ["test.parquet"]);
        assert!(selected("boolq", "test", &["boolq/test.jsonl", "cb/test.parquet"]).is_empty());
    }

    #[test]
    fn tasks_with_files_beside_their_items_are_not_on_the_hub() {
        let own = HubSet::of_id("jsonl", "org/name:part").unwrap();
        assert_eq!((own.repo, own.config), ("org/name", Some("part")));
        for id in ["name", "/name", "org/", "org/a/b", "../x"] {
            assert!(HubSet::of_id("jsonl", id).unwrap_err().to_string().contains("hub:ORG/NAME"), "{id}");
        }
        let message = HubSet::find("spider", "spider").unwrap_err().to_string();
        assert!(message.contains("spider") && message.contains("--data DIR"), "{message}");
    }
}
