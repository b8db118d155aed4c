//! Which ranges of a file to fetch before they are asked for: pure, one value an open file.
//!
//! A stream is a run of reads each of which begins where an earlier one ended, give or take what
//! several threads of one reader reorder. Its window starts small, doubles as the reader goes on,
//! and ends as soon as the reader jumps. The answer of [`ReadAhead::on_read`] never covers a byte
//! twice while a stream lasts.
//!
//! A reader that goes in equal steps, backwards or with gaps, gets the next few steps, more of them as
//! it goes on, and nothing of the gaps.
//!
//! A reader that keeps jumping gets nothing ahead, but more around what it reads
//! ([`ReadAhead::around_bytes`]), as kernels do for mapped files.

use std::ops::Range;

/// Bounds of the window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadAheadLimits {
    /// The first window of a stream.
    pub window_bytes_min: u64,
    /// The largest window: how far ahead of the reader bytes are fetched.
    pub window_bytes_max: u64,
    /// Prefetches end on multiples of this, so that whole blocks are asked for.
    pub align_bytes: u64,
}

impl Default for ReadAheadLimits {
    fn default() -> Self {
        Self { window_bytes_min: 512 << 10, window_bytes_max: 16 << 20, align_bytes: 4 << 20 }
    }
}

/// The reader's recent past.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReadAhead {
    limits: ReadAheadLimits,
    /// Where the furthest sequential read ended; the next of the stream is expected near it.
    expected: u64,
    /// Everything of the stream before this was read or prefetched.
    fetched: u64,
    /// 0: no stream yet.
    window: u64,
    steps: Steps,
    /// How many reads in a row, or nearly so, were neither of a stream nor of steps.
    jumps: u32,
}

/// Reads at equal distances.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Steps {
    /// Where the last read began, and its bytes.
    last: Option<(u64, u64)>,
    /// From the read before that to it.
    step: i64,
    /// How many steps of the same length were taken in a row.
    taken: u32,
    /// How many further ones are fetched already.
    ahead: u64,
}

/// From so many equal steps on the next ones are fetched.
const STEPS_MIN: u32 = 3;
/// The most that are fetched ahead.
const STEPS_AHEAD_MAX: u64 = 64;

/// From so many jumps on a read brings so many bytes around it along; fewest first.
const AROUND: [(u32, usize); 2] = [(8, 32 << 10), (32, 64 << 10)];

/// How far out of order the reads of one stream may come (the kernel has several in flight).
const REORDER_BYTES: u64 = 1 << 20;

impl ReadAhead {
    /// A reader that has read nothing. A file read from its start is taken for a stream at once.
    pub const fn new(limits: ReadAheadLimits) -> Self {
        let steps = Steps { last: None, step: 0, taken: 0, ahead: 0 };
        Self { limits, expected: 0, fetched: 0, window: 0, steps, jumps: 0 }
    }

    /// How many bytes a read that must be fetched should bring along, itself included; 0: what it asks
    /// for. Worth it where what comes is kept until it is read: the caller says whether it is.
    pub fn around_bytes(&self) -> usize {
        let earned = AROUND.into_iter().rev().find(|(jumps, _)| self.jumps >= *jumps);
        earned.map_or(0, |(_, bytes)| bytes)
    }

    /// The reader asked for `range` of a file of `size` bytes. Returns what to prefetch now, beyond
    /// the range itself, in order and without overlaps.
    pub fn on_read(&mut self, range: Range<u64>, size: u64) -> Vec<Range<u64>> {
        if self.steps.go_on(&range) {
            // Should it become a stream, that begins here.
            (self.expected, self.fetched, self.window) = (range.end, range.end, 0);
            self.jumps = 0;
            return self.steps.fetch(&range, size, self.limits.window_bytes_max);
        }
        self.stream(range, size).into_iter().collect()
    }

    fn stream(&mut self, range: Range<u64>, size: u64) -> Option<Range<u64>> {
        // A stream must show itself more clearly than it must go on.
        let reorder = if self.window == 0 { REORDER_BYTES / 4 } else { REORDER_BYTES };
        if self.expected.abs_diff(range.start) > reorder {
            (self.expected, self.fetched, self.window) = (range.end, range.end, 0);
            self.jumps = self.jumps.saturating_add(1);
            return None;
        }
        let advanced = range.end > self.expected;
        self.expected = self.expected.max(range.end);
        self.fetched = self.fetched.max(range.end);
        if !advanced {
            return None;
        }
        // A chance neighbour is no stream.
        self.jumps /= 2;
        self.window = if self.window == 0 { self.limits.window_bytes_min } else { self.window };
        let ahead = self.fetched - self.expected;
        if ahead > self.window / 2 || self.fetched >= size {
            return None;
        }
        let wanted = self.expected + self.window;
        let align = self.limits.align_bytes.max(1);
        let end = if self.window >= align { wanted.next_multiple_of(align) } else { wanted };
        let start = self.fetched;
        self.fetched = end.min(size);
        self.window = (self.window * 2).min(self.limits.window_bytes_max);
        (start < self.fetched).then_some(start..self.fetched)
    }
}

