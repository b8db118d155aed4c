//! What can go wrong in a file system call, and the one place where it becomes an errno.

use us_core::ids::Ino;

/// Why an operation of [`crate::fs::Fs`] failed. [`FsError::errno`] is the number a program sees.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FsError {
    /// No such name, or the inode is gone.
    #[error("no such file or directory")]
    NotFound,
    /// The inode number is not (or no longer) known.
    #[error("stale file handle: inode {0} is gone")]
    Stale(Ino),
    /// The name is taken.
    #[error("the name exists already")]
    Exists,
    /// A directory was needed.
    #[error("not a directory")]
    NotADirectory,
    /// A directory was given where a file is needed.
    #[error("is a directory")]
    IsADirectory,
    /// The directory still has entries.
    #[error("the directory is not empty")]
    NotEmpty,
    /// A name of more than 255 bytes, or a target of more than 4,095.
    #[error("the name is too long")]
    NameTooLong,
    /// The operation makes no sense for these arguments.
    #[error("invalid argument: {0}")]
    Invalid(&'static str),
    /// The caller may not do this.
    #[error("operation not permitted")]
    NotPermitted,
    /// The volume is mounted read-only.
    #[error("the volume is mounted read-only")]
    ReadOnly,
    /// The file would be larger than the file system allows.
    #[error("the file would be too large")]
    TooLarge,
    /// A directory would come to lie too deep.
    #[error("too many directories lie above the new place")]
    TooDeep,
    /// The inode has as many names as it can have.
    #[error("too many links")]
    TooManyLinks,
    /// No such extended attribute.
    #[error("no such extended attribute")]
    NoXattr,
    /// The caller's buffer is too small for the value.
    #[error("the buffer is too small")]
    BufferTooSmall,
    /// The value is larger than an extended attribute can be.
    #[error("the extended attribute is too large")]
    XattrTooLarge,
    /// The handle is not open, or not open for this.
    #[error("bad file handle")]
    BadHandle,
    /// Nothing to seek to at or after the offset.
    #[error("no data or hole after the offset")]
    NoSuchOffset,
    /// Another owner holds a lock that is in the way.
    #[error("another process holds a lock that is in the way")]
    Locked,
    /// A wait for a lock ended without it: waits are bounded.
    #[error("gave up waiting for the lock")]
    LockWaitEnded,
    /// A file, and a mount, can have so many locks only.
    #[error("the file, or this mount, has too many locks")]
    TooManyLocks,
    /// The operation is not supported.
    #[error("operation not supported")]
    NotSupported,
    /// The swarm has no space left.
    #[error("no space left: {0}")]
    NoSpace(String),
    /// A deadline passed: the directory, another mount, or the swarm did not answer in time.
    #[error("gave up waiting: {0}")]
    TimedOut(String),
    /// Bytes that cannot be read or written now.
    #[error("input/output error: {0}")]
    Io(String),
    /// The directory ended the session: what was not durable lies in the rescue file.
    #[error("the session with the directory ended: {0}")]
    SessionEnded(String),
    /// The mount is shutting down.
    #[error("the mount is shutting down")]
    ShuttingDown,
}

/// An error and its causes in one line.
pub(crate) fn whole(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

impl FsError {
    /// The errno of this error (positive, as in `errno.h`).
    pub const fn errno(&self) -> i32 {
        match self {
            Self::NotFound => libc::ENOENT,
            Self::Stale(_) => libc::ESTALE,
            Self::Exists => libc::EEXIST,
            Self::TooDeep => libc::ELOOP,
            Self::NotADirectory => libc::ENOTDIR,
            Self::IsADirectory => libc::EISDIR,
            Self::NotEmpty => libc::ENOTEMPTY,
            Self::NameTooLong => libc::ENAMETOOLONG,
            Self::Invalid(_) => libc::EINVAL,
            Self::NotPermitted => libc::EPERM,
            Self::ReadOnly => libc::EROFS,
            Self::TooLarge => libc::EFBIG,
            Self::TooManyLinks => libc::EMLINK,
            Self::NoXattr => libc::ENODATA,
            Self::BufferTooSmall => libc::ERANGE,
            Self::XattrTooLarge => libc::E2BIG,
            Self::BadHandle => libc::EBADF,
            Self::NoSuchOffset => libc::ENXIO,
            Self::Locked => libc::EAGAIN,
            Self::LockWaitEnded => libc::EINTR,
            Self::TooManyLocks => libc::ENOLCK,
            Self::NotSupported => libc::EOPNOTSUPP,
            Self::NoSpace(_) => libc::ENOSPC,
            Self::TimedOut(_) => libc::ETIMEDOUT,
            Self::Io(_) | Self::SessionEnded(_) => libc::EIO,
            Self::ShuttingDown => libc::ENOTCONN,
        }
    }
}
