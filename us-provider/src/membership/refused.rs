//! The keys that are members no more, as the directory said last: kept in the file `refused`, so that a
//! provider refuses them also when it starts and the directory is away.

use std::collections::BTreeSet;

use us_core::tls::KeyHash;
use us_core::wire::admission::{Door, RefusedKeys};

use super::files::{FileError, MembershipFiles, seal, unseal};

/// How the file begins.
const MAGIC: [u8; 8] = *b"UsRefu\x01\x00";
/// The most keys of a list.
pub const KEYS_MAX: usize = 1 << 18;

/// A numbered list of refused keys.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Refused {
    /// Its number.
    pub version: u64,
    /// The keys.
    pub keys: BTreeSet<KeyHash>,
}

impl Refused {
    /// What is refused after the directory sent `list`: that, and of one that is older than what is
    /// kept (it comes from a directory that was restored from an old backup) both.
    #[must_use]
    pub fn after(&self, list: &us_proto::v1::RefusedKeys) -> Self {
        let keys = list.keys.iter().filter_map(|key| KeyHash::from_slice(key));
        let mut keys: BTreeSet<KeyHash> = keys.take(KEYS_MAX).collect();
        if list.version < self.version {
            keys.extend(&self.keys);
        }
        Self { version: list.version.max(self.version), keys }
    }

    fn list(&self) -> RefusedKeys {
        self.keys.iter().copied().collect()
    }
}

/// The list in a data folder, and the door it closes.
#[derive(Clone, Debug)]
pub struct RefusedList {
    files: MembershipFiles,
    kept: Refused,
    door: Door,
}

impl RefusedList {
    /// As it was kept. Blocks.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn load(files: MembershipFiles) -> Result<Self, FileError> {
        let (path, bytes) = files.read("refused")?;
        let kept = match bytes {
            None => Refused::default(),
            Some(bytes) => decode_refused(&bytes).ok_or(FileError::Damaged { path })?,
        };
        let door = Door::new(kept.list());
        Ok(Self { files, kept, door })
    }

    /// For the server.
    pub fn door(&self) -> &Door {
        &self.door
    }

    /// The directory sent a list: it counts at once, and is kept. Blocks.
    ///
    /// # Errors
    /// [`FileError::Io`] when it is not kept; it counts all the same.
    pub fn take(&mut self, list: &us_proto::v1::RefusedKeys) -> Result<(), FileError> {
        let next = self.kept.after(list);
        if next == self.kept {
            return Ok(());
        }
        tracing::info!(version = next.version, keys = next.keys.len(), "refused keys");
        self.door.refuse(next.list());
        self.files.write("refused", &encode_refused(&next))?;
        self.kept = next;
        Ok(())
    }
}

/// The bytes of the file `refused`: magic, number, number of keys, the keys in order, CRC-32C of it all.
pub fn encode_refused(refused: &Refused) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&refused.version.to_le_bytes());
    bytes.extend_from_slice(&(refused.keys.len() as u32).to_le_bytes());
    refused.keys.iter().for_each(|key| bytes.extend_from_slice(key.as_bytes()));
    seal(bytes)
}

/// The inverse of [`encode_refused`]; `None` for other bytes.
pub fn decode_refused(bytes: &[u8]) -> Option<Refused> {
    let mut content = unseal(bytes)?.strip_prefix(&MAGIC)?;
    let version = u64::from_le_bytes(*content.split_off(..8)?.first_chunk()?);
    let count = u32::from_le_bytes(*content.split_off(..4)?.first_chunk()?) as usize;
    if count > KEYS_MAX || content.len() != count * 32 {
        return None;
    }
    let keys: Vec<KeyHash> = content.chunks_exact(32).filter_map(KeyHash::from_slice).collect();
    keys.is_sorted_by(|one, next| one < next)
        .then(|| Refused { version, keys: keys.into_iter().collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(version: u64, keys: &[u8]) -> us_proto::v1::RefusedKeys {
        let keys = keys.iter().map(|byte| vec![*byte; 32].into()).collect();
        us_proto::v1::RefusedKeys { version, keys }
    }

    fn keys(refused: &RefusedList) -> Vec<u8> {
        refused.kept.keys.iter().map(|key| key.as_bytes()[0]).collect()
    }

    #[test]
    fn a_list_survives_a_restart_and_an_older_one_takes_nothing_back() {
        let dir = tempfile::tempdir().unwrap();
        let load = || RefusedList::load(MembershipFiles::new(dir.path()));
        let mut refused = load().unwrap();
        refused.take(&list(4, &[1, 2])).unwrap();
        refused.take(&list(5, &[2, 3])).unwrap();
        assert_eq!(keys(&load().unwrap()), [2, 3], "the newer list is the whole truth");
        refused.take(&list(1, &[9])).unwrap();
        assert_eq!(keys(&load().unwrap()), [2, 3, 9]);
        let path = dir.path().join("refused");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[20] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(matches!(load(), Err(FileError::Damaged { .. })));
    }
}
