//! The rules by which the TAQ papers choose blocks: a fixed share, or a fixed number beside the ends.

use super::AllocateError;

/// Flags, one a block: the `ceil(share * n)` highest scores, ties to the earlier block. TAQ-IS and TAQ-KL give those 8 bits
/// and the others 4, with a share of 0.25.
///
/// # Errors
/// [`AllocateError::ScoreNotFinite`]; [`AllocateError::Settings`] for a share outside 0 to 1.
pub fn top_blocks(scores: &[f64], share: f64) -> Result<Vec<bool>, AllocateError> {
    if !(0.0..=1.0).contains(&share) {
        return Err(AllocateError::Settings(format!("the share of blocks is {share}: use one from 0 to 1")));
    }
    check(scores)?;
    // A share such as 0.07 of 100 is 7.000000000000001 in floating point, and means 7.
    let k = (share * scores.len() as f64 - 1e-9).ceil().max(0.0) as usize;
    let mut flags = vec![false; scores.len()];
    largest(scores.len(), k, |i| scores[i]).into_iter().for_each(|i| flags[i] = true);
    Ok(flags)
}

/// Flags, one a block: the first and last `n_ends`, and of the others the `n_top` highest scores, ties to the earlier
/// block. TAQO keeps 2 and 8 at 16 bits.
///
/// # Errors
/// [`AllocateError::ScoreNotFinite`].
pub fn ends_and_top(scores: &[f64], n_ends: usize, n_top: usize) -> Result<Vec<bool>, AllocateError> {
    check(scores)?;
    let n = scores.len();
    let mut flags: Vec<bool> = (0..n).map(|i| i < n_ends || n - 1 - i < n_ends).collect();
    let inner: Vec<usize> = (0..n).filter(|&i| !flags[i]).collect();
    for i in largest(inner.len(), n_top, |i| scores[inner[i]]) {
        flags[inner[i]] = true;
    }
    Ok(flags)
}

fn check(scores: &[f64]) -> Result<(), AllocateError> {
    match scores.iter().position(|x| !x.is_finite()) {
        Some(index) => Err(AllocateError::ScoreNotFinite { index: index as u64, value: scores[index] }),
        None => Ok(()),
    }
}

/// Places of the `k` largest of `n` finite scores, largest first, ties to the lower place.
pub(super) fn largest(n: usize, k: usize, score: impl Fn(usize) -> f64) -> Vec<usize> {
    let mut places: Vec<usize> = (0..n).collect();
    // Adding 0 makes both zeros equal.
    places.sort_by(|&a, &b| (score(b) + 0.0).total_cmp(&(score(a) + 0.0)).then(a.cmp(&b)));
    places.truncate(k);
    places
}
