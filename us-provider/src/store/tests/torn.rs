//! Crash images: the end of the last segment missing or garbled at any place, with the index of
//! then, of before, and without one. What was whole stays; nothing else appears.

use std::os::unix::fs::FileExt;
use std::path::Path;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use us_core::ids::FragmentId;

use super::{TestClock, copy_folder, options, read_all, sample, segment_paths};
use crate::store::{PutOutcome, Store, StoreError, StoreOptions};

const SIZES: [usize; 4] = [100, 5000, 20_000, 60_000];

/// One segment with eight fragments; the index folder as it was after the first four.
struct Image {
    dir: tempfile::TempDir,
    early: tempfile::TempDir,
    records: Vec<(FragmentId, Bytes, u64)>,
}

fn one_segment() -> StoreOptions {
    StoreOptions { segment_bytes: 64 << 20, ..options(&TestClock::default()) }
}

fn image() -> Image {
    let (dir, early) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut records = Vec::new();
    for half in 0..2 {
        let store = Store::open(dir.path(), one_segment()).unwrap();
        for number in half * 4..half * 4 + 4 {
            let (id, record) = sample(number, SIZES[(number % 4) as usize], 0);
            assert_eq!(store.put_blocking(record.clone()).unwrap(), PutOutcome::Stored);
            let end = store.inventory(Some(id), 0).map(|_| store.state().used_bytes).unwrap();
            records.push((id, record, end));
        }
        drop(store);
        if half == 0 {
            copy_folder(dir.path(), early.path());
        }
    }
    Image { dir, early, records }
}

#[derive(Clone, Copy, Debug)]
enum IndexOf {
    Before,
    Nothing,
}

/// Opens a copy of the image after `harm` was done to its segment; `whole_until` is the first byte
/// that was harmed.
fn check(image: &Image, index: IndexOf, whole_until: u64, harm: impl Fn(&Path)) {
    let copy = tempfile::tempdir().unwrap();
    copy_folder(image.dir.path(), copy.path());
    std::fs::remove_dir_all(copy.path().join("index")).unwrap();
    if matches!(index, IndexOf::Before) {
        copy_folder(&image.early.path().join("index"), &copy.path().join("index"));
    }
    harm(&segment_paths(copy.path())[0]);
    let store = Store::open(copy.path(), one_segment()).unwrap();
    for (id, record, end) in &image.records {
        let found = read_all(&store, *id);
        match found {
            Ok(found) => assert!(found == *record, "{id}"),
            // Only padding may be missing from a record that is still there.
            Err(StoreError::NotFound { .. }) => {
                assert!(*end > whole_until, "{id} ends at {end}, harmed from {whole_until}");
            }
            Err(error) => panic!("{id}: {error}"),
        }
    }
    // It goes on: what was lost can be put again, and everything is there after the next start.
    for (_, record, _) in &image.records {
        store.put_blocking(record.clone()).unwrap();
    }
    drop(store);
    let store = Store::open(copy.path(), one_segment()).unwrap();
    for (id, record, _) in &image.records {
        assert!(read_all(&store, *id).unwrap() == *record, "{id}");
    }
}

/// Every 4 KiB of the second half and some random bytes of it.
fn cuts(image: &Image, random: &mut StdRng) -> Vec<u64> {
    let (from, end) = (image.records[3].2, image.records[7].2);
    let aligned = (from..end).step_by(4096);
    let anywhere: Vec<u64> = (0..6).map(|_| random.random_range(from..end)).collect();
    aligned.chain(anywhere).collect()
}

#[test]
fn a_truncated_end_loses_only_what_was_cut() {
    let (image, mut random) = (image(), StdRng::seed_from_u64(1));
    for (number, cut) in cuts(&image, &mut random).into_iter().enumerate() {
        let index = if number % 2 == 0 { IndexOf::Before } else { IndexOf::Nothing };
        check(&image, index, cut, |path| {
            std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(cut).unwrap();
        });
    }
}

#[test]
fn a_garbled_end_loses_only_what_was_garbled() {
    let (image, mut random) = (image(), StdRng::seed_from_u64(2));
    let end = image.records[7].2;
    for (number, cut) in cuts(&image, &mut random).into_iter().enumerate() {
        let index = if number % 2 == 0 { IndexOf::Nothing } else { IndexOf::Before };
        let mut noise = vec![0u8; (end - cut) as usize];
        random.fill_bytes(&mut noise);
        check(&image, index, cut, |path| {
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(&noise, cut).unwrap();
        });
    }
}

