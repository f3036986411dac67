//! The generated tasks as [`Task`]s.

use super::gsm8k::Style;
use super::jsonl::Question;
use super::spider::Databases;
use super::{Answered, Ending, Exercise, Judgement, MAX_TOKENS, answer, contents};
use crate::cache::{Finished, Whose};
use crate::calibration::{CalibrationCount, Identity, check_items};
use crate::data::{DataSet, Item, Items, data_file};
use crate::error::EvalError;
use crate::fewshot::Examples;
use crate::items::{ItemRecord, mean_and_stderr};
use crate::prompt::PromptStyle;
use crate::sql::{Hardness, SqlLimits};
use crate::task::{Progress, Subject, Task, TaskOptions, TaskResult};
use serde_json::{Map, json};

/// Few-shot examples of `gsm8k`.
const SHOTS: usize = 5;

/// `gsm8k`.
pub const GSM8K: &dyn Task = &Gsm8k { name: "gsm8k", style: Style::FiveShot };
/// `gsm8k_cot`.
pub const GSM8K_COT: &dyn Task = &Gsm8k { name: "gsm8k_cot", style: Style::ChainOfThought };
/// `gsm8k_chat`.
pub const GSM8K_CHAT: &dyn Task = &Gsm8k { name: "gsm8k_chat", style: Style::Chat };
/// `spider`.
pub const SPIDER: &dyn Task = &Spider;
/// `jsonl`.
pub const JSONL: &dyn Task = &Jsonl;

struct Gsm8k {
    name: &'static str,
    style: Style,
}

impl Task for Gsm8k {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        match self.style {
            Style::FiveShot => "grade school word problems after five random worked examples",
            Style::ChainOfThought => "the same after eight fixed examples",
            Style::Chat => "the same as a chat, without examples",
        }
    }

    fn run(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<TaskResult, EvalError> {
        let data = DataSet::open(self.name, "gsm8k", options)?;
        let items = data.items(options)?;
        let identity = |item| gsm8k_texts(item).map(|(question, solution)| Identity::new(question, solution));
        let known = check_items(self.name, options, &items, identity)?;
        let n_shots = match self.style {
            Style::FiveShot => options.items.num_fewshot.unwrap_or(SHOTS),
            Style::ChainOfThought | Style::Chat => 0,
        };
        if options.items.style != PromptStyle::Text && subject.template.is_none() {
            return Err(EvalError::NoTemplate { model: subject.name.to_owned() });
        }
        let mut examples = Examples::open(&data, n_shots)?;
        let mut exercises = Vec::with_capacity(items.len());
        for item in items.iter() {
            let shots = examples.next().into_iter().map(gsm8k_texts).collect::<Result<Vec<_>, EvalError>>()?;
            let (question, solution) = gsm8k_texts(item)?;
            let style = self.style;
            exercises.push(Exercise {
                index: item.index,
                prompt: style.prompt(&shots, question, options.items.style),
                judge: Box::new(move |completion| Ok(style.judge(completion, solution))),
            });
        }
        let max_tokens = if self.style == Style::Chat { 2 * MAX_TOKENS } else { MAX_TOKENS };
        let ending = ending(options, max_tokens, self.style.stop());
        Ok(scored(self.name, known, run(self.name, subject, &exercises, &ending, options, progress)?))
    }
}

fn gsm8k_texts(item: Item<'_>) -> Result<(&str, &str), EvalError> {
    Ok((item.text("question")?, item.text("answer")?))
}

struct Spider;

impl Task for Spider {
    fn name(&self) -> &'static str {
        "spider"
    }

    fn about(&self) -> &'static str {
        "questions about databases, answered by SQL that is run"
    }

    fn run(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<TaskResult, EvalError> {
        let data = DataSet::open(self.name(), "spider", options)?;
        let DataSet::Folder(folder) = &data else {
            return Err(EvalError::MissingInput {
                task: self.name(),
                input: "a folder with its databases (--data DIR)",
            });
        };
        let items = data.items(options)?;
        let identity = |item: Item<'_>| Ok(Identity::new(item.text("question")?, item.text("query")?));
        let known = check_items(self.name(), options, &items, identity)?;
        let databases = Databases::open(folder)?;
        let mut exercises = Vec::with_capacity(items.len());
        let mut classes = Vec::with_capacity(items.len());
        for item in items.iter() {
            let (db_id, question, gold) = (item.text("db_id")?, item.text("question")?, item.text("query")?);
            let databases = &databases;
            classes.push(Hardness::of(gold));
            exercises.push(Exercise {
                index: item.index,
                prompt: databases.prompt(db_id, question)?,
                judge: Box::new(move |completion| {
                    Ok(databases.judge(db_id, gold, completion, false, SqlLimits::default())?)
                }),
            });
        }
        let answers = run(self.name(), subject, &exercises, &ending(options, MAX_TOKENS, &[]), options, progress)?;
        let by_class: Map<_, _> = (Hardness::ALL.iter())
            .filter_map(|class| {
                let of_class = answers.iter().filter(|a| classes[a.index] == *class);
                let values: Vec<f64> = of_class.map(|a| a.judgement.scores[0].1).collect();
                (!values.is_empty()).then(|| {
                    let (mean, stderr) = mean_and_stderr(&values);
                    let entry = json!({"execution_accuracy": mean, "stderr": stderr, "items": values.len()});
                    (class.name().to_owned(), entry)
                })
            })
            .collect();
        let mut result = scored(self.name(), known, answers);
        result.details.insert("by_hardness".to_owned(), by_class.into());
        Ok(result)
    }
}

