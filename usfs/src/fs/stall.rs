//! How operations wait: run on the core, resolve the stall, run again, until a deadline.

use std::time::Duration;

use tokio::time::Instant;

use super::compact::compact;
use super::shared::{Answer, State};
use super::writeback::flush_patiently;
use super::{Fs, FsError};
use crate::core::{FlushReason, Now, Stall, Stop, Want};

/// How long an operation may wait in all.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(60);
/// The pause before a lease that another mount held is asked for again.
const CONTENDED_PAUSE: Duration = Duration::from_millis(20);

impl Fs {
    /// Runs an operation to its end. Ready at the first poll where nothing is missing.
    pub(super) async fn run<T>(
        &self,
        mut operation: impl FnMut(&mut State, Now) -> Result<T, Stop>,
    ) -> Result<T, FsError> {
        match self.attempt(&mut operation) {
            Ok(done) => Ok(done),
            Err(Stop::Fail(error)) => Err(error),
            Err(Stop::Stall(_)) => {
                let mut pinned = Vec::new();
                let deadline = Instant::now() + OPERATION_TIMEOUT;
                let done = self.run_stalled(&mut operation, deadline, &mut pinned).await;
                if !pinned.is_empty() {
                    self.shared.lock().core.unpin(&pinned);
                }
                done
            }
        }
    }

    /// One attempt; wakes the session if there is something to send.
    pub(super) fn attempt<T>(
        &self,
        operation: &mut impl FnMut(&mut State, Now) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        let now = self.shared.now();
        let (result, wake) = {
            let mut state = self.shared.lock();
            let before = state.core.log_end();
            let result = operation(&mut state, now);
            let appended = state.core.log_end() != before;
            if appended {
                state.note_request();
            }
            (result, appended && (!state.gathering || state.core.is_urgent()))
        };
        if wake {
            self.shared.outgoing.notify_one();
        }
        result
    }

    async fn run_stalled<T>(
        &self,
        operation: &mut impl FnMut(&mut State, Now) -> Result<T, Stop>,
        mut deadline: Instant,
        pinned: &mut Vec<Want>,
    ) -> Result<T, FsError> {
        let mut progress = self.shared.progress.subscribe();
        loop {
            progress.mark_unchanged();
            let stall = match self.attempt(operation) {
                Ok(done) => return Ok(done),
                Err(Stop::Fail(error)) => return Err(error),
                Err(Stop::Stall(stall)) => stall,
            };
            if let Stall::Fetch(want) = &stall {
                pinned.push(want.clone());
            }
            if stall == Stall::Space && self.shared.lock().core.waits_for_space() {
                // Memory is full of what waits for space that comes: that ends by a clock of its own.
                deadline = Instant::now() + OPERATION_TIMEOUT;
            }
            let what = describe(&stall);
            let resolved = tokio::time::timeout_at(deadline, self.resolve(stall, &mut progress));
            resolved.await.unwrap_or(Err(FsError::TimedOut(what)))?;
        }
    }

    /// Waits until the stall may be over.
    async fn resolve(
        &self,
        stall: Stall,
        progress: &mut tokio::sync::watch::Receiver<u64>,
    ) -> Result<(), FsError> {
        let shared = &self.shared;
        match stall {
            Stall::Fetch(want) => return self.fetch(&want).await,
            Stall::Flush(ino) => return flush_patiently(shared, ino, FlushReason::Commit).await,
            Stall::Compact(ino, chunk) => {
                compact(shared, ino, chunk).await?;
                return flush_patiently(shared, ino, FlushReason::Commit).await;
            }
            Stall::FreeSpace => return self.statfs().await.map(|_| ()),
            Stall::Space => shared.dirty.notify_one(),
            Stall::Log => {
                shared.lock().core.want_sync();
                shared.outgoing.notify_one();
            }
            Stall::Inodes => {
                shared.lock().core.ask_inodes();
                shared.outgoing.notify_one();
            }
            Stall::Session => {}
        }
        progress.changed().await.map_err(|_| FsError::ShuttingDown)
    }

    async fn fetch(&self, want: &Want) -> Result<(), FsError> {
        match self.shared.wait_for(want).await {
            Ok(Answer::Done(result)) => result,
            Ok(Answer::Contended) => {
                tokio::time::sleep(CONTENDED_PAUSE).await;
                Ok(())
            }
            // The session ended; the next attempt says so.
            Err(_) => Ok(()),
        }
    }

    /// The error of a session that has ended.
    pub(super) fn ended(&self) -> FsError {
        let state = self.shared.lock();
        FsError::SessionEnded(state.core.ended().unwrap_or("the mount is gone").to_owned())
    }

    /// Waits until all that is in the log now is durable.
    pub(super) async fn wait_durable(&self) -> Result<(), FsError> {
        let shared = &self.shared;
        let mut durable = shared.durable.subscribe();
        let position = shared.lock().core.want_sync();
        shared.outgoing.notify_one();
        let waiting = async {
            while *durable.borrow_and_update() < position {
                if shared.lock().core.ended().is_some() {
                    return Err(self.ended());
                }
                durable.changed().await.map_err(|_| FsError::ShuttingDown)?;
            }
            Ok(())
        };
        tokio::time::timeout(OPERATION_TIMEOUT, waiting).await.unwrap_or_else(|_| {
            Err(FsError::TimedOut("the directory did not make the changes durable".to_owned()))
        })
    }
}

fn describe(stall: &Stall) -> String {
    match stall {
        Stall::Fetch(want) => {
            format!("for inode {}: the directory, or another mount, did not answer", want.ino())
        }
        Stall::Flush(ino) => format!("for the data of inode {ino} to be stored"),
        Stall::Compact(ino, _) => format!("for the map of inode {ino} to be tidied up"),
        Stall::Space => "for memory: data is written faster than it can be stored".to_owned(),
        Stall::Log => "for the directory to make changes durable".to_owned(),
        Stall::Inodes => "for new inode numbers".to_owned(),
        Stall::FreeSpace => "for the directory to say how much space is left".to_owned(),
        Stall::Session => "for the directory: it does not answer".to_owned(),
    }
}