impl Steps {
    /// Notes a read; says whether it is one of many at equal distances that are no stream.
    fn go_on(&mut self, range: &Range<u64>) -> bool {
        let bytes = range.end.saturating_sub(range.start);
        let before = self.last.replace((range.start, bytes));
        let step = match before {
            Some((start, same)) if same == bytes => range.start.wrapping_sub(start) as i64,
            _ => 0,
        };
        if step == 0 || step != self.step {
            (self.step, self.taken, self.ahead) = (step, 1, 0);
            return false;
        }
        self.taken = self.taken.saturating_add(1);
        self.ahead = self.ahead.saturating_sub(1);
        // One that begins where the last ended is a stream.
        self.taken >= STEPS_MIN && (step < 0 || step as u64 > bytes)
    }

    /// The next steps from `range`, as far as they are not fetched yet: twice as many as before, up to
    /// the bounds.
    fn fetch(&mut self, range: &Range<u64>, size: u64, bytes_max: u64) -> Vec<Range<u64>> {
        let bytes = (range.end - range.start).max(1);
        let most = (bytes_max / bytes).min(STEPS_AHEAD_MAX);
        let wanted = (2u64 << (self.taken - STEPS_MIN).min(6)).min(most);
        if self.ahead > wanted / 2 || wanted == 0 {
            return Vec::new();
        }
        let place = |number: u64| -> Option<Range<u64>> {
            let offset = self.step.checked_mul(number as i64)?;
            let start = range.start.checked_add_signed(offset).filter(|start| *start < size)?;
            Some(start..start.saturating_add(bytes).min(size))
        };
        let mut pieces: Vec<Range<u64>> = (self.ahead + 1..=wanted).map_while(place).collect();
        self.ahead = wanted;
        pieces.sort_unstable_by_key(|piece| piece.start);
        let mut merged: Vec<Range<u64>> = Vec::with_capacity(pieces.len());
        for piece in pieces {
            match merged.last_mut() {
                Some(last) if piece.start <= last.end => last.end = last.end.max(piece.end),
                _ => merged.push(piece),
            }
        }
        merged
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;

    fn read_all(step: u64, size: u64) -> (Vec<Range<u64>>, u64) {
        let mut reader = ReadAhead::new(ReadAheadLimits::default());
        let mut ahead_max = 0;
        let mut prefetched = Vec::new();
        for start in (0..size).step_by(step as usize) {
            let end = (start + step).min(size);
            for range in reader.on_read(start..end, size) {
                ahead_max = ahead_max.max(range.end - end);
                prefetched.push(range);
            }
        }
        (prefetched, ahead_max)
    }

    #[test]
    fn a_stream_is_prefetched_once_each_byte_up_to_the_end() {
        let size = 300 * MIB + 17;
        let (ranges, ahead_max) = read_all(128 * KIB, size);
        assert_eq!(ranges[0].start, 128 * KIB);
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert_eq!(ranges.last().unwrap().end, size);
        let limits = ReadAheadLimits::default();
        assert!(ahead_max >= limits.window_bytes_max / 2);
        assert!(ahead_max <= limits.window_bytes_max + limits.align_bytes);
        // Once the window is large, prefetches end where blocks end.
        assert!(ranges.iter().skip(5).all(|r| r.end % (4 * MIB) == 0 || r.end == size));
    }

    #[test]
    fn random_reads_prefetch_nothing() {
        let mut reader = ReadAhead::new(ReadAheadLimits::default());
        for start in [900u64, 17, 5000, 30, 777].map(|mib| mib * MIB) {
            assert_eq!(reader.on_read(start..start + 4096, 10_000 * MIB), []);
        }
    }

    #[test]
    fn who_keeps_jumping_gets_more_around_what_it_reads_and_a_stream_nothing() {
        let mut reader = ReadAhead::new(ReadAheadLimits::default());
        let mut random = StdRng::seed_from_u64(1);
        let mut around = Vec::new();
        for _ in 0..200 {
            let start = random.random_range(0..10_000 * MIB);
            assert_eq!(reader.on_read(start..start + 4096, 10_000 * MIB), []);
            around.push(reader.around_bytes());
        }
        assert!(around[..7].iter().all(|bytes| *bytes == 0), "{around:?}");
        assert!(around.is_sorted() && around[199] == 64 << 10, "{around:?}");
        for at in 0..8 {
            reader.on_read(MIB + at * 4096..MIB + (at + 1) * 4096, 10_000 * MIB);
        }
        assert_eq!(reader.around_bytes(), 0, "it reads on and on now");
        for at in 0..100 {
            reader.on_read(at * 3 * MIB..at * 3 * MIB + 4096, 10_000 * MIB);
        }
        assert_eq!(reader.around_bytes(), 0, "steps are known");
    }

    #[test]
    fn a_jump_ends_a_stream_and_a_new_one_starts_there() {
        let mut reader = ReadAhead::new(ReadAheadLimits::default());
        let size = 1000 * MIB;
        assert_eq!(reader.on_read(0..MIB, size).len(), 1);
        assert_eq!(reader.on_read(500 * MIB..501 * MIB, size), []);
        let ranges = reader.on_read(501 * MIB..502 * MIB, size);
        assert_eq!(ranges[0].start, 502 * MIB);
    }

    #[test]
    fn reads_a_little_out_of_order_stay_one_stream() {
        let mut reader = ReadAhead::new(ReadAheadLimits::default());
        let size = 1000 * MIB;
        let step = 128 * KIB;
        let mut prefetched = 0;
        for pair in 0..400u64 {
            for at in [2 * pair + 1, 2 * pair] {
                let start = at * step;
                // The first read of all is the second of its pair: the stream starts with it.
                for range in reader.on_read(start..start + step, size) {
                    prefetched += range.end - range.start;
                }
            }
        }
        assert!(prefetched > 90 * MIB, "{prefetched}");
    }

    /// Reads at `starts`; says how many were fetched whole before they came, and how many bytes were
    /// fetched ahead.
    fn read_at(starts: impl Iterator<Item = u64>, bytes: u64, size: u64) -> (usize, u64) {
        let mut reader = ReadAhead::new(ReadAheadLimits::default());
        let (mut fetched, mut by_steps): (Vec<Range<u64>>, Vec<Range<u64>>) = Default::default();
        let (mut ready, mut ahead) = (0, 0);
        for start in starts {
            let covers = |piece: &Range<u64>| piece.start <= start && start + bytes <= piece.end;
            ready += usize::from(fetched.iter().any(covers));
            let new = reader.on_read(start..start + bytes, size);
            assert!(new.windows(2).all(|pair| pair[0].end < pair[1].start), "{new:?}");
            for piece in new {
                // What was taken for a stream at first is on the stage: the disk skips it.
                if reader.steps.taken >= STEPS_MIN {
                    let again = |old: &Range<u64>| piece.start < old.end && old.start < piece.end;
                    assert!(!by_steps.iter().any(again), "{piece:?}");
                    by_steps.push(piece.clone());
                }
                ahead += piece.end - piece.start;
                fetched.push(piece);
            }
        }
        (ready, ahead)
    }

    #[test]
    fn a_file_read_backwards_is_there_before_it_is_asked_for() {
        let (bytes, reads) = (64 * KIB, 1000);
        let (ready, ahead) = read_at((0..reads).rev().map(|at| at * bytes), bytes, reads * bytes);
        assert!(ready >= 990, "{ready} of {reads}");
        assert!(ahead < reads * bytes, "nothing twice, and nothing before the beginning");
    }

    #[test]
    fn equal_steps_fetch_what_they_touch_and_no_gaps() {
        let (bytes, step, reads) = (8 * KIB, 3 * MIB, 500);
        let (ready, ahead) = read_at((0..reads).map(|at| at * step), bytes, reads * step);
        assert!(ready >= 490, "{ready} of {reads}");
        // The first read, at the beginning of the file, is taken for a stream's.
        assert!(ahead <= reads * bytes + 512 * KIB, "{ahead}");
        let close = 20 * KIB;
        let (ready, ahead) = read_at((0..reads).map(|at| 9 + at * close), bytes, reads * close);
        assert!(ready >= 480, "{ready} of {reads}");
        // Until the steps are seen to be equal it may be a stream.
        assert!(ahead <= reads * bytes + 3 * MIB, "{ahead}");
    }

    proptest! {
        #[test]
        fn never_beyond_the_file_nor_beyond_the_window(
            reads in prop::collection::vec((0u64..64, 1u64..5), 1..200),
        ) {
            let size = 60 * MIB + 5;
            let limits = ReadAheadLimits::default();
            let mut reader = ReadAhead::new(limits);
            for (at, length) in reads {
                let start = at * MIB;
                let end = start + length * 64 * KIB;
                for range in reader.on_read(start..end, size) {
                    prop_assert!(range.start < range.end && range.end <= size);
                    let ahead_max = limits.window_bytes_max + limits.align_bytes + REORDER_BYTES;
                    let stepped = reader.steps.taken >= STEPS_MIN;
                    prop_assert!(stepped || range.end <= end + ahead_max);
                    prop_assert!(range.end - range.start <= ahead_max);
                }
            }
        }
    }
}
