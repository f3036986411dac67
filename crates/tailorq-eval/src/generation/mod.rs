//! Tasks whose answer is generated: a prompt, a greedy continuation, a judgement.
//!
//! As in lm-evaluation-harness' `generate_until`: greedy, at most [`MAX_TOKENS`] new tokens unless a task says otherwise,
//! ended by the model's end tokens or by a stop string (which is cut off), prompts shortened at their start when they do
//! not fit the context with the new tokens.

mod gsm8k;
mod gsm8k_examples;
mod jsonl;
mod spider;
mod spider_prompt;
mod tasks;

pub(crate) use jsonl::{Question, asked};
pub use tasks::{GSM8K, GSM8K_CHAT, GSM8K_COT, JSONL, SPIDER};

use crate::cache::{Contents, Finished};
use crate::completion::chat_prompt;
use crate::error::EvalError;
use crate::task::Subject;
use serde_json::{Map, Value, json};
use std::ops::ControlFlow;
use tailorq_model::ChatMessage;
use tailorq_runtime::{
    BatchOptions, BatchProgress, Completion, CompletionRequest, FinishReason, RuntimeError, generate_batch,
    generate_batch_decoding,
};

/// New tokens where nothing else is asked for: the harness' default.
pub(crate) const MAX_TOKENS: usize = 256;

/// What is continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// Text as it is, with the tokenizer's own special tokens.
    Text(String),
    /// A conversation, through the model's chat template.
    Chat(Vec<ChatMessage>),
}

/// What became of an item.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Judgement {
    /// What was taken from the completion.
    pub(crate) prediction: String,
    /// What was expected.
    pub(crate) gold: String,
    /// A number for each metric, under the harness' name (`exact_match,strict-match`), always the same names in the same
    /// order for a task.
    pub(crate) scores: Vec<(&'static str, f64)>,
}

/// Judges a completion.
type Judge<'a> = Box<dyn Fn(&str) -> Result<Judgement, EvalError> + 'a>;

/// An item as the runner sees it.
pub(crate) struct Exercise<'a> {
    /// Its place in the file, from 0.
    pub(crate) index: usize,
    /// What is continued.
    pub(crate) prompt: Prompt,
    /// How the continuation is judged.
    pub(crate) judge: Judge<'a>,
}

impl Exercise<'_> {
    fn answered(&self, completion: &Completion) -> Result<Answered, EvalError> {
        let judgement = (self.judge)(&completion.text)?;
        Ok(Answered { index: self.index, completion: completion.clone(), judgement })
    }
}

/// How continuations end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ending {
    /// Most new tokens.
    pub(crate) max_tokens: usize,
    /// Texts that end a continuation.
    pub(crate) stop: Vec<String>,
}

/// An item that is done.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answered {
    /// Its place in the file, from 0.
    pub(crate) index: usize,
    /// What the model wrote.
    pub(crate) completion: Completion,
    /// What became of it.
    pub(crate) judgement: Judgement,
}

/// Hears how many of how many are done, and of each item as soon as it is done; may stop the work.
pub(crate) type OnAnswer<'a> = dyn FnMut(usize, usize, Option<&Answered>) -> ControlFlow<()> + 'a;

/// All that decides the continuations.
pub(crate) fn contents(subject: &Subject<'_>, exercises: &[Exercise<'_>], ending: &Ending) -> Contents {
    let mut settings = json!({"max_tokens": ending.max_tokens, "stop": ending.stop});
    if let Some(decoders) = subject.decoders() {
        settings["decoder"] = decoders.signature().into();
    }
    let mut contents = Contents::new(&settings);
    for exercise in exercises {
        contents.add(&match &exercise.prompt {
            Prompt::Text(text) => json!({"text": text}),
            Prompt::Chat(messages) => json!({"chat": messages}),
        });
    }
    contents
}

