//! Chunks of maps with many extents. A chunk can have 1,024; small writes that are flushed one by one
//! (a log with an fsync a line) get there. Such a chunk is *written anew*: its bytes are read, made
//! dirty where nothing newer is, and stored as one run.
//!
//! Invariant: no mutation in the log takes a chunk beyond [`CHUNK_EXTENTS_MAX`]: the directory would
//! end the session.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use us_core::ids::Ino;
use us_core::limits::{CHUNK_BYTES, CHUNK_EXTENTS_MAX};

use super::{Core, Now, ReadPiece, Stall, Stop};
use crate::data::{Extent, FileData, MapSource, Place, Ticket};
use crate::fs::FsError;

/// The most extents a commit of blocks may leave a chunk with.
const COMMITTED_EXTENTS_MAX: usize = CHUNK_EXTENTS_MAX - 24;
/// The most that allocating, punching and cloning may: a commit of blocks must find room behind them.
const PLACED_EXTENTS_MAX: usize = 900;
/// From here on it is written anew in the background, once it is left alone.
const CHUNK_EXTENTS_MANY: usize = 500;
/// From here on it is written anew at once: it will be full soon.
const CHUNK_EXTENTS_TOO_MANY: usize = 980;
/// Left alone: nothing of it was stored in this time. Random writes of 4 KiB would else have every
/// chunk that they touch read and written whole while they last.
const LEFT_ALONE: Duration = Duration::from_secs(10);

/// A range of a file to write anew: a chunk, or what lies inline.
#[derive(Clone, Debug)]
pub struct Rewrite {
    /// The file.
    pub ino: Ino,
    /// The range, as far as the file goes.
    pub range: Range<u64>,
    /// What they are now.
    pub pieces: Vec<ReadPiece>,
}

impl Core {
    /// Stalls an operation that puts `pieces` (in order) into a file until there is room for them.
    pub(super) fn check_crowding(&self, ino: Ino, pieces: &[Range<u64>]) -> Result<(), Stop> {
        let Some(data) = self.nodes.get(&ino).and_then(|node| node.data.as_deref()) else {
            return Ok(());
        };
        for (chunk, parts) in partly_covered(pieces.iter().cloned()) {
            need_chunk(data, ino, chunk)?;
            if extents_after(data, chunk, &parts) > PLACED_EXTENTS_MAX {
                return Err(self.tidy_up(ino, data, chunk));
            }
        }
        Ok(())
    }

    /// Where a clone that puts `extents` (in order, without gaps) into a file must end so that no
    /// chunk gets too many. Stalls where there is no room for the first of them.
    pub(super) fn clone_end(&self, ino: Ino, extents: &[Extent]) -> Result<u64, Stop> {
        let (Some(first), Some(last)) = (extents.first(), extents.last()) else { return Ok(0) };
        let Some(data) = self.nodes.get(&ino).and_then(|node| node.data.as_deref()) else {
            return Err(FsError::Stale(ino).into());
        };
        for (chunk, mut parts) in partly_covered(extents.iter().map(Extent::range)) {
            need_chunk(data, ino, chunk)?;
            if extents_after(data, chunk, &parts) <= PLACED_EXTENTS_MAX {
                continue;
            }
            if parts[0].start > first.offset {
                return Ok(parts[0].start);
            }
            while parts.len() > 1 && extents_after(data, chunk, &parts) > PLACED_EXTENTS_MAX {
                parts.truncate(parts.len() / 2);
            }
            if extents_after(data, chunk, &parts) > PLACED_EXTENTS_MAX {
                return Err(self.tidy_up(ino, data, chunk));
            }
            return Ok(parts[parts.len() - 1].end);
        }
        Ok(last.range().end)
    }

    /// Why an operation cannot go on in a crowded chunk: it must be written anew first, where that
    /// makes room. Only what lies in the file can be written anew.
    fn tidy_up(&self, ino: Ino, data: &FileData, chunk: u64) -> Stop {
        let attributes = self.nodes.get(&ino).and_then(|node| node.attributes);
        let size = attributes.map_or(0, |attributes| attributes.size);
        let whole = chunk_range(chunk);
        if extents_in(data, whole.start..whole.end.min(size)) < CHUNK_EXTENTS_MANY / 2 {
            return FsError::NotSupported.into();
        }
        Stop::Stall(Stall::Compact(ino, chunk))
    }

