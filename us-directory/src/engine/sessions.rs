//! Sessions: opened, resumed, closed, shut out.

use std::collections::{HashSet, VecDeque};

use bytes::Bytes;
use us_core::grant::Rights;
use us_core::ids::VolumeId;
use us_core::limits::{LEASES_MESSAGE_MAX, SESSION_LEASES_MAX};
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::session_up::Event as Up;
use us_proto::v1::{
    Durable, EndReason, InodeLease, LeaseReturn, OpenSession, Recall, Reclaim, SessionEnded,
    SessionOpened, SessionUp,
};

use super::leases::{InodeKey, Level, Returned};
use super::locks::LockEvent;
use super::quota::Leased;
use super::{ConnId, Effect, Engine, Peer, SESSIONS_MAX, SESSIONS_OF_ONE_MAX, Then, access};
use crate::keys;
use crate::records::{SessionRecord, encode, volume_id};
use crate::store::{Durability, KeyRange, Seq, StoreError};

/// The most sessions one open may replace.
const REPLACES_MAX: usize = 64;
/// Fenced sessions that are remembered.
const FENCED_KEPT_MAX: usize = 1024;
/// The longest host name kept.
const HOST_BYTES_MAX: usize = 256;

/// A session, as far as it need not survive the directory.
#[derive(Debug)]
pub(super) struct Session {
    pub record: SessionRecord,
    pub volume: VolumeId,
    pub conn: Option<ConnId>,
    /// It has heard `SessionOpened` on this connection; nothing else may come before that.
    pub greeted: bool,
    /// When it was last heard.
    pub heard_ms: u64,
    /// It has said what it holds since the directory started.
    pub claimed: bool,
    /// After it came back: what it holds and has not yet claimed again.
    pub unclaimed: Option<HashSet<InodeKey>>,
    /// Commits that are not yet durable, and the batches in them.
    pub undurable: VecDeque<(Seq, u64)>,
    /// Inodes it has open, although it may hold no lease on them.
    pub open: HashSet<u64>,
    /// It is being ended: nothing more is taken from it.
    pub ending: bool,
    /// The period its last grant was signed in.
    pub granted: u64,
    /// Places it was given and has not used.
    pub leased: Leased,
}

/// How a session ends.
#[derive(Clone, Debug)]
pub(super) struct Ending {
    pub reason: EndReason,
    pub detail: String,
}

impl Session {
    /// A session the store knows, not yet heard of since the start.
    pub fn restored(record: SessionRecord) -> Self {
        let volume = volume_id(&record.volume);
        Self {
            volume,
            conn: None,
            greeted: false,
            heard_ms: 0,
            claimed: record.fenced,
            unclaimed: None,
            undurable: VecDeque::new(),
            open: HashSet::new(),
            ending: false,
            granted: 0,
            leased: Leased::default(),
            record,
        }
    }

    /// As much of a lease as it may have: one that changes nothing shares all it holds.
    pub fn at_most(&self, level: Level) -> Level {
        if self.record.read_only { level.min(Level::Shared) } else { level }
    }

    /// Whether it can hold leases.
    pub fn is_alive(&self) -> bool {
        !self.record.fenced && !self.ending
    }
}

impl Engine {
    pub(super) fn session_says(&mut self, conn: ConnId, up: SessionUp) -> Result<(), StoreError> {
        let Some(connection) = self.connections.get(&conn) else { return Ok(()) };
        let Some(event) = up.event else {
            return self.end_connection(conn, EndReason::Refused, "a message without content");
        };
        let Some(session) = connection.session else {
            return match event {
                Up::Open(open) => self.open(conn, open),
                _ => self.end_connection(conn, EndReason::Refused, "the first message must open"),
            };
        };
        let now_ms = self.now_ms();
        let Some(known) = self.sessions.get_mut(&session) else { return Ok(()) };
        if known.ending || known.conn != Some(conn) {
            return Ok(());
        }
        known.heard_ms = now_ms;
        match event {
            Up::Open(_) => self.refuse(session, "a session is opened once".to_owned()),
            Up::Reclaim(reclaim) => self.reclaim(session, &reclaim),
            Up::Batch(batch) => self.batch(session, &batch),
            Up::Fetch(fetch) => self.fetch(session, conn, fetch),
            Up::LeaseReturn(returned) => self.lease_return(session, &returned),
            Up::LeasePlacements(_) | Up::LeaseInodes(_) if known.record.read_only => {
                self.refuse(session, "a read-only session makes nothing".to_owned())
            }
            Up::LeasePlacements(ask) => self.lease_placements(session, conn, &ask),
            Up::LeaseInodes(ask) => self.lease_inodes(session, conn, &ask),
            Up::Lock(ask) => self.lock(session, conn, &ask),
            Up::Locks(told) => self.says_locks(session, &told),
            Up::Statfs(ask) => self.statfs(session, conn, &ask),
            Up::Damage(damage) => self.client_damage(session, &damage),
            Up::Renew(renew) => {
                let renewed = self.renewed(session, renew.grant);
                self.send(conn, Down::Renewed(renewed));
                Ok(())
            }
            Up::Close(_) => {
                let detail = "closed by the mount".to_owned();
                self.end_session(session, Ending { reason: EndReason::Closed, detail })
            }
            Up::Sync(_) => self.sync(),
        }
    }

