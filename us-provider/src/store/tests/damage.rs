//! Bits that flip while the store runs: no wrong byte leaves, the damage is reported, and a good
//! copy heals it.

use std::os::unix::fs::FileExt;

use us_core::fragment::HEADER_BYTES;

use super::{TestClock, options, read_all, sample, segment_paths};
use crate::store::format::ENVELOPE_BYTES;
use crate::store::{PutOutcome, ReadRequest, Store, StoreError};

/// Flips a bit at `at` of the record of a fragment of `bytes`, in a store with two more.
fn with_flip(bytes: usize, at: impl Fn(usize) -> u64, check: impl Fn(&Store, super::FragmentId)) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), options(&TestClock::default())).unwrap();
    let (id, record) = sample(1, bytes, 0);
    for record in [sample(0, 100, 0).1, record.clone(), sample(2, 100, 0).1] {
        store.put_blocking(record).unwrap();
    }
    let place = store.handle.shared.index.entry(id).unwrap().unwrap().place;
    let path = &segment_paths(dir.path())[place.segment as usize];
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let at = place.offset + at(record.len());
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    check(&store, id);
    // The writer notes damage in its own time; a round trip through it waits for that.
    super::block_on(store.restore(vec![id])).unwrap();
    assert_eq!(store.damaged(10).unwrap(), [id]);
    assert_eq!(store.take_fresh_damage(), [id]);
    assert_eq!(store.state().damaged, 1);
    assert!(matches!(store.check(id), Err(StoreError::Damaged { .. })));
    // The same bytes put again heal it, and it stays healed.
    assert_eq!(store.put_blocking(record.clone()).unwrap(), PutOutcome::Stored);
    assert!(read_all(&store, id).unwrap() == record);
    assert_eq!((store.state().damaged, store.damaged(10).unwrap().len()), (0, 0));
    drop(store);
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    let store = Store::open(dir.path(), options(&TestClock::default())).unwrap();
    assert!(read_all(&store, id).unwrap() == record);
    assert_eq!(store.scrub(None, u64::MAX).unwrap().damaged, 0);
}

#[test]
fn every_part_of_a_record_is_watched() {
    let parts = [0, ENVELOPE_BYTES + 20, ENVELOPE_BYTES + HEADER_BYTES + 5];
    for bytes in [100, 200_000] {
        for part in parts {
            with_flip(
                bytes,
                |_| part as u64,
                |store, id| {
                    let found = store.read(ReadRequest { id, first_slot: 0, slots: Some(1) });
                    assert!(matches!(found, Err(StoreError::Damaged { .. })), "{part}: {found:?}");
                },
            );
        }
        let trailer = |record_bytes: usize| (ENVELOPE_BYTES + record_bytes - 2) as u64;
        with_flip(bytes, trailer, |store, id| {
            assert!(matches!(store.verify(id), Err(StoreError::Damaged { .. })));
        });
    }
}

#[test]
fn other_slots_of_a_damaged_fragment_are_still_served() {
    let in_slot_3 = |_| (ENVELOPE_BYTES + HEADER_BYTES + 3 * 16_400 + 77) as u64;
    with_flip(200_000, in_slot_3, |store, id| {
        for slot in (0..13).filter(|slot| *slot != 3) {
            store.read(ReadRequest { id, first_slot: slot, slots: Some(1) }).unwrap();
        }
        let found = store.read(ReadRequest { id, first_slot: 2, slots: Some(3) });
        assert!(matches!(found, Err(StoreError::Damaged { .. })));
    });
}

/// What was checked when it was first read is kept; the bytes themselves are checked every time.
#[test]
fn a_read_from_memory_checks_its_bytes_too() {
    let slot = |first_slot| {
        let id = sample(1, 200_000, 0).0;
        ReadRequest { id, first_slot, slots: Some(1) }
    };
    let in_slot_3 = |_| (ENVELOPE_BYTES + HEADER_BYTES + 3 * 16_400 + 77) as u64;
    with_flip(200_000, in_slot_3, |store, _| {
        for other in [0, 2, 12] {
            // Just written, it is in memory.
            let now = store.read_now(slot(other)).expect("it is in memory");
            assert_eq!(now, store.read(slot(other)).unwrap());
        }
        assert_eq!(store.read_now(slot(3)), None);
        assert!(matches!(store.read(slot(3)), Err(StoreError::Damaged { .. })));
        assert_eq!(store.read_now(slot(13)), None, "there is no such slot");
    });
}

