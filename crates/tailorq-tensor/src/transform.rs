//! The input transform: a seeded randomized Hadamard rotation `T` of a linear's inputs.
//!
//! A rotated row of weights is nearly Gaussian: no input stands out any more, so a coarse grid wastes no codes on outliers
//! (Chee et al. 2023, QuIP, arXiv 2307.13304; Tseng et al. 2024, QuIP#, arXiv 2402.04396). The packed base `B` lives in the
//! rotated domain and the weights are `W = B T + C`: activations are rotated before they meet the base, corrections `C` meet
//! them as they are, because a rotation spreads exactly the outliers that a correction is for.
//!
//! `T` flips signs and then applies the Walsh-Hadamard matrix, divided by the root of its size, to blocks of a power of two.
//! Whole blocks stand side by side from the first input on. Where they leave a rest, a second pass of the same kind, with
//! signs of its own, runs over the last block's worth of inputs and overlaps the first pass, so that any width is mixed, an
//! odd one too. (The second signs are needed: a Walsh function that is cut and shifted is still close to one, and the
//! second pass would gather again what the first has spread.)
//!
//! What is exact: sums and differences are taken in one fixed order and each is rounded to f32, so every implementation and
//! every instruction set gives the same bits. The factor `1 / sqrt(block)` is exact for blocks of 4^k and within 2^-24
//! otherwise. [`InputTransform::backward`] undoes [`InputTransform::forward`] up to the rounding of these sums, about
//! `log2(block)` times 2^-24 of the row's norm.

use crate::{PackError, Rng};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// Numbers of one vector in the butterflies; smaller blocks take a plain loop.
const LANES: usize = 16;

/// Half a vector: pairs inside of it are found by shuffles.
const HALF_LANES: usize = LANES / 2;

/// A block of this size or more mixes enough by itself, so that no overlap is wanted.
const ENOUGH: usize = 64;

/// The largest block that is chosen; its values stay in the nearest cache.
const LARGEST: usize = 4096;

/// The widest row: far above any model's, and low enough that a file which claims more costs no memory.
const WIDEST: usize = 1 << 20;

/// The kinds of transforms that exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransformKind {
    /// See [`InputTransform`].
    Hadamard,
}

/// What a configuration records of a transform: with the width of the matrix it fixes every sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformSpec {
    /// Its kind.
    pub kind: TransformKind,
    /// Of the signs.
    pub seed: u64,
    /// Inputs that are mixed with each other: a power of two, at most the width (1 for a width of 0).
    pub block: usize,
}

impl TransformSpec {
    /// The Hadamard transform for rows of `width` inputs. The block is the largest power of two that divides the width, at most
    /// 4096, where that is at least 64; otherwise the largest that the width holds, at most 4096, with a second, overlapping pass.
    pub fn hadamard(width: usize, seed: u64) -> Self {
        let dividing = 1 << width.trailing_zeros().min(LARGEST.trailing_zeros());
        let block = if width >= ENOUGH && dividing >= ENOUGH {
            dividing
        } else {
            1 << width.checked_ilog2().unwrap_or(0).min(LARGEST.trailing_zeros())
        };
        TransformSpec { kind: TransformKind::Hadamard, seed, block }
    }
}

impl fmt::Display for TransformSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            TransformKind::Hadamard => write!(f, "Hadamard {}", self.block),
        }
    }
}

/// An orthonormal map `T` of rows of a fixed width; cheap to clone. Two are equal when they do the same.
#[derive(Clone)]
pub struct InputTransform {
    width: usize,
    spec: TransformSpec,
    /// `+-1 / sqrt(block)`: one for each input of the whole blocks, then `block` for the second pass where there is one.
    signs: Arc<[f32]>,
}

impl InputTransform {
    /// The transform of `spec` for rows of `width` inputs.
    ///
    /// # Errors
    /// [`PackError::Transform`] when the block is no power of two or larger than the width, or the width above 2^20.
    pub fn new(width: usize, spec: TransformSpec) -> Result<Self, PackError> {
        let block = spec.block;
        if width > WIDEST {
            return Err(PackError::Transform(format!("is for rows of at most {WIDEST}, not of {width}")));
        }
        if !block.is_power_of_two() || block > width.max(1) {
            return Err(PackError::Transform(format!(
                "has blocks of {block}, no power of two up to the width {width}"
            )));
        }
        let whole = width - width % block;
        let n_signs = if whole == width { width } else { whole + block };
        let scale = (1.0 / (block as f64).sqrt()) as f32;
        let mut rng = Rng::new(spec.seed);
        let mut signs = Vec::with_capacity(n_signs);
        while signs.len() < n_signs {
            let bits = rng.next_u64();
            let more = (0..(n_signs - signs.len()).min(64)).map(|i| if bits >> i & 1 == 0 { scale } else { -scale });
            signs.extend(more);
        }
        Ok(InputTransform { width, spec, signs: signs.into() })
    }

    /// The Hadamard transform that [`TransformSpec::hadamard`] chooses.
    ///
    /// # Errors
    /// [`PackError::Transform`] when the width is above 2^20.
    pub fn hadamard(width: usize, seed: u64) -> Result<Self, PackError> {
        InputTransform::new(width, TransformSpec::hadamard(width, seed))
    }

