//! Copies between the memories by way of pages that the device reads and writes by itself.
//!
//! A copy from or to ordinary memory goes through one thread of the driver and holds up the stream. Here all threads copy to or
//! from a ring of pinned buffers, and the device's copy engine does the rest: uploads in the order of the stream, and what is put
//! away for later ([`Away`]) on a stream of its own, while the next operations run.
//!
//! What is put away is rounded to half precision, every row scaled by a power of two of its own so that its largest element uses
//! the range: elements keep 11 significant bits, as operands of tf32 products do, down to 2^-28 of their row's largest.

use crate::gpu::{Buffer, Gpu, Grid, Source, launch, must};
use cudarc::driver::{CudaEvent, CudaStream, result};
use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tailorq_kernels::PutAway;
use tailorq_tensor::Matrix;

pub(crate) const SOURCE: Source = Source { name: "staging", code: include_str!("kernels/staging.cu") };

/// Bytes of a pinned buffer.
const SLOT: usize = 32 << 20;

/// Pinned buffers: so many copies are under way at most.
const SLOTS: usize = 6;

/// Bytes that one task copies.
const PIECE: usize = 1 << 20;

const FLOAT: usize = size_of::<f32>();

/// Below this a copy by the driver is as fast.
const LEAST: usize = 1 << 20;

/// See the module.
pub(crate) struct Staging {
    copies: Arc<CudaStream>,
    ring: Mutex<Ring>,
    /// Bytes of matrices that are put away, and how many there may be.
    away: AtomicUsize,
    away_limit: usize,
    gpu: Arc<Gpu>,
}

struct Ring {
    slots: Vec<Slot>,
    next: usize,
}

/// A pinned buffer and one of the same size on the device.
struct Slot {
    host: Pinned,
    device: Buffer,
    /// After the last use of either.
    done: CudaEvent,
    /// Whose bytes are on their way into the pinned buffer.
    arriving: Option<Arc<Mutex<Bytes>>>,
}

/// What was put away.
enum Bytes {
    /// On their way: how many.
    Arriving(usize),
    /// In ordinary memory.
    Here(Vec<u8>),
}

/// Pages that the device can read and write.
struct Pinned(*mut u8);

// SAFETY: plain memory, behind the ring's mutex.
unsafe impl Send for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by the driver and freed once, after all copies: the staging's drop has waited for them.
        let _ = unsafe { result::free_host(self.0.cast()) };
    }
}

impl Slot {
    fn new(gpu: &Arc<Gpu>) -> Slot {
        gpu.enter();
        // SAFETY: the pages are written before they are read.
        let host = Pinned(must("pin memory", unsafe { result::malloc_host(SLOT, 0) }).cast());
        let device = gpu.allocate(SLOT);
        let done = must("make an event", gpu.stream().record_event(None));
        // The other stream uses the buffer, too: it must be there for both.
        gpu.synchronize();
        Slot { host, device, done, arriving: None }
    }

    /// Waits for the last use; what has arrived goes to ordinary memory.
    fn settle(&mut self) {
        must("wait for a copy", self.done.synchronize());
        if let Some(owner) = self.arriving.take() {
            let mut bytes = owner.lock().expect("no thread panics while it copies");
            if let Bytes::Arriving(n) = *bytes {
                // Fresh pages of zeros are made by those who write to them.
                let mut here = vec![0u8; n];
                copy(self.pages(n), &mut here);
                *bytes = Bytes::Here(here);
            }
        }
    }

    fn pages(&self, n: usize) -> &[u8] {
        assert!(n <= SLOT, "a piece fits a slot");
        // SAFETY: the pages are that many, and nobody writes to them after `settle`.
        unsafe { std::slice::from_raw_parts(self.host.0, n) }
    }

    fn pages_mut(&mut self, n: usize) -> &mut [u8] {
        assert!(n <= SLOT, "a piece fits a slot");
        // SAFETY: as above, and `self` is borrowed for as long.
        unsafe { std::slice::from_raw_parts_mut(self.host.0, n) }
    }
}

