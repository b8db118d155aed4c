//! The keys that are members no more, as the directory said last: kept in the file `refused`, so that a
//! provider refuses them also when it starts and the directory is away.
//!
//! A list is the whole truth within one incarnation of the directory. A restored directory may have
//! forgotten revocations: what was refused before its restore stays refused here, as *inherited*, until
//! the new incarnation says of a key that somebody invited it since.

use std::collections::BTreeSet;

use us_core::tls::KeyHash;
use us_core::wire::admission::{Door, RefusedKeys};

use super::files::{FileError, MembershipFiles, seal, unseal};

/// How the file begins, and how it began before incarnations were kept.
const MAGIC: [u8; 8] = *b"UsRefu\x02\x00";
const MAGIC_1: [u8; 8] = *b"UsRefu\x01\x00";
/// The most keys of a list.
pub const KEYS_MAX: usize = 1 << 18;

/// The keys of a numbered list, and those of lists from before a restore.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Refused {
    /// The directory's incarnation; 0: not known, taken for that of the next list.
    pub incarnation: u64,
    /// Its number.
    pub version: u64,
    /// The keys.
    pub keys: BTreeSet<KeyHash>,
    /// Keys that an earlier incarnation refused, that are not in `keys` and were not invited since.
    pub inherited: BTreeSet<KeyHash>,
}

impl Refused {
    /// What is refused after the directory sent `list`. A newer list of the same incarnation replaces the
    /// one that is kept; one that is older, or of an earlier incarnation, comes from a directory that was
    /// rolled back and only adds. The first list of a later incarnation makes what is kept inherited.
    #[must_use]
    pub fn after(&self, list: &us_proto::v1::RefusedKeys) -> Self {
        let read = |keys: &[bytes::Bytes]| -> BTreeSet<KeyHash> {
            keys.iter().filter_map(|key| KeyHash::from_slice(key)).take(KEYS_MAX).collect()
        };
        let mut next = Self { keys: read(&list.keys), ..self.clone() };
        let is_known = self.incarnation > 0;
        if is_known && list.incarnation > self.incarnation {
            next.inherited.extend(&self.keys);
            (next.incarnation, next.version) = (list.incarnation, list.version);
        } else if list.incarnation < self.incarnation || list.version < self.version {
            next.keys.extend(&self.keys);
        } else {
            (next.incarnation, next.version) = (list.incarnation, list.version);
        }
        if list.incarnation >= self.incarnation {
            next.inherited = &next.inherited - &read(&list.readmitted);
        }
        next.inherited = &next.inherited - &next.keys;
        next
    }

    fn list(&self) -> RefusedKeys {
        self.keys.union(&self.inherited).copied().collect()
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
            Some(bytes) => decode_refused(&bytes)
                .or_else(|| decode_first(&bytes))
                .ok_or(FileError::Damaged { path })?,
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
        let (keys, inherited) = (next.keys.len(), next.inherited.len());
        let (incarnation, version) = (next.incarnation, next.version);
        tracing::info!(incarnation, version, keys, inherited, "refused keys");
        self.door.refuse(next.list());
        self.files.write("refused", &encode_refused(&next))?;
        self.kept = next;
        Ok(())
    }
}

/// The bytes of the file `refused`: magic, incarnation, number, number of keys, of inherited ones, the keys
/// in order, the inherited ones in order, CRC-32C of it all.
pub fn encode_refused(refused: &Refused) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&refused.incarnation.to_le_bytes());
    bytes.extend_from_slice(&refused.version.to_le_bytes());
    for keys in [&refused.keys, &refused.inherited] {
        bytes.extend_from_slice(&(keys.len() as u32).to_le_bytes());
    }
    let keys = refused.keys.iter().chain(&refused.inherited);
    keys.for_each(|key| bytes.extend_from_slice(key.as_bytes()));
    seal(bytes)
}

/// The inverse of [`encode_refused`]; `None` for other bytes.
pub fn decode_refused(bytes: &[u8]) -> Option<Refused> {
    let mut content = unseal(bytes)?.strip_prefix(&MAGIC)?;
    let incarnation = u64::from_le_bytes(*content.split_off(..8)?.first_chunk()?);
    let version = u64::from_le_bytes(*content.split_off(..8)?.first_chunk()?);
    let count = u32::from_le_bytes(*content.split_off(..4)?.first_chunk()?) as usize;
    let inherited = u32::from_le_bytes(*content.split_off(..4)?.first_chunk()?) as usize;
    let (keys, inherited) =
        (split_keys(&mut content, count)?, split_keys(&mut content, inherited)?);
    content.is_empty().then_some(Refused { incarnation, version, keys, inherited })
}

/// The file as it was before incarnations were kept: magic, number, number of keys, the keys.
fn decode_first(bytes: &[u8]) -> Option<Refused> {
    let mut content = unseal(bytes)?.strip_prefix(&MAGIC_1)?;
    let version = u64::from_le_bytes(*content.split_off(..8)?.first_chunk()?);
    let count = u32::from_le_bytes(*content.split_off(..4)?.first_chunk()?) as usize;
    let keys = split_keys(&mut content, count)?;
    content.is_empty().then(|| Refused { version, keys, ..Refused::default() })
}

