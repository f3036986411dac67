//! The bound on SQLite's heap, in a process of its own because the heap is one for the process.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::time::Duration;
use tailorq_eval::sql::{SqlLimits, Verdict, execution_match};

#[test]
fn a_query_that_wants_too_much_memory_fails_and_the_next_one_runs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.sqlite");
    rusqlite::Connection::open(&path).unwrap().execute_batch("CREATE TABLE a (x); INSERT INTO a VALUES (7)").unwrap();
    let limits = SqlLimits { time: Duration::from_secs(60), memory: 16 << 20, ..SqlLimits::default() };
    let files = [path];
    // A gigabyte to be sorted, and as much in a table of groups.
    let rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)";
    for query in [
        format!("{rows} SELECT hex(randomblob(25000)) AS x FROM n ORDER BY x"),
        format!("{rows} SELECT count(*) FROM n GROUP BY hex(randomblob(25000))"),
    ] {
        let verdict = execution_match(&files, "SELECT x FROM a", &query, false, limits).unwrap();
        assert!(matches!(&verdict, Verdict::Failed(why) if why.contains("memory")), "{query}: {verdict:?}");
        let right = execution_match(&files, "SELECT x FROM a", "SELECT 7.0", false, limits).unwrap();
        assert_eq!(right, Verdict::Right);
    }
}
