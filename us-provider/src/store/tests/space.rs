//! Full disks, and giving space back.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{TestClock, block_on, options, read_all, sample, sample_id, segment_paths};
use crate::store::{MaintainLimits, Store, StoreError, StoreOptions};

fn blocks(dir: &Path) -> u64 {
    segment_paths(dir).iter().map(|path| path.metadata().unwrap().blocks() * 512).sum()
}

fn maintain(store: &Store) {
    while store.maintain(&MaintainLimits::default()).unwrap().did_something() {}
}

/// Puts until it is full; says how many fit. What was acknowledged is there afterwards.
fn fill(store: &Store, first: u64) -> u64 {
    for number in first.. {
        match store.put_blocking(sample(number, 40_000, 0).1) {
            Ok(_) => {}
            Err(StoreError::NoSpace { .. }) => return number - first,
            Err(error) => panic!("{error}"),
        }
    }
    unreachable!()
}

#[test]
fn the_cap_holds_and_deleting_makes_room() {
    let dir = tempfile::tempdir().unwrap();
    let clock = TestClock::default();
    let cap = 2 << 20;
    let options = StoreOptions { capacity_bytes: Some(cap), ..options(&clock) };
    let store = Store::open(dir.path(), options).unwrap();
    let count = fill(&store, 0);
    assert!((35..50).contains(&count), "{count}");
    let state = store.state();
    assert!(state.used_bytes <= cap && state.free_bytes < 60_000 && state.trouble.is_none());
    // The same again is no new space.
    store.put_blocking(sample(3, 40_000, 0).1).unwrap();
    let ids: Vec<_> = (0..count).map(sample_id).collect();
    assert_eq!(block_on(store.delete(ids)).unwrap() as u64, count);
    assert!(matches!(
        store.put_blocking(sample(1000, 40_000, 0).1),
        Err(StoreError::NoSpace { .. })
    ));
    // Under pressure the trash goes as soon as nobody can be reading it.
    clock.advance(120);
    let limits = MaintainLimits { pressure_bytes: u64::MAX, ..MaintainLimits::default() };
    while store.maintain(&limits).unwrap().did_something() {}
    assert!(fill(&store, 1000) + 2 >= count);
    for number in 1000..1000 + count - 2 {
        read_all(&store, sample_id(number)).unwrap();
    }
}

#[test]
fn punching_gives_blocks_back_at_once_and_the_segment_later() {
    let dir = tempfile::tempdir().unwrap();
    let clock = TestClock::default();
    let store = Store::open(dir.path(), options(&clock)).unwrap();
    for number in 0..20 {
        store.put_blocking(sample(number, 40_000, 0).1).unwrap();
    }
    let full = blocks(dir.path());
    assert!(segment_paths(dir.path()).len() > 2);
    // Every second one: no segment is dead, most are not worth compacting.
    block_on(store.delete((0..20).step_by(2).map(sample_id).collect())).unwrap();
    clock.advance(8 * 24 * 3600);
    maintain(&store);
    let half = blocks(dir.path());
    assert!(half < full * 6 / 10, "{half} of {full}");
    block_on(store.delete((0..20).map(sample_id).collect())).unwrap();
    clock.advance(8 * 24 * 3600);
    maintain(&store);
    assert_eq!(segment_paths(dir.path()).len(), 0);
    assert_eq!(store.state().used_bytes, 0);
    store.put_blocking(sample(5, 40_000, 0).1).unwrap();
    assert_eq!(store.state().fragments, 1);
}

#[test]
fn without_holes_compaction_gives_space_back() {
    let dir = tempfile::tempdir().unwrap();
    let clock = TestClock::default();
    let options = StoreOptions { punch_holes: false, ..options(&clock) };
    let store = Store::open(dir.path(), options).unwrap();
    for number in 0..40 {
        store.put_blocking(sample(number, 40_000, 0).1).unwrap();
    }
    let full = blocks(dir.path());
    let deleted = |number: &u64| !number.is_multiple_of(4);
    block_on(store.delete((0..40).filter(deleted).map(sample_id).collect())).unwrap();
    clock.advance(8 * 24 * 3600);
    maintain(&store);
    let left = blocks(dir.path());
    assert!(left < full / 2, "{left} of {full}");
    for number in (0..40).filter(|number| !deleted(number)) {
        assert!(read_all(&store, sample_id(number)).unwrap() == sample(number, 40_000, 0).1);
    }
}

