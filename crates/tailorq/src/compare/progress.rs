//! Progress over arms: what an observer hears of an arm begins with which one it is and how long all still take.

use crate::observer::Observer;
use std::time::{Duration, Instant};

/// The arms of a comparison, one after the other.
pub(super) struct Board<'a> {
    observer: &'a dyn Observer,
    /// Arms that have to be run.
    n_arms: usize,
    finished: usize,
    started: Instant,
}

impl<'a> Board<'a> {
    pub(super) fn new(observer: &'a dyn Observer, n_arms: usize) -> Self {
        Board { observer, n_arms, finished: 0, started: Instant::now() }
    }

    /// The observer of work that belongs to no arm.
    pub(super) fn outside(&self, name: &str) -> ArmProgress<'a> {
        ArmProgress { observer: self.observer, prefix: name.to_owned() }
    }

    /// The next arm begins.
    pub(super) fn begin(&self, title: &str) -> ArmProgress<'a> {
        let left = self.left().map_or(String::new(), |left| format!(", about {} left for all", in_words(left)));
        let prefix = format!("arm {} of {}, {title}", self.finished + 1, self.n_arms);
        self.observer.note(&format!("{prefix}{left}"));
        ArmProgress { observer: self.observer, prefix: format!("{prefix}{left}") }
    }

    /// The arm in work is finished.
    pub(super) fn end(&mut self) {
        self.finished += 1;
    }

    /// For the rest, the mean of those that are finished; nothing before the first.
    fn left(&self) -> Option<Duration> {
        let rest = self.n_arms.saturating_sub(self.finished);
        (self.finished > 0).then(|| self.started.elapsed().mul_f64(rest as f64 / self.finished as f64))
    }
}

fn in_words(time: Duration) -> String {
    match time.as_secs() {
        s @ 0..=99 => format!("{s} s"),
        s @ 100..=5999 => format!("{} min", s.div_ceil(60)),
        s => format!("{:.1} h", s as f64 / 3600.0),
    }
}

/// Passes an arm's stages on with the arm's place before them.
pub(super) struct ArmProgress<'a> {
    observer: &'a dyn Observer,
    prefix: String,
}

impl Observer for ArmProgress<'_> {
    fn stage(&self, name: &str, total: u64) {
        self.observer.stage(&format!("{}: {name}", self.prefix), total);
    }

    fn progress(&self, done: u64, detail: &str) {
        self.observer.progress(done, detail);
    }

    fn note(&self, message: &str) {
        self.observer.note(message);
    }

    fn cancelled(&self) -> bool {
        self.observer.cancelled()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_in_one_unit() {
        let words = [0, 99, 100, 5999, 6000].map(|s| in_words(Duration::from_secs(s)));
        assert_eq!(words, ["0 s", "99 s", "2 min", "100 min", "1.7 h"]);
    }
}
