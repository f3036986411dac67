//! Weights on the device, each uploaded when it is first used and kept while there is room.
//!
//! The key is the address of the weight's shared data. An entry holds on to that address, not to the data: the copy of a weight
//! that is gone goes with the next upload, and until then no other weight can have its address. Of the living ones the least
//! recently used gives way first.

use crate::blas::Element;
use crate::gpu::{Buffer, Gpu, Grid, launch};
use crate::staging::{self, Staging};
use half::bf16;
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use tailorq_tensor::{DType, Matrix, PackedMatrix, ReadRows, Weight};

/// Elements that one task decodes.
const PIECE: usize = 1 << 20;

/// See the module.
pub(crate) struct Weights {
    element: Element,
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
    pub(crate) fn new(element: Element, limit: usize) -> Self {
        Weights { element, limit, kept: Mutex::default() }
    }

    /// What the elements are rounded to.
    pub(crate) fn element(&self) -> Element {
        self.element
    }

    /// The whole weight on the device, row by row.
    pub(crate) fn get(&self, staging: &Staging, gpu: &Arc<Gpu>, weight: &Weight) -> Arc<Buffer> {
        let mut kept = self.kept.lock().expect("no thread panics while it holds the list");
        kept.clock += 1;
        let now = kept.clock;
        if let Some(entry) = kept.entries.get_mut(&key(weight)) {
            entry.used = now;
            return entry.buffer.clone();
        }
        let bytes = weight.rows() * weight.cols() * self.element.size();
        kept.entries.retain(|_, entry| !entry.owner.is_gone());
        kept.bytes = kept.entries.values().map(|entry| entry.buffer.bytes()).sum();
        let limit = self.limit.saturating_sub(gpu.held().saturating_sub(kept.bytes)) / 2;
        while kept.bytes + bytes > limit
            && let Some(oldest) = kept.entries.iter().min_by_key(|(_, e)| e.used).map(|(k, _)| *k)
        {
            let gone = kept.entries.remove(&oldest).expect("it was found above");
            kept.bytes -= gone.buffer.bytes();
        }
        let buffer = Arc::new(upload(staging, gpu, weight.reader(), self.element));
        kept.bytes += bytes;
        let entry = Entry { buffer: buffer.clone(), used: now, owner: Owner::of(weight) };
        kept.entries.insert(key(weight), entry);
        buffer
    }
}

/// Brings a weight to the device, bf16 as it is stored; others are decoded on all threads and copied over, a part at a time.
pub(crate) fn upload(staging: &Staging, gpu: &Arc<Gpu>, weight: &dyn ReadRows, element: Element) -> Buffer {
    let (rows, cols) = (weight.rows(), weight.cols());
    let n = rows * cols;
    let buffer = gpu.allocate(n * element.size());
    match (weight.dense(), element) {
        (Some((DType::BF16, bytes)), Element::Bf16) => staging.upload(&buffer, 0, bytes),
        (Some((DType::BF16, bytes)), Element::F32) => {
            let stored = gpu.allocate(bytes.len());
            staging.upload(&stored, 0, bytes);
            launch!(gpu, &staging::SOURCE, "from_bf16", Grid::elements(n), stored.ptr(), buffer.ptr(), n as u64);
        }
        _ => decode(staging, &buffer, weight, element),
    }
    buffer
}

fn decode(staging: &Staging, buffer: &Buffer, weight: &dyn ReadRows, element: Element) {
    let (rows, cols) = (weight.rows(), weight.cols());
    let piece_rows = (PIECE / cols.max(1)).max(1);
    let part_rows = piece_rows * 4 * rayon::current_num_threads().max(1);
    let mut values = vec![0.0f32; part_rows.min(rows) * cols];
    let mut rounded = Vec::new();
    for first in (0..rows).step_by(part_rows.max(1)) {
        let n = part_rows.min(rows - first);
        let part = &mut values[..n * cols];
        let read = |(i, piece): (usize, &mut [f32])| weight.read_rows(first + i * piece_rows, piece);
        part.par_chunks_mut((piece_rows * cols).max(1)).enumerate().for_each(read);
        let at = first * cols * element.size();
        match element {
            Element::F32 => staging.upload(buffer, at, staging::bytes_of(part)),
            Element::Bf16 => {
                rounded.clear();
                rounded.par_extend(part.par_iter().map(|v| bf16::from_f32(*v).to_bits()));
                staging.upload(buffer, at, staging::bytes_of::<u16>(&rounded));
            }
        }
    }
}
