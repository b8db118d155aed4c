//! The rows of the table: what each does, and the least ratio to the pass-through that is wanted.

pub(crate) mod aio;
pub(crate) mod bulk;
pub(crate) mod database;
pub(crate) mod small;
pub(crate) mod trees;

use anyhow::Result;

use crate::bed::{Bed, Sample, Shared};

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// More is better.
    Rate(&'static str),
    /// Less is better.
    Seconds,
}

impl Unit {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Rate(name) => name,
            Self::Seconds => "s",
        }
    }

    pub(crate) fn value(self, sample: &Sample) -> f64 {
        match self {
            Self::Rate(_) => sample.done.amount / sample.cost.seconds,
            Self::Seconds => sample.cost.seconds,
        }
    }

    /// How near `ours` comes to `theirs`: 1 is as good, more is better.
    pub(crate) fn ratio(self, ours: f64, theirs: f64) -> f64 {
        match self {
            Self::Rate(_) => ours / theirs,
            Self::Seconds => theirs / ours,
        }
    }
}

/// A row of the table.
pub(crate) struct Row {
    /// The name `--only` and `--skip` know.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) unit: Unit,
    /// The ratio to the pass-through that is wanted.
    pub(crate) target: f64,
    pub(crate) take: fn(&mut Bed, &Shared) -> Result<Sample>,
}

const MIB: Unit = Unit::Rate("MiB/s");
const IOPS: Unit = Unit::Rate("IOPS");
const FILES: Unit = Unit::Rate("files/s");
const OPS: Unit = Unit::Rate("ops/s");
const ENTRIES: Unit = Unit::Rate("entries/s");
const COMMITS: Unit = Unit::Rate("tx/s");
const SECONDS: Unit = Unit::Seconds;

const fn row(
    name: &'static str,
    title: &'static str,
    unit: Unit,
    target: f64,
    take: fn(&mut Bed, &Shared) -> Result<Sample>,
) -> Row {
    Row { name, title, unit, target, take }
}

/// In the order in which a round takes them.
pub(crate) const ROWS: [Row; 19] = [
    row("seq-write", "sequential write, fsync", MIB, 0.5, bulk::write),
    row("seq-read", "sequential read, cold", MIB, 0.5, bulk::read),
    row("rand-read-1", "4 KiB random read, O_DIRECT, depth 1", IOPS, 0.5, bulk::random_read_1),
    row("rand-read-16", "4 KiB random read, O_DIRECT, depth 16", IOPS, 0.4, bulk::random_read_16),
    row("rand-write", "4 KiB random overwrite, buffered, fsync", IOPS, 0.3, bulk::overwrite),
    row("small-create", "create 2,000 files of 4 KiB", FILES, 0.7, small::create),
    row("small-read", "read 2,000 files of 4 KiB, cold", FILES, 0.6, small::read),
    row("small-stat", "stat, warm", OPS, 0.8, small::stat),
    row("small-fsync", "create 200 files of 4 KiB, fsync each", FILES, 0.5, small::create_fsync),
    row("mkdir", "mkdir", OPS, 0.7, small::mkdir),
    row("rename", "rename", OPS, 0.7, small::rename),
    row("readdir", "readdir", ENTRIES, 0.3, small::readdir),
    row("unlink", "unlink", OPS, 0.7, small::unlink),
    row("tar", "tar x of a source tree", SECONDS, 0.5, trees::tar),
    row("cp", "cp -r of it", SECONDS, 0.5, trees::copy),
    row("rm", "rm -rf of it", SECONDS, 0.5, trees::remove),
    row("clone", "git clone", SECONDS, 0.5, trees::clone),
    row("sqlite-journal", "sqlite3, a row a transaction, journal", COMMITS, 0.4, database::journal),
    row("sqlite-wal", "sqlite3, a row a transaction, WAL", COMMITS, 0.5, database::wal),
];