/// The bytes of some numbers.
pub(crate) fn bytes_of(numbers: &[f32]) -> &[u8] {
    // SAFETY: the numbers are that many bytes, all of them set.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// On all threads.
fn copy(from: &[u8], to: &mut [u8]) {
    to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
}

impl Ring {
    /// The next slot, free of earlier work.
    fn take(&mut self, gpu: &Arc<Gpu>) -> &mut Slot {
        let idx = self.next;
        self.next = (idx + 1) % SLOTS;
        if idx == self.slots.len() {
            self.slots.push(Slot::new(gpu));
        }
        self.slots[idx].settle();
        &mut self.slots[idx]
    }
}

/// Rows of a matrix of this width that fit a slot, with their scales.
fn rows_a_slot(cols: usize) -> usize {
    SLOT / (2 * cols + FLOAT)
}

impl Staging {
    /// `away_limit` bytes of ordinary memory may hold what is put away.
    pub(crate) fn new(gpu: &Arc<Gpu>, away_limit: usize) -> Arc<Staging> {
        gpu.enter();
        let copies = must("make a stream", gpu.stream().fork());
        let ring = Mutex::new(Ring { slots: Vec::new(), next: 0 });
        Arc::new(Staging { copies, ring, away: AtomicUsize::new(0), away_limit, gpu: gpu.clone() })
    }

    fn ring(&self) -> std::sync::MutexGuard<'_, Ring> {
        self.ring.lock().expect("no thread panics while it copies")
    }

    /// Copies `bytes` to the device, to byte `at` of `buffer`, in the order of the stream. They may be forgotten when this returns.
    pub(crate) fn upload(&self, buffer: &Buffer, at: usize, bytes: &[u8]) {
        if bytes.len() < LEAST {
            self.gpu.write(buffer, at, bytes);
            return;
        }
        assert!(at + bytes.len() <= buffer.bytes(), "the buffer is shorter than what is written");
        let mut ring = self.ring();
        for (i, part) in bytes.chunks(SLOT).enumerate() {
            let slot = ring.take(&self.gpu);
            copy(part, slot.pages_mut(part.len()));
            let to = buffer.ptr() + (at + i * SLOT) as u64;
            self.gpu.enter();
            // SAFETY: the range lies inside the buffer, and the pages stay as they are until `done`.
            must("copy to the device", unsafe {
                result::memcpy_htod_async(to, slot.pages(part.len()), self.gpu.stream().cu_stream())
            });
            must("record an event", slot.done.record(self.gpu.stream()));
        }
    }

    /// Reads from byte `at` of `buffer` on, after all work so far.
    pub(crate) fn download(&self, buffer: &Buffer, at: usize, out: &mut [u8]) {
        if out.len() < LEAST {
            self.gpu.read(buffer, at, out);
            return;
        }
        assert!(at + out.len() <= buffer.bytes(), "the buffer is shorter than what is read");
        let mut ring = self.ring();
        // One copy is ahead of the one that goes to ordinary memory.
        let mut before: Option<(usize, &mut [u8])> = None;
        for (i, part) in out.chunks_mut(SLOT).enumerate() {
            let idx = ring.next;
            let slot = ring.take(&self.gpu);
            let from = buffer.ptr() + (at + i * SLOT) as u64;
            self.gpu.enter();
            let n = part.len();
            // SAFETY: the range lies inside the buffer, and the pages are looked at after `done`.
            must("copy from the device", unsafe {
                result::memcpy_dtoh_async(slot.pages_mut(n), from, self.gpu.stream().cu_stream())
            });
            must("record an event", slot.done.record(self.gpu.stream()));
            if let Some((idx, part)) = before.replace((idx, part)) {
                ring.slots[idx].settle();
                copy(ring.slots[idx].pages(part.len()), part);
            }
        }
        if let Some((idx, part)) = before {
            ring.slots[idx].settle();
            copy(ring.slots[idx].pages(part.len()), part);
        }
    }

    /// Puts a matrix of the device away; `None` when there is no room left for it, or its rows are too long.
    pub(crate) fn put_away(self: &Arc<Self>, m: &Matrix) -> Option<Away> {
        let (rows, cols) = (m.rows(), m.cols());
        let (step, bytes) = (rows_a_slot(cols), rows * (2 * cols + FLOAT));
        if step == 0 || self.away.fetch_add(bytes, Ordering::Relaxed) + bytes > self.away_limit {
            if step > 0 {
                self.away.fetch_sub(bytes, Ordering::Relaxed);
            }
            return None;
        }
        let from = self.gpu.address(m);
        let mut ring = self.ring();
        let piece = |first: usize| {
            let n = step.min(rows - first);
            let n_bytes = n * (2 * cols + FLOAT);
            let owner = Arc::new(Mutex::new(Bytes::Arriving(n_bytes)));
            let slot = ring.take(&self.gpu);
            let (x, scales) = (from + (first * cols * FLOAT) as u64, slot.device.ptr());
            let halves = scales + (n * FLOAT) as u64;
            launch!(self.gpu, &SOURCE, "to_halves", Grid::rows(n, 256), x, halves, scales, cols as i32);
            must("record an event", slot.done.record(self.gpu.stream()));
            must("order two streams", self.copies.wait(&slot.done));
            // SAFETY: the slot is that large, and its pages are looked at after `done`.
            must("copy from the device", unsafe {
                result::memcpy_dtoh_async(slot.pages_mut(n_bytes), scales, self.copies.cu_stream())
            });
            must("record an event", slot.done.record(&self.copies));
            slot.arriving = Some(owner.clone());
            owner
        };
        let pieces = (0..rows).step_by(step).map(piece).collect();
        Some(Away { rows, cols, bytes, pieces, staging: self.clone() })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.gpu.enter();
        // The pages must outlive all copies; a device that fails here has failed before.
        let _ = self.copies.synchronize();
        let _ = self.gpu.stream().synchronize();
    }
}

