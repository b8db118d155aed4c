//! Fetches: what a mount wants to know, answered with the leases under which it may keep it.
//!
//! A fetch takes all the leases it needs at once or none. Where one is in another's hands it is
//! parked (with a deadline) and tried again when something changed; requests for one inode are tried
//! in the order they came.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use bytes::Bytes;
use us_core::daemon::logging::RequestId;
use us_core::ids::{BlockId, VolumeId};
use us_core::limits::{SESSION_LEASES_MAX, SIBLINGS_MAX};
use us_proto::v1::fetch::Want;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::{
    BlockInfo, Entry, Extent, Fetch, FetchBlocks, FetchEntries, FetchEntry, FetchError, FetchMap,
    Fetched, Inode, InodeLease, MapChunk, SiblingMap, Timestamps, Xattr,
};

use super::leases::{InodeKey, Level};
use super::locks::LockEvent;
use super::{ConnId, Engine, PARKED_MAX};
use crate::keys;
use crate::namespace::{CHUNK_BYTES, S_IFDIR, S_IFMT};
use crate::records::{BlockRecord, ChunkRecord, CookieRecord, EntryRecord, InodeRecord, decode};
use crate::store::{KeyRange, Seq, StoreError};

/// The most entries one answer lists.
pub const ENTRIES_MAX: usize = 4096;
/// The most chunks one answer maps.
pub const CHUNKS_MAX: u32 = 256;
/// The most blocks one answer describes; of a map with more, the rest is asked for by name.
pub const BLOCKS_MAX: usize = 4096;
/// The most extents of siblings' maps, and the most bytes that lie in the directory itself.
const SIBLING_EXTENTS_MAX: usize = 4096;
const SIBLING_BYTES_MAX: usize = 1 << 20;
/// The most blocks one request may name.
pub const BLOCKS_ASKED_MAX: usize = 256;

/// A fetch that waits.
#[derive(Debug)]
pub(super) struct Parked {
    session: u64,
    conn: ConnId,
    fetch: Fetch,
    deadline_ms: u64,
    wait: Wait,
}

/// What a fetch waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// A lease comes back.
    Inode(InodeKey),
    /// What another session changed is durable.
    Durable(Seq),
    /// A session of the time before the restart has said what it holds.
    Grace,
}

/// What came of trying a fetch.
enum Tried {
    Answer(Box<Fetched>),
    Wait(Wait),
}

/// Why a fetch cannot be answered yet, or ever.
enum Stop {
    Wait(Wait),
    Error(FetchError, String),
    Store(StoreError),
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

fn not_found(ino: u64) -> Stop {
    Stop::Error(FetchError::NotFound, format!("there is no inode {ino}"))
}

/// The session asking, and its place among those that wait.
#[derive(Clone, Copy)]
struct Asker {
    session: u64,
    park: u64,
}

/// At least SHARED: an answer without a lease would be stale at once.
fn at_least_shared(level: i32) -> Level {
    Level::from_wire(level).max(Level::Shared)
}

/// An inode for the wire.
fn inode_message(ino: u64, record: InodeRecord) -> Inode {
    Inode {
        ino,
        mode: record.mode,
        nlink: record.nlink,
        uid: record.uid,
        gid: record.gid,
        rdev: record.rdev,
        size: record.size,
        allocated_bytes: record.allocated_bytes,
        times: Some(Timestamps { atime: record.atime, mtime: record.mtime, ctime: record.ctime }),
        sealed_target: record.sealed_target,
        parent: record.parent,
        version: record.version,
        has_xattrs: record.xattrs > 0,
        next_cookie: if record.mode & S_IFMT == S_IFDIR { record.last_cookie + 1 } else { 0 },
    }
}

/// A block for the wire.
fn block_message(block: Bytes, record: BlockRecord) -> BlockInfo {
    BlockInfo {
        block,
        s: record.s,
        r: record.r,
        page_bytes: record.page_bytes,
        plaintext_bytes: record.plaintext_bytes,
        providers: record.providers,
        durable: record.durable,
        fingerprint_kind: record.fingerprint_kind,
        fingerprint_hash: record.fingerprint_hash,
        inline: record.inline,
    }
}

impl Engine {
    pub(super) fn fetch(
        &mut self,
        session: u64,
        conn: ConnId,
        fetch: Fetch,
    ) -> Result<(), StoreError> {
        let park = self.next_park;
        self.next_park += 1;
        let deadline_ms = self.now_ms() + self.config.fetch_wait_ms;
        self.try_fetch(park, Parked { session, conn, fetch, deadline_ms, wait: Wait::Grace })
    }

