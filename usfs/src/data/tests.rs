//! The layers against a plain byte vector and a naive directory.

use std::collections::HashMap;

use bytes::Bytes;
use proptest::prelude::*;
use us_core::ids::{BlockId, Ino};
use us_core::limits::CHUNK_BYTES;

use super::*;

/// A file as a directory and its blocks would have it, byte by byte.
#[derive(Default)]
struct Naive {
    /// What a reader must see.
    bytes: Vec<u8>,
    /// The map the directory holds: for each byte its place.
    committed: Vec<Place>,
    blocks: HashMap<BlockId, Vec<u8>>,
    /// Blocks on their way, oldest first.
    sealed: Vec<(Ticket, Vec<u8>)>,
    tickets: u64,
}

#[derive(Clone, Debug)]
enum Op {
    Write { offset: u64, bytes: u64 },
    Truncate(u64),
    Punch { offset: u64, bytes: u64 },
    Zero { offset: u64, bytes: u64 },
    Seal(u64),
    Commit,
    Abort,
    Forget,
    Fetch(u64),
    Read { offset: u64, bytes: u64 },
    Seek(u64),
}

/// Three chunks and a bit, so that offsets meet chunk bounds.
const SPACE: u64 = 3 * CHUNK_BYTES + 999;

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..2000u64,
        (0..4u64, 0..100u64).prop_map(|(chunk, by)| (chunk * CHUNK_BYTES + by).saturating_sub(50)),
        0..SPACE,
    ]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![1..300u64, 1..20_000u64, 1..2_500_000u64]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (offset(), length()).prop_map(|(offset, bytes)| Op::Write { offset, bytes }),
        1 => offset().prop_map(Op::Truncate),
        1 => (offset(), length()).prop_map(|(offset, bytes)| Op::Punch { offset, bytes }),
        1 => (offset(), length()).prop_map(|(offset, bytes)| Op::Zero { offset, bytes }),
        4 => length().prop_map(Op::Seal),
        4 => Just(Op::Commit),
        1 => Just(Op::Abort),
        1 => Just(Op::Forget),
        2 => (0..4u64).prop_map(Op::Fetch),
        3 => (offset(), length()).prop_map(|(offset, bytes)| Op::Read { offset, bytes }),
        2 => offset().prop_map(Op::Seek),
    ]
}

impl Naive {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn grow(&mut self, size: u64) {
        if size > self.size() {
            self.bytes.resize(size as usize, 0);
            self.committed.resize(size as usize, Place::Hole);
        }
    }

    /// The range clipped to the file.
    fn clip(&self, offset: u64, bytes: u64) -> std::ops::Range<u64> {
        offset.min(self.size())..(offset + bytes).min(self.size())
    }

    fn map(&mut self, extents: &[Extent]) {
        for extent in extents {
            for by in 0..extent.bytes {
                let place = match extent.place {
                    Place::Block { block, offset } => Place::Block { block, offset: offset + by },
                    other => other,
                };
                self.committed[(extent.offset + by) as usize] = place;
            }
        }
    }

    /// The directory's answer for a chunk, in runs.
    fn chunk(&self, chunk: u64) -> Vec<Extent> {
        let start = (chunk * CHUNK_BYTES).min(self.size());
        let end = (start + CHUNK_BYTES).min(self.size());
        let mut extents: Vec<Extent> = Vec::new();
        for at in start..end {
            let place = self.committed[at as usize];
            if let Some(last) = extents.last_mut().filter(|last| last.range().end == at) {
                let continued = match last.place {
                    Place::Block { block, offset } => {
                        Place::Block { block, offset: offset + last.bytes }
                    }
                    other => other,
                };
                if continued == place {
                    last.bytes += 1;
                    continue;
                }
            }
            if place != Place::Hole {
                extents.push(Extent { offset: at, bytes: 1, place });
            }
        }
        extents
    }

    fn fetch(&self, data: &mut FileData, chunks: std::ops::Range<u64>) {
        for chunk in chunks {
            data.map_mut().install(chunk, &self.chunk(chunk));
        }
    }

    fn commit(&mut self, data: &mut FileData) {
        if self.sealed.is_empty() {
            return;
        }
        let (ticket, content) = self.sealed.remove(0);
        let mut id = [0; 16];
        id[..8].copy_from_slice(&ticket.0.to_be_bytes());
        let block = BlockId::from_bytes(id);
        self.blocks.insert(block, content);
        let extents = data.commit(ticket, block);
        assert!(extents.windows(2).all(|pair| pair[0].range().end <= pair[1].offset));
        self.map(&extents);
    }

