//! What a read of a small file brings along: pure.
//!
//! Small files share blocks with those that were written at the same time, which are those of the same
//! directory as a rule. Who reads one of them reads the next; but each is opened and read for itself,
//! so that nothing seen of one file tells what to fetch. Seen of the block it does: every read that
//! misses again in a block brings twice as much along, until it brings fragments whole.

use std::collections::VecDeque;

use crate::ids::BlockId;

/// What the first miss in a block brings along.
const FIRST_BYTES: usize = 32 << 10;
/// The most one brings along.
const MOST_BYTES: usize = 1 << 20;
/// Blocks remembered: readers of so many places in turn do not disturb one another.
const BLOCKS_MAX: usize = 32;

/// How much further misses bring along, by block.
#[derive(Debug, Default)]
pub(super) struct Neighbours {
    /// The block of the latest miss first.
    recent: VecDeque<(BlockId, usize)>,
}

impl Neighbours {
    /// A small file's bytes in `block` must be fetched: how many bytes to fetch around them.
    pub fn missed(&mut self, block: BlockId) -> usize {
        let known = self.recent.iter().position(|(recent, _)| *recent == block);
        let known = known.and_then(|at| self.recent.remove(at));
        let bytes = known.map_or(FIRST_BYTES, |(_, last)| (2 * last).min(MOST_BYTES));
        self.recent.push_front((block, bytes));
        self.recent.truncate(BLOCKS_MAX);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(number: u8) -> BlockId {
        BlockId::from_bytes([number; 16])
    }

    #[test]
    fn who_goes_on_in_a_block_gets_ever_more_of_it() {
        let mut neighbours = Neighbours::default();
        let bytes: Vec<usize> = (0..8).map(|_| neighbours.missed(block(1)) >> 10).collect();
        assert_eq!(bytes, [32, 64, 128, 256, 512, 1024, 1024, 1024]);
    }

    #[test]
    fn many_readers_in_turn_are_each_known_and_the_oldest_is_forgotten() {
        let mut neighbours = Neighbours::default();
        for round in 0..3 {
            let bytes: Vec<usize> = (0..32).map(|at| neighbours.missed(block(at))).collect();
            assert_eq!(bytes, [FIRST_BYTES << round; 32]);
        }
        neighbours.missed(block(32));
        assert_eq!(neighbours.missed(block(31)), FIRST_BYTES << 3, "still known");
        assert_eq!(neighbours.missed(block(0)), FIRST_BYTES, "the oldest is not");
    }
}
