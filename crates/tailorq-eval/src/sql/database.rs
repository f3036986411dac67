//! A SQLite database that a stranger's query may read and nothing else.
//!
//! Several fences, each of which would do for most attacks: the file is opened read-only and immutable, `query_only` is on,
//! an authorizer lets only reading statements be prepared, SQLite's own limits bound statements and values, its heap is
//! bounded, and a progress handler stops what takes too long.

use super::SqlError;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::limits::Limit;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags};
use std::ffi::c_int;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use thiserror::Error;

/// What a query may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SqlLimits {
    /// Time for one query.
    pub time: Duration,
    /// Most rows of a result.
    pub rows: usize,
    /// Most bytes of a result's values.
    pub bytes: usize,
    /// Most bytes of SQLite's heap. It is one heap for the whole process, and the lowest bound so far holds.
    pub memory: i64,
}

impl Default for SqlLimits {
    /// 10 seconds, a million rows, 64 MiB of values, 256 MiB of heap. The script gives 60 seconds, which it does not enforce.
    fn default() -> Self {
        SqlLimits { time: Duration::from_secs(10), rows: 1_000_000, bytes: 64 << 20, memory: 256 << 20 }
    }
}

/// A value as SQLite gives it.
#[derive(Clone, Debug, PartialEq)]
pub enum SqlValue {
    /// `NULL`.
    Null,
    /// 64 bits.
    Integer(i64),
    /// Never NaN, which SQLite makes `NULL`.
    Real(f64),
    /// Bytes that are no UTF-8 are left out, as the script does.
    Text(String),
    /// Any bytes.
    Blob(Vec<u8>),
}

/// A result.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// Number of columns, known even when there is no row.
    pub columns: usize,
    /// Rows of that many values.
    pub rows: Vec<Vec<SqlValue>>,
}

/// Why a query gave no result.
#[derive(Debug, Error)]
pub(super) enum QueryError {
    #[error("{0}")]
    Sqlite(String),
    #[error("no result within the time limit of {0:?}")]
    Time(Duration),
    #[error("more rows than allowed")]
    TooManyRows,
    #[error("a result of more than {0} bytes")]
    TooManyBytes(usize),
    #[error("a statement without a result")]
    NoResult,
}

/// Virtual machine instructions between two looks at the clock. Searching the longest string for one half as long, in the
/// worst case, takes a good part of a second in a single instruction, so it should not be many.
const LOOK: c_int = 20;

/// Bounds of SQLite itself, beyond any honest query.
const BOUNDS: [(Limit, i32); 8] = [
    (Limit::SQLITE_LIMIT_LENGTH, 1 << 17),
    (Limit::SQLITE_LIMIT_SQL_LENGTH, 1 << 17),
    (Limit::SQLITE_LIMIT_COLUMN, 500),
    (Limit::SQLITE_LIMIT_EXPR_DEPTH, 200),
    (Limit::SQLITE_LIMIT_COMPOUND_SELECT, 100),
    (Limit::SQLITE_LIMIT_ATTACHED, 0),
    (Limit::SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 500),
    (Limit::SQLITE_LIMIT_WORKER_THREADS, 0),
];

/// An open database.
pub(super) struct Database {
    connection: Connection,
    limits: SqlLimits,
    /// What the deadline counts from.
    opened: Instant,
    /// When the running query has to be done, in nanoseconds since `opened`.
    deadline: Arc<AtomicU64>,
}

impl Database {
    /// Opens a file for reading.
    pub(super) fn open(path: &Path, limits: SqlLimits) -> Result<Self, SqlError> {
        let connection = connect(path, limits)
            .map_err(|e| SqlError::File { path: path.to_owned(), problem: format!("cannot be opened: {e}") })?;
        let (opened, deadline) = (Instant::now(), Arc::new(AtomicU64::new(u64::MAX)));
        let shared = Arc::clone(&deadline);
        let is_late = move || nanoseconds(opened.elapsed()) > shared.load(Ordering::Relaxed);
        connection.progress_handler(LOOK, Some(is_late));
        Ok(Database { connection, limits, opened, deadline })
    }

