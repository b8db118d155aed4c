//! File data: the maps of chunks, and what a commit of blocks and extents does to them.

use us_core::ids::BlockId;
use us_proto::v1::{CommitData, ExtentWrite, FileGrowth};

use super::{
    ApplyError, Authority, CHUNK_BYTES, CHUNK_EXTENTS_MAX, FILE_BYTES_MAX, Rule, S_IFMT, S_IFREG,
    Tx, ZERO_EXTENT_BYTES_MAX,
};
use crate::records::{ChunkRecord, ExtentRecord};

/// The most chunk numbers a slice of work asks for at once.
const CHUNKS_PAGE: usize = 256;

/// What a range of a file becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nothing is allocated.
    Hole,
    /// Zeros are allocated.
    Zeros,
    /// A piece of a block, from this byte of it on.
    Block(BlockId, u64),
}

impl Place {
    /// The place `bytes` further on.
    fn advance(self, bytes: u64) -> Self {
        match self {
            Self::Block(block, offset) => Self::Block(block, offset + bytes),
            Self::Hole | Self::Zeros => self,
        }
    }

    fn extent(self, offset: u32, length: u32) -> Option<ExtentRecord> {
        match self {
            Self::Hole => None,
            Self::Zeros => Some(ExtentRecord { offset, length, ..Default::default() }),
            Self::Block(block, block_offset) => Some(ExtentRecord {
                offset,
                length,
                block: bytes::Bytes::copy_from_slice(block.as_bytes()),
                block_offset: block_offset as u32,
            }),
        }
    }
}

/// The part of an extent from byte `from` to byte `to` of its chunk.
fn part(extent: &ExtentRecord, from: u32, to: u32) -> ExtentRecord {
    let ahead = from - extent.offset;
    ExtentRecord {
        offset: from,
        length: to - from,
        block: extent.block.clone(),
        block_offset: if extent.block.is_empty() { 0 } else { extent.block_offset + ahead },
    }
}

/// Whether `right` goes on where `left` ends, in the file and in the block.
fn continues(left: &ExtentRecord, right: &ExtentRecord) -> bool {
    left.end() == right.offset
        && left.block == right.block
        && (left.block.is_empty() || left.block_offset + left.length == right.block_offset)
}

/// Writes `place` over the bytes `offset..offset + length` of a chunk's map and returns what was
/// there. The map stays sorted, disjoint and merged.
pub(super) fn splice(
    map: &mut ChunkRecord,
    offset: u32,
    length: u32,
    place: Place,
) -> Vec<ExtentRecord> {
    let end = offset + length;
    let first = map.extents.partition_point(|extent| extent.end() <= offset);
    let last = map.extents.partition_point(|extent| extent.offset < end);
    let mut removed = Vec::with_capacity(last - first);
    let mut fresh: Vec<ExtentRecord> = Vec::with_capacity(3);
    for extent in &map.extents[first..last] {
        if extent.offset < offset {
            fresh.push(part(extent, extent.offset, offset));
        }
        removed.push(part(extent, extent.offset.max(offset), extent.end().min(end)));
    }
    fresh.extend(place.extent(offset, length));
    if let Some(extent) = map.extents[first..last].last().filter(|extent| extent.end() > end) {
        fresh.push(part(extent, end, extent.end()));
    }
    // The neighbours take part in the merge.
    let from = first.saturating_sub(1);
    let to = (last + 1).min(map.extents.len());
    let mut merged: Vec<ExtentRecord> = Vec::with_capacity(fresh.len() + 2);
    let around = map.extents[from..first].iter().chain(&fresh).chain(&map.extents[last..to]);
    for extent in around {
        match merged.last_mut() {
            Some(left) if continues(left, extent) => left.length += extent.length,
            _ => merged.push(extent.clone()),
        }
    }
    map.extents.splice(from..to, merged);
    removed
}

