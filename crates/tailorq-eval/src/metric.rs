//! What many numbers come to: a metric with its standard error and its 95 % interval, under the harness' names
//! (`exact_match,strict-match` beside `exact_match_stderr,strict-match`).

use serde_json::{Map, Value, json};

/// Half the width of a normal distribution's 95 % interval, in standard errors.
const Z95: f64 = 1.959_963_984_540_054;

/// The mean and the standard error (sample deviation over the root of the count, as in the harness) of a metric.
pub(crate) fn mean_and_stderr(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, if values.len() > 1 { (squares / (n - 1.0) / n).sqrt() } else { 0.0 })
}

/// The ratio of the sum of the first numbers to that of the second ones, such as a sum of log-likelihoods and its tokens,
/// and its standard error over the pairs, which are what was sampled: linearized (Cochran 1977, Sampling Techniques,
/// chapter 6, without the correction for a finite population). A single pair has no standard error.
pub(crate) fn ratio_and_stderr(pairs: &[(f64, f64)]) -> (f64, Option<f64>) {
    let total: f64 = pairs.iter().map(|(_, weight)| weight).sum();
    let value = pairs.iter().map(|(sum, _)| sum).sum::<f64>() / total;
    let squares: f64 = pairs.iter().map(|(sum, weight)| (sum - value * weight).powi(2)).sum();
    let n = pairs.len() as f64;
    (value, (pairs.len() > 1).then(|| (squares * n / (n - 1.0)).sqrt() / total))
}

/// Wilson's 95 % interval of a share of `right` in `n` (Wilson 1927), which stays within 0 and 1.
pub(crate) fn wilson_interval(right: f64, n: usize) -> [f64; 2] {
    let n = n as f64;
    let share = right / n;
    let center = (share + Z95 * Z95 / (2.0 * n)) / (1.0 + Z95 * Z95 / n);
    let half = Z95 / (1.0 + Z95 * Z95 / n) * (share * (1.0 - share) / n + Z95 * Z95 / (4.0 * n * n)).sqrt();
    [(center - half).max(0.0), (center + half).min(1.0)]
}

/// A number with its uncertainty, as far as that is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Metric {
    pub(crate) value: f64,
    pub(crate) stderr: Option<f64>,
    pub(crate) interval95: Option<[f64; 2]>,
}

impl Metric {
    /// The mean of scores from 0 to 1. The interval is Wilson's where all are 0 or 1, and else the normal one within 0 and 1.
    pub(crate) fn of_scores(scores: &[f64]) -> Self {
        let (value, stderr) = mean_and_stderr(scores);
        let interval95 = if scores.iter().all(|score| [0.0, 1.0].contains(score)) {
            (!scores.is_empty()).then(|| wilson_interval(scores.iter().sum(), scores.len()))
        } else {
            (scores.len() > 1).then(|| normal(value, stderr).map(|bound| bound.clamp(0.0, 1.0)))
        };
        Metric { value, stderr: Some(stderr), interval95 }
    }

    /// A value of which a standard error is known or not, with the normal interval.
    pub(crate) fn normal(value: f64, stderr: Option<f64>) -> Self {
        Metric { value, stderr, interval95: stderr.map(|stderr| normal(value, stderr)) }
    }

    /// The exponential of such a value. Its standard error is that to first order; its interval is that of the exponent
    /// between whose bounds it lies, so that it is not negative.
    pub(crate) fn exponential(exponent: f64, stderr: Option<f64>) -> Self {
        let value = exponent.exp();
        Metric {
            value,
            stderr: stderr.map(|stderr| value * stderr),
            interval95: stderr.map(|stderr| normal(exponent, stderr).map(f64::exp)),
        }
    }

    /// Writes it under its name in the harness' notation, with what is known beside it.
    pub(crate) fn tell(self, name: &str, details: &mut Map<String, Value>) {
        let (metric, filter) = name.split_once(',').unwrap_or((name, "none"));
        details.insert(format!("{metric},{filter}"), self.value.into());
        self.tell_uncertainty(name, details);
    }

    /// Writes what is known beside it, of a task whose only number is its value.
    pub(crate) fn tell_uncertainty(self, name: &str, details: &mut Map<String, Value>) {
        let (metric, filter) = name.split_once(',').unwrap_or((name, "none"));
        if let Some(stderr) = self.stderr {
            details.insert(format!("{metric}_stderr,{filter}"), stderr.into());
        }
        if let Some(interval) = self.interval95 {
            details.insert(format!("{metric}_interval95,{filter}"), json!(interval));
        }
    }
}

fn normal(value: f64, stderr: f64) -> [f64; 2] {
    [value - Z95 * stderr, value + Z95 * stderr]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: [f64; 2], b: [f64; 2]) -> bool {
        a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4)
    }

    #[test]
    fn intervals_are_wilsons() {
        // Newcombe 1998, table I, method 3.
        assert!(close(wilson_interval(81.0, 263), [0.2553, 0.3662]));
        assert!(close(wilson_interval(15.0, 148), [0.0624, 0.1605]));
        assert!(close(wilson_interval(0.0, 20), [0.0, 0.1611]));
        assert!(close(wilson_interval(29.0, 29), [0.8830, 1.0]));
    }

    #[test]
    fn shares_have_wilsons_interval_and_other_scores_the_normal_one() {
        let shares = Metric::of_scores(&[1.0, 0.0, 0.0, 0.0]);
        assert_eq!(shares.interval95, Some(wilson_interval(1.0, 4)));
        assert!((shares.stderr.unwrap() - 0.25).abs() < 1e-12);
        let f1 = Metric::of_scores(&[0.5, 1.0, 0.9]);
        let (mean, stderr) = mean_and_stderr(&[0.5, 1.0, 0.9]);
        assert_eq!(f1.interval95, Some([mean - Z95 * stderr, 1.0]), "not above 1");
        assert_eq!(Metric::of_scores(&[0.5]).interval95, None, "one number has no spread");
        assert!(Metric::of_scores(&[1.0]).interval95.is_some());
    }

    #[test]
    fn a_ratio_is_of_sums_and_its_error_of_pairs() {
        // Equal weights: the mean of the ratios 1, 2, 3, whose standard deviation is 1.
        let (value, stderr) = ratio_and_stderr(&[(4.0, 4.0), (8.0, 4.0), (12.0, 4.0)]);
        assert!((value - 2.0).abs() < 1e-12 && (stderr.unwrap() - 1.0 / 3f64.sqrt()).abs() < 1e-12);
        let (value, _) = ratio_and_stderr(&[(3.0, 4.0), (9.0, 8.0)]);
        assert!((value - 1.0).abs() < 1e-12);
        assert_eq!(ratio_and_stderr(&[(3.0, 4.0)]), (0.75, None));
    }

    #[test]
    fn perplexities_have_the_bounds_of_their_exponents() {
        let metric = Metric::exponential(2.0, Some(0.1));
        assert!(close(metric.interval95.unwrap(), [(2.0 - 0.1 * Z95).exp(), (2.0 + 0.1 * Z95).exp()]));
        assert!((metric.stderr.unwrap() - 0.1 * 2f64.exp()).abs() < 1e-12);
        let mut details = Map::new();
        metric.tell("perplexity,none", &mut details);
        let keys: Vec<&String> = details.keys().collect();
        assert_eq!(keys, ["perplexity,none", "perplexity_stderr,none", "perplexity_interval95,none"]);
        details.clear();
        Metric::exponential(2.0, None).tell("perplexity,none", &mut details);
        assert_eq!(details.len(), 1);
    }
}
