//! The one thread pool.

/// Sets the size of the process's thread pool, once and before its first use: `threads`, or as many as the process may
/// run on. Returns the size; fails when the pool already exists.
pub fn set_threads(threads: Option<usize>) -> Result<usize, String> {
    let n = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
    rayon::ThreadPoolBuilder::new()
        .num_threads(n)
        .thread_name(|i| format!("tailorq-{i}"))
        .build_global()
        .map_err(|e| format!("cannot start {n} threads: {e}"))?;
    Ok(n)
}

/// Runs `body` on a thread of the pool. An operation that such a thread divides starts at once on the others, while one from
/// outside has to wake them and to be woken by them, which costs a step of decoding more than its arithmetic.
pub fn on_pool<R: Send>(body: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| body())
}
