//! The directory's own records against each other, both ways, over a snapshot:
//!
//! ```text
//!  m chunk --extents--> b block --providers--> p holding
//!     ^------ r -------/   ^------------------/
//! ```
//! Every extent lies in a block that is there and knows the chunk; every block's counts are the sum of
//! its references; every provider is listed with just the fragments the block's record says.
//! What the trash lists is marked as trashed, nothing else is, and the sums are known.
//! Memory: a page of each, and one chunk's blocks.

use std::collections::BTreeMap;

use bytes::Bytes;
use us_core::ids::{BlockId, VolumeId};
use us_proto::v1::{FsckKind, FsckSummary};

use super::Found;
use crate::keys;
use crate::namespace::CHUNK_BYTES;
use crate::records::{
    BlockRecord, ChunkRecord, HoldingRecord, InodeRecord, ReferenceRecord, UsageRecord, decode,
    with_bit,
};
use crate::store::{KeyRange, Pair, StoreError, View};

/// A block, and what is wrong with the map of it.
type Wrong = (BlockId, (FsckKind, String));

/// Keys of one kind read together.
const PAGE: usize = 1024;

/// Walks over the keys of a range, a page at a time.
struct Walk<'a> {
    view: &'a dyn View,
    range: Option<KeyRange>,
    page: std::vec::IntoIter<Pair>,
}

impl<'a> Walk<'a> {
    fn new(view: &'a dyn View, prefix: &Bytes) -> Self {
        Self { view, range: Some(KeyRange::prefix(prefix)), page: Vec::new().into_iter() }
    }

    fn next(&mut self) -> Result<Option<Pair>, StoreError> {
        if self.page.len() == 0
            && let Some(range) = self.range.take()
        {
            let pairs = self.view.scan(&range, PAGE)?;
            if let Some((last, _)) = pairs.last().filter(|_| pairs.len() == PAGE) {
                self.range = Some(range.after(last));
            }
            self.page = pairs.into_iter();
        }
        Ok(self.page.next())
    }
}

fn read<T: prost::Message + Default>(
    view: &dyn View,
    key: &Bytes,
) -> Result<Option<T>, StoreError> {
    view.get(key)?.map(|value| decode(key, &value)).transpose()
}

/// The check of one volume's records.
pub struct Maps<'a> {
    /// The snapshot.
    pub view: &'a dyn View,
    /// The volume.
    pub volume: VolumeId,
    /// Whether its blocks belong to files; those of the directory's image do not.
    pub has_files: bool,
    /// What was seen.
    pub seen: &'a mut FsckSummary,
}

