//! Which predictions a survey compares, and how far two of them are apart.

use super::run::SurveySample;
use super::streams::Streams;
use crate::signals::divergence;
use rayon::prelude::*;
use std::ops::Range;
use tailorq_kernels::Device;
use tailorq_model::{Model, next_token_targets};
use tailorq_tensor::Matrix;

/// Rows whose logits are held at once, twice: with a vocabulary of 150 000 words, 77 MB.
const ROWS: usize = 64;

/// Which predictions are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Judged {
    /// That of each sample's last token, as in the TAQ papers: one number a prompt.
    #[default]
    LastToken,
    /// Those of the scored tokens, averaged over each sample. With the model's own continuations of the prompts for a
    /// completion this still needs no labels, and rests on many more numbers.
    Scored,
}

/// A token whose prediction is judged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub row: usize,
    /// Weights of one sample's places sum to 1.
    pub weight: f64,
    /// Whether it is the sample's last.
    pub is_last: bool,
    /// The token that comes next, where it is known.
    token: Option<u32>,
}

impl Judged {
    /// The judged tokens of a sample that lies from row `first` on.
    pub(super) fn places(self, sample: &SurveySample, first: usize) -> Vec<Place> {
        match self {
            Judged::LastToken => {
                let last = sample.ids.len().checked_sub(1);
                let place = |t| Place { row: first + t, weight: 1.0, is_last: true, token: None };
                last.into_iter().map(place).collect()
            }
            Judged::Scored => {
                let targets = next_token_targets(&sample.ids, sample.scored.as_deref(), first);
                let (n, weight) = (targets.len(), 1.0 / targets.len() as f64);
                let numbered = targets.into_iter().enumerate();
                numbered.map(|(i, t)| Place { row: t.row, weight, is_last: i + 1 == n, token: Some(t.token) }).collect()
            }
        }
    }

    /// The samples that have a judged token at all.
    pub(super) fn judgeable(self, samples: &[SurveySample]) -> Vec<&SurveySample> {
        samples.iter().filter(|s| !self.places(s, 0).is_empty()).collect()
    }

    /// The judged tokens of each batch of streams that were made of these samples, in their order.
    pub(super) fn places_of(self, streams: &Streams<'_, '_>, samples: &[&SurveySample]) -> Vec<Vec<Place>> {
        let mut rest = samples.iter();
        let of_batch = |spans: &[Range<usize>]| -> Vec<Place> {
            spans.iter().zip(rest.by_ref()).flat_map(|(span, sample)| self.places(sample, span.start)).collect()
        };
        streams.batches.iter().map(|b| b.spans.as_slice()).map(of_batch).collect()
    }
}

/// How far predictions are apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Distance {
    /// The divergence of the second from the first, in nats.
    Divergence,
    /// By how much the second predicts the known next token worse, in nats; below 0 where it does better.
    Likelihood,
}

impl Distance {
    fn of(self, place: &Place, clean: &[f32], other: &[f32]) -> f64 {
        match (self, place.token) {
            (Distance::Divergence, _) => divergence(clean, other),
            (Distance::Likelihood, Some(token)) => log_share(clean, token) - log_share(other, token),
            // Without a next token nothing is known.
            (Distance::Likelihood, None) => 0.0,
        }
    }

    /// The weighted sum of distances at these places of two streams behind the last block.
    pub(super) fn sum(
        self,
        (device, model): (&dyn Device, &Model),
        (clean, other): (&Matrix, &Matrix),
        places: &[Place],
    ) -> f64 {
        let logits = |residual: &Matrix, places: &[Place]| {
            let data = places.iter().flat_map(|p| residual.row(p.row)).copied().collect();
            let rows = Matrix::from_vec(places.len(), residual.cols(), data);
            model.logits(device, &model.final_norm(device, &rows))
        };
        let mut total = 0.0;
        for places in places.chunks(ROWS) {
            let (clean, other) = (logits(clean, places), logits(other, places));
            let of_row = |(r, place)| self.of(place, clean.row(r), other.row(r));
            let rows: Vec<f64> = places.par_iter().enumerate().map(of_row).collect();
            total += places.iter().zip(rows).map(|(p, d)| p.weight * d).sum::<f64>();
        }
        total
    }
}

/// The logarithm of a word's probability.
fn log_share(logits: &[f32], token: u32) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    f64::from(logits[token as usize]) - max - sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_by_hand() {
        // Probabilities 1/2, 1/4, 1/4 and 1/4, 1/2, 1/4.
        let (p, q) = ([2f32.ln(), 0.0, 0.0], [7.0, 7.0 + 2f32.ln(), 7.0]);
        let place = |token| Place { row: 0, weight: 1.0, is_last: true, token };
        let of = |token| Distance::Likelihood.of(&place(token), &p, &q);
        assert!((of(Some(0)) - 2f64.ln()).abs() < 1e-6 && (of(Some(1)) + 2f64.ln()).abs() < 1e-6);
        assert_eq!(of(None), 0.0);
        let expected = 0.5 * 2f64.ln() - 0.25 * 2f64.ln();
        assert!((Distance::Divergence.of(&place(None), &p, &q) - expected).abs() < 1e-6);
    }
}
