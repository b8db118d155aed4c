//! What the kernel knows by a number: the inodes it has looked up, and what it has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use parking_lot::Mutex;
use rustix::fs::{CWD, Mode, OFlags, Stat};
use rustix::io::{Errno, Result};

/// An inode held open with O_PATH: so long its number is not given to another.
struct Node {
    fd: Arc<OwnedFd>,
    lookups: u64,
}

/// The inodes the kernel knows, by their number in the source.
pub(super) struct Nodes {
    root: Arc<OwnedFd>,
    known: Mutex<HashMap<u64, Node>>,
}

impl Nodes {
    pub(super) fn new(source: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, source, flags, Mode::empty())?;
        Ok(Self { root: Arc::new(root), known: Mutex::default() })
    }

    pub(super) fn get(&self, ino: INodeNo) -> Result<Arc<OwnedFd>> {
        if ino == INodeNo::ROOT {
            return Ok(self.root.clone());
        }
        self.known.lock().get(&ino.0).map(|node| node.fd.clone()).ok_or(Errno::STALE)
    }

    /// Finds a name and counts that the kernel knows it.
    pub(super) fn look_up(&self, parent: &OwnedFd, name: &[u8]) -> Result<Stat> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, name, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        let mut known = self.known.lock();
        let new = || Node { fd: Arc::new(fd), lookups: 0 };
        known.entry(stat.st_ino).or_insert_with(new).lookups += 1;
        Ok(stat)
    }

    pub(super) fn forget(&self, ino: INodeNo, lookups: u64) {
        let mut known = self.known.lock();
        let Some(node) = known.get_mut(&ino.0) else { return };
        node.lookups = node.lookups.saturating_sub(lookups);
        if node.lookups == 0 {
            let gone = known.remove(&ino.0);
            // Its close may free a file: not under the lock.
            drop(known);
            drop(gone);
        }
    }
}

/// Things open, by the number the kernel was given.
pub(super) struct Handles<T> {
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<T>>>,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self { next: AtomicU64::new(1), open: Mutex::default() }
    }
}

impl<T> Handles<T> {
    pub(super) fn add(&self, one: T) -> u64 {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.lock().insert(handle, Arc::new(one));
        handle
    }

    pub(super) fn get(&self, handle: u64) -> Result<Arc<T>> {
        self.open.lock().get(&handle).cloned().ok_or(Errno::BADF)
    }

    pub(super) fn remove(&self, handle: u64) {
        let gone = self.open.lock().remove(&handle);
        drop(gone);
    }
}

pub(super) fn attr_of(stat: &Stat) -> FileAttr {
    let time = |seconds: i64, nanos| {
        let since = Duration::new(u64::try_from(seconds).unwrap_or_default(), nanos);
        UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH)
    };
    FileAttr {
        ino: INodeNo(stat.st_ino),
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: time(stat.st_atime, stat.st_atime_nsec as u32),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec as u32),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec as u32),
        crtime: UNIX_EPOCH,
        kind: kind_of(rustix::fs::FileType::from_raw_mode(stat.st_mode)),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: stat.st_rdev as u32,
        blksize: stat.st_blksize as u32,
        flags: 0,
    }
}

/// What stands for a name that is not there.
pub(super) const fn nothing() -> FileAttr {
    let epoch: SystemTime = UNIX_EPOCH;
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: epoch,
        mtime: epoch,
        ctime: epoch,
        crtime: epoch,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

pub(super) fn kind_of(kind: rustix::fs::FileType) -> FileType {
    match kind {
        rustix::fs::FileType::Directory => FileType::Directory,
        rustix::fs::FileType::Symlink => FileType::Symlink,
        rustix::fs::FileType::Fifo => FileType::NamedPipe,
        rustix::fs::FileType::Socket => FileType::Socket,
        rustix::fs::FileType::CharacterDevice => FileType::CharDevice,
        rustix::fs::FileType::BlockDevice => FileType::BlockDevice,
        _ => FileType::RegularFile,
    }
}
