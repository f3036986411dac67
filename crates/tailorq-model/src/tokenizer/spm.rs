//! SentencePiece vocabularies as BPE: the merges that the scores imply.

use std::collections::HashMap;

/// The merges that make SentencePiece's "join the neighbours whose joint piece scores best" a BPE: every way to cut a
/// piece into two pieces, best scores first. As the converter of the transformers library orders them: by
/// score, then by the lengths of the parts, falling; cuts of one piece by the ids of their parts.
///
/// `mergeable[i]` tells whether piece `i` may arise from a merge (ordinary pieces; not control or byte pieces).
pub(super) fn merges_from_scores(tokens: &[&str], scores: &[f32], mergeable: &[bool]) -> Vec<(String, String)> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().rev().map(|(i, t)| (*t, i)).collect();
    let mut merges = Vec::new();
    for (i, token) in tokens.iter().enumerate().filter(|(i, _)| mergeable[*i]) {
        let mut cuts: Vec<(usize, usize, &str, &str)> = (token.char_indices().skip(1))
            .filter_map(|(at, _)| {
                let (left, right) = token.split_at(at);
                Some((*ids.get(left)?, *ids.get(right)?, left, right))
            })
            .collect();
        cuts.sort_unstable();
        merges.extend(cuts.into_iter().map(|(_, _, left, right)| (scores[i], left, right)));
    }
    let lengths = |m: &(f32, &str, &str)| (m.1.chars().count(), m.2.chars().count());
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| lengths(b).cmp(&lengths(a))));
    merges.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn better_scores_merge_first() {
        let tokens = ["<s>", "a", "b", "c", "bc", "ab", "abc"];
        let scores = [0.0, -10.0, -11.0, -12.0, -2.0, -1.0, -3.0];
        let mergeable = [false, true, true, true, true, true, true];
        let merges = merges_from_scores(&tokens, &scores, &mergeable);
        let pairs: Vec<_> = merges.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        assert_eq!(pairs, [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]);
    }
}
