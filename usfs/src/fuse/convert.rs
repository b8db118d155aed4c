//! Between the kernel's numbers and the file system's words: attributes, times, flags.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo, RenameFlags, TimeOrNow};

use crate::attributes::{Attributes, FileKind, FileTime, SetTime};
use crate::fs::{
    AllocateMode, Caller, FsError, LockType, OpenFlags, RenameMode, SeekFor, WriteFlags, XattrMode,
};

/// What `st_blksize` says; also the unit of `statfs`.
pub(super) const BLOCK_BYTES: u32 = 4096;

pub(super) fn caller(request: &fuser::Request) -> Caller {
    caller_with(request, 0)
}

/// For requests that make a file: the file system applies the umask, or the default ACL instead.
pub(super) fn caller_with(request: &fuser::Request, umask: u32) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid(), umask }
}

pub(super) fn owned(name: &OsStr) -> Box<[u8]> {
    name.as_bytes().into()
}

pub(super) fn errno(error: &FsError) -> Errno {
    Errno::from_i32(error.errno())
}

pub(super) const fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

pub(super) fn file_attr(attributes: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(attributes.ino.0),
        size: attributes.size,
        blocks: attributes.allocated_bytes.div_ceil(512),
        atime: system_time(attributes.atime),
        mtime: system_time(attributes.mtime),
        ctime: system_time(attributes.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(attributes.kind),
        perm: (attributes.permissions & 0o7777) as u16,
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: attributes.rdev,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

/// The attributes that stand for "nothing": of a name that is not there, or of "." and "..", whose
/// attributes the kernel does not look at.
pub(super) const fn blank_attr(ino: u64, kind: FileType) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

fn system_time(time: FileTime) -> SystemTime {
    let nanos = Duration::from_nanos(u64::from(time.nanos));
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let whole = match time.seconds {
        0.. => UNIX_EPOCH.checked_add(seconds),
        _ => UNIX_EPOCH.checked_sub(seconds),
    };
    whole.and_then(|whole| whole.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

/// A time the kernel sent. Before 1970, fuser 0.18 subtracts the nanoseconds that it should add;
/// this undoes it.
pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    let TimeOrNow::SpecificTime(time) = time else { return SetTime::Now };
    SetTime::At(match time.duration_since(UNIX_EPOCH) {
        Ok(after) => FileTime { seconds: after.as_secs() as i64, nanos: after.subsec_nanos() },
        Err(before) => {
            let before = before.duration();
            let seconds = (before.as_secs() as i64).wrapping_neg();
            FileTime { seconds, nanos: before.subsec_nanos() }
        }
    })
}

pub(super) fn open_flags(flags: i32) -> OpenFlags {
    let mode = flags & libc::O_ACCMODE;
    OpenFlags {
        read: mode != libc::O_WRONLY,
        write: mode != libc::O_RDONLY,
        append: flags & libc::O_APPEND != 0,
        truncate: flags & libc::O_TRUNC != 0,
        sync: flags & (libc::O_SYNC | libc::O_DSYNC) != 0,
        exclusive: flags & libc::O_EXCL != 0,
        no_atime: flags & libc::O_NOATIME != 0,
    }
}

/// How a write is done: `flags` are those of its open file now, with what the call itself asked for.
/// Of a write-back from a mapping (FUSE_WRITE_CACHE) they say nothing.
pub(super) fn write_flags(write: fuser::WriteFlags, flags: i32) -> WriteFlags {
    let mapped = write.contains(fuser::WriteFlags::FUSE_WRITE_CACHE);
    WriteFlags {
        append: !mapped && flags & libc::O_APPEND != 0,
        sync: !mapped && flags & (libc::O_SYNC | libc::O_DSYNC) != 0,
        kill_suid: write.contains(fuser::WriteFlags::FUSE_WRITE_KILL_SUIDGID),
    }
}

/// `RENAME_WHITEOUT` is EINVAL: ENOSYS would end NOREPLACE and EXCHANGE too.
pub(super) fn rename_mode(flags: RenameFlags) -> Result<RenameMode, Errno> {
    if flags.is_empty() {
        Ok(RenameMode::Replace)
    } else if flags == RenameFlags::RENAME_NOREPLACE {
        Ok(RenameMode::NoReplace)
    } else if flags == RenameFlags::RENAME_EXCHANGE {
        Ok(RenameMode::Exchange)
    } else {
        Err(Errno::EINVAL)
    }
}

pub(super) fn xattr_mode(flags: i32) -> Result<XattrMode, Errno> {
    match flags {
        0 => Ok(XattrMode::Set),
        libc::XATTR_CREATE => Ok(XattrMode::Create),
        libc::XATTR_REPLACE => Ok(XattrMode::Replace),
        _ => Err(Errno::EINVAL),
    }
}

/// COLLAPSE and INSERT_RANGE do not reach a FUSE file system; whatever does and is not here is not
/// supported.
pub(super) fn allocate_mode(mode: i32) -> Result<AllocateMode, Errno> {
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE;
    const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
    let keep_size = mode & KEEP != 0;
    match mode & !KEEP {
        0 => Ok(AllocateMode::Allocate { keep_size }),
        PUNCH if keep_size => Ok(AllocateMode::PunchHole),
        ZERO => Ok(AllocateMode::ZeroRange { keep_size }),
        _ => Err(Errno::EOPNOTSUPP),
    }
}

pub(super) fn seek_for(whence: i32) -> Result<SeekFor, Errno> {
    match whence {
        libc::SEEK_DATA => Ok(SeekFor::Data),
        libc::SEEK_HOLE => Ok(SeekFor::Hole),
        _ => Err(Errno::EINVAL),
    }
}

pub(super) fn lock_type(kind: i32) -> Result<LockType, Errno> {
    match kind {
        libc::F_RDLCK => Ok(LockType::Read),
        libc::F_WRLCK => Ok(LockType::Write),
        libc::F_UNLCK => Ok(LockType::Unlock),
        _ => Err(Errno::EINVAL),
    }
}

pub(super) const fn lock_number(kind: LockType) -> i32 {
    match kind {
        LockType::Read => libc::F_RDLCK,
        LockType::Write => libc::F_WRLCK,
        LockType::Unlock => libc::F_UNLCK,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How fuser 0.18 makes a `SystemTime` of what the kernel sends.
    fn as_fuser_does(seconds: i64, nanos: u32) -> TimeOrNow {
        TimeOrNow::SpecificTime(match seconds {
            0.. => UNIX_EPOCH + Duration::new(seconds as u64, nanos),
            _ => UNIX_EPOCH - Duration::new(-seconds as u64, nanos),
        })
    }

    #[test]
    fn times_survive_both_ways_also_before_1970() {
        for (seconds, nanos) in [(0, 0), (1_700_000_000, 999_999_999), (-2, 800_000_000), (-1, 1)] {
            let time = FileTime { seconds, nanos };
            assert_eq!(set_time(as_fuser_does(seconds, nanos)), SetTime::At(time));
            let system = system_time(time);
            let signed = match system.duration_since(UNIX_EPOCH) {
                Ok(after) => after.as_nanos() as i128,
                Err(before) => -(before.duration().as_nanos() as i128),
            };
            assert_eq!(signed, i128::from(seconds) * 1_000_000_000 + i128::from(nanos));
        }
        assert_eq!(set_time(TimeOrNow::Now), SetTime::Now);
        system_time(FileTime { seconds: i64::MIN, nanos: 5 });
        system_time(FileTime { seconds: i64::MAX, nanos: 999_999_999 });
    }

    #[test]
    fn flags_of_open() {
        let flags = open_flags(libc::O_WRONLY | libc::O_APPEND | libc::O_DSYNC);
        let wanted = OpenFlags { write: true, append: true, sync: true, ..OpenFlags::default() };
        assert_eq!(flags, wanted);
        assert!(open_flags(libc::O_RDONLY).read && !open_flags(libc::O_RDONLY).write);
        assert!(open_flags(libc::O_RDWR).read && open_flags(libc::O_RDWR).write);
    }

    #[test]
    fn what_is_not_supported_says_so() {
        assert_eq!(rename_mode(RenameFlags::RENAME_WHITEOUT), Err(Errno::EINVAL));
        assert_eq!(rename_mode(RenameFlags::RENAME_EXCHANGE), Ok(RenameMode::Exchange));
        let mode = libc::FALLOC_FL_COLLAPSE_RANGE;
        assert_eq!(allocate_mode(mode), Err(Errno::EOPNOTSUPP));
        assert_eq!(allocate_mode(libc::FALLOC_FL_PUNCH_HOLE), Err(Errno::EOPNOTSUPP));
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        assert_eq!(allocate_mode(mode), Ok(AllocateMode::PunchHole));
        assert_eq!(seek_for(libc::SEEK_SET), Err(Errno::EINVAL));
        assert_eq!(xattr_mode(3), Err(Errno::EINVAL));
    }
}
