//! The tasks of one evaluation, one after the other; what is finished is not lost when a later one fails.

use super::overall::Overall;
use crate::console::Console;
use crate::interrupt;
use crate::progress::Progress;
use anyhow::Context;
use std::time::Instant;
use tailorq_eval::{EvalError, Subject, Task, TaskOptions, TaskResult};

/// A finished task.
pub(super) struct Measured {
    pub(super) name: &'static str,
    pub(super) task: &'static dyn Task,
    pub(super) result: TaskResult,
    /// Time of the task, that of the reference included, without opening the models.
    pub(super) seconds: f64,
}

/// Why not all tasks were finished.
pub(super) struct Stopped {
    /// The task that failed or was interrupted.
    pub(super) task: &'static str,
    /// The tasks that have no result: this one and all after it.
    pub(super) unfinished: Vec<&'static str>,
    pub(super) error: anyhow::Error,
}

/// Reads what all tasks read before the first one computes, so that a mistake in the last one costs no time.
pub(super) fn check(
    tasks: &[&'static dyn Task],
    subject: &Subject<'_>,
    options: &TaskOptions<'_>,
) -> anyhow::Result<()> {
    for task in tasks {
        if interrupt::requested() {
            return Err(EvalError::Interrupted.into());
        }
        task.check(subject, options).with_context(|| of(*task, subject))?;
    }
    Ok(())
}

/// Runs the tasks up to the first that fails.
pub(super) fn measure(
    tasks: &[&'static dyn Task],
    subject: &Subject<'_>,
    options: &TaskOptions<'_>,
    console: &Console,
) -> (Vec<Measured>, Result<(), Stopped>) {
    let mut measured = Vec::with_capacity(tasks.len());
    let mut overall = Overall::new(tasks.len());
    for (at, task) in tasks.iter().enumerate() {
        let started = Instant::now();
        let progress = Progress::new(console, &overall.label(task.name()), 1);
        let step = &mut |done, total| progress.step_with(done, total, &overall.detail(done, total));
        match task.run(subject, options, step).with_context(|| of(*task, subject)) {
            Ok(result) => {
                let seconds = started.elapsed().as_secs_f64();
                measured.push(Measured { name: task.name(), task: *task, result, seconds });
            }
            Err(error) => {
                let unfinished = tasks[at..].iter().map(|task| task.name()).collect();
                return (measured, Err(Stopped { task: task.name(), unfinished, error }));
            }
        }
        overall.next();
    }
    (measured, Ok(()))
}

fn of(task: &dyn Task, subject: &Subject<'_>) -> String {
    format!("task {} on {}", task.name(), subject.name)
}
