//! The store against a map, crashes, damage, full disks.

mod damage;
mod model;
mod space;
mod torn;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use us_core::ids::FragmentId;

use super::{ReadRequest, Store, StoreOptions};

use super::record::{sample, sample_id};

/// A clock that tests move.
#[derive(Clone, Default)]
struct TestClock(Arc<AtomicU64>);

impl TestClock {
    fn advance(&self, seconds: u64) {
        self.0.fetch_add(seconds, Ordering::Relaxed);
    }
}

fn options(clock: &TestClock) -> StoreOptions {
    let clock = clock.clone();
    clock.0.fetch_max(1_000_000, Ordering::Relaxed);
    StoreOptions {
        segment_bytes: 256 << 10,
        index_cache_bytes: 1 << 20,
        clock: Arc::new(move || clock.0.load(Ordering::Relaxed)),
        ..StoreOptions::default()
    }
}

fn read_all(store: &Store, id: FragmentId) -> Result<Bytes, super::StoreError> {
    let read = store.read(ReadRequest { id, first_slot: 0, slots: None })?;
    let whole = store.read_record(id)?;
    assert_eq!(read.data, whole.slice(128..128 + read.data.len()));
    for slot in 0..read.header.slots() {
        let one = store.read(ReadRequest { id, first_slot: slot, slots: Some(1) })?;
        let bytes = read.header.geometry().slot_bytes();
        assert_eq!(one.data, read.data.slice(slot * bytes..(slot + 1) * bytes));
        assert_eq!(one.trailer, read.trailer);
        let now = store.read_now(ReadRequest { id, first_slot: slot, slots: Some(1) });
        assert!(now.is_none_or(|now| now == one));
    }
    Ok(whole)
}

/// The segment files of a store, in order.
fn segment_paths(store: &std::path::Path) -> Vec<std::path::PathBuf> {
    let files = std::fs::read_dir(store.join("segments")).unwrap();
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "seg"));
    paths.sort();
    paths
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    futures::executor::block_on(future)
}

/// Copies a folder, as a crash would leave it.
fn copy_folder(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        let target = to.join(file.file_name());
        if file.file_type().unwrap().is_dir() {
            copy_folder(&file.path(), &target);
        } else {
            std::fs::copy(file.path(), target).unwrap();
        }
    }
}
