//! What was written to one file and is not on its way yet.
//!
//! Segments of up to 1 MiB: a write into a segment overwrites it in place, one that continues a
//! segment grows it, any other starts a new one. So a stream costs one copy, tiny appends an
//! amortised one, and random writes one small segment each. Taking splits segments without copying.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::{Bytes, BytesMut};

/// Where a segment stops growing.
const SEGMENT_BYTES_MAX: usize = 1 << 20;
/// A segment that has grown this far is part of a stream: it gets its full room at once.
const STREAM_BYTES: usize = 32 << 10;
/// Neighbours looked at on each side to see how long a run has become.
const RUN_NEIGHBOURS_MAX: usize = 64;

/// Dirty bytes of one file, by offset.
#[derive(Debug, Default)]
pub struct DirtyBuffer {
    segments: BTreeMap<u64, BytesMut>,
    bytes: u64,
    /// The longest run of adjacent segments seen since the last take, or less.
    run_bytes: u64,
    /// Where the last take ended: the next goes on from there.
    cursor: u64,
}

impl DirtyBuffer {
    /// Dirty bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether nothing is dirty.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// The length of a long run of dirty bytes without gaps: the longest known.
    pub fn run_bytes(&self) -> u64 {
        self.run_bytes
    }

    /// Puts `data` at `offset`, over what is there.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let (mut at, mut data) = (offset, data);
        while !data.is_empty() {
            let next = self.segments.range(at + 1..).next().map_or(u64::MAX, |(start, _)| *start);
            let written = match self.segments.range_mut(..=at).next_back() {
                Some((start, segment)) if at < start + segment.len() as u64 => {
                    let from = (at - start) as usize;
                    let bytes = data.len().min(segment.len() - from);
                    segment[from..from + bytes].copy_from_slice(&data[..bytes]);
                    bytes
                }
                Some((start, segment)) if at == start + segment.len() as u64 => {
                    let gap = data.len().min((next - at) as usize);
                    let room = SEGMENT_BYTES_MAX.saturating_sub(segment.len());
                    let bytes = if room == 0 {
                        self.start_segment(at, &data[..gap], SEGMENT_BYTES_MAX)
                    } else {
                        grow(segment, &data[..gap.min(room)])
                    };
                    self.bytes += bytes as u64;
                    bytes
                }
                _ => {
                    let gap = data.len().min((next - at) as usize);
                    let bytes = self.start_segment(at, &data[..gap], 0);
                    self.bytes += bytes as u64;
                    bytes
                }
            };
            at += written as u64;
            data = &data[written..];
        }
        if offset < at {
            self.run_bytes = self.run_bytes.max(self.run_around(offset));
        }
    }

    /// Starts a segment with as much of `data` as one may hold.
    fn start_segment(&mut self, at: u64, data: &[u8], capacity: usize) -> usize {
        let data = &data[..data.len().min(SEGMENT_BYTES_MAX)];
        let mut segment = BytesMut::with_capacity(capacity.max(data.len()));
        segment.extend_from_slice(data);
        self.segments.insert(at, segment);
        data.len()
    }

    /// The length of the run around `offset`, as far as a bounded look shows it.
    fn run_around(&self, offset: u64) -> u64 {
        let mut before = self.segments.range(..=offset).rev().take(RUN_NEIGHBOURS_MAX);
        let Some((&first, segment)) = before.next() else { return 0 };
        let (mut start, mut end) = (first, first + segment.len() as u64);
        for (&earlier, segment) in before {
            if earlier + segment.len() as u64 != start {
                break;
            }
            start = earlier;
        }
        for (&later, segment) in self.segments.range(first + 1..).take(RUN_NEIGHBOURS_MAX) {
            if later != end {
                break;
            }
            end += segment.len() as u64;
        }
        end - start
    }

    /// Forgets what is dirty from `size` on.
    pub fn truncate(&mut self, size: u64) {
        self.punch(size..u64::MAX);
    }

    /// Forgets what is dirty in `range`.
    pub fn punch(&mut self, range: Range<u64>) {
        if range.start < range.end && self.first_overlapping(&range).is_some() {
            self.take_range(range);
            self.run_bytes = self.longest_run();
        }
    }

    /// The dirty pieces in `range`, in order, clipped to it.
    pub fn overlay(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &[u8])> + '_ {
        let from = self.first_overlapping(&range).unwrap_or(range.end);
        self.segments.range(from..range.end.max(from)).map(move |(&start, segment)| {
            let first = range.start.max(start);
            let end = range.end.min(start + segment.len() as u64);
            (first, &segment[(first - start) as usize..(end - start) as usize])
        })
    }

    /// The first dirty byte at or after `offset`.
    pub fn next_at(&self, offset: u64) -> Option<u64> {
        self.first_overlapping(&(offset..u64::MAX)).map(|start| start.max(offset))
    }

    /// Where the dirty bytes that begin at or before `offset` without a gap end; `None` where
    /// `offset` is not dirty.
    pub fn dirty_until(&self, offset: u64) -> Option<u64> {
        let mut end = None;
        for (&start, segment) in
            self.segments.range(self.first_overlapping(&(offset..offset + 1))?..)
        {
            if end.is_some_and(|end| end != start) {
                break;
            }
            end = Some(start + segment.len() as u64);
        }
        end
    }

    /// The parts of `range` that are not dirty.
    pub fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        for (offset, bytes) in self.overlay(range.clone()) {
            if offset > at {
                gaps.push(at..offset);
            }
            at = offset + bytes.len() as u64;
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }

    /// Takes up to `max_bytes`: the start of a run that long where there is one, else whatever
    /// comes next in the order of the file, going round. Nothing is copied.
    pub fn take(&mut self, max_bytes: u64) -> Vec<(u64, Bytes)> {
        let mut taken = Vec::new();
        if let Some(start) = self.run_of(max_bytes) {
            taken = self.take_range(start..start + max_bytes);
            self.cursor = start + max_bytes;
        } else {
            let mut left = max_bytes;
            while left > 0 && !self.segments.is_empty() {
                let next = self.segments.range(self.cursor..).next();
                let Some((&start, segment)) = next.or_else(|| self.segments.iter().next()) else {
                    break;
                };
                let end = start + left.min(segment.len() as u64);
                left -= end - start;
                taken.extend(self.take_range(start..end));
                self.cursor = end;
            }
            taken.sort_unstable_by_key(|(offset, _)| *offset);
        }
        self.run_bytes = self.longest_run();
        taken
    }

    /// The start of the first run of at least `bytes`, looking only where one is known to be.
    fn run_of(&self, bytes: u64) -> Option<u64> {
        if self.run_bytes < bytes || bytes == 0 {
            return None;
        }
        let (mut start, mut end) = (0, 0);
        for (&at, segment) in &self.segments {
            if at != end {
                start = at;
            }
            end = at + segment.len() as u64;
            if end - start >= bytes {
                return Some(start);
            }
        }
        None
    }

    fn longest_run(&self) -> u64 {
        let (mut longest, mut start, mut end) = (0, 0, 0);
        for (&at, segment) in &self.segments {
            if at != end {
                start = at;
            }
            end = at + segment.len() as u64;
            longest = longest.max(end - start);
        }
        longest
    }

    /// The start of the first segment that has bytes in `range`.
    fn first_overlapping(&self, range: &Range<u64>) -> Option<u64> {
        let before = self.segments.range(..range.start).next_back();
        if let Some((&start, segment)) = before
            && start + segment.len() as u64 > range.start
        {
            return Some(start);
        }
        self.segments.range(range.clone()).next().map(|(start, _)| *start)
    }

    /// Takes everything in `range`.
    fn take_range(&mut self, range: Range<u64>) -> Vec<(u64, Bytes)> {
        let mut taken = Vec::new();
        while let Some(start) = self.first_overlapping(&range) {
            let mut segment = self.segments.remove(&start).expect("the segment was just seen");
            let end = start + segment.len() as u64;
            if end > range.end {
                let tail = segment.split_off((range.end - start) as usize);
                self.segments.insert(range.end, tail);
            }
            if start < range.start {
                let middle = segment.split_off((range.start - start) as usize);
                self.segments.insert(start, segment);
                segment = middle;
            }
            self.bytes -= segment.len() as u64;
            taken.push((start.max(range.start), segment.freeze()));
        }
        taken
    }
}

/// Appends to a segment, giving a stream its room at once.
fn grow(segment: &mut BytesMut, data: &[u8]) -> usize {
    if segment.len() >= STREAM_BYTES && segment.capacity() - segment.len() < data.len() {
        segment.reserve(SEGMENT_BYTES_MAX - segment.len());
    }
    segment.extend_from_slice(data);
    data.len()
}
