//! Byte-range locks: the directory holds them, so that they hold across mounts, or has this mount keep
//! those of a file that nobody else locks (`core::locks`).
//!
//! The kernel says who an owner is: the open files of a process (POSIX locks, dropped when it
//! closes any descriptor of the file) or one open file (OFD locks, dropped when that is closed for
//! the last time). It says nothing at the end of the second kind but that the file is closed, so
//! what was locked through each open file is remembered. An owner is forgotten when the directory
//! has answered that its locks are gone; until then it is asked again.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;
use us_core::ids::Ino;
use us_proto::v1;

use super::names::ANSWER_TIMEOUT;
use super::{Fs, FsError, Handle, Lock, LockType};
use crate::core::locks::{LockAsk, LockEvent, LockOutcome, OwnLock};

/// One wait for a lock at the directory, and all of them: a request cannot be interrupted, so no
/// wait is for ever.
const LOCK_WAIT_MS: u32 = 10_000;
const LOCK_WAIT_MAX: Duration = Duration::from_secs(600);
/// How long the directory may take to decide, beside the wait that was asked for: a mount that keeps
/// the file's locks and is silent is shut out meanwhile.
const DECISION_TIMEOUT: Duration = Duration::from_secs(75);
/// The pause before locks that could not be released are released again.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Owners that may hold locks: only their closes concern the directory.
#[derive(Debug, Default)]
pub(crate) struct LockOwners {
    owners: HashMap<(Ino, u64), Owner>,
}

#[derive(Debug, Default)]
struct Owner {
    /// Open files through which it has asked for locks.
    handles: HashSet<Handle>,
    /// It has closed; the directory has not confirmed yet that its locks are gone.
    closing: bool,
}

impl LockOwners {
    fn locks(&mut self, ino: Ino, owner: u64, handle: Handle) {
        self.owners.entry((ino, owner)).or_default().handles.insert(handle);
    }

    /// Whether locks of the owner are to be released now.
    fn begin_close(&mut self, ino: Ino, owner: u64) -> bool {
        let Some(known) = self.owners.get_mut(&(ino, owner)) else { return false };
        known.closing = true;
        true
    }

    fn is_closing(&self, ino: Ino, owner: u64) -> bool {
        self.owners.get(&(ino, owner)).is_some_and(|known| known.closing)
    }

    fn released(&mut self, ino: Ino, owner: u64) {
        self.owners.remove(&(ino, owner));
    }

    /// An open file is closed: the owners that locked through it.
    pub(super) fn closed(&mut self, ino: Ino, handle: Handle) -> Vec<(Ino, u64)> {
        let of_file = self.owners.iter_mut().filter(|((of, _), _)| *of == ino);
        let through =
            of_file.filter_map(|(key, owner)| owner.handles.remove(&handle).then_some(*key));
        through.collect()
    }
}

impl Fs {
    /// The lock that is in the way of `lock`, or `None`.
    pub async fn getlk(&self, ino: Ino, lock: Lock) -> Result<Option<Lock>, FsError> {
        let held = match self.ask_lock(ino, lock, true, 0).await? {
            LockOutcome::Granted => return Ok(None),
            LockOutcome::InTheWay(held) => held,
            other => return Err(undone(other)),
        };
        let kind = match held.kind {
            v1::LockKind::Unlock => return Ok(None),
            v1::LockKind::Read => LockType::Read,
            v1::LockKind::Write => LockType::Write,
        };
        Ok(Some(Lock { owner: 0, start: held.start, end: held.end, kind, pid: held.pid }))
    }

