//! Blocks counted by signature, packed: where places are drawn at random nearly every block has a
//! signature of its own, and a status must still look at all of them in well under a second.
//!
//! ```text
//!  per code and width:  words   [w0 w1 .. wf-1][w0 ..]   one word a fragment: provider's number
//!                                                        here << 2 | state, as the signature sorts
//!                       counts  [blocks]      [blocks]
//!                       table   hash of the words -> place
//! ```
//! Pure. Memory: 4 bytes a fragment, 8 a signature, and 5 to 10 of the table.

use std::collections::{BTreeMap, HashMap};

use hashbrown::HashTable;

use super::{FragmentState, Reach, Signature, Totals};

/// Signatures of one code and width.
#[derive(Debug, Default)]
struct Group {
    width: usize,
    words: Vec<u32>,
    counts: Vec<i64>,
    table: HashTable<u32>,
    /// Places that are used by none.
    free: Vec<u32>,
}

/// All signatures with how many blocks have them.
#[derive(Debug, Default)]
pub(super) struct Signatures {
    groups: BTreeMap<(u32, u32, usize), Group>,
    /// Providers as they are numbered here, and back.
    numbers: HashMap<u32, u32>,
    providers: Vec<u32>,
}

const fn state_bits(state: FragmentState) -> u32 {
    match state {
        FragmentState::Durable => 0,
        FragmentState::Pending => 1,
        FragmentState::Late => 2,
        FragmentState::Gone => 3,
    }
}

const STATES: [FragmentState; 4] =
    [FragmentState::Durable, FragmentState::Pending, FragmentState::Late, FragmentState::Gone];

fn hash(words: &[u32]) -> u64 {
    /// A multiplier that mixes well; signatures come from our own placement, not from strangers.
    const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
    let sum = words
        .iter()
        .fold(0u64, |sum, word| (sum.rotate_left(23) ^ u64::from(*word)).wrapping_mul(MIX));
    sum ^ sum >> 29
}

impl Group {
    fn at(&self, place: u32) -> &[u32] {
        let start = place as usize * self.width;
        &self.words[start..start + self.width]
    }

    fn change(&mut self, words: &[u32], by: i64) {
        let hash_of = hash(words);
        let (width, all) = (self.width, &self.words);
        let at = |place: u32| &all[place as usize * width..(place as usize + 1) * width];
        if let Ok(found) = self.table.find_entry(hash_of, |place| at(*place) == words) {
            let place = *found.get();
            let count = &mut self.counts[place as usize];
            *count += by;
            if *count == 0 {
                found.remove();
                self.free.push(place);
            }
            return;
        }
        let place = match self.free.pop() {
            Some(place) => {
                let start = place as usize * width;
                self.words[start..start + width].copy_from_slice(words);
                self.counts[place as usize] = by;
                place
            }
            None => {
                self.words.extend_from_slice(words);
                self.counts.push(by);
                self.counts.len() as u32 - 1
            }
        };
        let all = &self.words;
        let at = |place: u32| &all[place as usize * width..(place as usize + 1) * width];
        self.table.insert_unique(hash_of, place, |place| hash(at(*place)));
    }
}

impl Signatures {
    /// Changes how many blocks have a signature.
    pub fn change(&mut self, signature: &Signature, by: i64) {
        let fragments = &signature.fragments;
        let mut words = [0; 256];
        for (word, (provider, state)) in words.iter_mut().zip(fragments) {
            let next = self.providers.len() as u32;
            let number = *self.numbers.entry(*provider).or_insert_with(|| {
                self.providers.push(*provider);
                next
            });
            *word = number << 2 | state_bits(*state);
        }
        let width = fragments.len().min(words.len());
        let group = self.groups.entry((signature.s, signature.r, width)).or_default();
        group.width = width;
        group.change(&words[..width], by);
    }

    /// How many distinct signatures there are.
    pub fn len(&self) -> usize {
        self.groups.values().map(|group| group.table.len()).sum()
    }

