//! Spider's questions as prompts, and the query in an answer.
//!
//! The prompt follows the one of TaCQ (Xiao et al. 2025): the tables of the database as comments, the question, and a cue.

use crate::sql::SqlError;
use serde::Deserialize;
use std::collections::HashMap;
use std::path::Path;
use tailorq_model::ChatMessage;

/// What the system message says.
const INSTRUCTION: &str = "Answer with one SQLite query only, without any explanation.";

/// A database of `tables.json`.
#[derive(Deserialize)]
struct Entry {
    db_id: String,
    table_names_original: Vec<String>,
    /// `[table index, column name]`; the first is `[-1, "*"]`.
    column_names_original: Vec<(i64, String)>,
}

/// The tables of every database of a `tables.json`: `db_id` to lines `# table(column, column);`.
pub(super) fn read_schemas(path: &Path) -> Result<HashMap<String, String>, SqlError> {
    let fail = |problem: String| SqlError::File { path: path.to_owned(), problem };
    let text = std::fs::read(path).map_err(|e| fail(format!("cannot be read: {e}")))?;
    let entries: Vec<Entry> =
        serde_json::from_slice(&text).map_err(|e| fail(format!("is no list of Spider's schemas: {e}")))?;
    Ok(entries.into_iter().map(|entry| (entry.db_id.clone(), entry.lines())).collect())
}

impl Entry {
    fn lines(&self) -> String {
        let line = |(table_idx, table): (i64, &String)| {
            let columns = self.column_names_original.iter().filter(|(of, _)| *of == table_idx);
            let names: Vec<&str> = columns.map(|(_, name)| name.as_str()).collect();
            format!("# {table}({});\n", names.join(", "))
        };
        (0..).zip(&self.table_names_original).map(line).collect()
    }
}

/// The conversation that asks for the query.
pub(super) fn messages(schema: &str, question: &str) -> Vec<ChatMessage> {
    let turn = |role: &str, content: String| ChatMessage { role: role.to_owned(), content };
    vec![turn("system", INSTRUCTION.to_owned()), turn("user", format!("{schema}{}\n### SQL:", question.trim()))]
}

/// The query of an answer: of the first fenced block if there is one, up to the first `;`.
pub(super) fn statement(answer: &str) -> &str {
    let mut text = answer;
    if let Some((_, block)) = text.split_once("```") {
        text = block.split_once("```").map_or(block, |(inside, _)| inside);
        // The word behind the fence names the language.
        let first = text.split_whitespace().next().unwrap_or_default();
        if ["sql", "sqlite", "sqlite3"].iter().any(|name| first.eq_ignore_ascii_case(name)) {
            text = text.trim_start().get(first.len()..).unwrap_or_default();
        }
    }
    text.split(';').next().unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_is_a_line_a_table() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tables.json");
        let json = r#"[{"db_id": "zoo", "table_names_original": ["Animal", "Keeper of"], "other": 1,
            "column_names_original": [[-1, "*"], [0, "id"], [0, "Name"], [1, "animal id"]]}]"#;
        std::fs::write(&path, json).unwrap();
        let schemas = read_schemas(&path).unwrap();
        assert_eq!(schemas["zoo"], "# Animal(id, Name);\n# Keeper of(animal id);\n");
        let asked = messages(&schemas["zoo"], " How many? ");
        assert_eq!(asked[1].content, "# Animal(id, Name);\n# Keeper of(animal id);\nHow many?\n### SQL:");
        std::fs::write(&path, "{}").unwrap();
        assert!(matches!(read_schemas(&path), Err(SqlError::File { .. })));
    }

    #[test]
    fn the_query_is_cut_out_of_the_answer() {
        for (answer, expected) in [
            (" SELECT 1; SELECT 2", "SELECT 1"),
            ("SELECT a\nFROM b", "SELECT a\nFROM b"),
            ("```sql\nSELECT 1;\n```\nThis query", "SELECT 1"),
            ("Here it is:\n```\nSELECT 1\n```", "SELECT 1"),
            ("```SQLite SELECT 1", "SELECT 1"),
            ("", ""),
            ("```", ""),
            ("```sql", ""),
        ] {
            assert_eq!(statement(answer), expected, "{answer}");
        }
    }
}