#[test]
fn a_disk_that_is_really_full_is_told_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = rustix::mount::mount(
        "tmpfs",
        dir.path(),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        Some(c"size=6m"),
    );
    if let Err(error) = mounted {
        eprintln!("NOT TESTED: a small tmpfs cannot be mounted here: {error}");
        return;
    }
    let result = std::panic::catch_unwind(|| {
        let store = Store::open(dir.path(), options(&TestClock::default())).unwrap();
        // Without asking first: as when another program takes the space between look and write.
        let count = fill(&store, 0);
        assert!(count > 10, "{count}");
        assert_eq!(store.state().trouble, None);
        for number in 0..count {
            read_all(&store, sample_id(number)).unwrap();
        }
        block_on(store.delete(vec![sample_id(0)])).unwrap();
    });
    rustix::mount::unmount(dir.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    result.unwrap();
}

#[test]
fn after_a_failed_sync_the_segment_is_closed_for_ever() {
    use std::sync::atomic::Ordering::Relaxed;
    let dir = tempfile::tempdir().unwrap();
    let options = options(&TestClock::default());
    let fail = std::sync::Arc::clone(&options.fail_sync);
    let store = Store::open(dir.path(), options).unwrap();
    store.put_blocking(sample(0, 5000, 0).1).unwrap();
    let first = segment_paths(dir.path());
    fail.store(true, Relaxed);
    for number in 1..4 {
        let failed = store.put_blocking(sample(number, 5000, 0).1);
        assert!(matches!(failed, Err(StoreError::Io { .. })), "{failed:?}");
        assert!(matches!(store.check(sample_id(number)), Err(StoreError::NotFound { .. })));
    }
    assert!(store.state().trouble.unwrap().contains("sync"));
    assert!(block_on(store.delete(vec![sample_id(0)])).is_err());
    read_all(&store, sample_id(0)).unwrap();
    assert!(store.maintain(&MaintainLimits::default()).is_err());
    fail.store(false, Relaxed);
    // The next look at the disk finds it well again; writing goes on elsewhere.
    while store.maintain(&MaintainLimits::default()).unwrap().did_something() {}
    assert_eq!(store.state().trouble, None);
    let bytes = first[0].metadata().map(|data| data.len()).ok();
    store.put_blocking(sample(1, 5000, 0).1).unwrap();
    assert_eq!(first[0].metadata().map(|data| data.len()).ok(), bytes);
    drop(store);
    for lose_index in [false, true] {
        if lose_index {
            std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        }
        let store = Store::open(dir.path(), super::options(&TestClock::default())).unwrap();
        read_all(&store, sample_id(0)).unwrap();
        read_all(&store, sample_id(1)).unwrap();
        // What was refused does not come back out of the page cache.
        for number in 2..4 {
            let found = store.check(sample_id(number));
            assert!(matches!(found, Err(StoreError::NotFound { .. })), "{found:?}");
        }
    }
}

#[test]
fn compaction_saves_what_the_index_lost() {
    let dir = tempfile::tempdir().unwrap();
    let clock = TestClock::default();
    let store = Store::open(dir.path(), options(&clock)).unwrap();
    for number in 0..20 {
        store.put_blocking(sample(number, 40_000, 0).1).unwrap();
    }
    // What no correct run does: entries vanish.
    let shared = &store.handle.shared;
    let mut staged = crate::store::index::Staged::default();
    for number in 0..4 {
        let entry = shared.index.entry(sample_id(number)).unwrap();
        staged.set(sample_id(number), entry, None);
    }
    let mark = shared.index.mark().unwrap().unwrap();
    let mut accounts = shared.accounts.lock();
    shared.index.apply(staged, &mut accounts, mark.place, mark.next_seq).unwrap();
    drop(accounts);
    maintain(&store);
    for number in 0..20 {
        assert!(read_all(&store, sample_id(number)).unwrap() == sample(number, 40_000, 0).1);
    }
}

