//! Linears of packed weights with 8-bit activations.
//!
//! `y = (base + corrections) x`: the base by integer products, codes times rounded activations, scaled a group at a time;
//! the corrections by a second, sparse pass over the activations as they are. For a few tokens, each weight row is read
//! once and multiplied with every token; the sum of one row and one token is the same alone and among others.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod base;
#[cfg(target_arch = "x86_64")]
mod codes512;
mod corrections;
#[cfg(target_arch = "x86_64")]
mod corrections512;
#[cfg(target_arch = "x86_64")]
mod corrections_many;
mod levels;
#[cfg(target_arch = "x86_64")]
mod panel;
mod portable;
#[cfg(target_arch = "x86_64")]
mod round512;

use super::linear::add_bias;
use super::simd::{Isa, Level, Simd, per_isa};
use super::tile::{Part, Tile};
use activations::Quantized;
use base::{Base, Tables};
use corrections::{Corrections, Inputs};
use rayon::prelude::*;
use std::cell::Cell;
use std::ops::Range;
use tailorq_tensor::{InputTransform, PackedMatrix};

/// Whether these kernels know all parts of a matrix; others are read to f32.
pub(super) fn reads(w: &PackedMatrix) -> bool {
    w.mean4().is_none()
}

/// Bytes of weights below which a task is not divided: a few microseconds of reading.
const FEW_TASK: usize = 1 << 16;

/// Inputs from which on rows are transformed in parallel.
const TRANSFORM_TASK: usize = 1 << 16;

/// Buffers for a few tokens.
#[derive(Default)]
struct Few {
    quantized: Quantized,
    rotated: Vec<f32>,
    filled: Vec<f32>,
}

/// Buffers for many tokens.
#[cfg(target_arch = "x86_64")]
#[derive(Default)]
struct Many {
    tokens: panel::Tokens,
    rotated: Vec<f32>,
    transposed: Vec<activations::Lanes>,
}

thread_local! {
    #[cfg(target_arch = "x86_64")]
    static MANY: Cell<Many> = Cell::default();
    /// The buffers of a thread that calls linears, kept so that a step of decoding allocates nothing.
    static FEW_BUFFERS: Cell<Few> = Cell::default();
}

/// `y[n, rows.len()] = x[n, in] W[rows]^T (+ bias[rows])` for a few tokens. Shapes are checked by the caller.
pub(super) fn few(isa: Isa, x: &[f32], w: &PackedMatrix, bias: Option<&[f32]>, rows: Range<usize>, y: &mut [f32]) {
    let n = x.len() / w.cols().max(1);
    if w.cols() == 0 || n == 0 || rows.is_empty() {
        return fill(bias, rows, y);
    }
    let Few { mut quantized, mut rotated, mut filled } = FEW_BUFFERS.take();
    quantized.fill(isa, inputs_of_base(isa, w, x, &mut rotated), w.cols(), w.layout());
    let (base, tile) = (Base::of(w), Tile::new(y, n, rows.len(), rows.len()));
    // Two tasks a thread, so that one that starts late finds less to do; the partition changes no sum.
    // A task has a row at least, also where few rows of a large matrix are asked for.
    let of_bytes = FEW_TASK * rows.len() / w.bytes().max(1);
    let least = (rows.len() / (2 * rayon::current_num_threads())).max(of_bytes).max(1);
    let corrections = Corrections::of(w).map(|c| (c, Inputs::of(x, w.cols(), &mut filled)));
    let (tables, corrections) = (Tables::of(&base), corrections.as_ref());
    Products { isa, base, tables: &tables, quantized: &quantized, corrections, bias }.divide(rows.start, tile, least);
    FEW_BUFFERS.set(Few { quantized, rotated, filled });
}

/// Whether the kernels of AVX-512 with VNNI run. Only they have panels of unpacked rows: elsewhere many tokens meet weights in
/// f32.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_vnni(isa: Isa) -> bool {
    isa.level() == Level::Avx512 && avx512::available()
}

/// As [`few`], for more tokens, where [`has_vnni`].
#[cfg(target_arch = "x86_64")]
pub(super) fn many(isa: Isa, x: &[f32], w: &PackedMatrix, bias: Option<&[f32]>, rows: Range<usize>, y: &mut [f32]) {
    let n = x.len() / w.cols().max(1);
    if w.cols() == 0 || rows.is_empty() {
        return fill(bias, rows, y);
    }
    let mut many = MANY.take();
    // SAFETY: the processor has panels.
    unsafe { many.tokens.fill(inputs_of_base(isa, w, x, &mut many.rotated), w.cols(), w.layout()) };
    let corrections = Corrections::of(w);
    let transposed = &mut many.transposed;
    let plain = corrections.is_some().then(|| corrections_many::Transposed::of(x, w.cols(), transposed));
    let corrected = corrections.as_ref().zip(plain.as_ref());
    let base = Base::of(w);
    let parts = Tile::new(y, n, rows.len(), rows.len()).grid(n, panel::PANEL);
    // A buffer for each run of panels that one thread takes; what a task gives does not depend on which runs those are.
    let buffer = || panel::Panel::new(&base, &many.tokens);
    parts.into_par_iter().for_each_init(buffer, |panel, Part { col, mut tile, .. }| {
        let first = rows.start + col;
        // SAFETY: the processor has panels, the rows exist, and the buffer is for these matrices.
        unsafe { panel::rows(panel, &base, &many.tokens, corrected, first, &mut tile) };
        add_bias(&mut tile, bias, first);
    });
    MANY.set(many);
}

