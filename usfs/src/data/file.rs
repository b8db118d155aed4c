//! The three layers of one file's data.

use std::ops::Range;

use bytes::Bytes;
use us_core::ids::BlockId;
use us_core::limits::CHUNK_BYTES;

use super::map::{Extent, FileMap, MapPiece, MapSource, Place};
use super::{DirtyBuffer, InFlight, SealedPiece, Ticket};

/// A piece of what a read must return.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReadPiece {
    /// These bytes: they are not stored yet.
    Bytes {
        /// Where in the file.
        offset: u64,
        /// The bytes.
        bytes: Bytes,
    },
    /// A piece of a block.
    Block {
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        bytes: u64,
        /// The block.
        block: BlockId,
        /// Where in the block's plaintext.
        block_offset: u64,
    },
    /// Zeros.
    Zero {
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        bytes: u64,
    },
}

/// How to serve a read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReadPlan {
    /// These pieces, in order and without gaps.
    Ready(Vec<ReadPiece>),
    /// First fetch these chunks of the map, then ask again.
    Fetch(Range<u64>),
}

/// The answer to SEEK_DATA and SEEK_HOLE.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seek {
    /// This offset.
    At(u64),
    /// There is none before the end of the file (ENXIO).
    None,
    /// First fetch this chunk of the map, then ask again.
    Fetch(u64),
}

/// What a clone of a range refers to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ClonePlan {
    /// These extents, with the offsets of the source file, in order and without gaps (holes are
    /// extents too).
    Extents(Vec<Extent>),
    /// Some of the range is not committed: flush the file first.
    Flush,
    /// First fetch these chunks of the map, then ask again.
    Fetch(Range<u64>),
}

/// The data of one file: dirty, in flight, mapped.
#[derive(Debug)]
pub struct FileData {
    dirty: DirtyBuffer,
    in_flight: InFlight,
    map: FileMap,
}

impl FileData {
    /// The data of a file that this mount has just created.
    pub fn new_file() -> Self {
        Self::with_map(FileMap::empty())
    }

    /// The data of a file whose map must be fetched.
    pub fn known_file() -> Self {
        Self::with_map(FileMap::unknown())
    }

    fn with_map(map: FileMap) -> Self {
        Self { dirty: DirtyBuffer::default(), in_flight: InFlight::default(), map }
    }

    /// The layer of what is written and not sealed.
    pub fn dirty(&self) -> &DirtyBuffer {
        &self.dirty
    }

    /// The layer of what is sealed and not committed.
    pub fn in_flight(&self) -> &InFlight {
        &self.in_flight
    }

    /// The layer of what is committed.
    pub fn map(&self) -> &FileMap {
        &self.map
    }

    /// The layer of what is committed, to install chunks or to forget them.
    pub fn map_mut(&mut self) -> &mut FileMap {
        &mut self.map
    }

    /// Whether everything written is committed.
    pub fn is_clean(&self) -> bool {
        self.dirty.is_empty() && self.in_flight.is_empty()
    }