/// One sector under a trashed record could not be read: the purge of its whole page failed, the same
/// page came first for ever, probe and compaction never ran, and what was punched before it was booked
/// again at every try, until the store believed it used nothing.
#[test]
fn one_bad_sector_does_not_keep_the_trash_full() {
    let dir = tempfile::tempdir().unwrap();
    let clock = TestClock::default();
    let options = options(&clock);
    let bad = std::sync::Arc::clone(&options.bad_sectors);
    let store = Store::open(dir.path(), options).unwrap();
    for number in 0..20 {
        store.put_blocking(sample(number, 40_000, 0).1).unwrap();
    }
    let place = store.handle.shared.index.entry(sample_id(13)).unwrap().unwrap().place;
    bad.lock().insert(place.offset);
    let doomed = |number: &u64| !number.is_multiple_of(5);
    block_on(store.delete((0..20).filter(doomed).map(sample_id).collect())).unwrap();
    clock.advance(8 * 24 * 3600);
    maintain(&store);
    let state = store.state();
    assert_eq!((state.fragments, state.trashed), (4, 0));
    assert!(state.used_bytes >= 4 * 40_000, "{}", state.used_bytes);
    for number in (0..20).filter(|number| !doomed(number)) {
        read_all(&store, sample_id(number)).unwrap();
    }
    store.put_blocking(sample(100, 40_000, 0).1).unwrap();
}

/// A compaction took several calls. Between two of them a fragment that the first had moved was purged
/// at its new place; the next call met its old record, which the index knew nothing of, and took it for
/// one that had been lost: deleted data was live again, and nothing ever deleted it.
#[test]
fn compaction_in_pieces_brings_nothing_back() {
    for lose_index in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let clock = TestClock::default();
        let options = StoreOptions { punch_holes: false, ..options(&clock) };
        let store = Store::open(dir.path(), options).unwrap();
        for number in 0..12 {
            store.put_blocking(sample(number, 40_000, 0).1).unwrap();
        }
        // More than half of the first segment is dead; what is left there is moved piece by piece.
        block_on(store.delete((1..5).map(sample_id).collect())).unwrap();
        clock.advance(8 * 24 * 3600);
        let piece = MaintainLimits { copy_bytes_max: 1, ..MaintainLimits::default() };
        let place = |number| store.handle.shared.index.entry(sample_id(number)).unwrap();
        let before = place(0).unwrap().place;
        let moved = store.maintain(&piece).unwrap();
        assert!(moved.copied_bytes > 0 && moved.removed.is_none(), "{moved:?}");
        assert!(place(0).unwrap().place != before);
        block_on(store.delete(vec![sample_id(0)])).unwrap();
        clock.advance(8 * 24 * 3600);
        while store.maintain(&piece).unwrap().did_something() {}
        assert!(place(0).is_none(), "it was deleted");
        drop(store);
        if lose_index {
            std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        }
        let store = Store::open(dir.path(), super::options(&clock)).unwrap();
        assert_eq!(store.state().fragments, 7);
    }
}

/// Where the file system has no holes a rebuild of the index booked every tombstone as given back: the
/// segments were never compacted and the cap was not kept.
#[test]
fn a_rebuild_books_only_what_was_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let clock = TestClock::default();
    let without = || StoreOptions { punch_holes: false, ..options(&clock) };
    let store = Store::open(dir.path(), without()).unwrap();
    for number in 0..5 {
        store.put_blocking(sample(number, 40_000, 0).1).unwrap();
    }
    block_on(store.delete(vec![sample_id(0), sample_id(1)])).unwrap();
    clock.advance(8 * 24 * 3600);
    let limits = MaintainLimits { copy_bytes_max: 0, ..MaintainLimits::default() };
    store.maintain(&limits).unwrap();
    let used = store.state().used_bytes;
    drop(store);
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    // The option says that holes can be made; the disk knows that none were.
    let store = Store::open(dir.path(), options(&clock)).unwrap();
    assert_eq!(store.state().used_bytes, used);
    assert!(used > 5 * 40_000, "{used}");
}
