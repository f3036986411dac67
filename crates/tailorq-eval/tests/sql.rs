//! Execution accuracy on small databases, hostile queries, and the gold queries of a real test set against themselves.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may stop where it stands, and says why it was skipped"
)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tailorq_eval::sql::{Hardness, SqlError, SqlLimits, Verdict, database_files, execution_match};

/// A directory with one database of a few rows. Its name needs escaping in a URI.
struct Fixture {
    dir: tempfile::TempDir,
    files: Vec<PathBuf>,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("a b%41?#").tempdir().unwrap();
        write_database(
            &dir.path().join("town.sqlite"),
            "CREATE TABLE town (id INTEGER PRIMARY KEY, name TEXT, area REAL, people INTEGER);
             INSERT INTO town VALUES (1, 'Aa', 2.0, 20), (2, 'Bb', 1.5, 20), (3, 'Cc', 4.0, NULL), (4, 'Aa', 1.0, 7);
             CREATE VIEW big AS SELECT * FROM town WHERE people > 10;",
        );
        let files = database_files(dir.path()).unwrap();
        Fixture { dir, files }
    }

    fn judge(&self, gold: &str, prediction: &str) -> Verdict {
        execution_match(&self.files, gold, prediction, false, SqlLimits::default()).unwrap()
    }

    fn is_right(&self, gold: &str, prediction: &str) -> bool {
        self.judge(gold, prediction) == Verdict::Right
    }
}

fn write_database(path: &Path, sql: &str) {
    rusqlite::Connection::open(path).unwrap().execute_batch(sql).unwrap();
}

#[test]
fn results_decide_and_not_the_words() {
    let f = Fixture::new();
    assert!(f.is_right("SELECT name FROM town WHERE people > 10", "select T1.name from big as T1;"));
    assert!(f.is_right("SELECT name, area FROM town", "SELECT area, name FROM town ORDER BY id DESC"));
    assert!(f.is_right("SELECT count(*) FROM town", "SELECT 4.0"));
    assert!(!f.is_right("SELECT count(*) FROM town", "SELECT '4'"));
    assert!(f.is_right("SELECT name FROM town ORDER BY area", "SELECT name FROM town order by area asc"));
    assert!(!f.is_right("SELECT id FROM town ORDER BY area", "SELECT id FROM town ORDER BY id"));
    assert!(f.is_right("SELECT id FROM town", "SELECT id FROM town ORDER BY area"));
    assert!(f.is_right(
        r#"SELECT id FROM town WHERE name = "Aa""#,
        "SELECT id FROM town WHERE name > = 'Aa' AND id IN (1, 4)"
    ));
    assert!(
        f.is_right("SELECT id FROM town WHERE name = 'x'", "SELECT name, area FROM town WHERE 1 = 2"),
        "both empty"
    );
}

#[test]
fn distinct_is_dropped_unless_it_is_kept() {
    let f = Fixture::new();
    assert!(f.is_right("SELECT DISTINCT name FROM town", "SELECT name FROM town"));
    let kept = execution_match(
        &f.files,
        "SELECT DISTINCT name FROM town",
        "SELECT name FROM town",
        true,
        SqlLimits::default(),
    );
    assert_eq!(kept.unwrap(), Verdict::Different);
}

#[test]
fn every_database_of_the_directory_has_to_agree() {
    let f = Fixture::new();
    let (gold, prediction) = ("SELECT id FROM town WHERE area < 2", "SELECT id FROM town WHERE area <= 1.5");
    assert!(f.is_right(gold, prediction));
    write_database(
        &f.dir.path().join("town2.sqlite"),
        "CREATE TABLE town (id, name, area, people); INSERT INTO town VALUES (1, 'x', 1.7, 3);",
    );
    let files = database_files(f.dir.path()).unwrap();
    assert_eq!(files.len(), 2);
    assert_eq!(execution_match(&files, gold, prediction, false, SqlLimits::default()).unwrap(), Verdict::Different);
    assert!(matches!(database_files(&f.dir.path().join("none")), Err(SqlError::File { .. })));
}

