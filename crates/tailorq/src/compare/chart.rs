//! `results.svg`: quality against bytes, a panel a metric, each row a point with its interval and its name; many rows have
//! numbers instead, and a legend below.

use super::evaluate::Metric;
use super::results::{Results, RowResult};
use super::table::MIB;
use crate::plot::escape;
use std::fmt::Write;

const WIDTH: f64 = 900.0;
const PANEL: f64 = 420.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 30.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
/// Pixels of a letter, of the size at which labels are written.
const LETTER: f64 = 5.6;
const LINE: f64 = 12.0;
/// With more rows than this, points have numbers.
const MOST_NAMES: usize = 16;
/// Axes become logarithmic when numbers are this many times as large as others.
const LOGARITHMIC_FROM: f64 = 8.0;

/// A point of a panel.
struct Point {
    x: f64,
    y: f64,
    interval: Option<[f64; 2]>,
    label: String,
    is_control: bool,
}

/// All panels, one below the other.
pub(super) fn svg(results: &Results) -> String {
    let metrics = results.metrics();
    let panels = PANEL * metrics.len().max(1) as f64;
    let is_numbered = results.rows.len() > MOST_NAMES;
    let n_lines = if is_numbered { results.rows.len().div_ceil(2) } else { 0 };
    let height = panels + (LINE + 2.0) * n_lines as f64 + if is_numbered { 20.0 } else { 0.0 };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"10\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for (at, metric) in metrics.iter().enumerate() {
        panel(&mut svg, results, metric, is_numbered, PANEL * at as f64);
    }
    for (at, row) in results.rows.iter().enumerate().filter(|_| is_numbered) {
        let x = if at < n_lines { LEFT } else { WIDTH / 2.0 + LEFT / 2.0 };
        let words = format!("{}  {}", at + 1, name(row));
        let y = panels + (LINE + 2.0) * ((at % n_lines) + 1) as f64;
        text(&mut svg, (x, y), "start", label_style(row.control_of.is_some()), &escape(&words));
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, results: &Results, metric: &Metric, is_numbered: bool, top: f64) {
    let label = |at: usize, row: &RowResult| if is_numbered { (at + 1).to_string() } else { name(row) };
    let points = results.rows.iter().enumerate().filter_map(|(at, row)| point(row, metric, label(at, row)));
    let points: Vec<Point> = points.collect();
    let x = Axis::new(points.iter().map(|p| p.x), false, (LEFT, WIDTH - RIGHT));
    let values = points.iter().flat_map(|p| [p.y].into_iter().chain(p.interval.into_iter().flatten()));
    let y = Axis::new(values.chain([metric.value]), true, (top + PANEL - BOTTOM, top + TOP));
    let direction = if metric.lower_is_better() { "lower is better" } else { "higher is better" };
    let scale = if y.logarithmic { ", logarithmic" } else { "" };
    let title = escape(&format!("{} ({direction}{scale})", metric.title()));
    text(svg, (LEFT, top + 22.0), "start", "font-size=\"13\" font-weight=\"bold\"", &title);
    text(svg, (WIDTH - RIGHT, top + PANEL - 12.0), "end", "", "MiB of weight files");
    frame(svg, &x, &y);
    let level = y.at(metric.value);
    line(svg, [LEFT, level, WIDTH - RIGHT, level], "stroke=\"#888\" stroke-dasharray=\"5 4\"");
    text(svg, (LEFT + 4.0, level - 4.0), "start", "fill=\"#666\"", "original");
    let mut taken = vec![Area { left: LEFT, top: level - 4.0 - LINE, right: LEFT + 50.0, bottom: level }];
    let place = |p: &Point| (x.at(p.x), y.at(p.y));
    taken.extend(points.iter().map(|p| Area::around(place(p))));
    let inside = Area { left: LEFT, top: top + TOP - 8.0, right: WIDTH - 2.0, bottom: top + PANEL - BOTTOM };
    for p in &points {
        let (px, py) = place(p);
        let colour = if p.is_control { "#999" } else { "#1f5fa8" };
        if let Some([low, high]) = p.interval {
            line(svg, [px, y.at(low), px, y.at(high)], &format!("stroke=\"{colour}\" stroke-width=\"1.2\""));
        }
        let shape = if p.is_control { "fill=\"white\" stroke=\"#777\"" } else { "fill=\"#1f5fa8\"" };
        let _ = writeln!(svg, "<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"3.5\" {shape}/>");
        let label = free_place((px, py), p.label.chars().count(), &taken, &inside);
        let (lx, ly) = (label.left, label.bottom - 3.0);
        if (py - (label.top + label.bottom) / 2.0).abs() > 1.5 * LINE {
            let end = if label.left > px { label.left } else { label.right.min(px) };
            line(svg, [px, py, end, ly - 3.0], "stroke=\"#bbb\" stroke-width=\"0.6\"");
        }
        text(svg, (lx, ly), "start", label_style(p.is_control), &escape(&p.label));
        taken.push(label);
    }
}

