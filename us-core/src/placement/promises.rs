//! Placements that were given out and not yet seen stored.
//!
//! They count in the pair counters at once, so that blocks leased together do not all take the same
//! pairs. When the block is stored, the promise is kept and nothing is counted twice; the oldest
//! promises lapse when there are too many. Nothing here fails.

use std::collections::VecDeque;

use super::draw::{NumberMap, SplitMix};
use super::field::Node;

/// Promises remembered.
const PROMISES_MAX: usize = 8192;

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    queued: u32,
    open: u32,
}

/// The promises.
#[derive(Clone, Debug, Default)]
pub(super) struct Promises {
    queue: VecDeque<(u64, Box<[Node]>)>,
    tallies: NumberMap<u64, Tally>,
}

/// The same for all blocks on the same providers.
fn key(holders: &[Node]) -> u64 {
    let mixed = holders.iter().map(|node| SplitMix::new(node.index() as u64).next());
    mixed.fold(0, u64::wrapping_add)
}

impl Promises {
    /// Remembers a placement; returns the holders of one that lapsed by it.
    pub fn give(&mut self, holders: &[Node]) -> Option<Box<[Node]>> {
        let key = key(holders);
        let tally = self.tallies.entry(key).or_default();
        tally.queued += 1;
        tally.open += 1;
        self.queue.push_back((key, holders.into()));
        if self.queue.len() <= PROMISES_MAX {
            return None;
        }
        let (key, oldest) = self.queue.pop_front()?;
        self.unqueue(key).then_some(oldest)
    }

    /// Takes a promise off the queue; true when it was not kept.
    fn unqueue(&mut self, key: u64) -> bool {
        let Some(tally) = self.tallies.get_mut(&key) else { return false };
        tally.queued -= 1;
        let lapsed = tally.open > tally.queued;
        tally.open = tally.open.min(tally.queued);
        if tally.queued == 0 {
            self.tallies.remove(&key);
        }
        lapsed
    }

    /// A block is stored there; true when that was promised, so that it is counted already.
    pub fn keep(&mut self, holders: &[Node]) -> bool {
        let tally = self.tallies.get_mut(&key(holders)).filter(|tally| tally.open > 0);
        tally.map(|tally| tally.open -= 1).is_some()
    }

    /// A provider is forgotten: promises that name it are void. Returns the holders of those.
    pub fn forget(&mut self, node: Node) -> Vec<Box<[Node]>> {
        let (void, kept) = std::mem::take(&mut self.queue)
            .into_iter()
            .partition(|(_, holders)| holders.contains(&node));
        self.queue = kept;
        let void: VecDeque<(u64, Box<[Node]>)> = void;
        void.into_iter().filter_map(|(key, holders)| self.unqueue(key).then_some(holders)).collect()
    }
}
