//! Puts into the store against the limit: the same bytes appended to one file and synced as often.
//!
//! `cargo bench -p us-provider --bench store [FOLDER]`. Prints one line a measurement, and the
//! ratio; the limit runs before and after the store, and the better of the two counts.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use us_core::fragment::{FingerprintKind, records_of_block};
use us_core::geometry::{BlockGeometry, Code};
use us_core::ids::{Birth, BlockId, FragmentId, VolumeId};
use us_provider::store::{ReadRequest, Store, StoreOptions};

/// Puts under way at once.
const DEPTH: usize = 64;

fn main() {
    let folder = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    let folder = folder.map_or_else(std::env::temp_dir, PathBuf::from);
    println!("folder {}", folder.display());
    for (name, bytes, page_bytes, count) in [
        ("1 MiB", 63 * 16384, 16384, 1024),
        ("8 KiB", 8192, 8192, 60_000),
        ("4 KiB", 4096, 4096, 100_000),
    ] {
        let geometry = BlockGeometry::with_page(code(), bytes, page_bytes).expect("a block");
        let record = |number| record(number, geometry);
        run(&folder, name, (0..count).map(record).collect());
    }
}

fn run(folder: &Path, name: &str, records: Vec<Bytes>) {
    let count = records.len() as u64;
    let total: usize = records.iter().map(Bytes::len).sum();
    let before = append(folder, &records);
    let dir = tempfile::tempdir_in(folder).expect("a folder");
    let store = Store::open(dir.path(), StoreOptions::default()).expect("a store");
    let begun = Instant::now();
    put_all(&store, &records);
    let put = begun.elapsed();
    let begun = Instant::now();
    for number in 0..count {
        let request = ReadRequest { id: id(number), first_slot: 0, slots: None };
        store.read(request).expect("it was put");
    }
    let read = begun.elapsed();
    store.close();
    drop(dir);
    let limit = before.min(append(folder, &records));
    let rate = |time: Duration| total as f64 / time.as_secs_f64() / 1e6;
    println!(
        "{name}: put {:6.0} MB/s {:7.0}/s | raw append + fdatasync {:6.0} MB/s | ratio {:.2} | \
         read {:6.0} MB/s {:7.0}/s",
        rate(put),
        count as f64 / put.as_secs_f64(),
        rate(limit),
        limit.as_secs_f64() / put.as_secs_f64(),
        rate(read),
        count as f64 / read.as_secs_f64(),
    );
}

fn put_all(store: &Store, records: &[Bytes]) {
    use futures::StreamExt;
    let puts = futures::stream::iter(records.iter().cloned())
        .map(|record| async { store.put(record).await.expect("there is room") })
        .buffer_unordered(DEPTH)
        .count();
    futures::executor::block_on(puts);
}

/// The same bytes, with one write and one fdatasync for as many records as are put at once.
fn append(folder: &Path, records: &[Bytes]) -> Duration {
    let dir = tempfile::tempdir_in(folder).expect("a folder");
    let path = dir.path().join("file");
    let mut options = OpenOptions::new();
    let mut file = options.create_new(true).write(true).open(path).expect("a file");
    let begun = Instant::now();
    for batch in records.chunks(DEPTH) {
        let mut slices: Vec<_> = batch.iter().map(|bytes| std::io::IoSlice::new(bytes)).collect();
        let mut slices = &mut slices[..];
        while !slices.is_empty() {
            let written = file.write_vectored(slices).expect("there is room");
            std::io::IoSlice::advance_slices(&mut slices, written);
        }
        file.sync_data().expect("the disk works");
    }
    begun.elapsed()
}

fn code() -> Code {
    Code::new(1, 0).expect("a code")
}

fn id(number: u64) -> FragmentId {
    let mut block = [0u8; 16];
    block[..8].copy_from_slice(&number.to_be_bytes());
    FragmentId { block: BlockId::from_bytes(block), index: 0 }
}

fn record(number: u64, geometry: BlockGeometry) -> Bytes {
    let body = vec![number as u8; geometry.fragment_bytes()];
    let (volume, block) = (VolumeId::from_bytes([1; 16]), id(number).block);
    let records = records_of_block(
        FingerprintKind::Crc32c,
        volume,
        block,
        Birth(number),
        geometry,
        vec![body.into()],
    );
    records[0].to_parts().slices().concat().into()
}
