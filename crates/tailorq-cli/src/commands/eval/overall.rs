//! How far all tasks together are.

use indicatif::HumanDuration;
use std::time::{Duration, Instant};

/// The tasks of one evaluation, one after the other.
pub(super) struct Overall {
    n_tasks: usize,
    /// Tasks that are finished.
    finished: usize,
    started: Instant,
    task_started: Instant,
}

impl Overall {
    /// The first of so many tasks begins now.
    pub(super) fn new(n_tasks: usize) -> Self {
        let now = Instant::now();
        Overall { n_tasks, finished: 0, started: now, task_started: now }
    }

    /// The task in work, with its number if there are several.
    pub(super) fn label(&self, task: &str) -> String {
        match self.n_tasks {
            1 => task.to_owned(),
            n => format!("task {} of {n}, {task}", self.finished + 1),
        }
    }

    /// The task in work is finished, and the next one begins.
    pub(super) fn next(&mut self) {
        self.finished += 1;
        self.task_started = Instant::now();
    }

    /// What is left of all tasks, while `done` of `total` steps of the one in work are; nothing for a single task, whose own
    /// progress says it.
    pub(super) fn detail(&self, done: usize, total: usize) -> String {
        if self.n_tasks == 1 || done == 0 {
            return String::new();
        }
        let before = self.task_started - self.started;
        let left =
            left(self.n_tasks - self.finished - 1, self.finished, before, self.task_started.elapsed(), done, total);
        format!("about {} left for all tasks", HumanDuration(left))
    }
}

/// The rest of the task in work at its pace so far, and for each `later` one the mean of the `finished` ones and this.
fn left(later: usize, finished: usize, before: Duration, in_this: Duration, done: usize, total: usize) -> Duration {
    let whole = in_this.mul_f64(total.max(done) as f64 / done.max(1) as f64);
    let mean = (before + whole).div_f64((finished + 1) as f64);
    whole.saturating_sub(in_this) + mean.mul_f64(later as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_tasks_take_as_long_as_those_before() {
        let seconds = Duration::from_secs;
        // Two tasks took 50 seconds, this one will take 40, of which 10 are over: 30, and two tasks of 30.
        assert_eq!(left(2, 2, seconds(50), seconds(10), 25, 100), seconds(90));
        assert_eq!(left(0, 2, seconds(50), seconds(40), 100, 100), seconds(0));
        assert_eq!(left(1, 0, seconds(0), seconds(0), 0, 0), seconds(0));
    }

    #[test]
    fn a_single_task_speaks_for_itself() {
        let mut overall = Overall::new(1);
        assert_eq!((overall.label("piqa"), overall.detail(1, 2)), ("piqa".to_owned(), String::new()));
        overall = Overall::new(3);
        overall.next();
        assert_eq!(overall.label("piqa"), "task 2 of 3, piqa");
        assert!(overall.detail(1, 2).ends_with("left for all tasks"));
        assert_eq!(overall.detail(0, 2), "");
    }
}
