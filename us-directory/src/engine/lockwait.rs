//! fcntl locks as sessions ask for them: what [`super::locks`] decides, with the engine's sessions
//! and connections around it.

use us_core::range_locks::FILE_LOCKS_MAX;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::{LockKind, LockRequest, RecallLocks};

use super::locks::{Asked, Grace, Lock, LockEffect, LockEvent, LockOwner, Said};
use super::{ConnId, Engine};
use crate::store::StoreError;

/// The longest a lock is waited for.
const LOCK_WAIT_MS_MAX: u64 = 60_000;
/// Why a read-only session ends that wants a write lock: its mount answers `EBADF` itself.
const READS_ONLY: &str = "a read-only session has no write locks";

impl Engine {
    pub(super) fn lock(
        &mut self,
        session: u64,
        conn: ConnId,
        ask: &LockRequest,
    ) -> Result<(), StoreError> {
        metrics::counter!("us_directory_lock_messages_total").increment(1);
        let Some(known) = self.sessions.get(&session) else { return Ok(()) };
        let key = (known.volume, ask.ino);
        let Ok(kind) = LockKind::try_from(ask.kind) else {
            return self.refuse(session, format!("lock kind {}", ask.kind));
        };
        if ask.start > ask.end {
            return self.refuse(session, "a lock that ends before it starts".to_owned());
        }
        if kind == LockKind::Write && known.record.read_only && !ask.test {
            return self.refuse(session, READS_ONLY.to_owned());
        }
        let by = LockOwner { session, owner: ask.owner };
        let wait = ask.wait && !ask.test;
        // What another keeps itself is waited for in any case.
        let wait_ms = if wait {
            u64::from(ask.wait_ms).min(LOCK_WAIT_MS_MAX)
        } else {
            self.config.fetch_wait_ms
        };
        let asked = Asked {
            conn,
            request: ask.request,
            wanted: Lock { by, start: ask.start, end: ask.end, kind, pid: ask.pid },
            test: ask.test,
            wait,
            may_keep: ask.may_keep,
            deadline_ms: self.now_ms() + wait_ms,
        };
        self.step_locks(LockEvent::Asked(key, asked))
    }

    /// A mount says which locks it has on a file.
    pub(super) fn says_locks(
        &mut self,
        session: u64,
        told: &us_proto::v1::Locks,
    ) -> Result<(), StoreError> {
        metrics::counter!("us_directory_lock_messages_total").increment(1);
        let Some(known) = self.sessions.get(&session) else { return Ok(()) };
        let (key, claims) = ((known.volume, told.ino), !known.claimed);
        let writes = told.locks.iter().any(|held| held.kind() == LockKind::Write);
        if writes && known.record.read_only {
            return self.refuse(session, READS_ONLY.to_owned());
        }
        if told.locks.len() > FILE_LOCKS_MAX {
            return self.refuse(session, format!("{} locks on a file", told.locks.len()));
        }
        let said = if told.unchanged {
            Said::Unchanged
        } else {
            let lock = |held: &us_proto::v1::HeldLock| Lock {
                by: LockOwner { session, owner: held.owner },
                start: held.start,
                end: held.end,
                kind: held.kind(),
                pid: held.pid,
            };
            Said::All { locks: told.locks.iter().map(lock).collect(), kept: told.kept }
        };
        self.step_locks(LockEvent::Said { session, key, said, claims })
    }

    /// Has the table of locks take an event, and does what it says.
    pub(super) fn step_locks(&mut self, event: LockEvent) -> Result<(), StoreError> {
        let (now_ms, grace) = (self.now_ms(), self.lock_grace());
        for effect in self.locks.step(now_ms, &grace, event) {
            match effect {
                LockEffect::Reply(conn, reply) => self.send(conn, Down::Lock(reply)),
                LockEffect::Recall { session, ino } => {
                    self.send_session(session, Down::RecallLocks(RecallLocks { ino }));
                }
                LockEffect::InTheWay { session } => self.fence_if_silent(session)?,
                LockEffect::Broken { session, detail } => self.refuse(session, detail)?,
            }
        }
        Ok(())
    }

    fn lock_grace(&self) -> Grace {
        let silent = self.sessions.iter().filter(|(_, known)| !known.claimed);
        Grace { unclaimed: silent.map(|(session, known)| (*session, known.volume)).collect() }
    }
}
