//! Sealed names: what the directory stores of file names, symlink targets and extended attributes.
//!
//! The directory finds an entry by a keyed hash of its name and keeps the name itself as a
//! ciphertext beside it. It learns which entries are equal, how long they are and when they
//! change; nothing else. Managed volumes are stored the same way (their directory holds the key),
//! so that private ones need no other schema. docs/formats.md draws the bytes.
//!
//! ```text
//! keys   = HKDF-SHA256(no salt, volume key, "us names 1"), 128 bytes:
//!          hash | names | targets | xattrs, 32 bytes each
//! hash   = HMAC-SHA256(hash key, kind || inode || name), the first 16 bytes; inode big-endian
//! sealed = AES-256-GCM under the key of its kind, as below
//! ```
//!
//! | what | nonce | bound to (AAD) |
//! |---|---|---|
//! | name | first 12 bytes of its hash, not stored | directory's inode, hash |
//! | target | first 12 bytes of HMAC of inode and target, stored in front | inode |
//! | xattr | 12 random bytes, stored in front | inode, hash |
//!
//! **Why the nonces are safe.** AES-GCM falls when one nonce seals two different messages under one
//! key. A name's nonce is a keyed pseudo-random function of all that is sealed and bound: the same
//! nonce comes again for the same name in the same directory, which gives the same bytes, or when
//! two different inputs collide in 96 bits: 2^-37 for 2^30 names ever used in a volume. That is
//! the idea of SIV (RFC 5297). In return nothing need be stored, a replayed mutation carries the
//! bytes it carried before, and no clone of a machine can repeat a random number. Targets are
//! sealed the same way; being no key themselves, they carry their nonce. A value of an xattr may
//! be set again to what it once was, and nobody should see that: its nonce is random, read from
//! the system at the call, which is good for 2^32 values a volume at the usual bound of 2^-32.
//!
//! What may fail: a length no system call allows, and opening. An entry moved to another
//! directory, inode or hash does not open.

#[cfg(test)]
mod tests;

use std::fmt;

use aws_lc_rs::aead::{Aad, LessSafeKey, NONCE_LEN, Nonce};
use aws_lc_rs::hmac;

use crate::geometry::TAG_BYTES;
use crate::ids::Ino;
use crate::seal::{KEY_BYTES, VolumeKey, aead_key};

/// Bytes of the hash by which the directory finds a name.
pub const NAME_HASH_BYTES: usize = 16;
/// The longest file name, as POSIX systems have it.
pub const NAME_BYTES_MAX: usize = 255;
/// The longest target of a symbolic link: a path without its final NUL.
pub const TARGET_BYTES_MAX: usize = 4095;
/// The longest name of an extended attribute.
pub const XATTR_NAME_BYTES_MAX: usize = 255;
/// The largest value of an extended attribute.
pub const XATTR_VALUE_BYTES_MAX: usize = 64 << 10;

/// Bytes of an extended attribute as it is stored, with a name and a value of these lengths.
pub const fn sealed_xattr_bytes(name: usize, value: usize) -> usize {
    NONCE_LEN + 1 + name + value + TAG_BYTES
}

/// The hash by which the directory finds a name.
pub type NameHash = [u8; NAME_HASH_BYTES];

/// What a length or a failed seal is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameKind {
    /// A name in a directory.
    Name,
    /// The target of a symbolic link.
    Target,
    /// The name of an extended attribute.
    XattrName,
    /// An extended attribute: its value, or the whole.
    Xattr,
}

impl fmt::Display for NameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Name => "file name",
            Self::Target => "symlink target",
            Self::XattrName => "xattr name",
            Self::Xattr => "xattr",
        })
    }
}

/// Why something was not sealed or not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing, or more than the format holds.
    #[error("{kind} of {bytes} bytes: at most {bytes_max} are possible, and a name is never empty")]
    Length {
        /// What it is.
        kind: NameKind,
        /// Its bytes.
        bytes: usize,
        /// The most it may have.
        bytes_max: usize,
    },
    /// The bytes are not what was sealed at this place.
    #[error("{kind} of inode {ino} fails its seal: wrong or changed bytes, or a wrong key")]
    Tampered {
        /// What it is.
        kind: NameKind,
        /// The inode; of a file name, the directory it lies in.
        ino: Ino,
    },
}

/// An extended attribute, opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Xattr {
    /// Its name, with the namespace: `user.comment`.
    pub name: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
}