    /// Whether the commit of `ticket` would overfill a chunk of `ino`: then its bytes are dirty
    /// again, and the chunk is to be written anew first.
    pub(super) fn postpone_crowded(&mut self, now: Now, ticket: Ticket, ino: Ino) -> bool {
        let Some(node) = self.nodes.get_mut(&ino) else { return false };
        let Some(data) = node.data.as_deref_mut() else { return false };
        // All of the ticket's pieces, those too that newer ones hide: they are what is committed.
        let full: Vec<u64> = partly_covered(data.in_flight().ranges(ticket))
            .into_iter()
            .filter(|(chunk, parts)| extents_after(data, *chunk, parts) > COMMITTED_EXTENTS_MAX)
            .map(|(chunk, _)| chunk)
            .collect();
        if full.is_empty() {
            return false;
        }
        data.abort(ticket);
        node.postponed += 1;
        self.dirty.crowded.extend(full.into_iter().map(|chunk| ((ino, chunk), Duration::ZERO)));
        self.note_dirty(now, ino);
        true
    }

    /// Notes chunks that these extents (in order) have made crowded.
    pub(super) fn note_crowded(&mut self, now: Now, ino: Ino, extents: &[Extent]) {
        let Some(data) = self.nodes.get(&ino).and_then(|node| node.data.as_deref()) else { return };
        let mut seen = None;
        for chunk in extents.iter().map(|extent| extent.offset / CHUNK_BYTES) {
            if seen.replace(chunk) == Some(chunk) {
                continue;
            }
            let due = match extents_in(data, chunk_range(chunk)) {
                0..=CHUNK_EXTENTS_MANY => continue,
                CHUNK_EXTENTS_TOO_MANY.. => Duration::ZERO,
                _ => now.boot + LEFT_ALONE,
            };
            let noted = self.dirty.crowded.entry((ino, chunk)).or_insert(due);
            // Where somebody waits for it, it stays due.
            if !noted.is_zero() {
                *noted = due;
            }
        }
    }

    /// Takes a chunk that should be written anew now, if there is one.
    pub fn take_crowded(&mut self, now: Now) -> Option<(Ino, u64)> {
        let due = self.dirty.crowded.iter().find(|(_, due)| **due <= now.boot);
        let chunk = due.map(|(chunk, _)| *chunk)?;
        self.dirty.crowded.remove(&chunk);
        Some(chunk)
    }

    /// When the next chunk should be written anew.
    pub fn next_crowded_at(&self) -> Option<Duration> {
        self.dirty.crowded.values().min().copied()
    }

    /// Whether a chunk of `ino` must be written anew before more of it is stored.
    pub fn take_crowded_of(&mut self, ino: Ino) -> Option<u64> {
        let of_ino = |(chunk, due): &(&(Ino, u64), &Duration)| chunk.0 == ino && due.is_zero();
        let chunk = self.dirty.crowded.iter().find(of_ino).map(|(chunk, _)| *chunk)?;
        self.dirty.crowded.remove(&chunk);
        Some(chunk.1)
    }

    /// How often bytes of `ino` that were stored became dirty again, because of a crowded chunk. Who
    /// waits for bytes that were sealed since the count was the same has them committed.
    pub fn postponed(&self, ino: Ino) -> u64 {
        self.nodes.get(&ino).map_or(0, |node| node.postponed)
    }

    /// What a chunk holds now, for writing it anew; `None` where that makes no sense any more.
    pub fn plan_rewrite(&mut self, ino: Ino, chunk: u64) -> Option<Rewrite> {
        self.plan_range(ino, chunk_range(chunk))
    }

