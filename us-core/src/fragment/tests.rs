//! Every record reads back; every flipped bit, every cut and every mix-up is seen.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::*;
use crate::geometry::{BlockGeometry, Code};
use crate::ids::{Birth, BlockId, VolumeId};

/// Geometries of every page size, with full and short last pages.
fn geometries() -> impl Strategy<Value = BlockGeometry> {
    (1usize..8, 0usize..5, 0usize..3, 1usize..200_000).prop_map(|(s, r, page, bytes)| {
        let code = Code::new(s, r).unwrap();
        let page_bytes = crate::geometry::PAGE_SIZES[page];
        BlockGeometry::with_page(code, bytes.min(code.block_bytes_max()), page_bytes).unwrap()
    })
}

fn kinds() -> impl Strategy<Value = FingerprintKind> {
    prop_oneof![Just(FingerprintKind::Crc32c), Just(FingerprintKind::Blake3)]
}

/// The records of a block with made-up bodies.
fn block(kind: FingerprintKind, geometry: BlockGeometry, seed: u8) -> Vec<FragmentRecord> {
    let body = |index: usize| {
        let bytes = 0..geometry.fragment_bytes();
        bytes.map(|at| (at * 31 + index * 7 + (at >> 8)) as u8 ^ seed).collect::<Vec<u8>>().into()
    };
    records_of_block(
        kind,
        VolumeId::from_bytes([1; 16]),
        BlockId::from_bytes([2; 16]),
        Birth(3),
        geometry,
        (0..geometry.code().fragments()).map(body).collect(),
    )
}

fn bytes_of(record: &FragmentRecord) -> Bytes {
    record.to_parts().slices().concat().into()
}

/// What a reader that checks everything says of these bytes.
fn read(bytes: Bytes) -> Result<FragmentRecord, FragmentError> {
    let record = FragmentRecord::decode(bytes)?;
    record.verify_body()?;
    Ok(record)
}

fn small_of(kind: FingerprintKind) -> FragmentRecord {
    let geometry = BlockGeometry::new(Code::new(2, 1).unwrap(), 10_000).unwrap();
    block(kind, geometry, 0).swap_remove(1)
}

fn small() -> FragmentRecord {
    small_of(FingerprintKind::Crc32c)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn records_read_back(kind in kinds(), geometry in geometries(), seed: u8) {
        let records = block(kind, geometry, seed);
        let hash = records[0].trailer.fingerprints.hash();
        for (index, record) in records.iter().enumerate() {
            let bytes = bytes_of(record);
            prop_assert_eq!(bytes.len(), record.header.record_bytes());
            let read = read(bytes).unwrap();
            prop_assert_eq!(&read, record);
            prop_assert_eq!(read.header.id().index as usize, index);
            prop_assert_eq!(read.trailer.fingerprints.hash(), hash);
            prop_assert_eq!(read.trailer.fingerprints.check(index as u8, &record.body), Ok(()));
        }
    }

    #[test]
    fn any_flipped_bit_is_seen(kind in kinds(), at: prop::sample::Index, bit in 0u8..8) {
        let mut bytes = BytesMut::from(&bytes_of(&small_of(kind))[..]);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(read(bytes.freeze()).is_err());
    }

    #[test]
    fn any_cut_is_seen(kind in kinds(), at: prop::sample::Index) {
        let bytes = bytes_of(&small_of(kind));
        let cut = bytes.slice(..at.index(bytes.len()));
        let is_cut = matches!(read(cut), Err(FragmentError::Length { .. }));
        prop_assert!(is_cut);
    }

    #[test]
    fn slots_are_checked_by_themselves(geometry in geometries(), at: prop::sample::Index) {
        let record = block(FingerprintKind::Blake3, geometry, 9).swap_remove(0);
        let (slot, slot_bytes) = (at.index(geometry.fragment_slots()), geometry.slot_bytes());
        let start = slot * slot_bytes;
        let mut bytes = record.body[start..start + slot_bytes].to_vec();
        prop_assert_eq!(record.verify_slots(slot, &bytes), Ok(()));
        prop_assert_eq!(record.verify_slots(slot, &record.body[start..]), Ok(()));
        bytes[slot_bytes / 2] ^= 1;
        let error = record.verify_slots(slot, &bytes);
        let is_this_slot = matches!(
            error,
            Err(FragmentError::SlotSum { slot: damaged, .. }) if damaged == slot
        );
        prop_assert!(is_this_slot, "{:?}", error);
    }
}

#[test]
fn every_bit_of_header_and_trailer_counts() {
    for kind in [FingerprintKind::Crc32c, FingerprintKind::Blake3] {
        every_bit_counts(&small_of(kind));
    }
}

fn every_bit_counts(record: &FragmentRecord) {
    let parts = record.to_parts();
    for at in 0..HEADER_BYTES * 8 {
        let mut header = parts.header;
        header[at / 8] ^= 1 << (at % 8);
        assert!(FragmentHeader::decode(&header).is_err(), "bit {at}");
    }
    for at in 0..parts.trailer.len() * 8 {
        let mut trailer = parts.trailer.to_vec();
        trailer[at / 8] ^= 1 << (at % 8);
        assert!(FragmentTrailer::decode(&record.header, &trailer).is_err(), "bit {at}");
    }
}