impl Tx<'_> {
    pub(super) fn commit_data(
        &mut self,
        who: &dyn Authority,
        commit: &CommitData,
    ) -> Result<(), ApplyError> {
        for block in &commit.blocks {
            self.commit_block(who, block)?;
        }
        for extent in &commit.extents {
            self.write_extent(who, extent)?;
        }
        self.check_crowded()?;
        for file in &commit.files {
            self.grow(who, file)?;
        }
        Ok(())
    }

    /// Fails where a chunk has too many extents now. Asked when all extents of a commit are in: the
    /// first of them may add what the last replace.
    fn check_crowded(&mut self) -> Result<(), ApplyError> {
        for (ino, chunk) in std::mem::take(&mut self.crowded) {
            let extents = self.chunk_mut(ino, chunk)?.extents.len();
            if extents > CHUNK_EXTENTS_MAX {
                return Err(Rule::TooManyExtents { ino, chunk, extents }.into());
            }
        }
        Ok(())
    }

    fn grow(&mut self, who: &dyn Authority, file: &FileGrowth) -> Result<(), ApplyError> {
        self.need_file(who, file.ino)?;
        if file.size > FILE_BYTES_MAX {
            return Err(Rule::Malformed { field: "size" }.into());
        }
        let record = self.inode_mut(file.ino)?;
        record.size = record.size.max(file.size);
        record.mtime = file.mtime.or(record.mtime);
        if file.clear_suid {
            record.mode &= !0o4000;
            if record.mode & 0o0010 != 0 {
                record.mode &= !0o2000;
            }
        }
        self.changed(file.ino, file.ctime, false)
    }

    fn need_file(&mut self, who: &dyn Authority, ino: u64) -> Result<(), ApplyError> {
        self.need_exclusive(who, ino)?;
        let record = self.inode(ino)?.ok_or(Rule::NoInode { ino })?;
        if record.mode & S_IFMT == S_IFREG { Ok(()) } else { Err(Rule::NotAFile { ino }.into()) }
    }

    /// What an extent names, checked.
    fn place(&mut self, extent: &ExtentWrite) -> Result<Place, ApplyError> {
        if extent.block.is_empty() {
            if !extent.zero {
                return Ok(Place::Hole);
            }
            if extent.length > ZERO_EXTENT_BYTES_MAX {
                return Err(Rule::TooLong {
                    field: "an extent of zeros",
                    bytes: extent.length,
                    bytes_max: ZERO_EXTENT_BYTES_MAX,
                }
                .into());
            }
            return Ok(Place::Zeros);
        }
        let block = BlockId::from_slice(&extent.block).ok_or(Rule::Malformed { field: "block" })?;
        let plaintext_bytes = self.block(&block)?.ok_or(Rule::NoBlock { block })?.plaintext_bytes;
        let (offset, length) = (extent.block_offset, extent.length);
        if offset.checked_add(length).is_none_or(|end| end > u64::from(plaintext_bytes)) {
            return Err(Rule::OutsideBlock { block, offset, length, plaintext_bytes }.into());
        }
        Ok(Place::Block(block, offset))
    }

    fn write_extent(
        &mut self,
        who: &dyn Authority,
        extent: &ExtentWrite,
    ) -> Result<(), ApplyError> {
        self.need_file(who, extent.ino)?;
        let end = extent.offset.checked_add(extent.length);
        if extent.length == 0 || end.is_none_or(|end| end > FILE_BYTES_MAX) {
            return Err(Rule::Malformed { field: "extent" }.into());
        }
        let place = self.place(extent)?;
        if !extent.expected_block.is_empty() && !self.is_still(extent)? {
            return Ok(());
        }
        self.write_range(extent.ino, extent.offset, extent.length, place)
    }

    /// Whether the file's range is, byte for byte, still the piece the extent expects.
    fn is_still(&mut self, extent: &ExtentWrite) -> Result<bool, ApplyError> {
        let end = extent.offset + extent.length;
        let mut at = extent.offset;
        while at < end {
            let (chunk, within) = (at / CHUNK_BYTES, (at % CHUNK_BYTES) as u32);
            let piece_end = (end - chunk * CHUNK_BYTES).min(CHUNK_BYTES) as u32;
            let map = self.chunk_mut(extent.ino, chunk)?;
            let mut within = within;
            while within < piece_end {
                let index = map.extents.partition_point(|found| found.end() <= within);
                let Some(found) = map.extents.get(index).filter(|found| found.offset <= within)
                else {
                    return Ok(false);
                };
                let expected = extent.expected_offset + (at - extent.offset);
                let offset = u64::from(found.block_offset + (within - found.offset));
                if found.block != extent.expected_block || offset != expected {
                    return Ok(false);
                }
                let next = found.end().min(piece_end);
                at += u64::from(next - within);
                within = next;
            }
        }
        Ok(true)
    }

    /// Writes a place over a range of a file, chunk by chunk. A hole visits only mapped chunks.
    pub(super) fn write_range(
        &mut self,
        ino: u64,
        offset: u64,
        length: u64,
        place: Place,
    ) -> Result<(), ApplyError> {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let chunk = at / CHUNK_BYTES;
            if place == Place::Hole {
                let chunks_end = end.div_ceil(CHUNK_BYTES);
                let mapped = self.mapped_chunks(ino, chunk, chunks_end, CHUNKS_PAGE)?;
                for chunk in &mapped {
                    let from = at.max(chunk * CHUNK_BYTES);
                    let to = end.min((chunk + 1) * CHUNK_BYTES);
                    self.write_piece(ino, from, to - from, place)?;
                }
                match mapped.last() {
                    Some(last) if mapped.len() == CHUNKS_PAGE => at = (last + 1) * CHUNK_BYTES,
                    _ => return Ok(()),
                }
                continue;
            }
            let to = end.min((chunk + 1) * CHUNK_BYTES);
            self.write_piece(ino, at, to - at, place.advance(at - offset))?;
            at = to;
        }
        Ok(())
    }

    /// Frees everything from byte `size` on.
    pub(super) fn clear_behind(&mut self, ino: u64, size: u64) -> Result<(), ApplyError> {
        self.write_range(ino, size, FILE_BYTES_MAX - size, Place::Hole)
    }

    fn write_piece(
        &mut self,
        ino: u64,
        offset: u64,
        length: u64,
        place: Place,
    ) -> Result<(), ApplyError> {
        let chunk = offset / CHUNK_BYTES;
        let map = self.chunk_mut(ino, chunk)?;
        let removed = splice(map, (offset % CHUNK_BYTES) as u32, length as u32, place);
        let extents = map.extents.len();
        if extents > CHUNK_EXTENTS_MAX && place != Place::Hole {
            self.crowded.insert((ino, chunk));
        }
        // The new reference first: overwriting a piece with itself must not kill the block.
        if let Place::Block(block, _) = place {
            self.refer(&block, ino, chunk, length as i64)?;
        }
        let (mut freed, mut freed_zeros) = (0, 0);
        for extent in &removed {
            freed += u64::from(extent.length);
            match BlockId::from_slice(&extent.block) {
                Some(block) => self.refer(&block, ino, chunk, -i64::from(extent.length))?,
                None => freed_zeros += u64::from(extent.length),
            }
        }
        let mapped = if place == Place::Hole { 0 } else { length };
        let zeros = if place == Place::Zeros { length } else { 0 };
        let same = mapped == freed && zeros == freed_zeros;
        if !same && self.inode(ino)?.is_some() {
            let record = self.inode_mut(ino)?;
            record.allocated_bytes = (record.allocated_bytes + mapped).saturating_sub(freed);
            record.zero_bytes = (record.zero_bytes + zeros).saturating_sub(freed_zeros);
        }
        Ok(())
    }
}
