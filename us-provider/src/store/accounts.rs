//! How much of each segment is what: the numbers behind `used`, `free`, and which segment to
//! compact. Pure; owned by the writer, copied out for readers.
//!
//! Invariant: `header + live + trashed + dead + punched = bytes` for every segment.

use std::collections::BTreeMap;

use super::format::SEGMENT_HEADER_BYTES;

/// No segment has more bytes or records: far more than any is allowed.
const FIGURE_MAX: u64 = 1 << 48;

/// A number of records and the bytes they take in their segment, envelopes and padding included.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Tally {
    /// How many.
    pub records: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Tally {
    fn add(&mut self, bytes: u64) {
        self.records += 1;
        self.bytes += bytes;
    }

    fn subtract(&mut self, bytes: u64) {
        self.records = self.records.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// What one segment holds.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SegmentAccount {
    /// Where its last record ends.
    pub bytes: u64,
    /// Fragments that count.
    pub live: Tally,
    /// Fragments in the trash.
    pub trashed: Tally,
    /// Bytes given back to the file system by punching holes.
    pub punched_bytes: u64,
}

impl SegmentAccount {
    /// Bytes that only compaction gives back.
    pub const fn dead_bytes(&self) -> u64 {
        self.bytes.saturating_sub(
            SEGMENT_HEADER_BYTES + self.live.bytes + self.trashed.bytes + self.punched_bytes,
        )
    }

    /// Bytes the segment takes on the disk.
    pub const fn used_bytes(&self) -> u64 {
        self.bytes.saturating_sub(self.punched_bytes)
    }

    /// Whether no fragment would be missed without it.
    pub const fn is_dead(&self) -> bool {
        self.live.records == 0 && self.trashed.records == 0
    }

    /// Its 48 bytes in the index.
    pub fn encode(&self) -> [u8; 48] {
        let fields = [
            self.bytes,
            self.live.records,
            self.live.bytes,
            self.trashed.records,
            self.trashed.bytes,
            self.punched_bytes,
        ];
        let mut bytes = [0u8; 48];
        for (field, value) in bytes.chunks_exact_mut(8).zip(fields) {
            field.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// The inverse of [`SegmentAccount::encode`]; `None` unless there are exactly 48 bytes, and no
    /// figure beyond what a segment can be, so that sums of them do not overflow.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (fields, rest) = bytes.as_chunks::<8>();
        let &[bytes, live_records, live_bytes, trashed_records, trashed_bytes, punched_bytes] =
            fields
        else {
            return None;
        };
        let number = u64::from_le_bytes;
        let possible = fields.iter().all(|field| number(*field) <= FIGURE_MAX);
        (rest.is_empty() && possible).then_some(Self {
            bytes: number(bytes),
            live: Tally { records: number(live_records), bytes: number(live_bytes) },
            trashed: Tally { records: number(trashed_records), bytes: number(trashed_bytes) },
            punched_bytes: number(punched_bytes),
        })
    }
}

/// Which tally a fragment belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// It counts.
    Live,
    /// It is in the trash.
    Trashed,
}

/// All segments.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Accounts {
    segments: BTreeMap<u32, SegmentAccount>,
}

impl Accounts {
    /// The accounts with these segments.
    pub fn from_segments(segments: impl IntoIterator<Item = (u32, SegmentAccount)>) -> Self {
        Self { segments: segments.into_iter().collect() }
    }

    /// The segments in order.
    pub fn segments(&self) -> impl Iterator<Item = (u32, &SegmentAccount)> {
        self.segments.iter().map(|(number, account)| (*number, account))
    }

    /// One segment; empty where it is not known.
    pub fn segment(&self, number: u32) -> SegmentAccount {
        self.segments.get(&number).copied().unwrap_or_default()
    }

    /// Says where the last record of a segment ends.
    pub fn set_end(&mut self, number: u32, bytes: u64) {
        self.segments.entry(number).or_default().bytes = bytes;
    }

    /// Counts a fragment in.
    pub fn enter(&mut self, number: u32, class: Class, bytes: u64) {
        self.tally(number, class).add(bytes);
    }

    /// Counts a fragment out; its bytes are dead then.
    pub fn leave(&mut self, number: u32, class: Class, bytes: u64) {
        self.tally(number, class).subtract(bytes);
    }

    /// Counts bytes given back by punching.
    pub fn punch(&mut self, number: u32, bytes: u64) {
        self.segments.entry(number).or_default().punched_bytes += bytes;
    }

    /// Forgets a removed segment.
    pub fn remove(&mut self, number: u32) {
        self.segments.remove(&number);
    }

    /// Bytes all segments take on the disk.
    pub fn used_bytes(&self) -> u64 {
        self.segments.values().map(SegmentAccount::used_bytes).sum()
    }

    /// Fragments that count, in all segments.
    pub fn live(&self) -> Tally {
        self.total(|account| account.live)
    }

    /// Fragments in the trash, in all segments.
    pub fn trashed(&self) -> Tally {
        self.total(|account| account.trashed)
    }

    fn total(&self, of: impl Fn(&SegmentAccount) -> Tally) -> Tally {
        self.segments.values().map(of).fold(Tally::default(), |sum, tally| Tally {
            records: sum.records + tally.records,
            bytes: sum.bytes + tally.bytes,
        })
    }

    fn tally(&mut self, number: u32, class: Class) -> &mut Tally {
        let account = self.segments.entry(number).or_default();
        match class {
            Class::Live => &mut account.live,
            Class::Trashed => &mut account.trashed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fragment_leaves_dead_bytes_behind() {
        let mut accounts = Accounts::default();
        accounts.set_end(3, 4096 + 12288);
        accounts.enter(3, Class::Live, 12288);
        assert_eq!(accounts.segment(3).dead_bytes(), 0);
        accounts.leave(3, Class::Live, 12288);
        accounts.enter(3, Class::Trashed, 12288);
        assert_eq!(accounts.trashed(), Tally { records: 1, bytes: 12288 });
        assert!(!accounts.segment(3).is_dead());
        accounts.leave(3, Class::Trashed, 12288);
        accounts.punch(3, 8192);
        assert_eq!(accounts.segment(3).dead_bytes(), 4096);
        assert_eq!(accounts.used_bytes(), 8192);
        assert!(accounts.segment(3).is_dead());
        let account = accounts.segment(3);
        assert_eq!(SegmentAccount::decode(&account.encode()), Some(account));
        assert_eq!(SegmentAccount::decode(&account.encode()[1..]), None);
    }
}
