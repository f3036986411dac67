//! Perplexity of documents as lm-evaluation-harness computes it (`loglikelihood_rolling`).
//!
//! Every token of a document is scored. The first window predicts up to `max_length` tokens, its first one after a prefix
//! token (BOS, or EOS where there is none); each further window predicts up to `max_length` more with one token of
//! context, and the last, shorter one has as much context as fits. The sum is then spread over words or bytes of the
//! original text, so that models with different tokenizers can be compared.

use crate::cache::{Contents, Finished, Whose};
use crate::calibration::{CalibrationCount, Identity, check_items};
use crate::corpus::{Corpus, text_or_corpus};
use crate::data::{Item, own_items};
use crate::error::EvalError;
use crate::items::ItemRecord;
use crate::metric::{Metric, ratio_and_stderr};
use crate::scored::{check_tokens, target_nlls};
use crate::task::{Progress, Subject, Task, TaskOption, TaskOptions, TaskResult};
use crate::wikitext;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::ops::Range;
use tailorq_model::Tokenizer;

/// The harness' window where a model names none, and that of papers. The harness takes the whole context of a model that
/// names one, which gives other numbers on documents longer than this.
pub const ROLLING_LENGTH: usize = 2048;

/// A document to be scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// What the model reads.
    pub text: String,
    /// Words of the original, by which `word_perplexity` divides.
    pub words: usize,
    /// Bytes of the original in UTF-8.
    pub bytes: usize,
}

impl Document {
    /// A text as it is.
    pub fn plain(text: String) -> Self {
        Document { words: wikitext::count_words(&text), bytes: text.len(), text }
    }

    /// The pages of a raw WikiText file, detokenized; words and bytes are those of the file.
    pub fn wikitext(raw: &str) -> Vec<Self> {
        let document = |page: String| Document {
            text: wikitext::detokenize(&page),
            words: wikitext::count_words(&page),
            bytes: page.len(),
        };
        wikitext::pages(raw).into_iter().map(document).collect()
    }
}

/// A rolling perplexity.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RollingPerplexity {
    /// `exp(nll / words)`.
    pub word_perplexity: f64,
    /// `exp(nll / bytes)`.
    pub byte_perplexity: f64,
    /// `nll / bytes / ln 2`.
    pub bits_per_byte: f64,
    /// Sum of the negative log-likelihoods, in nats.
    pub nll: f64,
    /// Documents scored.
    pub documents: usize,
    /// Tokens scored.
    pub tokens: usize,
    /// Words of the originals.
    pub words: usize,
    /// Bytes of the originals.
    pub bytes: usize,
    /// Most tokens that a window predicts.
    pub max_length: usize,
    /// Always `lm-eval`.
    pub definition: &'static str,
}

/// The perplexity of `documents` in windows of `max_length`, and the log-likelihood of each.
pub fn rolling_perplexity(
    subject: &Subject<'_>,
    documents: &[Document],
    max_length: usize,
    progress: &mut Progress<'_>,
) -> Result<(RollingPerplexity, Vec<f64>), EvalError> {
    rolling(subject, documents, max_length, &mut Finished::nothing(), progress)
}

fn rolling(
    subject: &Subject<'_>,
    documents: &[Document],
    max_length: usize,
    finished: &mut Finished,
    progress: &mut Progress<'_>,
) -> Result<(RollingPerplexity, Vec<f64>), EvalError> {
    check_length(subject, max_length)?;
    let (mut tokens, mut sums) = (0, Vec::with_capacity(documents.len()));
    for (document_idx, document) in documents.iter().enumerate() {
        crate::perplexity::report(progress, document_idx, documents.len())?;
        let ids = subject.tokenizer.encode(&document.text, true)?;
        check_tokens(subject, &ids)?;
        tokens += ids.len();
        let [nll] = finished.numbers(document_idx, || Ok([document_nll(subject, &ids, max_length, document_idx)?]))?;
        sums.push(-nll);
    }
    crate::perplexity::report(progress, documents.len(), documents.len())?;
    if tokens == 0 {
        return Err(EvalError::TextTooShort { tokens });
    }
    let nll = -sums.iter().sum::<f64>();
    let words: usize = documents.iter().map(|d| d.words).sum();
    let bytes: usize = documents.iter().map(|d| d.bytes).sum();
    let perplexity = RollingPerplexity {
        word_perplexity: (nll / words as f64).exp(),
        byte_perplexity: (nll / bytes as f64).exp(),
        bits_per_byte: nll / bytes as f64 / std::f64::consts::LN_2,
        nll,
        documents: documents.len(),
        tokens,
        words,
        bytes,
        max_length,
        definition: "lm-eval",
    };
    Ok((perplexity, sums))
}

