//! Reading and changing attributes.

use std::time::Duration;

use bytes::Bytes;
use us_core::ids::Ino;
use us_proto::v1;
use us_proto::v1::mutation::Op;

use super::node::{Level, Node};
use super::{Core, Now, Stall, Stop, Want, change_time};
use crate::attributes::{
    Attributes, FileKind, FileTime, MODE_GROUP_EXECUTE, MODE_PERMISSIONS, MODE_SGID, MODE_SUID,
    SetAttributes, SetTime,
};
use crate::fs::{Entry, FILE_BYTES_MAX, FsError, Handle};

/// `relatime`: an access time older than this is renewed by a read.
const RELATIME_AGE: Duration = Duration::from_secs(24 * 3600);

impl Node {
    /// Attributes as `stat` shows them: with the bytes that are not committed yet.
    pub fn shown_attributes(&self) -> Option<Attributes> {
        let mut attributes = self.attributes?;
        attributes.allocated_bytes = self.allocated_bytes();
        Some(attributes)
    }
}

impl Core {
    /// Attributes of an inode.
    pub fn getattr(&mut self, now: Now, ino: Ino) -> Result<Entry, Stop> {
        self.check_session(now)?;
        if self.need(ino, Level::Shared)?.allocated_guessed {
            // Asked behind the log, the directory counts what is left.
            return Err(Stop::Stall(Stall::Fetch(Want::Inode { ino, level: Level::Shared })));
        }
        self.entry(now, ino, None).ok_or(FsError::Stale(ino).into())
    }

    /// The target of a symbolic link.
    pub fn readlink(&mut self, now: Now, ino: Ino) -> Result<Bytes, Stop> {
        self.check_session(now)?;
        let node = self.need(ino, Level::Shared)?;
        node.target.clone().ok_or(FsError::Invalid("not a symbolic link").into())
    }

    /// Changes attributes.
    pub fn setattr(
        &mut self,
        now: Now,
        ino: Ino,
        handle: Option<Handle>,
        change: SetAttributes,
    ) -> Result<Entry, Stop> {
        self.check_change(now)?;
        let kind = self.need(ino, Level::Exclusive)?.attributes.map(|attributes| attributes.kind);
        if let Some(size) = change.size {
            match kind {
                Some(FileKind::Regular) => {}
                Some(FileKind::Directory) => return Err(FsError::IsADirectory.into()),
                Some(_) | None => return Err(FsError::Invalid("not a regular file").into()),
            }
            if size > FILE_BYTES_MAX {
                return Err(FsError::TooLarge.into());
            }
            if let Some(handle) = handle
                && !self.open_file(handle)?.flags.write
            {
                return Err(FsError::BadHandle.into());
            }
        }
        if let Some(mode) = change.mode {
            self.chmod_acl(now, ino, mode)?;
        }
        if let Some(size) = change.size {
            self.truncate(now, ino, size)?;
            self.drop_suid(ino, change.kill_suid);
        }
        self.set_attributes(now, ino, change);
        self.entry(now, ino, None).ok_or(FsError::Stale(ino).into())
    }

    /// Everything but the size.
    fn set_attributes(&mut self, now: Now, ino: Ino, change: SetAttributes) {
        let mut new = *self.attributes_mut(ino);
        let time = change_time(now, &new);
        let mut message = v1::SetAttributes { ino: ino.0, ..v1::SetAttributes::default() };
        if change.uid.is_some() || change.gid.is_some() || change.kill_suid {
            // The kernel leaves it to us to drop the bits that an owner change must drop.
            new.permissions = without_suid(&new);
        }
        if let Some(mode) = change.mode {
            new.permissions = mode & MODE_PERMISSIONS;
        }
        if new.permissions != self.permissions(ino) {
            message.mode = Some(new.permissions);
        }
        if let Some(uid) = change.uid {
            (new.uid, message.uid) = (uid, Some(uid));
        }
        if let Some(gid) = change.gid {
            (new.gid, message.gid) = (gid, Some(gid));
        }
        let at = |set: SetTime| match set {
            SetTime::Now => now.wall,
            SetTime::At(time) => time,
        };
        if let Some(atime) = change.atime.map(at) {
            (new.atime, message.atime) = (atime, Some(atime.into()));
        }
        if let Some(mtime) = change.mtime.map(at) {
            (new.mtime, message.mtime) = (mtime, Some(mtime.into()));
        }
        let nothing = SetAttributes { size: change.size, ..SetAttributes::default() };
        if change == nothing {
            return;
        }
        new.ctime = time;
        message.ctime = Some(time.into());
        *self.attributes_mut(ino) = new;
        self.append(Op::SetAttributes(message), &[ino]);
    }

    /// Sets the permission bits as a change of their own.
    pub(super) fn set_mode(&mut self, now: Now, ino: Ino, permissions: u32) {
        let change = SetAttributes { mode: Some(permissions), ..SetAttributes::default() };
        self.set_attributes(now, ino, change);
    }

    /// Permission bits of an inode whose lease is held.
    pub(super) fn permissions(&self, ino: Ino) -> u32 {
        let attributes = self.nodes.get(&ino).and_then(|node| node.attributes);
        attributes.map_or(0, |attributes| attributes.permissions)
    }

    /// The data of `ino` changed: set-user-id and set-group-id go, where the kernel asks for it.
    pub(super) fn drop_suid(&mut self, ino: Ino, kill_suid: bool) {
        let attributes = self.attributes_mut(ino);
        let cleared = without_suid(attributes);
        if kill_suid && cleared != attributes.permissions {
            let time = attributes.ctime;
            attributes.permissions = cleared;
            let message = v1::SetAttributes {
                ino: ino.0,
                mode: Some(cleared),
                ctime: Some(time.into()),
                ..v1::SetAttributes::default()
            };
            self.append(Op::SetAttributes(message), &[ino]);
        }
    }

    /// A file was read: `relatime`, and only where that costs no lease.
    pub(super) fn touch_atime(&mut self, now: Now, ino: Ino) {
        let full = self.log.is_full() || self.config.read_only;
        let Some(node) = self.nodes.get_mut(&ino) else { return };
        let exclusive = node.lease.usable() == Level::Exclusive;
        let Some(attributes) = node.attributes.as_mut().filter(|_| exclusive && !full) else {
            return;
        };
        if !atime_is_old(now, attributes) {
            return;
        }
        attributes.atime = now.wall;
        let message = v1::SetAttributes {
            ino: ino.0,
            atime: Some(now.wall.into()),
            ..v1::SetAttributes::default()
        };
        self.append(Op::SetAttributes(message), &[ino]);
    }
}

fn atime_is_old(now: Now, attributes: &Attributes) -> bool {
    let day_later = FileTime {
        seconds: attributes.atime.seconds.saturating_add(RELATIME_AGE.as_secs() as i64),
        ..attributes.atime
    };
    attributes.atime <= attributes.mtime.max(attributes.ctime) || now.wall >= day_later
}

/// The permissions without set-user-id, and without set-group-id where it is not a lock mark.
fn without_suid(attributes: &Attributes) -> u32 {
    if attributes.kind == FileKind::Directory {
        return attributes.permissions;
    }
    let mut permissions = attributes.permissions & !MODE_SUID;
    if permissions & MODE_GROUP_EXECUTE != 0 {
        permissions &= !MODE_SGID;
    }
    permissions
}
