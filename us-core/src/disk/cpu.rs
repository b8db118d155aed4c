//! CPU work off the async runtime: a bounded number of jobs at once, the rest waits in order.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinError;
use tokio_util::task::AbortOnDropHandle;

/// The most jobs at once where the configuration leaves it open.
const JOBS_MAX: usize = 8;

/// Runs jobs on the runtime's blocking threads.
#[derive(Debug)]
pub(super) struct CpuJobs {
    permits: Arc<Semaphore>,
}

impl CpuJobs {
    /// At most `jobs_max` jobs at once; 0: one for each CPU.
    pub fn new(jobs_max: usize) -> Self {
        let cpus = || std::thread::available_parallelism().map_or(1, usize::from).min(JOBS_MAX);
        let jobs = if jobs_max == 0 { cpus() } else { jobs_max };
        Self { permits: Arc::new(Semaphore::new(jobs)) }
    }

    /// Runs `job` and returns its result; `None` when the runtime is shutting down. Dropping the
    /// future before the job started drops the job; later it runs to its end.
    ///
    /// The wait is in a task of its own: a caller that holds this future among others and does not
    /// poll it for a while must not sit on a permit that it was given.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let permits = Arc::clone(&self.permits);
        let task = tokio::spawn(async move {
            let permit = permits.acquire_owned().await.ok()?;
            let running = tokio::task::spawn_blocking(move || {
                let result = job();
                drop(permit);
                result
            });
            finished(running.await)
        });
        finished(AbortOnDropHandle::new(task).await)?
    }
}

/// A task's result; `None` when it was cancelled. Its panic goes on here.
fn finished<T>(result: Result<T, JoinError>) -> Option<T> {
    match result {
        Ok(result) => Some(result),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => None,
    }
}
