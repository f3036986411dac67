//! Answers that two models give to the same items: which of them turned.

use serde_json::{Value, json};

/// What two models made of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    /// Whether the reference was right, and the model.
    pub(crate) right: [bool; 2],
    /// Whether they said something different.
    pub(crate) differs: bool,
}

/// How many answers turned from right to wrong and back, by a metric that is a share (`acc,none`).
pub(crate) fn flips(reference: &str, metric: &str, pairs: &[Pair]) -> Value {
    let count = |test: fn(&Pair) -> bool| pairs.iter().filter(|pair| test(pair)).count();
    let name = metric.split(',').next().unwrap_or(metric);
    let mut told = json!({
        "reference": reference,
        "metric": metric,
        "right_to_wrong": count(|pair| pair.right == [true, false]),
        "wrong_to_right": count(|pair| pair.right == [false, true]),
        "changed_predictions": count(|pair| pair.differs),
        "items": pairs.len(),
    });
    told[format!("reference_{name}")] = (count(|pair| pair.right[0]) as f64 / pairs.len() as f64).into();
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flips_are_told_by_direction() {
        let pair = |right, differs| Pair { right, differs };
        let pairs = [
            pair([true, false], true),
            pair([true, true], false),
            pair([false, false], true),
            pair([true, false], true),
        ];
        let told = flips("original", "acc,none", &pairs);
        assert_eq!((&told["right_to_wrong"], &told["wrong_to_right"]), (&2.into(), &0.into()));
        assert_eq!((&told["changed_predictions"], &told["items"]), (&3.into(), &4.into()));
        assert_eq!((&told["reference_acc"], &told["metric"]), (&0.75.into(), &"acc,none".into()));
    }
}
