//! Softmax sums over a vocabulary that comes in chunks: nothing of a row is kept but a few f64 numbers.
//!
//! The online log-sum-exp is that of Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".

use rayon::prelude::*;
use tailorq_runtime::Device;
use tailorq_tensor::Matrix;

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

    /// Raises the maximum to that of `logits`; returns the factor by which sums relative to the old maximum shrink.
    fn raise(&mut self, logits: &[f32]) -> f64 {
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        if max <= self.max {
            return 1.0;
        }
        let shrink = (self.max - max).exp();
        self.max = max;
        self.sum *= shrink;
        shrink
    }

    pub(crate) fn add(&mut self, logits: &[f32]) {
        self.raise(logits);
        self.sum += logits.iter().map(|l| (f64::from(*l) - self.max).exp()).sum::<f64>();
    }

    /// Takes in a piece whose largest element is `max` and whose `sum exp(x - max)` is `sum`.
    pub(crate) fn merge(&mut self, max: f32, sum: f64) {
        self.raise(&[max]);
        self.sum += sum * (f64::from(max) - self.max).exp();
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

    /// Takes the logits of the words `first_word..`.
    pub(crate) fn add(&mut self, first_word: usize, logits: &[f32]) {
        self.total.add(logits);
        if let Some(logit) = self.target.checked_sub(first_word).and_then(|at| logits.get(at)) {
            self.logit = f64::from(*logit);
        }
    }

    /// Takes the logits of the words `first_word..` into all rows, `[rows, words]`.
    pub(crate) fn add_all(device: &dyn Device, rows: &mut [TargetNll], first_word: usize, logits: &Matrix) {
        let n_words = logits.cols();
        let Some(resident) = device.resident() else {
            let pairs = rows.par_iter_mut().zip(logits.data().par_chunks(n_words));
            return pairs.for_each(|(row, logits)| row.add(first_word, logits));
        };
        // What leaves the device is a few numbers a row.
        let mut sums = vec![Default::default(); rows.len()];
        resident.log_sum_exp(logits, &mut sums);
        let place = |(r, row): (usize, &TargetNll)| Some((r, row.target.checked_sub(first_word)?));
        let at: Vec<(usize, usize)> = rows.iter().enumerate().filter_map(place).filter(|(_, w)| *w < n_words).collect();
        for (&(r, _), logit) in at.iter().zip(resident.pick(logits, &at)) {
            rows[r].logit = f64::from(logit);
        }
        rows.iter_mut().zip(sums).for_each(|(row, sum)| row.total.merge(sum.max, sum.sum));
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

    /// Takes both models' logits of the words `first_word..`.
    pub(crate) fn add(&mut self, first_word: usize, reference: &[f32], model: &[f32]) {
        let sums = &mut self.reference.total;
        self.cross *= sums.raise(reference);
        for (r, m) in reference.iter().zip(model) {
            let weight = (f64::from(*r) - sums.max).exp();
            sums.sum += weight;
            self.cross += weight * (f64::from(*r) - f64::from(*m));
        }
        if let Some(logit) = self.reference.target.checked_sub(first_word).and_then(|at| reference.get(at)) {
            self.reference.logit = f64::from(*logit);
        }
        self.model.add(first_word, model);
        for (best, logits) in self.best.iter_mut().zip([reference, model]) {
            for (word, &logit) in (first_word..).zip(logits) {
                // Strictly greater: of equals the first word counts, in both models.
                if logit > best.1 {
                    *best = (word, logit);
                }
            }
        }
    }

    /// Nats. Rounding may leave a tiny negative number where the distributions agree; it counts as 0.
    pub(crate) fn kl(&self) -> f64 {
        let lse = self.reference.total.value() - self.model.total.value();
        let kl = self.cross / self.reference.total.sum - lse;
        if kl < 0.0 && kl > -1e-9 { 0.0 } else { kl }
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

    fn softmax(logits: &[f32]) -> Vec<f64> {
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let exps: Vec<f64> = logits.iter().map(|l| (f64::from(*l) - max).exp()).collect();
        let sum: f64 = exps.iter().sum();
        exps.iter().map(|e| e / sum).collect()
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
                online.add(i * chunk, rc, mc);
                nll.add(i * chunk, mc);
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

    #[test]
    fn damaged_logits_give_no_finite_number() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut nll = TargetNll::new(0);
            nll.add(0, &[1.0, bad, 2.0]);
            assert!(!nll.value().is_finite());
            let mut pair = PairDivergence::new(0);
            pair.add(0, &[1.0, 0.0], &[1.0, bad]);
            assert!(!pair.kl().is_finite());
        }
        assert!(TargetNll::new(3).value().is_nan());
    }
}