/// A matrix that was put away.
pub(crate) struct Away {
    rows: usize,
    cols: usize,
    bytes: usize,
    pieces: Vec<Arc<Mutex<Bytes>>>,
    staging: Arc<Staging>,
}

impl PutAway for Away {
    fn bring_back(&self) -> Matrix {
        let Staging { gpu, copies, .. } = &*self.staging;
        let (m, to) = gpu.matrix(self.rows, self.cols);
        let step = rows_a_slot(self.cols).max(1);
        let mut ring = self.staging.ring();
        for (i, piece) in self.pieces.iter().enumerate() {
            // It may still be on its way.
            let is_it = |s: &&mut Slot| s.arriving.as_ref().is_some_and(|owner| Arc::ptr_eq(owner, piece));
            if let Some(slot) = ring.slots.iter_mut().find(is_it) {
                slot.settle();
            }
            let bytes = piece.lock().expect("no thread panics while it copies");
            let Bytes::Here(bytes) = &*bytes else { unreachable!("settled above") };
            let n = step.min(self.rows - i * step);
            let slot = ring.take(gpu);
            copy(bytes, slot.pages_mut(bytes.len()));
            // SAFETY: the slot is that large; the stream's earlier work on it is over, and the pages stay until `done`.
            must("copy to the device", unsafe {
                result::memcpy_htod_async(slot.device.ptr(), slot.pages(bytes.len()), copies.cu_stream())
            });
            must("record an event", slot.done.record(copies));
            must("order two streams", gpu.stream().wait(&slot.done));
            let (x, scales) = (to + (i * step * self.cols * FLOAT) as u64, slot.device.ptr());
            let (halves, grid) = (scales + (n * FLOAT) as u64, Grid::rows(n, 256));
            launch!(gpu, &SOURCE, "from_halves", grid, halves, scales, x, self.cols as i32);
            must("record an event", slot.done.record(gpu.stream()));
        }
        m
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        self.staging.away.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