    /// Inputs of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Kind, seed and block.
    pub fn spec(&self) -> TransformSpec {
        self.spec
    }

    /// Seed of the signs.
    pub fn seed(&self) -> u64 {
        self.spec.seed
    }

    /// Inputs that are mixed with each other, a power of two.
    pub fn block(&self) -> usize {
        self.spec.block
    }

    /// `+-1 / sqrt(block)`, by which inputs are multiplied before the butterflies: one for each input of the whole blocks, then
    /// `block` of them for the last `block` inputs where the whole blocks leave a rest.
    pub fn signs(&self) -> &[f32] {
        &self.signs
    }

    /// `x` becomes `T x`; one row, in place, without allocation. Panics when it is not of the transform's width.
    // Always inlined, here and below, so that callers which are compiled for wider vectors get butterflies of that width.
    #[inline(always)]
    pub fn forward(&self, x: &mut [f32]) {
        assert_eq!(x.len(), self.width, "a row of the transform's width");
        let (block, whole) = (self.spec.block, self.width - self.width % self.spec.block);
        for (x, signs) in x.chunks_exact_mut(block).zip(self.signs.chunks_exact(block)) {
            flip(x, signs);
            walsh(x);
        }
        if whole < self.width {
            let last = &mut x[self.width - block..];
            flip(last, &self.signs[whole..]);
            walsh(last);
        }
    }

    /// `x` becomes `T^T x`, which undoes [`InputTransform::forward`]: a row of the base becomes a row of weights.
    #[inline(always)]
    pub fn backward(&self, x: &mut [f32]) {
        assert_eq!(x.len(), self.width, "a row of the transform's width");
        let (block, whole) = (self.spec.block, self.width - self.width % self.spec.block);
        if whole < self.width {
            let last = &mut x[self.width - block..];
            walsh(last);
            flip(last, &self.signs[whole..]);
        }
        for (x, signs) in x.chunks_exact_mut(block).zip(self.signs.chunks_exact(block)) {
            walsh(x);
            flip(x, signs);
        }
    }
}

impl PartialEq for InputTransform {
    fn eq(&self, other: &Self) -> bool {
        (self.width, self.spec) == (other.width, other.spec)
    }
}

impl Eq for InputTransform {}

impl fmt::Debug for InputTransform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InputTransform").field("width", &self.width).field("spec", &self.spec).finish()
    }
}

#[inline(always)]
fn flip(x: &mut [f32], signs: &[f32]) {
    for (x, sign) in x.iter_mut().zip(signs) {
        *x *= sign;
    }
}

/// The Walsh-Hadamard matrix of the size of `x` (a power of two) in its natural order, without its factor: butterflies over
/// pairs at distance 1, 2, 4 and so on.
#[inline(always)]
fn walsh(x: &mut [f32]) {
    let n = x.len();
    if n < LANES {
        let mut half = 1;
        while half < n {
            level(x, half);
            half *= 2;
        }
        return;
    }
    for lanes in x.as_chunks_mut::<LANES>().0 {
        for half in lanes.as_chunks_mut::<HALF_LANES>().0 {
            *half = within::<4>(within::<2>(within::<1>(*half)));
        }
        level(lanes, HALF_LANES);
    }
    let mut half = LANES;
    // Two levels in one pass over the block: the same sums with half the loads and stores.
    while 4 * half <= n {
        for quad in x.chunks_exact_mut(4 * half) {
            let (front, back) = quad.split_at_mut(2 * half);
            let ((a, b), (c, d)) = (front.split_at_mut(half), back.split_at_mut(half));
            for ((a, b), (c, d)) in a.iter_mut().zip(b).zip(c.iter_mut().zip(d)) {
                let (sum, difference) = (*a + *b, *a - *b);
                let (more, less) = (*c + *d, *c - *d);
                (*a, *b, *c, *d) = (sum + more, difference + less, sum - more, difference - less);
            }
        }
        half *= 4;
    }
    if half < n {
        level(x, half);
    }
}

/// The butterflies of one distance.
#[inline(always)]
fn level(x: &mut [f32], half: usize) {
    for pair in x.chunks_exact_mut(2 * half) {
        let (a, b) = pair.split_at_mut(half);
        for (a, b) in a.iter_mut().zip(b) {
            (*a, *b) = (*a + *b, *a - *b);
        }
    }
}

/// The butterflies of one distance inside a vector: a permutation, and a sum with the numbers themselves of which half have
/// the other sign. In this form the compiler finds the shuffles; a choice between sum and difference it takes apart.
#[inline(always)]
fn within<const DISTANCE: usize>(x: [f32; HALF_LANES]) -> [f32; HALF_LANES] {
    let partner: [f32; HALF_LANES] = std::array::from_fn(|i| x[i ^ DISTANCE]);
    let signed: [f32; HALF_LANES] = std::array::from_fn(|i| if i & DISTANCE == 0 { x[i] } else { -x[i] });
    std::array::from_fn(|i| partner[i] + signed[i])
}
