//! What an fsync put into the directory is packed, and what lies there is bounded by what lies there.

use super::*;

const PAGE: usize = 4096;

fn write_inline(core: &mut Core, now: Now, ino: Ino, handle: Handle, page: usize) -> bool {
    let bytes = vec![page as u8; PAGE];
    core.write(now, handle, (page * PAGE) as u64, &bytes, false).unwrap();
    let plans = core.seal_file(now, ino, FlushReason::Durable);
    let inline = plans.iter().all(|plan| plan.inline);
    plans.iter().for_each(|plan| store_at(core, now, plan));
    inline
}

fn rewrite_all(core: &mut Core, now: Now, packings: &[Packing]) -> u64 {
    let mut rewritten = 0;
    for packing in packings {
        for part in &packing.parts {
            let content = Bytes::from(vec![7; (part.range.end - part.range.start) as usize]);
            assert!(core.rewrite(now, part, &content));
            rewritten += content.len() as u64;
        }
        core.packed(packing.ino);
    }
    rewritten
}

#[test]
fn a_small_fsync_goes_inline_and_is_packed_when_the_file_is_left_alone() {
    let mut core = core();
    give_root(&mut core);
    core.trust_until(Duration::from_secs(1000));
    let (ino, handle) = file(&mut core, b"log");
    for page in [0, 1, 5] {
        assert!(write_inline(&mut core, at(1000), ino, handle, page));
    }
    assert!(core.take_packed(at(20_000)).is_empty(), "it may go on");
    assert_eq!(core.next_packed_at(), Some(Duration::from_millis(31_000)));
    let plans = core.take_packed(at(31_000));
    let ranges: Vec<_> = plans[0].parts.iter().map(|part| part.range.clone()).collect();
    let page = PAGE as u64;
    assert_eq!(ranges, [0..2 * page, 5 * page..6 * page], "the hole is not written");
    assert_eq!(core.uncommitted_bytes(), 0);
    assert_eq!(rewrite_all(&mut core, at(31_000), &plans), 3 * page);
    let block = core.next_block(at(40_000), false).expect("the background stores it");
    assert!(!block.inline);
    assert_eq!(core.next_packed_at(), None);
}

#[test]
fn what_was_overwritten_meanwhile_is_not_packed_over() {
    let mut core = core();
    give_root(&mut core);
    core.trust_until(Duration::from_secs(1000));
    let (ino, handle) = file(&mut core, b"log");
    assert!(write_inline(&mut core, at(1000), ino, handle, 0));
    let plans = core.take_packed(at(31_000));
    assert!(write_inline(&mut core, at(31_001), ino, handle, 0));
    let old = Bytes::from(vec![7; PAGE]);
    assert!(!core.rewrite(at(31_002), &plans[0].parts[0], &old), "newer bytes lie there");
}

/// What cannot be packed now (another mount reads the file, a provider is away) still lies inline, and
/// counts, and is tried again.
#[test]
fn what_cannot_be_packed_is_not_forgotten() {
    let mut core = core();
    give_root(&mut core);
    core.trust_until(Duration::from_secs(1000));
    let (ino, handle) = file(&mut core, b"shared");
    assert!(write_inline(&mut core, at(1000), ino, handle, 0));
    // Planned, and not read.
    assert_eq!(core.take_packed(at(31_000)).len(), 1);
    assert!(core.take_packed(at(31_001)).is_empty(), "not at once");
    assert_eq!(core.take_packed(at(61_000)).len(), 1);
    let recall = Recall { ino, keep: Level::Shared, grant: 0 };
    assert_eq!(core.begin_recall(at(61_001), recall), FinishedRecall::Returned);
    assert_eq!(core.finish_recall(recall), FinishedRecall::Returned);
    assert!(core.take_packed(at(91_000)).is_empty(), "it is not this mount's alone");
    assert!(core.next_packed_at().is_some_and(|at| at <= Duration::from_secs(121)));
}

/// A mount that had synced 64 MiB in small pieces stored every later fsync as a block of six
/// fragments, for ever: the count of what lay inline never went down.
#[test]
fn the_limit_counts_what_lies_inline_now() {
    let mut core = core();
    give_root(&mut core);
    core.trust_until(Duration::from_secs(100_000));
    let (ino, handle) = file(&mut core, b"database");
    let mut packed = 0;
    for write in 0..40_000 {
        let now = at(1000 + write as u64);
        assert!(write_inline(&mut core, now, ino, handle, write % 100), "write {write}");
        outgoing(&mut core);
        let plans = core.take_packed(now);
        packed += usize::from(!plans.is_empty());
        rewrite_all(&mut core, now, &plans);
        // The background stores what was packed.
        while let Some(plan) = core.next_block(now, true) {
            store_at(&mut core, now, &plan);
        }
    }
    let most = 40_000 * PAGE / (4 << 20);
    assert!((most..most + 10).contains(&packed), "every 4 MiB, not with every write: {packed}");
}

#[test]
fn what_is_deleted_is_not_packed() {
    let mut core = core();
    give_root(&mut core);
    core.trust_until(Duration::from_secs(1000));
    let (ino, handle) = file(&mut core, b"journal");
    assert!(write_inline(&mut core, at(1000), ino, handle, 0));
    core.unlink(at(1001), Caller::default(), Ino::ROOT, b"journal", false).unwrap();
    core.close(handle);
    core.forget(ino, 1);
    assert_eq!((core.next_packed_at(), core.take_packed(at(90_000)).len()), (None, 0));
}
