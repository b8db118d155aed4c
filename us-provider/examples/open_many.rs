//! How long a store with many small fragments takes to open: closed well, killed, index lost.
//!
//! `cargo run --release -p us-provider --example open_many [FRAGMENTS] [FOLDER]`

use std::path::PathBuf;
use std::time::Instant;

use bytes::Bytes;
use us_core::fragment::{FingerprintKind, FragmentRecord, records_of_block};
use us_core::geometry::{BlockGeometry, Code};
use us_core::ids::{Birth, BlockId, VolumeId};
use us_provider::store::{Store, StoreOptions};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let count: u64 = arguments.next().map_or(1_000_000, |text| text.parse().expect("a number"));
    let folder = arguments.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(folder).expect("a folder");
    let begun = Instant::now();
    let store = Store::open(dir.path(), StoreOptions::default()).expect("a store");
    fill(&store, count);
    println!("put {count} fragments in {:?}; resident {} MB", begun.elapsed(), resident_mb());
    drop(store);
    open(&dir, "closed well");
    std::fs::write(dir.path().join("index.state"), format!("open {}", boot())).expect("a file");
    open(&dir, "killed: entries counted");
    std::fs::remove_dir_all(dir.path().join("index")).expect("an index");
    open(&dir, "index lost");
}

fn open(dir: &tempfile::TempDir, what: &str) {
    let begun = Instant::now();
    let store = Store::open(dir.path(), StoreOptions::default()).expect("it opens");
    let took = begun.elapsed();
    let (state, recovery) = (store.state(), store.recovery());
    println!(
        "{what}: open in {took:?}, {} fragments, {} records walked, resident {} MB",
        state.fragments,
        recovery.records,
        resident_mb()
    );
}

fn fill(store: &Store, count: u64) {
    use futures::StreamExt;
    let puts = futures::stream::iter(0..count)
        .map(|number| async move { store.put(small(number)).await.expect("there is room") })
        .buffer_unordered(1024)
        .count();
    futures::executor::block_on(puts);
}

/// A fragment of one small page.
fn small(number: u64) -> Bytes {
    let geometry = BlockGeometry::new(Code::new(1, 0).expect("a code"), 100).expect("a block");
    let body = Bytes::from(vec![number as u8; geometry.fragment_bytes()]);
    let mut block = [0u8; 16];
    block[..8].copy_from_slice(&number.to_be_bytes());
    let volume = VolumeId::from_bytes([1; 16]);
    let block = BlockId::from_bytes(block);
    let records: Vec<FragmentRecord> = records_of_block(
        FingerprintKind::Crc32c,
        volume,
        block,
        Birth(number),
        geometry,
        vec![body],
    );
    records[0].to_parts().slices().concat().into()
}

fn boot() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    boot.trim().to_owned()
}

fn resident_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) >> 10
}
