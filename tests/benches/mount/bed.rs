//! What a row works with: one file system, the bytes to write, and how a timed part is taken.

use std::cell::RefCell;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use us_tests::tree::noise;

use crate::disks::Disk;
use crate::machine::{self, Cost, Reserve};
use crate::sources::Sources;

/// A row of many small operations ends after so long: its rate is that of those it did.
const ROW_SECONDS_MAX: f64 = 60.0;
const SEED: u64 = 20_241_122;
const POOL_BYTES: usize = 64 << 20;
const CHUNK_BYTES: usize = 1 << 20;

/// Random bytes, the same in every run.
pub(crate) struct Data(Vec<u8>);

impl Data {
    pub(crate) fn new() -> Self {
        Self(noise(SEED, POOL_BYTES + CHUNK_BYTES))
    }

    /// The bytes of a number: at most a MiB; those of another number begin elsewhere.
    pub(crate) fn of(&self, number: u64, bytes: usize) -> &[u8] {
        let mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let from = ((mixed >> 32) as usize % POOL_BYTES) & !63;
        &self.0[from..from + bytes]
    }
}

/// What all file systems of a run share.
pub(crate) struct Shared {
    pub(crate) data: Data,
    pub(crate) sources: Option<Sources>,
    pub(crate) size_mib: u64,
    pub(crate) settle: Duration,
    pub(crate) reserve: RefCell<Reserve>,
    /// A folder on the local disk for what is no file system's.
    pub(crate) scratch: PathBuf,
}

/// How much a timed part did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Done {
    pub(crate) amount: f64,
    /// It ended before all was done.
    pub(crate) partial: bool,
}

impl Done {
    pub(crate) fn all(amount: f64) -> Self {
        Self { amount, partial: false }
    }
}

/// A timed part.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) done: Done,
    pub(crate) cost: Cost,
    /// CPU seconds from its end until the machine was quiet again.
    pub(crate) cpu_seconds_after: f64,
}

/// One file system, between rows.
pub(crate) struct Bed {
    pub(crate) disk: Disk,
    /// How often each block of the file for random access was overwritten.
    pub(crate) generations: Vec<u8>,
}

impl Bed {
    pub(crate) fn new(disk: Disk) -> Self {
        Self { disk, generations: Vec::new() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.disk.folder().join(name)
    }

    /// Takes the timed part: everything written before is on the disk, and the machine is quiet.
    pub(crate) fn time(
        &self,
        shared: &Shared,
        work: impl FnOnce() -> Result<Done>,
    ) -> Result<Sample> {
        rustix::fs::sync();
        shared.reserve.borrow_mut().take();
        machine::settle(shared.settle);
        shared.reserve.borrow_mut().give();
        let (done, cost) = machine::measure(work)?;
        let cpu_seconds_after = machine::settle(shared.settle);
        shared.reserve.borrow_mut().take();
        Ok(Sample { done, cost, cpu_seconds_after })
    }

    /// Leaves nothing cached: the client is mounted again, the kernel forgets.
    pub(crate) fn cool(&mut self) -> Result<()> {
        rustix::fs::sync();
        self.disk.remount()?;
        machine::drop_caches()
    }
}

/// Does `one` for each number up to `count`, for as long as a row may take.
pub(crate) fn each(count: usize, mut one: impl FnMut(usize) -> Result<()>) -> Result<Done> {
    let begun = Instant::now();
    for number in 0..count {
        one(number)?;
        if begun.elapsed().as_secs_f64() > ROW_SECONDS_MAX {
            return Ok(Done { amount: (number + 1) as f64, partial: true });
        }
    }
    Ok(Done::all(count as f64))
}

/// Removes a file or a folder with all in it, if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    removed.with_context(|| format!("remove {}", path.display()))
}