/// Continues and judges all exercises; answers come in their order. `finished` ones are only judged again.
pub(crate) fn answer(
    subject: &Subject<'_>,
    exercises: &[Exercise<'_>],
    ending: &Ending,
    finished: &mut Finished,
    on_answer: &mut OnAnswer<'_>,
) -> Result<Vec<Answered>, EvalError> {
    let mut answers: Vec<Option<Answered>> = Vec::with_capacity(exercises.len());
    for (at, exercise) in exercises.iter().enumerate() {
        let known = finished.get(at, read_completion)?;
        answers.push(known.map(|completion| exercise.answered(&completion)).transpose()?);
    }
    let waiting: Vec<usize> = (0..exercises.len()).filter(|at| answers[*at].is_none()).collect();
    let (total, known) = (exercises.len(), exercises.len() - waiting.len());
    if waiting.is_empty() {
        return match on_answer(total, total, None) {
            ControlFlow::Continue(()) => Ok(answers.into_iter().flatten().collect()),
            ControlFlow::Break(()) => Err(EvalError::Interrupted),
        };
    }
    let request = |exercise: &Exercise<'_>| {
        let prompt = match &exercise.prompt {
            Prompt::Text(text) => subject.tokenizer.encode(text, true)?,
            Prompt::Chat(messages) => chat_prompt(subject, messages)?,
        };
        Ok(CompletionRequest { prompt, max_tokens: ending.max_tokens, stop: ending.stop.clone() })
    };
    let requests = waiting.iter().map(|at| request(&exercises[*at])).collect::<Result<Vec<_>, EvalError>>()?;
    let mut failure = None;
    let Subject { model, tokenizer, device, .. } = *subject;
    let listen = &mut |progress: BatchProgress<'_>| {
        let Some((at, completion)) = progress.finished else {
            return on_answer(known + progress.done, total, None);
        };
        let at = waiting[at];
        let kept = finished.keep(at, write_completion(completion));
        match kept.and_then(|()| exercises[at].answered(completion)) {
            Ok(answered) => {
                let flow = on_answer(known + progress.done, total, Some(&answered));
                answers[at] = Some(answered);
                flow
            }
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        }
    };
    let outcome = match subject.decoders() {
        Some(decoders) => generate_batch_decoding((model, tokenizer), decoders, &requests, listen),
        None => generate_batch(model, tokenizer, device, &requests, &BatchOptions::for_device(device), listen),
    };
    match (failure, outcome) {
        (Some(error), _) => Err(error),
        (None, Err(RuntimeError::Interrupted)) => Err(EvalError::Interrupted),
        (None, Err(error)) => Err(error.into()),
        (None, Ok(_)) => Ok(answers.into_iter().flatten().collect()),
    }
}

/// What is kept of a finished item.
fn write_completion(completion: &Completion) -> Map<String, Value> {
    let Completion { text, tokens, finish, cut_tokens } = completion;
    let kept = json!({"text": text, "tokens": tokens, "finish": finish.name(), "cut_tokens": cut_tokens});
    kept.as_object().cloned().expect("an object was written")
}

fn read_completion(kept: &Map<String, Value>) -> Option<Completion> {
    const ENDS: [FinishReason; 4] =
        [FinishReason::EndOfSequence, FinishReason::StopString, FinishReason::MaxTokens, FinishReason::ContextFull];
    let tokens = kept.get("tokens")?.as_array()?;
    let tokens: Option<Vec<u32>> = tokens.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect();
    let finish = kept.get("finish")?.as_str()?;
    Some(Completion {
        text: kept.get("text")?.as_str()?.to_owned(),
        tokens: tokens?,
        finish: ENDS.into_iter().find(|end| end.name() == finish)?,
        cut_tokens: usize::try_from(kept.get("cut_tokens")?.as_u64()?).ok()?,
    })
}

#[cfg(test)]
#[allow(clippy::print_stdout, reason = "a test says why it was skipped")]
mod tests {
    use super::*;
    use crate::completion::user;
    use crate::data::Row;
    use tailorq_model::testing::{PlainDecoders, TinyModel};
    use tailorq_tensor::{Bits, Group, Layout, PackedMatrix, Slot};

    fn judged(text: &str) -> Judgement {
        Judgement { prediction: text.to_owned(), gold: String::new(), scores: vec![("length", text.len() as f64)] }
    }