    /// Adds all to the sums, as providers are now.
    pub fn add_to(&self, totals: &mut Totals, reach: impl Fn(u32) -> Reach) {
        let reaches: Vec<Reach> = self.providers.iter().map(|provider| reach(*provider)).collect();
        let mut damaged = vec![0u64; reaches.len()];
        for ((s, _, width), group) in &self.groups {
            let mut sums = Sums::new(*s, *width);
            for (place, count) in (0..).zip(&group.counts) {
                if let Ok(count @ 1..) = u64::try_from(*count) {
                    sums.add(group.at(place), count, &reaches, &mut damaged);
                }
            }
            sums.tell(totals);
        }
        for (number, count) in damaged.into_iter().enumerate().filter(|(_, count)| *count > 0) {
            *totals.damaged.entry(self.providers[number]).or_default() += count;
        }
    }
}

/// The sums of one group, by how many fragments are left.
struct Sums {
    s: usize,
    width: usize,
    /// By fragments that can be read, and by those that are kept.
    readable: Vec<u64>,
    kept: Vec<u64>,
    waiting: u64,
    lost: u64,
    unsettled: u64,
    crowded: u64,
    damaged_fragments: u64,
    degraded: u64,
}

impl Sums {
    fn new(s: u32, width: usize) -> Self {
        Self {
            s: s as usize,
            width,
            readable: vec![0; width + 1],
            kept: vec![0; width + 1],
            waiting: 0,
            lost: 0,
            unsettled: 0,
            crowded: 0,
            damaged_fragments: 0,
            degraded: 0,
        }
    }

    fn add(&mut self, words: &[u32], count: u64, reaches: &[Reach], damaged: &mut [u64]) {
        let (mut reachable, mut expected, mut young, mut kept) = (0, 0, 0, 0);
        // Can be read, and somebody may count on it.
        let mut sound = 0;
        let (mut pending, mut crowded, mut previous) = (false, false, u32::MAX);
        for word in words {
            let (number, state) = (word >> 2, STATES[(word & 3) as usize]);
            let at = reaches[number as usize];
            crowded |= previous == number;
            previous = number;
            match state {
                FragmentState::Durable => {
                    reachable += usize::from(at.reachable);
                    sound += usize::from(at.reachable && at.expected);
                    kept += usize::from(at.expected);
                    expected += usize::from(at.expected);
                }
                FragmentState::Pending => {
                    young += usize::from(at.reachable && at.expected);
                    expected += usize::from(at.expected);
                    pending = true;
                }
                FragmentState::Late => {
                    expected += usize::from(at.expected);
                    pending = true;
                }
                FragmentState::Gone => {
                    damaged[number as usize] += count;
                    self.damaged_fragments += count;
                }
            }
        }
        // What only a distrusted provider holds is read, and is no redundancy.
        let redundancy = if reachable < self.s { reachable } else { sound.max(self.s) };
        self.readable[redundancy] += count;
        self.kept[kept] += count;
        self.unsettled += if pending { count } else { 0 };
        self.crowded += if crowded { count } else { 0 };
        if reachable < self.s {
            *if expected >= self.s { &mut self.waiting } else { &mut self.lost } += count;
        }
        let lacks = sound + young < self.width || crowded;
        self.degraded += if lacks { count } else { 0 };
    }

    fn tell(self, totals: &mut Totals) {
        let left = |fragments: usize| (fragments as i32 - self.s as i32).max(-1);
        let summary = &mut totals.summary;
        for (fragments, count) in self.readable.iter().enumerate().filter(|(_, n)| **n > 0) {
            summary.total += count;
            summary.readable += if fragments >= self.s { *count } else { 0 };
            *summary.by_redundancy.entry(left(fragments)).or_default() += count;
        }
        for (fragments, count) in self.kept.iter().enumerate().filter(|(_, n)| **n > 0) {
            *summary.by_durability.entry(left(fragments)).or_default() += count;
        }
        summary.unsettled += self.unsettled;
        summary.crowded += self.crowded;
        summary.damaged_fragments += self.damaged_fragments;
        summary.waiting += self.waiting;
        summary.lost += self.lost;
        totals.degraded += self.degraded;
    }
}
