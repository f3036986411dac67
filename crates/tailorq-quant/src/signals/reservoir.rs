//! Which tokens stand for all when every one is too many.

use tailorq_tensor::{Matrix, Rng};

/// How tokens are drawn. The default is what the TAQ authors' script does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Tokens kept.
    pub size: usize,
    /// Prompts that are looked at together; at least 1.
    pub prompts_per_batch: usize,
    /// Tokens of such a batch that are candidates at all, at most.
    pub candidates_per_batch: usize,
    /// Leave the first token of every prompt out: in many models an attention sink whose huge activations would be
    /// the whole of a covariance.
    pub without_first: bool,
    /// Seed of the draw.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { size: 256, prompts_per_batch: 8, candidates_per_batch: 128, without_first: false, seed: 0 }
    }
}

/// A reservoir sample (Vitter 1985, algorithm R) of the tokens of some prompts.
///
/// What a token's vectors hold has no part in the draw, so it is made once, before any block runs, and serves all of them:
/// blocks are compared on the same tokens, and only the sampled vectors of the block in work need memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservoir {
    /// Places of the tokens among those of all prompts laid end to end, ascending.
    tokens: Vec<usize>,
}

impl Reservoir {
    /// Draws from prompts of these lengths. Empty prompts do not count, not even towards a batch.
    pub fn draw(lengths: &[usize], sampling: &Sampling) -> Self {
        let mut rng = Rng::new(sampling.seed);
        let (mut tokens, mut n_offered, mut first) = (Vec::new(), 0, 0);
        let lengths: Vec<usize> = lengths.iter().copied().filter(|&n| n > 0).collect();
        for batch in lengths.chunks(sampling.prompts_per_batch.max(1)) {
            let mut places = Vec::new();
            for &length in batch {
                places.extend(first + usize::from(sampling.without_first)..first + length);
                first += length;
            }
            for token in candidates(&mut rng, places, sampling.candidates_per_batch) {
                n_offered += 1;
                if tokens.len() < sampling.size {
                    tokens.push(token);
                } else {
                    let place = rng.below(n_offered);
                    if let Some(kept) = tokens.get_mut(place) {
                        *kept = token;
                    }
                }
            }
        }
        tokens.sort_unstable();
        Reservoir { tokens }
    }

    /// Places of the tokens among those of all prompts laid end to end, ascending.
    pub fn tokens(&self) -> &[usize] {
        &self.tokens
    }

    /// Copies the vectors of sampled tokens out of `rows` `[n, d]`, which holds the tokens from place `first` on, to their
    /// rows of `sampled` `[tokens, d]`.
    pub fn gather(&self, first: usize, rows: &Matrix, sampled: &mut Matrix) {
        let begin = self.tokens.partition_point(|&t| t < first);
        let end = self.tokens.partition_point(|&t| t < first + rows.rows());
        for (i, &token) in self.tokens.iter().enumerate().take(end).skip(begin) {
            sampled.row_mut(i).copy_from_slice(rows.row(token - first));
        }
    }
}

/// At most `n` of the places, without replacement, in their order.
fn candidates(rng: &mut Rng, mut places: Vec<usize>, n: usize) -> Vec<usize> {
    if places.len() > n {
        for i in 0..n {
            let other = i + rng.below(places.len() - i);
            places.swap(i, other);
        }
        places.truncate(n);
        places.sort_unstable();
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_tokens_are_all_kept_and_many_are_sampled() {
        let small = Sampling { size: 10, ..Sampling::default() };
        assert_eq!(Reservoir::draw(&[3, 0, 4], &small).tokens(), [0, 1, 2, 3, 4, 5, 6]);
        let inner = Sampling { without_first: true, ..small };
        assert_eq!(Reservoir::draw(&[3, 1, 4], &inner).tokens(), [1, 2, 5, 6, 7]);
        let lengths = [100; 64];
        let sample = Reservoir::draw(&lengths, &Sampling::default());
        assert_eq!(sample, Reservoir::draw(&lengths, &Sampling::default()));
        assert_ne!(sample, Reservoir::draw(&lengths, &Sampling { seed: 1, ..Sampling::default() }));
        assert_eq!(sample.tokens().len(), 256);
        assert!(sample.tokens().windows(2).all(|p| p[0] < p[1]) && sample.tokens()[255] < 6400);
    }

    /// Every token has the same chance, wherever it stands: 20 of 200 in 4000 draws is 400 times each, give or take 19.
    #[test]
    fn chances_are_even() {
        let mut counts = [0u32; 200];
        for seed in 0..4000 {
            let sampling = Sampling { size: 20, candidates_per_batch: 30, seed, ..Sampling::default() };
            Reservoir::draw(&[5; 40], &sampling).tokens().iter().for_each(|&t| counts[t] += 1);
        }
        assert_eq!(counts.iter().sum::<u32>(), 80_000);
        assert!(counts.iter().all(|c| (310..490).contains(c)), "{counts:?}");
    }

    #[test]
    fn a_batch_offers_no_more_candidates_than_it_may() {
        let sampling = Sampling { size: 1000, candidates_per_batch: 6, prompts_per_batch: 2, ..Sampling::default() };
        let sample = Reservoir::draw(&[50, 50, 2, 2, 50], &sampling);
        let within = |range: std::ops::Range<usize>| sample.tokens().iter().filter(|t| range.contains(t)).count();
        assert_eq!((within(0..100), within(100..104), within(104..154)), (6, 4, 6));
    }

    #[test]
    fn vectors_are_found_wherever_the_prompts_are_cut() {
        let rows = |range: std::ops::Range<usize>| {
            let data: Vec<f32> = range.clone().flat_map(|t| [t as f32, -(t as f32)]).collect();
            Matrix::from_vec(range.len(), 2, data)
        };
        let sample = Reservoir::draw(&[40, 40], &Sampling { size: 9, ..Sampling::default() });
        let mut sampled = Matrix::zeros(9, 2);
        sample.gather(0, &rows(0..31), &mut sampled);
        sample.gather(31, &rows(31..80), &mut sampled);
        for (i, &token) in sample.tokens().iter().enumerate() {
            assert_eq!(sampled.row(i), [token as f32, -(token as f32)]);
        }
    }
}
