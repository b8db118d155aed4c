//! Attributes and extended attributes.

use us_proto::v1::{RemoveXattr, SetAttributes, SetXattr};

use super::{
    ApplyError, Authority, FILE_BYTES_MAX, NAME_HASH_BYTES, Rule, S_IFDIR, S_IFMT, S_IFREG,
    SEALED_XATTR_BYTES_MAX, SEALED_XATTRS_BYTES_MAX, Tx, at_most,
};
use crate::keys;
use bytes::Bytes;

/// What is stored of an xattr: its sealed bytes, in a message of one field.
#[derive(Clone, PartialEq, prost::Message)]
pub struct XattrRecord {
    /// Name and value, sealed together.
    #[prost(bytes = "bytes", tag = "1")]
    pub sealed: Bytes,
}

impl Tx<'_> {
    pub(super) fn set_attributes(
        &mut self,
        who: &dyn Authority,
        set: &SetAttributes,
    ) -> Result<(), ApplyError> {
        self.need_exclusive(who, set.ino)?;
        if let Some(size) = set.size {
            let record = self.inode(set.ino)?.ok_or(Rule::NoInode { ino: set.ino })?;
            if record.mode & S_IFMT == S_IFDIR {
                return Err(Rule::IsADirectory { ino: set.ino }.into());
            }
            if record.mode & S_IFMT != S_IFREG {
                return Err(Rule::NotAFile { ino: set.ino }.into());
            }
            if size > FILE_BYTES_MAX {
                return Err(Rule::Malformed { field: "size" }.into());
            }
            // Whatever was allocated behind the new end goes, even where the file grows into it.
            let keep = size.min(record.size);
            self.clear_behind(set.ino, keep)?;
            self.inode_mut(set.ino)?.size = size;
        }
        let record = self.inode_mut(set.ino)?;
        if let Some(mode) = set.mode {
            record.mode = record.mode & S_IFMT | mode & 0o7777;
        }
        record.uid = set.uid.unwrap_or(record.uid);
        record.gid = set.gid.unwrap_or(record.gid);
        record.atime = set.atime.or(record.atime);
        record.mtime = set.mtime.or(record.mtime);
        self.changed(set.ino, set.ctime, false)
    }

    pub(super) fn set_xattr(
        &mut self,
        who: &dyn Authority,
        set: &SetXattr,
    ) -> Result<(), ApplyError> {
        self.need_exclusive(who, set.ino)?;
        if set.name_hash.len() != NAME_HASH_BYTES {
            return Err(Rule::Malformed { field: "name_hash" }.into());
        }
        at_most("sealed xattr", set.sealed.len(), SEALED_XATTR_BYTES_MAX)?;
        let key = keys::xattr(&self.volume, set.ino, &set.name_hash);
        let before = self.read::<XattrRecord>(&key)?;
        let record = self.inode_mut(set.ino)?;
        let freed = before.as_ref().map_or(0, |xattr| xattr.sealed.len() as u64);
        record.xattr_bytes = record.xattr_bytes.saturating_sub(freed) + set.sealed.len() as u64;
        if record.xattr_bytes > SEALED_XATTRS_BYTES_MAX as u64 {
            return Err(Rule::TooLong {
                field: "xattrs of an inode",
                bytes: record.xattr_bytes,
                bytes_max: SEALED_XATTRS_BYTES_MAX as u64,
            }
            .into());
        }
        record.xattrs += u32::from(before.is_none());
        self.put(key, &XattrRecord { sealed: set.sealed.clone() });
        self.changed(set.ino, set.ctime, false)
    }

    pub(super) fn remove_xattr(
        &mut self,
        who: &dyn Authority,
        remove: &RemoveXattr,
    ) -> Result<(), ApplyError> {
        self.need_exclusive(who, remove.ino)?;
        let key = keys::xattr(&self.volume, remove.ino, &remove.name_hash);
        let Some(before) = self.read::<XattrRecord>(&key)? else {
            return Ok(());
        };
        let record = self.inode_mut(remove.ino)?;
        record.xattrs = record.xattrs.saturating_sub(1);
        record.xattr_bytes = record.xattr_bytes.saturating_sub(before.sealed.len() as u64);
        self.delete(key);
        self.changed(remove.ino, remove.ctime, false)
    }
}
