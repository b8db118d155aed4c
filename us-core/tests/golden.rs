//! The formats never change under stored bytes: samples in tests/golden/ load for ever.
//!
//! Each sample was written once by the first version of its format. What a format makes from given
//! inputs is made again and compared byte by byte; what begins with fresh randomness is opened. A
//! failure here means that stored volumes would no longer load: give the format a new version
//! instead, and keep the old one's decoder and its sample.
//!
//! A new format gets its sample by `US_WRITE_SAMPLES=1 cargo test -p us-core --test golden`, which
//! writes what is missing and never overwrites.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use bytes::Bytes;
use us_core::code::ErasureCode;
use us_core::fragment::{FingerprintKind, FragmentHeader, FragmentRecord, records_of_block};
use us_core::geometry::{BlockGeometry, Code};
use us_core::ids::{Birth, BlockId, Ino, VolumeId};
use us_core::keyring::{Cost, KeyRing, NewSlot, RecoveryKey, SlotSecret};
use us_core::name::{NameHash, NameKey, Xattr};
use us_core::seal::{BlockOpener, BlockSealer, FreshBlockId, KEY_BYTES, VolumeKey};

const DIR: Ino = Ino(0x0102_0304_0506_0708);
const INO: Ino = Ino(0x1112_1314_1516_1718);
const NAME: &[u8] = "naïve.txt".as_bytes();
const TARGET: &[u8] = b"../some/where";
const XATTR: &[u8] = b"user.comment";
const VALUE: &[u8] = b"a value\0with a NUL";
const BIRTH: Birth = Birth(0x2122_2324_2526_2728);

fn volume_key() -> VolumeKey {
    VolumeKey::from_bytes([0x42; KEY_BYTES].into())
}

fn volume() -> VolumeId {
    VolumeId::from_bytes(*b"golden volume id")
}

/// 2+1, four pages of 4 KiB of which the last is short, two slots a fragment.
fn geometry() -> BlockGeometry {
    BlockGeometry::with_page(Code::new(2, 1).unwrap(), 13_000, 4096).unwrap()
}

fn plaintext(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at % 251) as u8).collect()
}

fn path(sample: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(sample)
}

fn load(sample: &str) -> Vec<u8> {
    std::fs::read(path(sample)).unwrap_or_else(|error| panic!("golden sample {sample}: {error}"))
}

/// The samples of fragment records, with the kind of their fingerprints.
const RECORDS: [(&str, FingerprintKind); 2] =
    [("fragments-1.bin", FingerprintKind::Crc32c), ("fragments-2.bin", FingerprintKind::Blake3)];

/// The records of `fragments-1.bin`.
fn records() -> Vec<FragmentRecord> {
    records_in("fragments-1.bin")
}

/// The records of a sample, split by what their headers say.
fn records_in(sample: &str) -> Vec<FragmentRecord> {
    let mut bytes = Bytes::from(load(sample));
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let record_bytes = FragmentHeader::decode(&bytes).unwrap().record_bytes();
        records.push(FragmentRecord::decode(bytes.split_to(record_bytes)).unwrap());
    }
    records
}

/// The lines `key hexadecimal` of `seals-1.txt`.
fn seals() -> BTreeMap<String, Vec<u8>> {
    let text = String::from_utf8(load("seals-1.txt")).unwrap();
    let byte =
        |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.split_once(' ').unwrap())
        .map(|(key, hex)| (key.to_owned(), hex.as_bytes().chunks(2).map(byte).collect()))
        .collect()
}

fn hash(bytes: &[u8]) -> NameHash {
    bytes.try_into().unwrap()
}

#[test]
fn fragment_records_load_and_are_made_the_same() {
    for (sample, kind) in RECORDS {
        let records = records_in(sample);
        assert_eq!(records.len(), 3);
        let block = records[0].header.id().block;
        for (index, record) in records.iter().enumerate() {
            record.verify_body().unwrap();
            record.trailer.fingerprints.check(index as u8, &record.body).unwrap();
            assert_eq!(record.header.fingerprint_kind(), kind);
            assert_eq!(record.header.volume(), volume());
            assert_eq!(record.header.birth(), BIRTH);
            assert_eq!(record.header.geometry(), geometry());
            assert_eq!((record.header.id().block, record.header.id().index), (block, index as u8));
        }
        let bodies = records.iter().map(|record| record.body.clone()).collect();
        let again = records_of_block(kind, volume(), block, BIRTH, geometry(), bodies);
        assert!(bytes_of(&again) == load(sample), "{sample}: the record format changed");
    }
    let hash = records()[0].trailer.fingerprints.hash();
    assert_eq!(hash[..], seals()["fingerprint-list-hash"]);
}

fn bytes_of(records: &[FragmentRecord]) -> Vec<u8> {
    records.iter().flat_map(|record| record.to_parts().slices().concat()).collect()
}

#[test]
fn sealed_pages_open_and_parity_follows() {
    let records = records();
    let opener = BlockOpener::new(&volume_key(), volume(), records[0].header.id().block);
    let geometry = geometry();
    let mut opened = Vec::new();
    for page in 0..geometry.pages() {
        let (fragment, slot) = geometry.locate_page(page);
        let start = slot * geometry.slot_bytes();
        let slot = &records[fragment].body[start..start + geometry.slot_bytes()];
        let mut plain = vec![0; geometry.page_plaintext_bytes(page)];
        opener.open_page_into(&geometry, page, slot, &mut plain).unwrap();
        opened.extend(plain);
    }
    assert!(opened == plaintext(geometry.plaintext_bytes()), "the seal changed");

    let mut parity = vec![0; geometry.fragment_bytes()];
    ErasureCode::new(geometry.code())
        .encode(&[&records[0].body, &records[1].body], &mut [&mut parity])
        .unwrap();
    assert!(parity == records[2].body, "the code changed");
}

