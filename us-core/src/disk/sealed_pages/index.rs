//! Which pages lie where on this machine's disk, and which leave first: pure, no I/O.
//!
//! Segments are filled one after another and leave in the same order, whole. Pages of a leaving segment
//! that were read since they came are written again at the front, up to a quarter of it: what is read again
//! and again stays, and one pass over much data pushes out only what nobody asked for (FIFO with
//! reinsertion). A page is known by 64 bits made of its block's id and its number; that two pages share
//! them is found out by the seal of the page, and costs a miss.

use std::collections::{HashMap, VecDeque};

use crate::disk::read::PageKey;

/// The share of a leaving segment that may be kept.
const KEPT_SHARE: u32 = 4;

/// Where a page lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    pub segment: u32,
    pub offset: u32,
}

/// A page in a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub key: u64,
    pub offset: u32,
    pub length: u32,
}

/// The pages of one segment in the order in which they lie there.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Segment {
    pub number: u32,
    pub entries: Vec<Entry>,
    pub bytes: u32,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    place: Place,
    length: u32,
    read: bool,
}

/// All pages that are kept.
#[derive(Debug)]
pub(super) struct Index {
    bytes_max: u64,
    segment_bytes: u32,
    pages: HashMap<u64, Known>,
    /// The oldest first; the last is being filled.
    segments: VecDeque<Segment>,
    bytes: u64,
}