/// What is kept of a record does not outlive it.
#[test]
fn what_is_gone_is_not_read_from_memory() {
    let dir = tempfile::tempdir().unwrap();
    let clock = TestClock::default();
    let store = Store::open(dir.path(), options(&clock)).unwrap();
    let (id, record) = sample(1, 200_000, 0);
    let request = ReadRequest { id, first_slot: 1, slots: Some(2) };
    store.put_blocking(record.clone()).unwrap();
    let first = store.read(request).unwrap();
    super::block_on(store.delete(vec![id])).unwrap();
    clock.advance(1_000_000);
    assert_eq!(store.read_now(request), None, "it is gone");
    assert!(matches!(store.read(request), Err(StoreError::NotFound { .. })));
    store.put_blocking(record).unwrap();
    assert_eq!(store.read(request).unwrap(), first);
    assert_eq!(store.read_now(request), Some(first));
}

#[test]
fn a_scrub_finds_what_nobody_reads() {
    let in_body = |_| (ENVELOPE_BYTES + HEADER_BYTES + 5) as u64;
    with_flip(5000, in_body, |store, id| {
        let mut next = None;
        let mut seen = (0, 0);
        loop {
            let done = store.scrub(next, 1).unwrap();
            seen = (seen.0 + done.fragments, seen.1 + done.damaged);
            next = done.next;
            if next.is_none() {
                break;
            }
        }
        assert_eq!(seen, (3, 1), "{id}");
    });
}

#[test]
fn requests_for_slots_that_are_not_there_are_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), options(&TestClock::default())).unwrap();
    let (id, record) = sample(1, 200_000, 0);
    store.put_blocking(record).unwrap();
    for (first_slot, slots) in [(14, None), (0, Some(14)), (13, Some(1)), (usize::MAX, Some(2))] {
        let found = store.read(ReadRequest { id, first_slot, slots });
        assert!(matches!(found, Err(StoreError::Invalid(_))), "{first_slot} {slots:?} {found:?}");
    }
    let sum = store.combine(&[(id, 1), (id, 1)], 0, None, |_| true).unwrap().unwrap();
    assert!(sum.iter().all(|byte| *byte == 0), "a fragment and itself cancel out");
    assert_eq!(store.state().damaged, 0);
}

/// A damaged record is replaced by a put; the machine dies at any moment of it. Afterwards the
/// fragment is right or still known or found to be damaged, never half, never twice; and the same put
/// heals it.
#[test]
fn a_crash_while_a_damaged_fragment_is_replaced_loses_nothing() {
    let (dir, before) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let one_segment =
        || crate::store::StoreOptions { segment_bytes: 64 << 20, ..options(&TestClock::default()) };
    let (id, record) = sample(1, 60_000, 0);
    let (other_id, other) = sample(0, 100, 0);
    let (place, old_end) = {
        let store = Store::open(dir.path(), one_segment()).unwrap();
        store.put_blocking(record.clone()).unwrap();
        // A damaged record at the very end could be a torn one.
        store.put_blocking(other.clone()).unwrap();
        let place = store.handle.shared.index.entry(id).unwrap().unwrap().place;
        (place, store.state().used_bytes)
    };
    let path = segment_paths(dir.path()).remove(0);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    file.write_all_at(b"rot", place.offset + (ENVELOPE_BYTES + HEADER_BYTES + 500) as u64).unwrap();
    {
        let store = Store::open(dir.path(), one_segment()).unwrap();
        assert_eq!(store.scrub(None, u64::MAX).unwrap().damaged, 1);
        super::block_on(store.restore(vec![id])).unwrap();
        assert_eq!(store.state().damaged, 1);
    }
    super::copy_folder(dir.path(), before.path());
    let new_end = {
        let store = Store::open(dir.path(), one_segment()).unwrap();
        assert_eq!(store.put_blocking(record.clone()).unwrap(), PutOutcome::Stored);
        let length = file.metadata().unwrap().len();
        assert!(length > old_end);
        length
    };
    let mut appended = vec![0u8; (new_end - old_end) as usize];
    file.read_exact_at(&mut appended, old_end).unwrap();
    // As much of the new record as a crash may leave, the old one not yet buried; then all of it,
    // with the old one buried.
    let cuts = (0..=appended.len()).step_by(4096).chain([appended.len() - 1, appended.len()]);
    for (cut, index) in cuts.flat_map(|cut| [(cut, true), (cut, false)]) {
        let image = tempfile::tempdir().unwrap();
        super::copy_folder(before.path(), image.path());
        let path = segment_paths(image.path()).remove(0);
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&appended[..cut], old_end).unwrap();
        if !index {
            std::fs::remove_dir_all(image.path().join("index")).unwrap();
        }
        check_after_crash(image.path(), one_segment(), (id, &record), (other_id, &other));
    }
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    check_after_crash(dir.path(), one_segment(), (id, &record), (other_id, &other));
}

