//! Generated tasks and completion scores on a tiny random model: data folders, bad files, limits, logs, and the shape of results.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod inputs;

use inputs::{subject, tiny};
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tailorq_eval::{EvalError, ItemOptions, ItemRecord, TaskOptions, TaskResult, task};
use tailorq_model::OpenedModel;
use tailorq_runtime::Device;

struct Fixture {
    opened: OpenedModel,
    device: Arc<dyn Device>,
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Fixture { opened: tiny(5, |_| {}), device: tailorq_kernels::cpu(), dir: tempfile::tempdir().unwrap() }
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    fn run(&self, name: &str, items: ItemOptions<'_>) -> Result<TaskResult, EvalError> {
        let subject = subject("tiny", &self.opened, self.device.as_ref());
        let options = TaskOptions { items: ItemOptions { max_tokens: Some(6), ..items }, ..TaskOptions::default() };
        task::find(name).unwrap().run(&subject, &options, &mut |_, _| ControlFlow::Continue(()))
    }

    /// The result and the records, in the order of their items.
    fn logged(&self, name: &str, items: ItemOptions<'_>) -> (TaskResult, Vec<ItemRecord>) {
        let records = RefCell::new(Vec::new());
        let log = |record: &ItemRecord| records.borrow_mut().push(record.clone());
        let result = self.run(name, ItemOptions { log: Some(&log), ..items }).unwrap();
        let mut records = records.into_inner();
        records.sort_by_key(|r| r.index);
        (result, records)
    }
}

fn at(data: &Path) -> ItemOptions<'_> {
    ItemOptions { data: Some(data), ..ItemOptions::default() }
}

fn gsm8k(n: usize) -> String {
    (0..n)
        .map(|i| {
            format!("{{\"question\": \"What is {i} + 1?\", \"answer\": \"<<{i}+1={0}>>{0}\\n#### {0}\"}}\n", i + 1)
        })
        .collect()
}

#[test]
fn gsm8k_runs_in_its_three_ways() {
    let f = Fixture::new();
    f.write("gsm8k/test.jsonl", &gsm8k(4));
    f.write("gsm8k/calib.jsonl", &gsm8k(9));
    for (name, first) in [
        ("gsm8k", "exact_match,strict-match"),
        ("gsm8k_cot", "exact_match,strict-match"),
        ("gsm8k_chat", "exact_match,last-number"),
    ] {
        let (result, records) = f.logged(name, at(f.dir.path()));
        assert_eq!(records.iter().map(|r| r.index).collect::<Vec<_>>(), [0, 1, 2, 3], "{name}");
        assert_eq!((records[2].task, records[2].gold.clone()), (name, Some("3".into())));
        for key in [first, "exact_match,flexible-extract"] {
            let mean = records.iter().map(|r| r.scores[key].as_f64().unwrap()).sum::<f64>() / 4.0;
            assert_eq!(result.details[key].as_f64().unwrap(), mean, "{name} {key}");
            assert!(result.details.contains_key(&key.replace("exact_match", "exact_match_stderr")));
            assert!(result.details[&key.replace("exact_match", "exact_match_interval95")].is_array());
        }
        assert_eq!(result.details[first], result.value);
        assert_eq!(result.details["items"], 4);
        // Fewer items are the same items.
        let (_, fewer) = f.logged(name, ItemOptions { limit: Some(2), ..at(f.dir.path()) });
        assert_eq!(fewer, records[..2]);
    }
    f.write("gsm8k/calib.jsonl", &gsm8k(4));
    let error = f.run("gsm8k", at(f.dir.path())).unwrap_err().to_string();
    assert!(error.contains("calib.jsonl") && error.contains("4 items"), "{error}");
}

#[test]
fn completions_are_scored_with_and_without_a_folder() {
    let f = Fixture::new();
    let path = f.write("gsm8k/test.jsonl", &gsm8k(5));
    let (result, records) = f.logged("gsm8k_nll", at(f.dir.path()));
    let (nll, tokens) = records.iter().fold((0.0, 0), |(nll, tokens), r| {
        (nll + r.scores["nll"].as_f64().unwrap(), tokens + r.scores["tokens"].as_u64().unwrap())
    });
    assert_eq!((result.tokens as u64, result.details["items"].as_u64()), (tokens, Some(5)));
    assert!((result.value - nll / tokens as f64).abs() < 1e-12);
    assert!(result.details["nll_stderr,none"].as_f64().unwrap() > 0.0);
    let interval = &result.details["nll_interval95,none"];
    assert!(interval[0].as_f64() < Some(result.value) && interval[1].as_f64() > Some(result.value), "{interval}");
    assert_eq!(records[0].gold, Some("1\n#### 1".into()), "without calculator marks");
    // Eight bytes and the end of the turn. The marks are scored where the file is taken as it is.
    assert_eq!(records[0].scores["tokens"], 9);
    let as_it_is = f.run("completion_nll", at(&path)).unwrap();
    assert!(as_it_is.tokens > result.tokens);
    let messages = f.write(
        "m.jsonl",
        r#"{"messages": [{"role": "user", "content": "What is 0 + 1?"}, {"role": "assistant", "content": "1\n#### 1"}]}"#,
    );
    let (_, same) = f.logged("completion_nll", at(&messages));
    assert_eq!(same[0].scores, records[0].scores);
}

