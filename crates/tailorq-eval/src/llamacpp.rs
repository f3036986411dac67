//! Perplexity as `llama-perplexity` of llama.cpp computes it.
//!
//! The text without a last newline is one stream of tokens, cut into windows without overlap; in each window only the
//! second half is scored, so that every target has at least half a window of context. Where the tokenizer begins texts
//! with a BOS, it takes the place of each window's first token. A rest after the last whole window is dropped, and a text of
//! less than two windows is refused, as there. The values differ from those of the `paper` definition on the same text:
//! shorter windows, but no targets without context.

use crate::cache::{Contents, Finished, Whose};
use crate::corpus::{Corpus, text_or_corpus};
use crate::error::EvalError;
use crate::metric::{Metric, ratio_and_stderr};
use crate::scored::{check_tokens, target_nlls};
use crate::task::{Progress, Subject, Task, TaskOption, TaskOptions, TaskResult};
use serde::Serialize;
use serde_json::{Map, json};
use std::borrow::Cow;
use tailorq_model::Tokenizer;

/// llama.cpp's default window.
pub const LLAMA_CPP_WINDOW: usize = 512;

/// A perplexity in llama.cpp's definition.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LlamaCppPerplexity {
    /// `exp` of the mean.
    pub value: f64,
    /// Mean negative log-likelihood of a target, in nats.
    pub mean_nll: f64,
    /// The number after `+/-` in llama.cpp's output: the standard error of the mean times the value.
    pub stderr: f64,
    /// Standard error of the mean over windows, whose targets are not independent of each other; a single window has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_nll_stderr: Option<f64>,
    /// Targets scored: `windows * (window - window / 2 - 1)`.
    pub tokens: usize,
    /// Windows scored.
    pub windows: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Tokens of the whole text.
    pub tokens_in_text: usize,
    /// Always `llama.cpp`.
    pub definition: &'static str,
}

/// Perplexity of `text` in windows of `window` tokens, at most `limit` of them.
pub fn llamacpp_perplexity(
    subject: &Subject<'_>,
    text: &str,
    window: usize,
    limit: Option<usize>,
    progress: &mut Progress<'_>,
) -> Result<LlamaCppPerplexity, EvalError> {
    measured(subject, text, (window, limit), &mut Finished::nothing(), progress)
}

fn measured(
    subject: &Subject<'_>,
    text: &str,
    (window, limit): (usize, Option<usize>),
    finished: &mut Finished,
    progress: &mut Progress<'_>,
) -> Result<LlamaCppPerplexity, EvalError> {
    let tokens = tokens_to_score(subject, text, window)?;
    let bos = leading_bos(subject.tokenizer)?;
    let n_windows = (tokens.len() / window).min(limit.unwrap_or(usize::MAX).max(1));
    let first = window / 2;
    let (mut sum, mut squares, mut count, mut pairs) = (0.0, 0.0, 0usize, Vec::with_capacity(n_windows));
    for (window_idx, piece) in tokens.chunks_exact(window).take(n_windows).enumerate() {
        crate::perplexity::report(progress, window_idx, n_windows)?;
        let mut inputs = piece[..window - 1].to_vec();
        if let Some(bos) = bos {
            inputs[0] = bos;
        }
        let [of_window, of_squares] = finished.numbers(window_idx, || {
            let nlls = target_nlls(subject, &inputs, first, &piece[first + 1..], window_idx)?;
            Ok([nlls.iter().sum(), nlls.iter().map(|nll| nll * nll).sum()])
        })?;
        sum += of_window;
        squares += of_squares;
        count += window - first - 1;
        pairs.push((of_window, (window - first - 1) as f64));
    }
    crate::perplexity::report(progress, n_windows, n_windows)?;
    let n = count as f64;
    let (mean, value) = (sum / n, (sum / n).exp());
    let variance = (squares / n - mean * mean).max(0.0);
    Ok(LlamaCppPerplexity {
        value,
        mean_nll: mean,
        mean_nll_stderr: ratio_and_stderr(&pairs).1,
        stderr: if count > 1 { (variance / (n - 1.0)).sqrt() * value } else { 0.0 },
        tokens: count,
        windows: n_windows,
        window,
        tokens_in_text: tokens.len(),
        definition: "llama.cpp",
    })
}