/// The keys of all names of one volume.
pub struct NameKey {
    hash: hmac::Key,
    names: LessSafeKey,
    targets: LessSafeKey,
    xattrs: LessSafeKey,
}

/// The first byte of what is hashed, so that the uses never meet.
#[derive(Clone, Copy)]
#[repr(u8)]
enum HashKind {
    Name = b'n',
    Target = b't',
    Xattr = b'x',
}

impl NameKey {
    /// The keys that follow from the volume's.
    pub fn new(volume_key: &VolumeKey) -> Self {
        let derived = volume_key.derive::<{ 4 * KEY_BYTES }>(&[b"us names 1"]);
        let (keys, _) = derived.as_chunks::<KEY_BYTES>();
        Self {
            hash: hmac::Key::new(hmac::HMAC_SHA256, &keys[0]),
            names: aead_key(&keys[1]),
            targets: aead_key(&keys[2]),
            xattrs: aead_key(&keys[3]),
        }
    }

    /// The hash by which the directory finds `name` in directory `dir`.
    pub fn name_hash(&self, dir: Ino, name: &[u8]) -> NameHash {
        first_bytes(&self.keyed(HashKind::Name, dir, name))
    }

    /// Seals a name for its place in directory `dir`: ciphertext, then tag. The same name there
    /// always gives the same bytes; a rename seals it again.
    ///
    /// # Errors
    /// [`NameError::Length`] for an empty name or more than [`NAME_BYTES_MAX`].
    pub fn seal_name(&self, dir: Ino, name: &[u8]) -> Result<Vec<u8>, NameError> {
        check_length(NameKind::Name, 1, name.len(), NAME_BYTES_MAX)?;
        let hash = self.name_hash(dir, name);
        let mut sealed = name.to_vec();
        seal(&self.names, first_bytes(&hash), &place(dir, &hash), &mut sealed, 0);
        Ok(sealed)
    }

    /// Opens a name found in directory `dir` under `hash`.
    ///
    /// # Errors
    /// [`NameError::Tampered`] unless it was sealed there; [`NameError::Length`].
    pub fn open_name(
        &self,
        dir: Ino,
        hash: &NameHash,
        sealed: &[u8],
    ) -> Result<Vec<u8>, NameError> {
        let bytes = sealed.len().saturating_sub(TAG_BYTES);
        check_length(NameKind::Name, 1, bytes, NAME_BYTES_MAX)?;
        open(&self.names, first_bytes(hash), &place(dir, hash), sealed)
            .ok_or(NameError::Tampered { kind: NameKind::Name, ino: dir })
    }

    /// Seals the target of symbolic link `ino`: nonce, ciphertext, tag.
    ///
    /// # Errors
    /// [`NameError::Length`] for an empty target or more than [`TARGET_BYTES_MAX`].
    pub fn seal_target(&self, ino: Ino, target: &[u8]) -> Result<Vec<u8>, NameError> {
        check_length(NameKind::Target, 1, target.len(), TARGET_BYTES_MAX)?;
        let nonce: [u8; NONCE_LEN] = first_bytes(&self.keyed(HashKind::Target, ino, target));
        let mut sealed = [&nonce, target].concat();
        seal(&self.targets, nonce, &ino.0.to_be_bytes(), &mut sealed, NONCE_LEN);
        Ok(sealed)
    }

    /// Opens the target of symbolic link `ino`.
    ///
    /// # Errors
    /// [`NameError::Tampered`] unless it was sealed for this inode; [`NameError::Length`].
    pub fn open_target(&self, ino: Ino, sealed: &[u8]) -> Result<Vec<u8>, NameError> {
        let bytes = sealed.len().saturating_sub(NONCE_LEN + TAG_BYTES);
        check_length(NameKind::Target, 1, bytes, TARGET_BYTES_MAX)?;
        sealed
            .split_first_chunk()
            .and_then(|(nonce, rest)| open(&self.targets, *nonce, &ino.0.to_be_bytes(), rest))
            .ok_or(NameError::Tampered { kind: NameKind::Target, ino })
    }

    /// The hash by which the directory finds extended attribute `name` of inode `ino`.
    pub fn xattr_hash(&self, ino: Ino, name: &[u8]) -> NameHash {
        first_bytes(&self.keyed(HashKind::Xattr, ino, name))
    }

