//! What is kept of items, and what many numbers of items come to.

use serde::Serialize;
use serde_json::{Map, Value};

/// What is kept of an item: a line of a log.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ItemRecord {
    /// The task.
    pub task: &'static str,
    /// The item's place in its file, from 0.
    pub index: usize,
    /// What the model wrote, where it wrote something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion: Option<String>,
    /// Sums of the log-probabilities of the choices, in nats and in their order, where choices were scored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loglikelihoods: Option<Vec<f64>>,
    /// What was taken from the completion (a text), or the most likely choice (a number from 0).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Value>,
    /// What was expected, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gold: Option<Value>,
    /// Numbers of the item, under the names of the metrics they are averaged into.
    #[serde(flatten)]
    pub scores: Map<String, Value>,
}

impl ItemRecord {
    /// A record that says nothing yet.
    pub(crate) fn new(task: &'static str, index: usize) -> Self {
        let (completion, loglikelihoods, prediction, gold) = (None, None, None, None);
        ItemRecord { task, index, completion, loglikelihoods, prediction, gold, scores: Map::new() }
    }
}

/// The mean and the standard error (sample deviation over the root of the count, as in the harness) of a metric.
pub(crate) fn mean_and_stderr(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, if values.len() > 1 { (squares / (n - 1.0) / n).sqrt() } else { 0.0 })
}

/// Wilson's 95 % interval of a share of `right` in `n` (Wilson 1927), which stays within 0 and 1.
pub(crate) fn wilson_interval(right: f64, n: usize) -> [f64; 2] {
    const Z: f64 = 1.959_963_984_540_054;
    let n = n as f64;
    let share = right / n;
    let center = (share + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    [(center - half).max(0.0), (center + half).min(1.0)]
}

/// What Python's `str.isspace` and `str.strip` take for white space.
pub(crate) fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Python's `str.strip()`.
pub(crate) fn python_strip(text: &str) -> &str {
    text.trim_matches(is_python_space)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_wilsons() {
        let close = |a: [f64; 2], b: [f64; 2]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        // Newcombe 1998, table I, method 3.
        assert!(close(wilson_interval(81.0, 263), [0.2553, 0.3662]));
        assert!(close(wilson_interval(15.0, 148), [0.0624, 0.1605]));
        assert!(close(wilson_interval(0.0, 20), [0.0, 0.1611]));
        assert!(close(wilson_interval(29.0, 29), [0.8830, 1.0]));
    }

    #[test]
    fn white_space_is_pythons() {
        assert_eq!(python_strip("\u{1f} \u{a0}a b\n\u{2003}"), "a b");
        assert_eq!(python_strip("\u{200b}a"), "\u{200b}a");
    }
}
