//! Files that are whole or absent: written under a temporary name, synced, then renamed.

use crate::{FormatError, Result};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Bytes gathered before a write to the operating system.
const BUFFER: usize = 1 << 18;

/// A file that appears under its name only at [`AtomicFile::commit`]; dropped before, it leaves nothing.
///
/// The bytes go to `.NAME.partial` in the same directory. The name is fixed, so that what a killed process left behind
/// is reused by the next run rather than piling up; a file lock keeps two living processes apart.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    partial: PathBuf,
    /// `None` after commit.
    out: Option<BufWriter<File>>,
}

impl AtomicFile {
    /// Opens the temporary file beside `path`, whose directory must exist.
    pub fn create(path: &Path) -> Result<Self> {
        let Some(name) = path.file_name() else {
            return Err(FormatError::file(path, "is not the name of a file", "give the path of a file to write"));
        };
        let mut partial_name = std::ffi::OsString::from(".");
        partial_name.push(name);
        partial_name.push(".partial");
        let partial = path.with_file_name(partial_name);
        let file = open_locked(&partial)?;
        file.set_len(0).map_err(|e| FormatError::io(&partial, "truncate", e))?;
        Ok(AtomicFile { path: path.to_owned(), partial, out: Some(BufWriter::with_capacity(BUFFER, file)) })
    }

    /// The final path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Brings what was written so far to the disk, so that less is left for the end.
    pub fn sync(&mut self) -> Result<()> {
        let out = self.out.as_mut().expect("open until commit");
        out.flush().map_err(|e| FormatError::io(&self.path, "write", e))?;
        out.get_ref().sync_data().map_err(|e| FormatError::io(&self.path, "sync", e))
    }

    /// Makes the file durable and gives it its name; an existing file of that name is replaced in one step.
    pub fn commit(mut self) -> Result<()> {
        let out = self.out.as_mut().expect("commit consumes the only owner of the output");
        out.flush().map_err(|e| FormatError::io(&self.path, "write", e))?;
        out.get_ref().sync_all().map_err(|e| FormatError::io(&self.path, "sync", e))?;
        fs::rename(&self.partial, &self.path).map_err(|e| FormatError::io(&self.path, "rename into place", e))?;
        self.out = None;
        sync_directory(&self.path)
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.as_mut().expect("open until commit").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.as_mut().expect("open until commit").flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(out) = self.out.take() {
            // Nobody wants the buffered rest, and an error could not be reported from here. The name goes while the lock
            // is still held, so that no other process loses its own file.
            let (file, _) = out.into_parts();
            let _ = fs::remove_file(&self.partial);
            drop(file);
        }
    }
}

/// Writes a whole small file atomically.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes).map_err(|e| FormatError::io(path, "write", e))?;
    file.commit()
}

/// Opens and locks the temporary file.
fn open_locked(partial: &Path) -> Result<File> {
    // The owner of the lock may rename or remove the file between our open and our lock; then the name has gone on to
    // another file and we try again.
    for _ in 0..16 {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW);
        let file = options.open(partial).map_err(|e| FormatError::io(partial, "create", e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(FormatError::file(
                    partial,
                    "is being written by another process",
                    "wait for that process to end or choose another output",
                ));
            }
            // Some network file systems have no locks; the atomic rename still holds there.
            Err(TryLockError::Error(_)) => return Ok(file),
        }
        if still_named(&file, partial) {
            return Ok(file);
        }
    }
    Err(FormatError::file(partial, "changes while it is opened", "let only one process write to this directory"))
}

/// Whether `path` still is the open file.
#[cfg(unix)]
fn still_named(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => open.dev() == named.dev() && open.ino() == named.ino(),
        _ => false,
    }
}

#[cfg(not(unix))]
fn still_named(_file: &File, _path: &Path) -> bool {
    // Elsewhere an open file can be neither renamed nor removed.
    true
}

/// Makes the entry of `path` in its directory durable.
fn sync_directory(path: &Path) -> Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let handle = File::open(directory).map_err(|e| FormatError::io(directory, "open", e))?;
    match handle.sync_all() {
        // File systems that cannot sync a directory say so with EINVAL; there is nothing more to be done.
        Err(e) if e.kind() != io::ErrorKind::InvalidInput => Err(FormatError::io(directory, "sync", e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_appears_whole_at_commit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"half").unwrap();
        assert!(!path.exists());
        file.write_all(b" and whole").unwrap();
        file.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"half and whole");
        assert_eq!(names(dir.path()), ["a.bin"]);
    }

    #[test]
    fn a_dropped_file_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        write_atomic(&path, b"old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(&vec![7; 3 * BUFFER]).unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["a.bin"]);
    }

    #[test]
    fn leftovers_of_a_killed_process_are_reused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".a.bin.partial"), vec![1; 100]).unwrap();
        write_atomic(&dir.path().join("a.bin"), b"new").unwrap();
        assert_eq!(fs::read(dir.path().join("a.bin")).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["a.bin"]);
    }

    #[test]
    fn two_writers_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        let first = AtomicFile::create(&path).unwrap();
        let error = AtomicFile::create(&path).unwrap_err().to_string();
        assert!(error.contains("another process"), "{error}");
        drop(first);
        write_atomic(&path, b"x").unwrap();
    }

    #[test]
    fn a_missing_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = write_atomic(&dir.path().join("no/such/a.bin"), b"x").unwrap_err().to_string();
        assert!(error.contains("no/such") && error.contains("check the path"), "{error}");
        assert!(AtomicFile::create(Path::new("/")).is_err());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_named_with_its_remedy() {
        // /dev/full refuses every write with ENOSPC, as a full disk does.
        let mut full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let cause = full.write_all(b"x").unwrap_err();
        let error = FormatError::io(Path::new("out/model.safetensors"), "write", cause).to_string();
        assert!(error.contains("out/model.safetensors") && error.contains("free some disk space"), "{error}");
    }

    #[test]
    #[cfg(unix)]
    fn a_planted_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, b"precious").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join(".a.bin.partial")).unwrap();
        assert!(write_atomic(&dir.path().join("a.bin"), b"x").is_err());
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
    }
}
