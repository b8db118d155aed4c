//! The vocabulary of a file's attributes: kinds, times, attributes, and changes of them.
//!
//! Pure values; they convert from and to the wire's messages and know nothing of FUSE.

use us_core::ids::Ino;
use us_proto::v1;

/// The bits of `st_mode` that say what kind of file an inode is.
pub const MODE_KIND: u32 = 0o170_000;
/// The bits of `st_mode` that are permissions: rwx, set-user-id, set-group-id, sticky.
pub const MODE_PERMISSIONS: u32 = 0o7777;
/// Set-user-id.
pub const MODE_SUID: u32 = 0o4000;
/// Set-group-id.
pub const MODE_SGID: u32 = 0o2000;
/// Group execute: with it, set-group-id means what it says.
pub const MODE_GROUP_EXECUTE: u32 = 0o010;

/// What an inode is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
}

impl FileKind {
    /// The kind in the type bits of `mode`; `None` where they name no kind.
    pub const fn from_mode(mode: u32) -> Option<Self> {
        match mode & MODE_KIND {
            0o100_000 => Some(Self::Regular),
            0o040_000 => Some(Self::Directory),
            0o120_000 => Some(Self::Symlink),
            0o010_000 => Some(Self::Fifo),
            0o140_000 => Some(Self::Socket),
            0o020_000 => Some(Self::CharDevice),
            0o060_000 => Some(Self::BlockDevice),
            _ => None,
        }
    }

    /// The type bits of `st_mode`.
    pub const fn mode_bits(self) -> u32 {
        match self {
            Self::Regular => 0o100_000,
            Self::Directory => 0o040_000,
            Self::Symlink => 0o120_000,
            Self::Fifo => 0o010_000,
            Self::Socket => 0o140_000,
            Self::CharDevice => 0o020_000,
            Self::BlockDevice => 0o060_000,
        }
    }
}

/// A point of wall time with nanoseconds, as files carry it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct FileTime {
    /// Seconds since 1970, negative before.
    pub seconds: i64,
    /// Nanoseconds into the second, below 10^9.
    pub nanos: u32,
}

impl From<v1::Timestamp> for FileTime {
    fn from(time: v1::Timestamp) -> Self {
        Self { seconds: time.seconds, nanos: time.nanos.min(999_999_999) }
    }
}

impl From<FileTime> for v1::Timestamp {
    fn from(time: FileTime) -> Self {
        Self { seconds: time.seconds, nanos: time.nanos }
    }
}

/// What `stat` shows of an inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attributes {
    /// The inode.
    pub ino: Ino,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits ([`MODE_PERMISSIONS`]).
    pub permissions: u32,
    /// Names it has; of a directory two more than the directories in it.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device file.
    pub rdev: u32,
    /// Bytes; of a symbolic link the length of its target.
    pub size: u64,
    /// Bytes that take space: mapped, in flight and dirty.
    pub allocated_bytes: u64,
    /// Last read, as `relatime` keeps it.
    pub atime: FileTime,
    /// Last change of the data.
    pub mtime: FileTime,
    /// Last change of data or attributes; never goes back.
    pub ctime: FileTime,
}

impl Attributes {
    /// `st_mode`: kind and permissions.
    pub const fn mode(&self) -> u32 {
        self.kind.mode_bits() | self.permissions
    }
}

/// A time in a change of attributes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetTime {
    /// The mount's clock, at the moment of the change.
    Now,
    /// This time.
    At(FileTime),
}

/// A change of attributes; what is `None` stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SetAttributes {
    /// New permission bits (other bits are ignored).
    pub mode: Option<u32>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// New size: cut off, or extended by a hole.
    pub size: Option<u64>,
    /// New access time.
    pub atime: Option<SetTime>,
    /// New modification time.
    pub mtime: Option<SetTime>,
    /// The kernel asks to drop set-user-id and set-group-id (`FATTR_KILL_SUIDGID`).
    pub kill_suid: bool,
}
