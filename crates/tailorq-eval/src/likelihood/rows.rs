//! Positions whose next-word distribution is needed, and what is kept of each.

use super::Likelihood;
use crate::online::LogSumExp;
use crate::task::Subject;
use rayon::prelude::*;
use std::collections::HashMap;
use tailorq_tensor::Matrix;

/// A position of an item: of its shared part (`branch` is none) or of a branch's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) item: usize,
    pub(super) branch: Option<usize>,
    /// Counted from the beginning of the input.
    pub(super) position: usize,
}

/// The distribution of one position.
#[derive(Clone, Debug)]
struct Row {
    /// Words whose logits are asked for.
    targets: Vec<(usize, f32)>,
    total: LogSumExp,
    best: (usize, f32),
}

impl Row {
    fn add(&mut self, first_word: usize, logits: &[f32]) {
        self.total.add(logits);
        for (word, kept) in &mut self.targets {
            if let Some(logit) = word.checked_sub(first_word).and_then(|at| logits.get(at)) {
                *kept = *logit;
            }
        }
        for (word, &logit) in (first_word..).zip(logits) {
            // Strictly greater: of equals the first word counts.
            if logit > self.best.1 {
                self.best = (word, logit);
            }
        }
    }
}

/// Hidden states `[n, hidden]` of the positions that are needed.
#[derive(Debug, Default)]
pub(super) struct Rows {
    hidden: Vec<f32>,
    rows: Vec<Row>,
    at: HashMap<Place, usize>,
}

impl Rows {
    /// Keeps the hidden state of a place.
    pub(super) fn push(&mut self, place: Place, hidden: &[f32]) {
        self.at.insert(place, self.rows.len());
        self.rows.push(Row { targets: Vec::new(), total: LogSumExp::new(), best: (0, f32::NEG_INFINITY) });
        self.hidden.extend_from_slice(hidden);
    }

    /// Asks for the probability of `target` after a place.
    pub(super) fn ask(&mut self, place: Place, target: u32) -> Asked {
        let row = *self.at.get(&place).expect("every position that predicts a target was kept");
        let targets = &mut self.rows[row].targets;
        targets.push((target as usize, f32::NAN));
        Asked { row, target: targets.len() - 1 }
    }

    /// Sends all kept rows through the head.
    pub(super) fn compute(&mut self, subject: &Subject<'_>) {
        let n = self.rows.len();
        if n == 0 {
            return;
        }
        let hidden = Matrix::from_vec(n, self.hidden.len() / n, std::mem::take(&mut self.hidden));
        subject.model.for_each_logits(subject.device, &hidden, &mut |words, logits| {
            let rows = self.rows.par_iter_mut().zip(logits.par_chunks(words.len()));
            rows.for_each(|(row, logits)| row.add(words.start, logits));
        });
    }

    /// The likelihood of a sequence of targets.
    pub(super) fn likelihood(&self, asked: &[Asked]) -> Likelihood {
        let mut likelihood = Likelihood { sum: 0.0, is_greedy: true };
        for &Asked { row, target } in asked {
            let row = &self.rows[row];
            let (word, logit) = row.targets[target];
            likelihood.sum += f64::from(logit) - row.total.value();
            likelihood.is_greedy &= row.best.0 == word;
        }
        likelihood
    }
}

/// Where the answer to [`Rows::ask`] will be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    row: usize,
    target: usize,
}
