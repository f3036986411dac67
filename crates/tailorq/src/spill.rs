//! A temporary file for what a survey cannot keep in memory.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tailorq_model::Spill;
use tailorq_tensor::DType;

/// Elements that are converted to bytes at once.
const CHUNK: usize = 1 << 16;

/// Matrices in one file, exactly as they were (f32). The file is removed when this is dropped.
pub struct SpillFile {
    path: PathBuf,
    file: File,
    /// Offset and length (in elements) of each key.
    places: HashMap<usize, (u64, usize)>,
    end: u64,
}

impl SpillFile {
    /// Makes the file `tailorq-spill-PROCESS` in a directory, which must exist and have room.
    pub fn create(dir: &Path) -> io::Result<Self> {
        let path = dir.join(format!("tailorq-spill-{}", std::process::id()));
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).open(&path).map_err(|e| named(&path, &e))?;
        Ok(SpillFile { path, file, places: HashMap::new(), end: 0 })
    }
}

/// The error with the file's name.
fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}; choose a directory with room for it", path.display()))
}

impl Spill for SpillFile {
    fn put(&mut self, key: usize, values: &[f32]) -> io::Result<()> {
        // What replaces a matrix of the same length takes its place; anything else goes to the end.
        let at = match self.places.get(&key) {
            Some(&(at, len)) if len == values.len() => at,
            _ => self.end,
        };
        let write = |file: &mut File| {
            file.seek(SeekFrom::Start(at))?;
            values.chunks(CHUNK).try_for_each(|part| file.write_all(&DType::F32.encode(part)))
        };
        write(&mut self.file).map_err(|e| named(&self.path, &e))?;
        self.places.insert(key, (at, values.len()));
        self.end = self.end.max(at + 4 * values.len() as u64);
        Ok(())
    }

    fn get(&mut self, key: usize, values: &mut [f32]) -> io::Result<()> {
        let Some(&(at, len)) = self.places.get(&key) else {
            return Err(io::Error::other(format!("{}: nothing was put under {key}", self.path.display())));
        };
        assert_eq!(len, values.len(), "a matrix is read as long as it was written");
        let mut read = |file: &mut File| {
            file.seek(SeekFrom::Start(at))?;
            let mut bytes = vec![0; 4 * CHUNK.min(len)];
            values.chunks_mut(CHUNK).try_for_each(|part| {
                let bytes = &mut bytes[..4 * part.len()];
                file.read_exact(bytes)?;
                DType::F32.decode(bytes, part);
                Ok(())
            })
        };
        read(&mut self.file).map_err(|e: io::Error| named(&self.path, &e))
    }
}

impl Drop for SpillFile {
    fn drop(&mut self) {
        // Nobody could be told about an error from here.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_comes_back_bit_for_bit_and_the_file_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let mut spill = SpillFile::create(dir.path()).unwrap();
        let values = |seed: usize, len: usize| -> Vec<f32> { (0..len).map(|i| ((i * seed) as f32).sin()).collect() };
        let lengths = [3, CHUNK + 5, 0];
        for round in [1, 7] {
            for (key, &len) in lengths.iter().enumerate() {
                spill.put(key, &values(key + round, len)).unwrap();
            }
        }
        let size = std::fs::metadata(&spill.path).unwrap().len();
        assert_eq!(size, 4 * lengths.iter().sum::<usize>() as u64, "a second round takes the places of the first");
        for (key, &len) in lengths.iter().enumerate().rev() {
            let mut found = vec![f32::NAN; len];
            spill.get(key, &mut found).unwrap();
            assert_eq!(found, values(key + 7, len));
        }
        assert!(spill.get(9, &mut []).is_err());
        drop(spill);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let error = SpillFile::create(&dir.path().join("missing")).err().unwrap().to_string();
        assert!(error.contains("missing") && error.contains("choose a directory"), "{error}");
    }
}
