//! What the fuzzer, and the ordinary tests, do with bytes nobody vouches for: one function for each
//! decoder of `us-core`. Each must return, whatever the bytes: no panic, no overflow, no large
//! allocation. What decodes must encode to the same bytes again.
//!
//! `us-core/tests/decoders.rs` runs each over its seeds and random bytes; the targets in
//! `fuzz_targets/` run them under libFuzzer.

use bytes::Bytes;
use us_core::daemon::logging::RequestId;
use us_core::daemon::size::Size;
use us_core::disk::indexed_pages;
use us_core::fragment::{
    FingerprintKind, FingerprintList, FragmentHeader, FragmentRecord, FragmentTrailer,
    HEADER_BYTES, MAGIC, crc32c,
};
use us_core::geometry::{BlockGeometry, Code, PAGE_SIZES};
use us_core::grant::{GRANT_BYTES, Grant};
use us_core::ids::{Birth, BlockId, FragmentId, Ino, VolumeId};
use us_core::keyring::{KeyRing, RecoveryKey};
use us_core::name::NameKey;
use us_core::seal::{BlockOpener, KEY_BYTES, VolumeKey};
use us_core::tls::{CertificateRequest, InviteCode, PeerIdentity, REQUEST_BYTES_MAX};
use us_core::wire::decoders::{look_into, reencode};
use us_core::wire::{FRAME_BYTES_MAX, HEADER_BYTES as FRAME_HEADER_BYTES};

