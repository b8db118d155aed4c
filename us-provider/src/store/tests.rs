//! The store against a map, crashes, damage, full disks.

mod damage;
mod model;
mod space;
mod torn;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use us_core::fragment::records_of_block;
use us_core::geometry::{BlockGeometry, Code};
use us_core::ids::{Birth, BlockId, FragmentId, VolumeId};

use super::{ReadRequest, Store, StoreOptions};

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

/// The record of fragment 0 of block `number`, whose plaintext has `bytes`; other seeds, other
/// bytes.
fn sample(number: u64, bytes: usize, seed: u64) -> (FragmentId, Bytes) {
    let code = Code::new(1, 1).unwrap();
    let geometry = BlockGeometry::new(code, bytes).unwrap();
    let mut block = [0u8; 16];
    block[8..].copy_from_slice(&number.to_be_bytes());
    let block = BlockId::from_bytes(block);
    let mut random = StdRng::seed_from_u64(number << 8 | seed);
    let bodies = (0..2).map(|_| {
        let mut body = vec![0u8; geometry.fragment_bytes()];
        random.fill_bytes(&mut body);
        Bytes::from(body)
    });
    let volume = VolumeId::from_bytes([3; 16]);
    let records = records_of_block(volume, block, Birth(number), geometry, bodies.collect());
    let id = records[0].header.id();
    (id, records[0].to_parts().slices().concat().into())
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
    }
    Ok(whole)
}

/// The one segment file of a small store.
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
