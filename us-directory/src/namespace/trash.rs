//! The trash: what lost its last name, for as long as the volume says.
//!
//! Nothing is moved: the inode, its map and its xattrs stay where they are. The inode's record says how
//! it lost its name and that it is in the trash, which hides it from everything but this module, and a
//! `t` key of the time it was removed puts it in line. What was removed before it was
//! [`TrashRule::age_ms`](super::TrashRule) old is not kept, nor are pipes, sockets and devices.
//!
//! A directory is kept under its own inode too, so what lay in it can go back to it, names and all.
//! One in which something went to the trash is kept however young it is, and stands behind it in line, also
//! where all was removed in one millisecond: a directory leaves the trash behind all that lay in it.
//!
//! Invariants: an inode is marked as trashed exactly where there is its `t` key; the sums of both are in
//! `u`; nothing in the trash has a name or an `o` key.

use us_proto::v1::Restore;

use super::entries::{Name, Removal, check_name, is_dir};
use super::{ApplyError, Authority, Rule, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, Tx, later};
use crate::keys;
use crate::records::{ReferenceRecord, RemovedRecord, RestoredRecord};

/// What left the trash for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// Inodes.
    pub files: u64,
    /// Bytes of blocks that they kept.
    pub stored_bytes: u64,
}

impl Tx<'_> {
    /// The inode has lost its last name: notes how, if it is to be kept.
    pub(super) fn note_removal(
        &mut self,
        ino: u64,
        removal: &Removal<'_>,
    ) -> Result<(), ApplyError> {
        let rule = self.trash;
        let record = self.inode_mut(ino)?;
        // A crash may take the clock back: what was made ahead of it is of the time before.
        let age_ms = rule.clock_ms.checked_sub(record.born_ms);
        let old = age_ms.is_none_or(|age_ms| age_ms >= rule.age_ms);
        let wanted = match record.mode & S_IFMT {
            S_IFREG | S_IFLNK => old,
            S_IFDIR => old || record.keeps_trash,
            _ => false,
        };
        if !wanted || !rule.on {
            return Ok(());
        }
        let behind_its_own = if record.keeps_trash { record.trashed_in_it_ms + 1 } else { 0 };
        let at_ms = rule.clock_ms.max(behind_its_own);
        record.removed = Some(RemovedRecord {
            dir: removal.name.dir,
            name_hash: removal.name.hash.clone(),
            sealed_name: removal.name.sealed.clone(),
            time: removal.time,
            uid: removal.uid,
            at_ms,
            trashed: false,
        });
        let dir = self.inode_mut(removal.name.dir)?;
        dir.keeps_trash = true;
        dir.trashed_in_it_ms = dir.trashed_in_it_ms.max(at_ms);
        Ok(())
    }

    /// Nobody has an inode without names open: it goes to the trash, or for ever.
    pub(super) fn lay_aside(&mut self, ino: u64) -> Result<(), ApplyError> {
        let record = self.inode_mut(ino)?;
        let Some(removed) = &mut record.removed else {
            self.count("inodes", -1);
            return self.doom(ino);
        };
        removed.trashed = true;
        let (at_ms, bytes) = (removed.at_ms, record.stored_bytes());
        self.put(keys::trashed(&self.volume, at_ms, ino), &ReferenceRecord { bytes });
        self.deleted.insert(ino);
        self.count("inodes", -1);
        self.count_trash(1, bytes as i64);
        Ok(())
    }

    fn count_trash(&mut self, files: i64, bytes: i64) {
        self.count("trash_files", files);
        self.count("trash_bytes", bytes);
    }

    /// Removes an inode; its map and xattrs are freed by [`Tx::reap`].
    fn doom(&mut self, ino: u64) -> Result<(), ApplyError> {
        let record = self.any_inode(ino)?.ok_or(Rule::NoInode { ino })?;
        let bare = record.allocated_bytes == 0 && record.xattrs == 0;
        self.set_inode(ino, None)?;
        self.deleted.insert(ino);
        if !bare {
            self.put(keys::doomed(&self.volume, ino), &ReferenceRecord { bytes: 0 });
        }
        Ok(())
    }

    /// Removes something from the trash for ever. What is not there is passed over.
    ///
    /// # Errors
    /// [`ApplyError`] when the store fails.
    pub fn purge(&mut self, ino: u64) -> Result<Purged, ApplyError> {
        let Some(record) = self.trashed(ino)? else { return Ok(Purged::default()) };
        let stored_bytes = record.stored_bytes();
        let at_ms = record.removed.as_ref().map_or(0, |removed| removed.at_ms);
        self.delete(keys::trashed(&self.volume, at_ms, ino));
        self.count_trash(-1, -(stored_bytes as i64));
        self.doom(ino)?;
        Ok(Purged { files: 1, stored_bytes })
    }

    /// Gives something in the trash a name again; a directory comes back empty.
    pub(super) fn restore(
        &mut self,
        who: &dyn Authority,
        restore: &Restore,
    ) -> Result<(), ApplyError> {
        let ino = restore.ino;
        check_name(&restore.name_hash, &restore.sealed_name)?;
        self.need_exclusive(who, restore.dir)?;
        self.need_dir(restore.dir)?;
        self.vacant(restore.dir, &restore.name_hash)?;
        let record = self.trashed(ino)?.ok_or(Rule::NotTrashed { ino })?;
        let (mut record, bytes) = (record.clone(), record.stored_bytes());
        let at_ms = record.removed.take().map_or(0, |removed| removed.at_ms);
        record.restored = Some(RestoredRecord { session: who.session(), grant: who.next_grant() });
        if is_dir(&record) {
            (record.nlink, record.parent) = (2, restore.dir);
        } else {
            record.nlink = 1;
        }
        record.version += 1;
        record.ctime = later(record.ctime, restore.time);
        self.delete(keys::trashed(&self.volume, at_ms, ino));
        self.count_trash(-1, -(bytes as i64));
        self.count("inodes", 1);
        self.set_inode(ino, Some(record))?;
        self.deleted.remove(&ino);
        self.created.insert(ino);
        self.restored.insert(ino);
        let (dir, hash, sealed) = (restore.dir, &restore.name_hash, &restore.sealed_name);
        self.add_name(&Name { dir, hash, sealed }, ino, restore.time)
    }
}
