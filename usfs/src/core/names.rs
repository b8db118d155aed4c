//! Operations on names: lookup, create, link, unlink, rename.
//!
//! Each checks everything first and changes cache and log in one go after it. Times: the new or
//! changed inode and its directories get the same time; the directory service sets the same ones
//! from the mutation.

use std::time::Duration;

use bytes::Bytes;
use us_core::ids::Ino;
use us_core::limits::DEPTH_MAX;
use us_core::name::NameHash;
use us_proto::v1;
use us_proto::v1::mutation::Op;

use super::listing::check_listable;
use super::node::{Dentry, DirNames, Level, Node};
use super::{Core, Now, Stall, Stop, Want, change_time, check_name};
use crate::attributes::{Attributes, FileKind, FileTime, MODE_PERMISSIONS, MODE_SGID};
use crate::data::FileData;
use crate::fs::{Caller, Entry, FsError, Lookup, RenameMode, TARGET_BYTES_MAX};

/// The most names an inode can have.
const LINKS_MAX: u32 = 1 << 30;

/// A new inode, as its maker wants it.
#[derive(Clone, Copy, Debug)]
pub struct NewNode<'a> {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits asked for.
    pub permissions: u32,
    /// Device number.
    pub rdev: u32,
    /// Target, of a symbolic link.
    pub target: &'a [u8],
}

impl Core {
    /// Looks `name` up in `dir`, and counts a lookup of what it names.
    pub fn lookup(&mut self, now: Now, dir: Ino, name: &[u8]) -> Result<Lookup, Stop> {
        self.check_session(now)?;
        if name == b"." {
            // Asked of any inode, when the kernel has its handle and nothing else (open_by_handle_at, NFS).
            let node = self.need(dir, Level::Shared)?;
            if node.attributes.is_none_or(|attributes| attributes.nlink == 0) {
                return Err(FsError::Stale(dir).into());
            }
            let entry = self.entry(now, dir, None).ok_or(FsError::Stale(dir))?;
            self.count_lookup(dir, dir);
            return Ok(Lookup::Found(entry));
        }
        let dir_node = self.need_dir(dir, Level::Shared)?;
        let ino = match name {
            b".." => dir_node.parent,
            _ => match self.need_name(dir, name, Level::Shared)? {
                Dentry::Present { ino, .. } => ino,
                Dentry::Absent => return Ok(Lookup::Absent(self.tell_absent(now, dir, name))),
            },
        };
        self.need(ino, Level::Shared)?;
        self.answer_entry(now, ino, dir).map(Lookup::Found)
    }

    /// The kernel is told that there is no `name` in `dir`: how long it may remember that.
    fn tell_absent(&mut self, now: Now, dir: Ino, name: &[u8]) -> Duration {
        let valid = self.valid(now, &[dir]);
        if valid > Duration::ZERO && self.names_mut(dir).tell_absent(name) {
            valid
        } else {
            Duration::ZERO
        }
    }

    /// The entry of `ino` in `dir`, counted as a lookup.
    fn answer_entry(&mut self, now: Now, ino: Ino, dir: Ino) -> Result<Entry, Stop> {
        let entry = self.entry(now, ino, Some(dir)).ok_or(FsError::Stale(ino))?;
        self.count_lookup(ino, dir);
        Ok(entry)
    }

