//! The file system without a mount: every operation a kernel (or a test) can ask for.
//!
//! [`Fs`] is a handle that can be cloned and shared. Each operation locks the pure
//! [`crate::core::Core`], runs to an answer or to a *stall* (something is missing: a lease, a part of
//! a map, memory), releases the lock, waits for what is missing, and tries again, until a deadline.
//! Where nothing is missing the future is ready at its first poll, so an adapter can poll once on
//! its own thread and hand only what waits to the runtime.
//!
//! Who calls: `fuse` (the adapter) and tests. What may fail: see [`FsError`].

mod blocks;
mod compact;
mod files;
mod locks;
mod mount;
mod names;
mod notify;
mod recall;
pub(crate) mod shared;
mod stall;
mod trust;
mod undurable;
mod writeback;

use std::sync::Arc;
use std::time::Duration;

use us_core::ids::Ino;

pub use self::mount::{MountError, MountOptions, SwarmNews};
pub use crate::attributes::{Attributes, FileKind, FileTime, SetAttributes, SetTime};
pub use crate::errno::FsError;
pub use us_core::limits::FILE_BYTES_MAX;
pub use us_core::name::{
    NAME_BYTES_MAX, TARGET_BYTES_MAX, XATTR_VALUE_BYTES_MAX as XATTR_BYTES_MAX,
};

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process, for locks.
    pub pid: u32,
    /// Permission bits a new file does not get, unless its directory has a default ACL. Modes are
    /// passed as the program asked for them (`FUSE_DONT_MASK`).
    pub umask: u32,
}

/// An open file or directory of this mount. Never used twice while the mount lives.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Handle(pub u64);

/// An inode as the kernel may cache it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Its attributes.
    pub attributes: Attributes,
    /// How long name and attributes may be cached: what is left of the lease. The mount tells the
    /// kernel through [`KernelNotifier`] when it must forget sooner.
    pub valid: Duration,
}

/// An answer to `open`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opened {
    /// The handle.
    pub handle: Handle,
    /// The kernel may keep the pages it has of this file (`FOPEN_KEEP_CACHE`), or the listing
    /// (`FOPEN_CACHE_DIR`).
    pub keep_cache: bool,
}

/// How a file is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenFlags {
    /// For reading.
    pub read: bool,
    /// For writing.
    pub write: bool,
    /// Every write goes to the end (`O_APPEND`).
    pub append: bool,
    /// Cut to nothing (`O_TRUNC`), where the kernel left that to us.
    pub truncate: bool,
    /// Every write is durable before it is answered (`O_SYNC`, `O_DSYNC`).
    pub sync: bool,
    /// Only if the name is new (`O_EXCL`, with create).
    pub exclusive: bool,
    /// Reading changes no access time (`O_NOATIME`).
    pub no_atime: bool,
}

/// How one write is done: a program can change what it opened the file with (`fcntl`), and what the
/// kernel writes back of a mapping is never appended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WriteFlags {
    /// To the end, whatever the offset.
    pub append: bool,
    /// Durable before it is answered.
    pub sync: bool,
    /// Drops set-user-id and set-group-id (`FUSE_WRITE_KILL_SUIDGID`).
    pub kill_suid: bool,
}

/// One name of a listing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Listed<'a> {
    /// The inode it names.
    pub ino: Ino,
    /// What that is.
    pub kind: FileKind,
    /// Where the listing goes on after this name.
    pub cookie: u64,
    /// The name.
    pub name: &'a [u8],
    /// In `readdirplus`: the inode as the kernel may cache it. Never for "." and "..".
    pub entry: Option<Entry>,
}

/// What `rename` does when the new name exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RenameMode {
    /// Replaces it.
    Replace,
    /// Fails (`RENAME_NOREPLACE`).
    NoReplace,
    /// Swaps the two (`RENAME_EXCHANGE`).
    Exchange,
}

/// How `setxattr` treats an attribute that is there, or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum XattrMode {
    /// Creates or replaces.
    Set,
    /// Fails where it exists (`XATTR_CREATE`).
    Create,
    /// Fails where it does not exist (`XATTR_REPLACE`).
    Replace,
}

/// What `fallocate` does to a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AllocateMode {
    /// Holes become allocated zeros; the size grows to the end of the range unless `keep_size`.
    Allocate {
        /// The size stays.
        keep_size: bool,
    },
    /// The range becomes a hole; the size stays.
    PunchHole,
    /// The range becomes zeros; the size grows to the end of the range unless `keep_size`.
    ZeroRange {
        /// The size stays.
        keep_size: bool,
    },
}

/// What `lseek` looks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SeekFor {
    /// The next byte that is not in a hole.
    Data,
    /// The next byte of a hole (the end of the file counts as one).
    Hole,
}

/// Kind of a byte-range lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockType {
    /// Shared.
    Read,
    /// Exclusive.
    Write,
    /// None: release.
    Unlock,
}

/// A byte-range lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lock {
    /// The kernel's number for the owner.
    pub owner: u64,
    /// First byte.
    pub start: u64,
    /// Last byte (inclusive; `u64::MAX` or `i64::MAX`: to the end).
    pub end: u64,
    /// Kind.
    pub kind: LockType,
    /// Process of the owner; 0 where it is another mount's.
    pub pid: u32,
}

/// What `statfs` shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Statistics {
    /// Bytes users can store in all.
    pub total_bytes: u64,
    /// Bytes left.
    pub free_bytes: u64,
    /// Bytes left to users, without the reserve.
    pub available_bytes: u64,
    /// Inodes in use.
    pub inodes: u64,
}

/// How the mount tells the kernel that something it caches is no longer true. Called from threads of
/// its own, without any lock: a call may block while the kernel finishes a request.
pub trait KernelNotifier: Send + Sync {
    /// Forget attributes, and the pages of `offset..offset + length` (`length` 0: to the end;
    /// `offset` negative: attributes only).
    fn invalidate_inode(&self, ino: Ino, offset: i64, length: i64);
    /// Forget that `name` in `parent` is, or is not, there.
    fn invalidate_entry(&self, parent: Ino, name: &[u8]);
}

/// The file system of one mounted volume. Cheap to clone.
#[derive(Clone)]
pub struct Fs {
    shared: Arc<shared::Shared>,
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fs").field("volume", &self.shared.volume_name).finish_non_exhaustive()
    }
}

/// An answer to [`Fs::lookup`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// The name is there.
    Found(Entry),
    /// There is no such name; the kernel may remember that for this long.
    Absent(Duration),
}
