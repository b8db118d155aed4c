//! Blocks that wait for repair, the most endangered first: pure.

use std::collections::{BTreeSet, HashMap};

use us_core::ids::{BlockId, VolumeId};

/// A block of a volume.
pub type BlockKey = (VolumeId, BlockId);

/// Blocks that may wait at once. Beyond it the least urgent are dropped, and found again by a scan
/// when there is room.
pub const QUEUE_MAX: usize = 1 << 20;

/// The queue. A block is in it once, or set aside, or not known.
#[derive(Debug, Default)]
pub struct Queue {
    order: BTreeSet<(u64, VolumeId, BlockId)>,
    ranks: HashMap<BlockKey, u64>,
    /// Not enough of their fragments can be read now: tried again when a provider comes back.
    aside: HashMap<BlockKey, u64>,
    dropped: bool,
}

impl Queue {
    /// Puts a block where `rank_s` says, wherever it was before.
    pub fn put(&mut self, key: BlockKey, rank_s: u64) {
        self.aside.remove(&key);
        if let Some(old) = self.ranks.insert(key, rank_s) {
            self.order.remove(&(old, key.0, key.1));
        }
        self.order.insert((rank_s, key.0, key.1));
        while self.order.len() > QUEUE_MAX {
            let Some((_, volume, block)) = self.order.pop_last() else { break };
            self.ranks.remove(&(volume, block));
            self.dropped = true;
        }
    }

    /// Sets a block aside until [`Queue::try_again`].
    pub fn set_aside(&mut self, key: BlockKey, rank_s: u64) {
        self.remove(&key);
        if self.aside.len() < QUEUE_MAX {
            self.aside.insert(key, rank_s);
        } else {
            self.dropped = true;
        }
    }

    /// The block needs nothing, or is gone.
    pub fn remove(&mut self, key: &BlockKey) {
        self.aside.remove(key);
        if let Some(rank) = self.ranks.remove(key) {
            self.order.remove(&(rank, key.0, key.1));
        }
    }

    /// Whether the block waits.
    pub fn contains(&self, key: &BlockKey) -> bool {
        self.ranks.contains_key(key) || self.aside.contains_key(key)
    }

    /// What was set aside waits again.
    pub fn try_again(&mut self) {
        for (key, rank_s) in std::mem::take(&mut self.aside) {
            self.put(key, rank_s);
        }
    }

    /// The first `limit` blocks, the most endangered first.
    pub fn first(&self, limit: usize) -> impl Iterator<Item = (u64, BlockKey)> + '_ {
        self.order.iter().take(limit).map(|(rank, volume, block)| (*rank, (*volume, *block)))
    }

    /// Whether no block waits that can be repaired.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Blocks that wait and can be repaired.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Blocks that wait for providers to come back.
    pub fn aside(&self) -> usize {
        self.aside.len()
    }

    /// Blocks ranked below `rank_s`, counted up to `limit`.
    pub fn count_below(&self, rank_s: u64, limit: usize) -> usize {
        self.order.iter().take(limit).take_while(|(rank, ..)| *rank < rank_s).count()
    }

    /// Whether blocks were dropped and there is room for them again; asked once.
    pub fn take_dropped(&mut self) -> bool {
        self.order.len() < QUEUE_MAX / 2 && std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: u8) -> BlockKey {
        (VolumeId::from_bytes([1; 16]), BlockId::from_bytes([id; 16]))
    }

    fn ids(queue: &Queue) -> Vec<u8> {
        queue.first(10).map(|(_, (_, block))| block.as_bytes()[0]).collect()
    }

    #[test]
    fn the_most_endangered_come_first_and_nobody_twice() {
        let mut queue = Queue::default();
        queue.put(key(1), 50);
        queue.put(key(2), 10);
        queue.put(key(1), 5);
        assert_eq!((ids(&queue), queue.len()), (vec![1, 2], 2));
        queue.set_aside(key(1), 5);
        assert_eq!((ids(&queue), queue.aside(), queue.contains(&key(1))), (vec![2], 1, true));
        queue.try_again();
        assert_eq!((ids(&queue), queue.aside()), (vec![1, 2], 0));
        queue.remove(&key(1));
        assert_eq!((ids(&queue), queue.count_below(11, 9)), (vec![2], 1));
        assert!(!queue.take_dropped());
    }
}
