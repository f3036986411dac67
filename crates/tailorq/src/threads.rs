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