fn label_style(is_control: bool) -> &'static str {
    if is_control { "fill=\"#666\"" } else { "fill=\"#123\" font-weight=\"bold\"" }
}

/// What a row is called, with a star where it is simulated.
fn name(row: &RowResult) -> String {
    let comma = if row.budget.is_empty() { "" } else { ", " };
    format!("{}{comma}{}{}", row.method, row.budget, if row.simulated { "*" } else { "" })
}

fn point(row: &RowResult, metric: &Metric, label: String) -> Option<Point> {
    let found = row.metric(metric).filter(|m| m.mean.is_finite())?;
    Some(Point {
        x: row.bytes / MIB,
        y: found.mean,
        interval: found.interval95,
        label,
        is_control: row.control_of.is_some(),
    })
}

/// From numbers to pixels.
struct Axis {
    low: f64,
    high: f64,
    logarithmic: bool,
    pixels: (f64, f64),
}

impl Axis {
    fn new(values: impl Iterator<Item = f64>, may_be_logarithmic: bool, pixels: (f64, f64)) -> Self {
        let finite = values.filter(|v| v.is_finite());
        let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let logarithmic = may_be_logarithmic && low > 0.0 && high / low > LOGARITHMIC_FROM;
        let (low, high) = if logarithmic { (low.ln(), high.ln()) } else { (low, high) };
        // A single number lies in the middle.
        let margin = if high > low { 0.06 * (high - low) } else { 0.5 * low.abs().max(1e-9) };
        Axis { low: low - margin, high: high + margin, logarithmic, pixels }
    }

    fn at(&self, value: f64) -> f64 {
        let value = if self.logarithmic { value.max(f64::MIN_POSITIVE).ln() } else { value };
        let share = (value.clamp(self.low, self.high) - self.low) / (self.high - self.low);
        self.pixels.0 + share * (self.pixels.1 - self.pixels.0)
    }

    /// Round numbers on the axis: 1, 2 and 5 times a power of ten.
    fn ticks(&self) -> Vec<f64> {
        if self.logarithmic {
            let powers =
                (self.low / std::f64::consts::LN_10).floor() as i32..=(self.high / std::f64::consts::LN_10) as i32;
            let all = powers.flat_map(|p| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(p)));
            return all.filter(|v| (self.low..=self.high).contains(&v.ln())).collect();
        }
        let rough = (self.high - self.low) / 5.0;
        let power = 10f64.powi(rough.log10().floor() as i32);
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        let first = (self.low / step).ceil() as i64;
        (first..).map(|n| n as f64 * step).take_while(|v| *v <= self.high).collect()
    }
}

