//! What `tailorq eval` found, as one object and as a table.

use super::measure::{Measured, Stopped};
use super::table::{Row, markdown, metrics};
use crate::console::Console;
use serde_json::{Map, Value, json};
use std::time::Instant;
use tailorq_eval::{TaskResult, higher_is_better};

/// The results of an evaluation, as many as there are.
pub(super) struct Findings<'a> {
    pub(super) model: &'a str,
    pub(super) measured: &'a [Measured],
    /// What came in the way of the others.
    pub(super) stopped: Option<&'a Stopped>,
    /// When the command began.
    pub(super) started: Instant,
}

impl Findings<'_> {
    /// What a reader should know before the numbers.
    pub(super) fn notes(&self, console: &Console) {
        for Measured { name, result, .. } in self.measured {
            if let Some(known) = result.details.get("calibration_items") {
                console.note(&format!("{known} items of {name} were calibration items: its score flatters the model"));
            }
            if result.details.get("shortened") == Some(&Value::Bool(true)) {
                console.note("the text is shorter than a window: all of it was scored as one shorter window");
            }
            if let (Some(subjects @ ..57), "mmlu") = (number(&result.details, "subjects"), *name) {
                console.note(&format!(
                    "these items of mmlu are of {subjects} of the 57 subjects: --limit takes the first items of the file, where \
                     lm-evaluation-harness takes as many of each subject"
                ));
            }
        }
        if let (Some(stopped), false) = (self.stopped, self.measured.is_empty()) {
            let unfinished = stopped.unfinished.join(", ");
            console.note(&format!("these are the results of the tasks that are finished; not finished: {unfinished}"));
        }
    }

    /// `{"model", "n-shot", "n-samples", "results": {TASK: {...}}, "seconds": {TASK: s}}` as in the harness, of whose samples
    /// only the effective number is told; parts of a task stand beside it, a lone perplexity stands at the top as well.
    /// All that may differ between two runs of the same command stands outside of `results`.
    pub(super) fn object(&self) -> Value {
        let mut object = Map::new();
        object.insert("model".to_owned(), self.model.into());
        if let [Measured { name: "perplexity", result, .. }] = self.measured {
            object.insert("task".to_owned(), "perplexity".into());
            object.insert("value".to_owned(), result.value.into());
            object.insert("tokens".to_owned(), result.tokens.into());
        }
        let mut by_task = Map::new();
        for Measured { name, result, .. } in self.measured {
            by_task.insert((*name).to_owned(), json!(result));
            by_task.extend(result.parts.iter().map(|(part, details)| (part.clone(), details.clone().into())));
        }
        for (name, key) in [("n-shot", "num_fewshot"), ("n-samples", "items")] {
            let known = |(task, details): (&String, &Value)| {
                let number = details.get(key)?;
                Some((task.clone(), if key == "items" { json!({"effective": number}) } else { number.clone() }))
            };
            let known: Map<String, Value> = by_task.iter().filter_map(known).collect();
            if !known.is_empty() {
                object.insert(name.to_owned(), known.into());
            }
        }
        object.insert("higher_is_better".to_owned(), by_task.iter().map(directions).collect::<Map<_, _>>().into());
        object.insert("results".to_owned(), by_task.into());
        object.insert("versions".to_owned(), self.measured.iter().flat_map(versions).collect::<Map<_, _>>().into());
        let of_tasks = |of: fn(&Measured) -> Value| -> Map<String, Value> {
            self.measured.iter().map(|task| (task.name.to_owned(), of(task))).collect()
        };
        object.insert("seconds".to_owned(), of_tasks(|task| task.seconds.into()).into());
        object.insert("from_cache".to_owned(), of_tasks(|task| task.result.cached.into()).into());
        object.insert("total_evaluation_time_seconds".to_owned(), self.started.elapsed().as_secs_f64().into());
        if let Some(stopped) = self.stopped {
            let message = format!("{:#}", stopped.error);
            object.insert("error".to_owned(), json!({"task": stopped.task, "message": message}));
            object.insert("unfinished".to_owned(), json!(stopped.unfinished));
        }
        object.into()
    }

    /// What people read: a Markdown table, then what is behind perplexities and what a reference says.
    pub(super) fn table(&self) -> String {
        let mut rows = Vec::new();
        for Measured { name, result, seconds, .. } in self.measured {
            let mut of_task = task_rows(name, result);
            if let Some(first) = of_task.first_mut() {
                first.seconds = Some(*seconds);
            }
            rows.extend(of_task);
        }
        let mut text = format!("{}\n\n{}\n", self.model, markdown(&rows));
        for Measured { name, result, .. } in self.measured {
            [definition(name, result), divergence(name, result), against(name, result)]
                .into_iter()
                .flatten()
                .for_each(|line| text.push_str(&line));
            for key in ["flips", "flips_acc_norm"] {
                text.push_str(&result.details.get(key).and_then(|told| flips(name, told)).unwrap_or_default());
            }
            if result.cached > 0 {
                let line = format!(
                    "{name}: {} finished results came from --cache, its seconds are those of the rest\n",
                    result.cached
                );
                text.push_str(&line);
            }
        }
        text + &format!("{:.1} s in all, with opening what is measured\n", self.started.elapsed().as_secs_f64())
    }
}

