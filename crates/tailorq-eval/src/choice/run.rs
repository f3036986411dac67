//! From questions to results: scoring, the log, the reference.

use super::question::Question;
use super::verdict::{Verdict, insert_share};
use crate::cache::{Contents, Finished, Whose};
use crate::error::EvalError;
use crate::flips::{Pair, flips};
use crate::items::ItemRecord;
use crate::likelihood::{Likelihood, PreparedItem, prepare, score_items};
use crate::prompt::{Asker, Lead, PromptStyle};
use crate::task::{Progress, Subject, TaskOptions, TaskResult};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

/// A question in its place, after its description and examples.
pub(super) struct Asked {
    pub(super) question: Question,
    pub(super) lead: Lead,
}

/// The decisions on all items.
pub(super) struct Decided {
    pub(super) verdicts: Vec<Verdict>,
    of_reference: Option<Vec<Verdict>>,
    /// Tokens of choices that were scored.
    pub(super) tokens: usize,
    /// Items of which a context lost its beginning.
    shortened: usize,
    /// Results of items that came from the cache.
    cached: usize,
}

/// Asks the first question as all of them will be asked, of the reference too, and scores nothing.
pub(super) fn check_template(
    subject: &Subject<'_>,
    options: &TaskOptions<'_>,
    asked: &[Asked],
) -> Result<(), EvalError> {
    let models = [Some(subject), options.reference.as_ref()].into_iter().flatten();
    models
        .flat_map(|model| asked.first().map(|first| (model, first)))
        .try_for_each(|(model, first)| first.question.requests(Asker::new(model, options), &first.lead).map(drop))
}

/// Scores all questions, with the reference too if there is one, and logs them in their order.
pub(super) fn decide(
    task: &'static str,
    subject: &Subject<'_>,
    asked: Vec<Asked>,
    by_length: bool,
    options: &TaskOptions<'_>,
    progress: &mut Progress<'_>,
) -> Result<Decided, EvalError> {
    let n = asked.len();
    let total = if options.reference.is_some() { 2 * n } else { n };
    let (items, contents) = prepare_all(task, subject, &asked, options)?;
    let tokens = items.iter().flat_map(|i| &i.branches).map(|b| b.targets.len()).sum();
    let shortened = items.iter().filter(|i| i.shortened > 0).count();
    let mut finished = Finished::open(task, options, Whose::Subject, contents)?;
    let scores = score_items(subject, &items, &mut finished, &mut |done, _| progress(done, total))?;
    let verdicts = judge(&asked, &scores);
    let mut cached = finished.served();
    // The reference may be the same model, whose file is then this one.
    drop(finished);
    let mut of_reference = None;
    if let Some(reference) = &options.reference {
        let (items, contents) = prepare_all(task, reference, &asked, options)?;
        let mut finished = Finished::open(task, options, Whose::Reference, contents)?;
        let scores = score_items(reference, &items, &mut finished, &mut |done, _| progress(n + done, total))?;
        of_reference = Some(judge(&asked, &scores));
        cached += finished.served();
    }
    if let Some(log) = options.items.log {
        for (index, verdict) in verdicts.iter().enumerate() {
            log(&record(task, index, verdict, of_reference.as_ref().map(|all| &all[index]), by_length));
        }
    }
    Ok(Decided { verdicts, of_reference, tokens, shortened, cached })
}

/// All items as the model reads them, and all that decides their likelihoods.
fn prepare_all(
    task: &'static str,
    subject: &Subject<'_>,
    asked: &[Asked],
    options: &TaskOptions<'_>,
) -> Result<(Vec<PreparedItem>, Contents), EvalError> {
    let asker = Asker::new(subject, options);
    let one = |(index, asked): (usize, &Asked)| {
        let requests = asked.question.requests(asker, &asked.lead)?;
        let content: Value = requests.iter().map(|r| json!([r.context, r.continuation])).collect();
        Ok((prepare(subject, task, index, &requests)?, content))
    };
    let prepared: Vec<Result<_, EvalError>> = asked.par_iter().enumerate().map(one).collect();
    let (mut items, mut contents) = (Vec::with_capacity(asked.len()), Contents::new(&Value::Null));
    for prepared in prepared {
        // Of several errors the first in the order of the file is told, whichever thread came first.
        let (item, content) = prepared?;
        contents.add(&content);
        items.push(item);
    }
    Ok((items, contents))
}