fn frame(svg: &mut String, x: &Axis, y: &Axis) {
    let (bottom, top) = y.pixels;
    line(svg, [LEFT, bottom, WIDTH - RIGHT, bottom], "stroke=\"black\"");
    line(svg, [LEFT, bottom, LEFT, top], "stroke=\"black\"");
    for tick in x.ticks() {
        let at = x.at(tick);
        line(svg, [at, bottom, at, bottom + 4.0], "stroke=\"black\"");
        text(svg, (at, bottom + 16.0), "middle", "", &number(tick));
    }
    for tick in y.ticks() {
        let at = y.at(tick);
        line(svg, [LEFT, at, WIDTH - RIGHT, at], "stroke=\"#eee\"");
        text(svg, (LEFT - 6.0, at + 3.5), "end", "", &number(tick));
    }
}

/// As few digits as tell it from its neighbours.
fn number(value: f64) -> String {
    let rounded = format!("{value:.6}");
    let short = rounded.trim_end_matches('0').trim_end_matches('.');
    if short == "-0" { "0".into() } else { short.into() }
}

/// Where something is drawn.
#[derive(Clone, Copy)]
struct Area {
    left: f64,
    top: f64,
    right: f64,
    bottom: f64,
}

impl Area {
    fn around((x, y): (f64, f64)) -> Self {
        Area { left: x - 4.0, top: y - 4.0, right: x + 4.0, bottom: y + 4.0 }
    }

    fn meets(&self, other: &Area) -> bool {
        self.left < other.right && other.left < self.right && self.top < other.bottom && other.top < self.bottom
    }

    fn contains(&self, other: &Area) -> bool {
        self.left <= other.left && other.right <= self.right && self.top <= other.top && other.bottom <= self.bottom
    }
}

/// The nearest place beside a point, to its right or left and further and further up or down, where a label meets nothing; if
/// there are too many for that, the nearest inside the panel.
fn free_place((x, y): (f64, f64), letters: usize, taken: &[Area], inside: &Area) -> Area {
    let width = letters as f64 * LETTER;
    let at = |left: f64, middle: f64| Area {
        left,
        top: middle - LINE / 2.0,
        right: left + width,
        bottom: middle + LINE / 2.0,
    };
    let steps = (0..48).map(|n: i32| f64::from((n + 1) / 2 * if n % 2 == 0 { 1 } else { -1 }) * LINE / 2.0);
    let places: Vec<Area> = steps
        .flat_map(|dy| [at(x + 7.0, y + dy), at(x - 7.0 - width, y + dy)])
        .filter(|place| inside.contains(place))
        .collect();
    let free = places.iter().find(|place| !taken.iter().any(|t| t.meets(place)));
    free.or(places.first()).copied().unwrap_or_else(|| at((x - width / 2.0).max(inside.left), y))
}

fn line(svg: &mut String, [x1, y1, x2, y2]: [f64; 4], style: &str) {
    let _ = writeln!(svg, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" {style}/>");
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, style: &str, words: &str) {
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {style}>{words}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_a_few_points_do_not_meet() {
        let inside = Area { left: 80.0, top: 40.0, right: 898.0, bottom: 370.0 };
        // Ten points, half of them in one place.
        let points: Vec<(f64, f64)> = (0..10).map(|i| (300.0 + f64::from(i / 5) * 40.0, 200.0)).collect();
        let mut taken: Vec<Area> = points.iter().map(|p| Area::around(*p)).collect();
        for point in &points {
            let label = free_place(*point, 30, &taken, &inside);
            assert!(inside.contains(&label) && !taken.iter().any(|t| t.meets(&label)));
            taken.push(label);
        }
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let axis = Axis::new([1.2, 1.6].into_iter(), true, (300.0, 0.0));
        assert_eq!(axis.ticks().iter().map(|t| number(*t)).collect::<Vec<_>>(), ["1.2", "1.3", "1.4", "1.5", "1.6"]);
        let axis = Axis::new([30.0, 4000.0].into_iter(), true, (300.0, 0.0));
        assert!(axis.logarithmic && axis.ticks() == [50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0]);
        let single = Axis::new([5.0].into_iter(), true, (300.0, 0.0));
        assert!((single.at(5.0) - 150.0).abs() < 1e-9);
    }
}
