//! What was sealed opens; nothing else does.

use proptest::prelude::*;
use zeroize::Zeroizing;

use super::*;
use crate::geometry::{BlockGeometry, Code, PAGE_SIZES, TAG_BYTES};
use crate::ids::{BlockId, VolumeId};

fn key() -> VolumeKey {
    VolumeKey::from_bytes(Zeroizing::new([7; KEY_BYTES]))
}

fn volume() -> VolumeId {
    VolumeId::from_bytes([1; 16])
}

fn sealer() -> BlockSealer {
    BlockSealer::new(&key(), volume(), FreshBlockId::generate())
}

fn opener(block: BlockId) -> BlockOpener {
    BlockOpener::new(&key(), volume(), block)
}

fn plaintext(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 7 + (at >> 9)) as u8).collect()
}

fn seal(geometry: &BlockGeometry, slices: &[&[u8]]) -> (BlockId, Vec<u8>) {
    let mut sealed = vec![0xee; geometry.code().s() * geometry.fragment_bytes()];
    let block = sealer().seal_block(geometry, slices, &mut sealed).unwrap();
    (block, sealed)
}

/// The slot of `page`, found by the geometry and not by what the sealer believes.
fn slot<'a>(geometry: &BlockGeometry, sealed: &'a [u8], page: usize) -> &'a [u8] {
    let (fragment, slot) = geometry.locate_page(page);
    let start = fragment * geometry.fragment_bytes() + slot * geometry.slot_bytes();
    &sealed[start..start + geometry.slot_bytes()]
}

