//! Weights on the device, each uploaded when it is first used and kept while there is room.
//!
//! The key is the address of the weight's shared data. An entry holds on to that address, not to the data: the copy of a weight
//! that is gone goes with the next upload, and until then no other weight can have its address. Of the living ones the least
//! recently used gives way first.

use crate::gpu::{Buffer, Gpu, Grid, launch};
use crate::staging::{self, Staging};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use tailorq_tensor::{DType, Matrix, PackedMatrix, ReadRows, Weight};

const FLOAT: usize = size_of::<f32>();

/// Elements that one task decodes.
const PIECE: usize = 1 << 20;

/// See the module.
pub(crate) struct Weights {
    /// Bytes of the device that may be taken in all. Of what other matrices leave of them, weights take half, the one in use
    /// aside.
    limit: usize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    entries: HashMap<usize, Entry>,
    bytes: usize,
    clock: u64,
}

struct Entry {
    buffer: Arc<Buffer>,
    used: u64,
    owner: Owner,
}

/// Keeps an address taken.
enum Owner {
    Stored(Weak<dyn ReadRows>),
    Dense(Weak<Matrix>),
    Packed(Weak<PackedMatrix>),
}

impl Owner {
    fn of(weight: &Weight) -> Self {
        match weight {
            Weight::Stored(w) => Owner::Stored(Arc::downgrade(w)),
            Weight::Dense(w) => Owner::Dense(Arc::downgrade(w)),
            Weight::Packed(w) => Owner::Packed(Arc::downgrade(w)),
        }
    }

    fn is_gone(&self) -> bool {
        let n_owners = match self {
            Owner::Stored(w) => w.strong_count(),
            Owner::Dense(w) => w.strong_count(),
            Owner::Packed(w) => w.strong_count(),
        };
        n_owners == 0
    }
}

/// The address of the data that clones of a weight share.
fn key(weight: &Weight) -> usize {
    match weight {
        Weight::Stored(w) => Arc::as_ptr(w).cast::<()>() as usize,
        Weight::Dense(w) => Arc::as_ptr(w) as usize,
        Weight::Packed(w) => Arc::as_ptr(w) as usize,
    }
}

impl Weights {
    pub(crate) fn new(limit: usize) -> Self {
        Weights { limit, kept: Mutex::default() }
    }

    /// The whole weight on the device in f32, row by row.
    pub(crate) fn get(&self, staging: &Staging, gpu: &Arc<Gpu>, weight: &Weight) -> Arc<Buffer> {
        let mut kept = self.kept.lock().expect("no thread panics while it holds the list");
        kept.clock += 1;
        let now = kept.clock;
        if let Some(entry) = kept.entries.get_mut(&key(weight)) {
            entry.used = now;
            return entry.buffer.clone();
        }
        let bytes = weight.rows() * weight.cols() * FLOAT;
        kept.entries.retain(|_, entry| !entry.owner.is_gone());
        kept.bytes = kept.entries.values().map(|entry| entry.buffer.bytes()).sum();
        let limit = self.limit.saturating_sub(gpu.held().saturating_sub(kept.bytes)) / 2;
        while kept.bytes + bytes > limit
            && let Some(oldest) = kept.entries.iter().min_by_key(|(_, e)| e.used).map(|(k, _)| *k)
        {
            let gone = kept.entries.remove(&oldest).expect("it was found above");
            kept.bytes -= gone.buffer.bytes();
        }
        let buffer = Arc::new(upload(staging, gpu, weight.reader()));
        kept.bytes += bytes;
        let entry = Entry { buffer: buffer.clone(), used: now, owner: Owner::of(weight) };
        kept.entries.insert(key(weight), entry);
        buffer
    }
}

/// Brings a weight to the device, bf16 as it is stored; others are decoded on all threads and copied over, a part at a time.
fn upload(staging: &Staging, gpu: &Arc<Gpu>, weight: &dyn ReadRows) -> Buffer {
    let n = weight.rows() * weight.cols();
    let buffer = gpu.allocate(n * FLOAT);
    match weight.dense() {
        Some((DType::BF16, bytes)) => {
            let stored = gpu.allocate(bytes.len());
            staging.upload(&stored, 0, bytes);
            launch!(gpu, &staging::SOURCE, "from_bf16", Grid::elements(n), stored.ptr(), buffer.ptr(), n as u64);
        }
        _ => decode(staging, &buffer, weight),
    }
    buffer
}

fn decode(staging: &Staging, buffer: &Buffer, weight: &dyn ReadRows) {
    let (rows, cols) = (weight.rows(), weight.cols());
    let piece_rows = (PIECE / cols.max(1)).max(1);
    let part_rows = piece_rows * 4 * rayon::current_num_threads().max(1);
    let mut values = vec![0.0f32; part_rows.min(rows) * cols];
    for first in (0..rows).step_by(part_rows.max(1)) {
        let n = part_rows.min(rows - first);
        let part = &mut values[..n * cols];
        let read = |(i, piece): (usize, &mut [f32])| weight.read_rows(first + i * piece_rows, piece);
        part.par_chunks_mut((piece_rows * cols).max(1)).enumerate().for_each(read);
        staging.upload(buffer, first * cols * FLOAT, staging::bytes_of(part));
    }
}
