//! The store against a `BTreeMap`, and against every crash its files can show.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use proptest::prelude::*;

use super::embedded::{EmbeddedOptions, EmbeddedStore};
use super::journal::{list_files, read_file};
use super::memory::MemoryStore;
use super::*;

type Model = BTreeMap<Bytes, Bytes>;

/// Waits for what the store says is durable.
#[derive(Default)]
struct Heard {
    durable: Mutex<(Seq, Option<StoreError>)>,
    changed: Condvar,
}

fn listen() -> (Arc<Heard>, DurableSink) {
    let heard = Arc::new(Heard::default());
    let told = heard.clone();
    let sink: DurableSink = Arc::new(move |durable| {
        let mut state = told.durable.lock();
        match durable {
            Ok(progress) => state.0 = state.0.max(progress.synced),
            Err(error) => state.1 = Some(error),
        }
        told.changed.notify_all();
    });
    (heard, sink)
}

impl Heard {
    fn wait(&self, seq: Seq) {
        let mut state = self.durable.lock();
        while state.0 < seq {
            assert!(state.1.is_none(), "{:?}", state.1);
            let late = self.changed.wait_for(&mut state, std::time::Duration::from_secs(20));
            assert!(!late.timed_out(), "commit {seq} is not durable after 20 s");
        }
    }
}

const SMALL: EmbeddedOptions =
    EmbeddedOptions { cache_bytes: 1 << 20, journal_file_bytes: 2 << 10, overlay_keys: 20 };
/// Sizes with which no checkpoint is ever made.
const NO_CHECKPOINT: EmbeddedOptions =
    EmbeddedOptions { cache_bytes: 1 << 20, journal_file_bytes: 1 << 40, overlay_keys: 1 << 40 };

fn open(dir: &Path, options: EmbeddedOptions) -> Result<(EmbeddedStore, Arc<Heard>), StoreError> {
    let (heard, sink) = listen();
    Ok((EmbeddedStore::open(dir, options, sink)?, heard))
}

fn everything() -> KeyRange {
    KeyRange { from: Bytes::new(), to: None }
}

fn contents(view: &dyn View) -> Model {
    let mut range = everything();
    let mut all = Model::new();
    loop {
        let page = view.scan(&range, 3).unwrap();
        let Some((last, _)) = page.last() else { return all };
        range = range.after(last);
        all.extend(page);
    }
}

fn apply(model: &mut Model, batch: &WriteBatch) {
    for (key, value) in batch.iter() {
        match value {
            Some(value) => model.insert(key.clone(), value.clone()),
            None => model.remove(key),
        };
    }
}

fn batches() -> impl Strategy<Value = Vec<Vec<(u8, Option<Vec<u8>>)>>> {
    let write = (0u8..40, proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)));
    proptest::collection::vec(proptest::collection::vec(write, 1..6), 1..40)
}

fn batch(writes: &[(u8, Option<Vec<u8>>)]) -> WriteBatch {
    let mut batch = WriteBatch::new();
    for (key, value) in writes {
        let key = Bytes::copy_from_slice(&[b'k', *key]);
        match value {
            Some(value) => batch.put(key, value.clone().into()),
            None => batch.delete(key),
        }
    }
    batch
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_embedded_store_agrees_with_a_map(
        steps in batches(), reopen_every in 3usize..12, from in 0u8..40, limit in 1usize..10,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, mut heard) = open(dir.path(), SMALL).unwrap();
        let (_, nobody) = listen();
        let mut memory = MemoryStore::new(nobody);
        let mut model = Model::new();
        let mut snapshots = Vec::new();
        for (step, writes) in steps.iter().enumerate() {
            let batch = batch(writes);
            apply(&mut model, &batch);
            memory.commit(batch.clone(), Durability::Durable).unwrap();
            let seq = store.commit(batch, Durability::Applied).unwrap();
            for (key, _) in writes {
                let key = [b'k', *key];
                prop_assert_eq!(store.get(&key).unwrap(), model.get(&key[..]).cloned());
            }
            if step % 5 == 0 {
                snapshots.push((store.snapshot(), model.clone()));
            }
            if step % reopen_every == 0 {
                store.commit(WriteBatch::new(), Durability::Durable).unwrap();
                heard.wait(seq);
                snapshots.clear();
                drop(store);
                (store, heard) = open(dir.path(), SMALL).unwrap();
            }
        }
        prop_assert_eq!(&contents(&store), &model);
        prop_assert_eq!(&contents(&memory), &model);
        for (snapshot, model) in &snapshots {
            prop_assert_eq!(&contents(&**snapshot), model);
        }
        let range = KeyRange { from: Bytes::copy_from_slice(&[b'k', from]), to: None };
        let expected: Vec<Pair> = model
            .range(range.from.clone()..)
            .take(limit)
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        prop_assert_eq!(store.scan(&range, limit).unwrap(), expected);
    }
}