    /// Puts `data` at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.dirty.write(offset, data);
    }

    /// Cuts the file at `size`, or makes it longer with a hole. The owner logs the new size.
    pub fn truncate(&mut self, size: u64) {
        self.dirty.truncate(size);
        self.in_flight.truncate(size);
        self.map.truncate(size);
    }

    /// Makes `range` a hole. The owner logs it.
    pub fn punch(&mut self, range: Range<u64>) {
        self.replace(range, Place::Hole);
    }

    /// Makes `range` allocated zeros. The owner logs it.
    pub fn zero_range(&mut self, range: Range<u64>) {
        self.replace(range, Place::Zero);
    }

    fn replace(&mut self, range: Range<u64>, place: Place) {
        self.place(&Extent { offset: range.start, bytes: range.end - range.start, place });
    }

    /// Puts an extent over everything that is in its range: the target of a clone. The owner logs
    /// it.
    pub fn place(&mut self, extent: &Extent) {
        self.dirty.punch(extent.range());
        self.in_flight.punch(extent.range());
        self.map.apply(extent);
    }

    /// How to read `range` of the file, which has `size` bytes; what lies beyond is left out.
    pub fn read_plan(&self, range: Range<u64>, size: u64) -> ReadPlan {
        let range = range.start.min(size)..range.end.min(size);
        let mut plan = Plan::default();
        let mut at = range.start;
        for (offset, bytes) in self.dirty.overlay(range.clone()) {
            self.plan_below(at..offset, &mut plan);
            at = offset + bytes.len() as u64;
            plan.pieces.push(ReadPiece::Bytes { offset, bytes: Bytes::copy_from_slice(bytes) });
        }
        self.plan_below(at..range.end, &mut plan);
        match plan.unknown {
            None => ReadPlan::Ready(plan.pieces),
            Some(chunks) => ReadPlan::Fetch(chunks),
        }
    }

    /// Plans a range that is not dirty.
    fn plan_below(&self, range: Range<u64>, plan: &mut Plan) {
        if range.start >= range.end {
            return;
        }
        let mut at = range.start;
        for (offset, bytes) in self.in_flight.overlay(range.clone(), None) {
            self.plan_map(at..offset, plan);
            at = offset + bytes.len() as u64;
            plan.pieces.push(ReadPiece::Bytes { offset, bytes });
        }
        self.plan_map(at..range.end, plan);
    }

    /// Plans a range that is neither dirty nor in flight.
    fn plan_map(&self, range: Range<u64>, plan: &mut Plan) {
        if range.start >= range.end {
            return;
        }
        for piece in self.map.lookup(range) {
            let (offset, bytes) = (piece.range.start, piece.range.end - piece.range.start);
            match piece.source {
                MapSource::Place(Place::Block { block, offset: block_offset }) => {
                    plan.pieces.push(ReadPiece::Block { offset, bytes, block, block_offset });
                }
                MapSource::Place(Place::Zero | Place::Hole) => {
                    plan.pieces.push(ReadPiece::Zero { offset, bytes });
                }
                MapSource::Unknown => plan.need(piece.range),
            }
        }
    }

    /// The first byte of data at or after `offset`. Zeros and holes are none.
    pub fn seek_data(&self, offset: u64, size: u64) -> Seek {
        if offset >= size {
            return Seek::None;
        }
        let pending = [self.dirty.next_at(offset), self.in_flight.next_at(offset)];
        let pending = pending.into_iter().flatten().min().filter(|at| *at < size);
        match self.map.next_data(offset, pending.unwrap_or(size)) {
            Ok(mapped) => match [mapped, pending].into_iter().flatten().min() {
                Some(at) => Seek::At(at),
                None => Seek::None,
            },
            Err(chunk) => Seek::Fetch(chunk),
        }
    }

    /// The first byte at or after `offset` that is no data; the end of the file counts as one.
    pub fn seek_hole(&self, offset: u64, size: u64) -> Seek {
        if offset >= size {
            return Seek::None;
        }
        let mut at = offset;
        while at < size {
            let pending = [self.dirty.dirty_until(at), self.in_flight.end_at(at)];
            at = match pending.into_iter().flatten().max() {
                Some(end) => end,
                None => match self.map.data_end(at) {
                    Ok(Some(end)) => end,
                    Ok(None) => return Seek::At(at),
                    Err(chunk) => return Seek::Fetch(chunk),
                },
            };
        }
        Seek::At(size)
    }

    /// The first byte at or after `offset` that was written and of which no version is committed.
    /// A byte that is rewritten while an older version of it is in the map is committed, for whoever
    /// waited for that version.
    pub fn first_uncommitted(&self, offset: u64) -> Option<u64> {
        let mut at = offset;
        loop {
            let pending = [self.dirty.next_at(at), self.in_flight.next_at(at)];
            let start = pending.into_iter().flatten().min()?;
            let ends = [self.dirty.dirty_until(start), self.in_flight.end_at(start)];
            at = ends.into_iter().flatten().max()?;
            let committed =
                |piece: &MapPiece| matches!(piece.source, MapSource::Place(Place::Block { .. }));
            let pieces = self.map.lookup(start..at);
            if let Some(piece) = pieces.iter().find(|piece| !committed(piece)) {
                return Some(piece.range.start);
            }
        }
    }

    /// What a clone of `range` of this file refers to.
    pub fn clone_range(&self, range: Range<u64>) -> ClonePlan {
        let pending = [self.dirty.next_at(range.start), self.in_flight.next_at(range.start)];
        if pending.into_iter().flatten().any(|at| at < range.end) {
            return ClonePlan::Flush;
        }
        let mut plan = Plan::default();
        let mut extents = Vec::new();
        for piece in self.map.lookup(range) {
            match piece.source {
                MapSource::Place(place) => extents.push(Extent {
                    offset: piece.range.start,
                    bytes: piece.range.end - piece.range.start,
                    place,
                }),
                MapSource::Unknown => plan.need(piece.range),
            }
        }
        match plan.unknown {
            None => ClonePlan::Extents(extents),
            Some(chunks) => ClonePlan::Fetch(chunks),
        }
    }

    /// Moves up to `max_bytes` from dirty to in flight, as pieces that lie one after the other from
    /// `block_offset` on in the block of `ticket`. Nothing is copied.
    pub fn seal(&mut self, ticket: Ticket, block_offset: u64, max_bytes: u64) -> Vec<SealedPiece> {
        let mut at = block_offset;
        let mut pieces = Vec::new();
        for (offset, bytes) in self.dirty.take(max_bytes) {
            let end = at + bytes.len() as u64;
            pieces.push(SealedPiece { offset, bytes, block_offset: at });
            at = end;
        }
        if !pieces.is_empty() {
            self.in_flight.insert(ticket, &pieces);
        }
        pieces
    }

    /// The block of `ticket` is stored as `block`: its bytes go from in flight to the map. Returns
    /// the extents to commit: what is still part of the file.
    pub fn commit(&mut self, ticket: Ticket, block: BlockId) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        for piece in self.in_flight.finish(ticket) {
            let bytes = piece.bytes.len() as u64;
            if let Some(last) = extents.last_mut()
                && last.range().end == piece.offset
                && last.place == block_place(block, piece.block_offset.wrapping_sub(last.bytes))
            {
                last.bytes += bytes;
                continue;
            }
            let place = block_place(block, piece.block_offset);
            extents.push(Extent { offset: piece.offset, bytes, place });
        }
        extents.iter().for_each(|extent| self.map.apply(extent));
        extents
    }

    /// The block of `ticket` could not be stored: its bytes are dirty again, except where newer
    /// ones are. Where newer bytes are themselves in flight they become dirty too, so that whoever
    /// waits for the older write still finds something to wait for.
    pub fn abort(&mut self, ticket: Ticket) {
        let newest = |data: &Self, range: Range<u64>| data.in_flight.overlay(range, Some(ticket));
        for piece in self.in_flight.finish(ticket) {
            let range = piece.offset..piece.offset + piece.bytes.len() as u64;
            for gap in self.dirty.gaps(range) {
                let from = (gap.start - piece.offset) as usize;
                let bytes = piece.bytes.slice(from..from + (gap.end - gap.start) as usize);
                let newer = newest(self, gap.clone());
                self.dirty.write(gap.start, &bytes);
                newer.iter().for_each(|(offset, bytes)| self.dirty.write(*offset, bytes));
            }
        }
    }
}

const fn block_place(block: BlockId, offset: u64) -> Place {
    Place::Block { block, offset }
}

/// A plan in the making.
#[derive(Default)]
struct Plan {
    pieces: Vec<ReadPiece>,
    /// Chunks that must be fetched, from the first to the last of them.
    unknown: Option<Range<u64>>,
}

impl Plan {
    fn need(&mut self, range: Range<u64>) {
        let chunks = range.start / CHUNK_BYTES..range.end.div_ceil(CHUNK_BYTES);
        self.unknown = Some(match self.unknown.take() {
            None => chunks,
            Some(before) => before.start.min(chunks.start)..before.end.max(chunks.end),
        });
    }
}
