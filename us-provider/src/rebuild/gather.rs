//! Which slots to ask of which source: the protocol of pulling, without I/O.
//!
//! The fragment is cut into slices of slots. Each slice needs s of the sources, and each slice has
//! an order in which they are taken. A source that fails or is late is replaced by the next of the
//! order at once; one that was late and answers after all counts.
//!
//! ```text
//! star     one slice; sources 0 .. s-1, then the others
//! rotated  n slices for n sources; slice j takes j, j+1 .. j+s-1 (mod n), then the others:
//!          source i sends slices i-s+1 .. i, so s/n of a fragment, in one or two runs
//! ```
//! Slice j of n begins at slot floor(j k / n). So the slots a source sends are at most ceil(s k / n).

use std::collections::BTreeSet;
use std::ops::Range;

/// Slots to be asked of a source: its position in the order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ask {
    /// The source.
    pub source: usize,
    /// The slots.
    pub slots: Range<usize>,
}

#[derive(Clone, Debug)]
struct Slice {
    slots: Range<usize>,
    /// The sources in the order in which they are asked.
    order: Vec<usize>,
    here: BTreeSet<usize>,
    asked: BTreeSet<usize>,
    late: BTreeSet<usize>,
}

/// What came and what is asked.
#[derive(Clone, Debug)]
pub struct Gather {
    need: usize,
    sources: usize,
    slices: Vec<Slice>,
    failed: BTreeSet<usize>,
}

impl Gather {
    /// Whole fragments of `need` of the sources, which are asked in this order.
    pub fn star(need: usize, order: Vec<usize>, slots: usize) -> Self {
        Self::new(need, order.len(), std::iter::once((order, 0..slots)))
    }

    /// The same share of each of the `sources`.
    pub fn rotated(need: usize, sources: usize, slots: usize) -> Self {
        let start = |slice: usize| slice * slots / sources;
        let slices = (0..sources).map(|slice| {
            let order = (0..sources).map(|at| (slice + at) % sources).collect();
            (order, start(slice)..start(slice + 1))
        });
        Self::new(need, sources, slices.filter(|(_, slots)| !slots.is_empty()))
    }

    fn new(
        need: usize,
        sources: usize,
        slices: impl Iterator<Item = (Vec<usize>, Range<usize>)>,
    ) -> Self {
        let slices = slices.map(|(order, slots)| Slice {
            slots,
            order,
            here: BTreeSet::new(),
            asked: BTreeSet::new(),
            late: BTreeSet::new(),
        });
        Self { need, sources, slices: slices.collect(), failed: BTreeSet::new() }
    }

    /// One source more is needed of each slice: what came contradicts itself.
    pub fn need_more(&mut self) {
        self.need += 1;
    }

    /// What to ask now, so that enough is here or expected. It counts as asked from then on.
    pub fn asks(&mut self) -> Vec<Ask> {
        let mut asks: Vec<Ask> = Vec::new();
        for slice in &mut self.slices {
            let expected = slice.here.len() + slice.asked.difference(&slice.late).count();
            let missing = self.need.saturating_sub(expected);
            let fresh = slice.order.iter().copied().filter(|source| {
                !slice.here.contains(source)
                    && !slice.asked.contains(source)
                    && !self.failed.contains(source)
            });
            let fresh: Vec<usize> = fresh.take(missing).collect();
            for source in fresh {
                slice.asked.insert(source);
                // Slices come in the order of their slots: neighbours become one run.
                let run = asks
                    .iter_mut()
                    .find(|ask| ask.source == source && ask.slots.end == slice.slots.start);
                match run {
                    Some(run) => run.slots.end = slice.slots.end,
                    None => asks.push(Ask { source, slots: slice.slots.clone() }),
                }
            }
        }
        asks
    }

    /// Slots came. Of a source that has failed they do not count.
    pub fn arrived(&mut self, ask: &Ask) {
        let failed = self.failed.contains(&ask.source);
        for slice in self.within(&ask.slots) {
            slice.asked.remove(&ask.source);
            slice.late.remove(&ask.source);
            if !failed {
                slice.here.insert(ask.source);
            }
        }
    }

    /// Slots do not come in good time: others are asked too.
    pub fn late(&mut self, ask: &Ask) {
        for slice in self.within(&ask.slots) {
            slice.late.insert(ask.source);
        }
    }

    /// Slots are no longer waited for.
    pub fn dropped(&mut self, ask: &Ask) {
        for slice in self.within(&ask.slots) {
            slice.asked.remove(&ask.source);
            slice.late.remove(&ask.source);
        }
    }