/// Makes a store of `commits` commits in `dir`, each synced, and leaves it as a kill would: with no
/// end written.
fn killed_store(dir: &Path, commits: u8) -> Vec<Model> {
    let (mut store, heard) = open(dir, NO_CHECKPOINT).unwrap();
    let mut model = Model::new();
    let mut states = vec![model.clone()];
    for number in 0..commits {
        let mut batch = WriteBatch::new();
        batch
            .put(Bytes::copy_from_slice(&[number]), Bytes::from(vec![number; 5 + number as usize]));
        if number > 2 {
            batch.delete(Bytes::copy_from_slice(&[number - 2]));
        }
        apply(&mut model, &batch);
        states.push(model.clone());
        let seq = store.commit(batch, Durability::Durable).unwrap();
        heard.wait(seq);
    }
    let files = list_files(dir).unwrap();
    let (_, path) = files.last().unwrap();
    let before_close = std::fs::read(path).unwrap();
    drop(store);
    std::fs::write(path, before_close).unwrap();
    states
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Where the records of a killed store's journal end: zeros follow.
fn records_end(journal: &[u8]) -> usize {
    let end = journal.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    assert!(end < journal.len(), "zeros lie behind the records");
    end.next_multiple_of(8)
}

/// A crash may cut the journal anywhere: what is left is a state after a whole commit, and the
/// longer the file, the later the state.
#[test]
fn a_journal_cut_anywhere_gives_a_prefix() {
    let root = tempfile::tempdir().unwrap();
    let image = root.path().join("image");
    let states = killed_store(&image, 6);
    let (_, journal) = list_files(&image).unwrap().pop().unwrap();
    let whole = std::fs::read(&journal).unwrap();
    let mut reached = 0;
    for length in 0..=whole.len() {
        let dir = root.path().join("cut");
        copy(&image, &dir);
        let path = dir.join(journal.file_name().unwrap());
        std::fs::write(&path, &whole[..length]).unwrap();
        let (store, _) = open(&dir, NO_CHECKPOINT).unwrap();
        let found = contents(&store);
        let at = states.iter().position(|state| *state == found).expect("a whole commit's state");
        assert!(at >= reached, "cut at {length}: state {at} after {reached}");
        reached = at;
        drop(store);
        std::fs::remove_dir_all(&dir).unwrap();
    }
    assert_eq!(reached, states.len() - 1);
}

/// A flipped bit is found. In a record that a later one says was synced it is damage and the store
/// does not open; in the last record it looks like a torn tail, and only that record goes.
#[test]
fn a_flipped_bit_is_damage_or_the_torn_tail() {
    let root = tempfile::tempdir().unwrap();
    let image = root.path().join("image");
    let states = killed_store(&image, 5);
    let (first_seq, journal) = list_files(&image).unwrap().pop().unwrap();
    let with_zeros = std::fs::read(&journal).unwrap();
    let flip = |bytes: &[u8], at: usize| {
        let dir = root.path().join("flip");
        copy(&image, &dir);
        let path = dir.join(journal.file_name().unwrap());
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 1 << (at % 8);
        std::fs::write(&path, &bytes).unwrap();
        let opened = open(&dir, NO_CHECKPOINT).map(|(store, _)| contents(&store));
        std::fs::remove_dir_all(&dir).unwrap();
        opened
    };
    let whole = &with_zeros[..records_end(&with_zeros)];
    let (mut damaged, mut cut) = (0, 0);
    for at in 0..whole.len() {
        match flip(whole, at) {
            Err(StoreError::Damaged { .. }) => damaged += 1,
            Err(error) => panic!("byte {at}: {error}"),
            Ok(found) => {
                let lost_last = found == states[states.len() - 2];
                assert!(lost_last || found == states[states.len() - 1], "byte {at}");
                cut += usize::from(lost_last);
            }
        }
    }
    assert!(damaged > whole.len() / 2 && cut > 0, "{damaged} damaged, {cut} cut");
    for at in whole.len()..with_zeros.len() {
        let found = flip(&with_zeros, at).unwrap();
        assert!(
            found == states[states.len() - 1],
            "byte {at}: a flipped zero takes no record along"
        );
    }
    // The whole image reads as it is.
    assert_eq!(read_file(&journal, first_seq, 1, true).unwrap().batches.len(), 5);
}

/// A journal file that is missing between others, or damaged in one that is not the last, is an
/// error; files that a crash left although their checkpoint is done are not.
#[test]
fn crashes_between_the_steps_of_a_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    let image = root.path().join("image");
    let (mut store, heard) = open(&image, NO_CHECKPOINT).unwrap();
    let mut model = Model::new();
    let commit = |store: &mut EmbeddedStore, model: &mut Model, number: u8| {
        let batch = batch(&[(number, Some(vec![number; 9]))]);
        apply(model, &batch);
        store.commit(batch, Durability::Durable).unwrap()
    };
    for number in 0..4 {
        heard.wait(commit(&mut store, &mut model, number));
    }
    drop(store);
    // Before: the journal file of the first run, and no checkpoint of it.
    let before = root.path().join("before");
    copy(&image, &before);
    let tiny = EmbeddedOptions { journal_file_bytes: 1, ..NO_CHECKPOINT };
    let (mut store, heard) = open(&image, tiny).unwrap();
    heard.wait(commit(&mut store, &mut model, 9));
    heard.wait(commit(&mut store, &mut model, 10));
    drop(store);
    // The checkpoint is there; the old files come back as a crash before their removal leaves them.
    for (_, path) in list_files(&before).unwrap() {
        std::fs::copy(&path, image.join(path.file_name().unwrap())).unwrap();
    }
    let (store, _) = open(&image, NO_CHECKPOINT).unwrap();
    assert_eq!(contents(&store), model);
    drop(store);
    // A missing file in the middle is an error.
    let gap = root.path().join("gap");
    copy(&before, &gap);
    let (_, path) = list_files(&gap).unwrap().pop().unwrap();
    std::fs::rename(&path, gap.join("journal-00000000000000000007")).unwrap();
    assert!(matches!(open(&gap, NO_CHECKPOINT), Err(StoreError::Damaged { .. })));
}

