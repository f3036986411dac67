//! Positions whose next-word distribution is needed, and what is kept of each.

use super::Likelihood;
use crate::online::{LogSumExp, Piece};
use crate::task::Subject;
use rayon::prelude::*;
use std::collections::HashMap;
use tailorq_runtime::Device;
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
    /// Takes the logits of the words `first_word..`, of which `largest` is the largest.
    fn look(&mut self, first_word: usize, logits: &[f32], largest: f32) {
        for (word, kept) in &mut self.targets {
            if let Some(logit) = word.checked_sub(first_word).and_then(|at| logits.get(at)) {
                *kept = *logit;
            }
        }
        // Strictly greater: of equals the first word counts.
        if largest > self.best.1
            && let Some(at) = logits.iter().position(|logit| *logit == largest)
        {
            self.best = (first_word + at, largest);
        }
    }
}

/// Takes the logits of the words `first_word..` into all rows, `[rows, words]`.
fn add_all(device: &dyn Device, rows: &mut [Row], first_word: usize, logits: &Matrix) {
    let pieces = Piece::of_rows(device, logits);
    for (row, piece) in rows.iter_mut().zip(&pieces) {
        row.total.merge(*piece);
    }
    let n_words = logits.cols();
    let Some(resident) = device.resident() else {
        let pairs = rows.par_iter_mut().zip(&pieces).zip(logits.data().par_chunks(n_words));
        return pairs.for_each(|((row, piece), logits)| row.look(first_word, logits, piece.max));
    };
    // What leaves the device is a few numbers a row.
    for (row, (word, logit)) in rows.iter_mut().zip(resident.row_max(logits)) {
        if logit > row.best.1 {
            row.best = (first_word + word, logit);
        }
    }
    let within = |word: usize| word.checked_sub(first_word).filter(|at| *at < n_words);
    let at: Vec<(usize, usize)> = (rows.iter().enumerate())
        .flat_map(|(r, row)| row.targets.iter().filter_map(move |(word, _)| Some((r, within(*word)?))))
        .collect();
    let mut found = resident.pick(logits, &at).into_iter();
    let places = rows.iter_mut().flat_map(|row| &mut row.targets).filter(|(word, _)| within(*word).is_some());
    places.for_each(|(_, kept)| *kept = found.next().expect("one logit a place"));
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
            add_all(subject.device, &mut self.rows, words.start, logits);
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
