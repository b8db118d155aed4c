//! What a block lacks, and how badly it needs it: pure.

use us_core::durability::{FOREVER_S, expected_time_to_loss_s};

use crate::engine::health::{FragmentState, fragment_state};
use crate::records::BlockRecord;

/// A block expected to be lost sooner than this is urgent.
pub const URGENT_S: u64 = 24 * 3600;

/// A provider as the holder of a fragment.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Holder {
    /// Known and not given up.
    pub lives: bool,
    /// What it claims to have counts.
    pub trusted: bool,
    /// Its fragments can be read now.
    pub reachable: bool,
    /// Being emptied.
    pub draining: bool,
    /// Deaths a second.
    pub hazard: f64,
}

/// What is known of a block.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Assessment {
    /// Fragments that are confirmed and not lost, and those that are on their way.
    pub durable: usize,
    /// Of the durable ones: those that can be read now. Where they are too few, those of distrusted
    /// providers too: what comes is verified.
    pub sources: Vec<u8>,
    /// Lost: damaged, missing, not confirmed for too long, or at a dead or distrusted provider.
    pub gone: Vec<u8>,
    /// Durable, but at a provider that is being emptied.
    pub leaving: Vec<u8>,
    /// Durable, but at a provider that holds another of the block's too.
    pub crowded: Vec<u8>,
    /// Expected time to loss with what is durable now, in seconds.
    pub time_to_loss_s: u64,
}

impl Assessment {
    /// Looks at a block. `late`: fragments that are not confirmed yet count as lost.
    pub fn of(block: &BlockRecord, late: bool, holder: impl Fn(u32) -> Holder) -> Self {
        let mut found = Self::default();
        let mut hazards = Vec::with_capacity(block.providers.len());
        let mut seen: Vec<u32> = Vec::with_capacity(block.providers.len());
        let mut doubtful = Vec::new();
        for (index, provider) in block.providers.iter().enumerate() {
            let at = holder(*provider);
            let state = match fragment_state(block, index, late) {
                _ if !at.lives => FragmentState::Gone,
                FragmentState::Durable if !at.trusted && at.reachable => {
                    doubtful.push(index as u8);
                    FragmentState::Gone
                }
                _ if !at.trusted => FragmentState::Gone,
                state => state,
            };
            let index = index as u8;
            match state {
                FragmentState::Gone | FragmentState::Late => {
                    found.gone.push(index);
                    continue;
                }
                FragmentState::Pending => {}
                FragmentState::Durable => {
                    hazards.push(at.hazard);
                    if at.reachable {
                        found.sources.push(index);
                    }
                    if at.draining {
                        found.leaving.push(index);
                    } else if seen.contains(provider) {
                        found.crowded.push(index);
                    }
                }
            }
            found.durable += 1;
            seen.push(*provider);
        }
        if found.sources.len() < block.s as usize {
            found.sources.extend(doubtful);
        }
        let seconds = expected_time_to_loss_s(block.s as usize, &mut hazards);
        found.time_to_loss_s = seconds.min(FOREVER_S) as u64;
        found
    }

    /// The fragments to make now, given that repair begins when no more than s + `r0` are durable;
    /// empty where nothing is to be done. Lost ones first, then those that have to leave; crowded
    /// ones only where `can_spread`.
    pub fn wanted(&self, s: usize, r0: usize, can_spread: bool) -> Vec<u8> {
        let is_wanting = !self.gone.is_empty() && self.durable <= s + r0;
        if is_wanting {
            return self.gone.clone();
        }
        // Moved one at a time: what is moved is never less than what is kept.
        let spread = self.crowded.first().filter(|_| can_spread);
        self.leaving.first().or(spread).map(|index| vec![*index]).unwrap_or_default()
    }

