//! The generated tasks as [`Task`]s.

use super::gsm8k::Style;
use super::jsonl::Question;
use super::spider::Databases;
use super::{Answered, Ending, Exercise, Judgement, MAX_TOKENS, Prompt, answer, contents};
use crate::cache::{Finished, Whose};
use crate::calibration::{CalibrationCount, Identity, check_items};
use crate::completion::rendered_prompt;
use crate::data::{DataSet, Item, Items, own_items};
use crate::error::EvalError;
use crate::fewshot::Examples;
use crate::flips::{Pair, flips};
use crate::items::ItemRecord;
use crate::metric::Metric;
use crate::prompt::PromptStyle;
use crate::sql::{Hardness, SqlLimits};
use crate::task::{Progress, Subject, Task, TaskOption, TaskOptions, TaskResult};
use serde_json::{Map, Value, json};

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

/// The options that all generated tasks read.
const COMMON: [TaskOption; 7] = [
    TaskOption::Data,
    TaskOption::Limit,
    TaskOption::MaxTokens,
    TaskOption::Stop,
    TaskOption::Reference,
    TaskOption::AllowCalibrationItems,
    TaskOption::LogSamples,
];
/// Those of `jsonl`.
const JSONL_READS: [TaskOption; 8] = with_more([TaskOption::Plain]);
/// Those of GSM8K after examples; the fixed examples are as many as they are, so the last is not theirs.
const GSM8K_READS: [TaskOption; 10] =
    with_more([TaskOption::ApplyChatTemplate, TaskOption::FewshotAsMultiturn, TaskOption::NumFewshot]);

const fn with_more<const MORE: usize, const N: usize>(more: [TaskOption; MORE]) -> [TaskOption; N] {
    let mut all = [TaskOption::Data; N];
    let mut at = 0;
    while at < N {
        all[at] = if at < COMMON.len() { COMMON[at] } else { more[at - COMMON.len()] };
        at += 1;
    }
    all
}

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

    fn version(&self) -> u32 {
        if self.style == Style::Chat { 1 } else { 3 }
    }

    fn reads(&self) -> &'static [TaskOption] {
        match self.style {
            Style::FiveShot => &GSM8K_READS,
            Style::ChainOfThought => &GSM8K_READS[..GSM8K_READS.len() - 1],
            Style::Chat => &COMMON,
        }
    }

    fn check(&self, subject: &Subject<'_>, options: &TaskOptions<'_>) -> Result<(), EvalError> {
        let (data, items, _) = self.read(options)?;
        check_prompts(subject, &self.exercises(subject, options, &data, &items)?, options)
    }

    fn run(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<TaskResult, EvalError> {
        let (data, items, known) = self.read(options)?;
        let exercises = self.exercises(subject, options, &data, &items)?;
        let max_tokens = if self.style == Style::Chat { 2 * MAX_TOKENS } else { MAX_TOKENS };
        let ending = ending(options, max_tokens, self.style.stop());
        let mut result = scored(self.name, known, &run(self.name, subject, &exercises, &ending, options, progress)?);
        result.details.insert("num_fewshot".to_owned(), self.style.n_shots(options.items.num_fewshot).into());
        Ok(result)
    }
}

impl Gsm8k {
    fn read(&self, options: &TaskOptions<'_>) -> Result<(DataSet, Items, CalibrationCount), EvalError> {
        let data = DataSet::open(self.name, "gsm8k", options)?;
        let items = data.items(options)?;
        let identity = |item| gsm8k_texts(item).map(|(question, solution)| Identity::new(question, solution));
        let known = check_items(self.name, options, &items, identity)?;
        Ok((data, items, known))
    }

    fn exercises<'a>(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        data: &DataSet,
        items: &'a Items,
    ) -> Result<Vec<Exercise<'a>>, EvalError> {
        if options.items.style != PromptStyle::Text && subject.template.is_none() {
            return Err(EvalError::NoTemplate { model: subject.name.to_owned() });
        }
        let n_drawn = if self.style == Style::FiveShot { self.style.n_shots(options.items.num_fewshot) } else { 0 };
        let mut examples = Examples::open(data, n_drawn)?;
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
        Ok(exercises)
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

    fn reads(&self) -> &'static [TaskOption] {
        &COMMON
    }

    fn check(&self, subject: &Subject<'_>, options: &TaskOptions<'_>) -> Result<(), EvalError> {
        let (items, databases, _) = spider_items(options)?;
        check_prompts(subject, &spider_exercises(&items, &databases)?, options)
    }

    fn run(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<TaskResult, EvalError> {
        let (items, databases, known) = spider_items(options)?;
        let exercises = spider_exercises(&items, &databases)?;
        let classes: Vec<Hardness> =
            items.iter().map(|item| Ok(Hardness::of(item.text("query")?))).collect::<Result<_, EvalError>>()?;
        let answers = run(self.name(), subject, &exercises, &ending(options, MAX_TOKENS, &[]), options, progress)?;
        let by_class: Map<_, _> = (Hardness::ALL.iter())
            .filter_map(|class| {
                let of_class = answers.ours.iter().filter(|a| classes[a.index] == *class);
                let values: Vec<f64> = of_class.map(|a| a.judgement.scores[0].1).collect();
                (!values.is_empty()).then(|| {
                    let Metric { value, stderr, interval95 } = Metric::of_scores(&values);
                    let entry = json!({
                        "execution_accuracy": value, "stderr": stderr, "interval95": interval95, "items": values.len(),
                    });
                    (class.name().to_owned(), entry)
                })
            })
            .collect();
        let mut result = scored(self.name(), known, &answers);
        result.details.insert("by_hardness".to_owned(), by_class.into());
        Ok(result)
    }
}

