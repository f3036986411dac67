//! Errors that name the file, the tensor and the remedy.

use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Remedy for a file whose bytes contradict themselves.
pub(crate) const DAMAGED: &str = "the file is damaged or incomplete: fetch or write it again";

/// Why a file cannot be read or written.
#[derive(Debug, Error)]
pub enum FormatError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {cause}{}", path.display(), io_remedy(cause))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried: `open`, `map`, `write`, ...
        action: &'static str,
        /// The refusal.
        cause: io::Error,
    },
    /// The file as a whole is wrong.
    #[error("{}: {problem}; {remedy}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What to do about it.
        remedy: String,
    },
    /// One tensor is wrong, missing, or of an unexpected type or shape.
    #[error("{}: tensor '{tensor}' {problem}; {remedy}", path.display())]
    Tensor {
        /// The file or directory.
        path: PathBuf,
        /// The tensor, control characters escaped.
        tensor: String,
        /// What is wrong, as the rest of a sentence about the tensor.
        problem: String,
        /// What to do about it.
        remedy: String,
    },
    /// A metadata key is missing or has another type.
    #[error("{}: metadata key '{key}' {problem}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key, control characters escaped.
        key: String,
        /// What is wrong, as the rest of a sentence about the key.
        problem: String,
    },
}

impl FormatError {
    /// An error of the operating system at `path`.
    pub fn io(path: &Path, action: &'static str, cause: io::Error) -> Self {
        FormatError::Io { path: path.to_owned(), action, cause }
    }

    /// An error of the whole file.
    pub fn file(path: &Path, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        FormatError::File { path: path.to_owned(), problem: problem.into(), remedy: remedy.into() }
    }

    /// An error of the whole file whose remedy is another copy of it.
    pub fn damaged(path: &Path, problem: impl Into<String>) -> Self {
        FormatError::file(path, problem, DAMAGED)
    }

    /// An error of one tensor.
    pub fn tensor(path: &Path, tensor: &str, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        FormatError::Tensor {
            path: path.to_owned(),
            tensor: printable(tensor),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }

    /// An error of one metadata key.
    pub fn key(path: &Path, key: &str, problem: impl Into<String>) -> Self {
        FormatError::Key { path: path.to_owned(), key: printable(key), problem: problem.into() }
    }
}

/// A name from a file as a message may show it: control characters escaped, at most 120 characters.
pub(crate) fn printable(name: &str) -> String {
    const MOST: usize = 120;
    let mut shown: String = name.chars().take(MOST).flat_map(char::escape_debug).collect();
    if name.chars().nth(MOST).is_some() {
        shown.push('…');
    }
    shown
}

/// What the user can do about an error of the operating system, as the end of a message.
fn io_remedy(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some disk space or choose a directory on another disk"
        }
        io::ErrorKind::ReadOnlyFilesystem => "; the file system is read-only: choose a directory that can be written",
        io::ErrorKind::PermissionDenied => "; check the permissions of the file and of its directory",
        io::ErrorKind::NotFound => "; check the path",
        io::ErrorKind::FileTooLarge => "; the file system or a resource limit allows no file of this size",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_path_and_the_remedy() {
        let full = FormatError::io(Path::new("/out/model"), "write", io::Error::from(io::ErrorKind::StorageFull));
        let text = full.to_string();
        assert!(text.contains("/out/model") && text.contains("free some disk space"), "{text}");
        let read_only = FormatError::io(Path::new("x"), "open", io::Error::from(io::ErrorKind::ReadOnlyFilesystem));
        assert!(read_only.to_string().contains("read-only"), "{read_only}");
    }

    #[test]
    fn hostile_names_are_escaped_and_cut() {
        assert_eq!(printable("a\u{1b}[31m\n"), "a\\u{1b}[31m\\n");
        assert_eq!(printable(&"x".repeat(500)).chars().count(), 121);
    }
}