    /// Where in the queue the block belongs: smaller is sooner. Moves of whole fragments come behind
    /// every repair.
    pub fn rank_s(&self) -> u64 {
        if self.gone.is_empty() { u64::MAX } else { self.time_to_loss_s }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::with_bit;

    const WELL: Holder =
        Holder { lives: true, trusted: true, reachable: true, draining: false, hazard: 1e-8 };

    fn block(providers: &[u32]) -> BlockRecord {
        let durable = vec![0xff; providers.len().div_ceil(8)].into();
        let (s, r) = (providers.len() as u32 - 2, 2);
        BlockRecord { s, r, providers: providers.to_vec(), durable, ..Default::default() }
    }

    #[test]
    fn a_healthy_block_wants_nothing() {
        let found = Assessment::of(&block(&[1, 2, 3, 4, 5, 6]), false, |_| WELL);
        assert_eq!((found.durable, found.sources.len()), (6, 6));
        assert!(found.wanted(4, 1, true).is_empty());
    }

    #[test]
    fn what_a_distrusted_holder_has_does_not_count_and_is_a_last_resort() {
        let doubted = |provider| Holder { trusted: provider != 3, ..WELL };
        let found = Assessment::of(&block(&[1, 2, 3, 4, 5, 6]), false, doubted);
        assert_eq!((found.durable, found.sources.len()), (5, 5));
        assert_eq!((found.gone.clone(), found.wanted(4, 1, true)), (vec![2], vec![2]));
        // Two others are asleep: three are left, and it.
        let asleep = |provider| Holder { reachable: provider < 5, ..doubted(provider) };
        let found = Assessment::of(&block(&[1, 2, 3, 4, 5, 6]), false, asleep);
        assert_eq!((found.durable, found.sources), (5, vec![0, 1, 3, 2]));
    }

    #[test]
    fn a_dead_holder_is_a_loss_and_a_sleeping_one_is_none() {
        let asleep = |provider| Holder { reachable: provider != 3, ..WELL };
        let found = Assessment::of(&block(&[1, 2, 3, 4, 5, 6]), false, asleep);
        assert_eq!((found.durable, found.sources.len(), found.gone.len()), (6, 5, 0));
        assert!(found.wanted(4, 1, true).is_empty());
        let dead = |provider| Holder { lives: provider != 3, reachable: provider != 3, ..WELL };
        let found = Assessment::of(&block(&[1, 2, 3, 4, 5, 6]), false, dead);
        assert_eq!((found.durable, found.wanted(4, 1, true)), (5, vec![2]));
        assert!(found.wanted(4, 0, true).is_empty(), "lazy: not yet");
    }

    #[test]
    fn fragments_on_their_way_are_lost_only_when_they_are_late() {
        let mut young = block(&[1, 2, 3, 4, 5, 6]);
        young.durable = with_bit(&young.durable, 5, false);
        assert!(Assessment::of(&young, false, |_| WELL).gone.is_empty());
        assert_eq!(Assessment::of(&young, true, |_| WELL).gone, [5]);
    }

    #[test]
    fn what_is_lost_comes_before_what_leaves_and_that_before_what_is_crowded() {
        let holder = |provider| Holder { draining: provider == 2, ..WELL };
        let mut moved = block(&[1, 2, 3, 4, 5, 5]);
        let found = Assessment::of(&moved, false, holder);
        assert_eq!((found.wanted(4, 1, true), found.rank_s()), (vec![1], u64::MAX));
        assert_eq!(found.crowded, [5]);
        moved.damaged = with_bit(&moved.damaged, 0, true);
        let found = Assessment::of(&moved, false, holder);
        assert_eq!(found.wanted(4, 1, true), [0]);
        assert!(found.rank_s() < u64::MAX);
        let crowded = Assessment::of(&block(&[1, 2, 3, 4, 5, 5]), false, |_| WELL);
        assert!(crowded.wanted(4, 1, false).is_empty());
        assert_eq!(crowded.wanted(4, 1, true), [5]);
    }

    #[test]
    fn fewer_left_and_shakier_holders_are_sooner() {
        let lose = |lost: u32| {
            Assessment::of(&block(&[1, 2, 3, 4, 5, 6]), false, |provider| Holder {
                lives: provider > lost,
                ..WELL
            })
        };
        assert!(lose(2).rank_s() < lose(1).rank_s());
        let shaky = Assessment::of(&block(&[1, 2, 3, 4, 5, 6]), false, |provider| Holder {
            lives: provider > 1,
            hazard: if provider == 2 { 1e-4 } else { 1e-8 },
            ..WELL
        });
        assert!(shaky.rank_s() < lose(1).rank_s());
        assert_eq!(lose(3).rank_s(), 0);
    }
}