#[test]
fn a_store_is_opened_once() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, _) = open(dir.path(), SMALL).unwrap();
    assert!(matches!(open(dir.path(), SMALL), Err(StoreError::InUse { .. })));
}

/// A directory was killed between the `write` of its last commits and their fdatasync. The next run
/// read them from the page cache, told a mount that they were durable, and synced only its own new
/// file. Then the power went: the old file was short, a file followed it, and the directory never
/// started again. Now a start syncs what it reads before it says anything.
#[test]
fn what_a_start_calls_durable_survives_the_power() {
    let ours = |path: &Path| path.file_name().unwrap().to_str().unwrap().starts_with("journal-");
    let root = tempfile::tempdir().unwrap();
    let image = root.path().join("image");
    let states = killed_store(&image, 6);
    let (_, journal) = list_files(&image).unwrap().pop().unwrap();
    let whole = std::fs::metadata(&journal).unwrap().len();
    for synced in (super::journal::FILE_HEADER_BYTES as u64..=whole).step_by(7) {
        let dir = root.path().join("cut");
        copy(&image, &dir);
        let platter = us_core::daemon::disk::Platter::hold(&dir).unwrap();
        platter.unsynced_behind(&dir.join(journal.file_name().unwrap()), synced);
        let (store, heard) = open(&dir, NO_CHECKPOINT).unwrap();
        heard.wait(6);
        drop(store);
        platter.cut(ours).unwrap();
        let (store, _) = open(&dir, NO_CHECKPOINT).unwrap();
        assert_eq!(contents(&store), states[6], "{synced} of {whole} bytes were synced");
        drop((store, platter));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
