//! What the forward pass keeps for the backward pass: matrices in memory up to a limit, the rest spilled.
//!
//! On a device with a memory of its own the limit is that of the device. What is beyond goes to ordinary memory, rounded to half
//! precision row by row, and the oldest first: what was put last is what the next block reads, and stays as it is.

use std::collections::{HashMap, VecDeque};
use std::io;
use tailorq_kernels::{Device, PutAway, Resident};
use tailorq_tensor::Matrix;
use thiserror::Error;

/// A place for matrices that do not fit in memory, given by whoever may open files.
pub trait Spill: Send {
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
    /// With the number of the `put` that brought it.
    Memory(Matrix, u64),
    Away(Box<dyn PutAway>),
    Spilled {
        rows: usize,
        cols: usize,
    },
}

/// `None` when there is no room for the matrix.
type PuttingAway<'d> = Box<dyn Fn(&Matrix) -> Option<Box<dyn PutAway>> + 'd>;

/// Matrices by key.
pub struct Tape<'d, 's> {
    limit: usize,
    held: usize,
    kept: HashMap<usize, Kept>,
    /// Keys in the order of their `put`s, with their numbers; those that are gone as well.
    order: VecDeque<(usize, u64)>,
    n_puts: u64,
    /// Takes a matrix off a device that has a memory of its own.
    put_away: Option<PuttingAway<'d>>,
    spill: Option<&'s mut dyn Spill>,
}

impl<'d, 's> Tape<'d, 's> {
    /// A tape that holds up to `limit` bytes in the memory of the device that makes the matrices.
    pub fn new(device: &'d dyn Device, limit: usize, spill: Option<&'s mut dyn Spill>) -> Self {
        let put_away = |resident: &'d dyn Resident| Box::new(move |m: &Matrix| resident.put_away(m)) as PuttingAway<'d>;
        Tape::moving(device.resident().map(put_away), limit, spill)
    }

    fn moving(put_away: Option<PuttingAway<'d>>, limit: usize, spill: Option<&'s mut dyn Spill>) -> Self {
        Tape { limit, held: 0, kept: HashMap::new(), order: VecDeque::new(), n_puts: 0, put_away, spill }
    }

    /// Keeps a copy of `m` under `key`, in place of what was there.
    pub fn put(&mut self, key: usize, m: &Matrix) -> Result<(), TapeError> {
        self.forget(key);
        let bytes = m.bytes();
        self.n_puts += 1;
        if self.put_away.is_some() {
            self.make_room(bytes)?;
            self.order.push_back((key, self.n_puts));
        }
        let kept = if bytes <= self.limit - self.held {
            self.held += bytes;
            Kept::Memory(m.clone(), self.n_puts)
        } else {
            self.elsewhere(key, m)?
        };
        self.kept.insert(key, kept);
        Ok(())
    }

    /// Moves the oldest matrices off the device until there is room for so many bytes, or nothing left to move.
    fn make_room(&mut self, bytes: usize) -> Result<(), TapeError> {
        while self.held + bytes > self.limit
            && let Some((key, number)) = self.order.pop_front()
        {
            let m = match self.kept.get(&key) {
                Some(Kept::Memory(m, of)) if *of == number => m.clone(),
                _ => continue,
            };
            let moved = self.elsewhere(key, &m)?;
            self.held -= m.bytes();
            self.kept.insert(key, moved);
        }
        Ok(())
    }

    /// Keeps a matrix off the device, or out of memory where that is the device's.
    fn elsewhere(&mut self, key: usize, m: &Matrix) -> Result<Kept, TapeError> {
        if let Some(away) = self.put_away.as_ref().and_then(|put_away| put_away(m)) {
            return Ok(Kept::Away(away));
        }
        let Some(spill) = &mut self.spill else { return Err(TapeError::Full { limit: self.limit }) };
        spill.put(key, m.data())?;
        Ok(Kept::Spilled { rows: m.rows(), cols: m.cols() })
    }

    /// Takes back the matrix under `key`, which must have been put.
    pub fn take(&mut self, key: usize) -> Result<Matrix, TapeError> {
        match self.kept.remove(&key).expect("a matrix is taken once, after it was put") {
            Kept::Memory(m, _) => {
                self.held -= m.bytes();
                Ok(m)
            }
            Kept::Away(away) => Ok(away.bring_back()),
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
            Kept::Memory(m, _) => Ok(m.clone()),
            Kept::Away(away) => Ok(away.bring_back()),
            Kept::Spilled { rows, cols } => {
                let mut m = Matrix::zeros(*rows, *cols);
                let spill = self.spill.as_mut().expect("a spilled matrix has a place");
                spill.get(key, m.data_mut())?;
                Ok(m)
            }
        }
    }

    fn forget(&mut self, key: usize) {
        if let Some(Kept::Memory(m, _)) = self.kept.remove(&key) {
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
        let (device, mut heap) = (tailorq_kernels::cpu(), Heap::default());
        let mut tape = Tape::new(&*device, 50, Some(&mut heap));
        (0..4).for_each(|i| tape.put(i, &matrix(i)).unwrap());
        for i in (0..4).rev() {
            assert_eq!(tape.take(i).unwrap(), matrix(i));
        }
        tape.put(9, &matrix(9)).unwrap();
        drop(tape);
        assert_eq!(heap.0.len(), 2, "room that was given back is used again");
    }

    struct Rounded(Matrix);

    impl PutAway for Rounded {
        fn bring_back(&self) -> Matrix {
            self.0.clone()
        }
    }

    /// Off a device goes what was put first, and what was put again counts as new.
    #[test]
    fn the_oldest_leave_the_device_first() {
        let matrix = |i: usize| Matrix::from_vec(2, 3, vec![i as f32; 6]);
        // As on a device, what was put away comes back a little different; two matrices find room.
        let n_away = std::cell::Cell::new(0);
        let put_away = |m: &Matrix| {
            n_away.set(n_away.get() + 1);
            let rounded = m.data().iter().map(|v| v + 0.25).collect();
            (n_away.get() <= 2).then(|| Box::new(Rounded(Matrix::from_vec(2, 3, rounded))) as Box<dyn PutAway>)
        };
        let mut heap = Heap::default();
        let mut tape = Tape::moving(Some(Box::new(put_away)), 50, Some(&mut heap));
        [0, 1].iter().for_each(|&i| tape.put(i, &matrix(i)).unwrap());
        assert_eq!(tape.take(0).unwrap(), matrix(0));
        // Key 0 is now younger than key 1.
        [0, 2].iter().for_each(|&i| tape.put(i, &matrix(i)).unwrap());
        assert_eq!((n_away.get(), tape.copy(1).unwrap().data()[0]), (1, 1.25));
        [3, 4].iter().for_each(|&i| tape.put(i, &matrix(i)).unwrap());
        let first: Vec<f32> = (0..5).map(|i| tape.take(i).unwrap().data()[0]).collect();
        assert_eq!(first, [0.25, 1.25, 2.0, 3.0, 4.0]);
        drop(tape);
        assert_eq!((n_away.get(), heap.0.len()), (3, 1), "what finds no room off the device is spilled as it is");
    }

    #[test]
    fn without_a_place_the_limit_is_an_error() {
        let device = tailorq_kernels::cpu();
        let mut tape = Tape::new(&*device, 8, None);
        let error = tape.put(0, &Matrix::zeros(2, 2)).unwrap_err().to_string();
        assert!(error.contains("8 bytes") && error.contains("raise the limit"), "{error}");
    }
}