    /// Ends a connection that has no session.
    fn end_connection(
        &mut self,
        conn: ConnId,
        reason: EndReason,
        detail: impl Into<String>,
    ) -> Result<(), StoreError> {
        let ended = SessionEnded { reason: reason as i32, detail: detail.into() };
        self.send(conn, Down::Ended(ended));
        self.effects.push(Effect::End { conn });
        self.connections.remove(&conn);
        Ok(())
    }

    /// The session broke a rule.
    pub(super) fn refuse(&mut self, session: u64, detail: String) -> Result<(), StoreError> {
        tracing::warn!(session, %detail, "session refused");
        self.end_session(session, Ending { reason: EndReason::Refused, detail })
    }

    fn open(&mut self, conn: ConnId, open: OpenSession) -> Result<(), StoreError> {
        let by_id = open.volume.parse::<VolumeId>().ok();
        let found = self.volumes.iter().find(|(id, volume)| {
            let open_to_all = !volume.record.deleting && !self.is_hidden(id);
            open_to_all && (Some(**id) == by_id || volume.record.name == open.volume)
        });
        let Some((volume, _)) = found else {
            let detail = format!("there is no volume {:?}", open.volume);
            return self.end_connection(conn, EndReason::NoVolume, detail);
        };
        let volume = *volume;
        let peer = self.connections.get(&conn).map(|known| known.peer.clone());
        let peer = peer.unwrap_or_default();
        if let Some(detail) = self.denial(&volume, &peer, open.read_only) {
            tracing::warn!(client = %peer.name, %detail, "no session");
            return self.end_connection(conn, EndReason::Denied, detail);
        }
        let key_hash = peer.key_hash;
        if open.session != 0 {
            return self.resume(conn, &open, volume, &key_hash);
        }
        if self.sessions.len() >= SESSIONS_MAX {
            return self.end_connection(conn, EndReason::Refused, "too many sessions");
        }
        let its = |known: &&Session| known.is_alive() && known.record.key_hash[..] == key_hash[..];
        if self.sessions.values().filter(its).count() >= SESSIONS_OF_ONE_MAX {
            let detail = "this certificate has as many sessions as it may";
            return self.end_connection(conn, EndReason::Refused, detail);
        }
        for replaced in open.replaces.iter().take(REPLACES_MAX) {
            let known = self.sessions.get(replaced);
            if known.is_some_and(|known| known.is_alive() && known.record.key_hash == key_hash) {
                let detail = "replaced: its mount is dead".to_owned();
                self.end_session(*replaced, Ending { reason: EndReason::Fenced, detail })?;
            }
        }
        let session = self.cluster.next_session;
        self.cluster.next_session += 1;
        let mut host = open.host;
        host.truncate(
            (0..=HOST_BYTES_MAX).rev().find(|at| host.is_char_boundary(*at)).unwrap_or(0),
        );
        let record = SessionRecord {
            volume: Bytes::copy_from_slice(volume.as_bytes()),
            host,
            read_only: open.read_only,
            key_hash: key_hash.into(),
            by_admin: peer.admin,
            ..Default::default()
        };
        let mut known = Session::restored(record);
        known.claimed = true;
        known.conn = Some(conn);
        known.heard_ms = self.now_ms();
        let mut batch = crate::store::WriteBatch::new();
        batch.put(keys::session(session), encode(&known.record));
        batch.put(keys::cluster(), encode(&self.cluster));
        self.sessions.insert(session, known);
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.session = Some(session);
        }
        let seq = self.commit(batch, Durability::Durable)?;
        self.then(seq, Then::Greet { conn, session, resumed: false })
    }

    /// Why the peer may not have such a session.
    fn denial(&self, volume: &VolumeId, peer: &Peer, read_only: bool) -> Option<String> {
        let record = &self.volumes.get(volume)?.record;
        match access::rights(record, peer) {
            None => Some(access::denied(&record.name, peer, false)),
            Some(Rights::Read) if !read_only => Some(access::denied(&record.name, peer, true)),
            Some(_) => None,
        }
    }

    fn resume(
        &mut self,
        conn: ConnId,
        open: &OpenSession,
        volume: VolumeId,
        key_hash: &[u8],
    ) -> Result<(), StoreError> {
        let session = open.session;
        let incarnation = self.cluster.incarnation;
        let now_ms = self.now_ms();
        let known = self.sessions.get_mut(&session).filter(|known| {
            known.volume == volume && known.record.key_hash == key_hash && !known.ending
        });
        let Some(known) = known.filter(|_| open.incarnation <= incarnation) else {
            let detail = format!("there is no session {session} to resume");
            return self.end_connection(conn, EndReason::Unknown, detail);
        };
        let lost = session < self.cluster.sessions_lost_below;
        if open.incarnation < incarnation && (lost || open.durable > known.record.applied) {
            let (told, has) = (open.durable, known.record.applied);
            let detail = format!(
                "the directory was restored, and not everything it had acknowledged is there \
                 (batch {told} was durable, the restored directory has {has}): mount again"
            );
            tracing::warn!(session, told, has, "a session from before the restore is ended");
            known.conn = None;
            self.end_connection(conn, EndReason::Fenced, detail.clone())?;
            return self.end_session(session, Ending { reason: EndReason::Fenced, detail });
        }
        if known.record.fenced {
            let detail = "it was silent too long and another mount wanted what it held";
            return self.end_connection(conn, EndReason::Fenced, detail);
        }
        known.heard_ms = now_ms;
        let old = known.conn.replace(conn);
        known.greeted = false;
        known.unclaimed = Some(self.leases.held_by(session).into_iter().collect());
        if let Some(old) = old.filter(|old| *old != conn) {
            self.connections.remove(&old);
            self.drop_requests(old)?;
            self.effects.push(Effect::End { conn: old });
        }
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.session = Some(session);
        }
        self.step_locks(LockEvent::Resumed { session })?;
        // Everything applied so far is durable before the mount hears how far it was applied.
        let last_seq = self.last_seq;
        if last_seq > self.durable {
            self.sync_store()?;
        }
        self.then(last_seq, Then::Greet { conn, session, resumed: true })
    }

    /// All that the session is told is durable: it may hear that it is open.
    pub(super) fn greet(&mut self, conn: ConnId, session: u64, resumed: bool) {
        if self.sessions.get(&session).is_none_or(|known| known.conn != Some(conn)) {
            return;
        }
        let grant = self.session_grant(session);
        let Some(known) = self.sessions.get_mut(&session) else { return };
        let Some(volume) = self.volumes.get(&known.volume) else { return };
        known.greeted = true;
        let applied = known.record.applied;
        let number = known.undurable.front().map_or(applied, |(_, first)| first - 1);
        let opened = SessionOpened {
            session,
            incarnation: self.cluster.incarnation,
            resumed,
            applied,
            volume: Bytes::copy_from_slice(known.volume.as_bytes()),
            volume_name: volume.record.name.clone(),
            s: volume.record.s,
            r: volume.record.r,
            volume_key: volume.record.key.clone(),
            lease_ms: self.config.lease_ms as u32,
            fence_ms: self.config.fence_ms as u32,
            grant,
            now_unix_ms: self.at.unix_ms,
        };
        self.send(conn, Down::Opened(opened));
        self.send(conn, Down::Providers(self.provider_table()));
        if resumed {
            self.send(conn, Down::Durable(Durable { number }));
        }
    }

    fn reclaim(&mut self, session: u64, reclaim: &Reclaim) -> Result<(), StoreError> {
        let Some(known) = self.sessions.get(&session) else { return Ok(()) };
        if known.unclaimed.is_none() {
            let detail = "leases are claimed once, when a session is resumed".to_owned();
            return self.refuse(session, detail);
        }
        if reclaim.leases.len() > LEASES_MESSAGE_MAX {
            return self.refuse(session, "too many leases in one message".to_owned());
        }
        for lease in &reclaim.leases {
            if let Some(detail) = self.reclaim_one(session, lease)? {
                return self.refuse(session, detail);
            }
        }
        if reclaim.last { self.claimed(session) } else { Ok(()) }
    }

    /// One lease claimed again; what is wrong with it where that ends the session.
    ///
    /// What it claims counts, not what was granted last: that answer may not have arrived. More than
    /// was granted it can hold only of an inode it is about to create (again), and of any where this
    /// run of the directory has granted nothing to it yet.
    fn reclaim_one(
        &mut self,
        session: u64,
        lease: &InodeLease,
    ) -> Result<Option<String>, StoreError> {
        let Some(known) = self.sessions.get_mut(&session) else { return Ok(None) };
        let (key, level) =
            ((known.volume, lease.ino), known.at_most(Level::from_wire(lease.level)));
        let first = !known.claimed;
        let mut ranges = known.record.inodes.iter();
        let own = ranges.any(|range| key.1 >= range.first && key.1 - range.first < range.count);
        if lease.open {
            known.open.insert(key.1);
        }
        let too_many = known.open.len() > SESSION_LEASES_MAX;
        let listed = known.unclaimed.as_mut().is_some_and(|unclaimed| unclaimed.remove(&key));
        let granted = self.leases.level(session, &key);
        if listed {
            self.leases.forget(session, &key);
            self.wake_inode(&key);
        }
        if too_many || self.leases.count(session) >= SESSION_LEASES_MAX {
            return Ok(Some("too many leases".to_owned()));
        }
        if level <= self.leases.level(session, &key) {
            return Ok(None);
        }
        if level > granted {
            let record = self.live_inode(&key.0, key.1)?;
            let restored = record.as_ref().and_then(|record| record.restored);
            if restored.is_some_and(|at| at.session != session && lease.grant < at.grant) {
                // It removed the inode, did not hear that it was gone, and another has had it back.
                return Ok(None);
            }
            let exists = record.is_some();
            if exists && !first {
                return Ok(Some(format!("inode {} was never leased to it", key.1)));
            }
            if !exists && !own {
                // Deleted by its own batch, whose answer did not arrive.
                return Ok(None);
            }
        }
        if !self.leases.reclaim(session, &key, level, lease.grant) {
            return Ok(Some(format!("inode {} was leased to another meanwhile", key.1)));
        }
        Ok(None)
    }

    /// The session has said all it holds.
    pub(super) fn claimed(&mut self, session: u64) -> Result<(), StoreError> {
        let Some(known) = self.sessions.get_mut(&session) else { return Ok(()) };
        let unclaimed = known.unclaimed.take();
        let first = !std::mem::replace(&mut known.claimed, true);
        for key in unclaimed.into_iter().flatten() {
            self.leases.forget(session, &key);
            self.wake_inode(&key);
        }
        if first {
            self.wake_grace();
        }
        // Recalls that were on their way when the connection broke are sent again.
        self.leases.forget_recalls(session);
        for key in self.leases.held_by(session) {
            self.wake_inode(&key);
        }
        self.step_locks(LockEvent::Claimed { session })
    }

    fn lease_return(&mut self, session: u64, returned: &LeaseReturn) -> Result<(), StoreError> {
        let Some(known) = self.sessions.get_mut(&session) else { return Ok(()) };
        let volume = known.volume;
        if returned.leases.len() > LEASES_MESSAGE_MAX {
            return self.refuse(session, "too many leases in one message".to_owned());
        }
        for lease in &returned.leases {
            if lease.open {
                known.open.insert(lease.ino);
            } else {
                known.open.remove(&lease.ino);
            }
        }
        if known.open.len() > SESSION_LEASES_MAX {
            return self.refuse(session, "too many open inodes".to_owned());
        }
        for lease in &returned.leases {
            let key = (volume, lease.ino);
            match self.leases.lower(session, &key, Level::from_wire(lease.level), lease.grant) {
                Returned::Lowered => self.wake_inode(&key),
                Returned::Ignored { again: Some((keep, grant)) } => {
                    self.recall(session, &key, keep, grant);
                }
                Returned::Ignored { again: None } | Returned::Unknown => {}
            }
        }
        Ok(())
    }

    pub(super) fn recall(&mut self, session: u64, key: &InodeKey, keep: Level, grant: u64) {
        let recall = Recall { ino: key.1, level: keep.to_wire(), grant };
        self.send_session(session, Down::Recall(recall));
    }

    /// Shuts a silent session out; what it held is free when the fence is durable.
    pub(super) fn fence(&mut self, session: u64) -> Result<(), StoreError> {
        let detail = "it was silent too long and another mount wanted what it held".to_owned();
        tracing::warn!(session, "session fenced");
        self.end_session(session, Ending { reason: EndReason::Fenced, detail })
    }

    /// Ends a session: its open unlinked files go, its record goes (of a fenced one it stays, marked,
    /// so that its replay is refused), and when that is durable its leases are free.
    pub(super) fn end_session(&mut self, session: u64, end: Ending) -> Result<(), StoreError> {
        let Some(known) = self.sessions.get_mut(&session) else { return Ok(()) };
        if std::mem::replace(&mut known.ending, true) {
            return Ok(());
        }
        let volume = known.volume;
        let fenced = matches!(end.reason, EndReason::Fenced | EndReason::Revoked);
        known.record.fenced = fenced;
        let record = known.record.clone();
        let forgotten = self.fenced_long_ago();
        let Some(mut tx) = self.tx(volume) else { return Ok(()) };
        let range = KeyRange::prefix(&keys::orphans(&volume, session));
        let orphans = tx.scan(&range, usize::MAX)?;
        for (key, _) in &orphans {
            let released = tx.release(session, keys::last_number(key));
            released.or_else(|error| match error {
                crate::namespace::ApplyError::Store(error) => Err(error),
                crate::namespace::ApplyError::Rule(rule) => {
                    tracing::error!(session, %rule, "an open unlinked inode is gone");
                    Ok(())
                }
            })?;
        }
        if fenced {
            tx.put(keys::session(session), &record);
        } else {
            tx.delete(keys::session(session));
        }
        forgotten.iter().for_each(|old| tx.delete(keys::session(*old)));
        let outcome = tx.finish()?;
        let seq = self.commit(outcome.batch, Durability::Durable)?;
        forgotten.iter().for_each(|old| drop(self.sessions.remove(old)));
        self.pending_deletes += outcome.graves as i64;
        self.note_blocks(volume, outcome.blocks);
        self.then(seq, Then::Ended { session, end })
    }

    /// Fenced sessions beyond those that are kept so that their mounts hear why: numbers are given
    /// once, so one that is not known is refused all the same.
    fn fenced_long_ago(&self) -> Vec<u64> {
        let fenced = self
            .sessions
            .iter()
            .filter(|(_, known)| known.record.fenced && !known.ending && known.conn.is_none());
        let fenced: Vec<u64> = fenced.map(|(session, _)| *session).collect();
        fenced[..fenced.len().saturating_sub(FENCED_KEPT_MAX)].to_vec()
    }

    /// The end of a session is durable.
    pub(super) fn ended(&mut self, session: u64, end: Ending) -> Result<(), StoreError> {
        let Some(known) = self.sessions.get_mut(&session) else { return Ok(()) };
        let conn = known.conn.take();
        known.claimed = true;
        known.unclaimed = None;
        known.undurable.clear();
        known.open.clear();
        known.ending = false;
        self.left.by(known.volume, &known.record.key_hash, &mut known.leased);
        if !known.record.fenced {
            self.sessions.remove(&session);
        }
        if let Some(conn) = conn {
            let ended = SessionEnded { reason: end.reason as i32, detail: end.detail };
            self.send(conn, Down::Ended(ended));
            self.effects.push(Effect::End { conn });
            self.connections.remove(&conn);
            self.drop_requests(conn)?;
        }
        for key in self.leases.drop_session(session) {
            self.wake_inode(&key);
        }
        self.wake_grace();
        self.step_locks(LockEvent::Ended { session })
    }

    pub(super) fn disconnected(&mut self, conn: ConnId) -> Result<(), StoreError> {
        self.drop_requests(conn)?;
        let Some(connection) = self.connections.remove(&conn) else { return Ok(()) };
        let session = connection.session.and_then(|id| self.sessions.get_mut(&id));
        if let Some(session) = session.filter(|session| session.conn == Some(conn)) {
            session.conn = None;
        }
        if let Some(provider) = connection.provider {
            self.provider_gone(conn, provider)?;
        }
        Ok(())
    }
}