/// The first `count` keys, where they are in order.
fn split_keys(content: &mut &[u8], count: usize) -> Option<BTreeSet<KeyHash>> {
    let bytes = content.split_off(..count.checked_mul(32)?)?;
    let keys: Vec<KeyHash> = bytes.chunks_exact(32).filter_map(KeyHash::from_slice).collect();
    keys.is_sorted_by(|one, next| one < next).then(|| keys.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(version: u64, keys: &[u8]) -> us_proto::v1::RefusedKeys {
        let keys = keys.iter().map(|byte| vec![*byte; 32].into()).collect();
        us_proto::v1::RefusedKeys { version, keys, incarnation: 1, readmitted: Vec::new() }
    }

    /// As `list`, of the second incarnation, in which `readmitted` were invited.
    fn restored(version: u64, keys: &[u8], readmitted: &[u8]) -> us_proto::v1::RefusedKeys {
        let readmitted = list(0, readmitted).keys;
        us_proto::v1::RefusedKeys { incarnation: 2, readmitted, ..list(version, keys) }
    }

    /// The first bytes of what is refused.
    fn keys(refused: &RefusedList) -> Vec<u8> {
        let kept = &refused.kept;
        kept.keys.union(&kept.inherited).map(|key| key.as_bytes()[0]).collect()
    }

    fn refuses(refused: &RefusedList, byte: u8) -> bool {
        let (role, name) = (us_core::tls::Role::Client, "somebody".to_owned());
        let cluster = us_core::ids::ClusterId::from_bytes([7; 16]);
        let key_hash = KeyHash::from_bytes([byte; 32]);
        let peer = us_core::tls::PeerIdentity { role, name, cluster, key_hash };
        refused.door().admission().refuses(&peer)
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
    /// A directory restored from an old backup had forgotten revocations, and its list replaced the
    /// providers' as soon as it had as many changes behind it.
    #[test]
    fn a_restored_directory_forgets_nothing_here() {
        let dir = tempfile::tempdir().unwrap();
        let load = || RefusedList::load(MembershipFiles::new(dir.path())).unwrap();
        let mut refused = load();
        refused.take(&list(5, &[1, 2, 3])).unwrap();
        // Its numbers say nothing: not smaller, equal, nor larger ones.
        for version in [0, 5, 9] {
            refused.take(&restored(version, &[3, 4], &[])).unwrap();
            assert_eq!(keys(&refused), [1, 2, 3, 4], "version {version}");
        }
        assert_eq!(refused.kept.inherited.len(), 2);
        // Within the new incarnation a list is the whole truth again, beside what is inherited.
        refused.take(&restored(10, &[4], &[])).unwrap();
        assert_eq!(keys(&load()), [1, 2, 4]);
        // Somebody was invited anew; only the new incarnation can say so.
        let stale = us_proto::v1::RefusedKeys { incarnation: 1, ..restored(99, &[7], &[1]) };
        refused.take(&stale).unwrap();
        assert_eq!(keys(&refused), [1, 2, 4, 7], "an old directory only adds");
        refused.take(&restored(11, &[4], &[1])).unwrap();
        assert_eq!(keys(&load()), [2, 4]);
        assert!(!refuses(&refused, 1) && refuses(&refused, 2) && refuses(&refused, 4));
        // It may be shut out again, and a second restore does not forget that.
        refused.take(&restored(12, &[1, 4], &[])).unwrap();
        let third = us_proto::v1::RefusedKeys { incarnation: 3, ..list(1, &[]) };
        refused.take(&third).unwrap();
        assert_eq!(keys(&load()), [1, 2, 4]);
        assert!(refuses(&load(), 2));
    }

    /// The first version of the file is read: its incarnation is that of the next list.
    #[test]
    fn the_file_from_before_incarnations_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = b"UsRefu\x01\x00".to_vec();
        bytes.extend_from_slice(&[6, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        bytes.extend_from_slice(&[9; 32]);
        std::fs::write(dir.path().join("refused"), seal(bytes)).unwrap();
        let mut refused = RefusedList::load(MembershipFiles::new(dir.path())).unwrap();
        assert!(refuses(&refused, 9));
        refused.take(&list(6, &[8])).unwrap();
        assert_eq!(keys(&refused), [8], "it is the same directory's");
    }

    proptest::proptest! {
        #[test]
        fn a_list_comes_back_and_other_bytes_do_not(
            numbers: [u64; 2], all: std::collections::BTreeSet<u8>, split: u8, at: usize, noise: Vec<u8>,
        ) {
            let hash = |byte: &u8| KeyHash::from_bytes([*byte; 32]);
            let (inherited, keys) = all.iter().partition::<Vec<u8>, _>(|byte| **byte < split);
            let [incarnation, version] = numbers;
            let keys = keys.iter().map(hash).collect();
            let inherited = inherited.iter().map(hash).collect();
            let refused = Refused { incarnation, version, keys, inherited };
            let mut bytes = encode_refused(&refused);
            proptest::prop_assert_eq!(decode_refused(&bytes), Some(refused));
            let at = at % bytes.len();
            bytes[at] ^= 1;
            proptest::prop_assert_eq!(decode_refused(&bytes), None);
            let _ = decode_refused(&noise);
        }
    }
}
