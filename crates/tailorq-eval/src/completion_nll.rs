//! How surprised a model is by the right answers: the mean negative log-likelihood of a token of a completion, given its
//! prompt through the chat template.
//!
//! Cheap and smooth: one pass an item, no generation, and a small change of the model is a small change of the value, which
//! makes it the measure by which quantized models are compared first.

use crate::cache::{Contents, Finished, Whose, exact, read_exact};
use crate::calibration::{CalibrationCount, Identity, check_items};
use crate::completion::scored_completion;
use crate::data::{DataSet, Item, own_items};
use crate::error::EvalError;
use crate::generation::{Question, asked};
use crate::items::ItemRecord;
use crate::metric::{Metric, ratio_and_stderr};
use crate::scored::{Scoring, all_target_nlls, check_tokens, tokens_at_once};
use crate::task::{Progress, Subject, Task, TaskOption, TaskOptions, TaskResult};
use regex::Regex;
use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::LazyLock;
use tailorq_model::ChatMessage;

static CALCULATOR: LazyLock<Regex> =
    LazyLock::new(|| Regex::new("<<[^>]*>>").expect("the pattern is a constant that compiles"));

/// A GSM8K solution without the calculator marks `<<48/2=24>>` that its training items carry.
pub(crate) fn without_calculator_marks(solution: &str) -> String {
    CALCULATOR.replace_all(solution, "").into_owned()
}

/// One item's share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct CompletionNll {
    /// Sum over the completion's tokens, in nats.
    pub(crate) nll: f64,
    /// Tokens of the completion that were scored.
    pub(crate) tokens: usize,
    /// Tokens cut from the start of the prompt, because prompt and completion did not fit the context.
    pub(crate) cut_tokens: usize,
}

impl CompletionNll {
    /// What is kept of a finished item.
    fn written(&self) -> Map<String, Value> {
        let kept = json!({"nll": exact(self.nll), "tokens": self.tokens, "cut_tokens": self.cut_tokens});
        kept.as_object().cloned().expect("an object was written")
    }

    fn read(kept: &Map<String, Value>) -> Option<Self> {
        let number = |key: &str| usize::try_from(kept.get(key)?.as_u64()?).ok();
        let nll = read_exact(kept.get("nll")?)?;
        Some(CompletionNll { nll, tokens: number("tokens")?, cut_tokens: number("cut_tokens")? })
    }
}

/// The mean over all tokens of all items.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct MeanNll {
    /// Nats a token: all items' sums over all items' tokens.
    pub(crate) value: f64,
    /// Standard error over items (they are what was sampled); a single item has none.
    pub(crate) stderr: Option<f64>,
    /// Tokens scored.
    pub(crate) tokens: usize,
    /// Items scored.
    pub(crate) items: usize,
}

/// An item as the model reads it.
struct Tokens {
    inputs: Vec<u32>,
    /// How many of the inputs are followed by no target.
    first: usize,
    targets: Vec<u32>,
    cut_tokens: usize,
}

impl Tokens {
    /// `completion` after the turns `before`.
    fn read(subject: &Subject<'_>, before: &[ChatMessage], completion: &str) -> Result<Self, EvalError> {
        let scored = scored_completion(subject, before, completion)?;
        let (context, n_targets) = (subject.model.config.max_positions, scored.completion.len());
        if n_targets == 0 || scored.prompt.is_empty() {
            return Err(EvalError::TextTooShort { tokens: scored.prompt.len() + n_targets });
        }
        let mut inputs = scored.prompt;
        inputs.extend_from_slice(&scored.completion[..n_targets - 1]);
        check_tokens(subject, &inputs)?;
        check_tokens(subject, &scored.completion[n_targets - 1..])?;
        // As in the harness: what does not fit is lost at the start, and a completion longer than the context with it.
        let cut_tokens = inputs.len().saturating_sub(context);
        let inputs = inputs.split_off(cut_tokens);
        let targets = scored.completion[n_targets.saturating_sub(inputs.len())..].to_vec();
        Ok(Tokens { first: inputs.len() - targets.len(), inputs, targets, cut_tokens })
    }
}