fn spider_items(options: &TaskOptions<'_>) -> Result<(Items, Databases, CalibrationCount), EvalError> {
    let data = DataSet::open(SPIDER.name(), "spider", options)?;
    let DataSet::Folder(folder) = &data else {
        let input = "a folder with its databases (--data DIR)";
        return Err(EvalError::MissingInput { task: SPIDER.name(), input });
    };
    let items = data.items(options)?;
    let identity = |item: Item<'_>| Ok(Identity::new(item.text("question")?, item.text("query")?));
    let known = check_items(SPIDER.name(), options, &items, identity)?;
    Ok((items, Databases::open(folder)?, known))
}

fn spider_exercises<'a>(items: &'a Items, databases: &'a Databases) -> Result<Vec<Exercise<'a>>, EvalError> {
    let exercise = |item: Item<'a>| {
        let (db_id, question, gold) = (item.text("db_id")?, item.text("question")?, item.text("query")?);
        Ok(Exercise {
            index: item.index,
            prompt: databases.prompt(db_id, question)?,
            judge: Box::new(move |completion| {
                Ok(databases.judge(db_id, gold, completion, false, SqlLimits::default())?)
            }),
        })
    };
    items.iter().map(exercise).collect()
}

struct Jsonl;

impl Task for Jsonl {
    fn name(&self) -> &'static str {
        "jsonl"
    }

    fn about(&self) -> &'static str {
        "prompts and answers of your own: exact match and F1 of words, or the letter of an option"
    }

    fn reads(&self) -> &'static [TaskOption] {
        &JSONL_READS
    }

    fn check(&self, subject: &Subject<'_>, options: &TaskOptions<'_>) -> Result<(), EvalError> {
        let (questions, _) = jsonl_questions(options)?;
        check_prompts(subject, &jsonl_exercises(&questions, options), options)
    }

    fn run(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<TaskResult, EvalError> {
        let (questions, known) = jsonl_questions(options)?;
        let exercises = jsonl_exercises(&questions, options);
        let ending = ending(options, MAX_TOKENS, &[]);
        Ok(scored(self.name(), known, &run(self.name(), subject, &exercises, &ending, options, progress)?))
    }
}

fn jsonl_questions(options: &TaskOptions<'_>) -> Result<(Vec<Question>, CalibrationCount), EvalError> {
    let items = own_items(JSONL.name(), options)?;
    let read = |item: Item<'_>| Question::read(item.row).map_err(|problem| item.fail(problem));
    let questions = items.iter().map(read).collect::<Result<Vec<_>, EvalError>>()?;
    let known = check_items(JSONL.name(), options, &items, |item| Ok(questions[item.index].identity.clone()))?;
    let with_options = questions.iter().filter(|q| q.n_options > 0).count();
    if with_options > 0 && with_options < questions.len() {
        let problem = "mixes items with options and items without: put them into two files".to_owned();
        return Err(EvalError::Data { path: items.path().to_owned(), problem });
    }
    Ok((questions, known))
}

fn jsonl_exercises<'a>(questions: &'a [Question], options: &TaskOptions<'_>) -> Vec<Exercise<'a>> {
    let chat = !options.items.plain;
    let exercise = |(index, question): (usize, &'a Question)| Exercise {
        index,
        prompt: question.prompt(chat),
        judge: Box::new(move |completion| Ok(question.judge(completion))),
    };
    questions.iter().enumerate().map(exercise).collect()
}

