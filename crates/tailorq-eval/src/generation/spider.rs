//! Spider (Yu et al. 2018): a question about a database answered by a query, judged by running it.

use super::spider_prompt::{messages, read_schemas, statement};
use super::{Judgement, Prompt};
use crate::sql::{SqlError, SqlLimits, Verdict, database_files, execution_match};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The schemas and databases beside Spider's questions.
#[derive(Clone, Debug)]
pub(crate) struct Databases {
    schemas: HashMap<String, String>,
    directory: PathBuf,
}

impl Databases {
    /// Opens a folder with `tables.json` and `database/<db_id>/<db_id>.sqlite`.
    pub(crate) fn open(folder: &Path) -> Result<Self, SqlError> {
        let schemas = read_schemas(&folder.join("tables.json"))?;
        Ok(Databases { schemas, directory: folder.join("database") })
    }

    /// The conversation that asks for the query.
    pub(crate) fn prompt(&self, db_id: &str, question: &str) -> Result<Prompt, SqlError> {
        let path = self.directory.with_file_name("tables.json");
        let schema = (self.schemas.get(db_id))
            .ok_or_else(|| SqlError::File { path, problem: format!("has no database '{db_id}'") })?;
        Ok(Prompt::Chat(messages(schema, question)))
    }

    /// Runs the query of a completion and the gold one.
    pub(crate) fn judge(
        &self,
        db_id: &str,
        gold: &str,
        completion: &str,
        keep_distinct: bool,
        limits: SqlLimits,
    ) -> Result<Judgement, SqlError> {
        // The name comes from a file of items: it must not lead out of the folder.
        if db_id.is_empty() || db_id.contains(['/', '\\', '\0']) || db_id.starts_with('.') {
            let problem = format!("has no database '{db_id}', whose name is no file name");
            return Err(SqlError::File { path: self.directory.clone(), problem });
        }
        let files = database_files(&self.directory.join(db_id))?;
        let prediction = statement(completion);
        let verdict = execution_match(&files, gold, prediction, keep_distinct, limits)?;
        let score = |is: bool| f64::from(u8::from(is));
        let scores = vec![
            ("execution_accuracy,none", score(verdict == Verdict::Right)),
            ("valid_sql,none", score(!matches!(verdict, Verdict::Failed(_)))),
        ];
        Ok(Judgement { prediction: prediction.to_owned(), gold: gold.to_owned(), scores })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_are_judged_by_what_they_select() {
        let dir = tempfile::tempdir().unwrap();
        let zoo = dir.path().join("database/zoo");
        std::fs::create_dir_all(&zoo).unwrap();
        let db = rusqlite::Connection::open(zoo.join("zoo.sqlite")).unwrap();
        db.execute_batch("CREATE TABLE animal (id, name); INSERT INTO animal VALUES (1, 'Emu'), (2, 'Gnu')").unwrap();
        let tables = r#"[{"db_id": "zoo", "table_names_original": ["animal"],
            "column_names_original": [[-1, "*"], [0, "id"], [0, "name"]]}]"#;
        std::fs::write(dir.path().join("tables.json"), tables).unwrap();
        let databases = Databases::open(dir.path()).unwrap();
        let Prompt::Chat(turns) = databases.prompt("zoo", "Which?").unwrap() else { panic!("a conversation") };
        assert_eq!(turns[1].content, "# animal(id, name);\nWhich?\n### SQL:");
        assert!(databases.prompt("bar", "Which?").is_err());

        let judge = |completion| {
            let judged = databases.judge("zoo", "SELECT name FROM animal", completion, false, SqlLimits::default());
            judged.unwrap().scores.iter().map(|s| s.1).collect::<Vec<_>>()
        };
        assert_eq!(judge("```sql\nselect name from animal order by id desc;\n```"), [1.0, 1.0]);
        assert_eq!(judge("SELECT id FROM animal"), [0.0, 1.0]);
        assert_eq!(judge("I do not know."), [0.0, 0.0]);
        for bad in ["", "..", "zoo/../zoo", "bar"] {
            assert!(databases.judge(bad, "SELECT 1", "SELECT 1", false, SqlLimits::default()).is_err(), "{bad}");
        }
    }
}
