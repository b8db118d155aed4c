//! The machine as a whole: its CPU time, its page cache, whether it is quiet.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Of times in /proc, on every Linux.
const TICKS_A_SECOND: f64 = 100.0;
/// The machine is quiet when it used less than a sixteenth of one core for so long.
const LOOK: Duration = Duration::from_millis(400);
const QUIET_CPU_SECONDS: f64 = 0.025;
/// The stores no longer change when this many looks in a row say the same.
const STEADY_LOOKS: usize = 4;
const STEADY_WITHIN: Duration = Duration::from_secs(60);

/// CPU seconds used since the machine began: user, nice, system, interrupts.
pub(crate) fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let first = stat.lines().next().unwrap_or_default();
    let fields: Vec<f64> = first.split(' ').filter_map(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq
    [0, 1, 2, 5, 6].iter().filter_map(|at| fields.get(*at)).sum::<f64>() / TICKS_A_SECOND
}

/// What a piece of work took.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cost {
    pub(crate) seconds: f64,
    /// CPU seconds of the whole machine meanwhile.
    pub(crate) cpu_seconds: f64,
}

/// Does some work and measures it.
pub(crate) fn measure<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Cost)> {
    let (begun, cpu) = (Instant::now(), cpu_seconds());
    let value = work()?;
    let seconds = begun.elapsed().as_secs_f64();
    Ok((value, Cost { seconds, cpu_seconds: cpu_seconds() - cpu }))
}

/// Waits until the machine is quiet, or `limit`; the CPU seconds it used meanwhile.
pub(crate) fn settle(limit: Duration) -> f64 {
    let (begun, cpu) = (Instant::now(), cpu_seconds());
    while begun.elapsed() < limit {
        let before = cpu_seconds();
        std::thread::sleep(LOOK);
        if cpu_seconds() - before <= QUIET_CPU_SECONDS {
            break;
        }
    }
    cpu_seconds() - cpu
}

/// Memory of this process, given back to the system right before a timed part, and taken again after.
///
/// On a virtual machine whose host takes free memory away the first touch of a page costs the host's
/// work (here ten times that of the copy into it), and which file system meets such pages is chance. What
/// was in use just before is used first.
pub(crate) struct Reserve {
    bytes: usize,
    held: Vec<u8>,
}

impl Reserve {
    /// Holds `bytes`, or half of what the machine has free.
    pub(crate) fn new(bytes: usize) -> Self {
        let free = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let free = free.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or("");
        let free_kib: usize = free.trim().trim_end_matches(" kB").parse().unwrap_or(0);
        let mut reserve = Self { bytes: bytes.min(free_kib << 9), held: Vec::new() };
        reserve.take();
        reserve
    }

    /// Takes the memory, if it is not held, and touches all of it.
    pub(crate) fn take(&mut self) {
        if self.held.is_empty() {
            self.held = vec![1; self.bytes];
        }
    }

    /// Lets go of it.
    pub(crate) fn give(&mut self) {
        self.held = Vec::new();
    }
}

/// Writes back what is dirty, and forgets what is cached: pages, names, inodes.
pub(crate) fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop the page cache")
}

/// The bytes that the files below these folders occupy, once that no longer changes.
pub(crate) fn steady_bytes(folders: &[PathBuf]) -> u64 {
    let begun = Instant::now();
    let (mut last, mut same) = (0, 0);
    while same < STEADY_LOOKS && begun.elapsed() < STEADY_WITHIN {
        rustix::fs::sync();
        std::thread::sleep(LOOK);
        let mut seen = HashSet::new();
        let now = folders.iter().map(|folder| allocated_bytes(folder, &mut seen)).sum();
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}

fn allocated_bytes(folder: &Path, seen: &mut HashSet<u64>) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| {
        // A file may have gone since it was listed.
        let Ok(meta) = fs::symlink_metadata(entry.path()) else { return 0 };
        if meta.is_dir() {
            return meta.blocks() * 512 + allocated_bytes(&entry.path(), seen);
        }
        // What a file system keeps ready after a file's end is no data.
        let own = (meta.blocks() * 512).min(meta.size().next_multiple_of(4096));
        if seen.insert(meta.ino()) { own } else { 0 }
    });
    bytes.sum()
}

/// Whether a program is in one of the folders of `PATH`.
pub(crate) fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}
