//! Softmax sums over a vocabulary that comes in chunks: nothing of a row is kept but a few f64 numbers.
//!
//! The online log-sum-exp is that of Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".

use tailorq_runtime::Device;
use tailorq_tensor::Matrix;

/// Some of the numbers of a row: the largest, and the `sum exp(x - max)` that a device makes of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) max: f32,
    pub(crate) sum: f64,
}

impl Piece {
    /// Of every row of `logits`.
    pub(crate) fn of_rows(device: &dyn Device, logits: &Matrix) -> Vec<Piece> {
        let mut sums = vec![Default::default(); logits.rows()];
        device.log_sum_exp_matrix(logits, &mut sums);
        sums.into_iter().map(|sum| Piece { max: sum.max, sum: sum.sum }).collect()
    }
}

/// `log sum exp` of numbers that come in pieces.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogSumExp {
    max: f64,
    /// `sum exp(x - max)`.
    sum: f64,
}

impl LogSumExp {
    pub(crate) fn new() -> Self {
        LogSumExp { max: f64::NEG_INFINITY, sum: 0.0 }
    }

    /// Takes in a piece; returns the factor by which sums relative to the maximum so far shrink.
    pub(crate) fn merge(&mut self, piece: Piece) -> f64 {
        let max = f64::from(piece.max);
        let mut shrink = 1.0;
        if max > self.max {
            shrink = (self.max - max).exp();
            self.max = max;
            self.sum *= shrink;
        }
        if piece.sum != 0.0 {
            self.sum += piece.sum * (max - self.max).exp();
        }
        shrink
    }

    pub(crate) fn value(&self) -> f64 {
        self.max + self.sum.ln()
    }
}

/// The negative log-likelihood of one target, in nats.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TargetNll {
    target: usize,
    logit: f64,
    total: LogSumExp,
}

impl TargetNll {
    pub(crate) fn new(target: u32) -> Self {
        TargetNll { target: target as usize, logit: f64::NAN, total: LogSumExp::new() }
    }

    /// Takes the logits of the words `first_word..`, of which `piece` tells the sum; returns as [`LogSumExp::merge`].
    fn add(&mut self, first_word: usize, logits: &[f32], piece: Piece) -> f64 {
        if let Some(logit) = self.target.checked_sub(first_word).and_then(|at| logits.get(at)) {
            self.logit = f64::from(*logit);
        }
        self.total.merge(piece)
    }

    /// Takes the logits of the words `first_word..` into all rows, `[rows, words]`.
    pub(crate) fn add_all(device: &dyn Device, rows: &mut [TargetNll], first_word: usize, logits: &Matrix) {
        let pieces = Piece::of_rows(device, logits);
        let Some(resident) = device.resident() else {
            for (r, (row, piece)) in rows.iter_mut().zip(pieces).enumerate() {
                row.add(first_word, logits.row(r), piece);
            }
            return;
        };
        // What leaves the device is a few numbers a row.
        let n_words = logits.cols();
        let place = |(r, row): (usize, &TargetNll)| Some((r, row.target.checked_sub(first_word)?));
        let at: Vec<(usize, usize)> = rows.iter().enumerate().filter_map(place).filter(|(_, w)| *w < n_words).collect();
        for (&(r, _), logit) in at.iter().zip(resident.pick(logits, &at)) {
            rows[r].logit = f64::from(logit);
        }
        rows.iter_mut().zip(pieces).for_each(|(row, piece)| _ = row.total.merge(piece));
    }

    /// `log sum exp` of all logits so far.
    pub(crate) fn log_sum(&self) -> f64 {
        self.total.value()
    }

    /// NaN when the target never came.
    pub(crate) fn value(&self) -> f64 {
        self.total.value() - self.logit
    }
}

/// `KL(reference || model)` of one position, and whether both name the same most likely word.
///
/// With logits `r` and `m`: `KL = sum p_r (r - m) - (lse(r) - lse(m))`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PairDivergence {
    reference: TargetNll,
    model: TargetNll,
    /// `sum exp(r - max r) (r - m)`.
    cross: f64,
    best: [(usize, f32); 2],
}

impl PairDivergence {
    pub(crate) fn new(target: u32) -> Self {
        let nll = TargetNll::new(target);
        PairDivergence { reference: nll, model: nll, cross: 0.0, best: [(0, f32::NEG_INFINITY); 2] }
    }

    /// Takes both models' logits of the words `first_word..`, with the pieces that they are.
    pub(crate) fn add(
        &mut self,
        first_word: usize,
        (reference, reference_piece): (&[f32], Piece),
        (model, piece): (&[f32], Piece),
    ) {
        self.cross *= self.reference.add(first_word, reference, reference_piece);
        self.model.add(first_word, model, piece);
        let max = self.reference.total.max;
        for (r, m) in reference.iter().zip(model) {
            let (r, m) = (f64::from(*r), f64::from(*m));
            self.cross += (r - max).exp() * (r - m);
        }
        for (best, logits) in self.best.iter_mut().zip([reference, model]) {
            for (word, &logit) in (first_word..).zip(logits) {
                // Strictly greater: of equals the first word counts, in both models.
                if logit > best.1 {
                    *best = (word, logit);
                }
            }
        }
    }

