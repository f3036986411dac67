//! Tasks of choices: each choice is scored as a continuation of the question, and the most likely one is the answer.
//!
//! As in lm-evaluation-harness' `multiple_choice`: `acc` takes the largest sum of log-probabilities, `acc_norm` the
//! largest sum over the number of code points of the choice. Examples before a question are drawn from the training
//! items by one generator a task, for every item in turn.

mod arc;
mod boolq;
mod hellaswag;
mod mmlu;
mod openbookqa;
mod piqa;
mod question;
mod run;
mod verdict;
mod winogrande;

pub(crate) use arc::{ARC_CHALLENGE, ARC_EASY};
pub(crate) use boolq::BOOLQ;
pub(crate) use hellaswag::HELLASWAG;
pub(crate) use mmlu::MMLU;
pub(crate) use openbookqa::OPENBOOKQA;
pub(crate) use piqa::PIQA;
pub(crate) use winogrande::WINOGRANDE;

use crate::calibration::{CalibrationCount, check_items};
use crate::data::{DataSet, Item};
use crate::error::EvalError;
use crate::fewshot::Examples;
use crate::prompt::{Lead, Shot};
use crate::task::{Progress, Subject, Task, TaskOption, TaskOptions, TaskResult};
use question::Question;
use run::{Asked, check_template, decide, summarize};

/// The options that all tasks of choices read.
const READ: &[TaskOption] = &[
    TaskOption::Data,
    TaskOption::Limit,
    TaskOption::NumFewshot,
    TaskOption::ApplyChatTemplate,
    TaskOption::FewshotAsMultiturn,
    TaskOption::Reference,
    TaskOption::AllowCalibrationItems,
    TaskOption::LogSamples,
];

/// A task of choices whose rows are read one by one.
struct ChoiceTask {
    /// Also the folder of its data.
    name: &'static str,
    about: &'static str,
    /// The harness' version.
    version: u32,
    /// Whether `acc_norm` is reported.
    by_length: bool,
    read: fn(&Item<'_>) -> Result<Question, EvalError>,
    /// The field that holds what is asked, and those that stand beside it.
    known_by: &'static [&'static str],
}

impl ChoiceTask {
    fn ask(&self, options: &TaskOptions<'_>) -> Result<(Vec<Asked>, CalibrationCount), EvalError> {
        let data = DataSet::open(self.name, self.name, options)?;
        let items = data.items(options)?;
        let identity = |item: Item<'_>| Ok((self.read)(&item)?.identity(&item, self.known_by));
        let known = check_items(self.name, options, &items, identity)?;
        let mut examples = Examples::open(&data, options.items.num_fewshot.unwrap_or(0))?;
        let mut asked = Vec::with_capacity(items.len());
        for item in items.iter() {
            let shots = examples.next().into_iter().map(|shot| Ok((self.read)(&shot)?.shot()));
            let shots = shots.collect::<Result<Vec<Shot>, EvalError>>()?;
            let lead = Lead { description: String::new(), shots };
            asked.push(Asked { question: (self.read)(&item)?, lead });
        }
        Ok((asked, known))
    }
}

impl Task for ChoiceTask {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn version(&self) -> u32 {
        self.version
    }

    fn reads(&self) -> &'static [TaskOption] {
        READ
    }

    fn check(&self, subject: &Subject<'_>, options: &TaskOptions<'_>) -> Result<(), EvalError> {
        check_template(subject, options, &self.ask(options)?.0)
    }

    fn run(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<TaskResult, EvalError> {
        let (asked, known) = self.ask(options)?;
        let decided = decide(self.name, subject, asked, self.by_length, options, progress)?;
        let mut result = summarize(self.name, &decided, self.by_length, options);
        known.tell(&mut result.details);
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::ItemOptions;

    #[test]
    fn examples_are_the_ones_that_python_draws() {
        let dir = tempfile::tempdir().unwrap();
        let row = |i: usize| format!(r#"{{"goal": "g{i}", "sol1": "a{i}", "sol2": "b{i}", "label": {}}}"#, i % 2);
        let rows = |n: usize| (0..n).map(row).collect::<Vec<_>>().join("\n");
        std::fs::create_dir(dir.path().join("piqa")).unwrap();
        std::fs::write(dir.path().join("piqa/test.jsonl"), rows(3)).unwrap();
        std::fs::write(dir.path().join("piqa/train.jsonl"), rows(30)).unwrap();
        let items = ItemOptions { data: Some(dir.path()), num_fewshot: Some(2), ..ItemOptions::default() };
        let options = TaskOptions { items, ..TaskOptions::default() };
        let asked = piqa::TASK.ask(&options).unwrap().0;
        // `r = random.Random(1234)`, then `r.sample(range(30), 2)` three times: [24, 14], [3, 0], [2, 29].
        let requests: Vec<(String, String)> = asked.iter().map(|a| testing::request(&a.question, &a.lead, 1)).collect();
        let contexts: Vec<&str> = requests.iter().map(|(context, _)| context.as_str()).collect();
        assert_eq!(
            contexts,
            [
                "Question: g24\nAnswer: a24\n\nQuestion: g14\nAnswer: a14\n\nQuestion: g0\nAnswer:",
                "Question: g3\nAnswer: b3\n\nQuestion: g0\nAnswer: a0\n\nQuestion: g1\nAnswer:",
                "Question: g2\nAnswer: a2\n\nQuestion: g29\nAnswer: b29\n\nQuestion: g2\nAnswer:",
            ]
        );
        assert_eq!(requests[2].1, " b2");
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! What the tests of the tasks share.

    use super::{Item, Question};
    use crate::error::EvalError;
    use crate::prompt::{Asker, Lead, PromptStyle};
    use std::path::Path;

    /// Reads a row given as JSON.
    pub(crate) fn read(read: fn(&Item<'_>) -> Result<Question, EvalError>, json: &str) -> Result<Question, EvalError> {
        let row = serde_json::from_str(json).expect("the test writes JSON");
        read(&Item { row: &row, path: Path::new("test.jsonl"), line: 4, index: 3 })
    }

    /// Contexts with continuations, and the right one.
    pub(crate) fn texts(question: &Question) -> (Vec<(String, String)>, usize) {
        let n = question.lengths().len();
        ((0..n).map(|choice| request(question, &Lead::default(), choice)).collect(), question.gold)
    }

    /// Context and continuation of a choice, as text.
    pub(crate) fn request(question: &Question, lead: &Lead, choice: usize) -> (String, String) {
        let asker = Asker { model: "", template: None, style: PromptStyle::Text };
        let request = question.requests(asker, lead).expect("text needs no template").swap_remove(choice);
        (request.context, request.continuation)
    }

    /// What [`texts`] gives for one context.
    pub(crate) fn of(context: &str, continuations: &[&str], gold: usize) -> (Vec<(String, String)>, usize) {
        (continuations.iter().map(|c| (context.to_owned(), (*c).to_owned())).collect(), gold)
    }
}
