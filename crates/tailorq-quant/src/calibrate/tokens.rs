//! How much each token counts in a Hessian.

use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::str::FromStr;
use tailorq_kernels::Device;
use tailorq_tensor::Matrix;

/// How much a token counts in a Hessian `sum_t s_t x_t x_t^T`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenWeight {
    /// All tokens alike: the Hessian of GPTQ.
    #[default]
    Uniform,
    /// The first token of each sequence counts nothing, all others alike: it is where massive activations are.
    WithoutFirst,
    /// `1 / |x_t|^2`: tokens of massive activations count like any other.
    InverseNorm,
    /// The mean of the squared gradients of the layer's outputs (GuidedQuant, Kim et al. 2025, with one group).
    Gradient,
    /// That divided by `|x_t|^2`.
    GradientInverseNorm,
}

impl TokenWeight {
    /// Every kind.
    pub const ALL: [TokenWeight; 5] = [
        TokenWeight::Uniform,
        TokenWeight::WithoutFirst,
        TokenWeight::InverseNorm,
        TokenWeight::Gradient,
        TokenWeight::GradientInverseNorm,
    ];

    /// As in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            TokenWeight::Uniform => "uniform",
            TokenWeight::WithoutFirst => "without-first",
            TokenWeight::InverseNorm => "inverse-norm",
            TokenWeight::Gradient => "gradient",
            TokenWeight::GradientInverseNorm => "gradient-inverse-norm",
        }
    }

    /// Whether it reads output gradients, and so differs between linears of one input.
    pub fn reads_gradients(self) -> bool {
        matches!(self, TokenWeight::Gradient | TokenWeight::GradientInverseNorm)
    }

    /// The weight of a token (not a first one, of kinds that leave those out) whose input has the squares `size`; `energy` is what kinds that read gradients multiply with.
    fn weight(self, size: f64, energy: f32) -> f64 {
        let inverse = if size > 0.0 { 1.0 / size } else { 0.0 };
        match self {
            TokenWeight::Uniform | TokenWeight::WithoutFirst => 1.0,
            TokenWeight::InverseNorm => inverse,
            TokenWeight::Gradient => f64::from(energy),
            TokenWeight::GradientInverseNorm => f64::from(energy) * inverse,
        }
    }
}

impl FromStr for TokenWeight {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let names = TokenWeight::ALL.map(TokenWeight::name).join(", ");
        let found = TokenWeight::ALL.into_iter().find(|w| w.name() == s);
        found.ok_or_else(|| format!("there is no token weight '{s}': use one of {names}"))
    }
}

/// The energy of each token's output gradient `dy` `[tokens, out]`: the mean over outputs of its squares.
pub(crate) fn energies(device: &dyn Device, dy: &Matrix) -> Vec<f32> {
    device.row_squares(dy).into_iter().map(|s| (s / dy.cols().max(1) as f64) as f32).collect()
}

/// `H += sum_t s_t x_t x_t^T`, by rows scaled with the square root of their weight. `energies`, one a token, are there
/// when `kind` reads gradients.
pub(crate) fn add_hessian(
    device: &dyn Device,
    (x, energies): (&Matrix, Option<&[f32]>),
    (kind, without_first, spans): (TokenWeight, bool, &[Range<usize>]),
    hessian: &mut Matrix,
) {
    let without_first = without_first || kind == TokenWeight::WithoutFirst;
    if kind == TokenWeight::Uniform && !without_first {
        device.gram_matrix(x, hessian);
        return;
    }
    let mut factors = vec![1.0; x.rows()];
    let sizes = device.row_squares(x);
    for span in spans {
        for t in span.clone() {
            let is_left_out = without_first && t == span.start;
            let weight = if is_left_out { 0.0 } else { kind.weight(sizes[t], energies.map_or(0.0, |e| e[t])) };
            factors[t] = weight.sqrt() as f32;
        }
    }
    device.gram_matrix(&device.scale_rows(x, &factors), hessian);
}

/// The weight of each token of `x`, 0 for rows of no span and for first ones that are left out.
pub(super) fn token_weights(
    device: &dyn Device,
    kind: TokenWeight,
    x: &Matrix,
    energies: Option<&[f32]>,
    spans: &[Range<usize>],
) -> Vec<f32> {
    let mut weights = vec![0.0; x.rows()];
    let sizes = device.row_squares(x);
    let from = |span: &Range<usize>| span.start + usize::from(kind == TokenWeight::WithoutFirst);
    for t in spans.iter().flat_map(|span| from(span)..span.end) {
        weights[t] = kind.weight(sizes[t], energies.map_or(0.0, |e| e[t])) as f32;
    }
    weights
}
