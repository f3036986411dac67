//! The pipeline's observer: its stages become progress bars, its notes lines on standard error.

use crate::console::Console;
use crate::interrupt;
use crate::progress::Progress;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tailorq::Observer;

/// Shows a run on the console.
pub struct ConsoleObserver<'a> {
    console: &'a Console,
    stage: Mutex<Option<(Progress, u64)>>,
}

impl<'a> ConsoleObserver<'a> {
    /// An observer that has not seen a stage yet.
    pub fn new(console: &'a Console) -> Self {
        ConsoleObserver { console, stage: Mutex::new(None) }
    }

    /// A poisoned lock only means that another thread panicked while it drew.
    fn stage(&self) -> MutexGuard<'_, Option<(Progress, u64)>> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for ConsoleObserver<'_> {
    fn stage(&self, name: &str, total: u64) {
        let mut stage = self.stage();
        // The old bar leaves the terminal before the new one comes.
        *stage = None;
        *stage = Some((Progress::new(self.console, name, total as usize), total));
    }

    fn progress(&self, done: u64, detail: &str) {
        if let Some((progress, total)) = &*self.stage() {
            progress.set(done as usize, *total as usize, detail);
        }
    }

    fn note(&self, message: &str) {
        match &*self.stage() {
            Some((progress, _)) => progress.suspend(|| self.console.note(message)),
            None => self.console.note(message),
        }
    }

    fn cancelled(&self) -> bool {
        interrupt::requested()
    }
}
