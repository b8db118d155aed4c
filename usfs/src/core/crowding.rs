//! Chunks of maps with many extents. A chunk can have 1,024; small writes that are flushed one by one
//! (a log with an fsync a line) get there. Such a chunk is *written anew*: its bytes are read, made
//! dirty where nothing newer is, and stored as one run.
//!
//! Invariant: no mutation in the log takes a chunk beyond [`CHUNK_EXTENTS_MAX`]: the directory would
//! end the session.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use us_core::ids::Ino;
use us_core::limits::{CHUNK_BYTES, CHUNK_EXTENTS_MAX};

use super::{Core, Now, ReadPiece, Stall, Stop};
use crate::data::{Extent, FileData, MapSource, Place, Ticket};
use crate::fs::FsError;

/// The most extents a commit of blocks may leave a chunk with.
const COMMITTED_EXTENTS_MAX: usize = CHUNK_EXTENTS_MAX - 24;
/// From here on it is written anew in the background.
const CHUNK_EXTENTS_MANY: usize = 500;

/// A chunk to write anew.
#[derive(Clone, Debug)]
pub struct Rewrite {
    /// The file.
    pub ino: Ino,
    /// The bytes of the chunk that the file has.
    pub range: Range<u64>,
    /// What they are now.
    pub pieces: Vec<ReadPiece>,
}

impl Core {
    /// Stalls an operation that puts `extents` extents into `range` until there is room for them.
    pub(super) fn check_crowding(
        &self,
        ino: Ino,
        range: Range<u64>,
        extents: usize,
    ) -> Result<(), Stop> {
        let Some(data) = self.nodes.get(&ino).and_then(|node| node.data.as_deref()) else {
            return Ok(());
        };
        // The chunks between are wholly replaced: only those at the ends keep what they have.
        for chunk in [range.start / CHUNK_BYTES, range.end.saturating_sub(1) / CHUNK_BYTES] {
            if !data.map().is_known(chunk) {
                return Err(super::files::want_map(ino, chunk..chunk + 1));
            }
            let there = extents_in(data, chunk_range(chunk));
            if there + extents + 1 > COMMITTED_EXTENTS_MAX {
                if there < CHUNK_EXTENTS_MANY {
                    return Err(FsError::NotSupported.into());
                }
                return Err(Stop::Stall(Stall::Compact(ino, chunk)));
            }
        }
        Ok(())
    }

    /// Whether the commit of `ticket` would overfill a chunk of `ino`: then its bytes are dirty
    /// again, and the chunk is to be written anew first.
    pub(super) fn postpone_crowded(&mut self, now: Now, ticket: Ticket, ino: Ino) -> bool {
        let Some(node) = self.nodes.get_mut(&ino) else { return false };
        let Some(data) = node.data.as_deref_mut() else { return false };
        let mut flying = BTreeMap::<u64, Vec<Range<u64>>>::new();
        for (offset, bytes) in data.in_flight().overlay(0..u64::MAX, None) {
            let end = offset + bytes.len() as u64;
            for chunk in offset / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES) {
                let whole = chunk_range(chunk);
                let part = offset.max(whole.start)..end.min(whole.end);
                flying.entry(chunk).or_default().push(part);
            }
        }
        let full: Vec<u64> = flying
            .iter()
            .filter(|(chunk, pieces)| extents_after(data, **chunk, pieces) > COMMITTED_EXTENTS_MAX)
            .map(|(chunk, _)| *chunk)
            .collect();
        if full.is_empty() {
            return false;
        }
        data.abort(ticket);
        node.postponed = true;
        self.dirty.crowded.extend(full.into_iter().map(|chunk| (ino, chunk)));
        self.note_dirty(now, ino);
        true
    }

    /// Notes chunks that these extents have made crowded.
    pub(super) fn note_crowded(&mut self, ino: Ino, extents: &[Extent]) {
        let Some(data) = self.nodes.get(&ino).and_then(|node| node.data.as_deref()) else { return };
        for extent in extents {
            let chunk = extent.offset / CHUNK_BYTES;
            if extents_in(data, chunk_range(chunk)) > CHUNK_EXTENTS_MANY {
                self.dirty.crowded.insert((ino, chunk));
            }
        }
    }

    /// Takes a chunk that should be written anew, if there is one.
    pub fn take_crowded(&mut self) -> Option<(Ino, u64)> {
        let next = *self.dirty.crowded.iter().next()?;
        self.dirty.crowded.remove(&next);
        Some(next)
    }

    /// Whether a chunk of `ino` must be written anew before more of it is stored.
    pub fn take_crowded_of(&mut self, ino: Ino) -> Option<u64> {
        let found = self.dirty.crowded.iter().find(|(other, _)| *other == ino).copied()?;
        self.dirty.crowded.remove(&found);
        Some(found.1)
    }

    /// Whether bytes of `ino` that were stored are dirty again, because of a crowded chunk.
    pub fn is_postponed(&self, ino: Ino) -> bool {
        self.nodes.get(&ino).is_some_and(|node| node.postponed)
    }

    /// What a chunk holds now, for writing it anew; `None` where that makes no sense any more.
    pub fn plan_rewrite(&mut self, ino: Ino, chunk: u64) -> Option<Rewrite> {
        let node = self.nodes.get(&ino)?;
        let size = node.attributes?.size;
        let exclusive = node.lease.level == super::Level::Exclusive;
        let range = chunk * CHUNK_BYTES..((chunk + 1) * CHUNK_BYTES).min(size);
        if !exclusive || range.is_empty() {
            return None;
        }
        let pieces = self.plan(ino, range.clone(), size).ok()?;
        Some(Rewrite { ino, range, pieces })
    }

    /// The chunk's bytes were read as `rewrite` planned: they become dirty where nothing newer is.
    /// Does nothing, and answers `false`, where the file has changed meanwhile.
    pub fn rewrite(&mut self, now: Now, rewrite: &Rewrite, content: &Bytes) -> bool {
        let chunk = rewrite.range.start / CHUNK_BYTES;
        let same = self.plan_rewrite(rewrite.ino, chunk).is_some_and(|now| {
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

fn chunk_range(chunk: u64) -> Range<u64> {
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