#[test]
fn a_bad_record_in_the_middle_hides_no_other() {
    let image = image();
    let copy = tempfile::tempdir().unwrap();
    copy_folder(image.dir.path(), copy.path());
    std::fs::remove_dir_all(copy.path().join("index")).unwrap();
    let path = &segment_paths(copy.path())[0];
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    // The envelope of the third record, and a byte in the body of the fifth.
    file.write_all_at(b"??", image.records[1].2 + 20).unwrap();
    file.write_all_at(b"????", image.records[3].2 + 1000).unwrap();
    let store = Store::open(copy.path(), one_segment()).unwrap();
    let recovery = store.recovery();
    assert!(recovery.rebuilt && recovery.unreadable_bytes > 0 && recovery.cut_bytes == 0);
    assert_eq!((recovery.damaged, store.state().damaged), (1, 1));
    for (number, (id, record, _)) in image.records.iter().enumerate() {
        match (number, store.read_record(*id)) {
            (2, Err(StoreError::NotFound { .. })) | (4, Err(StoreError::Damaged { .. })) => {}
            (2 | 4, other) => panic!("{number}: {other:?}"),
            (_, found) => assert!(found.unwrap() == *record, "{number}"),
        }
    }
}

#[test]
fn a_garbled_or_stale_index_is_made_again() {
    let image = image();
    let garble = |dir: &Path, seed: u64| {
        let mut random = StdRng::seed_from_u64(seed);
        for file in std::fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()) {
            let Ok(handle) = std::fs::OpenOptions::new().write(true).open(&file) else { continue };
            let length = handle.metadata().map(|data| data.len()).unwrap_or(0);
            for _ in 0..20 {
                let mut noise = [0u8; 64];
                random.fill_bytes(&mut noise);
                let at = random.random_range(0..length.max(65) - 64);
                let _ = handle.write_all_at(&noise, at);
            }
        }
    };
    for seed in 0..8 {
        let copy = tempfile::tempdir().unwrap();
        copy_folder(image.dir.path(), copy.path());
        garble(&copy.path().join("index"), seed);
        // As after a kill: what the index holds is counted.
        std::fs::write(copy.path().join("index.state"), "suspect").unwrap();
        let store = Store::open(copy.path(), one_segment()).unwrap();
        for (id, record, _) in &image.records {
            assert!(read_all(&store, *id).unwrap() == *record, "{id}");
        }
    }
}

#[test]
fn a_lost_segment_header_is_replaced_by_the_first_record() {
    let image = image();
    let copy = tempfile::tempdir().unwrap();
    copy_folder(image.dir.path(), copy.path());
    std::fs::remove_dir_all(copy.path().join("index")).unwrap();
    let path = &segment_paths(copy.path())[0];
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[0; 4096], 0).unwrap();
    let store = Store::open(copy.path(), one_segment()).unwrap();
    for (id, record, _) in &image.records {
        assert!(read_all(&store, *id).unwrap() == *record, "{id}");
    }
    // With its first record lost too the file is put aside, not deleted.
    drop(store);
    std::fs::remove_dir_all(copy.path().join("index")).unwrap();
    file.write_all_at(&[0; 8192], 0).unwrap();
    let store = Store::open(copy.path(), one_segment()).unwrap();
    assert_eq!(store.recovery().set_aside.len(), 1);
    assert!(store.recovery().set_aside[0].exists());
    assert_eq!(store.state().fragments, 0);
}

/// The provider was killed between the write of a fragment and its fdatasync. The next run walked the
/// record out of the page cache; the client's retry met it and was told "stored" without any sync;
/// then the power went and the acknowledged fragment with it.
#[test]
fn what_was_found_at_a_start_and_acknowledged_survives_the_power() {
    let image = image();
    let is_segment = |path: &Path| path.extension().is_some_and(|end| end == "seg");
    for last in 4..8 {
        let copy = tempfile::tempdir().unwrap();
        copy_folder(image.dir.path(), copy.path());
        std::fs::remove_dir_all(copy.path().join("index")).unwrap();
        if last % 2 == 0 {
            copy_folder(&image.early.path().join("index"), &copy.path().join("index"));
        }
        let platter = us_core::daemon::disk::Platter::hold(copy.path()).unwrap();
        platter.unsynced_behind(&segment_paths(copy.path())[0], image.records[last - 1].2);
        let store = Store::open(copy.path(), one_segment()).unwrap();
        for (_, record, _) in &image.records {
            assert_eq!(store.put_blocking(record.clone()).unwrap(), PutOutcome::Present);
        }
        drop(store);
        std::fs::remove_dir_all(copy.path().join("index")).unwrap();
        platter.cut(is_segment).unwrap();
        let store = Store::open(copy.path(), one_segment()).unwrap();
        for (id, record, _) in &image.records {
            assert!(read_all(&store, *id).unwrap() == *record, "{id}");
        }
    }
}
