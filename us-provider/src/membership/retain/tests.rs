//! Lists against a real store: whole, torn, empty, old.

use proptest::prelude::*;

use super::*;
use crate::store::StoreOptions;

use crate::store::record::{sample, sample_id};

/// A store with blocks 1 to `count`, whose births are their numbers.
fn store(dir: &std::path::Path, count: u64) -> Store {
    let store = Store::open(dir, StoreOptions::default()).unwrap();
    for number in 1..=count {
        store.put_blocking(sample(number, 2000, 0).1).unwrap();
    }
    store
}

fn pages(keep: &[u64], births_below: u64, size: usize) -> Vec<RetainPage> {
    let entry = |number: &u64| RetainEntry {
        block: sample_id(*number).block.as_bytes().to_vec().into(),
        fragments: vec![1].into(),
    };
    let entries: Vec<RetainEntry> = keep.iter().map(entry).collect();
    let mut chunks: Vec<Vec<RetainEntry>> = entries.chunks(size).map(<[_]>::to_vec).collect();
    if chunks.is_empty() {
        chunks.push(Vec::new());
    }
    let last = chunks.len() - 1;
    let page = |(at, entries): (usize, Vec<RetainEntry>)| RetainPage {
        list: 7,
        incarnation: 1,
        run: 2,
        seq: 3,
        births_below,
        page: at as u32,
        entries,
        last: at == last,
        entries_total: if at == last { keep.len() as u64 } else { 0 },
    };
    chunks.into_iter().enumerate().map(page).collect()
}

fn follow(
    retaining: &mut Retaining,
    store: &Store,
    pages: &[RetainPage],
) -> Result<Option<Vec<u64>>, RetainError> {
    let mut found = Ok(None);
    for page in pages {
        found = Ok(retaining.page(store, None, page)?);
    }
    let number = |line: &InventoryEntry| line.entry.birth.0;
    found.map(|lines: Option<Vec<InventoryEntry>>| {
        lines.map(|lines| lines.iter().map(number).collect())
    })
}

#[test]
fn what_is_old_and_not_listed_is_told_when_the_list_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), 20);
    let mut retaining = Retaining::default();
    let list = pages(&[2, 3, 5, 11, 30], 15, 2);
    for page in &list[..2] {
        assert!(retaining.page(&store, None, page).unwrap().is_none(), "nothing before the end");
    }
    let found = retaining.page(&store, None, &list[2]).unwrap().unwrap();
    let numbers: Vec<u64> = found.iter().map(|line| line.entry.birth.0).collect();
    assert_eq!(numbers, [1, 4, 6, 7, 8, 9, 10, 12, 13, 14], "15 to 20 are too young");
    // Nothing went by itself, and what is in the trash is not spoken of again.
    assert_eq!(store.state().fragments, 20);
    futures::executor::block_on(store.delete(vec![sample_id(4)])).unwrap();
    let again = follow(&mut retaining, &store, &list).unwrap().unwrap();
    assert!(!again.contains(&4) && again.len() == 9);
}

#[test]
fn an_empty_list_is_refused_where_there_is_something_to_lose() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), 5);
    let mut retaining = Retaining::default();
    let refused = follow(&mut retaining, &store, &pages(&[], 4, 9));
    assert!(matches!(refused, Err(RetainError::Empty { fragments: 3 })), "{refused:?}");
    // Of young ones nothing would be said anyway.
    let young = follow(&mut retaining, &store, &pages(&[], 1, 9));
    assert_eq!(young.unwrap(), Some(Vec::new()));
}

#[test]
fn a_list_that_is_cut_short_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), 9);
    let mut retaining = Retaining::default();
    let whole = pages(&[1, 2, 3, 4, 5, 6], 100, 2);
    // The middle is missing.
    let torn = [whole[0].clone(), whole[2].clone()];
    let refused = follow(&mut retaining, &store, &torn);
    assert!(matches!(refused, Err(RetainError::Page { page: 2, expected: 1 })), "{refused:?}");
    // The end of another list, with the right number.
    let end = RetainPage { page: 1, ..whole[2].clone() };
    let refused = follow(&mut retaining, &store, &[whole[0].clone(), end]);
    let is_short = matches!(refused, Err(RetainError::Short { found: 4, expected: 6 }));
    assert!(is_short, "{refused:?}");
    // After a crash in the middle the rest of the list says nothing.
    retaining.page(&store, None, &whole[0]).unwrap();
    let mut reborn = Retaining::default();
    let refused = follow(&mut reborn, &store, &whole[1..]);
    assert!(matches!(refused, Err(RetainError::Page { page: 1, expected: 0 })), "{refused:?}");
    // And the whole of it, sent again with the same number, is followed.
    assert_eq!(follow(&mut retaining, &store, &whole).unwrap(), Some(vec![7, 8, 9]));
    let mut shuffled = whole;
    shuffled[1].entries.reverse();
    let refused = follow(&mut retaining, &store, &shuffled);
    assert!(matches!(refused, Err(RetainError::Malformed { .. })), "{refused:?}");
}

#[test]
fn an_old_copy_of_the_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), 3);
    let mut retaining = Retaining::default();
    follow(&mut retaining, &store, &pages(&[1, 2, 3], 100, 9)).unwrap();
    let mut old = pages(&[1], 100, 9);
    old[0].run = 1;
    let refused = follow(&mut retaining, &store, &old);
    assert!(matches!(refused, Err(RetainError::Old { .. })), "{refused:?}");
    // Also where it is known from the journal's copy alone.
    let held = RecordsHeld { incarnation: 2, run: 1, ..RecordsHeld::default() };
    let mut fresh = Retaining::default();
    let refused = fresh.page(&store, Some(&held), &pages(&[1], 100, 9)[0]);
    assert!(matches!(refused, Err(RetainError::Old { .. })), "{refused:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Against a set: whatever is kept, however it is cut into pages.
    #[test]
    fn just_what_is_not_listed_is_told(
        keep in prop::collection::btree_set(1u64..40, 1..30),
        births_below in 1u64..40,
        size in 1usize..12,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path(), 30);
        let keep: Vec<u64> = keep.into_iter().collect();
        let list = pages(&keep, births_below, size);
        let found = follow(&mut Retaining::default(), &store, &list).unwrap().unwrap();
        let expected: Vec<u64> = (1..=30)
            .filter(|number| *number < births_below && !keep.contains(number))
            .collect();
        prop_assert_eq!(found, expected);
    }
}
