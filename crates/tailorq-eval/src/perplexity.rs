//! Perplexity of a text, and how far a model's predictions are from those of a reference.
//!
//! The `paper` definition, as papers on quantization report it (GPTQ, Frantar et al. 2023, section 4): the whole text is
//! one stream of tokens (with a BOS once at its start when the tokenizer adds one), cut into consecutive windows without
//! overlap; each window is scored on its own, its first token excepted; the value is
//! `exp(total negative log-likelihood / total targets)`.

use crate::cache::{Contents, Finished, Whose};
use crate::corpus::{Corpus, text_or_corpus};
use crate::error::EvalError;
use crate::metric::{Metric, ratio_and_stderr};
use crate::online::{PairDivergence, Piece, TargetNll};
use crate::task::{Progress, Subject, Task, TaskOption, TaskOptions, TaskResult};
use crate::windows::WindowOptions;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value};
use std::borrow::Cow;
use tailorq_model::{Batch, Model};
use tailorq_runtime::Device;
use tailorq_tensor::Matrix;

/// A measured perplexity.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// `exp` of the mean.
    pub value: f64,
    /// Mean negative log-likelihood of a target, in nats.
    pub mean_nll: f64,
    /// Standard error of that mean over windows; a single window has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_nll_stderr: Option<f64>,
    /// Targets scored: `windows * (window - 1)`.
    pub tokens: usize,
    /// Windows scored.
    pub windows: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Tokens of the whole text.
    pub tokens_in_text: usize,
    /// The text had fewer tokens than a window, so that all of it was one shorter window.
    pub shortened: bool,
    /// Always `paper`: see the module's documentation.
    pub definition: &'static str,
}

/// A model's predictions beside those of a reference, on the same tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Divergence {
    /// Mean `KL(reference || model)` of a position, in nats.
    pub mean_kl: f64,
    /// Standard error of that mean over windows; a single window has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_kl_stderr: Option<f64>,
    /// Share of positions at which both find the same word most likely.
    pub top1_agreement: f64,
    /// Standard error of that share over windows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1_agreement_stderr: Option<f64>,
    /// Perplexity of the reference.
    pub reference_perplexity: f64,
}

/// Perplexity of `subject` on `tokens`.
pub fn perplexity(
    subject: &Subject<'_>,
    tokens: &[u32],
    options: WindowOptions,
    progress: &mut Progress<'_>,
) -> Result<Perplexity, EvalError> {
    measured(subject, tokens, options, &mut Finished::nothing(), progress)
}

fn measured(
    subject: &Subject<'_>,
    tokens: &[u32],
    options: WindowOptions,
    finished: &mut Finished,
    progress: &mut Progress<'_>,
) -> Result<Perplexity, EvalError> {
    let windows = options.cut(tokens)?;
    check_windows(subject, tokens, windows[0].len())?;
    let mut nlls = Vec::with_capacity(windows.len());
    for (window_idx, window) in windows.iter().enumerate() {
        report(progress, window_idx, windows.len())?;
        let [of_window] = finished.numbers(window_idx, || Ok([window_nll(subject, window, window_idx)?]))?;
        nlls.push(of_window);
    }
    report(progress, windows.len(), windows.len())?;
    Ok(summary(&nlls, &windows, tokens, options))
}

fn window_nll(subject: &Subject<'_>, window: &[u32], window_idx: usize) -> Result<f64, EvalError> {
    let hidden = scored_hidden(subject.model, subject.device, window);
    let mut rows: Vec<TargetNll> = window[1..].iter().map(|id| TargetNll::new(*id)).collect();
    subject.model.for_each_logits(subject.device, &hidden, &mut |words, logits| {
        TargetNll::add_all(subject.device, &mut rows, words.start, logits);
    });
    finite(subject, window_idx, rows.iter().map(TargetNll::value).sum())
}

/// Perplexity of `subject` and its divergence from `reference` on `tokens`, which both understand alike (see
/// [`same_tokens`]).
///
/// Both models' hidden states of one window are held, and the vocabulary is visited in lockstep.
pub fn divergence(
    subject: &Subject<'_>,
    reference: &Subject<'_>,
    tokens: &[u32],
    options: WindowOptions,
    progress: &mut Progress<'_>,
) -> Result<(Perplexity, Divergence), EvalError> {
    diverging(subject, reference, (tokens, options), &mut Finished::nothing(), progress)
}

