//! The folder over restarts, kills and wrong bytes.

use super::*;
use crate::ids::BlockId;

const PAGE_BYTES: usize = 16_400;
/// Pages of 16 MiB in segments of 1 MiB.
const SMALL: u64 = SEALED_PAGES_BYTES_MIN;

fn key(number: u64) -> PageKey {
    let mut id = [3; 16];
    id[8..].copy_from_slice(&number.wrapping_mul(0x517c_c1b7_2722_0a95).to_le_bytes());
    (BlockId::from_bytes(id), (number % 5) as u32)
}

fn page(number: u64) -> Bytes {
    vec![number as u8; PAGE_BYTES].into()
}

/// Keeps a page, also where the writer has much to do.
fn keep(pages: &SealedPages, number: u64) {
    let queue = pages.kept.queue.lock().clone().expect("it is open");
    queue.send((key(number), page(number))).expect("a writer");
}

fn wrong(pages: &SealedPages, numbers: std::ops::Range<u64>) -> Vec<u64> {
    numbers.filter(|at| pages.load(&key(*at), PAGE_BYTES) != Some(page(*at))).collect()
}

fn bytes_in(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let pages = files.filter(|file| file.path().extension().is_some_and(|kind| kind == "pages"));
    pages.map(|file| file.metadata().unwrap().len()).sum()
}

#[test]
fn what_is_kept_outlives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let pages = SealedPages::open(dir.path(), SMALL).unwrap();
    (0..200).for_each(|number| keep(&pages, number));
    pages.close();
    pages.keep(key(900), page(900));
    assert_eq!(wrong(&pages, 0..200), [0u64; 0], "it can be read to the end");
    drop(pages);
    let pages = SealedPages::open(dir.path(), SMALL).unwrap();
    assert_eq!(wrong(&pages, 0..200), [0u64; 0]);
    assert!(!pages.knows(&key(900)));
    assert_eq!(pages.load(&key(7), PAGE_BYTES - 1), None, "no page of that length");
    // The next run adds, and both are there for the one after it.
    (200..300).for_each(|number| keep(&pages, number));
    pages.close();
    drop(pages);
    let pages = SealedPages::open(dir.path(), SMALL).unwrap();
    assert_eq!(wrong(&pages, 0..300), [0u64; 0]);
    pages.close();
}

#[test]
fn it_never_outgrows_its_bound_and_shrinks_with_it() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("notes.txt"), "not ours").unwrap();
    let pages = SealedPages::open(dir.path(), 2 * SMALL).unwrap();
    (0..5000).for_each(|number| keep(&pages, number));
    pages.close();
    assert!(bytes_in(dir.path()) <= 2 * SMALL + (1 << 20), "{}", bytes_in(dir.path()));
    assert_eq!(wrong(&pages, 4000..5000), [0u64; 0], "what came last is there");
    drop(pages);
    let pages = SealedPages::open(dir.path(), SMALL).unwrap();
    assert!(bytes_in(dir.path()) <= SMALL + (1 << 20), "{}", bytes_in(dir.path()));
    assert_eq!(wrong(&pages, 4500..5000), [0u64; 0]);
    pages.close();
    assert_eq!(fs::read_to_string(dir.path().join("notes.txt")).unwrap(), "not ours");
}

/// A kill leaves a segment without an index, or with an older one: what that lists is there.
#[test]
fn a_kill_costs_what_was_not_indexed() {
    let dir = tempfile::tempdir().unwrap();
    let pages = SealedPages::open(dir.path(), 128 << 20).unwrap();
    (0..1500).for_each(|number| keep(&pages, number));
    pages.close();
    // As if killed: the index of the last segment was never written.
    let last = pages.kept.state.lock().index.filling().number;
    let before = pages.kept.state.lock().index.filling().entries.len() as u64;
    drop(pages);
    fs::remove_file(index_path(dir.path(), last)).unwrap();
    let pages = SealedPages::open(dir.path(), 128 << 20).unwrap();
    assert_eq!(wrong(&pages, 0..1500 - before), [0u64; 0]);
    assert_eq!(wrong(&pages, 1500 - before..1500).len() as u64, before);
    pages.close();
    assert!(before > 0);
}

#[test]
fn wrong_bytes_are_no_index() {
    let mut segment = Segment { number: 3, ..Segment::default() };
    for number in 0..4 {
        segment.entries.push(Entry { key: number, offset: segment.bytes, length: 100 });
        segment.bytes += 100;
    }
    let good = encode(&segment);
    assert_eq!(decode(3, &good, 400), Some(segment));
    assert_eq!(decode(3, &good, 399), None, "the pages are cut off");
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        assert_eq!(decode(3, &bad, 400), None, "byte {at}");
        assert_eq!(decode(3, &good[..at], 400), None, "{at} bytes");
    }
    assert_eq!(indexed_pages(&good, 400), Some(4));
}

#[test]
fn a_folder_has_one_user_and_a_least_size() {
    let dir = tempfile::tempdir().unwrap();
    let error = SealedPages::open(dir.path(), SMALL - 1).unwrap_err();
    assert!(matches!(error, SealedPagesError::TooSmall { .. }));
    let pages = SealedPages::open(dir.path(), SMALL).unwrap();
    let error = SealedPages::open(dir.path(), SMALL).unwrap_err();
    assert!(matches!(error, SealedPagesError::Lock(LockError::InUse { .. })));
    pages.close();
    drop(pages);
    SealedPages::open(dir.path(), SMALL).unwrap().close();
    let file = dir.path().join("lock");
    assert!(SealedPages::open(&file, SMALL).is_err(), "a file is no folder");
}

/// Pages that are gone from under it, or shorter than the index says, are misses.
#[test]
fn what_is_gone_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let pages = SealedPages::open(dir.path(), SMALL).unwrap();
    (0..10).for_each(|number| keep(&pages, number));
    pages.close();
    let file = File::options().write(true).open(pages_path(dir.path(), 1)).unwrap();
    file.set_len(5 * PAGE_BYTES as u64).unwrap();
    assert_eq!(wrong(&pages, 0..5), [0u64; 0]);
    assert_eq!(wrong(&pages, 5..10), [5, 6, 7, 8, 9]);
    assert!(!pages.knows(&key(7)), "it is not asked for again");
    drop(pages);
    let pages = SealedPages::open(dir.path(), SMALL).unwrap();
    assert_eq!(wrong(&pages, 0..1), [0], "an index that says too much is none");
    pages.close();
}
