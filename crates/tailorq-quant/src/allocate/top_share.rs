//! The largest scores of all layers together, found without holding or sorting them.
//!
//! TACQ keeps the top 0.35 % of all weights; its reference code concatenates one score for every weight of the model. Here
//! scores stream by twice. A float's bits, with the order of negatives turned round, sort like the float, so the first
//! pass counts the upper 16 bits, which says in which bucket the `k`-th largest lies, and the second counts the lower 16
//! within that bucket: then the threshold is known exactly.

use super::{AllocateError, Saliency};

const BUCKETS: usize = 1 << 16;

/// The first pass. Hand in all layers in any order, then [`TopShare::refine`].
#[derive(Clone, Debug)]
pub struct TopShare {
    counts: Vec<u64>,
    n: u64,
}

impl Default for TopShare {
    fn default() -> Self {
        TopShare { counts: vec![0; BUCKETS], n: 0 }
    }
}

impl TopShare {
    /// Counts the scores of a layer, or of a part of one.
    ///
    /// # Errors
    /// [`AllocateError::Relative`] for scores that mean nothing beside other layers'; [`AllocateError::ScoreNotFinite`].
    pub fn add(&mut self, scores: &Saliency) -> Result<(), AllocateError> {
        scores.check_comparable("the top share of all layers")?;
        for &score in &scores.values {
            let key = key(score).ok_or(AllocateError::ScoreNotFinite { index: self.n, value: f64::from(score) })?;
            self.counts[usize::from((key >> 16) as u16)] += 1;
            self.n += 1;
        }
        Ok(())
    }

    /// Scores so far.
    pub fn n_scores(&self) -> u64 {
        self.n
    }

    /// `floor(share * n_scores)`, for a share from 0 to 1.
    pub fn count_of(&self, share: f64) -> Result<u64, AllocateError> {
        if (0.0..=1.0).contains(&share) {
            Ok((share * self.n as f64).floor() as u64)
        } else {
            Err(AllocateError::Settings(format!("the share is {share}: use one from 0 to 1, such as 0.0035")))
        }
    }

    /// Begins the second pass, for the `k` largest.
    pub fn refine(self, k: u64) -> Result<TopShareRefined, AllocateError> {
        if k > self.n {
            let problem = format!("the {k} largest of {} scores do not exist: ask for fewer", self.n);
            return Err(AllocateError::Settings(problem));
        }
        let (bucket, above) = crossing(&self.counts, k);
        let in_bucket = bucket.map_or(0, |b| self.counts[usize::from(b)]);
        let counts = vec![0; BUCKETS];
        Ok(TopShareRefined { counts, bucket, wanted: k - above, expected: [self.n, in_bucket], seen: [0, 0] })
    }
}

/// The second pass. Hand in the same layers again, then [`TopShareRefined::threshold`].
#[derive(Clone, Debug)]
pub struct TopShareRefined {
    counts: Vec<u64>,
    /// The upper half of the threshold's key; `None` when nothing is selected.
    bucket: Option<u16>,
    /// How many of that bucket are selected.
    wanted: u64,
    /// Scores, and those in the bucket, of the first pass.
    expected: [u64; 2],
    /// The same of the second.
    seen: [u64; 2],
}

impl TopShareRefined {
    /// Counts the scores of a layer again.
    pub fn add(&mut self, scores: &Saliency) -> Result<(), AllocateError> {
        for &score in &scores.values {
            let index = self.seen[0];
            let key = key(score).ok_or(AllocateError::ScoreNotFinite { index, value: f64::from(score) })?;
            self.seen[0] += 1;
            if self.bucket == Some((key >> 16) as u16) {
                self.counts[usize::from(key as u16)] += 1;
                self.seen[1] += 1;
            }
        }
        Ok(())
    }

    /// The exact threshold.
    ///
    /// # Errors
    /// [`AllocateError::PassesDiffer`] when other scores came than in the first pass.
    pub fn threshold(self) -> Result<Threshold, AllocateError> {
        if self.seen[0] != self.expected[0] {
            return Err(AllocateError::PassesDiffer { what: "the number of scores" });
        }
        if self.seen[1] != self.expected[1] {
            return Err(AllocateError::PassesDiffer { what: "scores near the threshold" });
        }
        let Some(bucket) = self.bucket else { return Ok(Threshold { key: u32::MAX, ties: 0 }) };
        let (low, above) = crossing(&self.counts, self.wanted);
        let low = low.ok_or(AllocateError::PassesDiffer { what: "scores near the threshold" })?;
        Ok(Threshold { key: u32::from(bucket) << 16 | u32::from(low), ties: self.wanted - above })
    }
}

/// What separates the `k` largest from the rest. Scores equal to it are taken in the order in which they are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threshold {
    key: u32,
    /// How many scores equal to the threshold are still to be taken.
    ties: u64,
}

impl Threshold {
    /// Calls `visit` with the places, ascending, of the selected among these scores. Over all layers, shown once each,
    /// exactly `k` are selected.
    pub fn select(&mut self, scores: &Saliency, visit: &mut dyn FnMut(usize)) {
        for (i, &score) in scores.values.iter().enumerate() {
            // What is not finite was refused before; here it would simply not be selected.
            let Some(key) = key(score) else { continue };
            let is_tie = key == self.key && self.ties > 0;
            self.ties -= u64::from(is_tie);
            if key > self.key || is_tie {
                visit(i);
            }
        }
    }

    /// The score of the last one selected; `None` when nothing is.
    pub fn score(&self) -> Option<f32> {
        let bits = if self.key >> 31 == 1 { self.key & 0x7fff_ffff } else { !self.key };
        Some(f32::from_bits(bits)).filter(|x| x.is_finite())
    }
}

/// Bits that sort like the score; `None` unless it is finite. Both zeros have the same.
fn key(score: f32) -> Option<u32> {
    let bits = (score + 0.0).to_bits();
    score.is_finite().then_some(if bits >> 31 == 1 { !bits } else { bits | 0x8000_0000 })
}

/// The bucket in which the `k`-th largest lies, and how many lie in those above it. `None` for `k` of 0 or beyond all.
fn crossing(counts: &[u64], k: u64) -> (Option<u16>, u64) {
    let mut above = 0;
    for (bucket, &count) in (0..=u16::MAX).zip(counts).rev() {
        if k > 0 && above + count >= k {
            return (Some(bucket), above);
        }
        above += count;
    }
    (None, 0)
}