fn check_after_crash(
    dir: &std::path::Path,
    options: crate::store::StoreOptions,
    (id, record): (super::FragmentId, &bytes::Bytes),
    (other_id, other): (super::FragmentId, &bytes::Bytes),
) {
    let store = Store::open(dir, options.clone()).unwrap();
    match store.read_record(id) {
        Ok(found) => assert!(found == *record),
        Err(StoreError::Damaged { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    store.put_blocking(record.clone()).unwrap();
    assert_eq!((store.state().fragments, store.state().damaged), (2, 0));
    drop(store);
    std::fs::remove_dir_all(dir.join("index")).unwrap();
    let store = Store::open(dir, options).unwrap();
    assert!(
        read_all(&store, id).unwrap() == *record && read_all(&store, other_id).unwrap() == *other
    );
    assert_eq!((store.state().fragments, store.state().damaged), (2, 0));
}

/// A disk that failed once and reads well again: the mark goes only with a fresh copy.
#[test]
fn a_mark_of_damage_goes_with_the_same_bytes_put_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), options(&TestClock::default())).unwrap();
    let (id, record) = sample(1, 5000, 0);
    store.put_blocking(record.clone()).unwrap();
    let path = segment_paths(dir.path()).remove(0);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let at = 4096 + (ENVELOPE_BYTES + HEADER_BYTES + 5) as u64;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    assert!(store.verify(id).is_err());
    super::block_on(store.restore(vec![id])).unwrap();
    file.write_all_at(&byte, at).unwrap();
    assert!(store.verify(id).is_ok() && store.check(id).is_err(), "right, but marked");
    assert_eq!(store.put_blocking(record.clone()).unwrap(), PutOutcome::Stored);
    assert_eq!((store.state().damaged, store.state().fragments), (0, 1));
    assert!(store.check(id).is_ok() && read_all(&store, id).unwrap() == record);
}

/// Compaction moves what counts, damaged records too: they stay known as damaged.
#[test]
fn moving_a_damaged_fragment_does_not_make_it_good() {
    let dir = tempfile::tempdir().unwrap();
    let clock = TestClock::default();
    let options = crate::store::StoreOptions { punch_holes: false, ..options(&clock) };
    let store = Store::open(dir.path(), options).unwrap();
    for number in 0..12 {
        store.put_blocking(sample(number, 60_000, 0).1).unwrap();
    }
    let (id, _) = sample(1, 60_000, 0);
    let place = store.handle.shared.index.entry(id).unwrap().unwrap().place;
    let path = &segment_paths(dir.path())[place.segment as usize];
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(b"rot", place.offset + (ENVELOPE_BYTES + HEADER_BYTES + 500) as u64).unwrap();
    assert!(store.verify(id).is_err());
    let others = [0, 2, 3].map(|number| sample(number, 60_000, 0).0).to_vec();
    super::block_on(store.delete(others)).unwrap();
    assert_eq!(store.state().damaged, 1);
    clock.advance(30 * 24 * 3600);
    let limits = crate::store::MaintainLimits::default();
    while store.maintain(&limits).unwrap().did_something() {}
    let moved = store.handle.shared.index.entry(id).unwrap().unwrap();
    assert!(moved.place != place, "its segment was worth compacting");
    assert!(moved.damaged);
    assert_eq!((store.state().damaged, store.damaged(9).unwrap()), (1, vec![id]));
}