/// Scores items that are read together; `first_item` is the place of the first, which a failure is told with.
fn score_all(subject: &Subject<'_>, items: &[Tokens], first_item: usize) -> Result<Vec<CompletionNll>, EvalError> {
    let texts: Vec<Scoring<'_>> = (items.iter().enumerate())
        .map(|(at, Tokens { inputs, first, targets, .. })| Scoring {
            inputs,
            first: *first,
            targets,
            part: first_item + at,
        })
        .collect();
    let share = |(item, nlls): (&Tokens, Vec<f64>)| CompletionNll {
        nll: nlls.iter().sum(),
        tokens: nlls.len(),
        cut_tokens: item.cut_tokens,
    };
    Ok(items.iter().zip(all_target_nlls(subject, &texts)?).map(share).collect())
}

/// The mean over items, or `None` without items.
pub(crate) fn mean_nll(items: &[CompletionNll]) -> Option<MeanNll> {
    let tokens: usize = items.iter().map(|i| i.tokens).sum();
    if tokens == 0 {
        return None;
    }
    let pairs: Vec<(f64, f64)> = items.iter().map(|i| (i.nll, i.tokens as f64)).collect();
    let (value, stderr) = ratio_and_stderr(&pairs);
    Some(MeanNll { value, stderr, tokens, items: items.len() })
}

/// `gsm8k_nll`.
pub const GSM8K_NLL: &dyn Task = &NllTask { name: "gsm8k_nll", gsm8k: true };
/// `completion_nll`.
pub const COMPLETION_NLL: &dyn Task = &NllTask { name: "completion_nll", gsm8k: false };

struct NllTask {
    name: &'static str,
    /// The test items of GSM8K without calculator marks, rather than a file as it is.
    gsm8k: bool,
}

/// The turns before a completion, and the completion.
type Pair = (Vec<ChatMessage>, String);

impl NllTask {
    fn pairs(&self, options: &TaskOptions<'_>) -> Result<(Vec<Pair>, CalibrationCount), EvalError> {
        let is_file = options.items.data.is_some_and(Path::is_file);
        let items = match self.gsm8k && !is_file {
            true => DataSet::open(self.name, "gsm8k", options)?.items(options)?,
            false => own_items(self.name, options)?,
        };
        let read = |item: Item<'_>| Question::read_pair(item.row).map_err(|problem| item.fail(problem));
        let identity = |item| read(item).map(|(before, completion)| Identity::new(&asked(&before), &completion));
        let known = check_items(self.name, options, &items, identity)?;
        let read = |item: Item<'_>| {
            let (before, completion) = read(item)?;
            Ok((before, if self.gsm8k { without_calculator_marks(&completion) } else { completion }))
        };
        let pairs = items.iter().map(read).collect::<Result<Vec<_>, EvalError>>()?;
        Ok((pairs, known))
    }
}

impl Task for NllTask {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        if self.gsm8k {
            "how surprised the model is by the solutions of grade school word problems"
        } else {
            "how surprised the model is by the completions of prompts of your own"
        }
    }

    fn reads(&self) -> &'static [TaskOption] {
        &[
            TaskOption::Data,
            TaskOption::Limit,
            TaskOption::Reference,
            TaskOption::AllowCalibrationItems,
            TaskOption::LogSamples,
        ]
    }

    fn check(&self, subject: &Subject<'_>, options: &TaskOptions<'_>) -> Result<(), EvalError> {
        let (pairs, _) = self.pairs(options)?;
        let models = [Some(subject), options.reference.as_ref()].into_iter().flatten();
        models
            .flat_map(|model| pairs.first().map(|first| (model, first)))
            .try_for_each(|(model, (before, completion))| scored_completion(model, before, completion).map(drop))
    }

    fn run(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<TaskResult, EvalError> {
        let (pairs, known) = self.pairs(options)?;
        let (ours, mut cached) = self.scored(subject, Whose::Subject, &pairs, options, progress)?;
        let mut theirs = None;
        if let Some(reference) = &options.reference {
            let (shares, of_reference) = self.scored(reference, Whose::Reference, &pairs, options, progress)?;
            cached += of_reference;
            theirs = Some((reference.name, shares));
        }
        if let Some(log) = options.items.log {
            for (index, (share, (_, completion))) in ours.iter().zip(&pairs).enumerate() {
                let of_reference = theirs.as_ref().map(|(_, all)| ("reference_nll", all[index].nll.into()));
                let scores =
                    [("nll", share.nll.into()), ("tokens", share.tokens.into())].into_iter().chain(of_reference);
                log(&ItemRecord {
                    gold: Some(completion.clone().into()),
                    scores: scores.map(|(name, score)| (name.to_owned(), score)).collect(),
                    ..ItemRecord::new(self.name, index)
                });
            }
        }
        let mean = mean_nll(&ours).ok_or(EvalError::TextTooShort { tokens: 0 })?;
        let mut details = Map::new();
        details.insert("items".to_owned(), mean.items.into());
        details.insert("num_fewshot".to_owned(), 0.into());
        Metric::normal(mean.value, mean.stderr).tell("nll,none", &mut details);
        let cut = ours.iter().filter(|s| s.cut_tokens > 0).count();
        details.insert("shortened_prompts".to_owned(), cut.into());
        if let Some((name, theirs)) = theirs {
            details.insert("against".to_owned(), against(name, &ours, &theirs));
        }
        known.tell(&mut details);
        Ok(TaskResult::new(mean.value, mean.tokens, details).with_cached(cached))
    }
}

