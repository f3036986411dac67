//! Progress with the time that is left: a bar on a terminal, a plain line now and then elsewhere, nothing with `--quiet`.

use crate::console::{self, Console};
use crate::interrupt;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::ops::ControlFlow;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Plain lines come at most this often.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// The progress of one stage.
pub struct Progress {
    label: String,
    kind: Kind,
    started: Instant,
}

enum Kind {
    Silent,
    Bar(ProgressBar),
    Lines(Mutex<Instant>),
}

impl Progress {
    /// A stage of `total` steps (0: unknown) that begins now.
    pub fn new(console: &Console, label: &str, total: usize) -> Self {
        let started = Instant::now();
        let kind = match (console.quiet, console::is_watched()) {
            (true, _) => Kind::Silent,
            (false, true) => Kind::Bar(bar(label, total)),
            (false, false) => Kind::Lines(Mutex::new(started)),
        };
        Progress { label: label.to_owned(), kind, started }
    }

    /// `done` of `total` steps are finished; `detail` says what is in work ("" for nothing).
    pub fn set(&self, done: usize, total: usize, detail: &str) {
        match &self.kind {
            Kind::Silent => {}
            Kind::Bar(bar) => {
                bar.set_length(total as u64);
                bar.set_position(done as u64);
                bar.set_message(detail.to_owned());
            }
            Kind::Lines(last) => {
                // A poisoned lock only means that another thread panicked between two lines.
                let mut last = last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if done > 0 && last.elapsed() >= LINE_EVERY {
                    *last = Instant::now();
                    console::write_err(&self.line(done, total, detail));
                }
            }
        }
    }

    /// [`Progress::set`] for work that asks whether to go on: no after Ctrl-C.
    pub fn step(&self, done: usize, total: usize) -> ControlFlow<()> {
        self.step_with(done, total, "")
    }

    /// [`Progress::step`] with something to say beside it.
    pub fn step_with(&self, done: usize, total: usize, detail: &str) -> ControlFlow<()> {
        self.set(done, total, detail);
        if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Prints without disturbing the bar.
    pub fn suspend(&self, print: impl FnOnce()) {
        match &self.kind {
            Kind::Bar(bar) => bar.suspend(print),
            Kind::Silent | Kind::Lines(_) => print(),
        }
    }

    fn line(&self, done: usize, total: usize, detail: &str) -> String {
        let elapsed = self.started.elapsed();
        let mut line = format!("{}: {done}", self.label);
        if total > 0 {
            line.push_str(&format!("/{total}"));
        }
        line.push_str(&format!(", {} elapsed", HumanDuration(elapsed)));
        if total >= done && done > 0 && total > 0 {
            let left = elapsed.mul_f64((total - done) as f64 / done as f64);
            line.push_str(&format!(", {} left", HumanDuration(left)));
        }
        if !detail.is_empty() {
            line.push_str(&format!(" ({detail})"));
        }
        line + "\n"
    }
}

impl Drop for Progress {
    /// A bar is removed when its stage ends, so that results stand alone.
    fn drop(&mut self) {
        if let Kind::Bar(bar) = &self.kind {
            bar.finish_and_clear();
        }
    }
}

fn bar(label: &str, total: usize) -> ProgressBar {
    let bar =
        ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr()).with_prefix(label.to_owned());
    let template = if total == 0 {
        "{prefix} {spinner} {elapsed_precise} {wide_msg}"
    } else {
        "{prefix} [{bar:30}] {pos}/{len} {elapsed_precise}, {eta} left {wide_msg}"
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
