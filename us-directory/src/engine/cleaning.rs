//! The cleaner's choice: which blocks hold little that lives, and who writes that anew.
//!
//! A block is deleted when nothing of it lives. One of which little lives would keep its space for ever,
//! so a mount of the volume is asked to read what lives of it and to write that like anything else; when
//! all of it is committed the block is dead. The mount does it under leases, as every change of a file is
//! done, so what others do meanwhile is never lost and an order may be forgotten at any time: by a mount
//! that goes, by a restart of the directory. Volumes that nobody has mounted are not cleaned.
//!
//! A volume is cleaned while more than an eighth of what its blocks hold is dead; the emptiest blocks are
//! taken first, and none of which more than seven eighths live. So, once it has settled, blocks take at
//! most 8/7 of what lives. A block is left alone for a while after it lost something: what is being
//! overwritten may die by itself.
//!
//! Invariants: what is noted of a block is what its record says; one order of a volume at a time.

use std::collections::{BTreeMap, HashMap, HashSet};

use us_core::ids::{BlockId, VolumeId};
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::{CleanBlocks, CleanedChunk};

use super::Engine;
use super::leases::Level;
use crate::keys;
use crate::records::{BlockRecord, InodeRecord, decode};
use crate::store::{KeyRange, StoreError};

/// Blocks noted of one volume. Those beyond are noted when the directory starts again.
const SPARSE_MAX: usize = 256 << 10;
/// More than one byte in so many must be dead before a volume is cleaned, and of a block before it is.
const DEAD_SHARE: u64 = 8;
/// Less than that is not worth it.
const DEAD_BYTES_MIN: u64 = 8 << 20;
/// About how much is written anew by one order, and the parts of files that it names.
const ORDER_BYTES: u64 = 32 << 20;
const ORDER_CHUNKS_MAX: usize = 2048;
/// A block to which more parts of files refer is left as it is.
const REFERENCES_MAX: usize = 1024;
/// Blocks looked at for one order, of which some may be left out.
const LOOKED_AT_MAX: usize = 256;
/// How often a volume is looked at.
const LOOK_EVERY_MS: u64 = 2_000;
/// How long an order may take.
const ORDER_MS: u64 = 60_000;
/// What an order left as it was is not tried again before.
const AGAIN_MS: u64 = 600_000;

/// A block of which little lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sparse {
    live_bytes: u64,
    plaintext_bytes: u64,
    not_before_ms: u64,
    /// When it was noted first.
    first_ms: u64,
}

impl Sparse {
    /// What is noted of a block; `None` where enough of it lives, or nothing.
    pub fn of(block: &BlockRecord) -> Option<Self> {
        let (live_bytes, plaintext_bytes) = (block.live_bytes, u64::from(block.plaintext_bytes));
        let sparse = !block.is_inline()
            && live_bytes > 0
            && live_bytes * DEAD_SHARE < plaintext_bytes * (DEAD_SHARE - 1);
        sparse.then_some(Self { live_bytes, plaintext_bytes, not_before_ms: 0, first_ms: 0 })
    }
}

/// What a mount was asked to write anew.
#[derive(Debug)]
struct Order {
    session: u64,
    blocks: HashSet<BlockId>,
    until_ms: u64,
}

/// What the cleaner knows of all volumes.
#[derive(Debug, Default)]
pub(super) struct Cleaning {
    sparse: HashMap<VolumeId, BTreeMap<BlockId, Sparse>>,
    orders: HashMap<VolumeId, Order>,
    last_order: u64,
    look_at_ms: u64,
}

impl Cleaning {
    /// A block is now like this, or gone. It is let alone for `after_ms`, but one that changes again and
    /// again not for more than four times that.
    pub fn note(
        &mut self,
        (volume, block): (VolumeId, BlockId),
        after: Option<&BlockRecord>,
        (now_ms, after_ms): (u64, u64),
    ) {
        let known = self.sparse.entry(volume).or_default();
        let before = known.get(&block).copied();
        match after.and_then(Sparse::of) {
            Some(sparse) if before.is_some() || known.len() < SPARSE_MAX => {
                let first_ms = before.map_or(now_ms, |before| before.first_ms);
                let quiet_ms = (now_ms + after_ms).min(first_ms + 4 * after_ms);
                // What was put off stays so.
                let put_off_ms = before.map_or(0, |before| before.not_before_ms);
                let not_before_ms = quiet_ms.max(put_off_ms);
                known.insert(block, Sparse { not_before_ms, first_ms, ..sparse });
            }
            Some(_) => {}
            None => {
                known.remove(&block);
                if let Some(order) = self.orders.get_mut(&volume) {
                    order.blocks.remove(&block);
                }
            }
        }
    }

