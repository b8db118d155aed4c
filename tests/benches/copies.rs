//! What copies of the directory's journal cost: files made and synced each second, with two copies
//! and with none, on clusters of real processes on this machine.
//!
//!     cargo bench -p us-tests --bench copies

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use us_tests::cluster::{Cluster, Shape, fuse_is_here};

const FILES: usize = 400;
const ROUNDS: usize = 5;
const BYTES: &[u8] = &[7; 1000];

/// Median and 99th percentile of a synced file, and files a second, on `threads` threads.
fn measure(disk: &Path, round: usize, threads: usize) -> (Duration, Duration, f64) {
    let begun = Instant::now();
    let work = |thread: usize| -> Vec<Duration> {
        let folder = disk.join(format!("r{round}t{threads}-{thread}"));
        std::fs::create_dir(&folder).expect("a folder");
        let one = |number: usize| {
            let begun = Instant::now();
            let mut file = File::create(folder.join(number.to_string())).expect("a file");
            file.write_all(BYTES).expect("written");
            file.sync_all().expect("synced");
            begun.elapsed()
        };
        (0..FILES / threads).map(one).collect()
    };
    let mut all: Vec<Duration> = std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("no panic")).collect()
    });
    let rate = all.len() as f64 / begun.elapsed().as_secs_f64();
    all.sort_unstable();
    (all[all.len() / 2], all[all.len() * 99 / 100], rate)
}

fn main() {
    if !fuse_is_here() {
        return;
    }
    let shape = |directory| Shape { directory, ..Shape::default() };
    let mut with = Cluster::start(shape(&[]));
    let mut without = Cluster::start(shape(&["--copies", "0"]));
    with.wait_copies(2);
    let (mount_with, mount_without) = (with.mount(), without.mount());
    println!("threads  copies  median      p99         files/s");
    for threads in [1, 8] {
        // Turn and turn about, so that what else the machine does falls on both.
        for round in 0..ROUNDS {
            for (copies, mount) in [(2, &mount_with), (0, &mount_without)] {
                let (median, p99, rate) = measure(mount.path(), round, threads);
                println!("{threads:<8} {copies:<7} {median:<11?} {p99:<11?} {rate:.0}");
            }
        }
    }
    assert_eq!(with.wait_copies(2).len(), 2);
    mount_with.unmount();
    mount_without.unmount();
}