#[test]
fn files_of_ones_own_are_judged_by_words_or_letters() {
    let f = Fixture::new();
    let words = f.write(
        "words.jsonl",
        "{\"prompt\": \"Say a\", \"answers\": [\"a\", \"b\"]}\n\n{\"question\": \"b?\", \"answer\": \"b\"}\n",
    );
    let (result, records) = f.logged("jsonl", at(&words));
    assert_eq!((records.len(), result.details["items"].as_u64()), (2, Some(2)));
    assert!(result.details.contains_key("f1,none") && result.details.contains_key("f1_stderr,none"));
    let (_, plain) = f.logged("jsonl", ItemOptions { plain: true, ..at(&words) });
    assert_ne!(plain[0].completion, records[0].completion, "a chat and a bare prompt are continued differently");
    let stop = [plain[0].completion.clone().unwrap().chars().take(1).collect::<String>()];
    let (_, stopped) = f.logged("jsonl", ItemOptions { plain: true, stop: &stop, ..at(&words) });
    assert_eq!(stopped[0].completion.as_deref(), Some(""));

    let letters = f.write("letters.jsonl", r#"{"question": "q", "options": ["x", "y"], "answer": "B"}"#);
    assert!(f.run("jsonl", at(&letters)).unwrap().details.contains_key("exact_match,letter"));
    let mixed = format!("{}{}", std::fs::read_to_string(&words).unwrap(), std::fs::read_to_string(&letters).unwrap());
    let mixed = f.write("mixed.jsonl", &mixed);
    assert!(f.run("jsonl", at(&mixed)).unwrap_err().to_string().contains("mixes"));
}

#[test]
fn spider_is_told_by_hardness() {
    let f = Fixture::new();
    std::fs::create_dir_all(f.dir.path().join("spider/database/zoo")).unwrap();
    let db = rusqlite::Connection::open(f.dir.path().join("spider/database/zoo/zoo.sqlite")).unwrap();
    db.execute_batch("CREATE TABLE a (x); INSERT INTO a VALUES (1)").unwrap();
    let tables = r#"[{"db_id": "zoo", "table_names_original": ["a"], "column_names_original": [[-1, "*"], [0, "x"]]}]"#;
    f.write("spider/tables.json", tables);
    let item = |query: &str| format!("{{\"db_id\": \"zoo\", \"question\": \"?\", \"query\": \"{query}\"}}\n");
    f.write("spider/test.jsonl", &[item("SELECT x FROM a"), item("SELECT max(x), min(x) FROM a")].concat());
    let (result, records) = f.logged("spider", at(f.dir.path()));
    assert_eq!(records.len(), 2);
    assert_eq!(result.value, 0.0, "a random model writes no SQL");
    assert_eq!(result.details["valid_sql,none"], 0.0);
    let interval = &result.details["by_hardness"]["easy"]["interval95"];
    assert!(interval[0] == 0.0 && interval[1].as_f64() > Some(0.5), "none of one item is no certain 0: {interval}");
    let classes: Vec<&String> = result.details["by_hardness"].as_object().unwrap().keys().collect();
    assert_eq!(classes, ["easy", "medium"]);
    f.write("spider/test.jsonl", &item("SELECT y FROM a"));
    let error = f.run("spider", at(f.dir.path())).unwrap_err();
    assert!(matches!(error, EvalError::Sql(_)), "{error}");
}

#[test]
fn what_is_missing_or_broken_is_named() {
    let f = Fixture::new();
    for name in
        ["gsm8k", "gsm8k_nll", "completion_nll", "spider", "jsonl", "wikitext", "rolling", "perplexity_llamacpp"]
    {
        let error = f.run(name, ItemOptions::default()).unwrap_err();
        assert!(matches!(error, EvalError::MissingInput { .. }), "{name}: {error}");
    }
    for (content, words) in [
        ("", "no items"),
        ("{", "line 1"),
        ("{\"prompt\": \"p\", \"answer\": \"a\"}\n[]", "line 2"),
        ("{\"answer\": \"a\"}", "line 1 (item 0)"),
    ] {
        let path = f.write("bad.jsonl", content);
        for name in ["jsonl", "completion_nll"] {
            let error = f.run(name, at(&path)).unwrap_err().to_string();
            assert!(error.contains("bad.jsonl") && error.contains(words), "{name}: {error}");
        }
    }
    let error = f.run("jsonl", at(&f.dir.path().join("gone.jsonl"))).unwrap_err().to_string();
    assert!(error.contains("gone.jsonl"), "{error}");
    f.write("gsm8k/test.jsonl", "{\"question\": 3}");
    let error = f.run("gsm8k_chat", at(f.dir.path())).unwrap_err().to_string();
    assert!(error.contains("line 1 (item 0) has no text 'question'"), "{error}");
}

#[test]
fn documents_roll() {
    let f = Fixture::new();
    let path = f.write("docs.jsonl", "{\"text\": \"One two.\"}\n{\"text\": \"Three\"}\n");
    let (result, records) = f.logged("rolling", at(&path));
    assert_eq!((records.len(), result.details["documents"].as_u64()), (2, Some(2)));
    let sum: f64 = records.iter().map(|r| r.scores["loglikelihood"].as_f64().unwrap()).sum();
    assert!((result.value - (-sum / 3.0).exp()).abs() < 1e-9 * result.value);
    assert_eq!(result.details["word_perplexity,none"], result.value);
}
