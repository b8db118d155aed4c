//! The file system without a mount: every operation a kernel (or a test) can ask for.
//!
//! [`Fs`] is a handle that can be cloned and shared. Each operation locks the pure
//! [`crate::core::Core`], runs to an answer or to a *stall* (something is missing: a lease, a part of
//! a map, memory), releases the lock, waits for what is missing, and tries again, until a deadline.
//! Where nothing is missing the future is ready at its first poll, so an adapter can poll once on
//! its own thread and hand only what waits to the runtime.
//!
//! Who calls: `fuse` (the adapter) and tests. What may fail: see [`FsError`].

use std::time::Duration;

use bytes::Bytes;
use us_core::ids::Ino;

pub use crate::attributes::{Attributes, FileKind, FileTime, SetAttributes, SetTime};
pub use crate::errno::FsError;

/// The longest name, in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// The longest target of a symbolic link, in bytes.
pub const TARGET_BYTES_MAX: usize = 4095;
/// The largest value of an extended attribute, in bytes.
pub const XATTR_BYTES_MAX: usize = 64 << 10;
/// The largest file, in bytes.
pub const FILE_BYTES_MAX: u64 = i64::MAX as u64;

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process, for locks.
    pub pid: u32,
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

/// How the mount tells the kernel that something it caches is no longer true. Called from one thread
/// of its own, without any lock: a call may block while the kernel finishes a request.
pub trait KernelNotifier: Send + Sync {
    /// Forget attributes, and the pages of `offset..offset + length` (`length` 0: to the end;
    /// `offset` negative: attributes only).
    fn invalidate_inode(&self, ino: Ino, offset: i64, length: i64);
    /// Forget that `name` in `parent` is, or is not, there.
    fn invalidate_entry(&self, parent: Ino, name: &[u8]);
}

/// The file system of one mounted volume. Cheap to clone.
#[derive(Clone)]
pub struct Fs {}

/// The operations. Signatures are stable; see the module documentation for how they wait.
impl Fs {
    /// Gives the mount the way to the kernel's caches, once it exists.
    pub fn set_notifier(&self, _notifier: Box<dyn KernelNotifier>) {}

    /// Looks a name up, and counts one lookup of the inode (the kernel gives it back by
    /// [`Fs::forget`]). A name that is not there is an answer too, which the kernel may cache.
    pub async fn lookup(
        &self,
        _caller: Caller,
        _parent: Ino,
        _name: &[u8],
    ) -> Result<Lookup, FsError> {
        Err(FsError::NotSupported)
    }

    /// The kernel forgets `lookups` of the lookups it counted.
    pub fn forget(&self, _ino: Ino, _lookups: u64) {}

    /// Attributes.
    pub async fn getattr(&self, _ino: Ino) -> Result<Entry, FsError> {
        Err(FsError::NotSupported)
    }

    /// Changes attributes. `handle`: the open file through which the change is made, if any.
    pub async fn setattr(
        &self,
        _caller: Caller,
        _ino: Ino,
        _handle: Option<Handle>,
        _change: SetAttributes,
    ) -> Result<Entry, FsError> {
        Err(FsError::NotSupported)
    }

    /// The target of a symbolic link.
    pub async fn readlink(&self, _ino: Ino) -> Result<Bytes, FsError> {
        Err(FsError::NotSupported)
    }

    /// Makes a file, pipe, socket or device; `mode` is `st_mode` with the umask applied. Counts a
    /// lookup, like all operations that answer with a new name's entry.
    pub async fn mknod(
        &self,
        _caller: Caller,
        _parent: Ino,
        _name: &[u8],
        _mode: u32,
        _rdev: u32,
    ) -> Result<Entry, FsError> {
        Err(FsError::NotSupported)
    }

    /// Makes a directory.
    pub async fn mkdir(
        &self,
        _caller: Caller,
        _parent: Ino,
        _name: &[u8],
        _mode: u32,
    ) -> Result<Entry, FsError> {
        Err(FsError::NotSupported)
    }

    /// Makes a symbolic link.
    pub async fn symlink(
        &self,
        _caller: Caller,
        _parent: Ino,
        _name: &[u8],
        _target: &[u8],
    ) -> Result<Entry, FsError> {
        Err(FsError::NotSupported)
    }

    /// Makes and opens a regular file; opens it where it exists, unless `flags.exclusive`.
    pub async fn create(
        &self,
        _caller: Caller,
        _parent: Ino,
        _name: &[u8],
        _mode: u32,
        _flags: OpenFlags,
    ) -> Result<(Entry, Opened), FsError> {
        Err(FsError::NotSupported)
    }

    /// Removes a name that is not a directory.
    pub async fn unlink(&self, _caller: Caller, _parent: Ino, _name: &[u8]) -> Result<(), FsError> {
        Err(FsError::NotSupported)
    }

    /// Removes an empty directory.
    pub async fn rmdir(&self, _caller: Caller, _parent: Ino, _name: &[u8]) -> Result<(), FsError> {
        Err(FsError::NotSupported)
    }

    /// Moves a name.
    pub async fn rename(
        &self,
        _caller: Caller,
        _from: (Ino, &[u8]),
        _to: (Ino, &[u8]),
        _mode: RenameMode,
    ) -> Result<(), FsError> {
        Err(FsError::NotSupported)
    }

    /// Gives an inode another name.
    pub async fn link(
        &self,
        _caller: Caller,
        _ino: Ino,
        _parent: Ino,
        _name: &[u8],
    ) -> Result<Entry, FsError> {
        Err(FsError::NotSupported)
    }