    fn with_tiny(check: impl FnOnce(&Subject<'_>)) {
        let dir = tempfile::tempdir().unwrap();
        TinyModel::new("llama", 1).unwrap().write_directory(dir.path()).unwrap();
        let opened = tailorq_model::open(dir.path().to_str().unwrap()).unwrap();
        let device = tailorq_kernels::cpu();
        check(&Subject {
            name: "tiny",
            model: &opened.model,
            tokenizer: &opened.tokenizer,
            template: opened.template.as_ref(),
            device: device.as_ref(),
            decoders: None,
        });
    }

    fn exercises<'a>(judge: impl Fn(&str) -> Result<Judgement, EvalError> + Clone + 'a) -> Vec<Exercise<'a>> {
        let prompts = [
            Prompt::Text("Question: a?\nAnswer:".to_owned()),
            Prompt::Chat(vec![user("a longer question than the first one")]),
            Prompt::Text("b".to_owned()),
        ];
        let exercise = |(i, prompt)| Exercise { index: 10 + i, prompt, judge: Box::new(judge.clone()) };
        prompts.into_iter().enumerate().map(exercise).collect()
    }

    #[test]
    fn answers_come_in_order_and_are_heard_of_once() {
        with_tiny(|subject| {
            let ending = Ending { max_tokens: 7, stop: vec![] };
            let exercises = exercises(|text| Ok(judged(text)));
            let mut heard = Vec::new();
            let answers = answer(subject, &exercises, &ending, &mut Finished::nothing(), &mut |_, total, answered| {
                assert_eq!(total, 3);
                heard.extend(answered.map(|a| a.index));
                ControlFlow::Continue(())
            })
            .unwrap();
            assert_eq!(answers.iter().map(|a| a.index).collect::<Vec<_>>(), [10, 11, 12]);
            heard.sort_unstable();
            assert_eq!(heard, [10, 11, 12]);
            for a in &answers {
                assert_eq!(a.judgement, judged(&a.completion.text));
                assert!(!a.completion.tokens.is_empty());
            }
            let alone = answer(subject, &exercises[1..2], &ending, &mut Finished::nothing(), &mut |_, _, _| {
                ControlFlow::Continue(())
            })
            .unwrap();
            assert_eq!(alone[0], answers[1]);
        });
    }

    /// A packed model's answers come from the decoder where there is one; others never do.
    #[test]
    fn packed_models_answer_on_a_decoder() {
        with_tiny(|subject| {
            let decoders = PlainDecoders::new(tailorq_kernels::cpu(), 2);
            let n_read = || decoders.n_read.load(std::sync::atomic::Ordering::Relaxed);
            let layout = Layout { symmetric: true, ..Layout::new(Bits::Four, Group::Row) };
            let mut packed = subject.model.clone();
            let weight = &mut packed.blocks[1].linear_mut(Slot::Up).weight;
            let (rows, cols) = (weight.rows(), weight.cols());
            let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 7 % 16) as u8).collect();
            let scales = vec![half::f16::from_f32(0.01); rows];
            *weight = PackedMatrix::pack(rows, cols, layout, &codes, &scales, &[]).unwrap().into();
            let ending = Ending { max_tokens: 7, stop: vec![] };
            let exercises = exercises(|text| Ok(judged(text)));
            for (model, is_packed) in [(subject.model, false), (&packed, true)] {
                let by = |decoders| {
                    let subject = Subject { model, decoders, ..*subject };
                    let go_on = &mut |_: usize, _: usize, _: Option<&Answered>| ControlFlow::Continue(());
                    answer(&subject, &exercises, &ending, &mut Finished::nothing(), go_on).unwrap()
                };
                let expected = by(None);
                assert_eq!((by(Some(&decoders)), n_read() > 0), (expected, is_packed));
            }
        });
    }

    #[test]
    fn a_failing_judge_and_a_break_end_the_work() {
        with_tiny(|subject| {
            let ending = Ending { max_tokens: 3, stop: vec![] };
            let failing = exercises(|_| Err(EvalError::TextTooShort { tokens: 77 }));
            let go_on = &mut |_: usize, _: usize, _: Option<&Answered>| ControlFlow::Continue(());
            let failed = answer(subject, &failing, &ending, &mut Finished::nothing(), go_on);
            assert!(matches!(failed, Err(EvalError::TextTooShort { tokens: 77 })));
            let exercises = exercises(|text| Ok(judged(text)));
            let stopped =
                answer(subject, &exercises, &ending, &mut Finished::nothing(), &mut |_, _, _| ControlFlow::Break(()));
            assert!(matches!(stopped, Err(EvalError::Interrupted)));
        });
    }

    /// Prompts of a real task through a real template, and the reference's greedy tokens.
    #[test]
    fn a_real_model_answers_as_the_reference_does() {
        let find = |variable: &str| {
            let value = std::env::var_os(variable).filter(|v| !v.is_empty());
            if value.is_none() {
                println!("skipped: {variable} is not set");
            }
            value.map(std::path::PathBuf::from)
        };
        let [Some(models), Some(golden), Some(data)] =
            ["TAILORQ_TEST_MODELS", "TAILORQ_TEST_GOLDEN", "TAILORQ_TEST_DATA"].map(find)
        else {
            return;
        };
        let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap();
        let opened = tailorq_model::open(models.join("SmolLM2-135M-Instruct.Q4_1.gguf").to_str().unwrap()).unwrap();
        let device = tailorq_kernels::cpu();
        let subject = Subject {
            name: "smollm2",
            model: &opened.model,
            tokenizer: &opened.tokenizer,
            template: opened.template.as_ref(),
            device: device.as_ref(),
            decoders: None,
        };
        let numbers: Value = serde_json::from_str(&read(golden.join("smollm2-135m.json"))).unwrap();
        let expected = numbers["greedy"].as_array().unwrap();
        let file = read(data.join("gsm8k/test.jsonl"));
        let rows: Vec<Row> = file.lines().take(expected.len()).map(|l| serde_json::from_str(l).unwrap()).collect();
        let exercise = |(index, row): (usize, &Row)| Exercise {
            index,
            prompt: gsm8k::Style::Chat.prompt(&[], row["question"].as_str().unwrap(), Default::default()),
            judge: Box::new(|text| Ok(judged(text))),
        };
        let exercises: Vec<Exercise<'_>> = rows.iter().enumerate().map(exercise).collect();
        let full = std::env::var_os("TAILORQ_TEST_FULL").is_some();
        let ending = Ending { max_tokens: if full { 48 } else { 8 }, stop: vec![] };
        let answers =
            answer(&subject, &exercises, &ending, &mut Finished::nothing(), &mut |_, _, _| ControlFlow::Continue(()))
                .unwrap();
        for (answered, expected) in answers.iter().zip(expected) {
            let tokens: Vec<u32> = serde_json::from_value(expected["new_tokens"].clone()).unwrap();
            assert_eq!(answered.completion.tokens, tokens[..ending.max_tokens]);
        }
    }
}
