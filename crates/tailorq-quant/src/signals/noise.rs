//! TAQ-KL: noise as coarse as a grid would make it, and what it does to predictions.

use tailorq_tensor::Rng;

/// Largest less smallest element of a vector; 0 of an empty one.
pub fn range(values: &[f32]) -> f64 {
    let extremes = values
        .iter()
        .fold(None, |seen: Option<(f32, f32)>, &x| Some(seen.map_or((x, x), |(low, high)| (low.min(x), high.max(x)))));
    extremes.map_or(0.0, |(low, high)| f64::from(high) - f64::from(low))
}

/// The step of a grid over a range, and with it the width of the noise that stands for rounding to it.
///
/// A range is set by the few massive activations of a vector, so that this noise can be far larger than what quantized
/// weights do to the others: scores compare blocks and predict no loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoiseStep(pub f64);

impl NoiseStep {
    /// `range / (2^bits - 1)`; the papers use 4 bits.
    pub fn of(range: f64, bits: u32) -> Self {
        NoiseStep(range / (2f64.powi(bits.min(1000) as i32) - 1.0))
    }
}

/// The generator for one prompt's noise on one block's output: it depends on these alone, not on which prompts run together.
pub fn noise_rng(seed: u64, block_idx: usize, prompt_idx: usize) -> Rng {
    let mix = |seed: u64, n: usize| Rng::new(Rng::new(seed).next_u64() ^ n as u64).next_u64();
    Rng::new(mix(mix(seed, block_idx), prompt_idx))
}

/// Adds independent noise, uniform from `-step / 2` to `step / 2`, to every value.
pub fn add_uniform_noise(rng: &mut Rng, step: NoiseStep, values: &mut [f32]) {
    for x in values {
        *x += (step.0 * (rng.uniform() - 0.5)) as f32;
    }
}

/// `KL(softmax(reference) || softmax(logits))` in nats, in f64. Logits are finite; NaN comes out where they are not.
pub fn divergence(reference: &[f32], logits: &[f32]) -> f64 {
    assert_eq!(reference.len(), logits.len(), "two models of one vocabulary");
    let (p, q) = (log_sum(reference), log_sum(logits));
    let term = |(&a, &b): (&f32, &f32)| {
        let (a, b) = (f64::from(a) - p, f64::from(b) - q);
        a.exp() * (a - b)
    };
    let sum: f64 = reference.iter().zip(logits).map(term).sum();
    // Rounding may leave equal distributions a little below 0; `max` would turn NaN into 0.
    if sum < 0.0 { 0.0 } else { sum }
}

/// `ln sum exp`.
fn log_sum(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + logits.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_steps() {
        assert_eq!(range(&[1.0, -2.0, 5.5]), 7.5);
        assert_eq!((range(&[3.0]), range(&[])), (0.0, 0.0));
        assert_eq!(NoiseStep::of(7.5, 4), NoiseStep(0.5));
    }

    #[test]
    fn divergences_by_hand() {
        // Probabilities 1/2, 1/4, 1/4 and 1/4, 1/2, 1/4.
        let (p, q) = ([2f32.ln(), 0.0, 0.0], [7.0, 7.0 + 2f32.ln(), 7.0]);
        let expected = 0.5 * 2f64.ln() - 0.25 * 2f64.ln();
        assert!((divergence(&p, &q) - expected).abs() < 1e-6);
        assert_eq!(divergence(&p, &p), 0.0);
        assert!(divergence(&[1e4, 0.0], &[0.0, 1e4]) > 9999.0);
        assert!(divergence(&[f32::NAN, 0.0], &p[..2]).is_nan());
        // For small differences the divergence is half the variance of the difference under p.
        let small: Vec<f32> = p.iter().zip([0.01, -0.02, 0.005]).map(|(x, d)| x + d).collect();
        let (mean, square) = (0.5 * 0.01 - 0.25 * 0.015, 0.5 * 1e-4 + 0.25 * (4e-4 + 2.5e-5));
        let expected = 0.5 * (square - mean * mean);
        assert!((divergence(&p, &small) / expected - 1.0).abs() < 0.01);
    }

    #[test]
    fn noise_fills_its_step_evenly() {
        let mut values = vec![1.0f32; 40_000];
        add_uniform_noise(&mut noise_rng(1, 2, 3), NoiseStep(0.5), &mut values);
        assert!(values.iter().all(|x| (0.75..=1.25).contains(x)));
        let mean = values.iter().map(|&x| f64::from(x) - 1.0).sum::<f64>() / 40_000.0;
        let square = values.iter().map(|&x| (f64::from(x) - 1.0).powi(2)).sum::<f64>() / 40_000.0;
        assert!(mean.abs() < 0.003 && (square / (0.25 / 12.0) - 1.0).abs() < 0.02, "{mean} {square}");
        let first = |seed, block, prompt| noise_rng(seed, block, prompt).next_u64();
        let draws = [first(1, 2, 3), first(1, 3, 2), first(2, 2, 3), first(1, 2, 4), first(0, 0, 0)];
        assert!((0..5).all(|i| (0..i).all(|j| draws[i] != draws[j])));
        assert_eq!(first(1, 2, 3), first(1, 2, 3));
    }
}