    fn try_fetch(&mut self, park: u64, mut parked: Parked) -> Result<(), StoreError> {
        let request = parked.fetch.request;
        let (trace, session) = (RequestId(parked.fetch.trace), parked.session);
        match self.attempt(Asker { session: parked.session, park }, &parked.fetch)? {
            Tried::Answer(mut fetched) => {
                fetched.request = request;
                tracing::debug!(request = %trace, session, number = request, "fetched");
                self.send(parked.conn, Down::Fetched(*fetched));
                // Behind the answer: a recall must never overtake the grant that it names.
                for (session, key, keep, grant) in std::mem::take(&mut self.recall_again) {
                    self.recall(session, &key, keep, grant);
                }
            }
            Tried::Wait(_) if self.parked.len() >= PARKED_MAX => {
                self.give_up(&parked, "too many requests wait for leases");
            }
            Tried::Wait(wait) => {
                if let Wait::Inode(key) = wait {
                    let queue = self.waiters.entry(key).or_default();
                    let place = queue.partition_point(|other| *other < park);
                    queue.insert(place, park);
                }
                tracing::debug!(request = %trace, session, number = request, ?wait, "waits");
                parked.wait = wait;
                self.parked.insert(park, parked);
            }
        }
        Ok(())
    }

    fn give_up(&mut self, parked: &Parked, detail: &str) {
        let fetched = Fetched {
            request: parked.fetch.request,
            error: FetchError::Contended as i32,
            detail: detail.to_owned(),
            ..Default::default()
        };
        self.send(parked.conn, Down::Fetched(fetched));
    }

    fn attempt(&mut self, asker: Asker, fetch: &Fetch) -> Result<Tried, StoreError> {
        let answer = match &fetch.want {
            Some(Want::Inode(want)) => {
                self.fetch_inode(asker, want.ino, at_least_shared(want.level))
            }
            Some(Want::Entry(want)) => self.fetch_entry(asker, want),
            Some(Want::Entries(want)) => self.fetch_entries(asker, want),
            Some(Want::Map(want)) => self.fetch_map(asker, want),
            Some(Want::Xattrs(want)) => {
                self.fetch_xattrs(asker, want.ino, at_least_shared(want.level))
            }
            Some(Want::Blocks(want)) => self.fetch_blocks(asker, want),
            None => Err(Stop::Error(FetchError::Invalid, "nothing is wanted".to_owned())),
        };
        match answer {
            Ok(fetched) => Ok(Tried::Answer(Box::new(fetched))),
            Err(Stop::Wait(wait)) => Ok(Tried::Wait(wait)),
            Err(Stop::Store(error)) => Err(error),
            Err(Stop::Error(error, detail)) => {
                let error = error as i32;
                Ok(Tried::Answer(Box::new(Fetched { error, detail, ..Default::default() })))
            }
        }
    }

