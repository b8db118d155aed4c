//! POSIX ACLs as the kernel stores them in extended attributes (`linux/posix_acl_xattr.h`):
//! `u32 version = 2`, then `u16 tag, u16 permissions, u32 id` each, little-endian.
//!
//! The kernel checks permissions; the file system must keep mode and ACL in step: a new file inherits
//! its directory's default ACL, chmod changes the access ACL, setting that changes the mode.

/// The access ACL.
pub const ACCESS: &[u8] = b"system.posix_acl_access";
/// The ACL that new files of a directory inherit.
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct AclEntry {
    tag: u16,
    permissions: u16,
    id: u32,
}

/// One ACL.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Acl(Vec<AclEntry>);

/// What a new file gets from its directory's default ACL.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Inherited {
    /// Its access ACL, where the mode does not say it all.
    pub access: Option<Vec<u8>>,
    /// A directory's own default ACL.
    pub default: Option<Vec<u8>>,
}

impl Acl {
    /// The ACL in an attribute's value; `None` where it is none.
    pub fn parse(value: &[u8]) -> Option<Self> {
        let (version, rest) = value.split_first_chunk::<4>()?;
        let (entries, tail) = rest.as_chunks::<8>();
        if u32::from_le_bytes(*version) != VERSION || !tail.is_empty() {
            return None;
        }
        let entry = |[t0, t1, p0, p1, i0, i1, i2, i3]: &[u8; 8]| AclEntry {
            tag: u16::from_le_bytes([*t0, *t1]),
            permissions: u16::from_le_bytes([*p0, *p1]) & 7,
            id: u32::from_le_bytes([*i0, *i1, *i2, *i3]),
        };
        Some(Self(entries.iter().map(entry).collect()))
    }

    /// The inverse of [`Acl::parse`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            bytes.extend_from_slice(&entry.tag.to_le_bytes());
            bytes.extend_from_slice(&entry.permissions.to_le_bytes());
            bytes.extend_from_slice(&entry.id.to_le_bytes());
        }
        bytes
    }

    /// Whether the mode's nine bits say the same.
    pub fn is_mode_only(&self) -> bool {
        self.0.iter().all(|entry| matches!(entry.tag, USER_OBJ | GROUP_OBJ | OTHER))
    }

    /// The mode's nine bits.
    pub fn mode(&self) -> u32 {
        let of = |tag| self.0.iter().find(|entry| entry.tag == tag);
        let bits = |tag| of(tag).map_or(0, |entry| u32::from(entry.permissions));
        let group = if of(MASK).is_some() { bits(MASK) } else { bits(GROUP_OBJ) };
        bits(USER_OBJ) << 6 | group << 3 | bits(OTHER)
    }

    /// Each class keeps what `change` makes of its permissions, given the mode's bits of it.
    fn with_mode(mut self, mode: u32, change: fn(u16, u16) -> u16) -> Self {
        let group = if self.0.iter().any(|entry| entry.tag == MASK) { MASK } else { GROUP_OBJ };
        for entry in &mut self.0 {
            let bits = match entry.tag {
                USER_OBJ => mode >> 6,
                OTHER => mode,
                tag if tag == group => mode >> 3,
                _ => continue,
            };
            entry.permissions = change(entry.permissions, bits as u16 & 7);
        }
        self
    }

    /// The ACL after a chmod to `mode`.
    pub fn chmod(self, mode: u32) -> Self {
        self.with_mode(mode, |_, bits| bits)
    }

    /// What a new file gets from this default ACL; cuts its permissions down to it.
    pub fn inherit(self, directory: bool, permissions: &mut u32) -> Inherited {
        let default = directory.then(|| self.to_bytes());
        let access = self.with_mode(*permissions, |own, bits| own & bits);
        *permissions = *permissions & !0o777 | access.mode();
        Inherited { access: (!access.is_mode_only()).then(|| access.to_bytes()), default }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16)]) -> Acl {
        let entry = |&(tag, permissions): &(u16, u16)| AclEntry { tag, permissions, id: 7 };
        Acl(entries.iter().map(entry).collect())
    }

    #[test]
    fn new_files_inherit_the_default_cut_to_their_mode() {
        let default = acl(&[(USER_OBJ, 7), (0x02, 6), (GROUP_OBJ, 5), (MASK, 7), (OTHER, 5)]);
        assert_eq!(Acl::parse(&default.to_bytes()), Some(default.clone()));
        let mut permissions = 0o2640;
        let inherited = default.inherit(false, &mut permissions);
        assert_eq!(permissions, 0o2640);
        let access = Acl::parse(&inherited.access.unwrap()).unwrap();
        assert_eq!(access.mode(), 0o640);
        assert_eq!(inherited.default, None);
        assert_eq!(access.chmod(0o705).mode(), 0o705);
    }

    #[test]
    fn a_plain_default_needs_no_access_acl() {
        let default = acl(&[(USER_OBJ, 7), (GROUP_OBJ, 5), (OTHER, 0)]);
        let mut permissions = 0o666;
        let inherited = default.inherit(true, &mut permissions);
        assert_eq!((permissions, inherited.access), (0o640, None));
        assert!(inherited.default.is_some());
        assert_eq!(Acl::parse(b"abc"), None);
    }
}
