//! What `tailorq eval` found, as one object and as a table.

use serde_json::{Map, Value, json};
use tailorq_eval::TaskResult;

/// `{"model", "n-shot", "n-samples", "results": {TASK: {...}}}` as in the harness, of whose samples only the effective
/// number is told; parts of a task stand beside it, a lone perplexity stands at the top as well.
pub(super) fn object(model: &str, results: &[(&str, TaskResult)]) -> Value {
    let mut object = Map::new();
    object.insert("model".to_owned(), model.into());
    if let [("perplexity", result)] = results {
        object.insert("task".to_owned(), "perplexity".into());
        object.insert("value".to_owned(), result.value.into());
        object.insert("tokens".to_owned(), result.tokens.into());
    }
    let mut by_task = Map::new();
    for (name, result) in results {
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
    object.insert("results".to_owned(), by_task.into());
    object.into()
}

/// What people read: values in lines, item metrics as a Markdown table, then the comparison with a reference.
pub(super) fn table(model: &str, results: &[(&str, TaskResult)]) -> String {
    let mut text = format!("{model}\n");
    let mut all_rows = Vec::new();
    for (name, result) in results {
        let mut of_task = rows(name, &result.details);
        if of_task.is_empty() {
            text.push_str(&value_lines(name, result));
        }
        of_task.extend(result.parts.iter().flat_map(|(part, details)| rows(part, details)));
        all_rows.extend(of_task);
    }
    if !all_rows.is_empty() {
        text.push_str(&format!("\n{}\n", markdown(&all_rows)));
    }
    results.iter().filter_map(|(name, result)| flips(name, result)).for_each(|line| text.push_str(&line));
    text
}

/// A result that is one value, with its divergence from a reference.
fn value_lines(name: &str, result: &TaskResult) -> String {
    let mut notes = vec![format!("{} scored", result.tokens)];
    let number = |key: &str| result.details.get(key).and_then(Value::as_u64);
    if let (Some(windows), Some(window)) = (number("windows"), number("window")) {
        let plural = if windows == 1 { "" } else { "s" };
        notes.push(format!("{windows} window{plural} of {window} tokens"));
    }
    let mut text = format!("  {name:<18}{:>12.4}   ({})\n", result.value, notes.join(", "));
    if let Some(divergence) = result.details.get("divergence") {
        let number = |key: &str| divergence.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN);
        let reference = divergence.get("reference").and_then(Value::as_str).unwrap_or_default();
        text.push_str(&format!("against {reference}\n"));
        text.push_str(&format!("  {:<18}{:>12.4}\n", "its perplexity", number("reference_perplexity")));
        text.push_str(&format!("  {:<18}{:>12.4}   nats a token\n", "mean KL", number("mean_kl")));
        text.push_str(&format!("  {:<18}{:>10.2} %\n", "top-1 agreement", 100.0 * number("top1_agreement")));
    }
    text
}

const HEADINGS: [&str; 7] = ["task", "items", "shots", "metric", "value", "stderr", "95 % interval"];

/// Rows for a task or a part of one: metrics in the harness' notation with their standard errors and intervals
/// (`exact_match,strict-match` beside `exact_match_stderr,strict-match`).
fn rows(name: &str, details: &Map<String, Value>) -> Vec<[String; 7]> {
    let number = |key: &str| details.get(key).and_then(Value::as_u64).map_or(String::new(), |n| n.to_string());
    let row = |(key, value): (&String, &Value)| {
        let (metric, filter) = key.split_once(',')?;
        let beside = |what: &str| details.get(&format!("{metric}_{what},{filter}"));
        let (value, stderr) = (value.as_f64()?, beside("stderr")?.as_f64()?);
        let bounds: Vec<f64> =
            beside("interval95").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_f64).collect();
        let interval = match bounds[..] {
            [low, high] => format!("{low:.4} to {high:.4}"),
            _ => String::new(),
        };
        let numbers = [format!("{value:.4}"), format!("{stderr:.4}"), interval];
        let [value, stderr, interval] = numbers;
        Some([name.to_owned(), number("items"), number("num_fewshot"), key.clone(), value, stderr, interval])
    };
    details.iter().filter_map(row).collect()
}

/// A Markdown table whose columns are aligned for the eye too.
fn markdown(rows: &[[String; 7]]) -> String {
    let headings = HEADINGS.map(str::to_owned);
    let width = |at: usize| rows.iter().chain([&headings]).map(|row| row[at].len()).max().unwrap_or(0);
    let widths: [usize; 7] = std::array::from_fn(width);
    // Names to the left, numbers to the right.
    let is_number = [false, true, true, false, true, true, false];
    let line = |row: &[String; 7]| {
        let cells = (0..7).map(|at| match is_number[at] {
            true => format!(" {:>width$} |", row[at], width = widths[at]),
            false => format!(" {:<width$} |", row[at], width = widths[at]),
        });
        format!("|{}\n", cells.collect::<String>())
    };
    let rule = (0..7).map(|at| format!(" {}{} |", "-".repeat(widths[at] - 1), if is_number[at] { ":" } else { "-" }));
    let mut text = line(&headings) + &format!("|{}\n", rule.collect::<String>());
    rows.iter().for_each(|row| text.push_str(&line(row)));
    text
}

/// How many answers went from right to wrong and back.
fn flips(name: &str, result: &TaskResult) -> Option<String> {
    let flips = result.details.get("flips")?;
    let number = |key: &str| flips.get(key).and_then(Value::as_u64);
    Some(format!(
        "{name} against {} ({:.4}): {} from right to wrong, {} from wrong to right, of {}\n",
        flips.get("reference")?.as_str()?,
        flips.get("reference_acc")?.as_f64()?,
        number("right_to_wrong")?,
        number("wrong_to_right")?,
        number("items")?,
    ))
}
