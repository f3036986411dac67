//! What log-likelihoods decide, and what many decisions come to.

use crate::likelihood::Likelihood;
use crate::metric::Metric;
use serde_json::{Map, Value};

/// A model's decision on an item.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Verdict {
    /// Sum of each choice, in nats.
    pub(crate) loglikelihoods: Vec<f64>,
    /// Whether greedy decoding would write each choice.
    pub(crate) is_greedy: Vec<bool>,
    /// The most likely choice.
    pub(crate) prediction: usize,
    /// The most likely choice by its length.
    pub(crate) prediction_norm: usize,
    /// The right choice.
    pub(crate) gold: usize,
}

impl Verdict {
    /// `lengths` are the choices' code points.
    pub(crate) fn new(likelihoods: &[Likelihood], lengths: &[usize], gold: usize) -> Self {
        let loglikelihoods: Vec<f64> = likelihoods.iter().map(|l| l.sum).collect();
        let by_length = loglikelihoods.iter().zip(lengths).map(|(sum, length)| sum / *length as f64);
        Verdict {
            prediction: first_largest(loglikelihoods.iter().copied()),
            prediction_norm: first_largest(by_length),
            is_greedy: likelihoods.iter().map(|l| l.is_greedy).collect(),
            loglikelihoods,
            gold,
        }
    }

    /// `acc`.
    pub(crate) fn is_right(&self) -> bool {
        self.prediction == self.gold
    }

    /// `acc_norm`.
    pub(crate) fn is_right_by_length(&self) -> bool {
        self.prediction_norm == self.gold
    }
}

/// The place of the largest number, of equals the first.
fn first_largest(values: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (at, value) in values.enumerate() {
        if value > best.1 {
            best = (at, value);
        }
    }
    best.0
}

/// A share with its standard error and interval, under the harness' names.
pub(crate) fn insert_share(details: &mut Map<String, Value>, metric: &str, hits: &[bool]) -> f64 {
    let values: Vec<f64> = hits.iter().map(|hit| f64::from(u8::from(*hit))).collect();
    let share = Metric::of_scores(&values);
    share.tell(&format!("{metric},none"), details);
    share.value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(sums: &[f64], lengths: &[usize], gold: usize) -> Verdict {
        let likelihoods: Vec<Likelihood> = sums.iter().map(|&sum| Likelihood { sum, is_greedy: false }).collect();
        Verdict::new(&likelihoods, lengths, gold)
    }

    #[test]
    fn length_decides_by_code_points_and_ties_by_place() {
        let long = verdict(&[-4.0, -6.0], &[2, 6], 1);
        assert_eq!((long.prediction, long.prediction_norm), (0, 1));
        assert!(!long.is_right() && long.is_right_by_length());
        let tied = verdict(&[-3.0, -2.0, -2.0], &[3, 2, 2], 2);
        assert_eq!((tied.prediction, tied.prediction_norm), (1, 0));
    }
}
