//! What was sealed opens at its place and nowhere else.

use proptest::prelude::*;
use zeroize::Zeroizing;

use super::*;

fn key() -> NameKey {
    NameKey::new(&VolumeKey::from_bytes(Zeroizing::new([9; KEY_BYTES])))
}

fn flip(bytes: &mut [u8], bit: &prop::sample::Index) {
    let bit = bit.index(bytes.len() * 8);
    bytes[bit / 8] ^= 1 << (bit % 8);
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 1..=NAME_BYTES_MAX)
}

proptest! {
    #[test]
    fn names(dir: u64, name in name(), bit: prop::sample::Index) {
        let (key, dir) = (key(), Ino(dir));
        let hash = key.name_hash(dir, &name);
        let mut sealed = key.seal_name(dir, &name).unwrap();
        prop_assert_eq!(&sealed, &key.seal_name(dir, &name).unwrap());
        prop_assert_eq!(key.open_name(dir, &hash, &sealed), Ok(name));
        let tampered = Err(NameError::Tampered { kind: NameKind::Name, ino: dir });
        for at in [0, 11, 12, 15] {
            let mut other = hash;
            other[at] ^= 1;
            prop_assert_eq!(key.open_name(dir, &other, &sealed), tampered.clone());
        }
        prop_assert!(key.open_name(Ino(!dir.0), &hash, &sealed).is_err());
        prop_assert!(key.open_name(dir, &hash, &sealed[1..]).is_err());
        flip(&mut sealed, &bit);
        prop_assert_eq!(key.open_name(dir, &hash, &sealed), tampered);
    }

    #[test]
    fn targets(
        ino: u64,
        target in prop::collection::vec(any::<u8>(), 1..=TARGET_BYTES_MAX),
        bit: prop::sample::Index,
    ) {
        let (key, ino) = (key(), Ino(ino));
        let mut sealed = key.seal_target(ino, &target).unwrap();
        prop_assert_eq!(key.open_target(ino, &sealed), Ok(target));
        let tampered = Err(NameError::Tampered { kind: NameKind::Target, ino });
        prop_assert!(key.open_target(Ino(!ino.0), &sealed).is_err());
        prop_assert!(key.open_target(ino, &sealed[..sealed.len() - 1]).is_err());
        flip(&mut sealed, &bit);
        prop_assert_eq!(key.open_target(ino, &sealed), tampered);
    }

    #[test]
    fn xattrs(
        ino: u64,
        name in name(),
        value in prop::collection::vec(any::<u8>(), 0..2000),
        bit: prop::sample::Index,
    ) {
        let (key, ino) = (key(), Ino(ino));
        let hash = key.xattr_hash(ino, &name);
        let mut sealed = key.seal_xattr(ino, &name, &value).unwrap();
        prop_assert_ne!(&sealed, &key.seal_xattr(ino, &name, &value).unwrap());
        prop_assert_eq!(sealed.len(), sealed_xattr_bytes(name.len(), value.len()));
        prop_assert_eq!(key.open_xattr(ino, &hash, &sealed), Ok(Xattr { name, value }));
        let tampered = Err(NameError::Tampered { kind: NameKind::Xattr, ino });
        prop_assert!(key.open_xattr(Ino(!ino.0), &hash, &sealed).is_err());
        prop_assert_eq!(key.open_xattr(ino, &[0; 16], &sealed), tampered.clone());
        flip(&mut sealed, &bit);
        prop_assert_eq!(key.open_xattr(ino, &hash, &sealed), tampered);
    }
}

#[test]
fn the_uses_of_one_text_never_meet() {
    let key = key();
    let (name, xattr) = (key.name_hash(Ino(5), b"user.a"), key.xattr_hash(Ino(5), b"user.a"));
    assert_ne!(name, xattr);
    assert_ne!(name, key.name_hash(Ino(6), b"user.a"));
    assert_ne!(key.seal_name(Ino(5), b"a").unwrap(), key.seal_name(Ino(6), b"a").unwrap());
    let target = key.seal_target(Ino(5), b"user.a").unwrap();
    assert_ne!(target[..12], name[..12]);
    assert!(key.open_name(Ino(5), &name, &target[12..]).is_err());
}

#[test]
fn another_volume_opens_nothing() {
    let (key, other) = (key(), NameKey::new(&VolumeKey::generate()));
    let hash = key.name_hash(Ino::ROOT, b"a");
    assert_ne!(hash, other.name_hash(Ino::ROOT, b"a"));
    let sealed = key.seal_name(Ino::ROOT, b"a").unwrap();
    assert!(other.open_name(Ino::ROOT, &hash, &sealed).is_err());
}

#[test]
fn lengths_are_bounded() {
    let key = key();
    let too_long =
        |result: Result<Vec<u8>, NameError>| matches!(result, Err(NameError::Length { .. }));
    assert!(too_long(key.seal_name(Ino(1), b"")));
    assert!(too_long(key.seal_name(Ino(1), &[b'a'; NAME_BYTES_MAX + 1])));
    assert!(too_long(key.seal_target(Ino(1), b"")));
    assert!(too_long(key.seal_target(Ino(1), &[b'a'; TARGET_BYTES_MAX + 1])));
    assert!(too_long(key.seal_xattr(Ino(1), b"", b"")));
    assert!(too_long(key.seal_xattr(Ino(1), &[b'a'; XATTR_NAME_BYTES_MAX + 1], b"")));
    assert!(too_long(key.seal_xattr(Ino(1), b"a", &[0; XATTR_VALUE_BYTES_MAX + 1])));
    assert!(too_long(key.open_name(Ino(1), &[0; 16], &[0; TAG_BYTES])));
    assert!(too_long(key.open_target(Ino(1), &[0; 28])));
    let most = [b'a'; XATTR_NAME_BYTES_MAX];
    let value = vec![1; XATTR_VALUE_BYTES_MAX];
    let sealed = key.seal_xattr(Ino(1), &most, &value).unwrap();
    let opened = key.open_xattr(Ino(1), &key.xattr_hash(Ino(1), &most), &sealed);
    assert_eq!(opened, Ok(Xattr { name: most.to_vec(), value }));
}

/// The fuzzer cannot reach what lies behind a seal, so this decoder is tried here.
#[test]
fn what_an_xattr_seals_is_split_without_trust() {
    let split = |opened: &[u8]| split_xattr(opened).map(|xattr| (xattr.name, xattr.value));
    assert_eq!(split(b""), None);
    assert_eq!(split(b"\x02a"), None);
    assert_eq!(split(b"\x02ab"), Some((b"ab".to_vec(), b"".to_vec())));
    assert_eq!(split(b"\x01abc"), Some((b"a".to_vec(), b"bc".to_vec())));
}
