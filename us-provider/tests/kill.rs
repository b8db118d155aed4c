//! kill -9 of a process that writes to a store, at random moments: everything it acknowledged is
//! there. The test starts itself again as the writer.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use us_provider::store::{Store, StoreError, StoreOptions};

#[path = "../samples/record.rs"]
mod record;
use record::{sample, sample_id};

const WRITER_DIR: &str = "US_TEST_KILL_DIR";
const WRITER_FIRST: &str = "US_TEST_KILL_FIRST";
const NUMBERS_A_ROUND: u64 = 100_000;

fn bytes_of(number: u64) -> usize {
    [100, 5000, 30_000, 150_000][(number % 4) as usize]
}

fn options() -> StoreOptions {
    StoreOptions { segment_bytes: 2 << 20, index_cache_bytes: 4 << 20, ..StoreOptions::default() }
}

/// The process that is killed, when the test below starts it; it prints what was acknowledged.
/// Without its folder in the environment there is nothing to do.
#[test]
fn writer() {
    let Ok(dir) = std::env::var(WRITER_DIR) else { return };
    let first: u64 = std::env::var(WRITER_FIRST).unwrap().parse().unwrap();
    let store = Store::open(Path::new(&dir), options()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let store = store.clone();
            scope.spawn(move || {
                for number in (first + thread..first + NUMBERS_A_ROUND).step_by(4) {
                    store.put_blocking(sample(number, bytes_of(number), 0).1).unwrap();
                    println!("put {number}");
                    if number % 16 == thread {
                        let deletion = store.delete(vec![sample_id(number)]);
                        assert_eq!(futures::executor::block_on(deletion).unwrap(), 1);
                        println!("deleted {number}");
                    }
                }
            });
        }
        let store = store.clone();
        scope.spawn(move || {
            loop {
                store.scrub(None, 10 << 20).unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
        });
    });
}

#[derive(PartialEq, Debug)]
enum Acknowledged {
    Put,
    Deleted,
}

fn run_and_kill(dir: &Path, first: u64, after: Duration, known: &mut BTreeMap<u64, Acknowledged>) {
    let mut writer = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer", "--nocapture"])
        .env(WRITER_DIR, dir)
        .env(WRITER_FIRST, first.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(writer.stdout.take().unwrap());
    let reader =
        std::thread::spawn(move || lines.lines().map_while(Result::ok).collect::<Vec<_>>());
    std::thread::sleep(after);
    writer.kill().unwrap();
    assert!(!writer.wait().unwrap().success());
    for line in reader.join().unwrap() {
        match line.rsplit_once(' ').map(|(what, number)| (what.to_owned(), number.parse())) {
            Some((what, Ok(number))) if what.ends_with("put") => {
                known.entry(number).or_insert(Acknowledged::Put);
            }
            Some((what, Ok(number))) if what.ends_with("deleted") => {
                known.insert(number, Acknowledged::Deleted);
            }
            _ => {}
        }
    }
}

fn check(store: &Store, known: &BTreeMap<u64, Acknowledged>, whole: bool) {
    for (number, acknowledged) in known {
        let id = sample_id(*number);
        if *acknowledged == Acknowledged::Deleted {
            let found = store.check(id);
            assert!(matches!(found, Err(StoreError::NotFound { .. })), "{number}: {found:?}");
        } else if whole || number % 7 == 0 {
            match store.read_record(id) {
                Ok(record) => {
                    assert!(record == sample(*number, bytes_of(*number), 0).1, "{number}")
                }
                // Deleted, but killed before it could say so.
                Err(StoreError::NotFound { .. }) if number % 16 < 4 => {}
                Err(error) => panic!("{number} was acknowledged: {error}"),
            }
        }
    }
    assert_eq!(store.state().damaged, 0);
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let rounds = match std::env::var("US_TEST_TIER").as_deref() {
        Ok("full" | "soak") => 50,
        _ => 6,
    };
    let seed = rand::rng().next_u64();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let mut known = BTreeMap::new();
    for round in 0..rounds {
        let after = Duration::from_millis(random.random_range(100..900));
        run_and_kill(dir.path(), round * NUMBERS_A_ROUND, after, &mut known);
        let store = Store::open(dir.path(), options()).unwrap();
        check(&store, &known, round + 1 == rounds);
        // Now and then the machine crashed, not the process: the index is not believed.
        if round % 3 == 2 {
            store.distrust_index();
            drop(store);
            std::fs::write(dir.path().join("index.state"), "open another-boot").unwrap();
            check(&Store::open(dir.path(), options()).unwrap(), &known, false);
        }
    }
    assert!(known.len() > 20, "the writers wrote {} fragments", known.len());
    println!("{} fragments in {rounds} rounds", known.len());
}