    fn seal(&mut self, data: &mut FileData, max_bytes: u64) {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        let mut content = vec![0xEE; 7];
        let dirty_before = data.dirty().bytes();
        for piece in data.seal(ticket, 7, max_bytes) {
            assert_eq!(piece.block_offset, content.len() as u64);
            content.extend_from_slice(&piece.bytes);
        }
        assert_eq!(dirty_before - data.dirty().bytes(), content.len() as u64 - 7);
        assert_eq!(content.len() as u64 - 7, dirty_before.min(max_bytes));
        if content.len() > 7 {
            self.sealed.push((ticket, content));
        }
    }

    fn read(&self, data: &mut FileData, range: std::ops::Range<u64>) -> Vec<u8> {
        let plan = loop {
            match data.read_plan(range.clone(), self.size()) {
                ReadPlan::Ready(pieces) => break pieces,
                ReadPlan::Fetch(chunks) => self.fetch(data, chunks),
            }
        };
        let mut read = Vec::new();
        let mut at = range.start.min(self.size());
        for piece in plan {
            let (offset, bytes) = match piece {
                ReadPiece::Bytes { offset, bytes } => (offset, bytes),
                ReadPiece::Zero { offset, bytes } => (offset, vec![0; bytes as usize].into()),
                ReadPiece::Block { offset, bytes, block, block_offset } => {
                    let from = block_offset as usize;
                    let content = &self.blocks[&block][from..from + bytes as usize];
                    (offset, Bytes::copy_from_slice(content))
                }
            };
            assert_eq!(offset, at, "pieces follow each other");
            at += bytes.len() as u64;
            read.extend_from_slice(&bytes);
        }
        read
    }

    fn seek(&self, data: &mut FileData, offset: u64) {
        let seek = |data: &mut FileData, hole: bool| loop {
            let answer = if hole {
                data.seek_hole(offset, self.size())
            } else {
                data.seek_data(offset, self.size())
            };
            match answer {
                Seek::At(at) => break Some(at),
                Seek::None => break None,
                Seek::Fetch(chunk) => self.fetch(data, chunk..chunk + 1),
            }
        };
        let zero_until = seek(data, false).unwrap_or(self.size());
        let skipped = offset.min(self.size()) as usize..zero_until as usize;
        assert!(self.bytes[skipped].iter().all(|byte| *byte == 0), "data was skipped");
        let hole = seek(data, true);
        assert_eq!(hole.is_none(), offset >= self.size());
        if let Some(hole) = hole.filter(|hole| *hole < self.size()) {
            assert_eq!(self.bytes[hole as usize], 0);
        }
    }

