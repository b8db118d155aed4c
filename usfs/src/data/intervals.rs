//! A map from disjoint ranges of a file to values that can be cut.

use std::collections::BTreeMap;
use std::ops::Range;

/// A value that stands for a run of bytes and can be cut at any byte.
pub(crate) trait Divide: Clone {
    /// Drops the first `bytes` bytes.
    fn advance(&mut self, bytes: u64);
    /// Keeps the first `bytes` bytes.
    fn shorten(&mut self, bytes: u64);
}

/// Disjoint ranges, each with a value. No range is empty.
#[derive(Clone, Debug)]
pub(crate) struct IntervalMap<T> {
    /// Start of a range -> its end and value.
    entries: BTreeMap<u64, (u64, T)>,
    bytes: u64,
}

impl<T> Default for IntervalMap<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), bytes: 0 }
    }
}

impl<T: Divide> IntervalMap<T> {
    /// Bytes covered.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Uncovers `range`.
    pub fn cut(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        let before = self.entries.range_mut(..range.start).next_back();
        if let Some((&start, (end, value))) = before
            && *end > range.start
        {
            let old_end = std::mem::replace(end, range.start);
            let mut tail = value.clone();
            value.shorten(range.start - start);
            self.bytes -= old_end - range.start;
            if old_end > range.end {
                tail.advance(range.end - start);
                self.insert(range.end..old_end, tail);
            }
        }
        while let Some((&start, _)) = self.entries.range(range.clone()).next() {
            let (end, mut value) = self.entries.remove(&start).expect("the entry was just seen");
            self.bytes -= end - start;
            if end > range.end {
                value.advance(range.end - start);
                self.insert(range.end..end, value);
            }
        }
    }

    /// Covers `range` with `value`, in place of what was there.
    pub fn set(&mut self, range: Range<u64>, value: T) {
        if range.start < range.end {
            self.cut(range.clone());
            self.insert(range, value);
        }
    }

    fn insert(&mut self, range: Range<u64>, value: T) {
        self.bytes += range.end - range.start;
        self.entries.insert(range.start, (range.end, value));
    }

    /// What covers `range`, in order, clipped to it.
    pub fn overlay(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, T)> + '_ {
        let first = self.entries.range(..range.start).next_back();
        let first = first.filter(|(_, (end, _))| *end > range.start).map(|(start, _)| *start);
        let from = first.unwrap_or(range.start).min(range.end);
        self.entries.range(from..range.end.max(from)).map(move |(&start, (end, value))| {
            let mut value = value.clone();
            let clipped = start.max(range.start)..(*end).min(range.end);
            if clipped.end < *end {
                value.shorten(clipped.end - start);
            }
            if clipped.start > start {
                value.advance(clipped.start - start);
            }
            (clipped, value)
        })
    }

    /// Every range and its value, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Range<u64>, &T)> + '_ {
        self.entries.iter().map(|(start, (end, value))| (*start..*end, value))
    }

    /// The first covered byte at or after `offset`, whose value `wanted` accepts.
    pub fn next_at(&self, offset: u64, wanted: impl Fn(&T) -> bool) -> Option<u64> {
        let before = self.entries.range(..offset).next_back();
        if before.is_some_and(|(_, (end, value))| *end > offset && wanted(value)) {
            return Some(offset);
        }
        self.entries.range(offset..).find(|(_, (_, value))| wanted(value)).map(|(start, _)| *start)
    }

    /// The value at `offset` and where its range ends.
    pub fn at(&self, offset: u64) -> Option<(u64, &T)> {
        let (_, (end, value)) = self.entries.range(..=offset).next_back()?;
        (*end > offset).then_some((*end, value))
    }

    /// The parts of `range` that nothing covers.
    pub fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        let first = self.entries.range(..range.start).next_back().map(|(start, _)| *start);
        let from = first.unwrap_or(range.start).min(range.end);
        for (&start, (end, _)) in self.entries.range(from..range.end.max(from)) {
            if start > at {
                gaps.push(at..start);
            }
            at = at.max(*end);
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }
}
