//! A sample of the stored blocks that cuts their order into runs of about [`RUN_BLOCKS`]: so one of
//! a provider's fragments is drawn at random by reading a few short ranges of its `p` keys.
//!
//! The ids of blocks are times: many are made in one second, none in another. A random place among
//! all ids would nearly always fall into a pause. The sample follows the blocks instead.
//!
//! Pure. Which blocks are in the sample nobody can know outside: it follows from a secret seed. It
//! is filled by the background count and kept by every commit, as the counters are.

use us_core::ids::{BlockId, VolumeId};
use us_core::placement::draw::SplitMix;

use crate::engine::repair::BlockKey;

/// Blocks of a run, on average.
const RUN_BLOCKS: u64 = 512;

/// How a sample is drawn.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sampling(u64);

impl Sampling {
    /// The sample of a seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Whether a block is in it.
    pub fn takes(self, block: &BlockId) -> bool {
        let (words, _) = block.as_bytes().as_chunks();
        let mixed = words
            .iter()
            .fold(self.0, |mixed, word| SplitMix::new(mixed ^ u64::from_le_bytes(*word)).next());
        mixed % RUN_BLOCKS == 0
    }
}

/// The sample.
#[derive(Debug, Default)]
pub(in crate::engine) struct Pivots {
    pub sampling: Sampling,
    /// Sorted. New blocks come at the end of their volume.
    keys: Vec<BlockKey>,
}

/// A run: from this block on, and before that one.
pub(super) type Run = (Option<BlockKey>, Option<BlockKey>);

impl Pivots {
    pub fn new(seed: u64) -> Self {
        Self { sampling: Sampling::new(seed), keys: Vec::new() }
    }

    /// A block is there now.
    pub fn add(&mut self, key: BlockKey) {
        if self.sampling.takes(&key.1)
            && let Err(at) = self.keys.binary_search(&key)
        {
            self.keys.insert(at, key);
        }
    }

    /// A block is gone.
    pub fn remove(&mut self, key: &BlockKey) {
        if self.sampling.takes(&key.1)
            && let Ok(at) = self.keys.binary_search(key)
        {
            self.keys.remove(at);
        }
    }

    /// How many runs there are.
    pub fn runs(&self) -> usize {
        self.keys.len() + 1
    }

    /// The run `number`, from 0 on.
    pub fn run(&self, number: usize) -> Run {
        let from = number.checked_sub(1).and_then(|before| self.keys.get(before));
        (from.copied(), self.keys.get(number).copied())
    }
}

/// The part of `run` in one volume: the first block, and the first behind it; `None` where the run
/// has nothing there.
pub(super) fn within(run: &Run, volume: VolumeId) -> Option<(Option<BlockId>, Option<BlockId>)> {
    let (from, to) = run;
    let begins_later = from.is_some_and(|(at, _)| at > volume);
    let ended_before = to.is_some_and(|(at, _)| at < volume);
    let here = |end: &Option<BlockKey>| end.filter(|(at, _)| *at == volume).map(|(_, block)| block);
    (!begins_later && !ended_before).then(|| (here(from), here(to)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn key(volume: u8, number: u64) -> BlockKey {
        let mut block = [0; 16];
        // Many in one moment, and long pauses.
        block[..8].copy_from_slice(&(number / 1000 * 77_777_777).to_be_bytes());
        block[8..].copy_from_slice(&number.to_be_bytes());
        (VolumeId::from_bytes([volume; 16]), BlockId::from_bytes(block))
    }

    #[test]
    fn runs_cover_every_block_once_and_are_about_as_long_as_they_should_be() {
        let blocks: BTreeSet<BlockKey> =
            (0..60_000).map(|number| key((number / 25_000) as u8, number)).collect();
        let mut pivots = Pivots::new(7);
        blocks.iter().for_each(|key| pivots.add(*key));
        blocks.iter().take(100).for_each(|key| pivots.add(*key));
        assert!((60..240).contains(&pivots.runs()), "{}", pivots.runs());
        let volumes: Vec<VolumeId> = (0..3).map(|at| key(at, 0).0).collect();
        let mut seen = 0;
        for number in 0..pivots.runs() {
            let run = pivots.run(number);
            for volume in &volumes {
                let Some((from, to)) = within(&run, *volume) else { continue };
                let inside = blocks.iter().filter(|(at, block)| {
                    at == volume
                        && from.is_none_or(|from| *block >= from)
                        && to.is_none_or(|to| *block < to)
                });
                seen += inside.count();
            }
        }
        assert_eq!(seen, blocks.len());
    }

    #[test]
    fn what_goes_leaves_the_sample() {
        let mut pivots = Pivots::new(3);
        (0..10_000).for_each(|number| pivots.add(key(1, number)));
        assert!(pivots.runs() > 5);
        (0..10_000).for_each(|number| pivots.remove(&key(1, number)));
        assert_eq!((pivots.runs(), pivots.run(0)), (1, (None, None)));
    }
}
