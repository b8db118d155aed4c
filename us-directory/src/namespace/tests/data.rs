//! File data against arrays of cells, around the border of two chunks.

use super::*;

/// The window of each file that the test writes to: across the first chunks' border.
const BASE: u64 = CHUNK_BYTES - 32;
const CELLS: usize = 64;
const FILES: [u64; 3] = [2, 3, 4];
const BLOCK_BYTES: u32 = 48;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cell {
    Hole,
    Zero,
    Block(u8, u8),
}

#[derive(Clone, Debug)]
enum Step {
    Write { file: usize, at: u8, length: u8, inline: bool },
    Clone { file: usize, at: u8, from: usize, from_at: u8, expect: bool },
    Punch { file: usize, at: u8, length: u8, zero: bool },
    Truncate { file: usize, at: u8 },
}

fn step() -> impl Strategy<Value = Step> {
    let place = (0usize..3, 0u8..64);
    prop_oneof![
        3 => (place.clone(), 1u8..48, any::<bool>())
            .prop_map(|((file, at), length, inline)| Step::Write { file, at, length, inline }),
        2 => (place.clone(), place.clone(), any::<bool>()).prop_map(
            |((file, at), (from, from_at), expect)| Step::Clone { file, at, from, from_at, expect }
        ),
        1 => (place.clone(), 1u8..64, any::<bool>())
            .prop_map(|((file, at), length, zero)| Step::Punch { file, at, length, zero }),
        1 => place.prop_map(|(file, at)| Step::Truncate { file, at }),
    ]
}

fn block_bytes(id: u8) -> Bytes {
    vec![id; 16].into()
}

fn block(id: u8, inline: bool) -> BlockCommit {
    if inline {
        let (block, inline) = (block_bytes(id), vec![1; 64].into());
        return BlockCommit { block, plaintext_bytes: BLOCK_BYTES, inline, ..Default::default() };
    }
    BlockCommit {
        block: block_bytes(id),
        s: 2,
        r: 1,
        page_bytes: 4096,
        plaintext_bytes: BLOCK_BYTES,
        birth: 1,
        providers: vec![1, 2, 3],
        durable: vec![0b111].into(),
        ..Default::default()
    }
}

type Model = BTreeMap<u64, Vec<Cell>>;

fn extent(ino: u64, at: u64, length: u64, cell: Cell) -> ExtentWrite {
    let (block, block_offset) = match cell {
        Cell::Block(id, offset) => (block_bytes(id), u64::from(offset)),
        Cell::Hole | Cell::Zero => (Bytes::new(), 0),
    };
    let zero = cell == Cell::Zero;
    ExtentWrite { ino, offset: BASE + at, length, block, block_offset, zero, ..Default::default() }
}

fn commit(blocks: Vec<BlockCommit>, extents: Vec<ExtentWrite>) -> Op {
    Op::CommitData(CommitData { blocks, extents, files: vec![] })
}

fn fill(cells: &mut [Cell], at: usize, length: usize, cell: Cell) {
    for (ahead, slot) in cells[at..at + length].iter_mut().enumerate() {
        *slot = match cell {
            Cell::Block(id, offset) => Cell::Block(id, offset + ahead as u8),
            other => other,
        };
    }
}

