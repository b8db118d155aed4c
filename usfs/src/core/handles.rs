//! Open files and directories.

use us_core::disk::{ReadAhead, ReadAheadLimits};
use us_core::ids::Ino;
use us_proto::v1;
use us_proto::v1::mutation::Op;

use super::node::Level;
use super::{Core, Now, Stop};
use crate::attributes::FileKind;
use crate::fs::{Caller, Entry, FsError, Handle, OpenFlags, Opened};

/// One open file or directory.
#[derive(Debug)]
pub struct OpenFile {
    /// What is open.
    pub ino: Ino,
    /// How.
    pub flags: OpenFlags,
    /// Watches the reads for a sequence.
    pub read_ahead: ReadAhead,
    /// Errors of writing up to here were reported, or happened before the file was opened.
    pub errors_seen: u64,
}

impl Core {
    /// The open file behind a handle.
    pub fn open_file(&self, handle: Handle) -> Result<&OpenFile, FsError> {
        self.handles.get(&handle.0).ok_or(FsError::BadHandle)
    }

    /// The same, to change its reading state.
    pub fn open_file_mut(&mut self, handle: Handle) -> Result<&mut OpenFile, FsError> {
        self.handles.get_mut(&handle.0).ok_or(FsError::BadHandle)
    }

    /// Opens a regular file.
    pub fn open(&mut self, now: Now, ino: Ino, flags: OpenFlags) -> Result<Opened, Stop> {
        if flags.write || flags.truncate {
            self.check_change(now)?;
        }
        self.check_session(now)?;
        let level = if flags.truncate { Level::Exclusive } else { Level::Shared };
        let node = self.need(ino, level)?;
        match node.attributes.map(|attributes| attributes.kind) {
            Some(FileKind::Directory) if flags.write => return Err(FsError::IsADirectory.into()),
            Some(FileKind::Regular | FileKind::Directory) => {}
            Some(_) | None => return Err(FsError::NotSupported.into()),
        }
        if flags.truncate {
            self.truncate(now, ino, 0)?;
        }
        Ok(self.add_handle(ino, flags))
    }

    /// Opens a directory.
    pub fn open_dir(&mut self, now: Now, ino: Ino) -> Result<Opened, Stop> {
        self.check_session(now)?;
        self.need_dir(ino, Level::Shared)?;
        Ok(self.add_handle(ino, OpenFlags { read: true, ..OpenFlags::default() }))
    }

    /// Makes and opens a file, or opens it where it exists.
    pub fn create(
        &mut self,
        now: Now,
        caller: Caller,
        dir: Ino,
        name: &[u8],
        permissions: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened), Stop> {
        let new =
            super::names::NewNode { kind: FileKind::Regular, permissions, rdev: 0, target: &[] };
        let ino = match self.make(now, caller, dir, name, new) {
            Err(Stop::Fail(FsError::Exists)) if !flags.exclusive => {
                let dentry = self.need_name(dir, name, Level::Shared)?;
                let super::Dentry::Present { ino, .. } = dentry else {
                    return Err(FsError::NotFound.into());
                };
                ino
            }
            made => made?,
        };
        let opened = self.open(now, ino, flags)?;
        let entry = self.entry(now, ino, Some(dir)).ok_or(FsError::Stale(ino))?;
        self.count_lookup(ino, dir);
        Ok((entry, opened))
    }

    fn add_handle(&mut self, ino: Ino, flags: OpenFlags) -> Opened {
        self.handles_made += 1;
        let file = OpenFile {
            ino,
            flags,
            read_ahead: ReadAhead::new(ReadAheadLimits::default()),
            errors_seen: self.write_errors,
        };
        self.handles.insert(self.handles_made, file);
        let keep_cache = self.nodes.get_mut(&ino).is_some_and(|node| {
            node.handles += 1;
            let kept = node.kernel_cache_valid;
            node.kernel_cache_valid = node.lease.usable() > Level::None;
            kept
        });
        Opened { handle: Handle(self.handles_made), keep_cache }
    }

    /// Closes a handle.
    pub fn close(&mut self, handle: Handle) -> Option<Ino> {
        let file = self.handles.remove(&handle.0)?;
        let node = self.nodes.get_mut(&file.ino)?;
        node.handles = node.handles.saturating_sub(1);
        self.release_if_unused(file.ino);
        Some(file.ino)
    }

    /// Whether anybody has the file open.
    pub fn has_open(&self, ino: Ino) -> bool {
        self.nodes.get(&ino).is_some_and(|node| node.handles > 0)
    }

    /// The last handle was closed, or the kernel forgot the inode: when both are so, an inode
    /// without a name is let go of. The directory hears it if it was told that the inode is open.
    pub(super) fn release_if_unused(&mut self, ino: Ino) {
        let Some(node) = self.nodes.get_mut(&ino).filter(|node| !node.is_referred()) else {
            return;
        };
        let unlinked = node.attributes.is_some_and(|attributes| attributes.nlink == 0);
        if std::mem::take(&mut node.told_open) || unlinked {
            self.append(Op::Release(v1::Release { ino: ino.0 }), &[]);
        }
        self.drop_if_gone(ino);
    }

    /// An error of writing that this handle has not reported yet.
    pub fn take_write_error(&mut self, handle: Handle) -> Option<FsError> {
        let file = self.handles.get_mut(&handle.0)?;
        let error = self.nodes.get(&file.ino)?.write_error.as_ref()?;
        if error.sequence <= file.errors_seen {
            return None;
        }
        file.errors_seen = error.sequence;
        Some(error.error.clone())
    }

    /// Forgets a removed inode and what it holds once nobody can reach it: no handle is open, and
    /// the kernel has forgotten it. Until then it can be changed and opened anew (a working
    /// directory that was removed, a descriptor opened with `O_PATH`).
    pub(super) fn drop_if_gone(&mut self, ino: Ino) {
        let Some(node) = self.nodes.get_mut(&ino).filter(|node| !node.is_referred()) else {
            return;
        };
        if node.attributes.is_none_or(|attributes| attributes.nlink > 0) {
            if node.lease.level == Level::None && node.data.is_none() {
                self.nodes.remove(&ino);
            }
            return;
        }
        self.discard_data(ino);
        if let Some(node) = self.nodes.remove(&ino) {
            self.note_let_go(ino, node.lease);
        }
    }
}