fn judge(asked: &[Asked], scores: &[Vec<Likelihood>]) -> Vec<Verdict> {
    asked
        .iter()
        .zip(scores)
        .map(|(a, likelihoods)| Verdict::new(likelihoods, &a.question.lengths(), a.question.gold))
        .collect()
}

fn record(
    task: &'static str,
    index: usize,
    verdict: &Verdict,
    of_reference: Option<&Verdict>,
    by_length: bool,
) -> ItemRecord {
    let mut scores = Map::new();
    scores.insert("is_greedy".to_owned(), json!(verdict.is_greedy));
    scores.insert("acc".to_owned(), u8::from(verdict.is_right()).into());
    if by_length {
        scores.insert("prediction_norm".to_owned(), verdict.prediction_norm.into());
        scores.insert("acc_norm".to_owned(), u8::from(verdict.is_right_by_length()).into());
    }
    if let Some(of_reference) = of_reference {
        scores.insert("reference_prediction".to_owned(), of_reference.prediction.into());
        scores.insert("reference_loglikelihoods".to_owned(), json!(of_reference.loglikelihoods));
    }
    ItemRecord {
        loglikelihoods: Some(verdict.loglikelihoods.clone()),
        prediction: Some(verdict.prediction.into()),
        gold: Some(verdict.gold.into()),
        scores,
        ..ItemRecord::new(task, index)
    }
}

/// What all decisions come to.
pub(super) fn summarize(
    task: &'static str,
    decided: &Decided,
    by_length: bool,
    options: &TaskOptions<'_>,
) -> TaskResult {
    let verdicts = &decided.verdicts;
    let mut details = Map::new();
    details.insert("alias".to_owned(), task.into());
    details.insert("items".to_owned(), verdicts.len().into());
    details.insert("num_fewshot".to_owned(), options.items.num_fewshot.unwrap_or(0).into());
    if options.items.style != PromptStyle::Text {
        let of_turns = options.items.style == PromptStyle::ChatOfTurns;
        details.insert("apply_chat_template".to_owned(), true.into());
        details.insert("fewshot_as_multiturn".to_owned(), of_turns.into());
    }
    let right: Vec<bool> = verdicts.iter().map(Verdict::is_right).collect();
    let value = insert_share(&mut details, "acc", &right);
    if by_length {
        let right: Vec<bool> = verdicts.iter().map(Verdict::is_right_by_length).collect();
        insert_share(&mut details, "acc_norm", &right);
    }
    details.insert("shortened_prompts".to_owned(), decided.shortened.into());
    if let (Some(of_reference), Some(reference)) = (&decided.of_reference, &options.reference) {
        let pairs = |of: fn(&Verdict, &Verdict) -> Pair| -> Vec<Pair> {
            of_reference.iter().zip(verdicts).map(|(r, m)| of(r, m)).collect()
        };
        let by_sum = |r: &Verdict, m: &Verdict| Pair {
            right: [r.is_right(), m.is_right()],
            differs: r.prediction != m.prediction,
        };
        let by_norm = |r: &Verdict, m: &Verdict| Pair {
            right: [r.is_right_by_length(), m.is_right_by_length()],
            differs: r.prediction_norm != m.prediction_norm,
        };
        details.insert("flips".to_owned(), flips(reference.name, "acc,none", &pairs(by_sum)));
        if by_length {
            details.insert("flips_acc_norm".to_owned(), flips(reference.name, "acc_norm,none", &pairs(by_norm)));
        }
    }
    TaskResult::new(value, decided.tokens, details).with_cached(decided.cached)
}
