//! Rounding a whole layer on a device: the plain numbers that go in and come out.
//!
//! The meaning is that of the quantizers `rtn` and `gptq`, which ask a device first and compute themselves what it declines.

use half::f16;
use tailorq_tensor::{Layout, Matrix, SharedBytes};

/// A layer whose weights become codes on affine grids, one grid for each row and group. A grid is fitted when its first column
/// comes, to what the group's weights have become by then; without feedback that is to the weights themselves.
#[derive(Clone, Copy, Debug)]
pub struct RoundingJob<'a> {
    /// `[out, in]`.
    pub weights: &'a Matrix,
    /// Columns are rounded one after another, and the error of each is spread over those to come; `None` rounds to nearest.
    pub feedback: Option<ErrorFeedback<'a>>,
    /// Width of the codes, length of the groups, and whether the zero point is fixed.
    pub layout: Layout,
    /// The search for each grid's clipping; `None` takes the extremes.
    pub clip: Option<ClipCandidates<'a>>,
    /// Elements that stay at 16 bits and have no say in the grids.
    pub kept: Option<KeptElements<'a>>,
}

/// With `H^-1 = U^T U`, column `j` leaves the error `e = (w_j - q_j) / U_jj`, and later columns become `w_k - e U_jk`
/// (Frantar et al. 2022, arXiv 2210.17323). Columns come in their natural order.
#[derive(Clone, Copy, Debug)]
pub struct ErrorFeedback<'a> {
    /// `U`, `[in, in]`, upper triangular.
    pub upper: &'a Matrix,
    /// `1 / U_jj`, finite.
    pub inverse_diagonal: &'a [f32],
    /// By column: the input was never active, so its errors are no loss.
    pub dead: &'a [bool],
    /// What the damping added to the diagonal of `H`.
    pub added: f64,
}

/// Which clippings are tried, in this order; one that is no better than those before it is not taken.
#[derive(Clone, Copy, Debug)]
pub struct ClipCandidates<'a> {
    /// Factors on the range from the least to the largest weight (and 0), each above 0; the first is 1.
    pub factors: &'a [f32],
    /// The exponent of the errors whose sum is minimised.
    pub norm: f32,
    /// By column: a factor on the error; `None` weighs all alike.
    pub importance: Option<&'a [f32]>,
}

/// Elements of a matrix, row by row.
#[derive(Clone, Copy, Debug)]
pub struct KeptElements<'a> {
    /// Where each row begins in `columns`, and the end of the last: one more than there are rows.
    pub starts: &'a [usize],
    /// Ascending within a row, each inside the matrix.
    pub columns: &'a [u32],
}

/// What a [`RoundingJob`] gives.
#[derive(Clone, Debug)]
pub struct Rounded {
    /// The plane `codes` of [`tailorq_tensor::PackedParts`].
    pub codes: SharedBytes,
    /// Its plane of high bits, where the layout has one.
    pub codes_high: Option<SharedBytes>,
    /// `[out, groups]`; rounded before codes were chosen.
    pub scales: Vec<f16>,
    /// `[out, groups]`: the codes of 0.
    pub zeros: Vec<u8>,
    /// What is added to the base value of each kept element, in their order: it brings the value to what the weight had become
    /// when its column came.
    pub corrections: Vec<f16>,
    /// `|W|_F^2`.
    pub weight_energy: f64,
    /// `|W - Q|_F^2`.
    pub error_energy: f64,
    /// `tr(E H E^T)` with `E = W - Q` and without the damping; 0 without feedback.
    pub loss: f64,
}