fn geometries() -> impl Strategy<Value = BlockGeometry> {
    (1usize..12, 0usize..4, 0usize..3, 1usize..300_000).prop_map(|(s, r, page, bytes)| {
        let code = Code::new(s, r).unwrap();
        BlockGeometry::with_page(code, bytes.min(code.block_bytes_max()), PAGE_SIZES[page]).unwrap()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn blocks_of_every_geometry_open(
        geometry in geometries(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let plain = plaintext(geometry.plaintext_bytes());
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(plain.len())).collect();
        cuts.extend([0, plain.len()]);
        cuts.sort_unstable();
        let slices: Vec<&[u8]> = cuts.windows(2).map(|ends| &plain[ends[0]..ends[1]]).collect();
        let (block, sealed) = seal(&geometry, &slices);

        let opener = opener(block);
        let mut opened = Vec::new();
        for page in 0..geometry.pages() {
            let slot = slot(&geometry, &sealed, page);
            let bytes = geometry.page_plaintext_bytes(page);
            prop_assert!(slot[bytes + TAG_BYTES..].iter().all(|byte| *byte == 0));
            let mut in_place = slot[..bytes + TAG_BYTES].to_vec();
            let mut apart = vec![0; bytes];
            opener.open_page_into(&geometry, page, slot, &mut apart).unwrap();
            let in_place = opener.open_page(&geometry, page, &mut in_place).unwrap();
            prop_assert_eq!(&*in_place, &apart[..]);
            opened.extend(apart);
        }
        prop_assert!(opened == plain);
        let padding = &sealed[geometry.pages() * geometry.slot_bytes()..];
        prop_assert!(padding.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn any_flipped_bit_is_seen(
        bytes in 1usize..20_000, page: prop::sample::Index, bit: prop::sample::Index,
    ) {
        let geometry = BlockGeometry::new(Code::new(2, 1).unwrap(), bytes).unwrap();
        let (block, sealed) = seal(&geometry, &[&plaintext(bytes)]);
        let page = page.index(geometry.pages());
        let page_bytes = geometry.page_plaintext_bytes(page);
        let mut slot = slot(&geometry, &sealed, page)[..page_bytes + TAG_BYTES].to_vec();
        let bit = bit.index(slot.len() * 8);
        slot[bit / 8] ^= 1 << (bit % 8);
        let tampered = SealError::PageTampered { block, page };
        let mut apart = vec![1; page_bytes];
        let opener = opener(block);
        prop_assert_eq!(
            opener.open_page_into(&geometry, page, &slot, &mut apart),
            Err(tampered)
        );
        prop_assert_eq!(opener.open_page(&geometry, page, &mut slot), Err(tampered));
        prop_assert!(apart.iter().chain(&slot[..page_bytes]).all(|byte| *byte == 0));
    }

    #[test]
    fn inline_data_opens_and_guards_itself(
        data in prop::collection::vec(any::<u8>(), 1..3000), bit: prop::sample::Index,
    ) {
        let sealer = sealer();
        let opener = opener(sealer.block());
        let middle = data.len() / 2;
        let mut sealed = sealer.seal_inline(&[&data[..middle], &data[middle..]]).unwrap();
        prop_assert_eq!(sealed.len(), data.len() + TAG_BYTES);
        prop_assert_eq!(opener.open_inline(&sealed), Ok(data));
        let cut = opener.open_inline(&sealed[..sealed.len() - 1]);
        prop_assert!(cut.is_err());
        let bit = bit.index(sealed.len() * 8);
        sealed[bit / 8] ^= 1 << (bit % 8);
        let tampered = SealError::InlineTampered { block: opener.block() };
        prop_assert_eq!(opener.open_inline(&sealed), Err(tampered));
    }
}

#[test]
fn another_place_key_or_volume_does_not_open() {
    let geometry = BlockGeometry::new(Code::new(2, 1).unwrap(), 16_384).unwrap();
    let (block, sealed) = seal(&geometry, &[&plaintext(16_384)]);
    let open = |opener: BlockOpener, page: usize, from: usize| {
        let mut slot = slot(&geometry, &sealed, from).to_vec();
        opener.open_page(&geometry, page, &mut slot).map(|_| ())
    };
    assert_eq!(open(opener(block), 1, 1), Ok(()));

    assert_eq!(open(opener(block), 0, 1), Err(SealError::PageTampered { block, page: 0 }));
    let other = BlockId::generate();
    let tampered = Err(SealError::PageTampered { block: other, page: 1 });
    assert_eq!(open(opener(other), 1, 1), tampered);
    let tampered = Err(SealError::PageTampered { block, page: 1 });
    let other_volume = VolumeId::from_bytes([2; 16]);
    assert_eq!(open(BlockOpener::new(&key(), other_volume, block), 1, 1), tampered);
    assert_eq!(open(BlockOpener::new(&VolumeKey::generate(), volume(), block), 1, 1), tampered);
}

#[test]
fn wrong_lengths_are_refused() {
    let geometry = BlockGeometry::new(Code::new(2, 1).unwrap(), 9000).unwrap();
    let mut sealed = vec![0; 2 * geometry.fragment_bytes()];
    let plain = plaintext(9001);
    let error = sealer().seal_block(&geometry, &[&plain], &mut sealed);
    let expected = SealError::Length { what: "plaintext", expected: 9000, found: 9001 };
    assert_eq!(error, Err(expected));
    let error = sealer().seal_block(&geometry, &[&plain[..9000]], &mut sealed[1..]);
    assert!(matches!(error, Err(SealError::Length { what: "sealed block", .. })));

    let (block, mut sealed) = seal(&geometry, &[&plain[..9000]]);
    let (opener, slot_bytes) = (opener(block), geometry.slot_bytes());
    let mut open =
        |page, bytes| opener.open_page(&geometry, page, &mut sealed[..bytes]).map(|_| ());
    assert!(matches!(open(0, slot_bytes - 1), Err(SealError::Length { what: "slot", .. })));
    assert!(matches!(open(0, slot_bytes + 1), Err(SealError::Length { what: "slot", .. })));
    assert_eq!(open(3, slot_bytes), Err(SealError::NoSuchPage { block, page: 3, pages: 2 }));
    assert_eq!(open(0, slot_bytes), Ok(()));

    assert_eq!(sealer().seal_inline(&[]), Err(SealError::InlineBytes { bytes: 0 }));
    let bytes = INLINE_BYTES_MAX + 1;
    assert_eq!(sealer().seal_inline(&[&plaintext(bytes)]), Err(SealError::InlineBytes { bytes }));
    assert_eq!(opener.open_inline(&[0; TAG_BYTES]), Err(SealError::InlineBytes { bytes: 0 }));
}

/// The bytes are those the format promises, computed here from the primitives alone.
#[test]
fn pages_are_plain_aes_gcm() {
    use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    use aws_lc_rs::hmac::{self, HMAC_SHA256};

    let geometry = BlockGeometry::new(Code::new(2, 0).unwrap(), 5000).unwrap();
    let (block, sealed) = seal(&geometry, &[&plaintext(5000)]);
    // RFC 5869: extract with a salt of zeros, then one round of expand.
    let extracted = hmac::sign(&hmac::Key::new(HMAC_SHA256, &[0; 32]), &[7; 32]);
    let info = [b"us block 1", &block.as_bytes()[..], &[1]].concat();
    let block_key = hmac::sign(&hmac::Key::new(HMAC_SHA256, extracted.as_ref()), &info);
    let aead = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, block_key.as_ref()).unwrap());
    let aad = [*block.as_bytes(), *volume().as_bytes()].concat();
    let mut nonce = [0; 12];
    nonce[0] = 1;
    let mut page = plaintext(5000).split_off(4096);
    let nonce = Nonce::assume_unique_for_key(nonce);
    aead.seal_in_place_append_tag(nonce, Aad::from(aad), &mut page).unwrap();
    assert_eq!(slot(&geometry, &sealed, 1)[..page.len()], page);
}

#[test]
fn keys_do_not_print() {
    let key = VolumeKey::from_bytes(Zeroizing::new([0xab; KEY_BYTES]));
    assert_eq!(format!("{key:?}"), "VolumeKey(secret)");
    assert_eq!(key.expose(), &[0xab; KEY_BYTES]);
    assert_ne!(VolumeKey::generate().expose(), VolumeKey::generate().expose());
}
