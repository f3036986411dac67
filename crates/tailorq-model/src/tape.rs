//! What the forward pass keeps for the backward pass: matrices in memory up to a limit, the rest spilled.

use std::collections::HashMap;
use std::io;
use tailorq_tensor::Matrix;
use thiserror::Error;

/// A place for matrices that do not fit in memory, given by whoever may open files.
pub trait Spill {
    /// Keeps `values` under `key`.
    fn put(&mut self, key: usize, values: &[f32]) -> io::Result<()>;
    /// Reads back what was put under `key`, of the same length; it may be read again.
    fn get(&mut self, key: usize, values: &mut [f32]) -> io::Result<()>;
}

/// A matrix could not be kept or found again.
#[derive(Debug, Error)]
pub enum TapeError {
    /// More than the limit and no place to spill to.
    #[error(
        "block inputs need more than the {limit} bytes allowed for them: raise the limit, give a directory to spill to, or use fewer tokens"
    )]
    Full {
        /// The limit.
        limit: usize,
    },
    /// Writing or reading failed.
    #[error("block inputs could not be spilled or read back: {0}")]
    Io(#[from] io::Error),
}

enum Kept {
    Memory(Matrix),
    Spilled { rows: usize, cols: usize },
}

/// Matrices by key.
pub struct Tape<'s> {
    limit: usize,
    held: usize,
    kept: HashMap<usize, Kept>,
    spill: Option<&'s mut dyn Spill>,
}

impl<'s> Tape<'s> {
    /// A tape that holds up to `limit` bytes in memory.
    pub fn new(limit: usize, spill: Option<&'s mut dyn Spill>) -> Self {
        Tape { limit, held: 0, kept: HashMap::new(), spill }
    }

    /// Keeps a copy of `m` under `key`, in place of what was there.
    pub fn put(&mut self, key: usize, m: &Matrix) -> Result<(), TapeError> {
        self.forget(key);
        let bytes = m.bytes();
        let kept = if bytes <= self.limit - self.held {
            self.held += bytes;
            Kept::Memory(m.clone())
        } else if let Some(spill) = &mut self.spill {
            spill.put(key, m.data())?;
            Kept::Spilled { rows: m.rows(), cols: m.cols() }
        } else {
            return Err(TapeError::Full { limit: self.limit });
        };
        self.kept.insert(key, kept);
        Ok(())
    }

    /// Takes back the matrix under `key`, which must have been put.
    pub fn take(&mut self, key: usize) -> Result<Matrix, TapeError> {
        match self.kept.remove(&key).expect("a matrix is taken once, after it was put") {
            Kept::Memory(m) => {
                self.held -= m.bytes();
                Ok(m)
            }
            Kept::Spilled { rows, cols } => {
                let mut m = Matrix::zeros(rows, cols);
                let spill = self.spill.as_mut().expect("a spilled matrix has a place");
                spill.get(key, m.data_mut())?;
                Ok(m)
            }
        }
    }

    /// A copy of the matrix under `key`, which stays.
    pub fn copy(&mut self, key: usize) -> Result<Matrix, TapeError> {
        match &self.kept[&key] {
            Kept::Memory(m) => Ok(m.clone()),
            Kept::Spilled { rows, cols } => {
                let mut m = Matrix::zeros(*rows, *cols);
                let spill = self.spill.as_mut().expect("a spilled matrix has a place");
                spill.get(key, m.data_mut())?;
                Ok(m)
            }
        }
    }

    fn forget(&mut self, key: usize) {
        if let Some(Kept::Memory(m)) = self.kept.remove(&key) {
            self.held -= m.bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Heap(HashMap<usize, Vec<f32>>);

    impl Spill for Heap {
        fn put(&mut self, key: usize, values: &[f32]) -> io::Result<()> {
            self.0.insert(key, values.to_vec());
            Ok(())
        }
        fn get(&mut self, key: usize, values: &mut [f32]) -> io::Result<()> {
            values.copy_from_slice(&self.0[&key]);
            Ok(())
        }
    }

    #[test]
    fn what_does_not_fit_is_spilled_and_comes_back() {
        let matrix = |i: usize| Matrix::from_vec(2, 3, vec![i as f32; 6]);
        let mut heap = Heap::default();
        let mut tape = Tape::new(50, Some(&mut heap));
        (0..4).for_each(|i| tape.put(i, &matrix(i)).unwrap());
        for i in (0..4).rev() {
            assert_eq!(tape.take(i).unwrap(), matrix(i));
        }
        tape.put(9, &matrix(9)).unwrap();
        drop(tape);
        assert_eq!(heap.0.len(), 2, "room that was given back is used again");
    }

    #[test]
    fn without_a_place_the_limit_is_an_error() {
        let mut tape = Tape::new(8, None);
        let error = tape.put(0, &Matrix::zeros(2, 2)).unwrap_err().to_string();
        assert!(error.contains("8 bytes") && error.contains("raise the limit"), "{error}");
    }
}