    /// Nats. Rounding, also that of the device's sums, may leave a tiny negative number where the distributions agree; it
    /// counts as 0.
    pub(crate) fn kl(&self) -> f64 {
        let lse = self.reference.total.value() - self.model.total.value();
        let kl = self.cross / self.reference.total.sum - lse;
        if kl < 0.0 && kl > -1e-6 { 0.0 } else { kl }
    }

    pub(crate) fn agrees(&self) -> bool {
        self.best[0].0 == self.best[1].0
    }

    pub(crate) fn nll(&self) -> f64 {
        self.model.value()
    }

    pub(crate) fn reference_nll(&self) -> f64 {
        self.reference.value()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// In f64 throughout.
    fn piece(logits: &[f32]) -> Piece {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        Piece { max, sum: logits.iter().map(|l| (f64::from(*l) - f64::from(max)).exp()).sum() }
    }

    fn softmax(logits: &[f32]) -> Vec<f64> {
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let exps: Vec<f64> = logits.iter().map(|l| (f64::from(*l) - max).exp()).collect();
        let sum: f64 = exps.iter().sum();
        exps.iter().map(|e| e / sum).collect()
    }

    #[test]
    fn words_that_cannot_be_add_nothing() {
        let nothing = Piece { max: f32::NEG_INFINITY, sum: 0.0 };
        let mut sum = LogSumExp { max: f64::NEG_INFINITY, sum: 0.0 };
        for piece in [nothing, piece(&[1.0, 2.0]), nothing] {
            sum.merge(piece);
        }
        assert!((sum.value() - (1f64.exp() + 2f64.exp()).ln()).abs() < 1e-12);
    }

    proptest! {
        #[test]
        fn pieces_give_what_the_whole_gives(
            pairs in prop::collection::vec((-60f32..60.0, -60f32..60.0), 1..40),
            chunk in 1usize..12,
            target in 0usize..40,
        ) {
            let target = target % pairs.len();
            let (r, m): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let mut online = PairDivergence::new(target as u32);
            let mut nll = TargetNll::new(target as u32);
            for (i, (rc, mc)) in r.chunks(chunk).zip(m.chunks(chunk)).enumerate() {
                online.add(i * chunk, (rc, piece(rc)), (mc, piece(mc)));
                nll.add(i * chunk, mc, piece(mc));
            }
            let (p, q) = (softmax(&r), softmax(&m));
            let kl: f64 = p.iter().zip(&q).filter(|(p, _)| **p > 0.0).map(|(p, q)| p * (p / q).ln()).sum();
            prop_assert!((online.kl() - kl).abs() < 1e-9 * (1.0 + kl.abs()), "{} {kl}", online.kl());
            prop_assert!((online.nll() + q[target].ln()).abs() < 1e-9 * 120.0);
            prop_assert!((online.reference_nll() + p[target].ln()).abs() < 1e-9 * 120.0);
            prop_assert_eq!(nll.value(), online.nll());
            let first_best = |x: &[f32]| x.iter().enumerate().fold(0, |b, (i, v)| if *v > x[b] { i } else { b });
            prop_assert_eq!(online.agrees(), first_best(&r) == first_best(&m));
        }
    }

    /// What the device sums of a whole vocabulary, beside f64 throughout.
    #[test]
    fn all_rows_at_once_are_within_a_millionth() {
        let device = tailorq_kernels::cpu();
        let (words, chunk) = (9000, 4096);
        let logits: Vec<f32> = (0..4 * words).map(|i| ((i * 7919 % 10_007) as f32 / 10_007.0 - 0.5) * 40.0).collect();
        let targets = [0, 4095, 4096, 8999];
        let mut rows = targets.map(TargetNll::new);
        for first in (0..words).step_by(chunk) {
            let n = chunk.min(words - first);
            let part = logits.chunks(words).flat_map(|row| row[first..first + n].to_vec()).collect();
            TargetNll::add_all(device.as_ref(), &mut rows, first, &Matrix::from_vec(4, n, part));
        }
        for (row, logits) in rows.iter().zip(logits.chunks(words)) {
            let mut exact = TargetNll::new(row.target as u32);
            exact.add(0, logits, piece(logits));
            assert!((row.value() - exact.value()).abs() < 1e-6, "{} {}", row.value(), exact.value());
        }
    }

    #[test]
    fn damaged_logits_give_no_finite_number() {
        for bad in [f32::NAN, f32::INFINITY] {
            let device = tailorq_kernels::cpu();
            let logits = Matrix::from_vec(1, 3, vec![1.0, bad, 2.0]);
            let mut rows = [TargetNll::new(0)];
            TargetNll::add_all(device.as_ref(), &mut rows, 0, &logits);
            assert!(!rows[0].value().is_finite());
            let mut pair = PairDivergence::new(0);
            let good = [1.0, 0.0, 0.0];
            pair.add(0, (&good, piece(&good)), (logits.row(0), Piece::of_rows(device.as_ref(), &logits)[0]));
            assert!(!pair.kl().is_finite());
        }
        assert!(TargetNll::new(3).value().is_nan());
    }
}