impl Maps<'_> {
    /// Checks everything; `sink` hears what is wrong and answers whether to go on, and `progress` how
    /// many records were seen.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn check(
        &mut self,
        sink: &mut dyn FnMut(Found) -> bool,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), StoreError> {
        let go_on = self.chunks(sink, progress)?
            && self.blocks(sink, progress)?
            && self.holdings(sink, progress)?
            && self.trash(sink, progress)?;
        tracing::debug!(volume = %self.volume, go_on, "its records are checked");
        Ok(())
    }

    fn found(&self, kind: FsckKind, block: BlockId, detail: String) -> Found {
        Found { kind, volume: Some(self.volume), block: Some(block), detail, ..Found::default() }
    }

    /// Every extent: its block, and the block's knowledge of the chunk.
    fn chunks(
        &mut self,
        sink: &mut dyn FnMut(Found) -> bool,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<bool, StoreError> {
        let mut walk = Walk::new(self.view, &keys::tag(&self.volume, b'm'));
        let mut seen = 0;
        while let Some((key, value)) = walk.next()? {
            seen += 1;
            self.seen.chunks += 1;
            let ino = keys::last_number(&key[..key.len() - 8]);
            let chunk = keys::last_number(&key);
            let map: ChunkRecord = decode(&key, &value)?;
            for (block, detail) in self.chunk(&map, ino, chunk)? {
                let (kind, detail) = detail;
                let found = Found { ino, ..self.found(kind, block, detail) };
                if !sink(found) {
                    return Ok(false);
                }
            }
            if seen % PAGE as u64 == 0 && !progress(seen) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What is wrong with one chunk's map.
    fn chunk(&mut self, map: &ChunkRecord, ino: u64, chunk: u64) -> Result<Vec<Wrong>, StoreError> {
        let mut wrong = Vec::new();
        let mut bytes: BTreeMap<BlockId, (u64, u64)> = BTreeMap::new();
        let mut end = 0;
        for extent in &map.extents {
            self.seen.extents += 1;
            let Some(block) = BlockId::from_slice(&extent.block) else { continue };
            if extent.offset < end || u64::from(extent.end()) > CHUNK_BYTES {
                let detail = format!("chunk {chunk}: its extents overlap or leave it");
                wrong.push((block, (FsckKind::DanglingExtent, detail)));
            }
            end = extent.end();
            let (sum, reach) = bytes.entry(block).or_default();
            *sum += u64::from(extent.length);
            *reach = (*reach).max(u64::from(extent.block_offset) + u64::from(extent.length));
        }
        for (block, (sum, reach)) in bytes {
            let record: Option<BlockRecord> = read(self.view, &keys::block(&self.volume, &block))?;
            let Some(record) = record else {
                let detail = format!("chunk {chunk}: {sum} bytes lie in a block that is not there");
                wrong.push((block, (FsckKind::DanglingExtent, detail)));
                continue;
            };
            if reach > u64::from(record.plaintext_bytes) {
                let (known, detail) = (record.plaintext_bytes, "bytes are mapped of a block of");
                let detail = format!("chunk {chunk}: {reach} {detail} {known}");
                wrong.push((block, (FsckKind::DanglingExtent, detail)));
            }
            let key = keys::reference(&self.volume, &block, ino, chunk);
            let known = read::<ReferenceRecord>(self.view, &key)?.map_or(0, |known| known.bytes);
            if known != sum {
                let detail = format!("chunk {chunk}: {sum} bytes mapped, the block knows {known}");
                wrong.push((block, (FsckKind::WrongReference, detail)));
            }
        }
        Ok(wrong)
    }

    /// Every block: its references, which lie in the same order, and its holders.
    fn blocks(
        &mut self,
        sink: &mut dyn FnMut(Found) -> bool,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<bool, StoreError> {
        let mut walk = Walk::new(self.view, &keys::tag(&self.volume, b'b'));
        let mut references = Walk::new(self.view, &keys::tag(&self.volume, b'r'));
        let mut head = references.next()?;
        let (mut seen, mut stored_bytes, mut live_bytes) = (0, 0, 0);
        loop {
            let next = walk.next()?;
            let block = next.as_ref().and_then(|(key, _)| keys::last_block(key));
            let (mut count, mut bytes) = (0, 0);
            while let Some((key, value)) = head.take_if(|(key, _)| {
                let at = referring(key);
                block.is_none_or(|block| at.is_none_or(|(at, ..)| at <= block))
            }) {
                head = references.next()?;
                let Some((at, ino, chunk)) = referring(&key) else { continue };
                let known: ReferenceRecord = decode(&key, &value)?;
                let mut wrong = None;
                if Some(at) != block {
                    wrong = Some("a block that is not there is referred to");
                } else if self.has_files && !self.refers(ino, chunk, &at)? {
                    wrong = Some("the block is referred to by a map that does not name it");
                }
                if let Some(wrong) = wrong {
                    let found = self.found(FsckKind::WrongReference, at, wrong.to_owned());
                    if !sink(Found { ino, ..found }) {
                        return Ok(false);
                    }
                }
                (count, bytes) = (count + u64::from(Some(at) == block), bytes + known.bytes);
            }
            let (Some((key, value)), Some(block)) = (next, block) else { break };
            let record: BlockRecord = decode(&key, &value)?;
            seen += 1;
            self.seen.blocks += 1;
            stored_bytes += u64::from(record.plaintext_bytes);
            live_bytes += bytes;
            for found in self.block(block, &record, (count, bytes))? {
                if !sink(found) {
                    return Ok(false);
                }
            }
            if seen % PAGE as u64 == 0 && !progress(seen) {
                return Ok(false);
            }
        }
        let usage: UsageRecord = read(self.view, &keys::usage(&self.volume))?.unwrap_or_default();
        let sums = (seen, stored_bytes, live_bytes);
        let known = (usage.blocks, usage.stored_bytes, usage.live_bytes);
        if sums == known {
            return Ok(true);
        }
        let detail = format!("blocks, their bytes, bytes of files: {sums:?}, and {known:?} known");
        let volume = Some(self.volume);
        Ok(sink(Found { kind: FsckKind::WrongUsage, volume, detail, ..Found::default() }))
    }

    fn refers(&self, ino: u64, chunk: u64, block: &BlockId) -> Result<bool, StoreError> {
        let map: Option<ChunkRecord> = read(self.view, &keys::chunk(&self.volume, ino, chunk))?;
        let names = |map: &ChunkRecord| map.extents.iter().any(|e| e.block == block.as_bytes()[..]);
        Ok(map.as_ref().is_some_and(names))
    }

    /// What is wrong with one block, given how many references of how many bytes there are.
    fn block(
        &self,
        block: BlockId,
        record: &BlockRecord,
        (count, bytes): (u64, u64),
    ) -> Result<Vec<Found>, StoreError> {
        let mut wrong = Vec::new();
        if (count, bytes) != (record.references, record.live_bytes) {
            let detail = format!(
                "{count} references to {bytes} bytes, its record says {} and {}",
                record.references, record.live_bytes
            );
            wrong.push(self.found(FsckKind::WrongCount, block, detail));
        } else if count == 0 {
            let detail = "no file has bytes in it".to_owned();
            wrong.push(self.found(FsckKind::UnreferencedBlock, block, detail));
        }
        let mut holders: BTreeMap<u32, Bytes> = BTreeMap::new();
        for (index, provider) in record.providers.iter().enumerate() {
            let held = holders.entry(*provider).or_default();
            *held = with_bit(held, index, true);
        }
        for (provider, right) in holders {
            let key = keys::holding(&self.volume, provider, &block);
            let listed = read::<HoldingRecord>(self.view, &key)?.unwrap_or_default();
            if listed.fragments != right {
                let detail = "it is not listed with what its record says".to_owned();
                let found = self.found(FsckKind::WrongHolding, block, detail);
                wrong.push(Found { provider, ..found });
            }
        }
        Ok(wrong)
    }

    /// Everything in the trash: its inode says so, and their sums are the volume's.
    fn trash(
        &mut self,
        sink: &mut dyn FnMut(Found) -> bool,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<bool, StoreError> {
        let wrong = |ino: u64, detail: String| Found {
            kind: FsckKind::WrongUsage,
            volume: Some(self.volume),
            ino,
            detail,
            ..Found::default()
        };
        let (mut files, mut bytes) = (0, 0);
        let mut walk = Walk::new(self.view, &keys::tag(&self.volume, b't'));
        while let Some((key, value)) = walk.next()? {
            let (at_ms, ino) = (keys::trashed_at(&key), keys::last_number(&key));
            let listed: ReferenceRecord = decode(&key, &value)?;
            files += 1;
            bytes += listed.bytes;
            let record: Option<InodeRecord> = read(self.view, &keys::inode(&self.volume, ino))?;
            let here = record.filter(InodeRecord::is_trashed).is_some_and(|record| {
                let removed_ms = record.removed.as_ref().map(|removed| removed.at_ms);
                removed_ms == Some(at_ms) && record.stored_bytes() == listed.bytes
            });
            let detail = "listed in the trash, and its inode does not say so".to_owned();
            if !here && !sink(wrong(ino, detail)) {
                return Ok(false);
            }
        }
        let (mut seen, mut marked) = (0, 0);
        let mut walk = Walk::new(self.view, &keys::tag(&self.volume, b'i'));
        while let Some((key, value)) = walk.next()? {
            seen += 1;
            marked += u64::from(decode::<InodeRecord>(&key, &value)?.is_trashed());
            if seen % PAGE as u64 == 0 && !progress(seen) {
                return Ok(false);
            }
        }
        let usage: UsageRecord = read(self.view, &keys::usage(&self.volume))?.unwrap_or_default();
        let known = (usage.trash_files, usage.trash_bytes);
        if (files, bytes) == known && marked == files {
            return Ok(true);
        }
        let sums = (files, bytes);
        let detail = format!(
            "in the trash, and bytes: {sums:?}, and {known:?} known; {marked} inodes say so"
        );
        Ok(sink(wrong(0, detail)))
    }

    /// Every listed holding: its block's record names the provider.
    fn holdings(
        &mut self,
        sink: &mut dyn FnMut(Found) -> bool,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<bool, StoreError> {
        let mut walk = Walk::new(self.view, &keys::tag(&self.volume, b'p'));
        let mut seen = 0;
        while let Some((key, _)) = walk.next()? {
            seen += 1;
            self.seen.holdings += 1;
            let number = key.get(keys::HEAD_BYTES..keys::HEAD_BYTES + 4);
            let provider = number.and_then(|n| n.try_into().ok()).map_or(0, u32::from_be_bytes);
            let Some(block) = keys::last_block(&key) else { continue };
            let record: Option<BlockRecord> = read(self.view, &keys::block(&self.volume, &block))?;
            if !record.is_some_and(|record| record.providers.contains(&provider)) {
                let detail = "listed there, and its record does not say so".to_owned();
                let found = self.found(FsckKind::WrongHolding, block, detail);
                if !sink(Found { provider, ..found }) {
                    return Ok(false);
                }
            }
            if seen % PAGE as u64 == 0 && !progress(seen) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// The block, inode and chunk of an `r` key.
fn referring(key: &Bytes) -> Option<(BlockId, u64, u64)> {
    let body = key.get(keys::HEAD_BYTES..).filter(|body| body.len() == 32)?;
    let block = BlockId::from_slice(&body[..16])?;
    Some((block, keys::last_number(&body[..24]), keys::last_number(body)))
}
