//! Small data that an fsync put into the directory's log, until it is stored like all other.
//!
//! A block of fragments for every fsync of a page would cost each provider a sync, so little data
//! travels *inline*. The directory is no place to stay: what is neither overwritten nor deleted soon
//! is *packed*, which is read back, made dirty, and stored in blocks by the background.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::time::Duration;

use us_core::ids::Ino;
use us_core::limits::CHUNK_BYTES;

use super::{Core, Now, Rewrite};
use crate::data::{Extent, MapSource, Place};

/// A file with so much inline data is packed even while more comes.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Else it is packed when nothing came for this time.
const LEFT_ALONE: Duration = Duration::from_secs(30);
/// About the most that is packed at once.
const PACKED_BYTES_MAX: u64 = 16 << 20;

/// What lies inline of one file, as far as this mount put it there.
#[derive(Debug, Default)]
struct Note {
    /// Since it was packed; what was overwritten counts.
    bytes: u64,
    /// Of them those that are being packed.
    packing: u64,
    chunks: BTreeSet<u64>,
    last: Duration,
    /// Not tried before: what could not be packed is tried again later.
    not_before: Duration,
}

impl Note {
    fn due(&self) -> Duration {
        let at = if self.bytes >= FILE_BYTES_MAX { Duration::ZERO } else { self.last + LEFT_ALONE };
        at.max(self.not_before)
    }
}

/// The files with inline data.
#[derive(Debug, Default)]
pub(super) struct Inlined {
    files: HashMap<Ino, Note>,
    bytes: u64,
    /// No file is due before.
    earliest: Duration,
}

impl Inlined {
    /// At most so many bytes lie inline.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// These extents of a file were committed inline.
    pub fn note(&mut self, now: Now, ino: Ino, extents: &[Extent]) {
        let bytes = extents.iter().map(|extent| extent.bytes).sum::<u64>();
        let note = self.files.entry(ino).or_default();
        note.bytes += bytes;
        note.last = now.boot;
        note.chunks.extend(extents.iter().map(|extent| extent.offset / CHUNK_BYTES));
        let due = note.due();
        self.bytes += bytes;
        self.earliest = if self.files.len() == 1 { due } else { self.earliest.min(due) };
    }

    /// The file is gone.
    pub fn forget(&mut self, ino: Ino) {
        let note = self.files.remove(&ino).unwrap_or_default();
        self.bytes -= note.bytes;
    }

    /// The files that are due, as many as make a few blocks; they are not due again for a while.
    fn take_due(&mut self, now: Now) -> Vec<Ino> {
        if self.files.is_empty() || now.boot < self.earliest {
            return Vec::new();
        }
        let (mut left, mut taken) = (PACKED_BYTES_MAX, Vec::new());
        let mut earliest = Duration::MAX;
        for (ino, note) in &mut self.files {
            if note.due() <= now.boot && left > 0 {
                left = left.saturating_sub(note.bytes);
                (note.packing, note.not_before) = (note.bytes, now.boot + LEFT_ALONE);
                taken.push(*ino);
            }
            earliest = earliest.min(note.due());
        }
        self.earliest = earliest;
        taken
    }

    /// All of the file that was being packed is dirty now.
    fn packed(&mut self, ino: Ino) {
        let Some(note) = self.files.get_mut(&ino) else { return };
        let packed = std::mem::take(&mut note.packing);
        note.bytes -= packed;
        note.not_before = Duration::ZERO;
        self.bytes -= packed;
        if note.bytes == 0 {
            self.files.remove(&ino);
        }
    }
}

/// What is to be packed of one file.
#[derive(Debug)]
pub struct Packing {
    /// The file.
    pub ino: Ino,
    /// Its parts.
    pub parts: Vec<Rewrite>,
}

impl Core {
    /// What should be packed now.
    pub fn take_packed(&mut self, now: Now) -> Vec<Packing> {
        let due = self.dirty.inlined.take_due(now);
        due.into_iter().filter_map(|ino| self.plan_packing(ino)).collect()
    }

    /// When the next file should be packed, or later.
    pub fn next_packed_at(&self) -> Option<Duration> {
        let inlined = &self.dirty.inlined;
        (!inlined.files.is_empty()).then_some(inlined.earliest)
    }

    /// Every part of the packing was read and made dirty.
    pub fn packed(&mut self, ino: Ino) {
        self.dirty.inlined.packed(ino);
    }

    /// What of a file lies inline; `None` where somebody else may change it meanwhile, or it is not
    /// known: it stays where it is until the next time.
    fn plan_packing(&mut self, ino: Ino) -> Option<Packing> {
        let note = self.dirty.inlined.files.get(&ino)?;
        let data = self.nodes.get(&ino)?.data.as_deref()?;
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for chunk in &note.chunks {
            let whole = chunk * CHUNK_BYTES..(chunk + 1) * CHUNK_BYTES;
            for piece in data.map().lookup(whole) {
                let MapSource::Place(Place::Block { block, .. }) = piece.source else { continue };
                let inline = self.blocks.get(&block).is_some_and(|info| info.inline.is_some());
                if !inline {
                    continue;
                }
                match ranges.last_mut() {
                    Some(last) if last.end == piece.range.start => last.end = piece.range.end,
                    _ => ranges.push(piece.range),
                }
            }
        }
        let parts: Option<Vec<Rewrite>> =
            ranges.into_iter().map(|range| self.plan_range(ino, range)).collect();
        parts.map(|parts| Packing { ino, parts })
    }
}
