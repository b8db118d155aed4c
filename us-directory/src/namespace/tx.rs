//! A transaction on one volume: a view, its own writes, and decoded records that were touched.
//!
//! Inodes, chunks, blocks and references stay decoded until the end (or until a scan needs them
//! written), so that a batch of many small mutations encodes each of them once.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use bytes::Bytes;
use prost::Message;
use us_core::geometry::Code;
use us_core::ids::{BlockId, VolumeId};

use super::{ApplyError, Rule};
use crate::keys;
use crate::records::{
    BlockRecord, ChunkRecord, InodeRecord, ReferenceRecord, UsageRecord, decode, encode,
};
use crate::store::{KeyRange, Pair, StoreError, View, WriteBatch, merge_layers};

/// A record as the store has it and as it is now.
#[derive(Clone, Debug)]
struct Slot<T> {
    stored: Option<T>,
    now: Option<T>,
}

/// What happened to a block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockChange {
    /// The block.
    pub block: BlockId,
    /// What it was; `None`: it is new.
    pub before: Option<BlockRecord>,
    /// What it is; `None`: it is dead.
    pub after: Option<BlockRecord>,
}

/// What a transaction leaves.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The writes.
    pub batch: WriteBatch,
    /// Inodes that were read as changed, created or deleted.
    pub touched: Vec<u64>,
    /// Inodes that are new.
    pub created: Vec<u64>,
    /// Inodes that are gone, to the trash or for ever.
    pub deleted: Vec<u64>,
    /// Inodes that came out of the trash; they are among the created.
    pub restored: Vec<u64>,
    /// Blocks whose record changed.
    pub blocks: Vec<BlockChange>,
    /// Dead blocks that got a grave.
    pub graves: u64,
}

/// What becomes of files that are removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrashRule {
    /// The cluster's clock.
    pub clock_ms: u64,
    /// What is removed younger than this is not kept: programs make such files for themselves.
    pub age_ms: u64,
    /// Whether anything is kept.
    pub on: bool,
}

/// A transaction on one volume.
pub struct Tx<'a> {
    base: &'a dyn View,
    pub(super) volume: VolumeId,
    pub(super) code: Code,
    due_ms: u64,
    writes: WriteBatch,
    inodes: HashMap<u64, Slot<InodeRecord>>,
    chunks: HashMap<(u64, u64), Slot<ChunkRecord>>,
    blocks: HashMap<BlockId, Slot<BlockRecord>>,
    references: HashMap<(BlockId, u64, u64), (u64, u64)>,
    pub(super) usage: BTreeMap<&'static str, i64>,
    touched: BTreeSet<u64>,
    pub(super) created: HashSet<u64>,
    pub(super) deleted: HashSet<u64>,
    pub(super) unreferenced: BTreeSet<BlockId>,
    /// Chunks that had too many extents after a piece of the present mutation.
    pub(super) crowded: BTreeSet<(u64, u64)>,
    pub(super) graves: u64,
    pub(super) trash: TrashRule,
    pub(super) restored: BTreeSet<u64>,
}

impl<'a> Tx<'a> {
    /// A transaction on `volume` as `base` shows it. Fragments of blocks that die in it are deleted
    /// when the cluster's clock reaches `due_ms`.
    pub fn new(base: &'a dyn View, volume: VolumeId, code: Code, due_ms: u64) -> Self {
        Self {
            base,
            volume,
            code,
            due_ms,
            writes: WriteBatch::new(),
            inodes: HashMap::new(),
            chunks: HashMap::new(),
            blocks: HashMap::new(),
            references: HashMap::new(),
            usage: BTreeMap::new(),
            touched: BTreeSet::new(),
            created: HashSet::new(),
            deleted: HashSet::new(),
            unreferenced: BTreeSet::new(),
            crowded: BTreeSet::new(),
            graves: 0,
            trash: TrashRule::default(),
            restored: BTreeSet::new(),
        }
    }

    /// What is removed in it goes to the trash by this rule; without one nothing does.
    #[must_use]
    pub fn with_trash(mut self, rule: TrashRule) -> Self {
        self.trash = rule;
        self
    }

    /// When blocks that die now are deleted.
    pub(super) fn due_ms(&self) -> u64 {
        self.due_ms
    }

    /// A record that is not one of the decoded kinds.
    pub fn read<T: Message + Default>(&self, key: &[u8]) -> Result<Option<T>, StoreError> {
        let value = match self.writes.get(key) {
            Some(written) => written.clone(),
            None => self.base.get(key)?,
        };
        value.map(|value| decode(key, &value)).transpose()
    }

    /// Writes a record that is not one of the decoded kinds.
    pub fn put(&mut self, key: Bytes, value: &impl Message) {
        self.writes.put(key, encode(value));
    }

    /// Removes a record that is not one of the decoded kinds.
    pub fn delete(&mut self, key: Bytes) {
        self.writes.delete(key);
    }

