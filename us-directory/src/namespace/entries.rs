//! Names: create, link, unlink, rename, and the end of inodes that have none.

use bytes::Bytes;
use us_proto::v1::{Create, Link, Rename, Timestamp, Unlink};

use super::{
    ApplyError, Authority, DEPTH_MAX, NAME_HASH_BYTES, Rule, S_IFDIR, S_IFLNK, S_IFMT,
    SEALED_NAME_BYTES_MAX, SEALED_TARGET_BYTES_MAX, Tx, at_most, later,
};
use crate::keys;
use crate::records::{CookieRecord, EntryRecord, InodeRecord};

/// A name: its directory, its hash, and its sealed text.
pub(super) struct Name<'n> {
    pub dir: u64,
    pub hash: &'n Bytes,
    pub sealed: &'n Bytes,
}

/// Who took a name away, and how.
pub(super) struct Removal<'n> {
    pub name: Name<'n>,
    /// The session says that it has the inode open.
    pub open: bool,
    pub time: Option<Timestamp>,
    pub uid: Option<u32>,
}

pub(super) fn is_dir(record: &InodeRecord) -> bool {
    record.mode & S_IFMT == S_IFDIR
}

pub(super) fn check_name(hash: &Bytes, sealed: &Bytes) -> Result<(), Rule> {
    if hash.len() != NAME_HASH_BYTES {
        return Err(Rule::Malformed { field: "name_hash" });
    }
    at_most("sealed_name", sealed.len(), SEALED_NAME_BYTES_MAX)
}