/// The 64 bits by which a page is known. The second half of a block's id is random.
pub(super) fn key_of((block, page): &PageKey) -> u64 {
    let (_, random) = block.as_bytes().split_at(8);
    let random = u64::from_le_bytes(random.try_into().expect("an id has 16 bytes"));
    random ^ u64::from(*page).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Index {
    /// Of at most `bytes_max` in segments of `segment_bytes`, with what earlier runs left.
    pub fn new(bytes_max: u64, segment_bytes: u32, found: Vec<Segment>) -> Self {
        let mut index = Self {
            bytes_max,
            segment_bytes,
            pages: HashMap::new(),
            segments: VecDeque::new(),
            bytes: 0,
        };
        let mut found = found;
        found.sort_by_key(|segment| segment.number);
        for segment in found {
            index.bytes += u64::from(segment.bytes);
            for entry in &segment.entries {
                let place = Place { segment: segment.number, offset: entry.offset };
                let known = Known { place, length: entry.length, read: false };
                index.pages.insert(entry.key, known);
            }
            index.segments.push_back(segment);
        }
        let next = index.segments.back().map_or(1, |last| last.number + 1);
        index.segments.push_back(Segment { number: next, ..Segment::default() });
        index
    }

    /// The segment that is being filled.
    pub fn filling(&self) -> &Segment {
        self.segments.back().expect("one is always being filled")
    }

    pub fn knows(&self, key: u64) -> bool {
        self.pages.contains_key(&key)
    }

    /// Where a page of `length` bytes lies; it counts as read.
    pub fn find(&mut self, key: u64, length: u32) -> Option<Place> {
        let known = self.pages.get_mut(&key).filter(|known| known.length == length)?;
        known.read = true;
        Some(known.place)
    }

    /// What lies there is not this page.
    pub fn forget(&mut self, key: u64, place: Place) {
        if self.pages.get(&key).is_some_and(|known| known.place == place) {
            self.pages.remove(&key);
        }
    }

    /// A page was written behind all others in the segment that is being filled.
    pub fn add(&mut self, key: u64, length: u32) {
        let segment = self.segments.back_mut().expect("one is always being filled");
        let place = Place { segment: segment.number, offset: segment.bytes };
        segment.entries.push(Entry { key, offset: segment.bytes, length });
        segment.bytes += length;
        self.bytes += u64::from(length);
        self.pages.insert(key, Known { place, length, read: false });
    }

    /// Whether the next segment is to be begun before more is added.
    pub fn is_full(&self) -> bool {
        self.filling().bytes >= self.segment_bytes
    }

    /// Begins the next segment; the one that is full now.
    pub fn begin_next(&mut self) -> u32 {
        let full = self.filling().number;
        self.segments.push_back(Segment { number: full + 1, ..Segment::default() });
        full
    }

    /// Takes out the oldest segment if there is too much: its number, and its pages that stay.
    pub fn evict(&mut self) -> Option<(u32, Vec<Entry>)> {
        // Room for the segment being filled is kept.
        let room = u64::from(self.segment_bytes - self.filling().bytes.min(self.segment_bytes));
        if self.bytes + room <= self.bytes_max {
            return None;
        }
        self.drop_oldest()
    }

    /// Takes out the oldest segment but the one that is being filled.
    pub fn drop_oldest(&mut self) -> Option<(u32, Vec<Entry>)> {
        if self.segments.len() < 2 {
            return None;
        }
        let oldest = self.segments.pop_front()?;
        self.bytes -= u64::from(oldest.bytes);
        let mut kept = Vec::new();
        let mut left = oldest.bytes / KEPT_SHARE;
        for entry in oldest.entries {
            let place = Place { segment: oldest.number, offset: entry.offset };
            let Some(known) = self.pages.get(&entry.key).filter(|known| known.place == place)
            else {
                continue;
            };
            if known.read && entry.length <= left {
                left -= entry.length;
                kept.push(entry);
            }
            self.pages.remove(&entry.key);
        }
        Some((oldest.number, kept))
    }

    #[cfg(test)]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Add(u64, u32),
        Find(u64, u32),
        Forget(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (0u64..60, 1u32..40).prop_map(|(key, length)| Step::Add(key, length)),
            3 => (0u64..60, 1u32..40).prop_map(|(key, length)| Step::Find(key, length)),
            1 => (0u64..60).prop_map(Step::Forget),
        ];
        proptest::collection::vec(step, 1..400)
    }

    proptest! {
        /// The bytes of all segments are an oracle: whatever is found lies there, nothing outgrows the
        /// bound, and what the index takes out is in it no more.
        #[test]
        fn what_is_found_lies_there_and_no_more_than_fits(steps in steps()) {
            let (bytes_max, segment_bytes) = (400u64, 100u32);
            let mut index = Index::new(bytes_max, segment_bytes, Vec::new());
            let mut disk: HashMap<u32, Vec<u8>> = HashMap::from([(1, Vec::new())]);
            fn write(index: &mut Index, disk: &mut HashMap<u32, Vec<u8>>, key: u64, length: u32) {
                let number = index.filling().number;
                let bytes = disk.get_mut(&number).expect("the segment is there");
                bytes.extend(std::iter::repeat_n(key as u8, length as usize));
                index.add(key, length);
            }
            for step in steps {
                match step {
                    Step::Add(key, _) if index.knows(key) => {}
                    Step::Add(key, length) => {
                        write(&mut index, &mut disk, key, length);
                        if index.is_full() {
                            let full = index.begin_next();
                            disk.insert(full + 1, Vec::new());
                        }
                        while let Some((gone, kept)) = index.evict() {
                            disk.remove(&gone).expect("it was there");
                            for entry in kept {
                                prop_assert!(!index.knows(entry.key));
                                write(&mut index, &mut disk, entry.key, entry.length);
                            }
                        }
                        prop_assert!(index.bytes() <= bytes_max + 2 * u64::from(segment_bytes));
                        let lies: usize = disk.values().map(Vec::len).sum();
                        prop_assert_eq!(index.bytes(), lies as u64);
                    }
                    Step::Find(key, length) => {
                        if let Some(place) = index.find(key, length) {
                            let at = place.offset as usize;
                            let bytes = &disk[&place.segment][at..at + length as usize];
                            prop_assert!(bytes.iter().all(|byte| *byte == key as u8));
                        }
                    }
                    Step::Forget(key) => {
                        let place = index.pages.get(&key).map(|known| known.place);
                        if let Some(place) = place {
                            index.forget(key, place);
                            prop_assert!(!index.knows(key));
                        }
                    }
                }
            }
        }
    }

    /// One pass over ten times what fits leaves what is read again and again where it is.
    #[test]
    fn a_long_pass_does_not_push_out_what_is_read() {
        let mut index = Index::new(1000, 100, Vec::new());
        (0..10).for_each(|key| index.add(key, 10));
        index.begin_next();
        let mut hits = 0;
        for key in 1000..2000 {
            index.add(key, 10);
            if index.is_full() {
                index.begin_next();
            }
            while let Some((_, kept)) = index.evict() {
                kept.into_iter().for_each(|entry| index.add(entry.key, entry.length));
            }
            if key % 10 == 0 {
                hits += (0..2).filter(|hot| index.find(*hot, 10).is_some()).count();
            }
        }
        assert_eq!(hits, 200, "two of the first ten were asked for all the time");
        assert!((2..10).all(|cold| !index.knows(cold)));
    }

    #[test]
    fn pages_of_a_block_have_keys_of_their_own() {
        let block = crate::ids::BlockId::from_bytes([7; 16]);
        let keys: std::collections::HashSet<u64> =
            (0..4096).map(|page| key_of(&(block, page))).collect();
        assert_eq!(keys.len(), 4096);
    }
}