fn diverging(
    subject: &Subject<'_>,
    reference: &Subject<'_>,
    (tokens, options): (&[u32], WindowOptions),
    finished: &mut Finished,
    progress: &mut Progress<'_>,
) -> Result<(Perplexity, Divergence), EvalError> {
    let windows = options.cut(tokens)?;
    same_vocabulary(subject, reference)?;
    check_windows(subject, tokens, windows[0].len())?;
    check_windows(reference, tokens, windows[0].len())?;
    let mut sums: [Vec<f64>; 4] = Default::default();
    for (window_idx, window) in windows.iter().enumerate() {
        report(progress, window_idx, windows.len())?;
        let of_window = finished.numbers(window_idx, || {
            let [nll, reference_nll, kl, agreed] = compare_window(subject, reference, window);
            Ok([
                finite(subject, window_idx, nll)?,
                finite(reference, window_idx, reference_nll)?,
                finite(subject, window_idx, kl)?,
                agreed,
            ])
        })?;
        sums.iter_mut().zip(of_window).for_each(|(sums, of_window)| sums.push(of_window));
    }
    let [nlls, reference_nlls, kl, agreed] = sums;
    report(progress, windows.len(), windows.len())?;
    let mean = |sums: &[f64]| a_target(sums, &windows);
    let ((mean_kl, mean_kl_stderr), (top1_agreement, top1_agreement_stderr)) = (mean(&kl), mean(&agreed));
    let reference_perplexity = mean(&reference_nlls).0.exp();
    let divergence =
        Divergence { mean_kl, mean_kl_stderr, top1_agreement, top1_agreement_stderr, reference_perplexity };
    let perplexity = summary(&nlls, &windows, tokens, options);
    Ok((perplexity, divergence))
}

/// Tokens of `text`, which both models' tokenizers must read alike.
pub fn same_tokens(subject: &Subject<'_>, reference: &Subject<'_>, text: &str) -> Result<Vec<u32>, EvalError> {
    let ours = subject.tokenizer.encode(text, true)?;
    let theirs = reference.tokenizer.encode(text, true)?;
    if ours == theirs {
        return Ok(ours);
    }
    let position = ours.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
    Err(EvalError::TokensDiffer { model: subject.name.to_owned(), reference: reference.name.to_owned(), position })
}

/// Hidden states of all tokens but the last, which predicts nothing that is scored: `[window - 1, hidden]`.
fn scored_hidden(model: &Model, device: &dyn Device, window: &[u32]) -> Matrix {
    // The last token is never attended to by those before it, so leaving it out changes nothing.
    model.hidden(device, &Batch::new([&window[..window.len() - 1]]), None)
}

/// Sums over a window's positions: negative log-likelihoods of both models, divergences, and how often both find the same
/// word most likely.
fn compare_window(subject: &Subject<'_>, reference: &Subject<'_>, window: &[u32]) -> [f64; 4] {
    let hidden = scored_hidden(subject.model, subject.device, window);
    let reference_hidden = scored_hidden(reference.model, reference.device, window);
    if subject.device.resident().is_some() && reference.device.resident().is_some() {
        return compare_resident((subject, &hidden), (reference, &reference_hidden), window);
    }
    let mut rows: Vec<PairDivergence> = window[1..].iter().map(|id| PairDivergence::new(*id)).collect();
    reference.model.for_each_logits(reference.device, &reference_hidden, &mut |words, reference_logits| {
        let n_words = words.len();
        let logits = subject.device.linear_matrix(&hidden, &subject.model.head, None, words.clone());
        let theirs = Piece::of_rows(reference.device, reference_logits);
        let ours = Piece::of_rows(subject.device, &logits);
        let theirs = reference_logits.data().par_chunks(n_words).zip(theirs);
        let ours = logits.data().par_chunks(n_words).zip(ours);
        rows.par_iter_mut().zip(theirs).zip(ours).for_each(|((row, r), m)| row.add(words.start, r, m));
    });
    let sum = |of: fn(&PairDivergence) -> f64| rows.iter().map(of).sum();
    let agreed = rows.iter().filter(|r| r.agrees()).count() as f64;
    [sum(PairDivergence::nll), sum(PairDivergence::reference_nll), sum(PairDivergence::kl), agreed]
}

