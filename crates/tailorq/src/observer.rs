//! How a long run tells what it does and learns that it should stop.

/// Watches a run. Implementations print, or do nothing; the pipeline never prints.
pub trait Observer: Sync {
    /// A stage begins; it has `total` steps (0 when unknown).
    fn stage(&self, name: &str, total: u64);
    /// `done` steps of the stage are finished; `detail` says which thing is in work.
    fn progress(&self, done: u64, detail: &str);
    /// Something the user should read (a raised damping, a shortened item).
    fn note(&self, message: &str);
    /// True once the user asked to stop.
    fn cancelled(&self) -> bool;
}

/// Watches nothing and never stops.
pub struct Silent;

impl Observer for Silent {
    fn stage(&self, _name: &str, _total: u64) {}
    fn progress(&self, _done: u64, _detail: &str) {}
    fn note(&self, _message: &str) {}
    fn cancelled(&self) -> bool {
        false
    }
}