#[test]
fn text_that_is_no_utf8_loses_the_bytes_that_are_none() {
    let f = Fixture::new();
    assert!(f.is_right("SELECT 'ab'", "SELECT CAST(x'61ff62' AS TEXT)"));
}

#[test]
fn a_gold_query_that_fails_and_files_that_are_no_databases_are_errors() {
    let f = Fixture::new();
    let fails = execution_match(&f.files, "SELECT nothing FROM town", "SELECT 1", false, SqlLimits::default());
    assert!(matches!(fails, Err(SqlError::Gold { .. })), "{fails:?}");
    let path = f.dir.path().join("bad.sqlite");
    std::fs::write(&path, "no database at all, but long enough for a header, which has a hundred bytes".repeat(2))
        .unwrap();
    let fails = execution_match(&[path], "SELECT 1", "SELECT 1", false, SqlLimits::default());
    assert!(matches!(fails, Err(SqlError::File { .. })), "{fails:?}");
    let missing =
        execution_match(&[f.dir.path().join("x.sqlite")], "SELECT 1", "SELECT 1", false, SqlLimits::default());
    assert!(matches!(missing, Err(SqlError::File { .. })));
}

/// Everything in a directory: names, sizes and bytes.
fn snapshot(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = (std::fs::read_dir(dir).unwrap())
        .map(|e| e.unwrap().path())
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&p).unwrap()))
        .collect();
    all.sort();
    all
}

#[test]
fn a_query_that_is_more_than_a_query_fails_and_changes_nothing() {
    let f = Fixture::new();
    let before = snapshot(f.dir.path());
    let elsewhere = f.dir.path().join("new.db");
    let attach = format!("ATTACH DATABASE '{}' AS other", elsewhere.display());
    let vacuum = format!("VACUUM INTO '{}'", elsewhere.display());
    let hostile = [
        "",
        ";",
        "-- nothing",
        "not sql",
        "DROP TABLE town",
        "DELETE FROM town",
        "UPDATE town SET name = 'x'",
        "INSERT INTO town VALUES (9, 'x', 1, 1)",
        "INSERT INTO town VALUES (9, 'x', 1, 1) RETURNING id",
        "WITH x AS (SELECT 1) DELETE FROM town",
        "CREATE TABLE x (y)",
        "CREATE TEMP TABLE x (y)",
        "CREATE TEMP VIEW x AS SELECT 1",
        "CREATE VIRTUAL TABLE x USING fts5(y)",
        "ALTER TABLE town RENAME TO x",
        "REINDEX",
        "ANALYZE",
        "VACUUM",
        &vacuum,
        &attach,
        "DETACH main",
        "BEGIN",
        "SAVEPOINT a",
        "PRAGMA query_only = OFF",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA writable_schema = ON",
        "PRAGMA hard_heap_limit = 0",
        "SELECT load_extension('x.so')",
        "SELECT fts3_tokenizer('simple', x'0000000000000000')",
        "SELECT * FROM pragma_hard_heap_limit",
        "SELECT zeroblob(1000000000)",
        "SELECT randomblob(1000000000)",
        "SELECT hex(zeroblob(1000000))",
    ];
    for query in hostile {
        let verdict = f.judge("SELECT count(*) FROM town", query);
        assert!(matches!(verdict, Verdict::Failed(_)), "{query}: {verdict:?}");
    }
    // Only the first statement runs.
    assert!(f.is_right("SELECT 1", "SELECT 1; DROP TABLE town"));
    assert_eq!(snapshot(f.dir.path()), before);
    assert!(f.is_right("SELECT count(*) FROM town", "SELECT 4"));
}