impl NllTask {
    /// Every item's share, and how many came from the cache.
    fn scored(
        &self,
        subject: &Subject<'_>,
        whose: Whose,
        pairs: &[Pair],
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<(Vec<CompletionNll>, usize), EvalError> {
        let n = pairs.len();
        let total = if options.reference.is_some() { 2 * n } else { n };
        let before = if whose == Whose::Reference { n } else { 0 };
        let mut contents = Contents::new(&Value::Null);
        pairs.iter().for_each(|pair| contents.add(&json!(pair)));
        let mut finished = Finished::open(self.name, options, whose, contents)?;
        let mut shares = Vec::with_capacity(n);
        let mut read: VecDeque<Tokens> = VecDeque::new();
        // On the CPU an item is read alone.
        let most = tokens_at_once(subject, 0);
        while shares.len() < n {
            crate::perplexity::report(progress, before + shares.len(), total)?;
            // Groups depend on the items alone, not on which are finished, and are computed whole: the same bits in every run.
            let (start, mut group, mut tokens) = (shares.len(), Vec::new(), 0);
            for (turns, completion) in &pairs[start..] {
                let next = match read.pop_front() {
                    Some(next) => next,
                    None => Tokens::read(subject, turns, completion)?,
                };
                tokens += next.inputs.len();
                if !group.is_empty() && tokens > most {
                    read.push_front(next);
                    break;
                }
                group.push(next);
            }
            let places = start..start + group.len();
            let known: Option<Vec<CompletionNll>> = match places.clone().all(|index| finished.has(index)) {
                true => {
                    places.clone().map(|index| finished.get(index, CompletionNll::read)).collect::<Result<_, _>>()?
                }
                false => None,
            };
            if let Some(known) = known {
                shares.extend(known);
                continue;
            }
            for (index, share) in places.zip(score_all(subject, &group, start)?) {
                finished.keep(index, share.written())?;
                shares.push(share);
            }
        }
        crate::perplexity::report(progress, before + n, total)?;
        Ok((shares, finished.served()))
    }
}

/// By how much more the model is surprised than the reference. Both saw the same items, so the error is that of the items'
/// differences; models whose tokenizers differ have no tokens in common, and the items alone are compared.
fn against(reference: &str, ours: &[CompletionNll], theirs: &[CompletionNll]) -> Value {
    let of_reference = mean_nll(theirs).map(|mean| mean.value);
    let mut told = json!({"reference": reference, "reference_nll": of_reference});
    if ours.iter().zip(theirs).all(|(m, r)| m.tokens == r.tokens) {
        let pairs: Vec<(f64, f64)> = ours.iter().zip(theirs).map(|(m, r)| (m.nll - r.nll, m.tokens as f64)).collect();
        let (difference, stderr) = ratio_and_stderr(&pairs);
        let difference = Metric::normal(difference, stderr);
        told["difference"] = difference.value.into();
        told["difference_stderr"] = json!(difference.stderr);
        told["difference_interval95"] = json!(difference.interval95);
    }
    let surprised = ours.iter().zip(theirs).filter(|(m, r)| m.nll > r.nll).count();
    told["items_with_more"] = surprised.into();
    told
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::completion::user;
    use tailorq_model::testing::TinyModel;
    use tailorq_model::{Batch, ChatTemplate};

    #[test]
    fn the_answer_and_its_end_are_scored_after_the_generation_prompt() {
        let dir = tempfile::tempdir().unwrap();
        let mut tiny = TinyModel::new("llama", 1).unwrap();
        tiny.config.max_positions = 64;
        tiny.write_directory(dir.path()).unwrap();
        let mut opened = tailorq_model::open(dir.path().to_str().unwrap()).unwrap();
        let device = tailorq_kernels::cpu();
        let (model, tokenizer) = (opened.model.clone(), opened.tokenizer.clone());
        let nll = |ids: &[u32], first: usize| -> f64 {
            let logits = model.logits(device.as_ref(), &model.hidden(device.as_ref(), &Batch::new([ids]), None));
            let at = |t: usize| {
                let row: Vec<f64> = logits.row(t - 1).iter().map(|l| f64::from(*l)).collect();
                row.iter().map(|l| l.exp()).sum::<f64>().ln() - row[ids[t] as usize]
            };
            (first..ids.len()).map(at).sum()
        };
        let check = |template: Option<&ChatTemplate>, question: &str, whole: &str, n_tokens: usize, cut: usize| {
            let subject = Subject {
                name: "tiny",
                model: &model,
                tokenizer: &tokenizer,
                template,
                device: device.as_ref(),
                decoders: None,
            };
            let tokens = |question: &str| Tokens::read(&subject, &[user(question)], "It is 4.").unwrap();
            let found = score_all(&subject, &[tokens(question)], 0).unwrap()[0];
            let together = score_all(&subject, &[tokens("another?"), tokens(question), tokens("?")], 0).unwrap();
            assert!((together[1].nll / found.nll - 1.0).abs() < 1e-6, "read with others: {together:?} {found:?}");
            let ids = tokenizer.encode(whole, false).unwrap();
            let expected = nll(&ids[cut..], ids.len() - cut - n_tokens);
            assert_eq!((found.tokens, found.cut_tokens), (n_tokens, cut), "{whole}");
            assert!((found.nll / expected - 1.0).abs() < 1e-5, "{} {expected}", found.nll);
        };
        let template = opened.template.take().unwrap();
        let chat = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>";
        // A byte is a token here: eight, and the one that ends the turn.
        check(Some(&template), "2+2?", chat, 9, 0);
        check(None, "2+2?", "2+2?\nIt is 4.", 8, 0);
        // 101 tokens, of which the last is not read.
        let long = chat.replace("2+2?", &"2".repeat(73));
        check(Some(&template), &"2".repeat(73), &long, 9, 101 - 1 - 64);
    }

    #[test]
    fn calculator_marks_go() {
        assert_eq!(
            without_calculator_marks("48/2 = <<48/2=24>>24 and <<24+1=25>>25\n#### 25"),
            "48/2 = 24 and 25\n#### 25"
        );
        assert_eq!(without_calculator_marks("a << b"), "a << b");
    }

    #[test]
    fn items_of_equal_length_have_the_standard_error_of_a_mean() {
        let item = |nll| CompletionNll { nll, tokens: 4, cut_tokens: 0 };
        let mean = mean_nll(&[item(4.0), item(8.0), item(12.0)]).unwrap();
        // Means of items 1, 2, 3: standard deviation 1.
        assert!((mean.value - 2.0).abs() < 1e-12 && (mean.stderr.unwrap() - 1.0 / 3f64.sqrt()).abs() < 1e-12);
        assert_eq!((mean.tokens, mean.items), (12, 3));
        let long = CompletionNll { nll: 9.0, tokens: 8, cut_tokens: 0 };
        assert!((mean_nll(&[item(3.0), long]).unwrap().value - 1.0).abs() < 1e-12, "every token weighs the same");
        assert_eq!(mean_nll(&[item(3.0)]).unwrap().stderr, None);
        assert!(mean_nll(&[]).is_none());
    }
}