impl Tx<'_> {
    /// Fails unless the session holds the inode EXCLUSIVE, or made it in this transaction.
    pub(super) fn need_exclusive(&self, who: &dyn Authority, ino: u64) -> Result<(), Rule> {
        if self.created.contains(&ino) || who.exclusive(ino) {
            return Ok(());
        }
        Err(Rule::NotExclusive { ino })
    }

    pub(super) fn need_dir(&mut self, dir: u64) -> Result<(), ApplyError> {
        let record = self.inode(dir)?.ok_or(Rule::NoInode { ino: dir })?;
        if !is_dir(record) {
            return Err(Rule::NotADirectory { ino: dir }.into());
        }
        if record.nlink == 0 {
            return Err(Rule::Removed { ino: dir }.into());
        }
        Ok(())
    }

    fn lookup(&self, dir: u64, hash: &Bytes) -> Result<Option<EntryRecord>, ApplyError> {
        Ok(self.read(&keys::entry(&self.volume, dir, hash))?)
    }

    fn expect(&self, dir: u64, hash: &Bytes, expected: u64) -> Result<EntryRecord, ApplyError> {
        let entry = self.lookup(dir, hash)?.ok_or(Rule::NoEntry { dir })?;
        if entry.ino != expected {
            return Err(Rule::EntryDiffers { dir, expected, found: entry.ino }.into());
        }
        Ok(entry)
    }

    pub(super) fn vacant(&self, dir: u64, hash: &Bytes) -> Result<(), ApplyError> {
        match self.lookup(dir, hash)? {
            None => Ok(()),
            Some(entry) => Err(Rule::Exists { dir, ino: entry.ino }.into()),
        }
    }

    /// Puts a name at the end of its directory's listing.
    pub(super) fn add_name(
        &mut self,
        name: &Name<'_>,
        ino: u64,
        time: Option<Timestamp>,
    ) -> Result<(), ApplyError> {
        let subdirectory = self.inode(ino)?.is_some_and(is_dir);
        let dir = self.inode_mut(name.dir)?;
        dir.last_cookie += 1;
        dir.entries += 1;
        dir.nlink += u32::from(subdirectory);
        let cookie = dir.last_cookie;
        self.changed(name.dir, time, true)?;
        let entry = EntryRecord { ino, cookie, sealed_name: name.sealed.clone() };
        self.put(keys::entry(&self.volume, name.dir, name.hash), &entry);
        let line =
            CookieRecord { ino, name_hash: name.hash.clone(), sealed_name: name.sealed.clone() };
        self.put(keys::cookie(&self.volume, name.dir, cookie), &line);
        Ok(())
    }

    fn remove_name(
        &mut self,
        dir: u64,
        hash: &Bytes,
        entry: &EntryRecord,
        time: Option<Timestamp>,
    ) -> Result<(), ApplyError> {
        let subdirectory = self.inode(entry.ino)?.is_some_and(is_dir);
        let record = self.inode_mut(dir)?;
        record.entries = record.entries.saturating_sub(1);
        record.nlink -= u32::from(subdirectory);
        self.changed(dir, time, true)?;
        self.delete(keys::entry(&self.volume, dir, hash));
        self.delete(keys::cookie(&self.volume, dir, entry.cookie));
        Ok(())
    }

    /// Notes that an inode changed: version, ctime, and for content mtime too.
    pub(super) fn changed(
        &mut self,
        ino: u64,
        time: Option<Timestamp>,
        content: bool,
    ) -> Result<(), ApplyError> {
        let record = self.inode_mut(ino)?;
        record.version += 1;
        record.ctime = later(record.ctime, time);
        if content {
            record.mtime = time.or(record.mtime);
        }
        Ok(())
    }

    pub(super) fn create(
        &mut self,
        who: &dyn Authority,
        create: &Create,
    ) -> Result<(), ApplyError> {
        check_name(&create.name_hash, &create.sealed_name)?;
        at_most("sealed_target", create.sealed_target.len(), SEALED_TARGET_BYTES_MAX)?;
        self.need_exclusive(who, create.dir)?;
        self.need_dir(create.dir)?;
        self.vacant(create.dir, &create.name_hash)?;
        let used = self.inode(create.ino)?.is_some()
            || self.trashed(create.ino)?.is_some()
            || self.deleted.contains(&create.ino)
            || self.exists(&keys::doomed(&self.volume, create.ino))?;
        if used || !who.may_create(create.ino) {
            return Err(Rule::InodeNotLeased { ino: create.ino }.into());
        }
        let kind = create.mode & S_IFMT;
        if !matches!(kind >> 12, 1 | 2 | 4 | 6 | 8 | 10 | 12) {
            return Err(Rule::Malformed { field: "mode" }.into());
        }
        let record = InodeRecord {
            mode: create.mode & (S_IFMT | 0o7777),
            nlink: if kind == S_IFDIR { 2 } else { 1 },
            uid: create.uid,
            gid: create.gid,
            rdev: create.rdev,
            size: if kind == S_IFLNK { u64::from(create.target_bytes) } else { 0 },
            atime: create.time,
            mtime: create.time,
            ctime: create.time,
            sealed_target: create.sealed_target.clone(),
            parent: if kind == S_IFDIR { create.dir } else { 0 },
            version: 1,
            born_ms: self.trash.clock_ms,
            ..Default::default()
        };
        self.set_inode(create.ino, Some(record))?;
        self.created.insert(create.ino);
        self.count("inodes", 1);
        let name = Name { dir: create.dir, hash: &create.name_hash, sealed: &create.sealed_name };
        self.add_name(&name, create.ino, create.time)
    }

    pub(super) fn exists(&self, key: &Bytes) -> Result<bool, ApplyError> {
        Ok(self.read::<crate::records::ReferenceRecord>(key)?.is_some())
    }

    pub(super) fn link(&mut self, who: &dyn Authority, link: &Link) -> Result<(), ApplyError> {
        check_name(&link.name_hash, &link.sealed_name)?;
        self.need_exclusive(who, link.dir)?;
        self.need_exclusive(who, link.ino)?;
        self.need_dir(link.dir)?;
        self.vacant(link.dir, &link.name_hash)?;
        let record = self.inode_mut(link.ino)?;
        if is_dir(record) {
            return Err(Rule::IsADirectory { ino: link.ino }.into());
        }
        if record.nlink == 0 {
            return Err(Rule::Removed { ino: link.ino }.into());
        }
        record.nlink += 1;
        self.changed(link.ino, link.time, false)?;
        let name = Name { dir: link.dir, hash: &link.name_hash, sealed: &link.sealed_name };
        self.add_name(&name, link.ino, link.time)
    }

    pub(super) fn unlink(
        &mut self,
        who: &dyn Authority,
        unlink: &Unlink,
    ) -> Result<(), ApplyError> {
        self.need_exclusive(who, unlink.dir)?;
        self.need_exclusive(who, unlink.ino)?;
        let entry = self.expect(unlink.dir, &unlink.name_hash, unlink.ino)?;
        let record = self.inode(unlink.ino)?.ok_or(Rule::NoInode { ino: unlink.ino })?;
        match (is_dir(record), unlink.directory) {
            (true, false) => return Err(Rule::IsADirectory { ino: unlink.ino }.into()),
            (false, true) => return Err(Rule::NotADirectory { ino: unlink.ino }.into()),
            _ => {}
        }
        self.remove_name(unlink.dir, &unlink.name_hash, &entry, unlink.time)?;
        let (dir, hash, sealed) = (unlink.dir, &unlink.name_hash, &entry.sealed_name);
        let name = Name { dir, hash, sealed };
        let removal = Removal { name, open: unlink.open, time: unlink.time, uid: unlink.uid };
        self.drop_link(who, unlink.ino, &removal)
    }

    /// Takes one name from an inode; without names it lives on only where it is open, and then in the
    /// trash.
    fn drop_link(
        &mut self,
        who: &dyn Authority,
        ino: u64,
        removal: &Removal<'_>,
    ) -> Result<(), ApplyError> {
        let record = self.inode_mut(ino)?;
        if is_dir(record) {
            if record.entries > 0 {
                return Err(Rule::NotEmpty { ino }.into());
            }
            record.nlink = 0;
        } else {
            record.nlink = record.nlink.saturating_sub(1);
        }
        let gone = record.nlink == 0;
        self.changed(ino, removal.time, false)?;
        if !gone {
            return Ok(());
        }
        self.note_removal(ino, removal)?;
        let mut holders = who.open_elsewhere(ino);
        holders.extend(removal.open.then(|| who.session()));
        holders.sort_unstable();
        holders.dedup();
        self.inode_mut(ino)?.orphans = holders.len() as u32;
        for session in &holders {
            self.put(
                keys::orphan(&self.volume, *session, ino),
                &crate::records::ReferenceRecord { bytes: 0 },
            );
        }
        if holders.is_empty() { self.lay_aside(ino) } else { Ok(()) }
    }

    /// A session closed an unlinked inode. Not open there: nothing happens.
    ///
    /// # Errors
    /// [`ApplyError`] when the store fails.
    pub fn release(&mut self, session: u64, ino: u64) -> Result<(), ApplyError> {
        let key = keys::orphan(&self.volume, session, ino);
        if !self.exists(&key)? {
            return Ok(());
        }
        self.delete(key);
        if self.inode(ino)?.is_none() {
            return Ok(());
        }
        let record = self.inode_mut(ino)?;
        record.orphans = record.orphans.saturating_sub(1);
        if record.orphans == 0 { self.lay_aside(ino) } else { Ok(()) }
    }

    /// Fails when `dir` lies in `moved`, or is it.
    fn refuse_loop(&mut self, moved: u64, dir: u64) -> Result<(), ApplyError> {
        let mut above = dir;
        for _ in 0..DEPTH_MAX {
            if above == moved {
                return Err(Rule::Loop { ino: moved }.into());
            }
            if above == 1 {
                return Ok(());
            }
            above = self.inode(above)?.ok_or(Rule::NoInode { ino: above })?.parent;
        }
        Err(Rule::Loop { ino: moved }.into())
    }

    pub(super) fn rename(
        &mut self,
        who: &dyn Authority,
        rename: &Rename,
    ) -> Result<(), ApplyError> {
        check_name(&rename.to_hash, &rename.to_sealed_name)?;
        if rename.ino == 1 || rename.replaced == 1 {
            return Err(Rule::Root.into());
        }
        for ino in [rename.from_dir, rename.to_dir, rename.ino, rename.replaced] {
            if ino != 0 {
                self.need_exclusive(who, ino)?;
            }
        }
        self.need_dir(rename.from_dir)?;
        self.need_dir(rename.to_dir)?;
        let from = self.expect(rename.from_dir, &rename.from_hash, rename.ino)?;
        let moved_dir = is_dir(self.inode(rename.ino)?.ok_or(Rule::NoInode { ino: rename.ino })?);
        if rename.from_dir == rename.to_dir && rename.from_hash == rename.to_hash {
            return Ok(());
        }
        if moved_dir && rename.from_dir != rename.to_dir {
            self.refuse_loop(rename.ino, rename.to_dir)?;
        }
        if rename.exchange {
            return self.exchange(rename, &from, moved_dir);
        }
        if rename.replaced == 0 {
            self.vacant(rename.to_dir, &rename.to_hash)?;
        } else {
            let to = self.expect(rename.to_dir, &rename.to_hash, rename.replaced)?;
            if rename.replaced == rename.ino {
                return Ok(()); // Two names of one file: POSIX does nothing.
            }
            self.replace(who, rename, &to, moved_dir)?;
        }
        self.remove_name(rename.from_dir, &rename.from_hash, &from, rename.time)?;
        let name =
            Name { dir: rename.to_dir, hash: &rename.to_hash, sealed: &rename.to_sealed_name };
        self.add_name(&name, rename.ino, rename.time)?;
        self.moved(rename.ino, rename.to_dir, moved_dir, rename.time)
    }

    fn moved(
        &mut self,
        ino: u64,
        dir: u64,
        is_dir: bool,
        time: Option<Timestamp>,
    ) -> Result<(), ApplyError> {
        if is_dir {
            self.inode_mut(ino)?.parent = dir;
        }
        self.changed(ino, time, false)
    }

    fn replace(
        &mut self,
        who: &dyn Authority,
        rename: &Rename,
        to: &EntryRecord,
        moved_dir: bool,
    ) -> Result<(), ApplyError> {
        let ino = rename.replaced;
        let replaced_dir = is_dir(self.inode(ino)?.ok_or(Rule::NoInode { ino })?);
        match (moved_dir, replaced_dir) {
            (true, false) => return Err(Rule::NotADirectory { ino }.into()),
            (false, true) => return Err(Rule::IsADirectory { ino }.into()),
            _ => {}
        }
        self.remove_name(rename.to_dir, &rename.to_hash, to, rename.time)?;
        let (dir, hash, sealed) = (rename.to_dir, &rename.to_hash, &to.sealed_name);
        let name = Name { dir, hash, sealed };
        let (open, time, uid) = (rename.replaced_open, rename.time, rename.uid);
        self.drop_link(who, ino, &Removal { name, open, time, uid })
    }

    fn exchange(
        &mut self,
        rename: &Rename,
        from: &EntryRecord,
        moved_dir: bool,
    ) -> Result<(), ApplyError> {
        check_name(&rename.from_hash, &rename.from_sealed_name)?;
        let other = rename.replaced;
        let to = self.expect(rename.to_dir, &rename.to_hash, other)?;
        if other == rename.ino {
            return Ok(());
        }
        let other_dir = is_dir(self.inode(other)?.ok_or(Rule::NoInode { ino: other })?);
        if other_dir && rename.from_dir != rename.to_dir {
            self.refuse_loop(other, rename.from_dir)?;
        }
        self.remove_name(rename.from_dir, &rename.from_hash, from, rename.time)?;
        self.remove_name(rename.to_dir, &rename.to_hash, &to, rename.time)?;
        let there =
            Name { dir: rename.to_dir, hash: &rename.to_hash, sealed: &rename.to_sealed_name };
        self.add_name(&there, rename.ino, rename.time)?;
        let here = Name {
            dir: rename.from_dir,
            hash: &rename.from_hash,
            sealed: &rename.from_sealed_name,
        };
        self.add_name(&here, other, rename.time)?;
        self.moved(rename.ino, rename.to_dir, moved_dir, rename.time)?;
        self.moved(other, rename.from_dir, other_dir, rename.time)
    }
}
