//! Activations as 8-bit integers, in the order in which codes lie in their words.
//!
//! Sixteen u32 words of codes are a *step*. A shift and a mask give one *plane* of them: 64 codes, one a byte. Activations are
//! stored in the same order, 64 bytes a plane, so that a plane and its activations meet in one instruction that adds four
//! products to each of sixteen 32-bit *lanes*. A lane covers `4 * planes` consecutive columns of one tile.

use super::super::simd::{Isa, Simd, per_isa};
use tailorq_tensor::{Bits, Layout};

/// Bytes of a plane.
pub(super) const PLANE: usize = 64;
/// Lanes of a step.
pub(super) const LANES: usize = 16;
/// Columns that share a scale of the activations.
pub(super) const GROUP: usize = 32;

/// 64 activations of one plane.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Plane(pub(super) [i8; PLANE]);

/// Sixteen numbers, one a lane or one a group of weights.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Lanes(pub(super) [f32; LANES]);

/// How the bytes of a step of codes map to columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Order {
    /// Planes of a step: 4, 2 or 1.
    pub(super) planes: usize,
}

impl Order {
    pub(super) fn of(bits: Bits) -> Self {
        Order { planes: 4 / bits.words_per_tile() }
    }

    /// Columns of a step.
    pub(super) fn step(self) -> usize {
        PLANE * self.planes
    }

    /// Columns of a lane.
    pub(super) fn lane(self) -> usize {
        4 * self.planes
    }
}

/// Some tokens, quantized for one layout.
#[derive(Default)]
pub(super) struct Quantized {
    /// Steps of a row.
    pub(super) steps: usize,
    /// Chunks of sixteen groups of weights in a row.
    pub(super) chunks: usize,
    /// `[tokens, steps, planes]`.
    pub(super) codes: Vec<Plane>,
    /// `[tokens, steps]`: the scale of each lane's activations.
    pub(super) scales: Vec<Lanes>,
    /// `[tokens, chunks]`: for each group of weights, the sum of its activations as quantized.
    pub(super) sums: Vec<Lanes>,
}

impl Quantized {
    /// Quantizes `x`, `[n, cols]`. Buffers are kept, so that repeated calls of one size allocate nothing. Activations that
    /// are not finite make all products with them NaN.
    pub(super) fn fill(&mut self, isa: Isa, x: &[f32], cols: usize, layout: Layout) {
        let order = Order::of(layout.bits);
        let n = x.len() / cols;
        self.steps = cols.div_ceil(order.step());
        self.chunks = layout.group.count(cols).div_ceil(LANES);
        self.codes.resize(n * self.steps * order.planes, Plane([0; PLANE]));
        self.scales.resize(n * self.steps, Lanes([0.0; LANES]));
        self.sums.resize(n * self.chunks, Lanes([0.0; LANES]));
        let group = layout.group.len(cols);
        let (codes, chunks) = (self.steps * order.planes, self.chunks);
        let tokens = x.chunks_exact(cols).zip(self.codes.chunks_exact_mut(codes));
        let tokens = tokens.zip(self.scales.chunks_exact_mut(self.steps)).zip(self.sums.chunks_exact_mut(chunks));
        for (((x, codes), scales), sums) in tokens {
            #[cfg(target_arch = "x86_64")]
            if super::has_vnni(isa) {
                // SAFETY: the processor has the features; the buffers were made for the row.
                unsafe { super::round512::steps(x, order, group, codes, scales, sums) };
                continue;
            }
            token(isa, x, order, group, codes, scales, sums);
        }
    }
}

per_isa! {
    fn token(x: &[f32], order: Order, group: usize, codes: &mut [Plane], scales: &mut [Lanes], sums: &mut [Lanes]) = token_body
}

#[inline(always)]
fn token_body<S: Simd>(
    _simd: S,
    x: &[f32],
    order: Order,
    group: usize,
    codes: &mut [Plane],
    scales: &mut [Lanes],
    sums: &mut [Lanes],
) {
    sums.fill(Lanes([0.0; LANES]));
    let steps = x.chunks(order.step()).zip(codes.chunks_exact_mut(order.planes)).zip(scales);
    for (s, ((x, planes), lane_scales)) in steps.enumerate() {
        let mut natural = [0i8; 4 * PLANE];
        lane_scales.0 = [0.0; LANES];
        for (g, part) in x.chunks(GROUP).enumerate() {
            let (scale, sum) = round_group(part, &mut natural[g * GROUP..g * GROUP + part.len()]);
            let lanes = GROUP / order.lane();
            lane_scales.0[g * lanes..(g + 1) * lanes].fill(scale);
            // A group of weights is a multiple of a group of activations, or the whole row.
            let at = (s * order.step() + g * GROUP) / group;
            sums[at / LANES].0[at % LANES] += scale * sum;
        }
        match order.planes {
            4 => deal::<4>(&natural, planes),
            2 => deal::<2>(&natural, planes),
            _ => deal::<1>(&natural, planes),
        }
    }
}

/// Rounds up to [`GROUP`] activations; returns their scale and the sum of the codes.
#[inline(always)]
fn round_group(x: &[f32], codes: &mut [i8]) -> (f32, f32) {
    let mut padded = [0.0f32; GROUP];
    padded[..x.len()].copy_from_slice(x);
    let largest = padded.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    // NaN and infinity times zero are NaN, which `max` passes over.
    let poison: f32 = padded.iter().map(|v| v * 0.0).sum();
    // So small that the reciprocal would not be finite: as good as zero.
    let inverse = if largest > 1e-30 { 127.0 / largest } else { 0.0 };
    let mut rounded = [0i8; GROUP];
    let mut sum = 0i32;
    for (code, v) in rounded.iter_mut().zip(padded) {
        // Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low bits.
        *code = (v * inverse + 12_582_912.0).to_bits() as i8;
        sum += i32::from(*code);
    }
    codes.copy_from_slice(&rounded[..x.len()]);
    (scale_of(if inverse > 0.0 { largest / 127.0 } else { 0.0 } + poison), sum as f32)
}

/// A scale without the last two bits of its fraction, so that 1.5 times it, or that times a power of two, is exact.
#[inline(always)]
pub(super) fn scale_of(scale: f32) -> f32 {
    f32::from_bits(scale.to_bits() & !3)
}

/// Byte `k` of plane `p` is activation `P k + p`.
#[inline(always)]
fn deal<const P: usize>(natural: &[i8; 4 * PLANE], planes: &mut [Plane]) {
    for (p, plane) in planes.iter_mut().enumerate() {
        for (k, code) in plane.0.iter_mut().enumerate() {
            *code = natural[P * k + p];
        }
    }
}