/// A decoder's target, by the name under which its seeds lie in `fuzz/seeds/`.
pub type Target = (&'static str, fn(&[u8]));

/// All targets of this file.
pub const TARGETS: [Target; 13] = [
    ("fragment_header", fragment_header),
    ("fragment_trailer", fragment_trailer),
    ("fragment_record", fragment_record),
    ("sealed_page", sealed_page),
    ("sealed_name", sealed_name),
    ("key_ring", key_ring),
    ("ids", ids),
    ("frame", frame),
    ("tls_record", tls_record),
    ("certificate", certificate),
    ("grant", grant),
    ("texts", texts),
    ("page_index", page_index),
];

/// The index of sealed pages on a mount's disk, beside pages of any length: it never tells of more pages than
/// it has room for.
pub fn page_index(bytes: &[u8]) {
    let pages = indexed_pages(bytes, u64::MAX);
    assert!(pages.is_none_or(|pages| 16 + 16 * pages == bytes.len()));
    if pages.is_some_and(|pages| pages > 0) {
        assert!(indexed_pages(&bytes[1..], u64::MAX).is_none());
    }
}

/// A header as it comes, and once more with magic, version and sum put right, so that the fields
/// behind them are reached.
pub fn fragment_header(bytes: &[u8]) {
    header_of(bytes);
    if let Some(first) = bytes.first_chunk::<HEADER_BYTES>() {
        header_of(&mended_header(*first));
    }
}

fn header_of(bytes: &[u8]) -> Option<FragmentHeader> {
    let header = FragmentHeader::decode(bytes).ok()?;
    assert_eq!(header.encode(), bytes[..HEADER_BYTES]);
    let parts = HEADER_BYTES + header.fragment_bytes() + header.trailer_bytes();
    assert_eq!(header.record_bytes(), parts);
    assert!(usize::from(header.id().index) < header.geometry().code().fragments());
    Some(header)
}

fn mended_header(mut bytes: [u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&[1, 0, 0, 0]);
    bytes[72..124].fill(0);
    let sum = crc32c(&bytes[..124]);
    bytes[124..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// The first bytes choose a geometry, the rest is its trailer: as it comes, and with its sum put
/// right.
pub fn fragment_trailer(bytes: &[u8]) {
    let Some(([s, r, slots, index], rest)) = bytes.split_first_chunk() else { return };
    let Ok(code) = Code::new((*s).into(), (*r).into()) else { return };
    let page_bytes = PAGE_SIZES[2];
    let block_bytes = page_bytes * code.s() * (1 + usize::from(*slots));
    let Ok(geometry) = BlockGeometry::with_page(code, block_bytes, page_bytes) else { return };
    let id = FragmentId { block: BlockId::from_bytes([1; 16]), index: *index };
    let volume = VolumeId::from_bytes([2; 16]);
    for kind in [FingerprintKind::Crc32c, FingerprintKind::Blake3] {
        let Ok(header) = FragmentHeader::new(volume, id, Birth(3), geometry, kind) else { return };
        trailer_of(&header, rest);
        if let Some((content, _)) = rest.split_last_chunk::<4>() {
            trailer_of(&header, &[content, &crc32c(content).to_le_bytes()].concat());
        }
        if let Ok(list) = FingerprintList::decode(kind, code, rest) {
            assert_eq!((list.count(), list.as_bytes()), (code.fragments(), rest));
            assert_eq!(list.get(*index).is_some(), usize::from(*index) < list.count());
            let _ = (list.hash(), list.check(*index, rest));
        }
    }
}

fn trailer_of(header: &FragmentHeader, bytes: &[u8]) {
    let Ok(trailer) = FragmentTrailer::decode(header, bytes) else { return };
    assert_eq!(trailer.encode(header), bytes);
    let slot = vec![0; header.geometry().slot_bytes()];
    for first_slot in [0, header.slots() - 1, header.slots(), usize::MAX] {
        let _ = trailer.verify_slots(header, first_slot, &slot);
    }
    let _ = trailer.verify_body(header, bytes);
}

/// A whole record: as it comes, and with the header's sum put right.
pub fn fragment_record(bytes: &[u8]) {
    record_of(Bytes::copy_from_slice(bytes));
    if let Some((first, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() {
        record_of([&mended_header(*first), rest].concat().into());
    }
}

fn record_of(bytes: Bytes) {
    let Ok(record) = FragmentRecord::decode(bytes.clone()) else { return };
    assert_eq!(record.to_parts().slices().concat(), bytes);
    let _ = record.verify_body();
    let _ = record.verify_slots(0, &bytes);
}

fn volume_key() -> VolumeKey {
    VolumeKey::from_bytes([0x42; KEY_BYTES].into())
}

/// Pages and inline data; the first byte chooses the page.
pub fn sealed_page(bytes: &[u8]) {
    let Some((page, sealed)) = bytes.split_first() else { return };
    let volume = VolumeId::from_bytes([2; 16]);
    let opener = BlockOpener::new(&volume_key(), volume, BlockId::from_bytes([1; 16]));
    let code = Code::new(2, 1).expect("a code");
    let geometry = BlockGeometry::with_page(code, 10_000, PAGE_SIZES[2]).expect("a geometry");
    let page = usize::from(*page) % (geometry.pages() + 1);
    assert!(opener.open_page(&geometry, page, &mut sealed.to_vec()).is_err(), "forged");
    let mut plaintext = vec![0; sealed.len().saturating_sub(16)];
    let opened = opener.open_page_into(&geometry, page, sealed, &mut plaintext);
    assert!(opened.is_err(), "forged");
    assert!(opener.open_inline(sealed).is_err(), "forged");
}

/// The inodes of the golden samples, so that these can be seeds.
const DIR: Ino = Ino(0x0102_0304_0506_0708);
const INO: Ino = Ino(0x1112_1314_1516_1718);

/// Names, targets and xattrs; the first bytes are the hash under which they were found.
pub fn sealed_name(bytes: &[u8]) {
    let Some((hash, sealed)) = bytes.split_first_chunk() else { return };
    let key = NameKey::new(&volume_key());
    if let Ok(name) = key.open_name(DIR, hash, sealed) {
        assert_eq!(key.seal_name(DIR, &name).as_deref(), Ok(sealed));
    }
    if let Ok(target) = key.open_target(INO, sealed) {
        assert_eq!(key.seal_target(INO, &target).as_deref(), Ok(sealed));
    }
    if let Ok(xattr) = key.open_xattr(INO, hash, sealed) {
        assert_eq!(&key.xattr_hash(INO, &xattr.name), hash);
    }
}

/// A key ring as it comes, and once more with its sum put right; and the text of a recovery key.
pub fn key_ring(bytes: &[u8]) {
    key_ring_of(bytes);
    if let Some((content, _)) = bytes.split_last_chunk::<4>() {
        key_ring_of(&[content, &crc32c(content).to_le_bytes()].concat());
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(key) = text.parse::<RecoveryKey>() {
        assert!(key.to_text().parse::<RecoveryKey>().is_ok());
    }
}

fn key_ring_of(bytes: &[u8]) {
    let Ok(ring) = KeyRing::decode(bytes) else { return };
    assert_eq!(ring.encode(), bytes);
}

/// Keys and texts that hold an id or a code.
pub fn ids(bytes: &[u8]) {
    if let Some(fragment) = FragmentId::from_key(bytes) {
        assert_eq!(fragment.to_key(), bytes);
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(block) = text.parse::<BlockId>() {
        assert_eq!(block.to_string(), text.to_ascii_lowercase());
    }
    if let Ok(code) = text.parse::<Code>() {
        assert_eq!(code.to_string().parse(), Ok(code));
    }
}

/// A TLS record as it comes, and once more as one whose header is right: then what it holds is looked
/// into.
pub fn tls_record(bytes: &[u8]) {
    let _ = look_into(bytes);
    let Some(length) = bytes.len().checked_sub(5) else { return };
    let [high, low] = (length as u16).to_be_bytes();
    let _ = look_into(&[&[23, 3, 3, high, low][..], &bytes[5..]].concat());
}

/// A frame as it comes, and once more with magic, reserved bytes and lengths put right, as each end
/// of a connection reads it.
pub fn frame(bytes: &[u8]) {
    frame_of(bytes);
    let Some((header, rest)) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>() else { return };
    let head_bytes = usize::from(header[16]).min(rest.len());
    let mut mended = *header;
    mended[..4].copy_from_slice(b"USB1");
    mended[4] = 1 + mended[4] % 8;
    mended[5..8].fill(0);
    mended[16..20].copy_from_slice(&(head_bytes as u32).to_le_bytes());
    mended[20..].fill(0);
    frame_of(&[&mended, rest].concat());
    mended[20..].copy_from_slice(&((rest.len() - head_bytes) as u32).to_le_bytes());
    frame_of(&[&mended, rest].concat());
}

fn frame_of(bytes: &[u8]) {
    for at_server in [true, false] {
        let Ok(frame) = reencode(bytes, at_server) else { continue };
        assert!(frame.len() <= FRAME_BYTES_MAX);
        assert_eq!(reencode(&frame, at_server).as_ref(), Ok(&frame));
    }
}

/// A peer's certificate, as it is read after TLS has verified it; a newcomer's request for one.
pub fn certificate(bytes: &[u8]) {
    if let Ok(peer) = PeerIdentity::from_certificate(&bytes.into()) {
        assert!(!peer.to_string().is_empty());
    }
    if let Ok(request) = CertificateRequest::parse(bytes) {
        assert!(bytes.len() <= REQUEST_BYTES_MAX && !request.key_hash().to_string().is_empty());
    }
}

/// A grant as it is shown to a provider: as it comes, and with what is fixed put right.
pub fn grant(bytes: &[u8]) {
    grant_of(bytes);
    let mut mended = bytes.to_vec();
    mended.resize(GRANT_BYTES, 0);
    mended[..8].copy_from_slice(b"USGRNT1\n");
    mended[120] = mended[120] & 2 | 1;
    mended[121..128].fill(0);
    assert!(Grant::decode(&mended).is_ok());
    grant_of(&mended);
}

fn grant_of(bytes: &[u8]) {
    let forged = Grant::open(bytes, &[7; 32]);
    assert!(forged.is_err(), "nobody signed it");
    let Ok(grant) = Grant::decode(bytes) else { return };
    assert!(grant.may_cover(BlockId::from_bytes([1; 16])) || grant.block.is_some());
}

/// Sizes, codes of invitations and request numbers, as flags and files give them.
pub fn texts(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(size) = text.parse::<Size>() {
        let _ = size.to_string();
    }
    if let Ok(code) = text.parse::<InviteCode>() {
        assert_eq!(code.reveal().parse(), Ok(code));
    }
    if let Ok(request) = text.parse::<RequestId>() {
        assert_eq!(request.to_string().parse(), Ok(request));
    }
}