/// [`compare_window`] where logits lie in the memory of a device: they are computed twice, once for their sums and once for
/// the divergence, and never leave it.
fn compare_resident(
    (subject, hidden): (&Subject<'_>, &Matrix),
    (reference, reference_hidden): (&Subject<'_>, &Matrix),
    window: &[u32],
) -> [f64; 4] {
    let summed = |subject: &Subject<'_>, hidden: &Matrix| {
        let mut rows: Vec<TargetNll> = window[1..].iter().map(|id| TargetNll::new(*id)).collect();
        let mut best = vec![(0, f32::NEG_INFINITY); rows.len()];
        subject.model.for_each_logits(subject.device, hidden, &mut |words, logits| {
            TargetNll::add_all(subject.device, &mut rows, words.start, logits);
            let of_chunk = subject.device.resident().map(|resident| resident.row_max(logits)).unwrap_or_default();
            for (best, (word, logit)) in best.iter_mut().zip(of_chunk).filter(|(best, found)| found.1 > best.1) {
                *best = (words.start + word, logit);
            }
        });
        let log_sums: Vec<f64> = rows.iter().map(TargetNll::log_sum).collect();
        (rows.iter().map(TargetNll::value).sum::<f64>(), log_sums, best)
    };
    let (nll, log_sums, best) = summed(subject, hidden);
    let (reference_nll, reference_sums, reference_best) = summed(reference, reference_hidden);
    let (weights, mut divergences) = (vec![0.0; log_sums.len()], vec![0.0; log_sums.len()]);
    reference.model.for_each_logits(reference.device, reference_hidden, &mut |words, expected| {
        let mut logits = subject.device.linear_matrix(hidden, &subject.model.head, None, words);
        let expected = (expected, reference_sums.as_slice());
        subject.device.divergence_backward_matrix(&weights, expected, (&mut logits, &log_sums), &mut divergences);
    });
    let agreed = best.iter().zip(&reference_best).filter(|(a, b)| a.0 == b.0).count() as f64;
    [nll, reference_nll, divergences.iter().sum(), agreed]
}

pub(crate) fn report(progress: &mut Progress<'_>, done: usize, total: usize) -> Result<(), EvalError> {
    if progress(done, total).is_break() { Err(EvalError::Interrupted) } else { Ok(()) }
}

fn finite(subject: &Subject<'_>, window: usize, value: f64) -> Result<f64, EvalError> {
    if value.is_finite() { Ok(value) } else { Err(EvalError::NotFinite { model: subject.name.to_owned(), window }) }
}

/// The mean of a target from the sums of windows, and its standard error over them.
fn a_target(sums: &[f64], windows: &[&[u32]]) -> (f64, Option<f64>) {
    let pairs = sums.iter().zip(windows).map(|(sum, window)| (*sum, (window.len() - 1) as f64));
    ratio_and_stderr(&pairs.collect::<Vec<_>>())
}

fn summary(nlls: &[f64], windows: &[&[u32]], tokens: &[u32], options: WindowOptions) -> Perplexity {
    let targets: usize = windows.iter().map(|w| w.len() - 1).sum();
    let (mean_nll, mean_nll_stderr) = a_target(nlls, windows);
    Perplexity {
        value: mean_nll.exp(),
        mean_nll,
        mean_nll_stderr,
        tokens: targets,
        windows: windows.len(),
        window: windows[0].len(),
        tokens_in_text: tokens.len(),
        shortened: windows[0].len() < options.window,
        definition: "paper",
    }
}

fn same_vocabulary(subject: &Subject<'_>, reference: &Subject<'_>) -> Result<(), EvalError> {
    let (vocab, reference_vocab) = (subject.model.config.vocab, reference.model.config.vocab);
    if vocab == reference_vocab {
        return Ok(());
    }
    Err(EvalError::VocabularyDiffers {
        model: subject.name.to_owned(),
        vocab,
        reference: reference.name.to_owned(),
        reference_vocab,
    })
}

fn check_windows(subject: &Subject<'_>, tokens: &[u32], window: usize) -> Result<(), EvalError> {
    let config = &subject.model.config;
    if window > config.max_positions {
        let remedy =
            format!("{} was trained for a context of {}: use at most that", subject.name, config.max_positions);
        return Err(EvalError::BadOption { option: "window", value: window, remedy });
    }
    crate::scored::check_tokens(subject, tokens)
}

/// `perplexity`.
pub(crate) const PERPLEXITY: &dyn Task = &PerplexityTask { name: "perplexity", corpus: Corpus::WikiText2 };
/// `perplexity_c4`.
pub(crate) const PERPLEXITY_C4: &dyn Task = &PerplexityTask { name: "perplexity_c4", corpus: Corpus::C4 };

/// [`perplexity`], and [`divergence`] when there is a reference, as a task.
struct PerplexityTask {
    name: &'static str,
    /// What is scored, unless there is a text of one's own.
    corpus: Corpus,
}

impl PerplexityTask {
    /// The text as the subject, and the reference if there is one, reads it, and how it is cut.
    fn tokens_and_windows(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
    ) -> Result<(Vec<u32>, WindowOptions), EvalError> {
        let text = match self.corpus {
            Corpus::WikiText2 => text_or_corpus(self.name, self.corpus, options)?,
            Corpus::C4 => Cow::Owned(self.corpus.read(self.name, options)?),
        };
        let default = WindowOptions::default();
        let windows = WindowOptions { window: options.window.unwrap_or(default.window), windows: options.windows };
        let tokens = match &options.reference {
            None => subject.tokenizer.encode(&text, true)?,
            Some(reference) => {
                same_vocabulary(subject, reference)?;
                same_tokens(subject, reference, &text)?
            }
        };
        Ok((tokens, windows))
    }
}

impl Task for PerplexityTask {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        match self.corpus {
            Corpus::WikiText2 => {
                "how surprised the model is by a text, or by WikiText-2 from --data (lower is better); with a reference model also how \
                 far their predictions differ"
            }
            Corpus::C4 => "the same of C4, from --data",
        }
    }

    fn reads(&self) -> &'static [TaskOption] {
        use TaskOption::{Data, Reference, Text, Window, Windows};
        const ALL: &[TaskOption] = &[Data, Window, Windows, Reference, Text];
        if self.corpus == Corpus::C4 { &ALL[..4] } else { ALL }
    }

    fn check(&self, subject: &Subject<'_>, options: &TaskOptions<'_>) -> Result<(), EvalError> {
        let (tokens, windows) = self.tokens_and_windows(subject, options)?;
        let window = windows.cut(&tokens)?[0].len();
        let models = [Some(subject), options.reference.as_ref()].into_iter().flatten();
        models.into_iter().try_for_each(|model| check_windows(model, &tokens, window))
    }

    fn run(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<TaskResult, EvalError> {
        let (tokens, windows) = self.tokens_and_windows(subject, options)?;
        let mut finished = open_finished(self.name(), options, &tokens, windows)?;
        let (perplexity, divergence) = match &options.reference {
            None => (measured(subject, &tokens, windows, &mut finished, progress)?, None),
            Some(reference) => {
                let (perplexity, d) = diverging(subject, reference, (&tokens, windows), &mut finished, progress)?;
                (perplexity, Some((reference.name, d)))
            }
        };
        let mut details = Map::new();
        Metric::exponential(perplexity.mean_nll, perplexity.mean_nll_stderr)
            .tell_uncertainty("perplexity,none", &mut details);
        details.extend(fields(&perplexity).into_iter().filter(|(key, _)| key != "value" && key != "tokens"));
        if let Some((name, divergence)) = divergence {
            let mut compared = fields(&divergence);
            compared.insert("reference".to_owned(), name.into());
            details.insert("divergence".to_owned(), compared.into());
        }
        Ok(TaskResult::new(perplexity.value, perplexity.tokens, details).with_cached(finished.served()))
    }
}

/// The windows that are finished already: each window depends on the tokens, the window and both models.
fn open_finished(
    task: &'static str,
    options: &TaskOptions<'_>,
    tokens: &[u32],
    windows: WindowOptions,
) -> Result<Finished, EvalError> {
    let reference = options.items.cache.as_ref().and_then(|cache| cache.reference);
    let mut contents = Contents::new(&serde_json::json!({"window": windows.window, "reference": reference}));
    contents.add(&tokens.into());
    Finished::open(task, options, Whose::Subject, contents)
}

/// The fields of a plain struct of numbers and words.
pub(crate) fn fields(value: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(value) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}
