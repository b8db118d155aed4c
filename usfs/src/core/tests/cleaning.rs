//! What lives of a block that is to die is written anew, and nothing that changed meanwhile.

use std::collections::HashSet;

use us_core::limits::CHUNK_BYTES;

use super::*;
use crate::data::{MapSource, Place};

const PAGE: usize = 4096;

/// A file of four pages; the first and the third are in one block, the others in one each.
fn scattered(core: &mut Core) -> (Ino, Handle, BlockId) {
    give_root(core);
    core.trust_until(Duration::from_secs(1000));
    let (ino, handle) = file(core, b"a");
    core.write(at(1000), handle, 0, &[1; 4 * PAGE], false).unwrap();
    let stored = |core: &mut Core| {
        for plan in core.seal_file(at(1000), ino, FlushReason::Durable) {
            store_at(core, at(1000), &plan);
        }
    };
    stored(core);
    let data = core.nodes[&ino].data.as_deref().unwrap();
    let piece = &data.map().lookup(0..PAGE as u64)[0];
    let MapSource::Place(Place::Block { block, .. }) = piece.source else { panic!("it is stored") };
    for page in [1, 3] {
        core.write(at(1000), handle, (page * PAGE) as u64, &[2; PAGE], false).unwrap();
        stored(core);
    }
    (ino, handle, block)
}

fn clean(core: &mut Core, blocks: &[BlockId], chunks: &[(u64, u64)]) -> Cleaning {
    let order = v1::CleanBlocks {
        order: 1,
        blocks: blocks.iter().map(|id| Bytes::copy_from_slice(id.as_bytes())).collect(),
        chunks: chunks
            .iter()
            .map(|(ino, chunk)| v1::CleanedChunk { ino: *ino, chunk: *chunk })
            .collect(),
    };
    assert_eq!(core.on_down(at(2000), Down::Clean(order)), Some(Effect::Cleaning));
    let taken = core.take_cleaning().expect("it was asked");
    assert!(core.take_cleaning().is_none());
    taken
}

fn ranges(parts: &[Rewrite]) -> Vec<std::ops::Range<u64>> {
    parts.iter().map(|part| part.range.clone()).collect()
}

#[test]
fn what_lives_of_a_block_is_written_anew_and_nothing_else() {
    let mut core = core();
    let (ino, _, block) = scattered(&mut core);
    let order = clean(&mut core, &[block], &[(ino.0, 0)]);
    let before = core.nodes[&ino].attributes;
    let parts = core.plan_cleaning(at(2000), order.chunks[0], &order.blocks).unwrap();
    let page = PAGE as u64;
    assert_eq!(ranges(&parts), [0..page, 2 * page..3 * page]);
    for part in &parts {
        assert!(core.rewrite(at(2000), part, &Bytes::from(vec![1; PAGE])));
    }
    assert_eq!(core.nodes[&ino].attributes, before, "no size, no time");
    let block_two = core.next_block(at(60_000), false).expect("the background stores it");
    assert_eq!(block_two.pieces.iter().map(Bytes::len).sum::<usize>(), 2 * PAGE);
    store_at(&mut core, at(60_000), &block_two);
    let again = core.plan_cleaning(at(60_000), order.chunks[0], &order.blocks).unwrap();
    assert!(again.is_empty(), "nothing refers to it any more");
}

/// Between the plan and the bytes the file is overwritten, cut off, taken by another mount.
#[test]
fn what_changed_meanwhile_is_left_out() {
    let page = PAGE as u64;
    for how in 0..3 {
        let mut core = core();
        let (ino, handle, block) = scattered(&mut core);
        let order = clean(&mut core, &[block], &[(ino.0, 0)]);
        let parts = core.plan_cleaning(at(2000), order.chunks[0], &order.blocks).unwrap();
        let third = &parts[1];
        assert_eq!(third.range, 2 * page..3 * page);
        match how {
            0 => drop(core.write(at(2001), handle, 2 * page, &[9; PAGE], false).unwrap()),
            1 => core.truncate(at(2001), ino, 2 * page).unwrap(),
            _ => {
                let recall = Recall { ino, keep: Level::Shared, grant: 0 };
                assert_eq!(core.begin_recall(at(2001), recall), FinishedRecall::Returned);
                assert_eq!(core.finish_recall(recall), FinishedRecall::Returned);
            }
        }
        assert!(!core.rewrite(at(2002), third, &Bytes::from(vec![1; PAGE])), "way {how}");
        let again = core.plan_cleaning(at(2003), order.chunks[0], &order.blocks);
        match how {
            2 => {
                let want = Want::Inode { ino, level: Level::Exclusive };
                assert_eq!(again.map(drop), Err(Stop::Stall(Stall::Fetch(want))));
            }
            1 => {
                let left = ranges(&again.unwrap());
                assert_eq!((left.len(), &left[0]), (1, &(0..page)));
            }
            // The newer bytes are not stored yet: they stay, whatever was read of the older ones.
            _ => {
                let again = again.unwrap();
                assert_eq!(ranges(&again), [0..page, 2 * page..3 * page]);
                core.rewrite(at(2004), &again[1], &Bytes::from(vec![1; PAGE]));
                let pieces = core.plan(ino, 2 * page..3 * page, 4 * page).unwrap();
                let [ReadPiece::Bytes(bytes)] = &pieces[..] else { panic!("{pieces:?}") };
                assert!(bytes.iter().all(|byte| *byte == 9));
            }
        }
    }
}

/// A directory that asks for what makes no sense costs nothing.
#[test]
fn orders_that_make_no_sense_are_harmless() {
    let mut core = core();
    let (ino, _, block) = scattered(&mut core);
    let chunks = [(ino.0, u64::MAX), (ino.0, u64::MAX / CHUNK_BYTES), (ino.0, 1), (999, 0), (1, 0)];
    let order = clean(&mut core, &[block], &chunks);
    assert_eq!(order.chunks, [(ino, 1), (Ino(999), 0), (Ino(1), 0)]);
    let none: HashSet<BlockId> = HashSet::new();
    assert!(core.plan_cleaning(at(2000), (ino, 0), &none).unwrap().is_empty());
    assert!(core.plan_cleaning(at(2000), (Ino(999), 0), &order.blocks).is_err());
    let folder = core.plan_cleaning(at(2000), (Ino(1), 0), &order.blocks).map(drop);
    assert_eq!(folder, Err(Stop::Fail(FsError::IsADirectory)));
}