    /// Takes or releases a byte-range lock through an open file; `wait`s, but not for ever, for one
    /// that is in the way.
    pub async fn setlk(
        &self,
        ino: Ino,
        handle: Handle,
        lock: Lock,
        wait: bool,
    ) -> Result<(), FsError> {
        let deadline = Instant::now() + LOCK_WAIT_MAX;
        // The kernel uses an owner's number again: what its former bearer held goes first.
        if self.shared.lock().lock_owners.is_closing(ino, lock.owner) {
            self.unlock_all(ino, lock.owner).await?;
        }
        if lock.kind != LockType::Unlock {
            self.shared.lock().lock_owners.locks(ino, lock.owner, handle);
        }
        loop {
            let wait_ms = if wait { LOCK_WAIT_MS } else { 0 };
            match self.ask_lock(ino, lock, false, wait_ms).await? {
                LockOutcome::Granted => return Ok(()),
                // Who waits, waits for what another mount keeps too.
                LockOutcome::InTheWay(_) | LockOutcome::Undecided if wait => {}
                other => return Err(undone(other)),
            }
            if Instant::now() >= deadline {
                return Err(FsError::LockWaitEnded);
            }
        }
    }

    /// A descriptor of `owner` was closed: its locks on the file go, now or as soon as the
    /// directory can be told.
    pub(super) async fn drop_locks(&self, ino: Ino, owner: u64) -> Result<(), FsError> {
        if !self.shared.lock().lock_owners.begin_close(ino, owner) {
            return Ok(());
        }
        match self.unlock_all(ino, owner).await {
            Err(error @ FsError::SessionEnded(_)) => Err(error),
            Err(error) => {
                tracing::warn!(%ino, %error, "locks of a closed file are released later");
                self.retry_unlock(ino, owner);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// The same for several owners, for a caller that cannot wait.
    pub(super) fn drop_locks_later(&self, owners: Vec<(Ino, u64)>) {
        for (ino, owner) in owners {
            let known = self.shared.lock().lock_owners.begin_close(ino, owner);
            if known && !self.unlock_here(ino, owner) {
                self.retry_unlock(ino, owner);
            }
        }
    }

    /// Releases the locks of an owner that has closed; asks again until the directory has answered.
    fn retry_unlock(&self, ino: Ino, owner: u64) {
        let fs = self.clone();
        self.shared.tasks.spawn(async move {
            let mut progress = fs.shared.progress.subscribe();
            while fs.shared.lock().lock_owners.is_closing(ino, owner) {
                match fs.unlock_all(ino, owner).await {
                    Ok(()) | Err(FsError::SessionEnded(_)) => return,
                    Err(error) => tracing::debug!(%ino, %error, "locks are not released yet"),
                }
                // Cancel-safe: all only wait. The session signals when it is resumed.
                tokio::select! {
                    _ = progress.changed() => {}
                    () = tokio::time::sleep(AGAIN_AFTER) => {}
                    () = fs.shared.stop.cancelled() => return,
                }
            }
        });
    }

    async fn unlock_all(&self, ino: Ino, owner: u64) -> Result<(), FsError> {
        match self.ask_lock(ino, everything(owner), false, 0).await? {
            LockOutcome::Granted => {}
            other => return Err(undone(other)),
        }
        self.shared.lock().lock_owners.released(ino, owner);
        Ok(())
    }

    /// Sets, releases or tests a lock: here where the file's locks are kept here, else at the
    /// directory.
    async fn ask_lock(
        &self,
        ino: Ino,
        lock: Lock,
        test: bool,
        wait_ms: u32,
    ) -> Result<LockOutcome, FsError> {
        let ask = LockAsk { wanted: own_lock(lock), test, wait_ms };
        let (number, mut answer) = {
            let (mut state, now) = (self.shared.lock(), self.shared.now());
            if let Some(why) = state.core.ended() {
                return Err(FsError::SessionEnded(why.to_owned()));
            }
            let number = state.core.request_number();
            let answer = state.wait_for_lock(number);
            let locked = state.step_locks(now, LockEvent::Asked { number, ino, ask });
            drop(state);
            if locked.sent > 0 {
                self.shared.outgoing.notify_one();
            }
            (number, answer)
        };
        // A release needs nobody else.
        let release = lock.kind == LockType::Unlock;
        let decided = if release { ANSWER_TIMEOUT } else { DECISION_TIMEOUT };
        let patience = decided + Duration::from_millis(u64::from(wait_ms));
        let ended = |_| {
            let state = self.shared.lock();
            let why = state.core.ended().unwrap_or("it ended while a lock was asked for");
            FsError::SessionEnded(why.to_owned())
        };
        if let Ok(told) = tokio::time::timeout(patience, &mut answer).await {
            return told.map_err(ended);
        }
        let (mut state, now) = (self.shared.lock(), self.shared.now());
        state.step_locks(now, LockEvent::GivenUp { number });
        state.forget_lock(number);
        // One that waited here is told what is in the way.
        answer.try_recv().map_err(|_| FsError::TimedOut("the directory did not answer".to_owned()))
    }

    /// Releases an owner's locks where that needs no question; `false`: it does.
    fn unlock_here(&self, ino: Ino, owner: u64) -> bool {
        let (mut state, now) = (self.shared.lock(), self.shared.now());
        if !state.core.locks().keeps(ino) {
            return false;
        }
        let number = state.core.request_number();
        let ask = LockAsk { wanted: own_lock(everything(owner)), test: false, wait_ms: 0 };
        let locked = state.step_locks(now, LockEvent::Asked { number, ino, ask });
        state.lock_owners.released(ino, owner);
        drop(state);
        if locked.sent > 0 {
            self.shared.outgoing.notify_one();
        }
        true
    }

    /// Nobody has the file open any more: what was kept here of its locks is not kept for ever.
    pub(super) fn locks_closed(&self, ino: Ino) {
        let (mut state, now) = (self.shared.lock(), self.shared.now());
        if state.core.locks().keeps(ino) && !state.core.has_open(ino) {
            state.step_locks(now, LockEvent::Closed(ino));
            drop(state);
            self.shared.outgoing.notify_one();
        }
    }
}

/// The release of all that an owner has.
const fn everything(owner: u64) -> Lock {
    Lock { owner, start: 0, end: u64::MAX, kind: LockType::Unlock, pid: 0 }
}

fn own_lock(lock: Lock) -> OwnLock {
    let kind = match lock.kind {
        LockType::Read => v1::LockKind::Read,
        LockType::Write => v1::LockKind::Write,
        LockType::Unlock => v1::LockKind::Unlock,
    };
    OwnLock { by: lock.owner, start: lock.start, end: lock.end, kind, pid: lock.pid }
}

/// An outcome that says neither that it is granted nor what is in the way.
fn undone(outcome: LockOutcome) -> FsError {
    match outcome {
        LockOutcome::Granted | LockOutcome::InTheWay(_) => FsError::Locked,
        LockOutcome::TooMany => FsError::TooManyLocks,
        LockOutcome::ReadOnly => FsError::BadHandle,
        LockOutcome::Undecided => {
            FsError::TimedOut("another mount did not say which locks it has".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_file_that_closes_names_the_owners_that_locked_through_it() {
        let (ino, file, other) = (Ino(7), Handle(1), Handle(2));
        let mut owners = LockOwners::default();
        owners.locks(ino, 10, file);
        owners.locks(ino, 11, file);
        owners.locks(ino, 12, other);
        assert!(!owners.begin_close(ino, 13) && !owners.begin_close(Ino(8), 10));
        // A POSIX owner closes one of its descriptors.
        assert!(owners.begin_close(ino, 10));
        owners.released(ino, 10);
        assert_eq!(owners.closed(ino, file), [(ino, 11)]);
        assert!(owners.begin_close(ino, 11) && owners.is_closing(ino, 11));
        assert!(!owners.is_closing(ino, 12));
        owners.released(ino, 11);
        assert_eq!(owners.closed(ino, file), []);
        assert_eq!(owners.owners.len(), 1);
    }
}
