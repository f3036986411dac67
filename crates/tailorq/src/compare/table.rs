//! `results.md`: one line a row, by bytes.

use super::evaluate::Metric;
use super::results::{Results, RowMetric, RowResult};

/// One mebibyte.
pub(super) const MIB: f64 = (1 << 20) as f64;

/// The results as a Markdown table with a legend.
pub(super) fn markdown(results: &Results) -> String {
    let metrics = results.metrics();
    let mut headings: Vec<String> = ["method", "budget", "seeds", "bits per weight", "MiB"].map(str::to_owned).to_vec();
    headings.extend(metrics.iter().map(heading));
    let mut lines = vec![original_line(results)];
    lines.extend(results.rows.iter().map(|row| (row.bytes, line(row, metrics))));
    // The sort is stable: rows of equal bytes stay in their order.
    lines.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut text = format!("{}\n", cells(&headings));
    let rule = headings.iter().enumerate().map(|(at, _)| if at < 2 { "---".to_owned() } else { "---:".to_owned() });
    text.push_str(&format!("{}\n", cells(&rule.collect::<Vec<_>>())));
    lines.iter().for_each(|(_, line)| text.push_str(&format!("{}\n", cells(line))));
    text.push_str(
        "\nBits per weight are those of the linears, MiB those of the weight files, both from bytes. ↓: lower is better, ↑: \
         higher. After ±: the standard deviation over seeds, or with one seed the standard error over items, if the task knows \
         it. Rows in italics are controls. In brackets: the distance from the original, of a control that from its method, and \
         its standard error over the items that both answered.\n",
    );
    if results.rows.iter().any(|r| r.simulated) {
        text.push_str(
            "\n\\*: simulated; counted as the method's own format would take, while the file holds 16 bits a weight.\n",
        );
    }
    if !results.missing.is_empty() {
        text.push_str(&format!("\nWithout a result yet: {}.\n", results.missing.join(", ")));
    }
    text
}

fn cells(cells: &[String]) -> String {
    // A name may hold the sign that parts columns.
    let escaped: Vec<String> = cells.iter().map(|c| c.replace('|', "\\|")).collect();
    format!("| {} |", escaped.join(" | "))
}

fn heading(metric: &Metric) -> String {
    format!("{} {}", metric.title(), if metric.lower_is_better() { '↓' } else { '↑' })
}

fn original_line(results: &Results) -> (f64, Vec<String>) {
    let original = &results.original;
    let mut line = vec![
        "**original**".to_owned(),
        String::new(),
        String::new(),
        format!("{:.3}", original.linear_bits_per_weight),
        format!("{:.2}", original.bytes as f64 / MIB),
    ];
    line.extend(original.metrics.iter().map(|m| with_spread(m.value, m.stderr)));
    (original.bytes as f64, line)
}

fn line(row: &RowResult, metrics: &[Metric]) -> Vec<String> {
    let name = if row.control_of.is_some() { format!("*{}*", row.method) } else { row.method.clone() };
    let star = if row.simulated { "\\*" } else { "" };
    let mut line = vec![
        name,
        row.budget.clone(),
        row.arms.len().to_string(),
        format!("{:.3}{star}", row.bits_per_weight),
        format!("{:.2}{star}", row.bytes / MIB),
    ];
    line.extend(metrics.iter().map(|metric| row.metric(metric).map_or(String::new(), number)));
    line
}

/// The number, and how far it is from the original's, or a control's from its method's, with the error over common items.
fn number(m: &RowMetric) -> String {
    let own = with_spread(m.mean, m.spread.or(m.stderr));
    let from_original = m.difference.zip(m.difference_stderr);
    match m.beside_method.map(|p| (p.difference, p.stderr)).or(from_original) {
        Some((difference, stderr)) => format!("{own} ({}{} ± {})", sign(difference), short(difference), short(stderr)),
        None => own,
    }
}

fn sign(value: f64) -> &'static str {
    if value >= 0.0 { "+" } else { "" }
}

fn with_spread(value: f64, spread: Option<f64>) -> String {
    match spread {
        None => short(value),
        Some(spread) => format!("{} ± {}", short(value), short(spread)),
    }
}

/// Four decimals for shares and likelihoods, fewer for large numbers.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 1e6 => format!("{value:.2e}"),
        v if v >= 1000.0 => format!("{value:.0}"),
        v if v >= 100.0 => format!("{value:.1}"),
        v if v >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}
