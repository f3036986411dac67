//! The top columns of every block of columns, as BiLLM and the memory-aligned scheme choose them.

use super::{AllocateError, Saliency};

/// Flags, one a score, the `k` largest of every `block` consecutive ones (all of a block that has no more than `k`; the last
/// block may be short). Ties go to the earlier. Any unit of scores will do, for only neighbours are compared.
///
/// # Errors
/// [`AllocateError::ScoreNotFinite`]; [`AllocateError::Settings`] for a block of 0.
pub fn top_per_block(scores: &Saliency, block: usize, k: usize) -> Result<Vec<bool>, AllocateError> {
    if block == 0 {
        return Err(AllocateError::Settings("blocks of 0 columns do not exist: use 128".into()));
    }
    if let Some(index) = scores.values.iter().position(|x| !x.is_finite()) {
        return Err(AllocateError::ScoreNotFinite { index: index as u64, value: f64::from(scores.values[index]) });
    }
    let mut flags = vec![false; scores.values.len()];
    for (scores, flags) in scores.values.chunks(block).zip(flags.chunks_mut(block)) {
        for i in super::top_blocks::largest(scores.len(), k, |i| f64::from(scores[i])) {
            flags[i] = true;
        }
    }
    Ok(flags)
}