/// A header whose sum is right but whose content no writer makes.
fn forged(change: impl FnOnce(&mut [u8; HEADER_BYTES])) -> Result<FragmentHeader, FragmentError> {
    let mut bytes = small().header.encode();
    change(&mut bytes);
    let sum = crc32c(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
    FragmentHeader::decode(&bytes)
}

#[test]
fn impossible_headers_are_refused() {
    use FragmentError as E;
    assert!(forged(|_| ()).is_ok());
    assert!(matches!(forged(|bytes| bytes[0] = b'X'), Err(E::Magic { .. })));
    assert!(matches!(forged(|bytes| bytes[8] = 2), Err(E::Version { found: 2 })));
    assert!(matches!(forged(|bytes| bytes[10] = 1), Err(E::Reserved)));
    assert!(matches!(forged(|bytes| bytes[100] = 1), Err(E::Reserved)));
    assert!(matches!(forged(|bytes| bytes[12] = 3), Err(E::Index { index: 3, fragments: 3 })));
    assert!(matches!(forged(|bytes| bytes[13] = 0), Err(E::Geometry(_))));
    assert!(matches!(forged(|bytes| bytes[15] = 9), Err(E::FingerprintKind { found: 9 })));
    assert!(matches!(forged(|bytes| bytes[57] = 0), Err(E::Geometry(_))));
    assert!(matches!(forged(|bytes| bytes[60..64].fill(255)), Err(E::Geometry(_))));
    assert!(matches!(forged(|bytes| bytes[64] ^= 1), Err(E::Length { part: "body", .. })));
    assert!(matches!(forged(|bytes| bytes[68] ^= 1), Err(E::Length { part: "trailer", .. })));
}

#[test]
fn a_neighbours_body_is_refused() {
    let geometry = BlockGeometry::new(Code::new(2, 1).unwrap(), 10_000).unwrap();
    let mut records = block(FingerprintKind::Crc32c, geometry, 0);
    let other = records.swap_remove(0);
    let mine = &mut records[0];
    mine.body = other.body.clone();
    assert!(matches!(mine.verify_body(), Err(FragmentError::SlotSum { slot: 0, .. })));
    mine.trailer.slot_sums = other.trailer.slot_sums;
    let index = mine.header.id().index;
    assert_eq!(mine.verify_body(), Err(FragmentError::Fingerprint { index }));
}

#[test]
fn slots_outside_the_fragment_are_refused() {
    let record = small();
    let slots = record.header.slots();
    let error = record.verify_slots(slots, &record.body[..record.header.geometry().slot_bytes()]);
    assert!(matches!(error, Err(FragmentError::NoSuchSlot { .. })));
    let error = record.verify_slots(usize::MAX, &record.body);
    assert!(matches!(error, Err(FragmentError::NoSuchSlot { .. })));
    let error = record.verify_slots(0, &record.body[1..]);
    assert!(matches!(error, Err(FragmentError::Length { part: "slots", .. })));
}

#[test]
fn decoding_shares_the_body() {
    let bytes = bytes_of(&small());
    let record = FragmentRecord::decode(bytes.clone()).unwrap();
    assert_eq!(record.body.as_ptr(), bytes[HEADER_BYTES..].as_ptr());
}

#[test]
fn fingerprint_hash_covers_kind_count_and_list() {
    let list = FingerprintList::of_crcs([1, 2]);
    let digest =
        aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &[1, 2, 1, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!(list.hash(), digest.as_ref());
    assert_ne!(list.hash(), FingerprintList::of_crcs([1, 2, 0]).hash());
    assert_eq!(list.get(2), None);
    assert!(list.check(2, b"").is_err());
}

/// Adds the polynomial of CRC-32C, which no sum of that kind sees.
fn forge(body: &Bytes) -> Bytes {
    let mut bytes = body.to_vec();
    let unseen = (1u64 | 0x82f6_3b78 << 1).to_le_bytes();
    bytes[16..24].iter_mut().zip(unseen).for_each(|(to, bits)| *to ^= bits);
    assert_eq!(crc32c(&bytes), crc32c(body), "the forgery is not seen");
    bytes.into()
}

#[test]
fn a_forged_sum_passes_the_old_fingerprint_and_not_the_new_one() {
    for (kind, is_seen) in [(FingerprintKind::Crc32c, false), (FingerprintKind::Blake3, true)] {
        let right = small_of(kind);
        let forged = FragmentRecord { body: forge(&right.body), ..right.clone() };
        // Accidents are what a store looks for; this is none.
        assert_eq!(forged.verify_body(), Ok(()));
        let (index, list) = (right.header.id().index, right.trailer.fingerprints.clone());
        let refused = Err(FragmentError::Fingerprint { index });
        let expected = if is_seen { refused.clone() } else { Ok(()) };
        assert_eq!(list.check(index, &forged.body), expected, "{kind:?}");
        let rebuilt = FragmentRecord::rebuilt(right.header, forged.body, list.clone());
        assert_eq!(rebuilt.map(|_| ()), expected, "{kind:?}");
        assert_eq!(FragmentRecord::rebuilt(right.header, right.body.clone(), list), Ok(right));
    }
}

#[test]
fn fingerprints_are_the_beginning_of_blake3() {
    let record = small_of(FingerprintKind::Blake3);
    let hash = blake3::hash(&record.body);
    let list = &record.trailer.fingerprints;
    assert_eq!(list.get(record.header.id().index), Some(&hash.as_bytes()[..16]));
    assert_eq!((list.kind() as u8, list.as_bytes().len()), (2, 3 * 16));
}
