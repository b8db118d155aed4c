//! Write-back: dirty bytes become blocks, blocks become commits in the log.
//!
//! ```text
//! dirty --next_block / seal_file--> in flight (ticket, SealPlan) --store--> finish_ticket --> log
//!   ^                                                                  |
//!   +------------------------- failed: abort --------------------------+
//! ```
//! A ticket commits when its block is stored and no older ticket of any of its files is open: a
//! file's commits are in the order of its seals, and an fsync waits for no other file.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use us_core::disk::BlockInfo;
use us_core::geometry::Code;
use us_core::ids::{BlockId, Ino};
use us_core::limits::CHUNK_BYTES;
use us_proto::v1;
use us_proto::v1::mutation::Op;

use super::cleaning::Cleaning;
use super::inlined::Inlined;
use super::node::{WriteError, WriteRetried};
use super::{Core, Now};
use crate::data::{DirtyFacts, Extent, FileData, Packer, PackerLimits, Place, Ticket};
use crate::fs::FsError;

/// The most dirty bytes that an fsync sends inline.
const INLINE_FSYNC_BYTES_MAX: u64 = 32 << 10;
/// The most bytes one inline block holds: one page.
const INLINE_BLOCK_BYTES_MAX: u64 = 16 << 10;
/// What one mount has inline at most before its fsyncs write blocks.
const INLINE_SESSION_BYTES_MAX: u64 = 64 << 20;
/// The most extents, and the most files, in one mutation.
pub(super) const COMMIT_EXTENTS_MAX: usize = 8192;
const COMMIT_FILES_MAX: usize = 8192;
/// How long a byte may stay dirty.
const DIRTY_AGE_MAX: Duration = Duration::from_secs(3);
/// The pause after a block could not be stored.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Why a file is sealed now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlushReason {
    /// Somebody waits until it is durable: little data goes inline.
    Durable,
    /// It must be committed (recall, rename, clone).
    Commit,
}

/// One block to store: its plaintext is the pieces, one after the other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SealPlan {
    /// Its ticket.
    pub ticket: Ticket,
    /// Its bytes.
    pub pieces: Vec<Bytes>,
    /// It goes into the directory's commit instead of a block of fragments.
    pub inline: bool,
}

/// A block that was stored, as the core needs it.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The block.
    pub info: BlockInfo,
    /// What the directory is told.
    pub commit: v1::BlockCommit,
}

/// Why a block was not stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreFailure {
    /// What is told.
    pub error: FsError,
    /// For how long a file's data may fail so before anybody is told: it may pass.
    pub patience: Duration,
}

impl From<FsError> for StoreFailure {
    fn from(error: FsError) -> Self {
        Self { error, patience: Duration::ZERO }
    }
}

#[derive(Debug)]
struct OpenTicket {
    inos: Vec<Ino>,
    bytes: u64,
    /// Stored, and waiting for older tickets of the same files.
    stored: Option<Box<Stored>>,
}

/// What is dirty and in flight, over all files.
#[derive(Debug)]
pub(super) struct DirtyFiles {
    packer: Packer,
    tickets: BTreeMap<u64, OpenTicket>,
    tickets_made: u64,
    in_flight_bytes: u64,
    pub(super) inlined: Inlined,
    /// What the directory asks to be written anew.
    pub(super) cleaning: Option<Cleaning>,
    block_bytes_max: u64,
    /// After a failure nothing is tried in the background before this.
    retry_at: Option<Duration>,
    /// Why the last block was not stored, until one is.
    failing: Option<FsError>,
    /// The last block found no space, and there will be some.
    waits_for_space: bool,
    /// Chunks of maps with so many extents that they should be written anew, and from when on.
    pub(super) crowded: HashMap<(Ino, u64), Duration>,
}

impl DirtyFiles {
    pub(super) fn new(code: Code) -> Self {
        let block_bytes_max = code.block_bytes_max() as u64;
        let age_ms_max = DIRTY_AGE_MAX.as_millis() as u64;
        Self {
            packer: Packer::new(PackerLimits { block_bytes_max, age_ms_max }),
            tickets: BTreeMap::new(),
            tickets_made: 0,
            in_flight_bytes: 0,
            inlined: Inlined::default(),
            cleaning: None,
            block_bytes_max,
            retry_at: None,
            failing: None,
            waits_for_space: false,
            crowded: HashMap::new(),
        }
    }
}