fn check_length(subject: &Subject<'_>, max_length: usize) -> Result<(), EvalError> {
    let most = subject.model.config.max_positions;
    if (1..=most).contains(&max_length) {
        return Ok(());
    }
    let remedy = format!("use 1 to {most}, the context that {} was trained for", subject.name);
    Err(EvalError::BadOption { option: "window", value: max_length, remedy })
}

/// Most tokens that a window predicts.
fn window(subject: &Subject<'_>, options: &TaskOptions<'_>) -> usize {
    options.window.unwrap_or(ROLLING_LENGTH.min(subject.model.config.max_positions))
}

fn prefixed(subject: &Subject<'_>) -> Result<u32, EvalError> {
    prefix_token(subject.tokenizer).ok_or_else(|| EvalError::NoPrefixToken { model: subject.name.to_owned() })
}

fn document_nll(subject: &Subject<'_>, ids: &[u32], max_length: usize, idx: usize) -> Result<f64, EvalError> {
    let with_prefix = [&[prefixed(subject)?], ids].concat();
    let mut nll = 0.0;
    for Window { inputs, targets } in rolling_windows(ids.len(), max_length) {
        // Token `i` of the document is token `i + 1` behind the prefix.
        let first = inputs.len() - targets.len();
        nll += target_nlls(subject, &with_prefix[inputs], first, &ids[targets], idx)?.iter().sum::<f64>();
    }
    Ok(nll)
}

/// The token that comes before a text that nothing comes before.
pub(crate) fn prefix_token(tokenizer: &Tokenizer) -> Option<u32> {
    tokenizer.bos.or(tokenizer.eos.first().copied())
}

/// A window of a document of which the prefix token is position 0.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Window {
    /// Positions that are read, counted with the prefix.
    inputs: Range<usize>,
    /// Tokens that are predicted, counted without it: the last of them follows the last input.
    targets: Range<usize>,
}

fn rolling_windows(n_tokens: usize, max_length: usize) -> Vec<Window> {
    let mut windows = Vec::new();
    let mut predicted = 0;
    while predicted < n_tokens {
        let end = (predicted + max_length).min(n_tokens);
        windows.push(Window { inputs: end.saturating_sub(max_length)..end, targets: predicted..end });
        predicted = end;
    }
    windows
}

/// `wikitext`.
pub(crate) const WIKITEXT: &dyn Task = &RollingTask { name: "wikitext", wikitext: true };
/// `rolling`.
pub(crate) const ROLLING: &dyn Task = &RollingTask { name: "rolling", wikitext: false };

/// [`rolling_perplexity`] as a task.
struct RollingTask {
    name: &'static str,
    /// The text is a raw file of WikiText.
    wikitext: bool,
}

impl RollingTask {
    fn documents(&self, options: &TaskOptions<'_>) -> Result<(Vec<Document>, CalibrationCount), EvalError> {
        let mut known = CalibrationCount::default();
        let mut documents = match (self.wikitext, options.text) {
            (true, _) => Document::wikitext(&text_or_corpus(self.name, Corpus::WikiText2, options)?),
            (false, Some(whole)) => vec![Document::plain(whole.to_owned())],
            (false, None) => {
                let items = own_items(self.name, options)?;
                let identity = |item: Item<'_>| Ok(Identity::new(item.text("text")?, ""));
                known = check_items(self.name, options, &items, identity)?;
                let document = |item: Item<'_>| Ok(Document::plain(item.text("text")?.to_owned()));
                items.iter().map(document).collect::<Result<_, EvalError>>()?
            }
        };
        documents.truncate(options.items.limit.unwrap_or(usize::MAX));
        Ok((documents, known))
    }
}

