//! Operations on names, attributes and listings. Each only waits for what `core` asks for.

use std::time::Duration;

use bytes::Bytes;
use us_core::ids::Ino;
use us_proto::v1;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::session_up::Event as Up;

use super::{
    Caller, Entry, Fs, FsError, Handle, Listed, Lookup, OpenFlags, Opened, RenameMode,
    SetAttributes, Statistics, XattrMode,
};
use crate::attributes::{FileKind, MODE_PERMISSIONS};
use crate::core::{NewNode, Stall, Stop};

/// How long the directory may take for an answer that is not cached.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Names and attributes.
impl Fs {
    /// Looks a name up, and counts one lookup of the inode (the kernel gives it back by
    /// [`Fs::forget`]). A name that is not there is an answer too, which the kernel may cache.
    pub async fn lookup(
        &self,
        _caller: Caller,
        parent: Ino,
        name: &[u8],
    ) -> Result<Lookup, FsError> {
        self.run(|state, now| state.core.lookup(now, parent, name)).await
    }

    /// The kernel forgets `lookups` of the lookups it counted.
    pub fn forget(&self, ino: Ino, lookups: u64) {
        let logged = {
            let mut state = self.shared.lock();
            let before = state.core.log_end();
            state.core.forget(ino, lookups);
            state.core.log_end() != before
        };
        if logged {
            self.shared.outgoing.notify_one();
        }
    }

    /// Attributes.
    pub async fn getattr(&self, ino: Ino) -> Result<Entry, FsError> {
        self.run(|state, now| state.core.getattr(now, ino)).await
    }

    /// Changes attributes. `handle`: the open file through which the change is made, if any.
    pub async fn setattr(
        &self,
        _caller: Caller,
        ino: Ino,
        handle: Option<Handle>,
        change: SetAttributes,
    ) -> Result<Entry, FsError> {
        self.run(|state, now| state.core.setattr(now, ino, handle, change)).await
    }

    /// The target of a symbolic link.
    pub async fn readlink(&self, ino: Ino) -> Result<Bytes, FsError> {
        self.run(|state, now| state.core.readlink(now, ino)).await
    }

    /// Makes a file, pipe, socket or device; `mode` is `st_mode` as asked for. Counts a lookup, like
    /// all operations that answer with a new name's entry.
    pub async fn mknod(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        rdev: u32,
    ) -> Result<Entry, FsError> {
        let kind = match FileKind::from_mode(mode) {
            Some(FileKind::Directory | FileKind::Symlink) => {
                return Err(FsError::Invalid("mknod makes neither directories nor links"));
            }
            Some(kind) => kind,
            None if mode & crate::attributes::MODE_KIND == 0 => FileKind::Regular,
            None => return Err(FsError::Invalid("no such kind of file")),
        };
        let new = NewNode { kind, permissions: mode & MODE_PERMISSIONS, rdev, target: &[] };
        self.run(|state, now| state.core.make_entry(now, caller, parent, name, new)).await
    }

    /// Makes a directory.
    pub async fn mkdir(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
    ) -> Result<Entry, FsError> {
        let permissions = mode & MODE_PERMISSIONS;
        let new = NewNode { kind: FileKind::Directory, permissions, rdev: 0, target: &[] };
        self.run(|state, now| state.core.make_entry(now, caller, parent, name, new)).await
    }

    /// Makes a symbolic link.
    pub async fn symlink(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        target: &[u8],
    ) -> Result<Entry, FsError> {
        let new = NewNode { kind: FileKind::Symlink, permissions: 0o777, rdev: 0, target };
        self.run(|state, now| state.core.make_entry(now, caller, parent, name, new)).await
    }

    /// Makes and opens a regular file; opens it where it exists, unless `flags.exclusive`.
    pub async fn create(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened), FsError> {
        let permissions = mode & MODE_PERMISSIONS;
        let create = move |state: &mut super::shared::State, now| {
            state.core.create(now, caller, parent, name, permissions, flags)
        };
        self.run(create).await
    }

    /// Removes a name that is not a directory.
    pub async fn unlink(&self, caller: Caller, parent: Ino, name: &[u8]) -> Result<(), FsError> {
        self.run(|state, now| state.core.unlink(now, caller, parent, name, false).map(|_| ())).await
    }

    /// Removes an empty directory.
    pub async fn rmdir(&self, caller: Caller, parent: Ino, name: &[u8]) -> Result<(), FsError> {
        self.run(|state, now| state.core.unlink(now, caller, parent, name, true).map(|_| ())).await
    }