impl Core {
    /// Bytes that are dirty or in flight.
    pub fn uncommitted_bytes(&self) -> u64 {
        self.dirty.packer.dirty_bytes() + self.dirty.in_flight_bytes
    }

    /// Whether `bytes` more may become dirty.
    pub(super) fn has_space(&self, bytes: usize) -> bool {
        let held = self.uncommitted_bytes();
        held == 0 || held + bytes as u64 <= self.config.dirty_bytes_max as u64
    }

    /// What a write answers while the swarm is full: as long as earlier bytes wait for space, and
    /// until it is time to try again.
    pub(super) fn no_space(&self, now: Now) -> Option<FsError> {
        let waits = self.uncommitted_bytes() > 0
            && self.dirty.retry_at.is_some_and(|retry_at| now.boot < retry_at);
        let full = self.dirty.failing.as_ref().filter(|_| waits);
        full.filter(|error| matches!(error, FsError::NoSpace(_))).cloned()
    }

    /// Why the data of `ino` could not be stored when it was last tried, if it could not.
    pub fn storing_fails(&self, ino: Ino) -> Option<FsError> {
        self.nodes.get(&ino)?.write_failing.clone()
    }

    /// Why data of `ino` that could not be stored is tried again, and nobody was told.
    pub fn storing_retries(&self, ino: Ino) -> Option<FsError> {
        Some(self.nodes.get(&ino)?.write_retried.as_ref()?.error.clone())
    }

    /// Whether the last block found no space, and nobody was told because there will be some.
    pub fn waits_for_space(&self) -> bool {
        self.dirty.waits_for_space
    }

    /// Whether the last block could not be stored.
    pub fn is_storing_troubled(&self) -> bool {
        self.dirty.retry_at.is_some()
    }

    /// How often data of `ino` could not be stored.
    pub fn aborts(&self, ino: Ino) -> u64 {
        self.nodes.get(&ino).map_or(0, |node| node.aborts)
    }

    /// Whether data of `ino` is dirty or in flight.
    pub fn has_uncommitted(&self, ino: Ino) -> bool {
        let data = self.nodes.get(&ino).and_then(|node| node.data.as_deref());
        data.is_some_and(|data| !data.is_clean())
    }

    /// Every file with uncommitted data.
    pub fn uncommitted_files(&self) -> Vec<Ino> {
        let dirty = |ino: &&Ino| self.has_uncommitted(**ino);
        self.nodes.keys().filter(dirty).copied().collect()
    }

    /// Tells the packer what is dirty in `ino` now.
    pub(super) fn note_dirty(&mut self, now: Now, ino: Ino) {
        let Some(node) = self.nodes.get_mut(&ino) else {
            let facts = DirtyFacts { dirty_bytes: 0, run_bytes: 0, since_ms: 0, wanted: false };
            return self.dirty.packer.update(ino, facts);
        };
        if node.data.as_deref().is_none_or(FileData::is_clean) {
            // Stored, or cut off: nothing waits any more.
            (node.write_failing, node.write_retried) = (None, None);
        }
        let dirty =
            node.data.as_deref().map(|data| (data.dirty().bytes(), data.dirty().run_bytes()));
        let (dirty_bytes, run_bytes) = dirty.unwrap_or_default();
        if dirty_bytes == 0 {
            node.dirty_since = None;
        } else {
            node.dirty_since.get_or_insert(now.boot);
        }
        let since_ms = node.dirty_since.map_or(0, |since| since.as_millis() as u64);
        let facts = DirtyFacts { dirty_bytes, run_bytes, since_ms, wanted: false };
        self.dirty.packer.update(ino, facts);
    }

    /// The next block of the background, if one is due. `pressure`: memory is short.
    pub fn next_block(&mut self, now: Now, pressure: bool) -> Option<SealPlan> {
        if self.dirty.retry_at.is_some_and(|at| now.boot < at) || self.ended.is_some() {
            return None;
        }
        let items = self.dirty.packer.next(now.boot.as_millis() as u64, pressure)?;
        let (ticket, mut pieces, mut at) = (self.new_ticket(), Vec::new(), 0);
        for item in &items {
            at += self.seal_into(now, ticket, item.ino, at, item.bytes, &mut pieces);
        }
        self.close_seal(ticket, pieces, at, false)
    }