    /// Fails unless the session could have `level` on the inode now. Recalls what is in the way.
    fn need(&mut self, asker: Asker, ino: u64, level: Level) -> Result<(), Stop> {
        let session = asker.session;
        let Some(known) = self.sessions.get(&session) else {
            return Err(Stop::Error(FetchError::Invalid, "the session ended".to_owned()));
        };
        let key = (known.volume, ino);
        let level = known.at_most(level);
        if self.leases.level(session, &key) >= level {
            return Ok(());
        }
        if self.leases.count(session) >= SESSION_LEASES_MAX {
            let detail = "the session holds too many leases".to_owned();
            return Err(Stop::Error(FetchError::Contended, detail));
        }
        self.need_grace_over(session)?;
        let conflicts = self.leases.conflicts(session, &key, level);
        if !conflicts.is_empty() {
            for conflict in conflicts {
                if conflict.ask {
                    self.recall(conflict.session, &key, conflict.keep, conflict.grant);
                }
                self.fence_if_silent(conflict.session)?;
            }
            return Err(Stop::Wait(Wait::Inode(key)));
        }
        let ahead = self.waiters.get(&key).and_then(|queue| queue.front().copied());
        let ahead = ahead.filter(|first| *first < asker.park).and_then(|id| self.parked.get(&id));
        if ahead.is_some_and(|ahead| ahead.session != session) {
            return Err(Stop::Wait(Wait::Inode(key)));
        }
        self.need_durable(session, &key)
    }

    /// Fails while a session of the time before the restart has not said what it holds.
    fn need_grace_over(&mut self, session: u64) -> Result<(), Stop> {
        let silent = self.unclaimed_by(session);
        for other in &silent {
            self.fence_if_silent(*other)?;
        }
        if silent.is_empty() { Ok(()) } else { Err(Stop::Wait(Wait::Grace)) }
    }

    /// Other sessions of the volume that have not said what they hold since the directory started:
    /// while there are any, nothing new is given.
    fn unclaimed_by(&self, session: u64) -> Vec<u64> {
        let volume = self.sessions.get(&session).map(|known| known.volume);
        let others = self.sessions.iter().filter(|(id, other)| {
            **id != session && !other.claimed && Some(other.volume) == volume
        });
        others.map(|(id, _)| *id).collect()
    }