    /// Moves a name.
    pub async fn rename(
        &self,
        caller: Caller,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        mode: RenameMode,
    ) -> Result<(), FsError> {
        let mut flushed = Vec::new();
        self.run(|state, now| {
            let renamed = state.core.rename(now, caller, from, to, mode, &flushed);
            // It is called again when that is done.
            if let Err(Stop::Stall(Stall::Flush(ino))) = &renamed {
                flushed.push(*ino);
            }
            renamed.map(|_| ())
        })
        .await
    }

    /// Gives an inode another name.
    pub async fn link(
        &self,
        _caller: Caller,
        ino: Ino,
        parent: Ino,
        name: &[u8],
    ) -> Result<Entry, FsError> {
        self.run(|state, now| state.core.link(now, ino, parent, name)).await
    }
}

/// Directories.
impl Fs {
    /// Opens a directory for listing.
    pub async fn opendir(&self, _caller: Caller, ino: Ino) -> Result<Opened, FsError> {
        self.run(|state, now| state.core.open_dir(now, ino)).await
    }

    /// Lists names after `cookie` (0: from the start, "." and ".." first), in the directory's stable
    /// order, until the end or until `sink` answers false (it did not take the name).
    pub async fn readdir(
        &self,
        handle: Handle,
        cookie: u64,
        sink: &mut (dyn for<'a> FnMut(Listed<'a>) -> bool + Send),
    ) -> Result<(), FsError> {
        self.list(handle, cookie, false, sink).await
    }

    /// Like [`Fs::readdir`], with attributes; a name that `sink` took with an entry counts one
    /// lookup. May end before `sink` is full; the listing is over when nothing is told.
    pub async fn readdirplus(
        &self,
        handle: Handle,
        cookie: u64,
        sink: &mut (dyn for<'a> FnMut(Listed<'a>) -> bool + Send),
    ) -> Result<(), FsError> {
        self.list(handle, cookie, true, sink).await
    }

    async fn list(
        &self,
        handle: Handle,
        cookie: u64,
        plus: bool,
        sink: &mut (dyn for<'a> FnMut(Listed<'a>) -> bool + Send),
    ) -> Result<(), FsError> {
        let mut at = cookie;
        self.run(|state, now| {
            let ino = state.core.open_file(handle)?.ino;
            let (reached, result) = state.core.list(now, ino, at, plus, &mut *sink);
            // What was told is enough for an answer: the next call goes on from there.
            let told = reached > cookie;
            at = reached;
            match result {
                Err(Stop::Stall(_)) if told => Ok(()),
                other => other,
            }
        })
        .await
    }

    /// A directory handle was closed.
    pub fn releasedir(&self, handle: Handle) {
        self.release(handle);
    }

    /// Returns when every change of names before now is durable.
    pub async fn fsyncdir(&self, _handle: Handle) -> Result<(), FsError> {
        self.wait_durable().await
    }
}

/// Extended attributes.
impl Fs {
    /// An extended attribute's value.
    pub async fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Bytes, FsError> {
        self.run(|state, now| state.core.get_xattr(now, ino, name)).await
    }

    /// Sets an extended attribute.
    pub async fn setxattr(
        &self,
        _caller: Caller,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
    ) -> Result<(), FsError> {
        self.run(|state, now| state.core.set_xattr(now, ino, name, value, mode)).await
    }

    /// The names of the extended attributes, each ended by a zero byte.
    pub async fn listxattr(&self, ino: Ino) -> Result<Bytes, FsError> {
        self.run(|state, now| state.core.list_xattrs(now, ino)).await
    }

    /// Removes an extended attribute.
    pub async fn removexattr(&self, _caller: Caller, ino: Ino, name: &[u8]) -> Result<(), FsError> {
        self.run(|state, now| state.core.remove_xattr(now, ino, name)).await
    }
}

/// What the directory is asked each time.
impl Fs {
    /// Space of the volume.
    pub async fn statfs(&self) -> Result<Statistics, FsError> {
        let ask = |request| Up::Statfs(v1::StatfsRequest { request });
        match self.shared.ask(ask, ANSWER_TIMEOUT).await? {
            Down::Statfs(reply) => {
                let now = self.shared.now();
                self.shared.lock().core.note_free_space(now, reply.available_bytes);
                Ok(Statistics {
                    total_bytes: reply.total_bytes,
                    free_bytes: reply.free_bytes,
                    available_bytes: reply.available_bytes,
                    inodes: reply.inodes,
                })
            }
            _ => Err(FsError::Io("the directory answered something else".to_owned())),
        }
    }
}