/// Renders the first prompt as all of them will be, of the reference too.
fn check_prompts(
    subject: &Subject<'_>,
    exercises: &[Exercise<'_>],
    options: &TaskOptions<'_>,
) -> Result<(), EvalError> {
    let models = [Some(subject), options.reference.as_ref()].into_iter().flatten();
    models.flat_map(|model| exercises.first().map(|first| (model, first))).try_for_each(|(model, first)| {
        if let Prompt::Chat(messages) = &first.prompt {
            rendered_prompt(model.template, messages)?;
        }
        Ok(())
    })
}

fn ending(options: &TaskOptions<'_>, max_tokens: usize, stop: &[&str]) -> Ending {
    let mut stop: Vec<String> = stop.iter().map(|s| (*s).to_owned()).collect();
    stop.extend_from_slice(options.items.stop);
    Ending { max_tokens: options.items.max_tokens.unwrap_or(max_tokens), stop }
}

/// What was answered.
struct Answers<'a> {
    /// By the model.
    ours: Vec<Answered>,
    /// By the reference, if there is one, with its name.
    of_reference: Option<(&'a str, Vec<Answered>)>,
    /// How many answers came from the cache.
    cached: usize,
}

fn run<'a>(
    task: &'static str,
    subject: &Subject<'_>,
    exercises: &[Exercise<'_>],
    ending: &Ending,
    options: &TaskOptions<'a>,
    progress: &mut Progress<'_>,
) -> Result<Answers<'a>, EvalError> {
    let n = exercises.len();
    let total = if options.reference.is_some() { 2 * n } else { n };
    let mut cached = 0;
    let mut answered_by = |model: &Subject<'_>, whose: Whose, before: usize| {
        let mut finished = Finished::open(task, options, whose, contents(model, exercises, ending))?;
        let on_answer = &mut |done, _, _: Option<&Answered>| progress(before + done, total);
        let answers = answer(model, exercises, ending, &mut finished, on_answer)?;
        cached += finished.served();
        Ok::<_, EvalError>(answers)
    };
    let ours = answered_by(subject, Whose::Subject, 0)?;
    let of_reference = match &options.reference {
        Some(reference) => Some((reference.name, answered_by(reference, Whose::Reference, n)?)),
        None => None,
    };
    if let Some(log) = options.items.log {
        // Items are finished in no particular order, and a log should be the same every time.
        for (at, answered) in ours.iter().enumerate() {
            log(&record(task, answered, of_reference.as_ref().map(|(_, all)| &all[at])));
        }
    }
    Ok(Answers { ours, of_reference, cached })
}

fn record(task: &'static str, answered: &Answered, of_reference: Option<&Answered>) -> ItemRecord {
    let Judgement { prediction, gold, scores } = &answered.judgement;
    let mut scores: Map<String, Value> =
        scores.iter().map(|(name, score)| ((*name).to_owned(), (*score).into())).collect();
    if let Some(Answered { completion, judgement, .. }) = of_reference {
        scores.insert("reference_completion".to_owned(), completion.text.clone().into());
        scores.insert("reference_prediction".to_owned(), judgement.prediction.clone().into());
    }
    ItemRecord {
        task,
        index: answered.index,
        completion: Some(answered.completion.text.clone()),
        loglikelihoods: None,
        prediction: Some(prediction.clone().into()),
        gold: Some(gold.clone().into()),
        scores,
    }
}

/// The mean of every score with its standard error and interval; the first is the task's value.
fn scored(task: &'static str, known: CalibrationCount, all: &Answers<'_>) -> TaskResult {
    let answers = &all.ours;
    let mut details = Map::new();
    details.insert("alias".to_owned(), task.into());
    details.insert("items".to_owned(), answers.len().into());
    let names: Vec<&'static str> =
        answers.first().map(|a| a.judgement.scores.iter().map(|s| s.0).collect()).unwrap_or_default();
    let mut value = f64::NAN;
    for (at, name) in names.iter().enumerate() {
        let values: Vec<f64> = answers.iter().map(|a| a.judgement.scores[at].1).collect();
        let mean = Metric::of_scores(&values);
        if at == 0 {
            value = mean.value;
        }
        mean.tell(name, &mut details);
    }
    let cut = answers.iter().filter(|a| a.completion.cut_tokens > 0).count();
    details.insert("shortened_prompts".to_owned(), cut.into());
    known.tell(&mut details);
    if let (Some((reference, theirs)), Some(first)) = (&all.of_reference, names.first()) {
        details.insert("flips".to_owned(), flips(reference, first, &pairs(theirs, answers)));
    }
    let tokens = answers.iter().map(|a| a.completion.tokens.len()).sum();
    TaskResult::new(value, tokens, details).with_cached(all.cached)
}

/// What both models made of each item, by the task's first score.
fn pairs(of_reference: &[Answered], ours: &[Answered]) -> Vec<Pair> {
    let is_right = |answered: &Answered| answered.judgement.scores.first().is_some_and(|(_, score)| *score == 1.0);
    let pair = |(r, m): (&Answered, &Answered)| Pair {
        right: [is_right(r), is_right(m)],
        differs: r.judgement.prediction != m.judgement.prediction,
    };
    of_reference.iter().zip(ours).map(pair).collect()
}
