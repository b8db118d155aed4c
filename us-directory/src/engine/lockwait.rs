//! fcntl locks as sessions ask for them: set, tested, or waited for up to a deadline.

use us_proto::v1::session_down::Event as Down;
use us_proto::v1::{LockKind, LockReply, LockRequest};

use super::leases::InodeKey;
use super::locks::{Lock, LockOwner};
use super::{ConnId, Engine};
use crate::store::StoreError;

/// The longest a lock is waited for.
const LOCK_WAIT_MS_MAX: u64 = 60_000;
/// Lock requests of all sessions that may wait at once.
const LOCK_WAITERS_MAX: usize = 16_384;

/// A lock request that waits.
#[derive(Debug)]
pub(super) struct LockWaiter {
    pub conn: ConnId,
    key: InodeKey,
    wanted: Lock,
    request: u64,
    deadline_ms: u64,
}

impl LockWaiter {
    /// It may wait so much longer.
    pub fn wait_longer(&mut self, by_ms: u64) {
        self.deadline_ms = self.deadline_ms.saturating_add(by_ms);
    }
}

impl Engine {
    pub(super) fn lock(
        &mut self,
        session: u64,
        conn: ConnId,
        ask: LockRequest,
    ) -> Result<(), StoreError> {
        let Some(known) = self.sessions.get(&session) else { return Ok(()) };
        let key = (known.volume, ask.ino);
        let Ok(kind) = LockKind::try_from(ask.kind) else {
            return self.refuse(session, format!("lock kind {}", ask.kind));
        };
        if ask.start > ask.end {
            return self.refuse(session, "a lock that ends before it starts".to_owned());
        }
        let by = LockOwner { session, owner: ask.owner };
        let wanted = Lock { by, start: ask.start, end: ask.end, kind, pid: ask.pid };
        let blocking =
            if kind == LockKind::Unlock { None } else { self.locks.in_the_way(&key, &wanted) };
        let wait = ask.wait && !ask.test && self.lock_waiters.len() < LOCK_WAITERS_MAX;
        match blocking {
            Some(_) if wait => {
                let wait_ms = u64::from(ask.wait_ms).min(LOCK_WAIT_MS_MAX);
                let deadline_ms = self.now_ms() + wait_ms;
                let request = ask.request;
                let waiter = LockWaiter { conn, key, wanted, request, deadline_ms };
                self.lock_waiters.push_back(waiter);
            }
            Some(held) => self.reply_lock(conn, ask.request, session, Some(held)),
            None => {
                let granted = ask.test || self.locks.set(&key, wanted);
                let reply = LockReply { request: ask.request, granted, ..Default::default() };
                self.send(conn, Down::Lock(reply));
                self.retry_locks(&key);
            }
        }
        Ok(())
    }

    fn reply_lock(&mut self, conn: ConnId, request: u64, session: u64, held: Option<Lock>) {
        let mut reply = LockReply { request, granted: held.is_none(), ..Default::default() };
        if let Some(held) = held {
            reply.blocking_kind = held.kind as i32;
            reply.blocking_start = held.start;
            reply.blocking_end = held.end;
            reply.blocking_pid = if held.by.session == session { held.pid } else { 0 };
        }
        self.send(conn, Down::Lock(reply));
    }

    /// Tries the requests that wait for locks of an inode, in the order they came.
    fn retry_locks(&mut self, key: &InodeKey) {
        if self.lock_waiters.is_empty() {
            return;
        }
        for waiter in std::mem::take(&mut self.lock_waiters) {
            let blocked =
                waiter.key != *key || self.locks.in_the_way(&waiter.key, &waiter.wanted).is_some();
            if blocked {
                self.lock_waiters.push_back(waiter);
                continue;
            }
            let granted = self.locks.set(&waiter.key, waiter.wanted);
            let reply = LockReply { request: waiter.request, granted, ..Default::default() };
            self.send(waiter.conn, Down::Lock(reply));
        }
    }

    /// A session's locks end with it.
    pub(super) fn drop_locks(&mut self, session: u64) {
        self.lock_waiters.retain(|waiter| waiter.wanted.by.session != session);
        for key in self.locks.drop_session(session) {
            self.retry_locks(&key);
        }
    }

    /// Answers lock requests that waited long enough.
    pub(super) fn check_lock_waiters(&mut self) {
        let now_ms = self.now_ms();
        if self.lock_waiters.iter().all(|waiter| waiter.deadline_ms > now_ms) {
            return;
        }
        for waiter in std::mem::take(&mut self.lock_waiters) {
            if waiter.deadline_ms > now_ms {
                self.lock_waiters.push_back(waiter);
                continue;
            }
            let held = self.locks.in_the_way(&waiter.key, &waiter.wanted);
            self.reply_lock(waiter.conn, waiter.request, waiter.wanted.by.session, held);
        }
    }
}
