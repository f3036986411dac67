//! From logits to a token: penalty, temperature, top-k, top-p, min-p, draw.
//!
//! The order of the filters is that of Hugging Face `transformers`: repetition penalty, temperature, top-k, top-p,
//! min-p. The same seed and the same logits give the same token on every machine.

use crate::error::RuntimeError;
use tailorq_tensor::Rng;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits; 0 always takes the most likely token.
    pub temperature: f32,
    /// Only the `top_k` most likely tokens stay; 0 keeps all.
    pub top_k: usize,
    /// Only the smallest set of most likely tokens whose probability reaches `top_p` stays (nucleus sampling, Holtzman
    /// et al. 2020); 1 keeps all.
    pub top_p: f32,
    /// Only tokens at least `min_p` times as likely as the most likely one stay; 0 keeps all.
    pub min_p: f32,
    /// Positive logits of tokens already in the sequence are divided by this, negative ones multiplied (CTRL, Keskar et
    /// al. 2019); 1 changes nothing.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl SamplerOptions {
    /// Always the most likely token.
    pub const GREEDY: SamplerOptions =
        SamplerOptions { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 };

    fn check(&self) -> Result<(), RuntimeError> {
        let ranges = [
            ("temperature", self.temperature, self.temperature >= 0.0, "use 0 (greedy) or more"),
            ("top-p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "use a number above 0, up to 1 (off)"),
            ("min-p", self.min_p, (0.0..=1.0).contains(&self.min_p), "use a number from 0 (off) to 1"),
            ("repetition penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "use 1 (off) or more"),
        ];
        for (option, value, in_range, remedy) in ranges {
            if !in_range || !value.is_finite() {
                return Err(RuntimeError::BadOption { option, value, remedy });
            }
        }
        Ok(())
    }
}

impl Default for SamplerOptions {
    /// Temperature 0.7, top-p 0.95, top-k 40, seed 0.
    fn default() -> Self {
        SamplerOptions { temperature: 0.7, top_k: 40, top_p: 0.95, ..SamplerOptions::GREEDY }
    }
}

/// Refuses logits that are no numbers.
pub(crate) fn check(logits: &[f32]) -> Result<(), RuntimeError> {
    let is_bad = |l: &f32| l.is_nan() || *l == f32::INFINITY;
    if logits.iter().any(is_bad) { Err(RuntimeError::BadLogits) } else { Ok(()) }
}

/// Chooses tokens; holds the state of the random numbers.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    rng: Rng,
    /// Memory for the logits with the penalty.
    penalized: Vec<f32>,
    /// Memory for the tokens that may be drawn.
    order: Vec<(u32, f32)>,
    /// Those that pass all filters, most likely first, each with its weight relative to the most likely one.
    candidates: Vec<(u32, f64)>,
}

impl Sampler {
    /// A sampler, or an error that names the option outside its range.
    pub fn new(options: SamplerOptions) -> Result<Self, RuntimeError> {
        options.check()?;
        let rng = Rng::new(options.seed);
        Ok(Sampler { options, rng, penalized: Vec::new(), order: Vec::new(), candidates: Vec::new() })
    }