    /// When the background should look again, on the clock of leases.
    pub fn next_block_at(&self) -> Option<Duration> {
        let due = self.dirty.packer.due_ms().map(Duration::from_millis)?;
        Some(self.dirty.retry_at.map_or(due, |at| due.max(at)))
    }

    /// Moves everything dirty of `ino` in flight. The caller stores the blocks, and waits for the
    /// tickets of [`Core::open_tickets`].
    pub fn seal_file(&mut self, now: Now, ino: Ino, reason: FlushReason) -> Vec<SealPlan> {
        let dirty = |core: &Self| {
            let data = core.nodes.get(&ino).and_then(|node| node.data.as_deref());
            data.map_or(0, |data| data.dirty().bytes())
        };
        let bytes = dirty(self);
        let inline = reason == FlushReason::Durable
            && bytes <= INLINE_FSYNC_BYTES_MAX
            && self.dirty.inlined.bytes() + bytes <= INLINE_SESSION_BYTES_MAX;
        let max = if inline { INLINE_BLOCK_BYTES_MAX } else { self.dirty.block_bytes_max };
        let mut plans = Vec::new();
        while dirty(self) > 0 {
            let (ticket, mut pieces) = (self.new_ticket(), Vec::new());
            let sealed = self.seal_into(now, ticket, ino, 0, max, &mut pieces);
            plans.extend(self.close_seal(ticket, pieces, sealed, inline));
        }
        plans
    }

    fn new_ticket(&mut self) -> Ticket {
        self.dirty.tickets_made += 1;
        let number = self.dirty.tickets_made;
        let open = OpenTicket { inos: Vec::new(), bytes: 0, stored: None };
        self.dirty.tickets.insert(number, open);
        Ticket(number)
    }

    fn seal_into(
        &mut self,
        now: Now,
        ticket: Ticket,
        ino: Ino,
        at: u64,
        max: u64,
        pieces: &mut Vec<Bytes>,
    ) -> u64 {
        let data = self.nodes.get_mut(&ino).and_then(|node| node.data.as_deref_mut());
        let Some(data) = data else { return 0 };
        let sealed = data.seal(ticket, at, max);
        let bytes = sealed.iter().map(|piece| piece.bytes.len() as u64).sum();
        pieces.extend(sealed.into_iter().map(|piece| piece.bytes));
        if let Some(open) = self.dirty.tickets.get_mut(&ticket.0).filter(|_| bytes > 0) {
            open.inos.push(ino);
            open.bytes += bytes;
        }
        // What stays dirty is younger than what was sealed.
        if let Some(node) = self.nodes.get_mut(&ino).filter(|_| bytes > 0) {
            node.dirty_since = Some(now.boot);
        }
        self.note_dirty(now, ino);
        bytes
    }

    fn close_seal(
        &mut self,
        ticket: Ticket,
        pieces: Vec<Bytes>,
        bytes: u64,
        inline: bool,
    ) -> Option<SealPlan> {
        if bytes == 0 {
            self.dirty.tickets.remove(&ticket.0);
            return None;
        }
        self.dirty.in_flight_bytes += bytes;
        Some(SealPlan { ticket, pieces, inline })
    }

    /// The tickets that hold data of `ino`.
    pub fn open_tickets(&self, ino: Ino) -> HashSet<Ticket> {
        let data = self.nodes.get(&ino).and_then(|node| node.data.as_deref());
        data.map(|data| data.in_flight().tickets().collect()).unwrap_or_default()
    }

    /// Whether any of `tickets` is still open.
    pub fn any_open(&self, tickets: &HashSet<Ticket>) -> bool {
        tickets.iter().any(|ticket| self.dirty.tickets.contains_key(&ticket.0))
    }

    /// The block of `ticket` was stored, or not. Commits what can be committed now.
    pub fn finish_ticket(
        &mut self,
        now: Now,
        ticket: Ticket,
        result: Result<Stored, StoreFailure>,
    ) {
        match result {
            Ok(stored) => {
                self.dirty.retry_at = None;
                self.dirty.failing = None;
                self.dirty.waits_for_space = false;
                if let Some(open) = self.dirty.tickets.get_mut(&ticket.0) {
                    open.stored = Some(Box::new(stored));
                }
            }
            Err(error) => self.abort_ticket(now, ticket, &error),
        }
        while let Some(ticket) = self.committable() {
            self.commit_ticket(now, ticket);
        }
    }