    /// A block that was there when the directory started.
    pub fn found(&mut self, (volume, block): (VolumeId, BlockId), sparse: Sparse) {
        let known = self.sparse.entry(volume).or_default();
        if known.len() < SPARSE_MAX {
            known.insert(block, sparse);
        }
    }

    /// Ends the order of a volume that is done, or took too long; whether another may be given.
    fn is_free(&mut self, volume: &VolumeId, now_ms: u64) -> bool {
        let Some(order) = self.orders.get(volume) else { return true };
        if !order.blocks.is_empty() && now_ms < order.until_ms {
            return false;
        }
        let left = self.orders.remove(volume).map(|order| order.blocks).unwrap_or_default();
        self.put_off(volume, left, now_ms + AGAIN_MS);
        true
    }

    fn put_off(
        &mut self,
        volume: &VolumeId,
        blocks: impl IntoIterator<Item = BlockId>,
        not_before_ms: u64,
    ) {
        let Some(known) = self.sparse.get_mut(volume) else { return };
        for block in blocks {
            if let Some(sparse) = known.get_mut(&block) {
                sparse.not_before_ms = not_before_ms;
            }
        }
    }

    /// The blocks that may be cleaned now, the emptiest first.
    fn due(&self, volume: &VolumeId, now_ms: u64) -> Vec<(BlockId, Sparse)> {
        let known = self.sparse.get(volume).into_iter().flatten();
        let due = known.filter(|(_, sparse)| sparse.not_before_ms <= now_ms);
        let emptiness = |(id, sparse): &(BlockId, Sparse)| {
            (sparse.live_bytes * 1000 / sparse.plaintext_bytes, *id)
        };
        let mut due: Vec<(BlockId, Sparse)> = due.map(|(id, sparse)| (*id, *sparse)).collect();
        if due.len() > LOOKED_AT_MAX {
            due.select_nth_unstable_by_key(LOOKED_AT_MAX, emptiness);
            due.truncate(LOOKED_AT_MAX);
        }
        due.sort_by_key(emptiness);
        due
    }
}

/// What refers to a block.
type Chunks = Vec<(u64, u64)>;

impl Engine {
    /// Asks mounts to clean what has much dead in it.
    pub(super) fn clean_chore(&mut self) -> Result<(), StoreError> {
        let now_ms = self.now_ms();
        if now_ms < self.cleaning.look_at_ms {
            return Ok(());
        }
        self.cleaning.look_at_ms = now_ms + LOOK_EVERY_MS;
        let volumes: Vec<VolumeId> = self.cleaning.sparse.keys().copied().collect();
        for volume in volumes {
            match self.volumes.get(&volume).filter(|known| !known.record.deleting) {
                Some(_) => self.clean_volume(volume)?,
                None => drop(self.cleaning.sparse.remove(&volume)),
            }
        }
        Ok(())
    }