    /// Fails while another session's change of the inode is not durable.
    fn need_durable(&mut self, session: u64, key: &InodeKey) -> Result<(), Stop> {
        match self.recent.get(key) {
            Some((by, seq)) if *by != session && *seq > self.durable => {
                let seq = *seq;
                self.sync_store()?;
                Err(Stop::Wait(Wait::Durable(seq)))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn fence_if_silent(&mut self, session: u64) -> Result<(), StoreError> {
        let silent = self.sessions.get(&session).is_some_and(|known| {
            known.is_alive() && self.at.now_ms >= known.heard_ms + self.config.fence_ms
        });
        if silent { self.fence(session) } else { Ok(()) }
    }

    /// Gives the lease that [`Engine::need`] found free, and EXCLUSIVE where nobody else is there.
    fn give(&mut self, asker: Asker, ino: u64, level: Level) -> Option<InodeLease> {
        let session = asker.session;
        let known = self.sessions.get(&session)?;
        let (key, level) = ((known.volume, ino), known.at_most(level));
        let waited_for = self.waiters.get(&key).is_some_and(|queue| {
            queue.iter().any(|id| self.parked.get(id).is_some_and(|p| p.session != session))
        });
        let alone = !self.leases.others(session, &key)
            && !waited_for
            && !known.record.read_only
            && self.unclaimed_by(session).is_empty();
        let level = if alone { Level::Exclusive } else { level };
        let (level, grant, recalled) = self.leases.grant(session, &key, level);
        if let Some(keep) = recalled {
            self.recall_again.push((session, key, keep, grant));
        }
        Some(InodeLease { ino, level: level.to_wire(), open: false, grant })
    }

    fn volume_of(&self, asker: Asker) -> VolumeId {
        self.sessions.get(&asker.session).map_or(keys::CLUSTER, |known| known.volume)
    }

    /// An inode that is not in the trash.
    pub(super) fn live_inode(
        &self,
        volume: &VolumeId,
        ino: u64,
    ) -> Result<Option<InodeRecord>, StoreError> {
        let key = keys::inode(volume, ino);
        let stored = self.store.get(&key)?.map(|value| decode::<InodeRecord>(&key, &value));
        Ok(stored.transpose()?.filter(|record| !record.is_trashed()))
    }

    fn stored_inode(&self, asker: Asker, ino: u64) -> Result<Option<InodeRecord>, StoreError> {
        self.live_inode(&self.volume_of(asker), ino)
    }

    fn fetch_inode(&mut self, asker: Asker, ino: u64, level: Level) -> Result<Fetched, Stop> {
        self.need(asker, ino, level)?;
        let record = self.stored_inode(asker, ino)?.ok_or_else(|| not_found(ino))?;
        Ok(Fetched {
            leases: self.give(asker, ino, level).into_iter().collect(),
            inodes: vec![inode_message(ino, record)],
            ..Default::default()
        })
    }

    /// A directory under a lease that is free to be given.
    fn need_dir(&mut self, asker: Asker, dir: u64, level: Level) -> Result<InodeRecord, Stop> {
        self.need(asker, dir, level)?;
        let record = self.stored_inode(asker, dir)?.ok_or_else(|| not_found(dir))?;
        if record.mode & S_IFMT != S_IFDIR {
            let detail = format!("inode {dir} is not a directory");
            return Err(Stop::Error(FetchError::NotADirectory, detail));
        }
        Ok(record)
    }

    fn fetch_entry(&mut self, asker: Asker, want: &FetchEntry) -> Result<Fetched, Stop> {
        let dir_level = at_least_shared(want.dir_level);
        let child_level = at_least_shared(want.child_level);
        let dir = self.need_dir(asker, want.dir, dir_level)?;
        let key = keys::entry(&self.volume_of(asker), want.dir, &want.name_hash);
        let found = self.store.get(&key)?;
        let found: Option<EntryRecord> = found.map(|value| decode(&key, &value)).transpose()?;
        let mut inodes = vec![inode_message(want.dir, dir)];
        let mut entry = Entry { name_hash: want.name_hash.clone(), ..Default::default() };
        let mut child = None;
        if let Some(found) = found {
            self.need(asker, found.ino, child_level)?;
            let record = self.stored_inode(asker, found.ino)?;
            let record = record.ok_or_else(|| not_found(found.ino))?;
            inodes.push(inode_message(found.ino, record));
            child = Some(found.ino);
            entry.ino = found.ino;
            entry.cookie = found.cookie;
            entry.sealed_name = found.sealed_name;
        }
        let mut leases = Vec::with_capacity(2);
        leases.extend(self.give(asker, want.dir, dir_level));
        if let Some(ino) = child.filter(|ino| *ino != want.dir) {
            leases.extend(self.give(asker, ino, child_level));
        }
        Ok(Fetched { leases, inodes, entries: vec![entry], ..Default::default() })
    }

    fn fetch_entries(&mut self, asker: Asker, want: &FetchEntries) -> Result<Fetched, Stop> {
        let level = at_least_shared(want.dir_level);
        let dir = self.need_dir(asker, want.dir, level)?;
        let volume = self.volume_of(asker);
        let limit = (want.limit as usize).clamp(1, ENTRIES_MAX);
        let range = KeyRange::prefix(&keys::cookies(&volume, want.dir));
        let range = range.after(&keys::cookie(&volume, want.dir, want.after_cookie));
        let pairs = self.store.scan(&range, limit)?;
        let complete = pairs.len() < limit;
        let mut fetched =
            Fetched { inodes: vec![inode_message(want.dir, dir)], complete, ..Default::default() };
        fetched.leases.extend(self.give(asker, want.dir, level));
        for (key, value) in pairs {
            let line: CookieRecord = decode(&key, &value)?;
            self.add_child(asker, line.ino, &mut fetched)?;
            fetched.entries.push(Entry {
                name_hash: line.name_hash,
                sealed_name: line.sealed_name,
                cookie: keys::last_number(&key),
                ino: line.ino,
            });
        }
        Ok(fetched)
    }

    /// Adds a child's attributes and lease, where nobody is in the way; nothing is recalled for it.
    fn add_child(
        &mut self,
        asker: Asker,
        ino: u64,
        fetched: &mut Fetched,
    ) -> Result<(), StoreError> {
        let key = (self.volume_of(asker), ino);
        let undurable = self
            .recent
            .get(&key)
            .is_some_and(|(by, seq)| *by != asker.session && *seq > self.durable);
        let held = self.leases.level(asker.session, &key) >= Level::Shared;
        let free = self.leases.is_free(asker.session, &key, Level::Shared)
            && !self.waiters.contains_key(&key)
            && self.unclaimed_by(asker.session).is_empty()
            && self.leases.count(asker.session) < SESSION_LEASES_MAX;
        if !held && (undurable || !free) {
            return Ok(());
        }
        if let Some(record) = self.stored_inode(asker, ino)? {
            fetched.inodes.push(inode_message(ino, record));
            fetched.leases.extend(self.give(asker, ino, Level::Shared));
        }
        Ok(())
    }

    fn fetch_map(&mut self, asker: Asker, want: &FetchMap) -> Result<Fetched, Stop> {
        if want.siblings.len() > SIBLINGS_MAX {
            let detail = format!("{} siblings in one request", want.siblings.len());
            return Err(Stop::Error(FetchError::Invalid, detail));
        }
        let level = at_least_shared(want.level);
        self.need(asker, want.ino, level)?;
        let record = self.stored_inode(asker, want.ino)?.ok_or_else(|| not_found(want.ino))?;
        let volume = self.volume_of(asker);
        let chunks = want.chunks.clamp(1, CHUNKS_MAX);
        let end = want.first_chunk.saturating_add(u64::from(chunks));
        let mut blocks = BTreeSet::new();
        let mut fetched =
            Fetched { inodes: vec![inode_message(want.ino, record)], ..Default::default() };
        (fetched.chunks, fetched.complete) =
            self.read_map(&volume, want.ino, want.first_chunk..end, &mut blocks)?;
        fetched.blocks = self.describe(asker, blocks.iter().cloned())?;
        self.add_siblings(asker, want, blocks, &mut fetched)?;
        fetched.leases.extend(self.give(asker, want.ino, level));
        Ok(fetched)
    }

    /// Adds the maps of siblings that the session holds a lease on, within bounds: nobody asked.
    fn add_siblings(
        &self,
        asker: Asker,
        want: &FetchMap,
        mut blocks: BTreeSet<Bytes>,
        fetched: &mut Fetched,
    ) -> Result<(), StoreError> {
        let volume = self.volume_of(asker);
        let mut seen = BTreeSet::from([want.ino]);
        let (mut extents, mut bytes) = (0, 0);
        for ino in want.siblings.iter().copied() {
            let is_held = self.leases.level(asker.session, &(volume, ino)) >= Level::Shared;
            if !is_held || !seen.insert(ino) {
                continue;
            }
            let mut named = BTreeSet::new();
            let (mut chunks, complete) = self.read_map(&volume, ino, 0..1, &mut named)?;
            let chunk = chunks.pop();
            extents += chunk.as_ref().map_or(1, |chunk| chunk.extents.len().max(1));
            let infos = self.describe(asker, named.difference(&blocks).cloned())?;
            bytes += infos.iter().map(|info| info.inline.len()).sum::<usize>();
            if extents > SIBLING_EXTENTS_MAX || bytes > SIBLING_BYTES_MAX {
                break;
            }
            blocks.extend(named);
            fetched.blocks.extend(infos);
            fetched.siblings.push(SiblingMap { ino, chunk, complete });
        }
        Ok(())
    }

    /// The stored ones of `chunks` of a file, and whether nothing is mapped behind them; adds to
    /// `blocks` those that they name.
    fn read_map(
        &self,
        volume: &VolumeId,
        ino: u64,
        chunks: Range<u64>,
        blocks: &mut BTreeSet<Bytes>,
    ) -> Result<(Vec<MapChunk>, bool), StoreError> {
        let range = KeyRange {
            from: keys::chunk(volume, ino, chunks.start),
            to: Some(keys::chunk(volume, ino, chunks.end)),
        };
        let mut found = Vec::new();
        for (key, value) in self.store.scan(&range, CHUNKS_MAX as usize)? {
            let map: ChunkRecord = decode(&key, &value)?;
            let chunk = keys::last_number(&key);
            let extents = map.extents.into_iter().map(|extent| {
                if blocks.len() < BLOCKS_MAX && !extent.block.is_empty() {
                    blocks.insert(extent.block.clone());
                }
                Extent {
                    offset: chunk * CHUNK_BYTES + u64::from(extent.offset),
                    length: u64::from(extent.length),
                    block: extent.block,
                    block_offset: u64::from(extent.block_offset),
                }
            });
            let extents = extents.collect();
            found.push(MapChunk { chunk, extents });
        }
        let rest = KeyRange {
            from: keys::chunk(volume, ino, chunks.end),
            to: KeyRange::prefix(&keys::chunks(volume, ino)).to,
        };
        Ok((found, self.store.scan(&rest, 1)?.is_empty()))
    }

    /// Those of the blocks that live.
    fn describe(
        &self,
        asker: Asker,
        blocks: impl Iterator<Item = Bytes>,
    ) -> Result<Vec<BlockInfo>, StoreError> {
        let volume = self.volume_of(asker);
        let mut infos = Vec::new();
        for block in blocks {
            let Some(id) = BlockId::from_slice(&block) else { continue };
            let key = keys::block(&volume, &id);
            if let Some(value) = self.store.get(&key)? {
                infos.push(block_message(block, decode(&key, &value)?));
            }
        }
        Ok(infos)
    }

    fn fetch_blocks(&mut self, asker: Asker, want: &FetchBlocks) -> Result<Fetched, Stop> {
        if want.blocks.len() > BLOCKS_ASKED_MAX {
            let detail = format!("{} blocks in one request", want.blocks.len());
            return Err(Stop::Error(FetchError::Invalid, detail));
        }
        let blocks = self.describe(asker, want.blocks.iter().cloned())?;
        Ok(Fetched { blocks, ..Default::default() })
    }

    fn fetch_xattrs(&mut self, asker: Asker, ino: u64, level: Level) -> Result<Fetched, Stop> {
        self.need(asker, ino, level)?;
        let record = self.stored_inode(asker, ino)?.ok_or_else(|| not_found(ino))?;
        let range = KeyRange::prefix(&keys::xattrs(&self.volume_of(asker), ino));
        let mut xattrs = Vec::with_capacity(record.xattrs as usize);
        for (key, value) in self.store.scan(&range, usize::MAX)? {
            let stored: crate::namespace::XattrRecord = decode(&key, &value)?;
            let name_hash = key.slice(keys::HEAD_BYTES + 8..);
            xattrs.push(Xattr { name_hash, sealed: stored.sealed });
        }
        Ok(Fetched {
            leases: self.give(asker, ino, level).into_iter().collect(),
            inodes: vec![inode_message(ino, record)],
            xattrs,
            ..Default::default()
        })
    }

    /// Requests that wait for this inode are tried again at the end of the step.
    pub(super) fn wake_inode(&mut self, key: &InodeKey) {
        self.awake.extend(self.waiters.get(key).into_iter().flatten());
    }

    /// Requests that wait for a commit that is durable now are tried again.
    pub(super) fn wake_durable(&mut self) {
        let durable = self.durable;
        let ready = self
            .parked
            .iter()
            .filter(|(_, parked)| matches!(parked.wait, Wait::Durable(seq) if seq <= durable));
        self.awake.extend(ready.map(|(id, _)| *id));
    }

    /// Requests that wait for the end of the time after a restart are tried again.
    pub(super) fn wake_grace(&mut self) {
        let waiting = self.parked.iter().filter(|(_, parked)| parked.wait == Wait::Grace);
        self.awake.extend(waiting.map(|(id, _)| *id));
    }

    fn unpark(&mut self, id: u64) -> Option<Parked> {
        let parked = self.parked.remove(&id)?;
        let Wait::Inode(key) = parked.wait else { return Some(parked) };
        if let Some(queue) = self.waiters.get_mut(&key) {
            queue.retain(|waiting| *waiting != id);
            if queue.is_empty() {
                self.waiters.remove(&key);
            }
        }
        Some(parked)
    }

    /// Tries the requests that were woken, in the order they came.
    pub(super) fn run_awake(&mut self) -> Result<(), StoreError> {
        // Each request is tried at most once in a step, so that every step ends.
        let (mut tried, mut later) = (BTreeSet::new(), BTreeSet::new());
        while let Some(id) = self.awake.pop_first() {
            if !tried.insert(id) {
                later.insert(id);
                continue;
            }
            let Some(parked) = self.unpark(id) else { continue };
            let alive = self.sessions.get(&parked.session);
            if alive.is_some_and(super::sessions::Session::is_alive) {
                let wait = parked.wait;
                self.try_fetch(id, parked)?;
                if self.parked.contains_key(&id) {
                    continue;
                }
                // It left the queue: those behind it may have their turn.
                if let Wait::Inode(key) = wait {
                    self.wake_inode(&key);
                }
            }
        }
        self.awake = later;
        Ok(())
    }

    /// Forgets the requests of a connection.
    pub(super) fn drop_requests(&mut self, conn: ConnId) -> Result<(), StoreError> {
        let gone: Vec<u64> =
            self.parked.iter().filter(|(_, p)| p.conn == conn).map(|(id, _)| *id).collect();
        for id in gone {
            if let Some(Parked { wait: Wait::Inode(key), .. }) = self.unpark(id) {
                self.wake_inode(&key);
            }
        }
        self.step_locks(LockEvent::Lost(conn))
    }

    /// Requests that wait may wait so much longer.
    pub(super) fn parked_longer(&mut self, by_ms: u64) {
        self.parked.values_mut().for_each(|parked| parked.deadline_ms += by_ms);
    }

    /// Ends requests that waited too long, and shuts out those in the way that are silent.
    pub(super) fn check_parked(&mut self) -> Result<(), StoreError> {
        let now_ms = self.now_ms();
        let late: Vec<u64> = self
            .parked
            .iter()
            .filter(|(_, parked)| parked.deadline_ms <= now_ms)
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            if let Some(parked) = self.unpark(id) {
                self.give_up(&parked, "another mount holds it and did not give it back in time");
                if let Wait::Inode(key) = parked.wait {
                    self.wake_inode(&key);
                }
            }
        }
        let wanted: HashSet<InodeKey> = self.waiters.keys().copied().collect();
        let grace = self.parked.values().any(|parked| parked.wait == Wait::Grace);
        let silent: Vec<u64> = self
            .sessions
            .iter()
            .filter(|(_, known)| {
                known.is_alive() && now_ms >= known.heard_ms + self.config.fence_ms
            })
            .map(|(id, _)| *id)
            .collect();
        if !silent.is_empty() {
            for key in wanted {
                self.wake_inode(&key);
            }
        }
        if grace {
            self.wake_grace();
        }
        Ok(())
    }
}
