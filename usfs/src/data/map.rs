//! The cached map of one file: which piece of which block each byte is.
//!
//! The directory gives the map in chunks of 4 MiB; a chunk is known or unknown. What this mount
//! commits into an unknown chunk is kept over it, holes too, so that a chunk that was fetched
//! before the commit and arrives after it changes nothing of what was committed.

use std::collections::BTreeSet;
use std::ops::Range;

use us_core::ids::BlockId;
use us_core::limits::CHUNK_BYTES;

use super::intervals::{Divide, IntervalMap};

/// What a run of a file's bytes is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Place {
    /// A piece of a block's plaintext.
    Block {
        /// The block.
        block: BlockId,
        /// Where in its plaintext the run begins.
        offset: u64,
    },
    /// Allocated zeros.
    Zero,
    /// Nothing: reads as zeros.
    Hole,
}

impl Divide for Place {
    fn advance(&mut self, bytes: u64) {
        if let Self::Block { offset, .. } = self {
            *offset += bytes;
        }
    }

    fn shorten(&mut self, _bytes: u64) {}
}

/// A run of bytes of a file and its place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Where in the file.
    pub offset: u64,
    /// How many bytes.
    pub bytes: u64,
    /// What they are.
    pub place: Place,
}

impl Extent {
    /// The bytes of the file it covers.
    pub const fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.bytes
    }
}

/// What the map knows about a run of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapSource {
    /// This place.
    Place(Place),
    /// Nothing yet: the chunk must be fetched.
    Unknown,
}

/// A piece of a lookup's answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MapPiece {
    /// The bytes of the file.
    pub range: Range<u64>,
    /// What is known of them.
    pub source: MapSource,
}

/// The map of one file, as far as it is known.
#[derive(Clone, Debug)]
pub struct FileMap {
    /// In known chunks never `Hole`.
    places: IntervalMap<Place>,
    known: BTreeSet<u64>,
    /// All chunks from here on are known.
    known_from: u64,
}

impl FileMap {
    /// The map of a new file: all is known, and nothing is mapped.
    pub fn empty() -> Self {
        Self { places: IntervalMap::default(), known: BTreeSet::new(), known_from: 0 }
    }

    /// The map of a file the directory has: nothing is known.
    pub fn unknown() -> Self {
        Self { known_from: u64::MAX, ..Self::empty() }
    }

    /// Whether chunk `chunk` is known.
    pub fn is_known(&self, chunk: u64) -> bool {
        chunk >= self.known_from || self.known.contains(&chunk)
    }

    /// Bytes with a place, as far as known.
    pub fn mapped_bytes(&self) -> u64 {
        let holes = self.places.iter().filter(|(_, place)| **place == Place::Hole);
        self.places.bytes() - holes.map(|(range, _)| range.end - range.start).sum::<u64>()
    }

    /// The directory's answer for one chunk. Changes of this mount that are already here win.
    pub fn install(&mut self, chunk: u64, extents: &[Extent]) {
        if self.is_known(chunk) {
            return;
        }
        let bounds = chunk_range(chunk);
        for extent in extents {
            let range = extent.offset.max(bounds.start)..extent.range().end.min(bounds.end);
            if range.start >= range.end {
                continue;
            }
            for gap in self.places.gaps(range) {
                let mut place = extent.place;
                place.advance(gap.start - extent.offset);
                self.places.set(gap, place);
            }
        }
        self.known.insert(chunk);
        self.drop_holes(bounds);
    }

    /// The directory's answer that nothing is mapped from chunk `first` on.
    pub fn install_end(&mut self, first: u64) {
        self.known_from = self.known_from.min(first);
        self.known.split_off(&first);
        self.drop_holes(first.saturating_mul(CHUNK_BYTES)..u64::MAX);
    }

    /// Forgets everything, so that it is fetched again. Only while no fetch is under way, and every
    /// change applied here has been sent.
    pub fn forget(&mut self) {
        *self = Self::unknown();
    }