    /// A source is of no use; what came of it neither.
    pub fn failed(&mut self, source: usize) {
        self.failed.insert(source);
        for slice in &mut self.slices {
            slice.asked.remove(&source);
            slice.late.remove(&source);
            slice.here.remove(&source);
        }
    }

    /// A source that failed is right after all, and all its slots are here.
    pub fn redeemed(&mut self, source: usize) {
        self.failed.remove(&source);
        for slice in &mut self.slices {
            slice.here.insert(source);
        }
    }

    /// Whether enough of every slice is here.
    pub fn is_complete(&self) -> bool {
        self.slices.iter().all(|slice| slice.here.len() >= self.need)
    }

    /// Whether too few sources are left, whatever comes.
    pub fn is_hopeless(&self) -> bool {
        self.sources - self.failed.len() < self.need
    }

    /// The slices, and the sources of each that are here.
    pub fn slices(&self) -> impl Iterator<Item = (Range<usize>, Vec<usize>)> {
        self.slices.iter().map(|slice| (slice.slots.clone(), slice.here.iter().copied().collect()))
    }

    fn within(&mut self, slots: &Range<usize>) -> impl Iterator<Item = &mut Slice> {
        let slots = slots.clone();
        self.slices
            .iter_mut()
            .filter(move |slice| slots.start <= slice.slots.start && slice.slots.end <= slots.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_star_asks_the_first_and_replaces_at_once() {
        let mut gather = Gather::star(2, vec![0, 1, 2, 3], 10);
        let ask = |source| Ask { source, slots: 0..10 };
        assert_eq!(gather.asks(), [ask(0), ask(1)]);
        assert_eq!(gather.asks(), []);
        gather.failed(0);
        assert_eq!(gather.asks(), [ask(2)]);
        gather.late(&ask(2));
        assert_eq!(gather.asks(), [ask(3)]);
        gather.arrived(&ask(2));
        assert!(!gather.is_complete());
        gather.arrived(&ask(1));
        assert!(gather.is_complete(), "who was late counts all the same");
        gather.failed(1);
        gather.failed(3);
        assert!(gather.is_hopeless());
        gather.redeemed(3);
        assert!(gather.is_complete() && !gather.is_hopeless());
    }

    proptest! {
        #[test]
        fn each_source_of_a_rotated_star_sends_its_share(
            need in 1usize..20, spare in 0usize..20, slots in 1usize..300,
        ) {
            let sources = need + spare;
            let mut gather = Gather::rotated(need, sources, slots);
            let asks = gather.asks();
            let mut sent: BTreeMap<usize, (usize, usize)> = BTreeMap::new();
            for ask in &asks {
                let sent = sent.entry(ask.source).or_default();
                *sent = (sent.0 + 1, sent.1 + ask.slots.len());
                gather.arrived(ask);
            }
            prop_assert!(gather.is_complete());
            let share = (slots * need).div_ceil(sources);
            for (runs, slots) in sent.values() {
                prop_assert!(*slots <= share && *runs <= 2, "{runs} runs, {slots} > {share}");
            }
            prop_assert_eq!(sent.values().map(|sent| sent.1).sum::<usize>(), slots * need);
        }

        /// Whatever happens in whatever order: with enough good sources it completes, with too few
        /// it says so; never neither.
        #[test]
        fn it_ends(
            need in 1usize..8, spare in 0usize..6, slots in 1usize..40, rotated: bool,
            fates in prop::collection::vec(0u8..4, 14), seed: u64,
        ) {
            let sources = need + spare;
            let fates = &fates[..sources];
            let mut gather = if rotated {
                Gather::rotated(need, sources, slots)
            } else {
                Gather::star(need, (0..sources).collect(), slots)
            };
            // 0, 1: answers. 2: fails. 3: is late, then fails.
            let mut running: Vec<Ask> = Vec::new();
            let mut turn = seed as usize;
            while !gather.is_complete() && !gather.is_hopeless() {
                running.extend(gather.asks());
                prop_assert!(!running.is_empty(), "neither complete nor hopeless, nothing runs");
                turn = turn.wrapping_mul(31).wrapping_add(7);
                let ask = running.swap_remove(turn % running.len());
                match fates[ask.source] {
                    0 | 1 => gather.arrived(&ask),
                    3 if turn.is_multiple_of(2) => {
                        gather.late(&ask);
                        running.push(ask);
                    }
                    _ => gather.failed(ask.source),
                }
            }
            let good = fates.iter().filter(|fate| **fate < 2).count();
            prop_assert!(gather.is_complete() || good < need);
            if gather.is_complete() {
                for (_, here) in gather.slices() {
                    prop_assert!(here.len() >= need);
                    prop_assert!(here.iter().all(|source| fates[*source] < 2), "{here:?}");
                }
            }
        }
    }
}
