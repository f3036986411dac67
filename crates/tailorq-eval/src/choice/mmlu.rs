//! MMLU (Hendrycks et al. 2021): 57 subjects in four groups.
//!
//! Every subject is a task of its own in the harness. A group's score, and that of all, weighs questions equally; its
//! standard error is the harness' pooled one.

use super::question::Question;
use super::run::{Asked, check_template, decide, summarize};
use super::verdict::{Verdict, insert_share};
use crate::calibration::{CalibrationCount, Identity, check_items};
use crate::data::{DataSet, Item};
use crate::error::EvalError;
use crate::items::python_strip;
use crate::metric::{Metric, wilson_interval};
use crate::prompt::{Lead, Shot};
use crate::task::{Progress, Subject, Task, TaskOption, TaskOptions, TaskResult};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};

/// `mmlu`.
pub(crate) const MMLU: &dyn Task = &Mmlu;

/// A group and its subjects, as the harness sorts them.
const GROUPS: [(&str, &[&str]); 4] = [
    (
        "stem",
        &[
            "abstract_algebra",
            "anatomy",
            "astronomy",
            "college_biology",
            "college_chemistry",
            "college_computer_science",
            "college_mathematics",
            "college_physics",
            "computer_security",
            "conceptual_physics",
            "electrical_engineering",
            "elementary_mathematics",
            "high_school_biology",
            "high_school_chemistry",
            "high_school_computer_science",
            "high_school_mathematics",
            "high_school_physics",
            "high_school_statistics",
            "machine_learning",
        ],
    ),
    (
        "other",
        &[
            "business_ethics",
            "clinical_knowledge",
            "college_medicine",
            "global_facts",
            "human_aging",
            "management",
            "marketing",
            "medical_genetics",
            "miscellaneous",
            "nutrition",
            "professional_accounting",
            "professional_medicine",
            "virology",
        ],
    ),
    (
        "social_sciences",
        &[
            "econometrics",
            "high_school_geography",
            "high_school_government_and_politics",
            "high_school_macroeconomics",
            "high_school_microeconomics",
            "high_school_psychology",
            "human_sexuality",
            "professional_psychology",
            "public_relations",
            "security_studies",
            "sociology",
            "us_foreign_policy",
        ],
    ),
    (
        "humanities",
        &[
            "formal_logic",
            "high_school_european_history",
            "high_school_us_history",
            "high_school_world_history",
            "international_law",
            "jurisprudence",
            "logical_fallacies",
            "moral_disputes",
            "moral_scenarios",
            "philosophy",
            "prehistory",
            "professional_law",
            "world_religions",
        ],
    ),
];

struct Mmlu;

impl Task for Mmlu {
    fn name(&self) -> &'static str {
        "mmlu"
    }

    fn about(&self) -> &'static str {
        "57 subjects, by letter; papers use --num-fewshot 5"
    }

    fn version(&self) -> u32 {
        2
    }

    fn version_of_part(&self, part: &str) -> u32 {
        let is_group = GROUPS.iter().any(|(group, _)| part.strip_prefix("mmlu_") == Some(group));
        if is_group { 2 } else { 1 }
    }

    fn reads(&self) -> &'static [TaskOption] {
        super::READ
    }

    fn check(&self, subject: &Subject<'_>, options: &TaskOptions<'_>) -> Result<(), EvalError> {
        check_template(subject, options, &ask(options)?.asked)
    }

    fn run(
        &self,
        subject: &Subject<'_>,
        options: &TaskOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<TaskResult, EvalError> {
        let Questions { asked, subjects, known } = ask(options)?;
        let decided = decide(self.name(), subject, asked, false, options, progress)?;
        let mut result = summarize(self.name(), &decided, false, options);
        let by_subject = by_subject(&subjects, &decided.verdicts);
        let stderr = pooled_stderr(by_subject.values().map(Vec::as_slice));
        result.details.insert("acc_stderr,none".to_owned(), stderr.into());
        result.details.insert("subjects".to_owned(), by_subject.len().into());
        result.parts = parts(&by_subject);
        for (_, details) in &mut result.parts {
            details.insert("num_fewshot".to_owned(), options.items.num_fewshot.unwrap_or(0).into());
        }
        known.tell(&mut result.details);
        Ok(result)
    }
}

/// All questions, each with its subject.
struct Questions {
    asked: Vec<Asked>,
    subjects: Vec<&'static str>,
    known: CalibrationCount,
}

