//! Which ranges of a file to fetch before they are asked for: pure, one value an open file.
//!
//! A stream is a run of reads each of which begins where an earlier one ended, give or take what
//! several threads of one reader reorder. Its window starts small, doubles as the reader goes on,
//! and ends as soon as the reader jumps. The answer of [`ReadAhead::on_read`] never covers a byte
//! twice while a stream lasts.

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
}

/// How far out of order the reads of one stream may come (the kernel has several in flight).
const REORDER_BYTES: u64 = 1 << 20;

impl ReadAhead {
    /// A reader that has read nothing. A file read from its start is taken for a stream at once.
    pub const fn new(limits: ReadAheadLimits) -> Self {
        Self { limits, expected: 0, fetched: 0, window: 0 }
    }

    /// The reader asked for `range` of a file of `size` bytes. Returns what to prefetch now, beyond
    /// the range itself; `None` for nothing.
    pub fn on_read(&mut self, range: Range<u64>, size: u64) -> Option<Range<u64>> {
        // A stream must show itself more clearly than it must go on.
        let reorder = if self.window == 0 { REORDER_BYTES / 4 } else { REORDER_BYTES };
        if self.expected.abs_diff(range.start) > reorder {
            *self = Self { expected: range.end, fetched: range.end, window: 0, ..*self };
            return None;
        }
        let advanced = range.end > self.expected;
        self.expected = self.expected.max(range.end);
        self.fetched = self.fetched.max(range.end);
        if !advanced {
            return None;
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;

    fn read_all(step: u64, size: u64) -> (Vec<Range<u64>>, u64) {
        let mut reader = ReadAhead::new(ReadAheadLimits::default());
        let mut ahead_max = 0;
        let mut prefetched = Vec::new();
        for start in (0..size).step_by(step as usize) {
            let end = (start + step).min(size);
            if let Some(range) = reader.on_read(start..end, size) {
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
            assert_eq!(reader.on_read(start..start + 4096, 10_000 * MIB), None);
        }
    }

    #[test]
    fn a_jump_ends_a_stream_and_a_new_one_starts_there() {
        let mut reader = ReadAhead::new(ReadAheadLimits::default());
        let size = 1000 * MIB;
        assert!(reader.on_read(0..MIB, size).is_some());
        assert_eq!(reader.on_read(500 * MIB..501 * MIB, size), None);
        let range = reader.on_read(501 * MIB..502 * MIB, size).unwrap();
        assert_eq!(range.start, 502 * MIB);
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
                if let Some(range) = reader.on_read(start..start + step, size) {
                    prefetched += range.end - range.start;
                }
            }
        }
        assert!(prefetched > 90 * MIB, "{prefetched}");
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
                if let Some(range) = reader.on_read(start..end, size) {
                    prop_assert!(range.start < range.end && range.end <= size);
                    let ahead_max = limits.window_bytes_max + limits.align_bytes + REORDER_BYTES;
                    prop_assert!(range.end <= end + ahead_max);
                }
            }
        }
    }
}
