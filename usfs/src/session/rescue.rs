//! The rescue file: what a mount had not made durable when its session ended.
//!
//! A directory of its own under the mount's data, readable with ordinary tools: `log` describes the
//! undone changes, one a line; `inode-N` holds the unwritten bytes of a file at their offsets (the
//! rest is holes); `index` says which bytes those are.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use us_core::ids::Ino;

use crate::core::Core;

/// What is to be saved.
pub(crate) struct Rescue {
    log: Vec<String>,
    files: Vec<(Ino, Vec<(u64, Bytes)>)>,
}

impl Rescue {
    /// Everything that is not durable; `None` if there is nothing.
    pub fn collect(core: &mut Core) -> Option<Self> {
        let log: Vec<_> = core.log().undurable().map(|mutation| format!("{mutation:?}")).collect();
        let dirty = core.uncommitted_files();
        let files: Vec<_> =
            dirty.into_iter().map(|ino| (ino, core.uncommitted_pieces(ino))).collect();
        (!log.is_empty() || !files.is_empty()).then_some(Self { log, files })
    }

    /// Writes it under `dir` and answers where.
    pub fn write(&self, dir: &Path, volume: &str) -> io::Result<PathBuf> {
        let seconds =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let path = dir.join(format!("rescue-{volume}-{seconds}"));
        fs::create_dir_all(&path)?;
        let mut index = String::new();
        for (ino, pieces) in &self.files {
            let file = File::create(path.join(format!("inode-{ino}")))?;
            for (offset, bytes) in pieces {
                file.write_all_at(bytes, *offset)?;
                let _ = writeln!(index, "inode-{ino}: bytes {offset}+{}", bytes.len());
            }
            file.sync_all()?;
        }
        for (name, content) in [("index", index), ("log", self.log.join("\n"))] {
            let file = File::create(path.join(name))?;
            file.write_all_at(content.as_bytes(), 0)?;
            file.sync_all()?;
        }
        File::open(&path)?.sync_all()?;
        Ok(path)
    }
}