fn ask(options: &TaskOptions<'_>) -> Result<Questions, EvalError> {
    let data = DataSet::open(MMLU.name(), "mmlu", options)?;
    let items = data.items(options)?;
    let identity = |item: Item<'_>| {
        let beside = item.texts("choices")?.into_iter().map(str::to_owned).collect();
        Ok(Identity { questions: vec![item.text("question")?.to_owned()], beside })
    };
    let known = check_items(MMLU.name(), options, &items, identity)?;
    let n_shots = options.items.num_fewshot.unwrap_or(0);
    let examples = if n_shots > 0 { Examples::read(&data, n_shots)? } else { Examples::default() };
    let (mut subjects, mut asked) = (Vec::with_capacity(items.len()), Vec::with_capacity(items.len()));
    for item in items.iter() {
        let name = item.text("subject")?;
        let subject = subject_named(name)
            .ok_or_else(|| item.fail(format!("is of the subject '{name}', which is none of the 57 of the data set")))?;
        asked.push(Asked { question: read(&item)?, lead: examples.lead(&item, name, n_shots)? });
        subjects.push(subject);
    }
    Ok(Questions { asked, subjects, known })
}

fn subject_named(name: &str) -> Option<&'static str> {
    GROUPS.iter().flat_map(|(_, subjects)| *subjects).copied().find(|subject| *subject == name)
}

fn group_of(subject: &str) -> Option<&'static str> {
    GROUPS.iter().find(|(_, subjects)| subjects.contains(&subject)).map(|(group, _)| *group)
}

fn read(item: &Item<'_>) -> Result<Question, EvalError> {
    let choices = item.texts("choices")?;
    let [a, b, c, d] = choices[..] else {
        return Err(item.fail(format!("has {} choices, not 4", choices.len())));
    };
    let question = python_strip(item.text("question")?);
    let context = format!("{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:");
    Question::new(context, &["A", "B", "C", "D"], item.number("answer")?, item)
}

/// What comes before all questions of a subject.
fn description(subject: &str) -> String {
    let subject = subject.replace('_', " ");
    format!("The following are multiple choice questions (with answers) about {subject}.\n\n")
}

/// Examples of each subject, in the order of the file.
#[derive(Default)]
struct Examples {
    shots: HashMap<String, Vec<Shot>>,
}

impl Examples {
    fn read(data: &DataSet, n_shots: usize) -> Result<Self, EvalError> {
        let mut shots: HashMap<String, Vec<Shot>> = HashMap::new();
        for item in data.split(&["dev"], "the examples of each subject")?.iter() {
            let of_subject = shots.entry(item.text("subject")?.to_owned()).or_default();
            if of_subject.len() < n_shots {
                of_subject.push(read(&item)?.shot());
            }
        }
        Ok(Examples { shots })
    }

    /// Description and first examples of the item's subject.
    fn lead(&self, item: &Item<'_>, subject: &str, n_shots: usize) -> Result<Lead, EvalError> {
        let shots = self.shots.get(subject).map_or(&[][..], Vec::as_slice);
        if shots.len() < n_shots {
            let problem = format!(
                "is of the subject '{subject}', of which dev.jsonl has {} examples, not {n_shots}",
                shots.len()
            );
            return Err(item.fail(problem));
        }
        Ok(Lead { description: description(subject), shots: shots.to_vec() })
    }
}

/// Whether each question of each subject was answered rightly.
fn by_subject<'a>(subjects: &[&'a str], verdicts: &[Verdict]) -> BTreeMap<&'a str, Vec<bool>> {
    let mut by_subject: BTreeMap<&str, Vec<bool>> = BTreeMap::new();
    for (subject, verdict) in subjects.iter().zip(verdicts) {
        by_subject.entry(subject).or_default().push(verdict.is_right());
    }
    by_subject
}

