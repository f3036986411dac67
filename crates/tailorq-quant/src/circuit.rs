//! Which single weights carry the task: scores of every element, and the top ones of all layers together.
//!
//! TACQ (Xiao et al. 2025, arXiv 2504.07389) keeps the elements with the largest `|w| |dL/dw| |Q(w) - w|`: by how much the
//! loss would change, to first order, if the weight became its quantized value (their quantization-aware localization),
//! sharpened by the weight's magnitude. The other signals are its factors, and controls that a claim about tasks has to
//! beat.

use serde::{Deserialize, Serialize};
use std::str::FromStr;
use tailorq_tensor::Rng;

/// What makes an element worth 16 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CircuitSignal {
    /// `|w| G |Q(w) - w|` with `G` the sum over samples of `|dL/dw|`: TACQ.
    #[default]
    Tacq,
    /// `G |Q(w) - w|`: quantization-aware localization alone.
    Qal,
    /// `|w| G`: the magnitude-sharpened gradient alone.
    Msg,
    /// `F (Q(w) - w)^2` with `F` the sum over samples of `(dL/dw)^2`: the second-order loss of a diagonal Fisher information.
    Fisher,
    /// `G`.
    Gradient,
    /// `|Q(w) - w|`; no gradients.
    Error,
    /// `|w|`; no data at all.
    Magnitude,
    /// `|w| sqrt(H_jj)` with `H` the Hessian of the inputs; no gradients.
    MagnitudeHessian,
    /// A seeded draw.
    Random,
}

impl CircuitSignal {
    /// Every signal.
    pub const ALL: [CircuitSignal; 9] = [
        CircuitSignal::Tacq,
        CircuitSignal::Qal,
        CircuitSignal::Msg,
        CircuitSignal::Fisher,
        CircuitSignal::Gradient,
        CircuitSignal::Error,
        CircuitSignal::Magnitude,
        CircuitSignal::MagnitudeHessian,
        CircuitSignal::Random,
    ];

    /// As in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            CircuitSignal::Tacq => "tacq",
            CircuitSignal::Qal => "qal",
            CircuitSignal::Msg => "msg",
            CircuitSignal::Fisher => "fisher",
            CircuitSignal::Gradient => "gradient",
            CircuitSignal::Error => "error",
            CircuitSignal::Magnitude => "magnitude",
            CircuitSignal::MagnitudeHessian => "magnitude-hessian",
            CircuitSignal::Random => "random",
        }
    }

    /// Reads the sum over samples of `|dL/dw|`.
    pub fn reads_absolute(self) -> bool {
        use CircuitSignal::{Gradient, Msg, Qal, Tacq};
        matches!(self, Tacq | Qal | Msg | Gradient)
    }

    /// Reads the sum over samples of `(dL/dw)^2`.
    pub fn reads_square(self) -> bool {
        self == CircuitSignal::Fisher
    }

    /// Reads quantized values of the weights.
    pub fn reads_reference(self) -> bool {
        use CircuitSignal::{Error, Fisher, Qal, Tacq};
        matches!(self, Tacq | Qal | Fisher | Error)
    }

    /// Reads the energies of the inputs.
    pub fn reads_inputs(self) -> bool {
        self == CircuitSignal::MagnitudeHessian
    }

    /// The scores of one row of a layer into `scores`. What the signal does not read may be empty, all else is as long as
    /// `weights`.
    pub fn score_row(self, row: &ElementRow<'_>, rng: &mut Rng, scores: &mut [f32]) {
        let n = row.weights.len();
        assert_eq!(scores.len(), n, "one score a weight");
        let error = |i: usize| (row.reference[i] - row.weights[i]).abs();
        let weight = |i: usize| row.weights[i].abs();
        for (i, score) in scores.iter_mut().enumerate() {
            *score = match self {
                CircuitSignal::Tacq => weight(i) * row.gradient[i] * error(i),
                CircuitSignal::Qal => row.gradient[i] * error(i),
                CircuitSignal::Msg => weight(i) * row.gradient[i],
                CircuitSignal::Fisher => row.gradient[i] * error(i) * error(i),
                CircuitSignal::Gradient => row.gradient[i],
                CircuitSignal::Error => error(i),
                CircuitSignal::Magnitude => weight(i),
                CircuitSignal::MagnitudeHessian => weight(i) * row.inputs[i].sqrt(),
                CircuitSignal::Random => rng.uniform() as f32,
            };
        }
    }
}

impl FromStr for CircuitSignal {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let names = CircuitSignal::ALL.map(CircuitSignal::name).join(", ");
        let found = CircuitSignal::ALL.into_iter().find(|signal| signal.name() == s);
        found.ok_or_else(|| format!("there is no circuit signal '{s}': use one of {names}"))
    }
}

