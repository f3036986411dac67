//! Execution accuracy of SQL, as the official test-suite script of Spider decides it (Zhong, Yu and Klein 2020, "Semantic
//! Evaluation for Text-to-SQL with Distilled Test Suites"; `--etype exec` without `--plug_value`).
//!
//! Both queries run on every `.sqlite` file of the database's directory; the prediction is right when all results agree:
//! as bags of rows, or as lists where the gold query has an `order by`, after some permutation of the columns.
//!
//! Where this departs from the script: a column permutation is searched exactly, while the script prunes its search by
//! random rows (which loses nothing, so the answers are the same); a query really stops after its time limit; and a
//! prediction that is no `SELECT` (or touches more than its database) fails, while the script would run it.

mod database;
mod equal;
mod hardness;
mod text;

pub use database::{SqlLimits, SqlValue, Table};
pub use hardness::Hardness;
pub use text::first_statement;

use database::{Database, QueryError};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// What keeps a prediction from being judged.
#[derive(Debug, Error)]
pub enum SqlError {
    /// A file or directory that cannot be read.
    #[error("{path}: {problem}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The gold query does not run.
    #[error("the gold query `{query}` fails on {path}: {problem}", path = path.display())]
    Gold {
        /// The query as it was run.
        query: String,
        /// The database.
        path: PathBuf,
        /// What SQLite says.
        problem: String,
    },
}

/// What became of a prediction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It gives what the gold query gives.
    Right,
    /// It gives something else.
    Different,
    /// It does not run; in SQLite's words, or in ours where a limit stopped it.
    Failed(String),
}

/// The `.sqlite` files of a database's directory, in the order of their names; at least one.
pub fn database_files(directory: &Path) -> Result<Vec<PathBuf>, SqlError> {
    let file = |problem: String| SqlError::File { path: directory.to_owned(), problem };
    let entries = std::fs::read_dir(directory).map_err(|e| file(format!("cannot be listed: {e}")))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| file(format!("cannot be listed: {e}")))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().contains(".sqlite")) {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(file("holds no .sqlite file".to_owned()));
    }
    Ok(files)
}

/// Judges `prediction` against `gold` on every file of `databases`.
///
/// Unless `keep_distinct`, every `distinct` is dropped from both, which is the script's default.
pub fn execution_match(
    databases: &[PathBuf],
    gold: &str,
    prediction: &str,
    keep_distinct: bool,
    limits: SqlLimits,
) -> Result<Verdict, SqlError> {
    // Dropping `distinct` leaves the script with the first statement; otherwise Python's driver refuses to run several.
    if keep_distinct && text::has_more_statements(prediction) {
        return Ok(Verdict::Failed("more than one statement".to_owned()));
    }
    let gold = text::prepare(gold, keep_distinct);
    let prediction = text::prepare(&prediction.replace("value", "1"), keep_distinct);
    let ordered = text::is_ordered(&gold);
    for path in databases {
        let database = Database::open(path, limits)?;
        let expected = database.query(&gold, limits.rows).map_err(|e| SqlError::Gold {
            query: gold.clone(),
            path: path.clone(),
            problem: e.to_string(),
        })?;
        // One row more than expected is enough to know that they differ.
        let verdict = match database.query(&prediction, expected.rows.len() + 1) {
            Ok(found) if equal::same_result(&expected, &found, ordered) => continue,
            Ok(_) | Err(QueryError::TooManyRows) => Verdict::Different,
            Err(error) => Verdict::Failed(error.to_string()),
        };
        return Ok(verdict);
    }
    Ok(Verdict::Right)
}
