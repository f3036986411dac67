//! Ctrl-C: the first asks the work to stop, the second ends the process.

use anyhow::Context;
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);
static IDLE: AtomicBool = AtomicBool::new(false);

/// Starts to listen. Also hears SIGTERM and SIGHUP.
pub fn install() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        let again = REQUESTED.swap(true, Ordering::SeqCst);
        if again || IDLE.load(Ordering::SeqCst) {
            std::process::exit(i32::from(crate::INTERRUPTED));
        }
    })
    .context("cannot listen for Ctrl-C")
}

/// Whether the user asked to stop; long work polls this.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}

/// Forgets the request, once it was obeyed.
pub fn clear() {
    REQUESTED.store(false, Ordering::SeqCst);
}

/// Runs `wait`, which waits for the user: nothing polls meanwhile, so the first Ctrl-C ends the process.
pub fn idle<T>(wait: impl FnOnce() -> T) -> T {
    IDLE.store(true, Ordering::SeqCst);
    let result = wait();
    IDLE.store(false, Ordering::SeqCst);
    result
}
