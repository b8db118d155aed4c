//! What a provider remembers of its directory: two small files, each replaced whole.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use us_core::daemon::files::{Access, write_atomic};
use us_core::fragment::crc32c;

/// How the file of the root begins.
const ROOT_MAGIC: [u8; 8] = *b"UsRoot\x01\x00";
/// How the file of the membership begins.
const JOINED_MAGIC: [u8; 8] = *b"UsJoin\x01\x00";
/// The most bytes a cookie, a cluster id or a root may have: as many as a message.
const FIELD_BYTES_MAX: usize = super::MESSAGE_BYTES_MAX;
/// The most bytes of a file: two fields, and less than this beside them.
const FILE_BYTES_MAX: usize = 2 * FIELD_BYTES_MAX + 64;

/// Who we are to the directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Joined {
    /// Our number.
    pub provider: u32,
    /// What it gave us last; shown at the next hello.
    pub cookie: Bytes,
    /// Its cluster.
    pub cluster: Bytes,
}

/// A file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The disk failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Its bytes are not what was written.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}

/// The files `membership` and `root` of a data directory.
#[derive(Clone, Debug)]
pub struct MembershipFiles {
    dir: PathBuf,
}

impl MembershipFiles {
    /// Those in `dir`.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Who we were; `None`: never joined. Blocks.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn load_joined(&self) -> Result<Option<Joined>, FileError> {
        let path = self.dir.join("membership");
        let Some(bytes) = read(&path)? else { return Ok(None) };
        decode_joined(&bytes).map(Some).ok_or(FileError::Damaged { path })
    }

    /// As [`MembershipFiles::load_joined`]; one whose file is damaged never joined: its key says who it
    /// is, and without a cookie its fragments are checked before they are believed. Blocks.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn load_joined_or_new(&self) -> Result<Option<Joined>, FileError> {
        match self.load_joined() {
            Err(error @ FileError::Damaged { .. }) => {
                tracing::error!(%error, "joining as if for the first time");
                Ok(None)
            }
            joined => joined,
        }
    }

    /// Keeps who we are, durably. Blocks.
    ///
    /// # Errors
    /// [`FileError::Io`]; the old file is then still there.
    pub fn keep_joined(&self, joined: &Joined) -> Result<(), FileError> {
        self.write("membership", &encode_joined(joined))
    }

    /// Something that was acknowledged may be gone from the store: without its cookie the provider
    /// is one whose fragments are checked before they are believed. Blocks.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn forget_cookie(&self) -> Result<(), FileError> {
        match self.load_joined()? {
            Some(joined) => self.keep_joined(&Joined { cookie: Bytes::new(), ..joined }),
            None => Ok(()),
        }
    }

    /// The latest root of the directory and its number. Blocks.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn load_root(&self) -> Result<Option<(u64, Bytes)>, FileError> {
        let path = self.dir.join("root");
        let Some(bytes) = read(&path)? else { return Ok(None) };
        decode_root(&bytes).map(Some).ok_or(FileError::Damaged { path })
    }

    /// Keeps a root, durably, unless a newer one is kept. Blocks.
    ///
    /// # Errors
    /// [`FileError::Io`]; the old file is then still there.
    pub fn keep_root(&self, sequence: u64, root: &Bytes) -> Result<(), FileError> {
        match self.load_root() {
            Ok(Some((kept, _))) if kept > sequence => return Ok(()),
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "replaced"),
        }
        self.write("root", &encode_root(sequence, root))
    }

    /// A file's path and bytes, if it is there.
    pub(super) fn read(&self, name: &str) -> Result<(PathBuf, Option<Vec<u8>>), FileError> {
        let path = self.dir.join(name);
        let bytes = read(&path)?;
        Ok((path, bytes))
    }

    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), FileError> {
        let path = self.dir.join(name);
        write_atomic(&path, bytes, Access::Secret).map_err(|source| FileError::Io {
            action: "write",
            path,
            source,
        })
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    let read = File::open(path).and_then(|file| {
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    match read {
        // A longer file is none of ours, and its sum does not hold.
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FileError::Io { action: "read", path: path.to_owned(), source }),
    }
}

/// The bytes of the file `root`: magic, number, bytes of the root, the root, CRC-32C of it all.
pub fn encode_root(sequence: u64, root: &[u8]) -> Vec<u8> {
    let mut bytes = ROOT_MAGIC.to_vec();
    bytes.extend_from_slice(&sequence.to_le_bytes());
    push_field(&mut bytes, root);
    seal(bytes)
}

/// The inverse of [`encode_root`]; `None` for other bytes.
pub fn decode_root(bytes: &[u8]) -> Option<(u64, Bytes)> {
    let mut content = unseal(bytes)?.strip_prefix(&ROOT_MAGIC)?;
    let sequence = u64::from_le_bytes(*content.split_off(..8)?.first_chunk()?);
    let root = take_field(&mut content)?;
    content.is_empty().then_some((sequence, root))
}

/// The bytes of the file `membership`: magic, number, cookie and cluster, CRC-32C of it all.
pub fn encode_joined(joined: &Joined) -> Vec<u8> {
    let mut bytes = JOINED_MAGIC.to_vec();
    bytes.extend_from_slice(&joined.provider.to_le_bytes());
    push_field(&mut bytes, &joined.cookie);
    push_field(&mut bytes, &joined.cluster);
    seal(bytes)
}

/// Reads the bytes of the file `membership`; `None` for other bytes.
pub fn decode_joined(bytes: &[u8]) -> Option<Joined> {
    let mut content = unseal(bytes)?.strip_prefix(&JOINED_MAGIC)?;
    let provider = u32::from_le_bytes(*content.split_off(..4)?.first_chunk()?);
    let (cookie, cluster) = (take_field(&mut content)?, take_field(&mut content)?);
    content.is_empty().then_some(Joined { provider, cookie, cluster })
}

fn push_field(bytes: &mut Vec<u8>, field: &[u8]) {
    assert!(field.len() <= FIELD_BYTES_MAX, "a message's field is smaller");
    bytes.extend_from_slice(&(field.len() as u32).to_le_bytes());
    bytes.extend_from_slice(field);
}

fn take_field(content: &mut &[u8]) -> Option<Bytes> {
    let length = u32::from_le_bytes(*content.split_off(..4)?.first_chunk()?) as usize;
    if length > FIELD_BYTES_MAX {
        return None;
    }
    content.split_off(..length).map(Bytes::copy_from_slice)
}

pub(super) fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let sum = crc32c(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    bytes
}

pub(super) fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    if bytes.len() > FILE_BYTES_MAX {
        return None;
    }
    let (content, sum) = bytes.split_last_chunk()?;
    (crc32c(content) == u32::from_le_bytes(*sum)).then_some(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn files_come_back_and_damage_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let files = MembershipFiles::new(dir.path());
        assert!(files.load_joined().unwrap().is_none());
        let joined = Joined { provider: 7, cookie: "cookie".into(), cluster: "cluster".into() };
        files.keep_joined(&joined).unwrap();
        assert_eq!(files.load_joined().unwrap(), Some(joined));
        files.keep_root(5, &Bytes::from_static(b"five")).unwrap();
        files.keep_root(4, &Bytes::from_static(b"four")).unwrap();
        assert_eq!(files.load_root().unwrap(), Some((5, Bytes::from_static(b"five"))));
        let path = dir.path().join("membership");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[13] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(matches!(files.load_joined(), Err(FileError::Damaged { .. })));
        // It kept the provider and all its fragments away for ever.
        assert_eq!(files.load_joined_or_new().unwrap(), None);
    }

    #[test]
    fn a_store_that_lost_something_has_no_cookie_to_show() {
        let dir = tempfile::tempdir().unwrap();
        let files = MembershipFiles::new(dir.path());
        files.forget_cookie().unwrap();
        assert!(files.load_joined().unwrap().is_none());
        let joined = Joined { provider: 7, cookie: "cookie".into(), cluster: "cluster".into() };
        files.keep_joined(&joined).unwrap();
        files.forget_cookie().unwrap();
        let without = Joined { cookie: Bytes::new(), ..joined };
        assert_eq!(files.load_joined().unwrap(), Some(without));
    }

    proptest! {
        #[test]
        fn decoders_survive_any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..60), root: bool) {
            let _ = (decode_root(&bytes), decode_joined(&bytes));
            let magic = if root { ROOT_MAGIC } else { JOINED_MAGIC };
            bytes.splice(..0, magic);
            let bytes = seal(bytes);
            let _ = (decode_root(&bytes), decode_joined(&bytes));
        }
    }
}
