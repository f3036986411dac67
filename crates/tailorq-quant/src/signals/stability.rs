//! TAQ's scores of blocks from statistics of their outputs, and TAQO's from a task metric.

/// Running sums over elements, in f64.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    n: u64,
    sum: f64,
    squares: f64,
}

impl Moments {
    /// The sums of some values.
    pub fn of(values: &[f32]) -> Self {
        let mut moments = Moments { n: values.len() as u64, ..Moments::default() };
        for &x in values {
            let x = f64::from(x);
            moments.sum += x;
            moments.squares += x * x;
        }
        moments
    }

    /// Takes in further values.
    pub fn merge(&mut self, other: Moments) {
        self.n += other.n;
        self.sum += other.sum;
        self.squares += other.squares;
    }

    /// `E[h^2] - E[h]^2`; `None` of nothing, or when a value was not finite.
    pub fn variance(&self) -> Option<f64> {
        let mean = |sum: f64| sum / self.n as f64;
        let variance = mean(self.squares) - mean(self.sum).powi(2);
        variance.is_finite().then_some(variance.max(0.0))
    }
}

/// `0.5 z(Info) + 0.5 z(-Var)` over the blocks, the higher the more bits. `z` subtracts the mean and divides by the standard
/// deviation with `n - 1`; where all are equal it is 0.
///
/// In models that normalize before each layer the stream's variance grows from block to block, so that the second half is
/// close to "the earlier the better": compare with [`crate::allocate::DepthOnly`].
pub fn information_stability(information: &[f64], variances: &[f64]) -> Vec<f64> {
    assert_eq!(information.len(), variances.len(), "one of each a block");
    let stability: Vec<f64> = variances.iter().map(|v| -v).collect();
    let pairs = standardized(information).into_iter().zip(standardized(&stability));
    pairs.map(|(i, s)| 0.5 * i + 0.5 * s).collect()
}

fn standardized(values: &[f64]) -> Vec<f64> {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    let deviation = (squares / (n - 1.0)).sqrt();
    let z = |x: &f64| if deviation > 0.0 { (x - mean) / deviation } else { 0.0 };
    values.iter().map(z).collect()
}

/// TAQO: `max(0, base - score_l)`, what the task metric of the original loses when block `l` alone is quantized.
pub fn metric_drops(base: f64, scores: &[f64]) -> Vec<f64> {
    scores.iter().map(|score| (base - score).max(0.0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_tensor::Rng;

    #[test]
    fn variances_are_those_of_two_passes() {
        let mut rng = Rng::new(4);
        let values: Vec<f32> = (0..1000).map(|_| 3.0 + 2.0 * rng.normal()).collect();
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / 1000.0;
        let expected = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 1000.0;
        let mut moments = Moments::default();
        values.chunks(77).for_each(|c| moments.merge(Moments::of(c)));
        assert!((moments.variance().unwrap() / expected - 1.0).abs() < 1e-12);
        assert_eq!(Moments::of(&[5.0; 9]).variance(), Some(0.0));
        assert_eq!(Moments::default().variance(), None);
        assert_eq!(Moments::of(&[1.0, f32::INFINITY]).variance(), None);
    }

    #[test]
    fn scores_by_hand() {
        // Deviations with n - 1: of 1, 2, 3 it is 1; of -10, -20, -60 it is sqrt(700).
        let scores = information_stability(&[1.0, 2.0, 3.0], &[10.0, 20.0, 60.0]);
        let z = |x: f64| (x + 30.0) / 700f64.sqrt();
        let expected = [0.5 * (z(-10.0) - 1.0), 0.5 * z(-20.0), 0.5 * (z(-60.0) + 1.0)];
        assert!(scores.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{scores:?} {expected:?}");
        assert_eq!(information_stability(&[1.0, 1.0], &[3.0, 3.0]), [0.0, 0.0]);
        assert_eq!(information_stability(&[1.0], &[3.0]), [0.0]);
        assert!(information_stability(&[], &[]).is_empty());
    }

    #[test]
    fn a_better_metric_is_no_drop() {
        assert_eq!(metric_drops(0.5, &[0.25, 0.5, 0.75]), [0.25, 0.0, 0.0]);
    }
}