fn take(volume: &mut Volume, model: &mut Model, next: &mut u8, step: &Step) {
    match *step {
        Step::Write { file, at, length, inline } => {
            let (ino, id) = (FILES[file], *next);
            *next += 1;
            let length = usize::from(length).min(CELLS - usize::from(at));
            let write = extent(ino, u64::from(at), length as u64, Cell::Block(id, 0));
            volume.apply(vec![commit(vec![block(id, inline)], vec![write])]).unwrap();
            fill(model.get_mut(&ino).unwrap(), at.into(), length, Cell::Block(id, 0));
        }
        Step::Clone { file, at, from, from_at, expect } => {
            let source = model[&FILES[from]][usize::from(from_at)];
            let Cell::Block(id, offset) = source else { return };
            let ino = FILES[file];
            let length = usize::from(BLOCK_BYTES as u8 - offset).min(CELLS - usize::from(at));
            let mut write = extent(ino, u64::from(at), length as u64, source);
            let there = model[&ino][usize::from(at)];
            let cells = &model[&ino][usize::from(at)..usize::from(at) + length];
            let mut wanted = true;
            if let (true, Cell::Block(old, old_offset)) = (expect, there) {
                // Compare and swap: only while the whole range is this piece of this block.
                write.expected_block = block_bytes(old);
                write.expected_offset = u64::from(old_offset);
                wanted = cells.iter().enumerate().all(|(ahead, cell)| {
                    *cell == Cell::Block(old, old_offset.saturating_add(ahead as u8))
                });
            }
            volume.apply(vec![commit(vec![], vec![write])]).unwrap();
            if wanted {
                fill(model.get_mut(&ino).unwrap(), at.into(), length, Cell::Block(id, offset));
            }
        }
        Step::Punch { file, at, length, zero } => {
            let ino = FILES[file];
            let length = usize::from(length).min(CELLS - usize::from(at));
            let cell = if zero { Cell::Zero } else { Cell::Hole };
            let write = extent(ino, u64::from(at), length as u64, cell);
            volume.apply(vec![commit(vec![], vec![write])]).unwrap();
            fill(model.get_mut(&ino).unwrap(), at.into(), length, cell);
        }
        Step::Truncate { file, at } => {
            let ino = FILES[file];
            let grow = FileGrowth { ino, size: BASE + CELLS as u64, ..Default::default() };
            let grow = CommitData { files: vec![grow], ..Default::default() };
            let size = Some(BASE + u64::from(at));
            let set = SetAttributes { ino, size, ..Default::default() };
            volume.apply(vec![Op::CommitData(grow), Op::SetAttributes(set)]).unwrap();
            fill(model.get_mut(&ino).unwrap(), at.into(), CELLS - usize::from(at), Cell::Hole);
        }
    }
}

fn read_cells(volume: &Volume, ino: u64) -> Vec<Cell> {
    let mut cells = vec![Cell::Hole; CELLS];
    for (key, value) in volume.scan(&keys::chunks(&VOLUME, ino)) {
        let map: ChunkRecord = decode(&key, &value).unwrap();
        assert!(!map.extents.is_empty());
        let ends = map.extents.iter().map(ExtentRecord::end);
        let starts = map.extents.iter().skip(1).map(|extent| extent.offset);
        assert!(ends.zip(starts).all(|(end, start)| end <= start), "{map:?}");
        for extent in &map.extents {
            let start = keys::last_number(&key) * CHUNK_BYTES + u64::from(extent.offset) - BASE;
            let cell = match extent.block.first() {
                None => Cell::Zero,
                Some(id) => Cell::Block(*id, extent.block_offset as u8),
            };
            fill(&mut cells, start as usize, extent.length as usize, cell);
        }
    }
    cells
}

