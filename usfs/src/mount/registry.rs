//! Says which process serves a mount, and how its last flush went, to `usfs umount --flush`.
//!
//! One file a mount, named by its device number, locked by the serving process for its life: who
//! gets the lock knows that it has ended.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::fuse::kernel;
use crate::places;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    pid: u32,
    /// How the last flush went: absent while it serves, empty when all is durable.
    #[serde(default)]
    outcome: Option<String>,
}

/// The serving process's side.
#[derive(Debug)]
pub(super) struct Registered {
    path: PathBuf,
    file: File,
}

fn path_of(point: &Path) -> io::Result<PathBuf> {
    let entry = kernel::mount_at(point)?
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "nothing is mounted there"))?;
    Ok(places::running_dir().join(format!("mount-{}", entry.device)))
}

impl Registered {
    /// Registers the mount at `point` as served by this process.
    pub(super) fn new(point: &Path) -> io::Result<Self> {
        places::make_private_dir(&places::running_dir())?;
        let path = path_of(point)?;
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let mut registered = Self { path, file };
        registered.write(&Record { pid: std::process::id(), outcome: None })?;
        Ok(registered)
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(&serde_json::to_vec(record)?)
    }

    /// Leaves word of how the last flush went, and the registry.
    pub(super) fn finish(mut self, outcome: &str) {
        let record = Record { pid: std::process::id(), outcome: Some(outcome.to_owned()) };
        if let Err(error) = self.write(&record) {
            tracing::debug!(%error, "nobody will learn how the flush went");
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The side of `usfs umount --flush`.
#[derive(Debug)]
pub(super) struct Server {
    file: File,
}

impl Server {
    /// Finds who serves the mount at `point`; call it before unmounting.
    pub(super) fn find(point: &Path) -> io::Result<Self> {
        Ok(Self { file: File::open(path_of(point)?)? })
    }

    /// Waits until the process has ended. `Err` says why not everything is durable.
    pub(super) fn wait(mut self) -> Result<(), String> {
        flock(&self.file, FlockOperation::LockShared).map_err(|errno| errno.to_string())?;
        let mut text = String::new();
        self.file.read_to_string(&mut text).map_err(|error| error.to_string())?;
        let record: Option<Record> = serde_json::from_str(&text).ok();
        match record.and_then(|record| record.outcome) {
            Some(outcome) if outcome.is_empty() => Ok(()),
            Some(outcome) => Err(outcome),
            None => Err("its process ended without flushing".to_owned()),
        }
    }
}