struct Jsonl;

impl Task for Jsonl {
    fn name(&self) -> &'static str {
        "jsonl"
    }

    fn about(&self) -> &'static str {
        "prompts and answers of your own: exact match and F1 of words, or the letter of an option"
    }

    fn run(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<TaskResult, EvalError> {
        let path = data_file(self.name(), options)?;
        let items = Items::read(path)?.limited(options);
        let read = |item: Item<'_>| Question::read(item.row).map_err(|problem| item.fail(problem));
        let questions = items.iter().map(read).collect::<Result<Vec<_>, EvalError>>()?;
        let known = check_items(self.name(), options, &items, |item| Ok(questions[item.index].identity.clone()))?;
        let with_options = questions.iter().filter(|q| q.n_options > 0).count();
        if with_options > 0 && with_options < questions.len() {
            let problem = "mixes items with options and items without: put them into two files".to_owned();
            return Err(EvalError::Data { path: path.to_owned(), problem });
        }
        let chat = !options.items.plain;
        let exercises: Vec<Exercise<'_>> = (questions.iter().enumerate())
            .map(|(index, question)| Exercise {
                index,
                prompt: question.prompt(chat),
                judge: Box::new(move |completion| Ok(question.judge(completion))),
            })
            .collect();
        let ending = ending(options, MAX_TOKENS, &[]);
        Ok(scored(self.name(), known, run(self.name(), subject, &exercises, &ending, options, progress)?))
    }
}

fn ending(options: &TaskOptions<'_>, max_tokens: usize, stop: &[&str]) -> Ending {
    let mut stop: Vec<String> = stop.iter().map(|s| (*s).to_owned()).collect();
    stop.extend_from_slice(options.items.stop);
    Ending { max_tokens: options.items.max_tokens.unwrap_or(max_tokens), stop }
}

fn run(
    task: &'static str,
    subject: &Subject<'_>,
    exercises: &[Exercise<'_>],
    ending: &Ending,
    options: &TaskOptions<'_>,
    progress: &mut Progress<'_>,
) -> Result<Vec<Answered>, EvalError> {
    let mut finished = Finished::open(task, options, Whose::Subject, contents(exercises, ending))?;
    let answers = answer(subject, exercises, ending, &mut finished, &mut |done, total, _| progress(done, total))?;
    if let Some(log) = options.items.log {
        // Items are finished in no particular order, and a log should be the same every time.
        answers.iter().for_each(|answered| log(&record(task, answered)));
    }
    Ok(answers)
}

fn record(task: &'static str, answered: &Answered) -> ItemRecord {
    let Judgement { prediction, gold, scores } = &answered.judgement;
    ItemRecord {
        task,
        index: answered.index,
        completion: Some(answered.completion.text.clone()),
        loglikelihoods: None,
        prediction: Some(prediction.clone().into()),
        gold: Some(gold.clone().into()),
        scores: scores.iter().map(|(name, score)| ((*name).to_owned(), (*score).into())).collect(),
    }
}

/// The mean of every score with its standard error; the first is the task's value.
fn scored(task: &'static str, known: CalibrationCount, answers: Vec<Answered>) -> TaskResult {
    let mut details = Map::new();
    details.insert("alias".to_owned(), task.into());
    details.insert("items".to_owned(), answers.len().into());
    let names: Vec<&'static str> =
        answers.first().map(|a| a.judgement.scores.iter().map(|s| s.0).collect()).unwrap_or_default();
    let mut value = f64::NAN;
    for (at, name) in names.iter().enumerate() {
        let values: Vec<f64> = answers.iter().map(|a| a.judgement.scores[at].1).collect();
        let (mean, stderr) = mean_and_stderr(&values);
        if at == 0 {
            value = mean;
        }
        let (metric, filter) = name.split_once(',').unwrap_or((name, "none"));
        details.insert((*name).to_owned(), mean.into());
        details.insert(format!("{metric}_stderr,{filter}"), stderr.into());
    }
    let cut = answers.iter().filter(|a| a.completion.cut_tokens > 0).count();
    details.insert("shortened_prompts".to_owned(), cut.into());
    known.tell(&mut details);
    TaskResult::new(value, answers.iter().map(|a| a.completion.tokens.len()).sum(), details)
}
