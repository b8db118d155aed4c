//! The end of a program, in order: refuse new work, drain what runs, flush, exit; with a deadline.
//!
//! `main` writes the order down: it waits for [`Shutdown::requested`], then calls [`drain`] for each
//! stage from the outside in, and exits. A second signal ends the process at once.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Tells every part of a program that it ends, and knows the tasks that have not ended yet.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    token: CancellationToken,
    tasks: TaskTracker,
}

/// A stage did not end in time.
#[derive(Debug, thiserror::Error)]
#[error("{tasks} tasks of {stage:?} still ran after {deadline:?}")]
pub struct DrainError {
    /// The stage.
    pub stage: &'static str,
    /// How long was waited.
    pub deadline: Duration,
    /// What was still running.
    pub tasks: usize,
}

impl Shutdown {
    /// One that only [`Shutdown::request`] starts: for tests and for parts of a larger program.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that SIGINT and SIGTERM start. The second of them exits at once, with 128 + its number.
    /// Call it inside the runtime, once a process.
    ///
    /// # Errors
    /// When the system refuses signal handlers.
    pub fn on_signals() -> io::Result<Self> {
        let shutdown = Self::default();
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let token = shutdown.token.clone();
        tokio::spawn(async move {
            loop {
                // Cancel-safe: `recv` of a signal loses nothing when dropped.
                let number = tokio::select! {
                    _ = interrupt.recv() => SignalKind::interrupt().as_raw_value(),
                    _ = terminate.recv() => SignalKind::terminate().as_raw_value(),
                };
                if token.is_cancelled() {
                    tracing::warn!("second signal: ending at once");
                    std::process::exit(128 + number);
                }
                tracing::info!(signal = number, "ending; a second signal ends at once");
                token.cancel();
            }
        });
        Ok(shutdown)
    }

    /// Starts the end.
    pub fn request(&self) {
        self.token.cancel();
    }

    /// Waits until the end was asked for.
    pub async fn requested(&self) {
        self.token.cancelled().await;
    }

    /// Whether the end was asked for.
    pub fn is_requested(&self) -> bool {
        self.token.is_cancelled()
    }

    /// The token, for parts that watch it or hang children under it.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// The tasks that [`Shutdown::drain`] waits for: spawn through it.
    pub fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Waits for the tracked tasks; see [`drain`].
    ///
    /// # Errors
    /// [`DrainError`] when they still run at the deadline.
    pub async fn drain(&self, stage: &'static str, deadline: Duration) -> Result<(), DrainError> {
        drain(stage, &self.tasks, deadline).await
    }
}

/// Waits until every task of a stage has ended, at most `deadline`. No task may be added after it.
///
/// # Errors
/// [`DrainError`] when some still run at the deadline; they are left running.
pub async fn drain(
    stage: &'static str,
    tasks: &TaskTracker,
    deadline: Duration,
) -> Result<(), DrainError> {
    tasks.close();
    tokio::time::timeout(deadline, tasks.wait()).await.map_err(|_elapsed| {
        let error = DrainError { stage, deadline, tasks: tasks.len() };
        tracing::warn!(%error, "shutdown");
        error
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stage_waits_for_its_tasks_and_no_longer_than_its_deadline() {
        let shutdown = Shutdown::new();
        let token = shutdown.token().clone();
        shutdown.tasks().spawn(async move { token.cancelled().await });
        let late = shutdown.drain("requests", Duration::from_millis(20)).await.unwrap_err();
        assert_eq!((late.stage, late.tasks), ("requests", 1));
        shutdown.request();
        shutdown.requested().await;
        assert!(shutdown.is_requested());
        shutdown.drain("requests", Duration::from_secs(5)).await.unwrap();
    }
}