    /// What a range of a file holds now, as far as the file goes.
    pub(super) fn plan_range(&mut self, ino: Ino, range: Range<u64>) -> Option<Rewrite> {
        let node = self.nodes.get(&ino)?;
        let size = node.attributes?.size;
        let exclusive = node.lease.level == super::Level::Exclusive;
        let range = range.start..range.end.min(size);
        if !exclusive || range.is_empty() {
            return None;
        }
        let pieces = self.plan(ino, range.clone(), size).ok()?;
        Some(Rewrite { ino, range, pieces })
    }

    /// The range's bytes were read as `rewrite` planned: they become dirty where nothing newer is.
    /// Does nothing, and answers `false`, where the file has changed meanwhile.
    pub fn rewrite(&mut self, now: Now, rewrite: &Rewrite, content: &Bytes) -> bool {
        let same = self.plan_range(rewrite.ino, rewrite.range.clone()).is_some_and(|now| {
            now.range == rewrite.range && same_places(&now.pieces, &rewrite.pieces)
        });
        if !same {
            return false;
        }
        let node = self.nodes.get_mut(&rewrite.ino);
        if let Some(data) = node.and_then(|node| node.data.as_deref_mut()) {
            for gap in data.dirty().gaps(rewrite.range.clone()) {
                let from = (gap.start - rewrite.range.start) as usize;
                let to = (gap.end - rewrite.range.start) as usize;
                data.write(gap.start, &content[from..to]);
            }
        }
        self.note_dirty(now, rewrite.ino);
        true
    }
}

/// The chunks that `pieces` (in order) cover in part, each with the parts of it that are covered. A
/// chunk within a piece has one extent afterwards, whatever it had before.
fn partly_covered(pieces: impl Iterator<Item = Range<u64>>) -> BTreeMap<u64, Vec<Range<u64>>> {
    let mut parts = BTreeMap::<u64, Vec<Range<u64>>>::new();
    for piece in pieces.filter(|piece| !piece.is_empty()) {
        let (first, last) = (piece.start / CHUNK_BYTES, (piece.end - 1) / CHUNK_BYTES);
        for chunk in [Some(first), (last > first).then_some(last)].into_iter().flatten() {
            let whole = chunk_range(chunk);
            let part = piece.start.max(whole.start)..piece.end.min(whole.end);
            parts.entry(chunk).or_default().push(part);
        }
    }
    parts
}

pub(super) fn need_chunk(data: &FileData, ino: Ino, chunk: u64) -> Result<(), Stop> {
    if data.map().is_known(chunk) {
        return Ok(());
    }
    Err(super::files::want_map(ino, chunk..chunk + 1))
}

pub(super) fn chunk_range(chunk: u64) -> Range<u64> {
    chunk * CHUNK_BYTES..(chunk + 1) * CHUNK_BYTES
}

/// Extents of a range, as far as they are known.
fn extents_in(data: &FileData, range: Range<u64>) -> usize {
    let hole = MapSource::Place(Place::Hole);
    data.map().lookup(range).iter().filter(|piece| piece.source != hole).count()
}

/// Extents of a chunk when `pieces` (in order) will have been written over it: at most this many.
fn extents_after(data: &FileData, chunk: u64, pieces: &[Range<u64>]) -> usize {
    let whole = chunk_range(chunk);
    let mut extents = pieces.len();
    let mut at = whole.start;
    for piece in pieces {
        if at < piece.start {
            extents += extents_in(data, at..piece.start);
        }
        at = piece.end;
    }
    if at < whole.end {
        extents += extents_in(data, at..whole.end);
    }
    extents
}

fn same_places(left: &[ReadPiece], right: &[ReadPiece]) -> bool {
    left.len() == right.len()
        && left.iter().zip(right).all(|(left, right)| match (left, right) {
            (ReadPiece::Bytes(left), ReadPiece::Bytes(right)) => left == right,
            (ReadPiece::Zero(left), ReadPiece::Zero(right)) => left == right,
            (
                ReadPiece::Block { block: left, range: at, .. },
                ReadPiece::Block { block: right, range: there, .. },
            ) => left == right && at == there,
            _ => false,
        })
}