/// Groups, then subjects, of those that have questions.
fn parts(by_subject: &BTreeMap<&str, Vec<bool>>) -> Vec<(String, Map<String, Value>)> {
    let mut parts = Vec::new();
    for (group, _) in GROUPS {
        let subjects = by_subject.iter().filter(|(subject, _)| group_of(subject) == Some(group));
        let of_group: Vec<&[bool]> = subjects.map(|(_, hits)| hits.as_slice()).collect();
        let hits = of_group.concat();
        if hits.is_empty() {
            continue;
        }
        let mut details = headed(group, hits.len());
        let right = hits.iter().filter(|hit| **hit).count() as f64;
        let interval95 = Some(wilson_interval(right, hits.len()));
        let stderr = Some(pooled_stderr(of_group));
        Metric { value: right / hits.len() as f64, stderr, interval95 }.tell("acc,none", &mut details);
        parts.push((format!("mmlu_{group}"), details));
    }
    for (subject, hits) in by_subject {
        let mut details = headed(subject, hits.len());
        insert_share(&mut details, "acc", hits);
        parts.push((format!("mmlu_{subject}"), details));
    }
    parts
}

fn headed(alias: &str, items: usize) -> Map<String, Value> {
    [("alias".to_owned(), alias.into()), ("items".to_owned(), items.into())].into_iter().collect()
}

/// The harness' standard error of a mean over several tasks: that of the variance pooled over them.
///
/// With standard errors `s_i` of `n_i` items: `sqrt(sum (n_i - 1) n_i s_i^2 / (n - k) / n)`. 0 where every task has one
/// item; the harness then tells none.
fn pooled_stderr<'a>(tasks: impl IntoIterator<Item = &'a [bool]>) -> f64 {
    let (mut squares, mut n, mut k) = (0.0, 0, 0);
    for hits in tasks {
        // (n_i - 1) n_i s_i^2 is the sum of squared deviations, which for p of n hits is n p (1 - p).
        let right = hits.iter().filter(|hit| **hit).count() as f64;
        squares += right * (1.0 - right / hits.len() as f64);
        n += hits.len();
        k += 1;
    }
    if n > k { (squares / (n - k) as f64 / n as f64).sqrt() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::testing::{self, of, texts};
    use crate::metric::mean_and_stderr;

    const ROW: &str =
        r#"{"subject": "high_school_biology", "question": " What?\n", "choices": ["w", "x", "y", "z"], "answer": 2}"#;

    #[test]
    fn prompts_are_the_harness_ones() {
        let question = testing::read(read, ROW).unwrap();
        let context = "What?\nA. w\nB. x\nC. y\nD. z\nAnswer:";
        assert_eq!(texts(&question), of(context, &[" A", " B", " C", " D"], 2));
        assert_eq!(question.shot().text(), format!("{context} C\n\n"));
        assert_eq!(
            description("high_school_biology"),
            "The following are multiple choice questions (with answers) about high school biology.\n\n"
        );
        assert!(testing::read(read, r#"{"question": "q", "choices": ["a", "b", "c"], "answer": 0}"#).is_err());
    }

    #[test]
    fn there_are_57_subjects_in_one_group_each() {
        let all: Vec<&str> = GROUPS.iter().flat_map(|(_, subjects)| *subjects).copied().collect();
        let distinct: std::collections::HashSet<&str> = all.iter().copied().collect();
        assert_eq!((all.len(), distinct.len()), (57, 57));
        assert_eq!(group_of("business_ethics"), Some("other"));
        assert_eq!(group_of("econometrics"), Some("social_sciences"));
        assert_eq!(group_of("alchemy"), None);
    }

    #[test]
    fn groups_pool_their_subjects() {
        let (a, b) = ([true, true, false, false, true], [false, true, false]);
        let stderr = |hits: &[bool]| {
            let values: Vec<f64> = hits.iter().map(|hit| f64::from(u8::from(*hit))).collect();
            mean_and_stderr(&values).1
        };
        let sum = 4.0 * stderr(&a).powi(2) * 5.0 + 2.0 * stderr(&b).powi(2) * 3.0;
        let harness = (sum / 6.0 / 8.0).sqrt();
        assert!((pooled_stderr([&a[..], &b[..]]) - harness).abs() < 1e-12);
        let by_subject = BTreeMap::from([("anatomy", a.to_vec()), ("astronomy", b.to_vec()), ("law_x", vec![])]);
        let parts = parts(&BTreeMap::from_iter(by_subject.into_iter().filter(|(s, _)| group_of(s).is_some())));
        let names: Vec<&str> = parts.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["mmlu_stem", "mmlu_anatomy", "mmlu_astronomy"]);
        assert_eq!(parts[0].1["acc,none"], 0.5);
        assert_eq!(parts[0].1["items"], 8);
        assert_eq!(parts[1].1["acc,none"], 0.6);
    }
}
