//! The negative log-likelihood of tokens after others.

use crate::error::EvalError;
use crate::online::TargetNll;
use crate::task::Subject;
use tailorq_model::Batch;

/// The negative log-likelihoods, in nats, of `targets`, where target `i` is what follows `inputs[..first + i + 1]`.
///
/// `part` is what a model that computes no finite number is told with: the window or document, from 0.
pub(crate) fn target_nlls(
    subject: &Subject<'_>,
    inputs: &[u32],
    first: usize,
    targets: &[u32],
    part: usize,
) -> Result<Vec<f64>, EvalError> {
    assert_eq!(inputs.len(), first + targets.len(), "every target follows an input");
    let hidden = subject.model.hidden(subject.device, &Batch::new([inputs]), None);
    let scored: Vec<usize> = (first..inputs.len()).collect();
    let hidden = subject.device.rows(&hidden, &scored);
    let mut rows: Vec<TargetNll> = targets.iter().map(|id| TargetNll::new(*id)).collect();
    subject.model.for_each_logits(subject.device, &hidden, &mut |words, logits| {
        TargetNll::add_all(subject.device, &mut rows, words.start, logits);
    });
    let nlls: Vec<f64> = rows.iter().map(TargetNll::value).collect();
    if nlls.iter().all(|nll| nll.is_finite()) {
        return Ok(nlls);
    }
    Err(EvalError::NotFinite { model: subject.name.to_owned(), window: part })
}

/// Refuses tokens that the model does not have.
pub(crate) fn check_tokens(subject: &Subject<'_>, tokens: &[u32]) -> Result<(), EvalError> {
    let vocab = subject.model.config.vocab;
    match tokens.iter().enumerate().find(|(_, id)| **id as usize >= vocab) {
        None => Ok(()),
        Some((position, &id)) => Err(EvalError::UnknownToken { id, position, model: subject.name.to_owned(), vocab }),
    }
}