    /// Seals name and value of an extended attribute together: nonce, ciphertext, tag. The same
    /// value gives other bytes each time.
    ///
    /// # Errors
    /// [`NameError::Length`] for an empty name, more than [`XATTR_NAME_BYTES_MAX`] of it, or a
    /// value of more than [`XATTR_VALUE_BYTES_MAX`].
    ///
    /// # Panics
    /// When the system has no randomness to give.
    pub fn seal_xattr(&self, ino: Ino, name: &[u8], value: &[u8]) -> Result<Vec<u8>, NameError> {
        check_length(NameKind::XattrName, 1, name.len(), XATTR_NAME_BYTES_MAX)?;
        check_length(NameKind::Xattr, 0, value.len(), XATTR_VALUE_BYTES_MAX)?;
        let mut nonce = [0; NONCE_LEN];
        getrandom::fill(&mut nonce).expect("the system gives randomness");
        let mut sealed = [&nonce, &[name.len() as u8][..], name, value].concat();
        let hash = self.xattr_hash(ino, name);
        seal(&self.xattrs, nonce, &place(ino, &hash), &mut sealed, NONCE_LEN);
        Ok(sealed)
    }

    /// Opens an extended attribute of inode `ino` found under `hash`.
    ///
    /// # Errors
    /// [`NameError::Tampered`] unless it was sealed there; [`NameError::Length`].
    pub fn open_xattr(&self, ino: Ino, hash: &NameHash, sealed: &[u8]) -> Result<Xattr, NameError> {
        let bytes_max = 1 + XATTR_NAME_BYTES_MAX + XATTR_VALUE_BYTES_MAX;
        let bytes = sealed.len().saturating_sub(NONCE_LEN + TAG_BYTES);
        check_length(NameKind::Xattr, 2, bytes, bytes_max)?;
        sealed
            .split_first_chunk()
            .and_then(|(nonce, rest)| open(&self.xattrs, *nonce, &place(ino, hash), rest))
            .and_then(|opened| split_xattr(&opened))
            .ok_or(NameError::Tampered { kind: NameKind::Xattr, ino })
    }

    /// HMAC-SHA256 over kind, inode and name.
    fn keyed(&self, kind: HashKind, ino: Ino, name: &[u8]) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.hash);
        context.update(&[kind as u8]);
        context.update(&ino.0.to_be_bytes());
        context.update(name);
        first_bytes(context.sign().as_ref())
    }
}

impl fmt::Debug for NameKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NameKey(secret)")
    }
}

/// Name and value, from one length byte, the name, the value.
fn split_xattr(opened: &[u8]) -> Option<Xattr> {
    let (name_bytes, rest) = opened.split_first()?;
    let (name, value) = rest.split_at_checked(usize::from(*name_bytes))?;
    Some(Xattr { name: name.to_vec(), value: value.to_vec() })
}

/// The start of `bytes`, which are longer wherever this module asks.
fn first_bytes<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut first = [0; N];
    first.copy_from_slice(&bytes[..N]);
    first
}

/// What an entry is bound to: the inode and the hash under which the directory keeps it.
fn place(ino: Ino, hash: &NameHash) -> [u8; 24] {
    let mut place = [0; 24];
    place[..8].copy_from_slice(&ino.0.to_be_bytes());
    place[8..].copy_from_slice(hash);
    place
}

fn check_length(
    kind: NameKind,
    bytes_min: usize,
    bytes: usize,
    bytes_max: usize,
) -> Result<(), NameError> {
    if (bytes_min..=bytes_max).contains(&bytes) {
        return Ok(());
    }
    Err(NameError::Length { kind, bytes, bytes_max })
}

/// Encrypts `buffer[start..]` in place and appends the tag.
fn seal(
    key: &LessSafeKey,
    nonce: [u8; NONCE_LEN],
    bound: &[u8],
    buffer: &mut Vec<u8>,
    start: usize,
) {
    let nonce = Nonce::assume_unique_for_key(nonce);
    let tag = key
        .seal_in_place_separate_tag(nonce, Aad::from(bound), &mut buffer[start..])
        .expect("AES-GCM seals up to 64 GiB");
    buffer.extend_from_slice(tag.as_ref());
}

/// Opens ciphertext and tag.
fn open(key: &LessSafeKey, nonce: [u8; NONCE_LEN], bound: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
    let (content, tag) = sealed.split_last_chunk::<TAG_BYTES>()?;
    let mut opened = vec![0; content.len()];
    let nonce = Nonce::assume_unique_for_key(nonce);
    key.open_separate_gather(nonce, Aad::from(bound), content, tag, &mut opened).ok()?;
    Some(opened)
}
