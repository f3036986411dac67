//! The negative log-likelihood of tokens after others.

use crate::error::EvalError;
use crate::online::TargetNll;
use crate::task::Subject;
use tailorq_model::Batch;

/// Tokens that a device with a memory of its own reads at once: a few hundred leave it idle, and more cost memory without
/// being faster.
const RESIDENT_TOKENS: usize = 4096;

/// How many tokens of short texts are read together, where the CPU reads `on_cpu`. Which texts that are depends on the
/// device alone, so that a result has the same bits in every run.
pub(crate) fn tokens_at_once(subject: &Subject<'_>, on_cpu: usize) -> usize {
    if subject.device.resident().is_some() { RESIDENT_TOKENS } else { on_cpu }
}

/// Tokens of which the last ones are scored: target `i` is what follows `inputs[..first + i + 1]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scoring<'a> {
    pub(crate) inputs: &'a [u32],
    pub(crate) first: usize,
    pub(crate) targets: &'a [u32],
    /// What a model that computes no finite number is told with: the window, document or item, from 0.
    pub(crate) part: usize,
}

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
    let mut nlls = all_target_nlls(subject, &[Scoring { inputs, first, targets, part }])?;
    Ok(nlls.pop().unwrap_or_default())
}

/// The same of several texts, which are read together.
pub(crate) fn all_target_nlls(subject: &Subject<'_>, texts: &[Scoring<'_>]) -> Result<Vec<Vec<f64>>, EvalError> {
    let batch = Batch::new(texts.iter().map(|text| text.inputs));
    let hidden = subject.model.hidden(subject.device, &batch, None);
    let mut scored = Vec::new();
    for (text, span) in texts.iter().zip(&batch.spans) {
        assert_eq!(text.inputs.len(), text.first + text.targets.len(), "every target follows an input");
        scored.extend(span.start + text.first..span.end);
    }
    let hidden = subject.device.rows(&hidden, &scored);
    let mut rows: Vec<TargetNll> = texts.iter().flat_map(|text| text.targets).map(|id| TargetNll::new(*id)).collect();
    subject.model.for_each_logits(subject.device, &hidden, &mut |words, logits| {
        TargetNll::add_all(subject.device, &mut rows, words.start, logits);
    });
    let mut values = rows.iter().map(TargetNll::value);
    let of_text = |text: &Scoring<'_>| {
        let nlls: Vec<f64> = values.by_ref().take(text.targets.len()).collect();
        match nlls.iter().all(|nll| nll.is_finite()) {
            true => Ok(nlls),
            false => Err(EvalError::NotFinite { model: subject.name.to_owned(), window: text.part }),
        }
    };
    texts.iter().map(of_text).collect()
}

/// Refuses tokens that the model does not have.
pub(crate) fn check_tokens(subject: &Subject<'_>, tokens: &[u32]) -> Result<(), EvalError> {
    let vocab = subject.model.config.vocab;
    match tokens.iter().enumerate().find(|(_, id)| **id as usize >= vocab) {
        None => Ok(()),
        Some((position, &id)) => Err(EvalError::UnknownToken { id, position, model: subject.name.to_owned(), vocab }),
    }
}