    fn abort_ticket(&mut self, now: Now, ticket: Ticket, failure: &StoreFailure) {
        let StoreFailure { error, patience } = failure;
        self.dirty.retry_at = Some(now.boot + RETRY_PAUSE);
        let Some(open) = self.dirty.tickets.remove(&ticket.0) else { return };
        self.dirty.in_flight_bytes -= open.bytes;
        for ino in open.inos {
            let Some(node) = self.nodes.get_mut(&ino) else { continue };
            if let Some(data) = node.data.as_deref_mut() {
                data.abort(ticket);
            }
            node.aborts += 1;
            // Of reasons that alternate the one that may last longest counts.
            let before = node.write_retried.as_ref();
            let since = before.map_or(now.boot, |before| before.since);
            let longest = before.map_or(*patience, |before| before.patience.max(*patience));
            let is_final = patience.is_zero() || now.boot >= since + longest;
            node.write_retried =
                Some(WriteRetried { since, patience: longest, error: error.clone() });
            if node.write_failing.is_none() && !is_final {
                self.dirty.waits_for_space = matches!(error, FsError::NoSpace(_));
                self.note_dirty(now, ino);
                continue;
            }
            self.dirty.failing = Some(error.clone());
            self.dirty.waits_for_space = false;
            if node.write_failing.replace(error.clone()).is_none() {
                self.write_errors += 1;
                let error = error.clone();
                node.write_error = Some(WriteError { sequence: self.write_errors, error });
            }
            self.note_dirty(now, ino);
        }
    }

    fn committable(&self) -> Option<Ticket> {
        let is_oldest = |number: u64, ino: &Ino| {
            let data = self.nodes.get(ino).and_then(|node| node.data.as_deref());
            data.and_then(|data| data.in_flight().tickets().next())
                .is_none_or(|oldest| oldest.0 >= number)
        };
        let ready = |(number, open): (&u64, &OpenTicket)| {
            let ready =
                open.stored.is_some() && open.inos.iter().all(|ino| is_oldest(*number, ino));
            ready.then_some(Ticket(*number))
        };
        self.dirty.tickets.iter().find_map(ready)
    }

    fn commit_ticket(&mut self, now: Now, ticket: Ticket) {
        let Some(open) = self.dirty.tickets.remove(&ticket.0) else { return };
        self.dirty.in_flight_bytes -= open.bytes;
        let Some(stored) = open.stored else { return };
        let Stored { info, commit } = *stored;
        let block = info.id;
        let mut message = v1::CommitData { blocks: vec![commit], ..v1::CommitData::default() };
        let mut inos = Vec::new();
        for ino in open.inos {
            if let Some(node) = self.nodes.get_mut(&ino) {
                node.write_retried = None;
            }
            if self.postpone_crowded(now, ticket, ino) {
                continue;
            }
            let Some(node) = self.nodes.get_mut(&ino) else { continue };
            let Some(data) = node.data.as_deref_mut() else { continue };
            let mapped = data.map().mapped_bytes();
            let extents = data.commit(ticket, block);
            let grown = data.map().mapped_bytes() as i64 - mapped as i64;
            if data.is_clean() {
                node.write_failing = None;
            }
            if let Some(attributes) = &mut node.attributes {
                attributes.allocated_bytes =
                    attributes.allocated_bytes.saturating_add_signed(grown);
            }
            if extents.is_empty() {
                continue;
            }
            message.extents.extend(extents.iter().map(|extent| extent_write(ino, extent)));
            message.files.extend(self.growth(ino));
            self.note_crowded(now, ino, &extents);
            if info.inline.is_some() {
                self.dirty.inlined.note(now, ino, &extents);
            }
            inos.push(ino);
            self.note_dirty(now, ino);
        }
        if inos.is_empty() {
            // Cut off meanwhile. Nobody will refer to the block: a committed one can be deleted.
            message.extents.clear();
        }
        self.blocks.insert(block, std::sync::Arc::new(info));
        self.append_commit(message, &inos);
    }

