//! What is no row: the space that files take, and usfs with two of its providers dead.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use us_tests::poll;

use crate::bed::{Bed, Sample, Shared, remove};
use crate::disks::{Disk, Kind, PROVIDERS, Usfs};
use crate::rows::{bulk, small};
use crate::{machine, report};

/// The most bytes stored for each byte of the large file, and of files of 4 KiB.
const FACTOR_LARGE: f64 = 1.53;
const FACTOR_SMALL: f64 = 2.0;
/// The least of a healthy disk's speed that one with two of six providers dead must have.
const DEGRADED: f64 = 0.95;
const VICTIMS: [usize; 2] = [1, 4];
/// How long a dead provider's lease may last.
const NOTICED: Duration = Duration::from_secs(180);
const FILE: &str = "extra";
const SECOND_FILE: &str = "extra2";

pub(crate) type Factors = Vec<(&'static str, f64, BTreeMap<Kind, f64>)>;

/// Writes on stores that are still fresh: nothing is removed meanwhile.
pub(crate) fn space(beds: &mut [Bed], shared: &Shared) -> Factors {
    let (mut large, mut small) = (BTreeMap::new(), BTreeMap::new());
    for bed in beds {
        let kind = bed.disk.kind();
        match factors(bed, shared) {
            Ok((of_small, of_large)) => {
                eprintln!("{:<14} {:<13} {of_small:.3} {of_large:.3}", "space", kind.name());
                small.insert(kind, of_small);
                large.insert(kind, of_large);
            }
            Err(error) => eprintln!("space, {}: FAILED: {error:#}", kind.name()),
        }
    }
    vec![("the large file", FACTOR_LARGE, large), ("2,000 files of 4 KiB", FACTOR_SMALL, small)]
}

fn factors(bed: &mut Bed, shared: &Shared) -> Result<(f64, f64)> {
    let (stores, path) = (bed.disk.stores(), bed.path(FILE));
    let empty = machine::steady_bytes(&stores);
    let count = small::make_all(&path, shared)?.amount;
    // What a client still holds back is stored when it unmounts.
    bed.disk.remount()?;
    let with_small = machine::steady_bytes(&stores);
    let large = path.join("large");
    bulk::write_file(&large, shared)?;
    bed.disk.remount()?;
    let with_large = machine::steady_bytes(&stores);
    remove(&path)?;
    let small_bytes = count * small::FILE_BYTES as f64;
    let large_bytes = (shared.size_mib << 20) as f64;
    let used = |from: u64, to: u64| to.saturating_sub(from) as f64;
    Ok((used(empty, with_small) / small_bytes, used(with_small, with_large) / large_bytes))
}

fn usfs(bed: &mut Bed) -> &mut Usfs {
    match &mut bed.disk {
        Disk::Usfs(disk) => disk,
        Disk::Local(_) | Disk::PassThrough(_) | Disk::Gluster(_) => panic!("it is usfs"),
    }
}

fn wait_online(bed: &mut Bed, wanted: usize) {
    let cluster = &usfs(bed).cluster;
    poll::until(&format!("{wanted} providers online"), NOTICED, || {
        let status = cluster.status()?;
        let providers = status["providers"].as_array().ok_or("no providers")?;
        let online = providers.iter().filter(|one| one["state"] == "online").count();
        (online == wanted).then_some(()).ok_or(format!("{online} online"))
    });
}

/// Writes and reads with all providers, then with two killed, a round after the other.
pub(crate) fn degraded(bed: &mut Bed, shared: &Shared, rounds: u32) -> Result<()> {
    let (path, second) = (bed.path(FILE), bed.path(SECOND_FILE));
    let mut written = (Vec::new(), Vec::new());
    let mut read = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        written.0.push(tell("write, healthy", write(bed, shared, &path)?));
        read.0.push(tell("read, healthy", read_cold(bed, shared, &path)?));
        VICTIMS.iter().for_each(|victim| usfs(bed).cluster.kill_provider(*victim));
        wait_online(bed, PROVIDERS - VICTIMS.len());
        read.1.push(tell("read, degraded", read_cold(bed, shared, &path)?));
        written.1.push(tell("write, degraded", write(bed, shared, &second)?));
        bulk::verify_file(&second, shared)?;
        VICTIMS.iter().for_each(|victim| usfs(bed).cluster.start_provider(*victim));
        wait_online(bed, PROVIDERS);
        remove(&path)?;
        remove(&second)?;
    }
    let lines = [
        ("sequential write, fsync", written.0, written.1),
        ("sequential read, cold", read.0, read.1),
    ];
    report::degraded(&lines, DEGRADED);
    Ok(())
}

fn write(bed: &mut Bed, shared: &Shared, path: &Path) -> Result<Sample> {
    bed.time(shared, || bulk::write_file(path, shared))
}

fn read_cold(bed: &mut Bed, shared: &Shared, path: &Path) -> Result<Sample> {
    bed.cool()?;
    let sample = bed.time(shared, || bulk::read_file(path, shared))?;
    bulk::verify_file(path, shared)?;
    Ok(sample)
}

fn tell(what: &str, sample: Sample) -> Sample {
    let rate = sample.done.amount / sample.cost.seconds;
    eprintln!("{what:<28} {rate:>10.2} MiB/s     CPU {:.2} s", sample.cost.cpu_seconds);
    sample
}