    /// The pairs of a range: the view's and the transaction's own.
    pub fn scan(&mut self, range: &KeyRange, limit: usize) -> Result<Vec<Pair>, StoreError> {
        self.write_chunks();
        let mut range_left = range.clone();
        let mut page = Vec::new().into_iter();
        let mut ended = false;
        let base = self.base;
        let next = move || -> Result<Option<Pair>, StoreError> {
            loop {
                if let Some(pair) = page.next() {
                    return Ok(Some(pair));
                }
                if ended {
                    return Ok(None);
                }
                let pairs = base.scan(&range_left, limit.max(16))?;
                ended = pairs.len() < limit.max(16);
                if let Some((last, _)) = pairs.last() {
                    range_left = range_left.after(last);
                }
                page = pairs.into_iter();
            }
        };
        merge_layers(vec![Box::new(self.writes.range(range))], next, limit)
    }

    fn load<T: Message + Default + Clone>(
        base: &dyn View,
        writes: &WriteBatch,
        key: &[u8],
    ) -> Result<Slot<T>, StoreError> {
        let value = match writes.get(key) {
            Some(written) => written.clone(),
            None => base.get(key)?,
        };
        let stored: Option<T> = value.map(|value| decode(key, &value)).transpose()?;
        Ok(Slot { now: stored.clone(), stored })
    }

    fn inode_slot(&mut self, ino: u64) -> Result<&mut Slot<InodeRecord>, StoreError> {
        if !self.inodes.contains_key(&ino) {
            let slot = Self::load(self.base, &self.writes, &keys::inode(&self.volume, ino))?;
            self.inodes.insert(ino, slot);
        }
        Ok(self.inodes.get_mut(&ino).expect("just inserted"))
    }

    /// The inode, where there is one that is not in the trash.
    pub fn inode(&mut self, ino: u64) -> Result<Option<&InodeRecord>, StoreError> {
        Ok(self.inode_slot(ino)?.now.as_ref().filter(|record| !record.is_trashed()))
    }

    /// The inode, in the trash or not.
    pub(super) fn any_inode(&mut self, ino: u64) -> Result<Option<&InodeRecord>, StoreError> {
        Ok(self.inode_slot(ino)?.now.as_ref())
    }

    /// The inode, where it lies in the trash.
    pub fn trashed(&mut self, ino: u64) -> Result<Option<&InodeRecord>, StoreError> {
        Ok(self.inode_slot(ino)?.now.as_ref().filter(|record| record.is_trashed()))
    }

    /// The inode, to change it.
    pub(super) fn inode_mut(&mut self, ino: u64) -> Result<&mut InodeRecord, ApplyError> {
        self.touched.insert(ino);
        let slot = self.inode_slot(ino)?;
        let live = slot.now.as_mut().filter(|record| !record.is_trashed());
        live.ok_or(ApplyError::Rule(Rule::NoInode { ino }))
    }

    /// Makes or removes an inode.
    pub(super) fn set_inode(
        &mut self,
        ino: u64,
        record: Option<InodeRecord>,
    ) -> Result<(), StoreError> {
        self.touched.insert(ino);
        self.inode_slot(ino)?.now = record;
        Ok(())
    }

    /// The map of a chunk, to read or change it.
    pub(super) fn chunk_mut(
        &mut self,
        ino: u64,
        chunk: u64,
    ) -> Result<&mut ChunkRecord, StoreError> {
        if !self.chunks.contains_key(&(ino, chunk)) {
            let key = keys::chunk(&self.volume, ino, chunk);
            let slot = Self::load(self.base, &self.writes, &key)?;
            self.chunks.insert((ino, chunk), slot);
        }
        let slot = self.chunks.get_mut(&(ino, chunk)).expect("just inserted");
        Ok(slot.now.get_or_insert_default())
    }

    fn write_chunks(&mut self) {
        for ((ino, chunk), slot) in self.chunks.drain() {
            let now = slot.now.filter(|map| !map.extents.is_empty());
            if now == slot.stored {
                continue;
            }
            let key = keys::chunk(&self.volume, ino, chunk);
            match now {
                Some(map) => self.writes.put(key, encode(&map)),
                None => self.writes.delete(key),
            }
        }
    }

    /// Numbers of the chunks of an inode that map something, from `first` on, before `end`.
    pub(super) fn mapped_chunks(
        &mut self,
        ino: u64,
        first: u64,
        end: u64,
        limit: usize,
    ) -> Result<Vec<u64>, StoreError> {
        let range = KeyRange {
            from: keys::chunk(&self.volume, ino, first),
            to: Some(keys::chunk(&self.volume, ino, end)),
        };
        let pairs = self.scan(&range, limit)?;
        Ok(pairs.iter().map(|(key, _)| keys::last_number(key)).collect())
    }

    fn block_slot(&mut self, block: &BlockId) -> Result<&mut Slot<BlockRecord>, StoreError> {
        if !self.blocks.contains_key(block) {
            let slot = Self::load(self.base, &self.writes, &keys::block(&self.volume, block))?;
            self.blocks.insert(*block, slot);
        }
        Ok(self.blocks.get_mut(block).expect("just inserted"))
    }

    /// The block, where it lives.
    pub fn block(&mut self, block: &BlockId) -> Result<Option<&BlockRecord>, StoreError> {
        Ok(self.block_slot(block)?.now.as_ref())
    }

