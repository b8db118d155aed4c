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
    let sum = store.combine(&[(id, 1), (id, 1)], 0, None).unwrap();
    assert!(sum.iter().all(|byte| *byte == 0), "a fragment and itself cancel out");
    assert_eq!(store.state().damaged, 0);
}