    fn step(&mut self, data: &mut FileData, number: usize, op: Op) {
        match op {
            Op::Write { offset, bytes } => {
                // No byte is zero, so that holes are told from data.
                let fresh: Vec<u8> =
                    (0..bytes).map(|by| ((number as u64 * 31 + by) % 255) as u8 + 1).collect();
                self.grow(offset + bytes);
                data.write(offset, &fresh);
                self.bytes[offset as usize..(offset + bytes) as usize].copy_from_slice(&fresh);
            }
            Op::Truncate(size) => {
                self.bytes.truncate(size as usize);
                self.committed.truncate(size as usize);
                self.grow(size);
                data.truncate(size);
            }
            Op::Punch { offset, bytes } | Op::Zero { offset, bytes } => {
                let range = self.clip(offset, bytes);
                let place = if matches!(op, Op::Zero { .. }) { Place::Zero } else { Place::Hole };
                match place {
                    Place::Zero => data.zero_range(range.clone()),
                    _ => data.punch(range.clone()),
                }
                let bounds = range.start as usize..range.end as usize;
                self.bytes[bounds.clone()].fill(0);
                self.committed[bounds].fill(place);
            }
            Op::Seal(max_bytes) => self.seal(data, max_bytes),
            Op::Commit => self.commit(data),
            Op::Abort => {
                if let Some((ticket, _)) = self.sealed.pop() {
                    data.abort(ticket);
                }
            }
            Op::Forget => data.map_mut().forget(),
            Op::Fetch(chunk) => self.fetch(data, chunk..chunk + 1),
            Op::Read { offset, bytes } => {
                let range = self.clip(offset, bytes);
                let read = self.read(data, offset..offset + bytes);
                assert!(read == self.bytes[range.start as usize..range.end as usize]);
            }
            Op::Seek(offset) => self.seek(data, offset),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_file_reads_as_it_was_written(ops in prop::collection::vec(op(), 1..60)) {
        let mut naive = Naive::default();
        let mut data = FileData::new_file();
        for (number, op) in ops.into_iter().enumerate() {
            naive.step(&mut data, number, op);
        }
        let size = naive.size();
        prop_assert!(naive.read(&mut data, 0..size) == naive.bytes);
        // Settled, nothing but the directory's map and its blocks is left: they say the same.
        while !data.is_clean() {
            naive.seal(&mut data, 1 << 20);
            naive.commit(&mut data);
        }
        let mut fresh = FileData::known_file();
        prop_assert!(naive.read(&mut fresh, 0..size) == naive.bytes);
        naive.fetch(&mut data, 0..size.div_ceil(CHUNK_BYTES));
        let mapped = naive.committed.iter().filter(|place| **place != Place::Hole).count();
        prop_assert_eq!(data.map().mapped_bytes(), mapped as u64);
    }

    #[test]
    fn what_an_fsync_waits_for_is_never_only_in_newer_bytes(
        older in (0u64..100, 1u64..100), newer in (0u64..100, 1u64..100),
    ) {
        // Sealed, sealed over, the older store fails: all of its range must be dirty again.
        let mut data = FileData::new_file();
        data.write(older.0, &vec![1; older.1 as usize]);
        data.seal(Ticket(1), 0, 1000);
        data.write(newer.0, &vec![2; newer.1 as usize]);
        data.seal(Ticket(2), 0, 1000);
        data.abort(Ticket(1));
        prop_assert_eq!(data.dirty().gaps(older.0..older.0 + older.1), vec![]);
        for (offset, bytes) in data.dirty().overlay(0..1000) {
            for (at, byte) in (offset..).zip(bytes) {
                let is_newer = (newer.0..newer.0 + newer.1).contains(&at);
                prop_assert_eq!(*byte, if is_newer { 2 } else { 1 });
            }
        }
    }
}

#[test]
fn a_map_that_arrives_late_changes_nothing_of_what_was_committed_since() {
    let block = |byte| BlockId::from_bytes([byte; 16]);
    let place = |byte| Place::Block { block: block(byte), offset: 0 };
    let mut data = FileData::known_file();
    data.write(100, &[5; 50]);
    data.seal(Ticket(1), 0, 1 << 20);
    data.commit(Ticket(1), block(2));
    data.punch(200..300);
    // Fetched before either.
    data.map_mut().install(0, &[Extent { offset: 0, bytes: 1000, place: place(1) }]);
    let pieces = match data.read_plan(0..1000, 1000) {
        ReadPlan::Ready(pieces) => pieces,
        ReadPlan::Fetch(chunks) => panic!("{chunks:?}"),
    };
    let piece = |offset, bytes, by, block_offset| ReadPiece::Block {
        offset,
        bytes,
        block: block(by),
        block_offset,
    };
    assert_eq!(
        pieces,
        vec![
            piece(0, 100, 1, 0),
            piece(100, 50, 2, 0),
            piece(150, 50, 1, 150),
            ReadPiece::Zero { offset: 200, bytes: 100 },
            piece(300, 700, 1, 300),
        ]
    );
}

#[test]
fn a_stream_is_sealed_in_whole_blocks_and_committed_as_one_extent_each() {
    let mut data = FileData::new_file();
    let content = vec![9u8; 128 << 10];
    let full = 252 * 16384;
    for at in 0..128 {
        data.write(at * content.len() as u64, &content);
    }
    data.write(1 << 30, &[1; 4096]);
    assert!(data.dirty().run_bytes() >= full);
    for ticket in 0..3u64 {
        let pieces = data.seal(Ticket(ticket), 0, full);
        assert_eq!(pieces[0].offset, ticket * full);
        assert!(pieces.len() <= 6, "{}", pieces.len());
        let extents = data.commit(Ticket(ticket), BlockId::from_bytes([1; 16]));
        assert_eq!(extents.len(), 1);
        assert_eq!(extents[0].range(), ticket * full..(ticket + 1) * full);
    }
}

#[test]
fn clones_refer_to_what_is_committed_only() {
    let mut data = FileData::new_file();
    data.write(0, &[1; 100]);
    assert_eq!(data.clone_range(50..200), ClonePlan::Flush);
    data.seal(Ticket(1), 0, 100);
    assert_eq!(data.clone_range(50..200), ClonePlan::Flush);
    let block = BlockId::from_bytes([3; 16]);
    data.commit(Ticket(1), block);
    assert_eq!(
        data.clone_range(50..200),
        ClonePlan::Extents(vec![
            Extent { offset: 50, bytes: 50, place: Place::Block { block, offset: 50 } },
            Extent { offset: 100, bytes: 100, place: Place::Hole },
        ])
    );
    assert_eq!(FileData::known_file().clone_range(0..1), ClonePlan::Fetch(0..1));
}

#[test]
fn many_small_writes_stay_cheap() {
    let mut data = FileData::new_file();
    for at in 0..200_000u64 {
        data.write(at * 10, b"0123456789");
    }
    assert_eq!(data.dirty().bytes(), 2_000_000);
    let pieces = data.seal(Ticket(1), 0, u64::MAX);
    assert!(pieces.len() <= 3, "appends coalesce: {}", pieces.len());
}

fn packer() -> Packer {
    Packer::new(PackerLimits { block_bytes_max: 1000, age_ms_max: 5000 })
}

fn facts(dirty_bytes: u64, run_bytes: u64, since_ms: u64, wanted: bool) -> DirtyFacts {
    DirtyFacts { dirty_bytes, run_bytes, since_ms, wanted }
}

#[test]
fn packing_prefers_streams_then_waiters_then_age() {
    let mut packer = packer();
    packer.update(Ino(1), facts(100, 100, 10, false));
    assert_eq!(packer.next(20, false), None);
    assert_eq!(packer.next(5010, false), Some(vec![PackItem { ino: Ino(1), bytes: 100 }]));
    packer.update(Ino(2), facts(300, 300, 20, true));
    let item = |ino, bytes| PackItem { ino: Ino(ino), bytes };
    assert_eq!(packer.next(20, false), Some(vec![item(2, 300), item(1, 100)]));
    packer.update(Ino(3), facts(2500, 2500, 30, false));
    assert_eq!(packer.next(30, false), Some(vec![item(3, 1000)]));
    packer.update(Ino(3), facts(700, 500, 30, false));
    // 2 and 1 fit whole, 3 does not: it stays whole for the next block.
    assert_eq!(packer.next(30, false), Some(vec![item(2, 300), item(1, 100)]));
    packer.update(Ino(2), facts(0, 0, 0, false));
    packer.update(Ino(1), facts(0, 0, 0, false));
    assert_eq!(packer.dirty_bytes(), 700);
    assert_eq!(packer.next(30, false), None);
    assert_eq!(packer.next(30, true), Some(vec![item(3, 700)]));
    assert_eq!(packer.due_ms(), Some(5030));
}

proptest! {
    #[test]
    fn everything_dirty_is_packed_in_the_end(
        files in prop::collection::vec((1u64..3000, 0u64..1000, any::<bool>()), 1..50),
    ) {
        let mut packer = packer();
        let mut left: HashMap<Ino, DirtyFacts> = HashMap::new();
        for (ino, (bytes, since_ms, wanted)) in (1u64..).zip(files) {
            let facts = facts(bytes, bytes / 2, since_ms, wanted);
            left.insert(Ino(ino), facts);
            packer.update(Ino(ino), facts);
        }
        let total: u64 = left.values().map(|facts| facts.dirty_bytes).sum();
        let mut blocks = 0;
        while let Some(items) = packer.next(10_000, false) {
            blocks += 1;
            let packed: u64 = items.iter().map(|item| item.bytes).sum();
            prop_assert!(packed > 0 && packed <= 1000);
            for item in items {
                let facts = left.get_mut(&item.ino).unwrap();
                prop_assert!(item.bytes > 0 && item.bytes <= facts.dirty_bytes);
                facts.dirty_bytes -= item.bytes;
                facts.run_bytes = facts.dirty_bytes / 2;
                packer.update(item.ino, *facts);
            }
        }
        prop_assert_eq!(packer.dirty_bytes(), 0);
        prop_assert!(blocks <= 2 * total.div_ceil(1000) + 1, "{} blocks", blocks);
    }
}