    /// The block, to change it.
    pub fn block_mut(&mut self, block: &BlockId) -> Result<Option<&mut BlockRecord>, StoreError> {
        Ok(self.block_slot(block)?.now.as_mut())
    }

    /// Makes or removes a block's record.
    pub(super) fn set_block(
        &mut self,
        block: &BlockId,
        record: Option<BlockRecord>,
    ) -> Result<(), StoreError> {
        self.block_slot(block)?.now = record;
        Ok(())
    }

    /// Adds to the bytes that a chunk refers to of a block.
    pub(super) fn refer(
        &mut self,
        block: &BlockId,
        ino: u64,
        chunk: u64,
        bytes: i64,
    ) -> Result<(), ApplyError> {
        let slot = (*block, ino, chunk);
        if !self.references.contains_key(&slot) {
            let key = keys::reference(&self.volume, block, ino, chunk);
            let stored = self.read::<ReferenceRecord>(&key)?.map_or(0, |record| record.bytes);
            self.references.insert(slot, (stored, stored));
        }
        let (_, count) = self.references.get_mut(&slot).expect("just inserted");
        let before = *count;
        *count = before.checked_add_signed(bytes).expect("a chunk frees what it referred to");
        let (was, is) = (before > 0, *count > 0);
        let record = self
            .block_slot(block)?
            .now
            .as_mut()
            .ok_or(ApplyError::Rule(Rule::NoBlock { block: *block }))?;
        record.live_bytes = record
            .live_bytes
            .checked_add_signed(bytes)
            .expect("live bytes are the references' sum");
        match (was, is) {
            (false, true) => record.references += 1,
            (true, false) => record.references -= 1,
            _ => {}
        }
        let unreferenced = record.references == 0;
        *self.usage.entry("live_bytes").or_default() += bytes;
        if unreferenced {
            self.unreferenced.insert(*block);
        }
        Ok(())
    }

    /// Counts something of the volume's usage.
    pub(super) fn count(&mut self, what: &'static str, change: i64) {
        *self.usage.entry(what).or_default() += change;
    }

    /// Whether the volume refers to more, or stores more, than before.
    pub fn grows(&self) -> bool {
        let grown = |what| self.usage.get(what).is_some_and(|change| *change > 0);
        grown("live_bytes") || grown("stored_bytes")
    }

    /// What the volume has with all that was done so far.
    ///
    /// # Errors
    /// [`StoreError`] when the usage record cannot be read.
    pub fn usage_after(&self) -> Result<UsageRecord, StoreError> {
        let mut usage = self.read::<UsageRecord>(&keys::usage(&self.volume))?.unwrap_or_default();
        for (what, change) in &self.usage {
            let field = match *what {
                "inodes" => &mut usage.inodes,
                "live_bytes" => &mut usage.live_bytes,
                "blocks" => &mut usage.blocks,
                "stored_bytes" => &mut usage.stored_bytes,
                "inline_blocks" => &mut usage.inline_blocks,
                "trash_files" => &mut usage.trash_files,
                "trash_bytes" => &mut usage.trash_bytes,
                _ => &mut usage.inline_bytes,
            };
            *field = field.saturating_add_signed(*change);
        }
        Ok(usage)
    }

    fn write_usage(&mut self) -> Result<(), StoreError> {
        if self.usage.values().all(|change| *change == 0) {
            return Ok(());
        }
        let usage = self.usage_after()?;
        self.usage.clear();
        self.put(keys::usage(&self.volume), &usage);
        Ok(())
    }

    /// Ends the transaction.
    ///
    /// # Errors
    /// [`StoreError`] when the usage record cannot be read.
    pub fn finish(mut self) -> Result<Outcome, StoreError> {
        self.write_usage()?;
        self.write_chunks();
        for (ino, slot) in &self.inodes {
            if slot.stored != slot.now {
                let key = keys::inode(&self.volume, *ino);
                match &slot.now {
                    Some(record) => self.writes.put(key, encode(record)),
                    None => self.writes.delete(key),
                }
            }
        }
        for ((block, ino, chunk), (stored, now)) in &self.references {
            if stored != now {
                let key = keys::reference(&self.volume, block, *ino, *chunk);
                match now {
                    0 => self.writes.delete(key),
                    bytes => self.writes.put(key, encode(&ReferenceRecord { bytes: *bytes })),
                }
            }
        }
        let mut blocks = Vec::new();
        for (block, slot) in self.blocks {
            if slot.stored == slot.now {
                continue;
            }
            let key = keys::block(&self.volume, &block);
            match &slot.now {
                Some(record) => self.writes.put(key, encode(record)),
                None => self.writes.delete(key),
            }
            blocks.push(BlockChange { block, before: slot.stored, after: slot.now });
        }
        Ok(Outcome {
            batch: self.writes,
            touched: self.touched.into_iter().collect(),
            created: self.created.into_iter().collect(),
            deleted: self.deleted.into_iter().collect(),
            restored: self.restored.into_iter().collect(),
            blocks,
            graves: self.graves,
        })
    }
}