    fn drop_holes(&mut self, range: Range<u64>) {
        let holes: Vec<_> = self
            .places
            .overlay(range)
            .filter(|(_, place)| *place == Place::Hole)
            .map(|(range, _)| range)
            .collect();
        holes.into_iter().for_each(|range| self.places.cut(range));
    }

    /// A change that this mount has put into its log.
    pub fn apply(&mut self, extent: &Extent) {
        if extent.place != Place::Hole {
            self.places.set(extent.range(), extent.place);
            return;
        }
        self.places.cut(extent.range());
        for (range, known) in self.by_chunk(extent.range()) {
            if !known {
                self.places.set(range, Place::Hole);
            }
        }
    }

    /// The file was cut or extended to `size`: nothing is mapped beyond.
    pub fn truncate(&mut self, size: u64) {
        self.places.cut(size..u64::MAX);
        let chunk = size / CHUNK_BYTES;
        if !size.is_multiple_of(CHUNK_BYTES) && !self.is_known(chunk) {
            self.places.set(size..chunk_range(chunk).end, Place::Hole);
        }
        self.install_end(size.div_ceil(CHUNK_BYTES));
    }

    /// What is known about `range`, in order and without gaps.
    pub fn lookup(&self, range: Range<u64>) -> Vec<MapPiece> {
        let mut pieces = Vec::new();
        let mut at = range.start;
        for (mapped, place) in self.places.overlay(range.clone()) {
            self.push_gap(at..mapped.start, &mut pieces);
            at = mapped.end;
            pieces.push(MapPiece { range: mapped, source: MapSource::Place(place) });
        }
        self.push_gap(at..range.end, &mut pieces);
        pieces
    }

    fn push_gap(&self, gap: Range<u64>, pieces: &mut Vec<MapPiece>) {
        for (range, known) in self.by_chunk(gap) {
            let source = if known { MapSource::Place(Place::Hole) } else { MapSource::Unknown };
            pieces.push(MapPiece { range, source });
        }
    }

    /// Divides `range` into runs of known and of unknown chunks.
    fn by_chunk(&self, range: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let mut runs: Vec<(Range<u64>, bool)> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let chunk = at / CHUNK_BYTES;
            let known = self.is_known(chunk);
            let end = if chunk >= self.known_from { u64::MAX } else { chunk_range(chunk).end };
            let end = end.min(range.end);
            match runs.last_mut() {
                Some((run, run_known)) if *run_known == known => run.end = end,
                _ => runs.push((at..end, known)),
            }
            at = end;
        }
        runs
    }

    /// The first byte at or after `offset` and before `size` that lies in a block, or that may:
    /// `Err` is the chunk that must be fetched to know.
    pub fn next_data(&self, offset: u64, size: u64) -> Result<Option<u64>, u64> {
        let in_block = |place: &Place| matches!(place, Place::Block { .. });
        let mapped = self.places.next_at(offset, in_block).filter(|at| *at < size);
        let until = mapped.unwrap_or(size);
        for gap in self.places.gaps(offset..until.max(offset)) {
            if let Some((range, _)) = self.by_chunk(gap).into_iter().find(|(_, known)| !known) {
                return Err(range.start / CHUNK_BYTES);
            }
        }
        Ok(mapped)
    }

    /// Where the block's piece that covers `offset` ends; `None` for none. `Err` is the chunk that
    /// must be fetched to know.
    pub fn data_end(&self, offset: u64) -> Result<Option<u64>, u64> {
        match self.places.at(offset) {
            Some((end, Place::Block { .. })) => Ok(Some(end)),
            Some((_, Place::Zero | Place::Hole)) => Ok(None),
            None if self.is_known(offset / CHUNK_BYTES) => Ok(None),
            None => Err(offset / CHUNK_BYTES),
        }
    }
}

fn chunk_range(chunk: u64) -> Range<u64> {
    let start = chunk.saturating_mul(CHUNK_BYTES);
    start..start.saturating_add(CHUNK_BYTES)
}