#[test]
fn inline_blocks_open() {
    let seals = seals();
    let block = BlockId::from_slice(&seals["inline-block"]).unwrap();
    let opener = BlockOpener::new(&volume_key(), volume(), block);
    assert_eq!(opener.open_inline(&seals["inline"]), Ok(plaintext(100)));
}

#[test]
fn names_are_made_the_same_and_open() {
    let (seals, key) = (seals(), NameKey::new(&volume_key()));
    let name_hash = hash(&seals["name-hash"]);
    assert_eq!(key.name_hash(DIR, NAME), name_hash);
    assert_eq!(key.seal_name(DIR, NAME).unwrap(), seals["name"]);
    assert_eq!(key.open_name(DIR, &name_hash, &seals["name"]).unwrap(), NAME);
    assert_eq!(key.seal_target(INO, TARGET).unwrap(), seals["target"]);
    assert_eq!(key.open_target(INO, &seals["target"]).unwrap(), TARGET);
    let xattr_hash = hash(&seals["xattr-hash"]);
    assert_eq!(key.xattr_hash(INO, XATTR), xattr_hash);
    let opened = key.open_xattr(INO, &xattr_hash, &seals["xattr"]).unwrap();
    assert_eq!(opened, Xattr { name: XATTR.to_vec(), value: VALUE.to_vec() });
}

/// A secret of each kind, as the sample's slots were made with.
fn slot_secrets() -> [SlotSecret; 3] {
    [
        SlotSecret::Passphrase(b"golden passphrase".to_vec().into()),
        SlotSecret::KeyFile([0x43; KEY_BYTES].into()),
        SlotSecret::Recovery(RecoveryKey::from_bytes([0x44; 22].into())),
    ]
}

#[test]
fn a_key_ring_loads_and_opens() {
    let bytes = load("keyring-1.bin");
    let ring = KeyRing::decode(&bytes).unwrap();
    assert_eq!(ring.encode(), bytes);
    assert_eq!(ring.volume(), volume());
    for (at, secret) in slot_secrets().iter().enumerate() {
        let (key, slot) = ring.open(secret).unwrap();
        assert_eq!((key.expose(), slot), (&[0x42; KEY_BYTES], at as u32 + 1));
        assert_eq!(ring.slots()[at].label(), "golden");
    }
    let text = "8H248-H248H-248H2-48H24-8H248-H248H-248H2-4SP1M";
    let key = RecoveryKey::from_bytes([0x44; 22].into());
    assert_eq!(key.to_text().as_str(), text, "the text of a recovery key changed");
}

/// Writes a sample unless it is there.
fn write_missing(sample: &str, bytes: &[u8]) {
    let path = path(sample);
    if !path.exists() {
        std::fs::write(&path, bytes).unwrap();
    }
}

#[test]
fn write_missing_samples() {
    if std::env::var_os("US_WRITE_SAMPLES").is_none() {
        return;
    }
    let (key, geometry) = (volume_key(), geometry());
    let mut sealed = vec![0; geometry.code().s() * geometry.fragment_bytes()];
    let sealer = BlockSealer::new(&key, volume(), FreshBlockId::generate());
    let plain = plaintext(geometry.plaintext_bytes());
    let block = sealer.seal_block(&geometry, &[&plain], &mut sealed).unwrap();
    let mut parity = vec![0; geometry.fragment_bytes()];
    let data: Vec<&[u8]> = sealed.chunks(geometry.fragment_bytes()).collect();
    ErasureCode::new(geometry.code()).encode(&data, &mut [&mut parity]).unwrap();
    let mut bodies: Vec<Bytes> = data.into_iter().map(Bytes::copy_from_slice).collect();
    bodies.push(parity.into());
    for (sample, kind) in RECORDS {
        let bodies = bodies.clone();
        let records = records_of_block(kind, volume(), block, BIRTH, geometry, bodies);
        write_missing(sample, &bytes_of(&records));
    }

    let sealer = BlockSealer::new(&key, volume(), FreshBlockId::generate());
    let inline_block = sealer.block();
    let inline = sealer.seal_inline(&[&plaintext(100)]).unwrap();
    let names = NameKey::new(&key);
    let lines: [(&str, &[u8]); 8] = [
        ("fingerprint-list-hash", &records_hash()),
        ("inline-block", inline_block.as_bytes()),
        ("inline", &inline),
        ("name-hash", &names.name_hash(DIR, NAME)),
        ("name", &names.seal_name(DIR, NAME).unwrap()),
        ("target", &names.seal_target(INO, TARGET).unwrap()),
        ("xattr-hash", &names.xattr_hash(INO, XATTR)),
        ("xattr", &names.seal_xattr(INO, XATTR, VALUE).unwrap()),
    ];
    let mut text = String::from("# Made and explained by us-core/tests/golden.rs\n");
    for (key, bytes) in lines {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        writeln!(text, "{key} {hex}").unwrap();
    }
    write_missing("seals-1.txt", text.as_bytes());

    let mut ring = KeyRing::new(volume());
    // A golden ring is to be opened, not kept safe.
    let cost = Cost { memory_kib: 64, passes: 1, lanes: 1 };
    for secret in &slot_secrets() {
        let slot = NewSlot { secret, label: "golden", cost, unix_s: 1_700_000_000 };
        ring.add(&key, &slot).unwrap();
    }
    write_missing("keyring-1.bin", &ring.encode());
}

/// The hash of the stored records' fingerprint list.
fn records_hash() -> [u8; 32] {
    records()[0].trailer.fingerprints.hash()
}
