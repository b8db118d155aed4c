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
    chunks: BTreeSet<u64>,
    last: Duration,
}

impl Note {
    fn due(&self) -> Duration {
        if self.bytes >= FILE_BYTES_MAX { Duration::ZERO } else { self.last + LEFT_ALONE }
    }
}

/// The files with inline data.
#[derive(Debug, Default)]
pub(super) struct Inlined {
    files: HashMap<Ino, Note>,
    bytes: u64,
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
        self.bytes += bytes;
    }

    /// The file is gone, or is to be packed.
    pub fn forget(&mut self, ino: Ino) -> BTreeSet<u64> {
        let note = self.files.remove(&ino).unwrap_or_default();
        self.bytes -= note.bytes;
        note.chunks
    }
}

impl Core {
    /// What should be packed now, of as many files as make a few blocks.
    pub fn take_packed(&mut self, now: Now) -> Vec<Rewrite> {
        let due = self.dirty.inlined.files.iter().filter(|(_, note)| note.due() <= now.boot);
        let mut left = PACKED_BYTES_MAX;
        let within = |(_, note): &(&Ino, &Note)| {
            let fits = left > 0;
            left = left.saturating_sub(note.bytes);
            fits
        };
        let files: Vec<Ino> = due.take_while(within).map(|(ino, _)| *ino).collect();
        files.into_iter().flat_map(|ino| self.plan_packing(ino)).collect()
    }

    /// When the next file should be packed.
    pub fn next_packed_at(&self) -> Option<Duration> {
        self.dirty.inlined.files.values().map(Note::due).min()
    }

    /// Plans the packing of a file: what of it lies inline. Nothing where somebody else may change it
    /// meanwhile: it stays where it is then.
    fn plan_packing(&mut self, ino: Ino) -> Vec<Rewrite> {
        let chunks = self.dirty.inlined.forget(ino);
        let Some(data) = self.nodes.get(&ino).and_then(|node| node.data.as_deref()) else {
            return Vec::new();
        };
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for chunk in chunks {
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
        ranges.into_iter().filter_map(|range| self.plan_range(ino, range)).collect()
    }
}