    /// The result of one query, or why there is none. More rows than `max_rows` are [`QueryError::TooManyRows`].
    pub(super) fn query(&self, sql: &str, max_rows: usize) -> Result<Table, QueryError> {
        let deadline = nanoseconds(self.opened.elapsed().saturating_add(self.limits.time));
        self.deadline.store(deadline, Ordering::Relaxed);
        self.read(sql, max_rows)
    }

    fn read(&self, sql: &str, max_rows: usize) -> Result<Table, QueryError> {
        let mut statement = self.connection.prepare(sql).map_err(|e| self.failure(&e))?;
        let columns = statement.column_count();
        if columns == 0 {
            return Err(QueryError::NoResult);
        }
        let mut cursor = statement.query([]).map_err(|e| self.failure(&e))?;
        let (mut rows, mut bytes) = (Vec::new(), 0);
        while let Some(row) = cursor.next().map_err(|e| self.failure(&e))? {
            if rows.len() == max_rows {
                return Err(QueryError::TooManyRows);
            }
            let mut values = Vec::with_capacity(columns);
            for column in 0..columns {
                let value = value(row.get_ref(column).map_err(|e| self.failure(&e))?);
                bytes += size(&value);
                values.push(value);
            }
            if bytes > self.limits.bytes {
                return Err(QueryError::TooManyBytes(self.limits.bytes));
            }
            rows.push(values);
        }
        Ok(Table { columns, rows })
    }

    fn failure(&self, error: &rusqlite::Error) -> QueryError {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::OperationInterrupted) => QueryError::Time(self.limits.time),
            _ => QueryError::Sqlite(error.to_string()),
        }
    }
}

/// More than 584 years are as good as for ever.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn connect(path: &Path, limits: SqlLimits) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(uri(path), flags)?;
    for (limit, value) in BOUNDS {
        connection.set_limit(limit, value)?;
    }
    // Intermediate results stay in memory, where they are counted, and never become files.
    let settings = format!(
        "PRAGMA query_only = ON; PRAGMA temp_store = MEMORY; PRAGMA trusted_schema = OFF; PRAGMA hard_heap_limit = {};",
        limits.memory
    );
    connection.execute_batch(&settings)?;
    // Reading the schema now tells a file that is no database from a query that fails.
    connection.query_row("SELECT count(*) FROM sqlite_master", [], |_| Ok(()))?;
    connection.authorizer(Some(only_reading));
    Ok(connection)
}

/// What may stand in a statement. Anything that writes, attaches, sets or loads is refused when it is prepared.
fn only_reading(context: AuthContext<'_>) -> Authorization {
    match context.action {
        AuthAction::Select | AuthAction::Read { .. } | AuthAction::Recursive => Authorization::Allow,
        AuthAction::Function { function_name } => {
            let name = function_name.to_ascii_lowercase();
            let reaches_out = ["load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"];
            if reaches_out.contains(&name.as_str()) { Authorization::Deny } else { Authorization::Allow }
        }
        _ => Authorization::Deny,
    }
}

/// The path as a URI that promises SQLite an unchanging file: no locks, no journal, nothing beside the file.
fn uri(path: &Path) -> String {
    let mut uri = String::from("file:");
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'_' | b'-' | b'~' => uri.push(char::from(*byte)),
            _ => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    uri + "?mode=ro&immutable=1"
}

fn value(value: ValueRef<'_>) -> SqlValue {
    match value {
        ValueRef::Null => SqlValue::Null,
        ValueRef::Integer(i) => SqlValue::Integer(i),
        ValueRef::Real(r) => SqlValue::Real(r),
        ValueRef::Text(bytes) => SqlValue::Text(bytes.utf8_chunks().map(|chunk| chunk.valid()).collect()),
        ValueRef::Blob(bytes) => SqlValue::Blob(bytes.to_vec()),
    }
}

fn size(value: &SqlValue) -> usize {
    size_of::<SqlValue>()
        + match value {
            SqlValue::Text(text) => text.len(),
            SqlValue::Blob(bytes) => bytes.len(),
            _ => 0,
        }
}