#[test]
fn a_query_that_takes_all_there_is_is_stopped() {
    let f = Fixture::new();
    let limits = SqlLimits { time: Duration::from_millis(300), ..SqlLimits::default() };
    let nested = format!("SELECT {}1{}", "~(".repeat(5000), ")".repeat(5000));
    let long_join = format!("SELECT count(*) FROM town {}", ", town".repeat(40).replacen(", town", ", town AS t0", 1));
    let cross = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) SELECT count(*) FROM n a, n b, n c";
    let hostile = [
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT * FROM n ORDER BY i DESC",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT group_concat(hex(randomblob(100))) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT hex(randomblob(50000)) AS x FROM n ORDER BY x",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT json_group_array(zeroblob(60000)) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) \
         SELECT sum(instr(hex(zeroblob(60000)), hex(zeroblob(30000)) || 'x')) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) \
         SELECT sum(hex(zeroblob(60000)) LIKE '%0%0%0%0%0%0%0%0%0%0%0%0%0%0%0%0%1') FROM n",
        cross,
        &nested,
        &long_join,
    ];
    for query in hostile {
        let started = Instant::now();
        let verdict = execution_match(&f.files, "SELECT 1", query, false, limits).unwrap();
        let took = started.elapsed();
        assert!(matches!(verdict, Verdict::Failed(_)), "{query:.200}: {verdict:?}");
        assert!(took < Duration::from_secs(8), "{query:.200} took {took:?}");
    }
    // A result with more rows than the gold one is left after the first that is too many.
    let endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n";
    assert_eq!(f.judge("SELECT 1", endless), Verdict::Different);
}

/// The gold queries of Spider's dev set against themselves, and each against the query of the item before it.
#[test]
fn gold_queries_are_right() {
    let Some(data) = std::env::var_os("TAILORQ_TEST_DATA").filter(|v| !v.is_empty()) else {
        println!("skipped: TAILORQ_TEST_DATA is not set");
        return;
    };
    let data = Path::new(&data).join("spider");
    let full = std::env::var_os("TAILORQ_TEST_FULL").is_some();
    let items = std::fs::read_to_string(data.join("test.jsonl")).unwrap();
    let items: Vec<serde_json::Value> = items.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let (mut n, mut n_different) = (0, 0);
    for (i, item) in items.iter().enumerate().take(if full { usize::MAX } else { 60 }) {
        let (db, query) = (item["db_id"].as_str().unwrap(), item["query"].as_str().unwrap());
        let files = database_files(&data.join("database").join(db)).unwrap();
        for keep_distinct in [false, true] {
            let verdict = execution_match(&files, query, query, keep_distinct, SqlLimits::default()).unwrap();
            assert_eq!(verdict, Verdict::Right, "item {i}: {query}");
        }
        let before = &items[i.saturating_sub(1)];
        if before["db_id"] == item["db_id"] && before["query"] != item["query"] {
            let other = before["query"].as_str().unwrap();
            n_different += usize::from(
                execution_match(&files, query, other, false, SqlLimits::default()).unwrap() != Verdict::Right,
            );
        }
        n += 1;
    }
    println!("{n} gold queries are right against themselves; {n_different} neighbours are not");
    assert!(n > 50 && n_different > 0);
}

/// Numbers of each class as Spider's own `evaluation.py` gives them for the same queries (no query differs).
#[test]
fn hardness_is_spiders() {
    let Some(data) = std::env::var_os("TAILORQ_TEST_DATA").filter(|v| !v.is_empty()) else {
        println!("skipped: TAILORQ_TEST_DATA is not set");
        return;
    };
    for (file, expected) in [("test", [166, 318, 126, 132]), ("calib", [112, 204, 118, 78])] {
        let items = std::fs::read_to_string(Path::new(&data).join(format!("spider/{file}.jsonl"))).unwrap();
        let of = |line: &str| {
            let item: serde_json::Value = serde_json::from_str(line).unwrap();
            Hardness::of(item["query"].as_str().unwrap())
        };
        let classes: Vec<Hardness> = items.lines().map(of).collect();
        let counts = Hardness::ALL.map(|class| classes.iter().filter(|c| **c == class).count());
        assert_eq!(counts, expected, "{file}");
    }
}
