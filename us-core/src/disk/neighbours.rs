//! What a read of a small file brings along: pure.
//!
//! Small files share blocks with those that were written at the same time, which are those of the same
//! directory as a rule. Who reads one of them reads the next; but each is opened and read for itself,
//! so that nothing seen of one file tells what to fetch. Seen of the block it does: a read that misses
//! right behind what the last miss brought brings twice as much along, one anywhere else starts anew.

use std::collections::VecDeque;

use crate::ids::BlockId;

/// What the first miss in a block brings along.
const FIRST_BYTES: usize = 32 << 10;
/// The most one brings along.
const MOST_BYTES: usize = 1 << 20;
/// Pages that a reader may leave out, and still goes on.
const GAP_PAGES: usize = 2;
/// Blocks remembered: readers of so many places in turn do not disturb one another.
const BLOCKS_MAX: usize = 32;

/// What misses bring along, by block.
#[derive(Debug, Default)]
pub(super) struct Neighbours {
    /// The block of the latest miss first.
    recent: VecDeque<Run>,
}

/// What the last miss in a block brought.
#[derive(Clone, Copy, Debug)]
struct Run {
    block: BlockId,
    bytes: usize,
    /// The page behind it.
    end: usize,
}

impl Neighbours {
    /// A small file's bytes in this page must be fetched: how many bytes to fetch around them.
    pub fn missed(&mut self, block: BlockId, page: usize) -> usize {
        let known = self.recent.iter().position(|recent| recent.block == block);
        let known = known.and_then(|at| self.recent.remove(at));
        let goes_on = |run: &Run| (run.end..=run.end + GAP_PAGES).contains(&page);
        let known = known.filter(goes_on);
        let bytes = known.map_or(FIRST_BYTES, |run| (2 * run.bytes).min(MOST_BYTES));
        self.recent.push_front(Run { block, bytes, end: page + 1 });
        self.recent.truncate(BLOCKS_MAX);
        bytes
    }

    /// What the last miss brought ends before this page.
    pub fn brought(&mut self, block: BlockId, end: usize) {
        if let Some(run) = self.recent.front_mut().filter(|run| run.block == block) {
            run.end = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(number: u8) -> BlockId {
        BlockId::from_bytes([number; 16])
    }

    #[test]
    fn who_goes_on_in_a_block_gets_ever_more_of_it_and_who_jumps_does_not() {
        let mut neighbours = Neighbours::default();
        let mut page = 0;
        let mut goes_on = |neighbours: &mut Neighbours| {
            let bytes = neighbours.missed(block(1), page);
            page += bytes >> 14;
            neighbours.brought(block(1), page);
            bytes >> 10
        };
        let bytes: Vec<usize> = (0..8).map(|_| goes_on(&mut neighbours)).collect();
        assert_eq!(bytes, [32, 64, 128, 256, 512, 1024, 1024, 1024]);
        for page in [700, 20, 400, 90, 3] {
            assert_eq!(neighbours.missed(block(1), page), FIRST_BYTES);
        }
    }

    #[test]
    fn many_readers_in_turn_are_each_known_and_the_oldest_is_forgotten() {
        let mut neighbours = Neighbours::default();
        for round in 0..3 {
            let bytes: Vec<usize> = (0..32).map(|at| neighbours.missed(block(at), round)).collect();
            assert_eq!(bytes, [FIRST_BYTES << round; 32]);
        }
        neighbours.missed(block(32), 0);
        assert_eq!(neighbours.missed(block(31), 3), FIRST_BYTES << 3, "still known");
        assert_eq!(neighbours.missed(block(0), 3), FIRST_BYTES, "the oldest is not");
    }
}
