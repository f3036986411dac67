//! Keeping the threads of the pool ready between the operations of a step.

use rayon::Yield;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Looks for work after which a thread lets others of the machine run.
const PATIENCE: usize = 64;

/// Whether some call keeps threads ready. One at a time: two would wait for each other to begin.
static ACTIVE: AtomicBool = AtomicBool::new(false);

/// Runs `body`; until it returns, the other threads of the pool look for work all the time instead of sleeping.
///
/// A step of decoding has hundreds of operations of some microseconds; a thread that falls asleep in between takes as
/// long to wake. For generation, not for waiting: the threads are busy all the while. From outside of the pool, and inside of another such call, it is a plain call.
pub fn awake<R>(body: impl FnOnce() -> R) -> R {
    let (Some(this), others) = (rayon::current_thread_index(), rayon::current_num_threads() - 1) else { return body() };
    if others == 0 || ACTIVE.swap(true, Ordering::Acquire) {
        return body();
    }
    let _active = Clear(&ACTIVE);
    let (ready, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    rayon::in_place_scope(|scope| {
        scope.spawn_broadcast(|_, context| {
            // The caller, who gets to this while it waits for others, must not stay here.
            if context.index() != this {
                ready.fetch_add(1, Ordering::Relaxed);
                look_for_work(&done);
            }
        });
        // Nobody begins to look for work in the middle of a task, whose end the caller would wait for in vain.
        while ready.load(Ordering::Relaxed) < others {
            std::thread::yield_now();
        }
        let _end = End(&done);
        body()
    })
}

fn look_for_work(done: &AtomicBool) {
    let mut idle = 0usize;
    while !done.load(Ordering::Acquire) {
        if rayon::yield_now() == Some(Yield::Executed) {
            idle = 0;
            continue;
        }
        idle += 1;
        if idle.is_multiple_of(PATIENCE) {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
}

/// Clears the mark of a call that is over, after a panic too.
struct Clear(&'static AtomicBool);

impl Drop for Clear {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Lets the others go, after a panic too.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;
    use std::panic::AssertUnwindSafe;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool")
    }

    #[test]
    fn work_is_divided_and_ends_inside() {
        for threads in [1, 2, 3, 5] {
            let sums: Vec<u64> = pool(threads).install(|| {
                let nested = |n: u64| (0..n).into_par_iter().map(|i| (0..i).into_par_iter().sum::<u64>()).sum::<u64>();
                awake(|| (0..50).map(|i| nested(i * 10)).collect())
            });
            let plain = |n: u64| (0..n).map(|i| (0..i).sum::<u64>()).sum::<u64>();
            assert_eq!(sums, (0..50).map(|i| plain(i * 10)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn one_inside_another_outside_of_a_pool_and_after_a_panic() {
        assert_eq!(awake(|| 1), 1);
        let pool = pool(3);
        assert_eq!(pool.install(|| awake(|| rayon::join(|| awake(|| 2), || awake(|| 3)))), (2, 3));
        let panicked = std::panic::catch_unwind(AssertUnwindSafe(|| pool.install(|| awake(|| panic!("on purpose")))));
        assert!(panicked.is_err());
        assert_eq!(pool.install(|| awake(|| 4)), 4);
    }
}