    /// The next token for `logits: [vocab]`; `history` is the sequence so far, which the repetition penalty reads.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, RuntimeError> {
        check(logits)?;
        if self.options.repetition_penalty == 1.0 {
            return self.choose(logits);
        }
        let mut penalized = std::mem::take(&mut self.penalized);
        self.penalize(logits, history, &mut penalized);
        let chosen = self.choose(&penalized);
        self.penalized = penalized;
        chosen
    }

    /// Whether it always takes the most likely token, whatever came before.
    pub(crate) fn is_greedy(&self) -> bool {
        self.options.temperature == 0.0 && self.options.repetition_penalty == 1.0
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32, RuntimeError> {
        if self.options.temperature == 0.0 {
            return greedy(logits);
        }
        self.filter(logits)?;
        Ok(self.draw())
    }

    /// Makes `penalized` a copy of the logits with the repetition penalty.
    fn penalize(&self, logits: &[f32], history: &[u32], penalized: &mut Vec<f32>) {
        let penalty = self.options.repetition_penalty;
        penalized.clear();
        penalized.extend_from_slice(logits);
        for &id in history {
            // Reading the untouched logits makes the penalty apply once, however often a token occurs.
            if let Some(&logit) = logits.get(id as usize) {
                penalized[id as usize] = if logit > 0.0 { logit / penalty } else { logit * penalty };
            }
        }
    }

    /// Finds the candidates.
    fn filter(&mut self, logits: &[f32]) -> Result<(), RuntimeError> {
        let Sampler { options, order, candidates, .. } = self;
        order.clear();
        order.extend((0u32..).zip(logits.iter().copied()).filter(|(_, l)| l.is_finite()));
        if order.is_empty() {
            return Err(RuntimeError::BadLogits);
        }
        // Ties go to the smaller id, so that the order is total and the draw reproducible.
        let more_likely = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let k = options.top_k;
        if k > 0 && k < order.len() {
            order.select_nth_unstable_by(k, more_likely);
            order.truncate(k);
        }
        order.sort_unstable_by(more_likely);
        let (temperature, best) = (f64::from(options.temperature), f64::from(order[0].1));
        candidates.clear();
        candidates.extend(order.iter().map(|&(id, l)| (id, ((f64::from(l) - best) / temperature).exp())));
        if options.top_p < 1.0 {
            let goal = f64::from(options.top_p) * candidates.iter().map(|c| c.1).sum::<f64>();
            let mut mass = 0.0;
            // A token stays while those before it have not reached the goal, so the first always does.
            candidates.retain(|c| {
                let stays = mass < goal;
                mass += c.1;
                stays
            });
        }
        let floor = f64::from(options.min_p);
        // The first weight is 1, so it always stays.
        candidates.retain(|c| c.1 >= floor);
        Ok(())
    }

    fn draw(&mut self) -> u32 {
        let candidates = &self.candidates;
        let total: f64 = candidates.iter().map(|c| c.1).sum();
        let mut left = self.rng.uniform() * total;
        for &(id, weight) in candidates {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        // Rounding may leave a rest above the last weight.
        candidates.last().map_or(0, |c| c.0)
    }
}

/// The most likely token; the smallest id of equals.
pub(crate) fn greedy(logits: &[f32]) -> Result<u32, RuntimeError> {
    let mut best: Option<(u32, f32)> = None;
    for (id, &logit) in (0u32..).zip(logits) {
        if logit.is_finite() && best.is_none_or(|(_, b)| logit > b) {
            best = Some((id, logit));
        }
    }
    best.map(|(id, _)| id).ok_or(RuntimeError::BadLogits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(options: SamplerOptions, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits, &[]).unwrap() as usize] += 1;
        }
        counts
    }

    const PLAIN: SamplerOptions = SamplerOptions { temperature: 1.0, ..SamplerOptions::GREEDY };

    #[test]
    fn temperature_zero_takes_the_first_of_the_most_likely() {
        let mut sampler = Sampler::new(SamplerOptions::GREEDY).unwrap();
        assert_eq!(sampler.sample(&[0.5, 2.0, 2.0, f32::NEG_INFINITY], &[]).unwrap(), 1);
    }

    #[test]
    fn draws_follow_the_softmax_of_the_logits_over_the_temperature() {
        // Probabilities 1/7, 2/7, 4/7 at temperature 1; 1/21, 4/21, 16/21 at temperature 1/2.
        let logits = [0.0, 2f32.ln(), 4f32.ln()];
        for (temperature, expected) in
            [(1.0, [1.0 / 7.0, 2.0 / 7.0, 4.0 / 7.0]), (0.5, [1.0 / 21.0, 4.0 / 21.0, 16.0 / 21.0])]
        {
            let n = 40_000;
            let seen = counts(SamplerOptions { temperature, ..PLAIN }, &logits, n);
            for (count, p) in seen.iter().zip(expected) {
                let deviation: f64 = *count as f64 - n as f64 * p;
                // Five standard deviations of a binomial count.
                assert!(deviation.abs() < 5.0 * (n as f64 * p * (1.0 - p)).sqrt(), "{seen:?} at {temperature}");
            }
        }
    }

    #[test]
    fn filters_leave_exactly_the_tokens_they_promise() {
        let logits: Vec<f32> = [0.1f32, 0.4, 0.2, 0.3].map(f32::ln).to_vec();
        let kept = |options: SamplerOptions| -> Vec<bool> {
            counts(options, &logits, 2_000).into_iter().map(|c| c > 0).collect()
        };
        assert_eq!(kept(PLAIN), [true; 4]);
        assert_eq!(kept(SamplerOptions { top_k: 2, ..PLAIN }), [false, true, false, true]);
        assert_eq!(kept(SamplerOptions { top_k: 9, ..PLAIN }), [true; 4]);
        assert_eq!(kept(SamplerOptions { top_p: 0.65, ..PLAIN }), [false, true, false, true]);
        assert_eq!(kept(SamplerOptions { top_p: 1e-6, ..PLAIN }), [false, true, false, false]);
        assert_eq!(kept(SamplerOptions { min_p: 0.45, ..PLAIN }), [false, true, true, true]);
        assert_eq!(kept(SamplerOptions { min_p: 1.0, ..PLAIN }), [false, true, false, false]);
    }

    #[test]
    fn the_penalty_counts_once_for_each_token_and_lowers_both_signs() {
        let options = SamplerOptions { repetition_penalty: 2.0, ..SamplerOptions::GREEDY };
        let mut sampler = Sampler::new(options).unwrap();
        assert_eq!(sampler.sample(&[1.0, 1.5, 0.7], &[1, 1]).unwrap(), 0);
        assert_eq!(sampler.sample(&[1.0, 1.5, 0.7], &[1, 1, 0]).unwrap(), 1);
        assert_eq!(sampler.sample(&[-1.0, -1.5], &[0]).unwrap(), 1);
        // Tokens that the model does not have cannot be penalized and do no harm.
        assert_eq!(sampler.sample(&[1.0, 0.0], &[77]).unwrap(), 0);
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens_and_another_seed_others() {
        let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32 * 0.3).collect();
        let draw = |seed| {
            let mut sampler = Sampler::new(SamplerOptions { seed, temperature: 1.5, ..PLAIN }).unwrap();
            (0..50).map(|_| sampler.sample(&logits, &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn damaged_logits_and_options_out_of_range_are_errors() {
        for options in [PLAIN, SamplerOptions::GREEDY] {
            let mut sampler = Sampler::new(options).unwrap();
            for logits in [&[0.0, f32::NAN][..], &[f32::INFINITY, 0.0], &[f32::NEG_INFINITY], &[]] {
                assert!(matches!(sampler.sample(logits, &[]), Err(RuntimeError::BadLogits)), "{logits:?}");
            }
        }
        for bad in [
            SamplerOptions { temperature: -0.1, ..PLAIN },
            SamplerOptions { temperature: f32::NAN, ..PLAIN },
            SamplerOptions { temperature: f32::INFINITY, ..PLAIN },
            SamplerOptions { top_p: 0.0, ..PLAIN },
            SamplerOptions { top_p: 1.1, ..PLAIN },
            SamplerOptions { min_p: -0.1, ..PLAIN },
            SamplerOptions { repetition_penalty: 0.0, ..PLAIN },
        ] {
            assert!(matches!(Sampler::new(bad), Err(RuntimeError::BadOption { .. })), "{bad:?}");
        }
    }
}