/// The three numbers with their uncertainty over documents, which are what was sampled.
fn metrics(documents: &[Document], sums: &[f64]) -> Map<String, Value> {
    let ratio = |of: fn(&Document) -> usize| {
        ratio_and_stderr(&documents.iter().zip(sums).map(|(d, sum)| (-sum, of(d) as f64)).collect::<Vec<_>>())
    };
    let ((a_word, of_words), (a_byte, of_bytes)) = (ratio(|d| d.words), ratio(|d| d.bytes));
    let mut details = Map::new();
    Metric::exponential(a_word, of_words).tell("word_perplexity,none", &mut details);
    Metric::exponential(a_byte, of_bytes).tell("byte_perplexity,none", &mut details);
    let bits = |nats: f64| nats / std::f64::consts::LN_2;
    Metric::normal(bits(a_byte), of_bytes.map(bits)).tell("bits_per_byte,none", &mut details);
    details
}

impl Task for RollingTask {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        if self.wikitext {
            "word and byte perplexity of WikiText's pages as the harness computes them"
        } else {
            "the same of a text, or of each text of a JSONL file"
        }
    }

    fn version(&self) -> u32 {
        if self.wikitext { 2 } else { 1 }
    }

    fn reads(&self) -> &'static [TaskOption] {
        use TaskOption::{AllowCalibrationItems, Data, Limit, LogSamples, Text, Window};
        // Pages of WikiText are no items, and are not looked for among calibration items.
        const ALL: &[TaskOption] = &[Text, Data, Window, Limit, LogSamples, AllowCalibrationItems];
        if self.wikitext { &ALL[..5] } else { ALL }
    }

    fn check(&self, subject: &Subject<'_>, options: &TaskOptions<'_>) -> Result<(), EvalError> {
        let (documents, _) = self.documents(options)?;
        check_length(subject, window(subject, options))?;
        match documents.iter().any(|document| !document.text.is_empty()) {
            true => prefixed(subject).map(drop),
            false => Err(EvalError::TextTooShort { tokens: 0 }),
        }
    }

    fn run(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<TaskResult, EvalError> {
        let (documents, known) = self.documents(options)?;
        let max_length = window(subject, options);
        let mut contents = Contents::new(&json!({"max_length": max_length}));
        documents.iter().for_each(|document| contents.add(&document.text.as_str().into()));
        let mut finished = Finished::open(self.name, options, Whose::Subject, contents)?;
        let (perplexity, sums) = rolling(subject, &documents, max_length, &mut finished, progress)?;
        if let Some(log) = options.items.log {
            for (index, sum) in sums.iter().enumerate() {
                let scores = [("loglikelihood".to_owned(), (*sum).into())].into_iter().collect();
                log(&ItemRecord { scores, ..ItemRecord::new(self.name, index) });
            }
        }
        let mut details = metrics(&documents, &sums);
        let is_told = |key: &str| key == "tokens" || details.contains_key(&format!("{key},none"));
        let further = crate::perplexity::fields(&perplexity).into_iter().filter(|(key, _)| !is_told(key));
        details.extend(further.collect::<Vec<_>>());
        known.tell(&mut details);
        Ok(TaskResult::new(perplexity.word_perplexity, perplexity.tokens, details).with_cached(finished.served()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The harness' own rule, written after its documentation: windows of (inputs, targets) over token positions, where
    /// -1 is the prefix.
    fn harness_windows(n: i64, max_length: i64) -> Vec<(Vec<i64>, Vec<i64>)> {
        let mut windows = Vec::new();
        let first = max_length.min(n);
        windows.push(((-1..first - 1).collect(), (0..first).collect()));
        let mut predicted = first;
        while predicted < n {
            let targets = (n - predicted).min(max_length);
            let end = predicted + targets;
            windows.push(((end - max_length - 1..end - 1).collect(), (end - targets..end).collect()));
            predicted = end;
        }
        windows
    }

    #[test]
    fn windows_are_the_harness_ones() {
        for (n, max_length) in [(1, 8), (8, 8), (9, 8), (16, 8), (17, 8), (30, 8), (5, 1)] {
            let ours: Vec<_> = rolling_windows(n, max_length)
                .into_iter()
                .map(|w| (w.inputs.map(|i| i as i64 - 1).collect(), w.targets.map(|i| i as i64).collect()))
                .collect();
            assert_eq!(ours, harness_windows(n as i64, max_length as i64), "{n} tokens by {max_length}");
        }
        assert!(rolling_windows(0, 8).is_empty());
    }
}
