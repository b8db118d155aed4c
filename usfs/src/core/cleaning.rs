//! Blocks of which little lives: the directory names them, and what files refer to of them is written
//! anew, so that they die.
//!
//! It is one mount's own change of its files, under their EXCLUSIVE leases: what is newer stays, and what
//! changes meanwhile is left out. An order may be forgotten at any time; the directory gives it again.

use std::collections::HashSet;
use std::ops::Range;

use us_core::ids::{BlockId, Ino};
use us_core::limits::CHUNK_BYTES;
use us_proto::v1;

use super::crowding::{chunk_range, need_chunk};
use super::{Core, Level, Now, Rewrite, Stop};
use crate::data::{MapSource, Place};

/// What the directory asks to be written anew.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleaning {
    /// The blocks that are to die.
    pub blocks: HashSet<BlockId>,
    /// The chunks of files that refer to them.
    pub chunks: Vec<(Ino, u64)>,
}

impl Cleaning {
    pub(super) fn from_proto(order: &v1::CleanBlocks) -> Self {
        let blocks = order.blocks.iter().filter_map(|id| BlockId::from_slice(id)).collect();
        let known = |chunk: &&v1::CleanedChunk| chunk.chunk < u64::MAX / CHUNK_BYTES;
        let chunks = order.chunks.iter().filter(known);
        Self { blocks, chunks: chunks.map(|chunk| (Ino(chunk.ino), chunk.chunk)).collect() }
    }
}

impl Core {
    /// What is to be cleaned now.
    pub fn take_cleaning(&mut self) -> Option<Cleaning> {
        self.dirty.cleaning.take()
    }

    /// What a chunk of a file refers to of these blocks.
    pub fn plan_cleaning(
        &mut self,
        now: Now,
        (ino, chunk): (Ino, u64),
        blocks: &HashSet<BlockId>,
    ) -> Result<Vec<Rewrite>, Stop> {
        self.check_change(now)?;
        self.need_file(ino, Level::Exclusive)?;
        let data = self.nodes.get(&ino).and_then(|node| node.data.as_deref());
        if let Some(data) = data {
            need_chunk(data, ino, chunk)?;
        }
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for piece in data.map(|data| data.map().lookup(chunk_range(chunk))).unwrap_or_default() {
            match piece.source {
                MapSource::Place(Place::Block { block, .. }) if blocks.contains(&block) => {}
                _ => continue,
            }
            match ranges.last_mut() {
                Some(last) if last.end == piece.range.start => last.end = piece.range.end,
                _ => ranges.push(piece.range),
            }
        }
        Ok(ranges.into_iter().filter_map(|range| self.plan_range(ino, range)).collect())
    }
}