/// For each metric of a task whether more is better.
fn directions((task, details): (&String, &Value)) -> (String, Value) {
    let metrics = details.as_object().into_iter().flat_map(metrics).map(|(key, _)| key.as_str());
    let mut keys: Vec<&str> = metrics.collect();
    if keys.is_empty() {
        keys.push("perplexity");
    }
    let named =
        keys.into_iter().map(|key| (key.split(',').next().unwrap_or(key).to_owned(), higher_is_better(key).into()));
    (task.clone(), named.collect::<Map<_, _>>().into())
}

/// The versions of a task and of its parts.
fn versions(measured: &Measured) -> Vec<(String, Value)> {
    let task = measured.task;
    let parts = measured.result.parts.iter().map(|(part, _)| (part.clone(), task.version_of_part(part).into()));
    std::iter::once((measured.name.to_owned(), task.version().into())).chain(parts).collect()
}

/// A row for each metric of a task, of its classes and of its parts.
fn task_rows(name: &str, result: &TaskResult) -> Vec<Row> {
    let mut rows = Row::of(name, &result.details);
    if rows.is_empty() {
        rows.push(Row::of_value(name, result.value, &result.details));
    }
    let classes = result.details.get("by_hardness").and_then(Value::as_object);
    rows.extend(classes.into_iter().flatten().filter_map(|(class, details)| Row::of_class(name, class, details)));
    rows.extend(result.parts.iter().flat_map(|(part, details)| Row::of(part, details)));
    rows
}

fn number(details: &Map<String, Value>, key: &str) -> Option<u64> {
    details.get(key).and_then(Value::as_u64)
}

/// In which of the definitions a perplexity is one, and of how much text.
fn definition(name: &str, result: &TaskResult) -> Option<String> {
    let details = &result.details;
    let definition = details.get("definition")?.as_str()?;
    let mut parts = vec![format!("{} tokens scored", result.tokens)];
    if let (Some(windows), Some(window)) = (number(details, "windows"), number(details, "window")) {
        let plural = if windows == 1 { "" } else { "s" };
        parts.push(format!("{windows} window{plural} of {window} tokens"));
    }
    if let (Some(documents), Some(window)) = (number(details, "documents"), number(details, "max_length")) {
        let plural = if documents == 1 { "" } else { "s" };
        parts.push(format!("{documents} document{plural} in windows of up to {window} tokens"));
    }
    Some(format!("{name}: definition {definition}, {}\n", parts.join(", ")))
}

/// How far predictions are from those of a reference.
fn divergence(name: &str, result: &TaskResult) -> Option<String> {
    let divergence = result.details.get("divergence")?;
    let number = |key: &str| divergence.get(key).and_then(Value::as_f64);
    let with_error = |key: &str, unit: f64, digits: usize| {
        let error = number(&format!("{key}_stderr")).map(|e| format!(" ± {:.digits$}", unit * e)).unwrap_or_default();
        Some(format!("{:.digits$}{error}", unit * number(key)?))
    };
    Some(format!(
        "{name} against {}: its perplexity {:.4}, mean KL {} nats a token, top-1 agreement {} %\n",
        divergence.get("reference")?.as_str()?,
        number("reference_perplexity")?,
        with_error("mean_kl", 1.0, 4)?,
        with_error("top1_agreement", 100.0, 2)?,
    ))
}

/// How much more a model is surprised than a reference.
fn against(name: &str, result: &TaskResult) -> Option<String> {
    let against = result.details.get("against")?;
    let number = |key: &str| against.get(key).and_then(Value::as_f64);
    let difference = number("difference").map(|difference| {
        let error = number("difference_stderr").map(|e| format!(" ± {e:.4}")).unwrap_or_default();
        format!(", difference {difference:+.4}{error} by item")
    });
    Some(format!(
        "{name} against {}: its nll {:.4}{}\n",
        against.get("reference")?.as_str()?,
        number("reference_nll")?,
        difference.unwrap_or_default(),
    ))
}

/// How many answers went from right to wrong and back.
fn flips(name: &str, flips: &Value) -> Option<String> {
    let number = |key: &str| flips.get(key).and_then(Value::as_u64);
    let metric = flips.get("metric")?.as_str()?;
    let of_reference = flips.get(format!("reference_{}", metric.split(',').next()?))?.as_f64()?;
    Some(format!(
        "{name} against {} ({metric} {of_reference:.4}): {} from right to wrong, {} from wrong to right, of {}\n",
        flips.get("reference")?.as_str()?,
        number("right_to_wrong")?,
        number("wrong_to_right")?,
        number("items")?,
    ))
}
