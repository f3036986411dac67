//! How much of a model is left in another made from it: both are scored on the same tokens of the same items, and the share
//! is `exp(-NLL) / exp(-NLL of the original)`, the ratio of the probabilities that they give to a token in the geometric
//! mean. It is the inverse ratio of the two perplexities. A share of log-likelihoods themselves would mean nothing: they
//! are negative, and their zero is a perfect model.

use crate::completion_nll::{CompletionNll, mean_nll};
use crate::error::EvalError;
use crate::scored::{check_tokens, target_nlls};
use crate::task::{Progress, Subject};

/// Tokens of which the last ones are scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScoredItem {
    /// What is read and scored.
    pub ids: Vec<u32>,
    /// The first token that is scored, from 1: what stands before it is only read.
    pub first: usize,
}

/// What is left of an original.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Retention {
    /// Mean negative log-likelihood of a scored token under the original, in nats.
    pub original_nll: f64,
    /// The same under the other model.
    pub nll: f64,
    /// `exp(original_nll - nll)`: 1 for a model that is as good, more for a better one.
    pub share: f64,
    /// Standard error of the share over items, from the items' differences (both models saw the same ones).
    pub stderr: f64,
    /// Items scored.
    pub items: usize,
    /// Tokens scored in each model.
    pub tokens: usize,
}

/// Scores both models on `items`, one after the other.
pub fn retention(
    original: &Subject<'_>,
    subject: &Subject<'_>,
    items: &[ScoredItem],
    progress: &mut Progress<'_>,
) -> Result<Retention, EvalError> {
    let mut shares = [Vec::new(), Vec::new()];
    for (index, item) in items.iter().enumerate() {
        crate::perplexity::report(progress, index, items.len())?;
        for (model, shares) in [original, subject].iter().zip(&mut shares) {
            shares.push(item_nll(model, item, index)?);
        }
    }
    crate::perplexity::report(progress, items.len(), items.len())?;
    let [before, after] = shares;
    let difference = |(b, a): (&CompletionNll, &CompletionNll)| CompletionNll { nll: a.nll - b.nll, ..*a };
    let differences: Vec<CompletionNll> = before.iter().zip(&after).map(difference).collect();
    let mean = |shares: &[CompletionNll]| mean_nll(shares).ok_or(EvalError::TextTooShort { tokens: 0 });
    let (before, after, lost) = (mean(&before)?, mean(&after)?, mean(&differences)?);
    // To first order a small change of the exponent changes the share by as much of itself.
    let share = (-lost.value).exp();
    let stderr = share * lost.stderr.unwrap_or(0.0);
    let (items, tokens) = (lost.items, lost.tokens);
    Ok(Retention { original_nll: before.value, nll: after.value, share, stderr, items, tokens })
}

fn item_nll(subject: &Subject<'_>, item: &ScoredItem, index: usize) -> Result<CompletionNll, EvalError> {
    let ScoredItem { ids, first } = item;
    if *first == 0 || *first >= ids.len() {
        return Err(EvalError::TextTooShort { tokens: ids.len() });
    }
    check_tokens(subject, ids)?;
    let nlls = target_nlls(subject, &ids[..ids.len() - 1], first - 1, &ids[*first..], index)?;
    Ok(CompletionNll { nll: nlls.iter().sum(), tokens: nlls.len(), cut_tokens: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::ControlFlow;
    use tailorq_model::testing::TinyModel;
    use tailorq_model::{Batch, OpenedModel};
    use tailorq_runtime::Device;

    fn tiny(seed: u64) -> OpenedModel {
        let dir = tempfile::tempdir().unwrap();
        TinyModel::new("llama", seed).unwrap().write_directory(dir.path()).unwrap();
        tailorq_model::open(dir.path().to_str().unwrap()).unwrap()
    }

    fn subject<'a>(opened: &'a OpenedModel, device: &'a dyn Device) -> Subject<'a> {
        Subject {
            name: "tiny",
            model: &opened.model,
            tokenizer: &opened.tokenizer,
            template: None,
            device,
            decoders: None,
        }
    }

    #[test]
    fn the_share_is_the_ratio_of_geometric_means() {
        let (a, b) = (&tiny(1), &tiny(2));
        let device = tailorq_kernels::cpu();
        let subject = |opened| subject(opened, device.as_ref());
        let items = [
            ScoredItem { ids: vec![3, 9, 27, 81, 50], first: 2 },
            ScoredItem { ids: vec![4, 8, 15], first: 1 },
            ScoredItem { ids: vec![16, 23, 42, 7], first: 3 },
        ];
        let probability = |opened: &OpenedModel, item: &ScoredItem, t: usize| {
            let batch = Batch::new([&item.ids[..t]]);
            let logits = opened.model.logits(device.as_ref(), &opened.model.hidden(device.as_ref(), &batch, None));
            let row: Vec<f64> = logits.row(t - 1).iter().map(|l| f64::from(*l).exp()).collect();
            row[item.ids[t] as usize] / row.iter().sum::<f64>()
        };
        let product = |opened: &OpenedModel| -> f64 {
            let of = |i: &ScoredItem| (i.first..i.ids.len()).map(|t| probability(opened, i, t)).product::<f64>();
            items.iter().map(of).product()
        };
        let mut steps = Vec::new();
        let found = retention(&subject(a), &subject(b), &items, &mut |done, total| {
            steps.push((done, total));
            ControlFlow::Continue(())
        })
        .unwrap();
        let expected = (product(b) / product(a)).powf(1.0 / 6.0);
        assert!((found.share / expected - 1.0).abs() < 1e-4, "{found:?} {expected}");
        assert!((found.share - (found.original_nll - found.nll).exp()).abs() < 1e-9);
        assert!(found.stderr > 0.0);
        assert_eq!((found.items, found.tokens), (3, 6));
        assert_eq!(steps, [(0, 3), (1, 3), (2, 3), (3, 3)]);
        let same = retention(&subject(a), &subject(a), &items, &mut |_, _| ControlFlow::Continue(())).unwrap();
        assert_eq!((same.share, same.stderr), (1.0, 0.0));
        let stopped = retention(&subject(a), &subject(b), &items, &mut |_, _| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(EvalError::Interrupted)));
        let nothing = [ScoredItem { ids: vec![3, 9], first: 2 }];
        assert!(retention(&subject(a), &subject(b), &nothing, &mut |_, _| ControlFlow::Continue(())).is_err());
    }
}