    /// Opens a file.
    pub async fn open(
        &self,
        _caller: Caller,
        _ino: Ino,
        _flags: OpenFlags,
    ) -> Result<Opened, FsError> {
        Err(FsError::NotSupported)
    }

    /// Reads up to `length` bytes; fewer only at the end of the file.
    pub async fn read(
        &self,
        _handle: Handle,
        _offset: u64,
        _length: usize,
    ) -> Result<Bytes, FsError> {
        Err(FsError::NotSupported)
    }

    /// Writes all of `data` if that needs no wait: `None` means call [`Fs::write`]. Copies the bytes
    /// once, into the file's dirty buffer. `kill_suid`: the kernel asks to drop set-user-id and
    /// set-group-id (`FUSE_WRITE_KILL_SUIDGID`).
    pub fn try_write(
        &self,
        _handle: Handle,
        _offset: u64,
        _data: &[u8],
        _kill_suid: bool,
    ) -> Option<Result<usize, FsError>> {
        None
    }

    /// Writes all of `data`.
    pub async fn write(
        &self,
        _handle: Handle,
        _offset: u64,
        _data: Bytes,
        _kill_suid: bool,
    ) -> Result<usize, FsError> {
        Err(FsError::NotSupported)
    }

    /// A descriptor was closed: reports a pending error of writing, and drops the owner's locks.
    pub async fn flush(&self, _handle: Handle, _lock_owner: u64) -> Result<(), FsError> {
        Err(FsError::NotSupported)
    }

    /// The last descriptor of an open file was closed.
    pub fn release(&self, _handle: Handle) {}

    /// Returns when the file's data, and every change of names before now, is durable.
    pub async fn fsync(&self, _handle: Handle, _data_only: bool) -> Result<(), FsError> {
        Err(FsError::NotSupported)
    }

    /// Opens a directory for listing.
    pub async fn opendir(&self, _caller: Caller, _ino: Ino) -> Result<Opened, FsError> {
        Err(FsError::NotSupported)
    }

    /// Lists names after `cookie` (0: from the start, "." and ".." first), in the directory's stable
    /// order, until the end or until `sink` answers false (it did not take the name).
    pub async fn readdir(
        &self,
        _handle: Handle,
        _cookie: u64,
        _sink: &mut (dyn for<'a> FnMut(Listed<'a>) -> bool + Send),
    ) -> Result<(), FsError> {
        Err(FsError::NotSupported)
    }

    /// Like [`Fs::readdir`], with attributes; a name that `sink` took with an entry counts one lookup.
    pub async fn readdirplus(
        &self,
        _handle: Handle,
        _cookie: u64,
        _sink: &mut (dyn for<'a> FnMut(Listed<'a>) -> bool + Send),
    ) -> Result<(), FsError> {
        Err(FsError::NotSupported)
    }

    /// A directory handle was closed.
    pub fn releasedir(&self, _handle: Handle) {}

    /// Returns when every change of names before now is durable.
    pub async fn fsyncdir(&self, _handle: Handle) -> Result<(), FsError> {
        Err(FsError::NotSupported)
    }

    /// Space of the volume.
    pub async fn statfs(&self) -> Result<Statistics, FsError> {
        Err(FsError::NotSupported)
    }

    /// An extended attribute's value.
    pub async fn getxattr(&self, _ino: Ino, _name: &[u8]) -> Result<Bytes, FsError> {
        Err(FsError::NotSupported)
    }

    /// Sets an extended attribute.
    pub async fn setxattr(
        &self,
        _caller: Caller,
        _ino: Ino,
        _name: &[u8],
        _value: &[u8],
        _mode: XattrMode,
    ) -> Result<(), FsError> {
        Err(FsError::NotSupported)
    }

    /// The names of the extended attributes, each ended by a zero byte.
    pub async fn listxattr(&self, _ino: Ino) -> Result<Bytes, FsError> {
        Err(FsError::NotSupported)
    }

    /// Removes an extended attribute.
    pub async fn removexattr(
        &self,
        _caller: Caller,
        _ino: Ino,
        _name: &[u8],
    ) -> Result<(), FsError> {
        Err(FsError::NotSupported)
    }

    /// The lock that is in the way of `lock`, or `None`.
    pub async fn getlk(&self, _ino: Ino, _lock: Lock) -> Result<Option<Lock>, FsError> {
        Err(FsError::NotSupported)
    }

    /// Takes or releases a byte-range lock; `wait`s, but not for ever, for one that is in the way.
    pub async fn setlk(&self, _ino: Ino, _lock: Lock, _wait: bool) -> Result<(), FsError> {
        Err(FsError::NotSupported)
    }

    /// Changes how a range is backed.
    pub async fn fallocate(
        &self,
        _handle: Handle,
        _offset: u64,
        _length: u64,
        _mode: AllocateMode,
    ) -> Result<(), FsError> {
        Err(FsError::NotSupported)
    }

    /// The next data or hole at or after `offset`.
    pub async fn lseek(
        &self,
        _handle: Handle,
        _offset: u64,
        _seek: SeekFor,
    ) -> Result<u64, FsError> {
        Err(FsError::NotSupported)
    }

    /// Copies a range by sharing the blocks under it; answers how many bytes.
    pub async fn copy_file_range(
        &self,
        _from: (Handle, u64),
        _to: (Handle, u64),
        _length: u64,
    ) -> Result<u64, FsError> {
        Err(FsError::NotSupported)
    }

    /// Flushes everything, waits until it is durable, returns the leases and closes the session.
    /// Operations that come later fail.
    pub async fn shutdown(&self) -> Result<(), FsError> {
        Err(FsError::NotSupported)
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