    fn clean_volume(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        let now_ms = self.now_ms();
        // One whose mount has gone is given to another.
        let gone = |order: &Order| !self.may_clean(order.session, volume);
        if self.cleaning.orders.get(&volume).is_some_and(gone) {
            self.cleaning.orders.remove(&volume);
        }
        if self.is_hidden(&volume) || !self.cleaning.is_free(&volume, now_ms) {
            return Ok(());
        }
        let usage = self.usage(&volume)?;
        let dead_bytes = usage.stored_bytes.saturating_sub(usage.live_bytes);
        if dead_bytes < DEAD_BYTES_MIN || dead_bytes * DEAD_SHARE <= usage.stored_bytes {
            return Ok(());
        }
        if !self.sessions.keys().any(|session| self.may_clean(*session, volume)) {
            return Ok(());
        }
        let mut order = CleanBlocks::default();
        let (mut session, mut bytes) = (None, 0);
        let mut named = HashSet::new();
        let (mut skipped, mut changing) = (Vec::new(), Vec::new());
        for (block, sparse) in self.cleaning.due(&volume, now_ms) {
            if bytes >= ORDER_BYTES || named.len() >= ORDER_CHUNKS_MAX {
                break;
            }
            let Some(chunks) = self.chunks_to_clean(volume, &block)? else {
                skipped.push(block);
                continue;
            };
            session = session.or_else(|| self.cleaner_for(volume, &chunks));
            let Some(session) = session else { break };
            if chunks.iter().any(|(ino, _)| self.is_changed_by_another(session, (volume, *ino))) {
                changing.push(block);
                continue;
            }
            bytes += sparse.live_bytes;
            order.blocks.push(block.as_bytes().to_vec().into());
            for (ino, chunk) in chunks {
                if named.insert((ino, chunk)) {
                    order.chunks.push(CleanedChunk { ino, chunk });
                }
            }
        }
        self.cleaning.put_off(&volume, skipped, now_ms + AGAIN_MS);
        self.cleaning.put_off(&volume, changing, now_ms + self.config.clean_after_ms);
        if let Some(session) = session.filter(|_| !order.blocks.is_empty()) {
            self.give_order(volume, session, order);
        }
        Ok(())
    }

    fn give_order(&mut self, volume: VolumeId, session: u64, mut order: CleanBlocks) {
        self.cleaning.last_order += 1;
        order.order = self.cleaning.last_order;
        let ids = order.blocks.iter().filter_map(|id| BlockId::from_slice(id));
        let until_ms = self.now_ms() + ORDER_MS;
        let given = Order { session, blocks: ids.collect(), until_ms };
        tracing::debug!(
            session, %volume, blocks = order.blocks.len(), chunks = order.chunks.len(),
            "asks a mount to clean"
        );
        metrics::counter!("us_directory_blocks_cleaned_total").increment(given.blocks.len() as u64);
        self.cleaning.orders.insert(volume, given);
        self.send_session(session, Down::Clean(order));
    }

    /// The parts of files that refer to a block, if a mount can write them anew: they are many, or
    /// something refers to it that has no name.
    fn chunks_to_clean(
        &self,
        volume: VolumeId,
        block: &BlockId,
    ) -> Result<Option<Chunks>, StoreError> {
        let range = KeyRange::prefix(&keys::references(&volume, block));
        let found = self.store.scan(&range, REFERENCES_MAX + 1)?;
        if found.len() > REFERENCES_MAX {
            return Ok(None);
        }
        let numbers = |key: &[u8]| -> (u64, u64) {
            let (head, _) = key.split_at(key.len().saturating_sub(8));
            (keys::last_number(head), keys::last_number(key))
        };
        let chunks: Chunks = found.iter().map(|(key, _)| numbers(key)).collect();
        for (ino, _) in &chunks {
            let key = keys::inode(&volume, *ino);
            let Some(value) = self.store.get(&key)? else { return Ok(None) };
            if decode::<InodeRecord>(&key, &value)?.nlink == 0 {
                return Ok(None);
            }
        }
        Ok(Some(chunks))
    }

    /// The mount that is to clean: one that has what is to be cleaned, else any.
    fn cleaner_for(&self, volume: VolumeId, chunks: &[(u64, u64)]) -> Option<u64> {
        let key = chunks.first().map(|(ino, _)| (volume, *ino))?;
        let able = self.sessions.keys().copied().filter(|id| self.may_clean(*id, volume));
        able.max_by_key(|session| (self.leases.level(*session, &key), *session))
    }

    fn may_clean(&self, session: u64, volume: VolumeId) -> bool {
        self.sessions.get(&session).is_some_and(|known| {
            let there = known.conn.is_some() && known.greeted && known.is_alive();
            let writes = !known.record.read_only && !known.record.by_admin;
            there && known.volume == volume && writes && !known.ending
        })
    }

    /// Whether another mount changes a file: it is not disturbed.
    fn is_changed_by_another(&self, session: u64, key: (VolumeId, u64)) -> bool {
        let mut others = self
            .sessions
            .iter()
            .filter(|(other, known)| **other != session && known.volume == key.0);
        others.any(|(other, _)| self.leases.level(*other, &key) == Level::Exclusive)
    }
}