/// What the base is multiplied with: `x`, rotated into `buffer` where the matrix has an input transform.
fn inputs_of_base<'a>(isa: Isa, w: &PackedMatrix, x: &'a [f32], buffer: &'a mut Vec<f32>) -> &'a [f32] {
    let Some(transform) = w.transform() else { return x };
    buffer.clear();
    buffer.extend_from_slice(x);
    if x.len() < TRANSFORM_TASK {
        buffer.chunks_exact_mut(w.cols()).for_each(|x| forward(isa, transform, x));
    } else {
        buffer.par_chunks_exact_mut(w.cols()).for_each(|x| forward(isa, transform, x));
    }
    buffer
}

per_isa! {
    fn forward(transform: &InputTransform, x: &mut [f32]) = forward_body
}

#[inline(always)]
fn forward_body<S: Simd>(_simd: S, transform: &InputTransform, x: &mut [f32]) {
    transform.forward(x);
}

/// A call for a few tokens.
struct Products<'a> {
    isa: Isa,
    base: Base<'a>,
    tables: &'a Tables,
    quantized: &'a Quantized,
    /// Those of the matrix, and the tokens that they are multiplied with.
    corrections: Option<&'a (Corrections<'a>, Inputs<'a>)>,
    bias: Option<&'a [f32]>,
}

impl Products<'_> {
    /// The rows from `first` on, whose outputs are the columns of `y`, in tasks of at least `least` rows. Nothing is asked of
    /// the allocator.
    fn divide(&self, first: usize, mut y: Tile<'_>, least: usize) {
        // A multiple of the rows that kernels take at once.
        let middle = (y.cols() / 2).next_multiple_of(4);
        if y.cols() >= 2 * least && middle < y.cols() {
            let (low, high) = y.split_cols(middle);
            rayon::join(|| self.divide(first, low, least), || self.divide(first + middle, high, least));
            return;
        }
        self.rows(first, &mut y);
        add_bias(&mut y, self.bias, first);
    }

    /// `y[t, i] = (base + corrections)[first + i] x[t]` for all of `y`, whose rows are tokens.
    fn rows(&self, first: usize, y: &mut Tile<'_>) {
        let (base, tables, x) = (&self.base, self.tables, self.quantized);
        match self.isa.level() {
            #[cfg(target_arch = "x86_64")]
            _ if has_vnni(self.isa) && avx512::has_gfni() => {
                // SAFETY: the processor has what the kernel needs.
                unsafe { avx512::rows_gfni(base, tables, x, self.corrections, first, y) }
            }
            #[cfg(target_arch = "x86_64")]
            _ if has_vnni(self.isa) => {
                // SAFETY: the processor has what the kernel needs.
                unsafe { avx512::rows(base, tables, x, self.corrections, first, y) }
            }
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => {
                // SAFETY: such an `Isa` is made only where the processor has avxvnni, avx2, fma and f16c.
                self.by_block(first, y, |first, y| unsafe { avx2::rows_vnni(base, tables, x, first, y) });
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx2 => {
                // SAFETY: such an `Isa` is made only where the processor has avx2, fma and f16c.
                self.by_block(first, y, |first, y| unsafe { avx2::rows(base, tables, x, first, y) });
            }
            Level::Portable => self.by_block(first, y, |first, y| portable::rows(base, x, first, y)),
        }
    }

    /// Block by block, `base_rows` of it and then its corrections.
    fn by_block(&self, first: usize, y: &mut Tile<'_>, base_rows: impl Fn(usize, &mut Tile<'_>)) {
        let Some((corrections, x)) = self.corrections else { return base_rows(first, y) };
        for at in (0..y.cols()).step_by(corrections::BLOCK) {
            let mut block = y.cols_mut(at..y.cols().min(at + corrections::BLOCK));
            base_rows(first + at, &mut block);
            corrections::add(self.isa, corrections, *x, first + at, &mut block);
        }
    }
}

/// Without inputs, what is left is the bias.
fn fill(bias: Option<&[f32]>, rows: Range<usize>, y: &mut [f32]) {
    for y in y.chunks_exact_mut(rows.len().max(1)) {
        match bias {
            Some(bias) => y.copy_from_slice(&bias[rows.clone()]),
            None => y.fill(0.0),
        }
    }
}