/// The tokens of a text that has two windows.
fn tokens_to_score(subject: &Subject<'_>, text: &str, window: usize) -> Result<Vec<u32>, EvalError> {
    check_window(subject, window)?;
    let tokens = subject.tokenizer.encode(text.strip_suffix('\n').unwrap_or(text), true)?;
    check_tokens(subject, &tokens)?;
    if tokens.len() < 2 * window {
        let remedy =
            format!("the text has {} tokens and must have two windows: use at most half of that", tokens.len());
        return Err(EvalError::BadOption { option: "window", value: window, remedy });
    }
    Ok(tokens)
}

fn check_window(subject: &Subject<'_>, window: usize) -> Result<(), EvalError> {
    let most = subject.model.config.max_positions;
    let remedy = match window {
        0..4 => "use at least 4 tokens: only the second half is scored".to_owned(),
        w if w > most => format!("{} was trained for a context of {most}: use at most that", subject.name),
        _ => return Ok(()),
    };
    Err(EvalError::BadOption { option: "window", value: window, remedy })
}

/// The BOS, where the tokenizer begins every text with it.
pub(crate) fn leading_bos(tokenizer: &Tokenizer) -> Result<Option<u32>, EvalError> {
    let begins = |special| Ok::<_, EvalError>(tokenizer.encode("a", special)?.first().copied());
    let (with, without) = (begins(true)?, begins(false)?);
    Ok(tokenizer.bos.filter(|bos| with == Some(*bos) && without != with))
}

/// `perplexity_llamacpp`.
pub(crate) const PERPLEXITY_LLAMACPP: &dyn Task =
    &LlamaCppTask { name: "perplexity_llamacpp", corpus: Corpus::WikiText2 };
/// `perplexity_llamacpp_c4`.
pub(crate) const PERPLEXITY_LLAMACPP_C4: &dyn Task =
    &LlamaCppTask { name: "perplexity_llamacpp_c4", corpus: Corpus::C4 };

/// [`llamacpp_perplexity`] as a task.
struct LlamaCppTask {
    name: &'static str,
    corpus: Corpus,
}

impl LlamaCppTask {
    fn text<'a>(&self, options: &TaskOptions<'a>) -> Result<Cow<'a, str>, EvalError> {
        match self.corpus {
            Corpus::WikiText2 => text_or_corpus(self.name, self.corpus, options),
            Corpus::C4 => Ok(Cow::Owned(self.corpus.read(self.name, options)?)),
        }
    }
}

impl Task for LlamaCppTask {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        match self.corpus {
            Corpus::WikiText2 => "perplexity as llama.cpp's tool computes it: the second half of each window",
            Corpus::C4 => "the same of C4, from --data",
        }
    }

    fn reads(&self) -> &'static [TaskOption] {
        const ALL: &[TaskOption] = &[TaskOption::Data, TaskOption::Window, TaskOption::Windows, TaskOption::Text];
        if self.corpus == Corpus::C4 { &ALL[..3] } else { ALL }
    }

    fn check(&self, subject: &Subject<'_>, options: &TaskOptions<'_>) -> Result<(), EvalError> {
        let text = self.text(options)?;
        tokens_to_score(subject, &text, options.window.unwrap_or(LLAMA_CPP_WINDOW)).map(drop)
    }

    fn run(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<TaskResult, EvalError> {
        let text = self.text(options)?;
        let window = options.window.unwrap_or(LLAMA_CPP_WINDOW);
        let mut contents = Contents::new(&json!({"window": window}));
        contents.add(&text.as_ref().into());
        let mut finished = Finished::open(self.name(), options, Whose::Subject, contents)?;
        let perplexity = measured(subject, &text, (window, options.windows), &mut finished, progress)?;
        let mut details = Map::new();
        Metric::exponential(perplexity.mean_nll, perplexity.mean_nll_stderr)
            .tell_uncertainty("perplexity,none", &mut details);
        let further = crate::perplexity::fields(&perplexity).into_iter();
        details.extend(further.filter(|(key, _)| key != "value" && key != "tokens"));
        Ok(TaskResult::new(perplexity.value, perplexity.tokens, details).with_cached(finished.served()))
    }
}