    /// Appends a commit in mutations of a bounded size. Sizes come behind all extents: they never run
    /// ahead of the data.
    pub(super) fn append_commit(&mut self, mut message: v1::CommitData, inos: &[Ino]) {
        while message.extents.len() > COMMIT_EXTENTS_MAX {
            let rest = message.extents.split_off(cut_at_chunk(&message.extents));
            let part = v1::CommitData {
                blocks: std::mem::take(&mut message.blocks),
                extents: std::mem::replace(&mut message.extents, rest),
                files: Vec::new(),
            };
            self.append(Op::CommitData(part), inos);
        }
        while message.files.len() > COMMIT_FILES_MAX {
            let rest = message.files.split_off(COMMIT_FILES_MAX);
            let part = std::mem::take(&mut message);
            message.files = rest;
            self.append(Op::CommitData(part), inos);
        }
        self.append(Op::CommitData(message), inos);
    }

    /// What the directory may know of the file's size and times with what is committed now: the
    /// size ends before the first byte of which no version is committed.
    pub(super) fn growth(&mut self, ino: Ino) -> Option<v1::FileGrowth> {
        let node = self.nodes.get_mut(&ino)?;
        let (data, attributes) = (node.data.as_deref()?, node.attributes?);
        let from = node.logged_size;
        let end = data.first_uncommitted(from).unwrap_or(u64::MAX);
        node.logged_size = end.min(attributes.size).max(from);
        Some(v1::FileGrowth {
            ino: ino.0,
            size: node.logged_size,
            mtime: Some(attributes.mtime.into()),
            ctime: Some(attributes.ctime.into()),
            clear_suid: false,
        })
    }

    /// The file has no name and nobody has it open: what is dirty need not be stored.
    pub(super) fn discard_data(&mut self, ino: Ino) {
        if let Some(data) = self.nodes.get_mut(&ino).and_then(|node| node.data.as_deref_mut()) {
            data.truncate(0);
        }
        self.note_dirty(Now::default(), ino);
        self.dirty.inlined.forget(ino);
    }

    /// Late fragments of a block have become durable.
    pub fn fragments_durable(&mut self, block: BlockId, durable: Vec<u8>) {
        let block = Bytes::copy_from_slice(block.as_bytes());
        let durable = durable.into();
        self.append(Op::FragmentsDurable(v1::FragmentsDurable { block, durable }), &[]);
    }

    /// Dirty and in-flight bytes of a file, for the rescue file: what `read` would return of them.
    pub fn uncommitted_pieces(&self, ino: Ino) -> Vec<(u64, Bytes)> {
        let Some(data) = self.nodes.get(&ino).and_then(|node| node.data.as_deref()) else {
            return Vec::new();
        };
        let mut pieces = data.in_flight().overlay(0..u64::MAX, None);
        let dirty = data.dirty().overlay(0..u64::MAX);
        pieces.extend(dirty.map(|(offset, bytes)| (offset, Bytes::copy_from_slice(bytes))));
        pieces
    }
}

/// Where to cut a long list of extents: at most after [`COMMIT_EXTENTS_MAX`], and where another chunk
/// begins. Half of a chunk's new extents beside the old ones of the other half may be too many.
fn cut_at_chunk(extents: &[v1::ExtentWrite]) -> usize {
    let chunk = |extent: &v1::ExtentWrite| (extent.ino, extent.offset / CHUNK_BYTES);
    let begins = |at: &usize| chunk(&extents[*at]) != chunk(&extents[*at - 1]);
    (1..=COMMIT_EXTENTS_MAX).rev().find(begins).unwrap_or(COMMIT_EXTENTS_MAX)
}

/// An extent as the log has it.
pub(super) fn extent_write(ino: Ino, extent: &Extent) -> v1::ExtentWrite {
    let (block, block_offset, zero) = match extent.place {
        Place::Block { block, offset } => (Bytes::copy_from_slice(block.as_bytes()), offset, false),
        Place::Zero => (Bytes::new(), 0, true),
        Place::Hole => (Bytes::new(), 0, false),
    };
    v1::ExtentWrite {
        ino: ino.0,
        offset: extent.offset,
        length: extent.bytes,
        block,
        block_offset,
        expected_block: Bytes::new(),
        expected_offset: 0,
        zero,
    }
}