    /// The kernel was told of `ino` in `dir` once more.
    pub(super) fn count_lookup(&mut self, ino: Ino, dir: Ino) {
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.lookups += 1;
            node.beside = dir;
        }
    }

    /// The kernel forgets `lookups` of its lookups.
    pub fn forget(&mut self, ino: Ino, lookups: u64) {
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.lookups = node.lookups.saturating_sub(lookups);
            self.release_if_unused(ino);
        }
    }

    /// Makes an inode of any kind under a new name. Does not count a lookup.
    pub fn make(
        &mut self,
        now: Now,
        caller: Caller,
        dir: Ino,
        name: &[u8],
        new: NewNode<'_>,
    ) -> Result<Ino, Stop> {
        self.check_change(now)?;
        check_target(&new)?;
        if let Dentry::Present { .. } = self.need_name(dir, name, Level::Exclusive)? {
            return Err(FsError::Exists.into());
        }
        let inherited = self.inherited_acl(dir)?;
        let parent = *self.attributes_mut(dir);
        if parent.nlink == 0 {
            return Err(FsError::NotFound.into());
        }
        let mut permissions = new.permissions & MODE_PERMISSIONS;
        let acl = match inherited {
            Some(default) if new.kind != FileKind::Symlink => {
                Some(default.inherit(new.kind == FileKind::Directory, &mut permissions))
            }
            Some(_) | None => {
                permissions &= !(caller.umask & 0o777);
                None
            }
        };
        if new.kind == FileKind::Symlink {
            permissions = 0o777;
        }
        let mut gid = caller.gid;
        if parent.permissions & MODE_SGID != 0 {
            gid = parent.gid;
            if new.kind == FileKind::Directory {
                permissions |= MODE_SGID;
            }
        }
        let ino = self.take_inode()?;
        let time = change_time(now, &parent);
        let attributes = Attributes {
            ino,
            kind: new.kind,
            permissions,
            nlink: if new.kind == FileKind::Directory { 2 } else { 1 },
            uid: caller.uid,
            gid,
            rdev: new.rdev,
            size: new.target.len() as u64,
            allocated_bytes: 0,
            atime: time,
            mtime: time,
            ctime: time,
        };
        self.append_create(dir, name, &attributes, new.target)?;
        self.insert_made(dir, attributes, new.target);
        self.names_mut(dir).add(name, ino, new.kind);
        self.touch_dir(dir, time, i32::from(new.kind == FileKind::Directory));
        if let Some(acl) = acl {
            self.store_inherited_acl(now, ino, acl)?;
        }
        Ok(ino)
    }

    fn append_create(
        &mut self,
        dir: Ino,
        name: &[u8],
        attributes: &Attributes,
        target: &[u8],
    ) -> Result<(), Stop> {
        let (name_hash, sealed_name) = self.seal_name(dir, name)?;
        let sealed_target = if target.is_empty() {
            Bytes::new()
        } else {
            let sealed = self.config.names.seal_target(attributes.ino, target);
            sealed.map_err(|_| FsError::NameTooLong)?.into()
        };
        let create = v1::Create {
            dir: dir.0,
            name_hash,
            sealed_name,
            ino: attributes.ino.0,
            mode: attributes.mode(),
            uid: attributes.uid,
            gid: attributes.gid,
            rdev: attributes.rdev,
            sealed_target,
            target_bytes: target.len() as u32,
            time: Some(attributes.ctime.into()),
        };
        self.append(Op::Create(create), &[dir]);
        Ok(())
    }

    fn insert_made(&mut self, dir: Ino, attributes: Attributes, target: &[u8]) {
        let mut node = Node::unknown();
        node.lease.level = Level::Exclusive;
        node.attributes = Some(attributes);
        node.xattrs = Some(std::collections::BTreeMap::new());
        node.parent = dir;
        node.logged = self.log.end();
        node.tail_checked = true;
        match attributes.kind {
            FileKind::Directory => node.names = Some(Box::new(DirNames::new_empty())),
            FileKind::Regular => node.data = Some(Box::new(FileData::new_file())),
            FileKind::Symlink => node.target = Some(Bytes::copy_from_slice(target)),
            FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice => {}
        }
        self.nodes.insert(attributes.ino, node);
    }

    fn take_inode(&mut self) -> Result<Ino, Stop> {
        let ino = self.inodes.next().map(Ino).ok_or(Stop::Stall(Stall::Inodes))?;
        if self.inodes_low() {
            self.ask_inodes();
        }
        Ok(ino)
    }

    /// Makes an inode and answers its entry, counted as a lookup.
    pub fn make_entry(
        &mut self,
        now: Now,
        caller: Caller,
        dir: Ino,
        name: &[u8],
        new: NewNode<'_>,
    ) -> Result<Entry, Stop> {
        let ino = self.make(now, caller, dir, name, new)?;
        self.answer_entry(now, ino, dir)
    }

    /// Gives `ino` the name `name` in `dir` too.
    pub fn link(&mut self, now: Now, ino: Ino, dir: Ino, name: &[u8]) -> Result<Entry, Stop> {
        self.check_change(now)?;
        check_name(name)?;
        self.need_all(&mut [dir, ino], Level::Exclusive)?;
        if let Dentry::Present { .. } = self.need_name(dir, name, Level::Exclusive)? {
            return Err(FsError::Exists.into());
        }
        let attributes = *self.attributes_mut(ino);
        let parent = *self.attributes_mut(dir);
        if attributes.kind == FileKind::Directory {
            return Err(FsError::NotPermitted.into());
        }
        if attributes.nlink == 0 || parent.nlink == 0 {
            return Err(FsError::NotFound.into());
        }
        if attributes.nlink >= LINKS_MAX {
            return Err(FsError::TooManyLinks.into());
        }
        let (name_hash, sealed_name) = self.seal_name(dir, name)?;
        let time = change_time(now, &parent).max(attributes.ctime);
        let link =
            v1::Link { dir: dir.0, name_hash, sealed_name, ino: ino.0, time: Some(time.into()) };
        self.append(Op::Link(link), &[dir, ino]);
        let changed = self.attributes_mut(ino);
        changed.nlink += 1;
        changed.ctime = time;
        self.names_mut(dir).add(name, ino, attributes.kind);
        self.touch_dir(dir, time, 0);
        self.answer_entry(now, ino, dir)
    }

    /// Removes a name: of a directory if `directory`, else of anything else.
    pub fn unlink(
        &mut self,
        now: Now,
        caller: Caller,
        dir: Ino,
        name: &[u8],
        directory: bool,
    ) -> Result<Ino, Stop> {
        self.check_change(now)?;
        let Dentry::Present { ino, .. } = self.need_name(dir, name, Level::Exclusive)? else {
            return Err(FsError::NotFound.into());
        };
        self.need_all(&mut [dir, ino], Level::Exclusive)?;
        let kind = self.attributes_mut(ino).kind;
        match (directory, kind == FileKind::Directory) {
            (true, false) => return Err(FsError::NotADirectory.into()),
            (false, true) => return Err(FsError::IsADirectory.into()),
            (true, true) | (false, false) => {}
        }
        if directory {
            self.check_empty(ino)?;
        }
        let parent = *self.attributes_mut(dir);
        let time = change_time(now, &parent).max(self.attributes_mut(ino).ctime);
        let open = self.nodes.get(&ino).is_some_and(Node::is_referred);
        let (name_hash, _) = self.seal_name(dir, name)?;
        let unlink = v1::Unlink {
            dir: dir.0,
            name_hash,
            ino: ino.0,
            directory,
            open,
            time: Some(time.into()),
            uid: Some(caller.uid),
        };
        self.append(Op::Unlink(unlink), &[dir, ino]);
        self.names_mut(dir).remove(name);
        self.touch_dir(dir, time, -i32::from(directory));
        self.drop_link(ino, time);
        Ok(ino)
    }

    /// Moves a name. Over an existing file it waits until what the moved file holds is committed; a
    /// swap waits for both. `flushed` are files for which this call has waited already: what is
    /// written to them meanwhile need not come with the name, and might never come to an end.
    pub fn rename(
        &mut self,
        now: Now,
        caller: Caller,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        mode: RenameMode,
        flushed: &[Ino],
    ) -> Result<Renamed, Stop> {
        self.check_change(now)?;
        check_name(from.1)?;
        check_name(to.1)?;
        self.need_all(&mut [from.0, to.0], Level::Exclusive)?;
        self.need_dir(from.0, Level::Exclusive)?;
        self.need_dir(to.0, Level::Exclusive)?;
        let Dentry::Present { ino: moved, .. } =
            self.need_name(from.0, from.1, Level::Exclusive)?
        else {
            return Err(FsError::NotFound.into());
        };
        let other = match self.need_name(to.0, to.1, Level::Exclusive)? {
            Dentry::Present { ino, .. } => ino,
            Dentry::Absent => Ino(0),
        };
        self.need_all(&mut [from.0, to.0, moved, other], Level::Exclusive)?;
        let moved = (moved, self.attributes_mut(moved).kind);
        let replaced = (other.0 != 0).then(|| (other, self.attributes_mut(other).kind));
        if self.attributes_mut(to.0).nlink == 0 {
            return Err(FsError::NotFound.into());
        }
        match (mode, replaced) {
            (RenameMode::Exchange, None) => return Err(FsError::NotFound.into()),
            (RenameMode::NoReplace, Some(_)) => return Err(FsError::Exists.into()),
            _ => {}
        }
        if moved.0 == other {
            return Ok(Renamed { moved: moved.0, replaced: None });
        }
        self.check_no_loop(moved, from.0, to.0)?;
        if let (RenameMode::Exchange, Some(replaced)) = (mode, replaced) {
            self.check_no_loop(replaced, to.0, from.0)?;
            self.need_committed(moved.0, flushed)?;
            self.need_committed(replaced.0, flushed)?;
            return self.exchange(now, from, to, moved, replaced);
        }
        if let Some(replaced) = replaced {
            match (moved.1 == FileKind::Directory, replaced.1 == FileKind::Directory) {
                (true, false) => return Err(FsError::NotADirectory.into()),
                (false, true) => return Err(FsError::IsADirectory.into()),
                (true, true) => self.check_empty(replaced.0)?,
                (false, false) => {}
            }
            self.need_committed(moved.0, flushed)?;
        }
        self.replace((now, caller), from, to, moved, replaced)
    }

    fn need_committed(&self, ino: Ino, flushed: &[Ino]) -> Result<(), Stop> {
        if self.has_uncommitted(ino) && !flushed.contains(&ino) {
            return Err(Stop::Stall(Stall::Flush(ino)));
        }
        Ok(())
    }

    fn replace(
        &mut self,
        (now, caller): (Now, Caller),
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        moved: (Ino, FileKind),
        replaced: Option<(Ino, FileKind)>,
    ) -> Result<Renamed, Stop> {
        let other = replaced.map_or(Ino(0), |(ino, _)| ino);
        let time = self.time_of_all(now, &[from.0, to.0, moved.0, other]);
        let (from_hash, _) = self.seal_name(from.0, from.1)?;
        let (to_hash, to_sealed_name) = self.seal_name(to.0, to.1)?;
        let replaced_open = self.nodes.get(&other).is_some_and(Node::is_referred);
        let rename = v1::Rename {
            from_dir: from.0.0,
            from_hash,
            ino: moved.0.0,
            to_dir: to.0.0,
            to_hash,
            to_sealed_name,
            replaced: other.0,
            exchange: false,
            from_sealed_name: Bytes::new(),
            replaced_open,
            time: Some(time.into()),
            uid: Some(caller.uid),
        };
        self.append(Op::Rename(rename), &[from.0, to.0, moved.0, other]);
        let moved_dirs = i32::from(moved.1 == FileKind::Directory);
        let replaced_dirs =
            i32::from(replaced.is_some_and(|(_, kind)| kind == FileKind::Directory));
        self.names_mut(from.0).remove(from.1);
        self.touch_dir(from.0, time, -moved_dirs);
        let names = self.names_mut(to.0);
        names.remove(to.1);
        names.add(to.1, moved.0, moved.1);
        self.touch_dir(to.0, time, moved_dirs - replaced_dirs);
        self.attributes_mut(moved.0).ctime = time;
        self.set_parent(moved, to.0);
        if replaced.is_some() {
            self.drop_link(other, time);
        }
        Ok(Renamed { moved: moved.0, replaced: replaced.map(|(ino, _)| ino) })
    }

    fn exchange(
        &mut self,
        now: Now,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        moved: (Ino, FileKind),
        other: (Ino, FileKind),
    ) -> Result<Renamed, Stop> {
        let time = self.time_of_all(now, &[from.0, to.0, moved.0, other.0]);
        let (from_hash, from_sealed_name) = self.seal_name(from.0, from.1)?;
        let (to_hash, to_sealed_name) = self.seal_name(to.0, to.1)?;
        let rename = v1::Rename {
            from_dir: from.0.0,
            from_hash,
            ino: moved.0.0,
            to_dir: to.0.0,
            to_hash,
            to_sealed_name,
            replaced: other.0.0,
            exchange: true,
            from_sealed_name,
            replaced_open: false,
            time: Some(time.into()),
            uid: None,
        };
        self.append(Op::Rename(rename), &[from.0, to.0, moved.0, other.0]);
        self.names_mut(from.0).remove(from.1);
        self.names_mut(to.0).remove(to.1);
        self.names_mut(to.0).add(to.1, moved.0, moved.1);
        self.names_mut(from.0).add(from.1, other.0, other.1);
        let dirs = i32::from(moved.1 == FileKind::Directory);
        let other_dirs = i32::from(other.1 == FileKind::Directory);
        self.touch_dir(from.0, time, other_dirs - dirs);
        self.touch_dir(to.0, time, dirs - other_dirs);
        self.attributes_mut(moved.0).ctime = time;
        self.attributes_mut(other.0).ctime = time;
        self.set_parent(moved, to.0);
        self.set_parent(other, from.0);
        Ok(Renamed { moved: moved.0, replaced: None })
    }

    fn time_of_all(&self, now: Now, inos: &[Ino]) -> FileTime {
        let attributes = |ino: &Ino| self.nodes.get(ino).and_then(|node| node.attributes);
        inos.iter().filter_map(attributes).fold(now.wall, |time, a| time.max(a.ctime))
    }

    fn set_parent(&mut self, moved: (Ino, FileKind), dir: Ino) {
        if let (FileKind::Directory, Some(node)) = (moved.1, self.nodes.get_mut(&moved.0)) {
            node.parent = dir;
        }
    }

    /// A directory must not be moved into itself. The kernel has checked what it knows, and may know
    /// a place from before another mount's rename: so every directory above the new one is looked at
    /// under a lease. That lease goes back behind the log, and what moves needs it, so the directory
    /// sees the same when it applies the rename.
    fn check_no_loop(&mut self, moved: (Ino, FileKind), from: Ino, to: Ino) -> Result<(), Stop> {
        if moved.1 != FileKind::Directory || from == to {
            return Ok(());
        }
        let mut above = to;
        for _ in 0..DEPTH_MAX {
            if above == moved.0 {
                return Err(FsError::Invalid("a directory cannot move into itself").into());
            }
            if above == Ino::ROOT {
                return Ok(());
            }
            above = self.need(above, Level::Shared)?.parent;
        }
        Err(FsError::TooDeep.into())
    }

    fn check_empty(&mut self, dir: Ino) -> Result<(), Stop> {
        let names = self.names_mut(dir);
        match names.is_empty() {
            Some(true) => Ok(()),
            Some(false) => Err(FsError::NotEmpty.into()),
            None => {
                let (after, unlistable) = (names.listed, names.unlistable);
                check_listable(dir, unlistable)?;
                Err(Stop::Stall(Stall::Fetch(Want::Entries { dir, after })))
            }
        }
    }

    /// A directory's names changed: its times, and its links by `subdirectories`.
    fn touch_dir(&mut self, dir: Ino, time: FileTime, subdirectories: i32) {
        let attributes = self.attributes_mut(dir);
        attributes.mtime = time;
        attributes.ctime = attributes.ctime.max(time);
        attributes.nlink = attributes.nlink.saturating_add_signed(subdirectories);
    }

    /// `ino` lost a name.
    fn drop_link(&mut self, ino: Ino, time: FileTime) {
        let attributes = self.attributes_mut(ino);
        attributes.ctime = attributes.ctime.max(time);
        attributes.nlink = match attributes.kind {
            FileKind::Directory => 0,
            _ => attributes.nlink.saturating_sub(1),
        };
        self.drop_if_gone(ino);
    }

    /// Hash and ciphertext of a name.
    pub(super) fn seal_name(&self, dir: Ino, name: &[u8]) -> Result<(Bytes, Bytes), Stop> {
        let hash: NameHash = self.config.names.name_hash(dir, name);
        let sealed = self.config.names.seal_name(dir, name).map_err(|_| FsError::NameTooLong)?;
        Ok((Bytes::copy_from_slice(&hash), sealed.into()))
    }
}

/// What a rename did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Renamed {
    /// The inode that has another name now.
    pub moved: Ino,
    /// The inode that lost its name.
    pub replaced: Option<Ino>,
}

fn check_target(new: &NewNode<'_>) -> Result<(), Stop> {
    match (new.kind, new.target.len()) {
        (FileKind::Symlink, 0) => Err(FsError::NotFound.into()),
        (FileKind::Symlink, bytes) if bytes > TARGET_BYTES_MAX => Err(FsError::NameTooLong.into()),
        _ => Ok(()),
    }
}
