//! How the directory bears many files: memory while they are made, and the time and memory of a
//! start.
//!
//! `cargo run --release -p us-directory --example scale -- 1000000 10 /some/dir` makes a million
//! files of ten blocks each (six fragments a block) and starts on them again.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use us_core::geometry::Code;
use us_core::ids::VolumeId;
use us_core::placement::Spread;
use us_directory::engine::health::count_slice;
use us_directory::engine::{Engine, EngineConfig, Event, Moment, SystemEntropy};
use us_directory::namespace::{Authority, Tx, new_root};
use us_directory::records::{VolumeRecord, encode};
use us_directory::store::embedded::{EmbeddedOptions, EmbeddedStore};
use us_directory::store::{Durability, MetaStore};
use us_directory::{keys, records};
use us_proto::v1::mutation::Op;
use us_proto::v1::{BlockCommit, CommitData, Create, ExtentWrite, FileGrowth, Mutation, Timestamp};

const FILES_A_BATCH: u64 = 100;
const PROVIDERS: u64 = 12;
const BLOCK_BYTES: u64 = 4_128_768;

struct Anyone;

impl Authority for Anyone {
    fn session(&self) -> u64 {
        1
    }
    fn exclusive(&self, _ino: u64) -> bool {
        true
    }
    fn may_create(&self, _ino: u64) -> bool {
        true
    }
    fn open_elsewhere(&self, _ino: u64) -> Vec<u64> {
        Vec::new()
    }
    fn provider_exists(&self, _provider: u32) -> bool {
        true
    }
    fn birth_given(&self, _birth: u64) -> bool {
        true
    }
    fn next_grant(&self) -> u64 {
        1
    }
}

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) >> 10
}

fn open(dir: &Path) -> anyhow::Result<EmbeddedStore> {
    let sink = std::sync::Arc::new(|durable: Result<us_directory::store::Progress, _>| {
        if let Err(error) = durable {
            eprintln!("the store failed: {error}");
            std::process::exit(1);
        }
    });
    Ok(EmbeddedStore::open(dir, EmbeddedOptions::default(), sink)?)
}

fn id(number: u64) -> bytes::Bytes {
    // Time-ordered in front, mixed behind, as real ids are.
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    [(number / 64).to_be_bytes(), mixed.to_be_bytes()].concat().into()
}

fn file(ino: u64, dir: u64, blocks: u64) -> Vec<Op> {
    let name = id(ino);
    let time = Some(Timestamp { seconds: 1_700_000_000, nanos: 0 });
    let create = Create {
        dir,
        name_hash: name.clone(),
        sealed_name: vec![7; 48].into(),
        ino,
        mode: 0o100_644,
        time,
        ..Default::default()
    };
    let (mut commits, mut extents) = (Vec::new(), Vec::new());
    for number in 0..blocks {
        let unique = ino * blocks + number;
        let providers = (0..6).map(|index| ((unique + index * 2) % PROVIDERS + 1) as u32);
        commits.push(BlockCommit {
            block: id(unique),
            s: 4,
            r: 2,
            page_bytes: 16_384,
            plaintext_bytes: BLOCK_BYTES as u32,
            birth: 1,
            providers: providers.collect(),
            durable: vec![0b11_1111].into(),
            fingerprint_kind: 1,
            fingerprint_hash: vec![1; 32].into(),
            ..Default::default()
        });
        extents.push(ExtentWrite {
            ino,
            offset: number * BLOCK_BYTES,
            length: BLOCK_BYTES,
            block: id(unique),
            ..Default::default()
        });
    }
    let size = blocks * BLOCK_BYTES;
    let files = vec![FileGrowth { ino, size, mtime: time, ctime: time, clear_suid: false }];
    vec![Op::Create(create), Op::CommitData(CommitData { blocks: commits, extents, files })]
}

fn fill(dir: &Path, volume: VolumeId, files: u64, blocks: u64) -> anyhow::Result<()> {
    let code = Code::new(4, 2)?;
    let mut store = open(dir)?;
    let record =
        VolumeRecord { name: "big".into(), s: 4, r: 2, next_ino: 1 << 40, ..Default::default() };
    let mut batch = new_root(&volume, Timestamp::default());
    batch.put(keys::volume(&volume), encode(&record));
    store.commit(batch, Durability::Applied)?;
    let started = Instant::now();
    let mut peak = 0;
    for first in (0..files).step_by(FILES_A_BATCH as usize) {
        let mut tx = Tx::new(&store, volume, code, 0);
        for ino in first + 2..first + 2 + FILES_A_BATCH {
            for op in file(ino, 1, blocks) {
                tx.apply(&Anyone, &Mutation { op: Some(op) })?;
            }
        }
        let outcome = tx.finish()?;
        store.commit(outcome.batch, Durability::Applied)?;
        peak = peak.max(resident_mib());
    }
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "made {files} files, {} blocks in {seconds:.1} s ({:.0} files/s), at most {peak} MiB",
        files * blocks,
        files as f64 / seconds
    );
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut number = |otherwise: u64| args.next().map_or(Ok(otherwise), |arg| arg.parse());
    let (files, blocks) = (number(100_000)?, number(10)?);
    let dir = PathBuf::from(args.next().context("the last argument: a directory to fill")?);
    let volume = VolumeId::from_bytes([3; 16]);
    if !dir.join("checkpoint.redb").exists() {
        fill(&dir, volume, files, blocks)?;
        println!("run again to measure a start in a fresh process");
        return Ok(());
    }
    let started = Instant::now();
    let store = open(&dir)?;
    println!("store opened in {} ms, {} MiB", started.elapsed().as_millis(), resident_mib());
    let entropy = Box::new(SystemEntropy);
    let config = EngineConfig::default();
    let mut engine = Engine::start(Box::new(store), config, entropy, Box::new(Spread), [1; 16])?;
    println!("engine started after {} ms", started.elapsed().as_millis());
    let (view, mut cursor) = engine.to_count();
    let usage = view.get(&keys::usage(&volume))?.context("no usage record")?;
    println!("{:?}", records::decode::<records::UsageRecord>(b"", &usage)?);
    loop {
        let slice = count_slice(&*view, &mut cursor)?;
        let last = slice.last;
        engine.step(Moment::default(), Event::Counted(slice))?;
        if last {
            break;
        }
    }
    println!("counted after {} ms, {} MiB", started.elapsed().as_millis(), resident_mib());
    Ok(())
}
