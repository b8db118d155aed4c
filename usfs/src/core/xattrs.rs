//! Extended attributes. The whole set of an inode is loaded at once; names and values are sealed
//! before they go into the log.

use std::collections::BTreeMap;

use bytes::Bytes;
use us_core::ids::Ino;
use us_core::limits::SEALED_XATTRS_BYTES_MAX;
use us_core::name::sealed_xattr_bytes;
use us_proto::v1;
use us_proto::v1::mutation::Op;

use super::acl::{self, Acl, Inherited};
use super::node::Level;
use super::{Core, Now, Stall, Stop, Want, change_time};
use crate::attributes::FileKind;
use crate::fs::{FsError, NAME_BYTES_MAX, XATTR_BYTES_MAX, XattrMode};

/// The longest list of names the system call can return.
const XATTR_LIST_BYTES_MAX: usize = 64 << 10;

impl Core {
    /// The set of `ino`, under a lease of `level`.
    fn need_xattrs(
        &mut self,
        ino: Ino,
        level: Level,
    ) -> Result<&mut BTreeMap<Vec<u8>, Bytes>, Stop> {
        let node = self.need(ino, level)?;
        match &mut node.xattrs {
            Some(xattrs) => Ok(xattrs),
            None => Err(Stop::Stall(Stall::Fetch(Want::Xattrs { ino, level }))),
        }
    }

    /// The value of attribute `name`.
    pub fn get_xattr(&mut self, now: Now, ino: Ino, name: &[u8]) -> Result<Bytes, Stop> {
        self.check_session(now)?;
        let xattrs = self.need_xattrs(ino, Level::Shared)?;
        xattrs.get(name).cloned().ok_or(FsError::NoXattr.into())
    }

    /// All names, each ended by a zero byte.
    pub fn list_xattrs(&mut self, now: Now, ino: Ino) -> Result<Bytes, Stop> {
        self.check_session(now)?;
        let xattrs = self.need_xattrs(ino, Level::Shared)?;
        let names = xattrs.keys().flat_map(|name| name.iter().copied().chain([0]));
        Ok(names.collect())
    }

    /// Sets attribute `name`.
    pub fn set_xattr(
        &mut self,
        now: Now,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
    ) -> Result<(), Stop> {
        self.check_change(now)?;
        check_xattr_name(name)?;
        if value.len() > XATTR_BYTES_MAX {
            return Err(FsError::XattrTooLarge.into());
        }
        let xattrs = self.need_xattrs(ino, Level::Exclusive)?;
        match (mode, xattrs.contains_key(name)) {
            (XattrMode::Create, true) => return Err(FsError::Exists.into()),
            (XattrMode::Replace, false) => return Err(FsError::NoXattr.into()),
            _ => {}
        }
        let others = xattrs.iter().filter(|(other, _)| other.as_slice() != name);
        let sealed = |name: &[u8], value: &[u8]| sealed_xattr_bytes(name.len(), value.len());
        let total: usize = others.clone().map(|(name, value)| sealed(name, value)).sum();
        let names: usize = others.map(|(name, _)| name.len() + 1).sum();
        if total + sealed(name, value) > SEALED_XATTRS_BYTES_MAX
            || names + name.len() + 1 > XATTR_LIST_BYTES_MAX
        {
            return Err(FsError::NoSpace("of extended attributes".to_owned()).into());
        }
        if name == acl::ACCESS {
            return self.set_access_acl(now, ino, value);
        }
        if name == acl::DEFAULT {
            Acl::parse(value).ok_or(FsError::Invalid("not an ACL"))?;
            if self.attributes_mut(ino).kind != FileKind::Directory {
                return Err(FsError::NotPermitted.into());
            }
        }
        self.put_xattr(now, ino, name, value)
    }

    /// Removes attribute `name`.
    pub fn remove_xattr(&mut self, now: Now, ino: Ino, name: &[u8]) -> Result<(), Stop> {
        self.check_change(now)?;
        let xattrs = self.need_xattrs(ino, Level::Exclusive)?;
        if xattrs.remove(name).is_none() {
            return Err(FsError::NoXattr.into());
        }
        let time = change_time(now, self.attributes_mut(ino));
        self.attributes_mut(ino).ctime = time;
        let name_hash = Bytes::copy_from_slice(&self.config.names.xattr_hash(ino, name));
        let remove = v1::RemoveXattr { ino: ino.0, name_hash, ctime: Some(time.into()) };
        self.append(Op::RemoveXattr(remove), &[ino]);
        Ok(())
    }

    fn put_xattr(&mut self, now: Now, ino: Ino, name: &[u8], value: &[u8]) -> Result<(), Stop> {
        let sealed = self.config.names.seal_xattr(ino, name, value);
        let sealed = sealed.map_err(|_| FsError::XattrTooLarge)?.into();
        let name_hash = Bytes::copy_from_slice(&self.config.names.xattr_hash(ino, name));
        let time = change_time(now, self.attributes_mut(ino));
        self.attributes_mut(ino).ctime = time;
        self.need_xattrs(ino, Level::Exclusive)?
            .insert(name.to_vec(), Bytes::copy_from_slice(value));
        let set = v1::SetXattr { ino: ino.0, name_hash, sealed, ctime: Some(time.into()) };
        self.append(Op::SetXattr(set), &[ino]);
        Ok(())
    }

    fn set_access_acl(&mut self, now: Now, ino: Ino, value: &[u8]) -> Result<(), Stop> {
        let acl = Acl::parse(value).ok_or(FsError::Invalid("not an ACL"))?;
        self.set_mode(now, ino, self.permissions(ino) & !0o777 | acl.mode());
        if !acl.is_mode_only() {
            return self.put_xattr(now, ino, acl::ACCESS, value);
        }
        match self.remove_xattr(now, ino, acl::ACCESS) {
            Err(Stop::Fail(FsError::NoXattr)) => Ok(()),
            other => other,
        }
    }

    /// The default ACL that a new file in `dir` inherits.
    pub(super) fn inherited_acl(&mut self, dir: Ino) -> Result<Option<Acl>, Stop> {
        let xattrs = self.need_xattrs(dir, Level::Shared)?;
        Ok(xattrs.get(acl::DEFAULT).and_then(|value| Acl::parse(value)))
    }

    /// Gives a file made just now the ACLs it inherited.
    pub(super) fn store_inherited_acl(
        &mut self,
        now: Now,
        ino: Ino,
        inherited: Inherited,
    ) -> Result<(), Stop> {
        if let Some(access) = inherited.access {
            self.put_xattr(now, ino, acl::ACCESS, &access)?;
        }
        match inherited.default {
            Some(default) => self.put_xattr(now, ino, acl::DEFAULT, &default),
            None => Ok(()),
        }
    }

    /// The access ACL follows a chmod; does nothing where there is none.
    pub(super) fn chmod_acl(&mut self, now: Now, ino: Ino, mode: u32) -> Result<(), Stop> {
        let xattrs = self.need_xattrs(ino, Level::Exclusive)?;
        let Some(acl) = xattrs.get(acl::ACCESS).and_then(|value| Acl::parse(value)) else {
            return Ok(());
        };
        self.put_xattr(now, ino, acl::ACCESS, &acl.chmod(mode).to_bytes())
    }
}

fn check_xattr_name(name: &[u8]) -> Result<(), FsError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(FsError::BufferTooSmall);
    }
    let stored = name.starts_with(b"user.")
        || name.starts_with(b"trusted.")
        || name.starts_with(b"security.")
        || name == acl::ACCESS
        || name == acl::DEFAULT;
    if stored { Ok(()) } else { Err(FsError::NotSupported) }
}
