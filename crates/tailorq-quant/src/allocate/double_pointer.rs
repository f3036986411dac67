//! SliM-LLM's choice of widths for the column blocks of one matrix.

use super::AllocateError;
use super::top_blocks::largest;

/// What becomes of a column block's width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Swap {
    /// One bit less.
    Down,
    /// As it was.
    Keep,
    /// One bit more.
    Up,
}

/// Takes a bit from the `i` lowest scores and gives one to the `i` highest, so that the mean width stays exact (Huang et
/// al. 2025, SliM-LLM, "salience-determined bit allocation"); of `i = first..=n / 2` the one of least `objective`, ties
/// to the smaller `i`. SliM-LLM begins at `first = 1` and minimizes the divergence of the layer's outputs; 0 admits the
/// uniform plan, so that the result is never worse than it. Returns the swaps and the objective.
///
/// Among equal scores the earlier block counts as the higher. A single block cannot be swapped and stays as it is.
///
/// # Errors
/// [`AllocateError::ScoreNotFinite`] of a score, or of the objective with `i` for the index; what the objective fails with.
pub fn double_pointer<E: From<AllocateError>>(
    scores: &[f64],
    first: usize,
    objective: &mut dyn FnMut(&[Swap]) -> Result<f64, E>,
) -> Result<(Vec<Swap>, f64), E> {
    if let Some(index) = scores.iter().position(|x| !x.is_finite()) {
        return Err(AllocateError::ScoreNotFinite { index: index as u64, value: scores[index] }.into());
    }
    let n = scores.len();
    let falling = largest(n, n, |i| scores[i]);
    let mut best: Option<(Vec<Swap>, f64)> = None;
    for n_swaps in first.min(n / 2)..=n / 2 {
        let mut swaps = vec![Swap::Keep; n];
        falling[..n_swaps].iter().for_each(|&b| swaps[b] = Swap::Up);
        falling[n - n_swaps..].iter().for_each(|&b| swaps[b] = Swap::Down);
        let value = objective(&swaps)?;
        if !value.is_finite() {
            return Err(AllocateError::ScoreNotFinite { index: n_swaps as u64, value }.into());
        }
        if best.as_ref().is_none_or(|(_, least)| value < *least) {
            best = Some((swaps, value));
        }
    }
    Ok(best.expect("the range holds at least n / 2"))
}