/// One row of a layer and what is known of its weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct ElementRow<'a> {
    /// The weights.
    pub weights: &'a [f32],
    /// Their quantized values.
    pub reference: &'a [f32],
    /// Sums over samples of gradients: absolute ones, or squares for [`CircuitSignal::Fisher`].
    pub gradient: &'a [f32],
    /// `H_jj`, up to a factor that all layers share.
    pub inputs: &'a [f32],
}

/// The `n` elements with the largest scores of all layers together, found in one pass without holding all scores: at most
/// `2 n` are in memory. Ties go to the earlier layer, then to the earlier element. Scores are not NaN.
#[derive(Debug)]
pub struct TopElements {
    n: usize,
    /// Score, layer, row-major index.
    pool: Vec<(f32, u32, u64)>,
    /// Below this nothing can be among the top any more.
    least: f32,
}

impl TopElements {
    /// For the top `n`.
    pub fn new(n: usize) -> Self {
        TopElements { n, pool: Vec::new(), least: f32::NEG_INFINITY }
    }

    /// Takes in scores of a layer, those from element `first` on.
    pub fn push(&mut self, layer_idx: usize, first: usize, scores: &[f32]) {
        let mut candidates = Vec::new();
        self.candidates(first, scores, &mut candidates);
        self.take(layer_idx, &candidates);
    }

    /// Of scores from element `first` of a layer on, adds those that may be among the top, with their elements, to `found`.
    pub fn candidates(&self, first: usize, scores: &[f32], found: &mut Vec<(f32, u64)>) {
        let numbered = scores.iter().enumerate().filter(|(_, s)| **s >= self.least);
        found.extend(numbered.map(|(i, &score)| (score, (first + i) as u64)));
    }

    /// Takes in candidates of a layer.
    pub fn take(&mut self, layer_idx: usize, candidates: &[(f32, u64)]) {
        self.pool.extend(candidates.iter().map(|&(score, element)| (score, layer_idx as u32, element)));
        if self.pool.len() >= 2 * self.n.max(1 << 16) {
            self.prune();
        }
    }

    fn prune(&mut self) {
        if self.pool.len() > self.n {
            let order =
                |a: &(f32, u32, u64), b: &(f32, u32, u64)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2));
            if self.n == 0 {
                self.least = f32::INFINITY;
            } else {
                self.least = self.pool.select_nth_unstable_by(self.n - 1, order).1.0;
            }
            self.pool.truncate(self.n);
        }
    }

    /// The row-major indices of the chosen elements of each of `n_layers` layers, ascending.
    pub fn finish(mut self, n_layers: usize) -> Vec<Vec<usize>> {
        self.prune();
        let mut layers = vec![Vec::new(); n_layers];
        self.pool.iter().for_each(|&(_, layer, index)| layers[layer as usize].push(index as usize));
        layers.iter_mut().for_each(|indices| indices.sort_unstable());
        layers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_is_that_of_a_sort() {
        let mut rng = Rng::new(3);
        for (n_layers, size, n) in [(3, 70_000, 500), (2, 100_000, 70_000), (1, 10, 20), (2, 50, 0)] {
            // Coarse scores, so that many are equal.
            let layers: Vec<Vec<f32>> =
                (0..n_layers).map(|_| (0..size).map(|_| (rng.uniform() * 1000.0).floor() as f32).collect()).collect();
            let mut all: Vec<(f32, usize, usize)> = layers
                .iter()
                .enumerate()
                .flat_map(|(l, scores)| scores.iter().enumerate().map(move |(i, &s)| (s, l, i)))
                .collect();
            // A stable sort leaves ties in the order of layers and elements.
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            let mut expected = vec![Vec::new(); n_layers];
            all.iter().take(n).for_each(|&(_, l, i)| expected[l].push(i));
            expected.iter_mut().for_each(|e| e.sort_unstable());
            let mut top = TopElements::new(n);
            for (l, scores) in layers.iter().enumerate() {
                for (i, part) in scores.chunks(4096).enumerate() {
                    top.push(l, i * 4096, part);
                }
            }
            assert_eq!(top.finish(n_layers), expected, "{n} of {n_layers} x {size}");
        }
    }

    #[test]
    fn signals_are_products_of_their_factors() {
        let row =
            ElementRow { weights: &[2.0, -3.0], reference: &[1.5, -3.0], gradient: &[4.0, 5.0], inputs: &[9.0, 16.0] };
        let expected = [
            [2.0 * 4.0 * 0.5, 0.0],
            [4.0 * 0.5, 0.0],
            [8.0, 15.0],
            [4.0 * 0.25, 0.0],
            [4.0, 5.0],
            [0.5, 0.0],
            [2.0, 3.0],
            [6.0, 12.0],
        ];
        for (signal, expected) in CircuitSignal::ALL.into_iter().zip(expected) {
            let mut scores = [0.0; 2];
            signal.score_row(&row, &mut Rng::new(1), &mut scores);
            assert_eq!(scores, expected, "{}", signal.name());
            assert_eq!(signal.name().parse(), Ok(signal));
        }
        assert!("magic".parse::<CircuitSignal>().unwrap_err().contains("tacq"));
    }
}