fn check(volume: &Volume, model: &Model, blocks_made: u8) {
    let mut live: BTreeMap<u8, u64> = BTreeMap::new();
    let mut chunks: BTreeMap<u8, BTreeSet<(u64, u64)>> = BTreeMap::new();
    for (ino, cells) in model {
        assert_eq!(&read_cells(volume, *ino), cells);
        let record: InodeRecord = volume.get(&keys::inode(&VOLUME, *ino)).unwrap();
        let mapped = cells.iter().filter(|cell| **cell != Cell::Hole).count();
        assert_eq!(record.allocated_bytes as usize, mapped);
        for (at, cell) in cells.iter().enumerate() {
            if let Cell::Block(id, _) = cell {
                *live.entry(*id).or_default() += 1;
                chunks.entry(*id).or_default().insert((*ino, (BASE + at as u64) / CHUNK_BYTES));
            }
        }
    }
    let usage: UsageRecord = volume.get(&keys::usage(&VOLUME)).unwrap();
    assert_eq!(usage.live_bytes, live.values().sum::<u64>());
    assert_eq!(usage.blocks as usize, live.len());
    assert_eq!(usage.stored_bytes, live.len() as u64 * u64::from(BLOCK_BYTES));
    assert_eq!(volume.scan(&keys::tag(&VOLUME, b'b')).len(), live.len());
    let references = volume.scan(&keys::tag(&VOLUME, b'r'));
    assert_eq!(references.len(), chunks.values().map(BTreeSet::len).sum::<usize>());
    let graves = volume.scan(&keys::tag(&keys::CLUSTER, b'g'));
    let buried: BTreeSet<Option<BlockId>> =
        graves.iter().map(|(key, _)| keys::last_block(key)).collect();
    let mut coded = 0;
    for id in 0..blocks_made {
        let block = BlockId::from_bytes([id; 16]);
        let record: Option<BlockRecord> = volume.get(&keys::block(&VOLUME, &block));
        let record = record.map(|record| {
            coded += usize::from(!record.is_inline());
            (record.live_bytes, record.references)
        });
        let expected = live.get(&id).map(|bytes| (*bytes, chunks[&id].len() as u64));
        assert_eq!(record, expected);
        assert!(expected.is_none() || !buried.contains(&Some(block)));
    }
    assert_eq!(volume.scan(&keys::tag(&VOLUME, b'p')).len(), 3 * coded);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn maps_agree_with_cells(steps in proptest::collection::vec(step(), 1..60)) {
        let mut volume = Volume::new();
        let mut model = Model::new();
        for ino in FILES {
            volume.apply(vec![create(1, ino as u8, ino, S_IFREG | 0o644)]).unwrap();
            model.insert(ino, vec![Cell::Hole; CELLS]);
        }
        let mut next = 0;
        for step in &steps {
            take(&mut volume, &mut model, &mut next, step);
        }
        check(&volume, &model, next);
        // Deleted and reaped, nothing is left but graves.
        for ino in FILES {
            let unlink = Unlink { dir: 1, name_hash: hash(ino as u8), ino, ..Default::default() };
            volume.apply(vec![Op::Unlink(unlink)]).unwrap();
        }
        for (key, _) in volume.scan(&keys::tag(&VOLUME, b'k')) {
            while {
                let mut tx = volume.tx();
                let freed = tx.reap(keys::last_number(&key), 1).unwrap();
                let outcome = tx.finish().unwrap();
                volume.finish(outcome);
                freed > 0
            } {}
        }
        for tag in [b'm', b'b', b'r', b'p', b'k', b'x'] {
            prop_assert_eq!(volume.scan(&keys::tag(&VOLUME, tag)).len(), 0);
        }
    }
}

/// A commit may add extents before it replaces others: only what it leaves counts. One that was counted
/// piece by piece ended the session of a mount that had counted right.
#[test]
fn the_extents_of_a_chunk_are_counted_when_a_commit_is_whole() {
    let mut volume = Volume::new();
    volume.apply(vec![create(1, 2, 2, S_IFREG | 0o644)]).unwrap();
    let zeros = |at: u64, length: u64| ExtentWrite {
        ino: 2,
        offset: at,
        length,
        zero: true,
        ..Default::default()
    };
    let dust = |from: u64, pieces: u64| (0..pieces).map(move |piece| zeros(from + piece * 3, 1));
    volume.apply(vec![commit(vec![], dust(100_000, 900).collect())]).unwrap();
    let mut both: Vec<_> = dust(0, 900).collect();
    let over = volume.apply(vec![commit(vec![], both.clone())]);
    assert!(matches!(over, Err(ApplyError::Rule(crate::namespace::Rule::TooManyExtents { .. }))));
    both.push(zeros(100_000, 3000));
    volume.apply(vec![commit(vec![], both)]).unwrap();
}
