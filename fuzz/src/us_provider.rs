//! What the fuzzer, and the ordinary tests, do with bytes nobody vouches for: one function for each
//! decoder of `us-provider`. Each must return, whatever the bytes: no panic, no overflow, no large
//! allocation. What decodes must encode to the same bytes again.
//!
//! `us-provider/tests/decoders.rs` runs each over its seeds and random bytes; the targets in
//! `fuzz_targets/` run them under libFuzzer.

use bytes::Bytes;
use us_core::fragment::crc32c;
use us_proto::v1::RecordPart;
use us_provider::copies::format::{
    FRAME_HEADER_BYTES, HEADER_BYTES, decode_frame, decode_header, encode_frame, encode_header,
};
use us_provider::grants::{decode_told, encode_told};
use us_provider::guest::parse_pressure;
use us_provider::membership::refused::{decode_refused, encode_refused};
use us_provider::membership::{decode_joined, decode_root, encode_joined, encode_root};
use us_provider::store::accounts::SegmentAccount;
use us_provider::store::format::{
    ALIGN, CONTROL_IDS_MAX, ENVELOPE_BYTES, ENVELOPE_MAGIC, Envelope, PAYLOAD_BYTES_MAX,
    SEGMENT_MAGIC, SEGMENT_VERSION, SegmentHeader, decode_control, encode_control,
};
use us_provider::store::index::{Entry, Mark};

/// A decoder's target, by the name under which its seeds lie in `fuzz/seeds/`.
pub type Target = (&'static str, fn(&[u8]));

/// All targets of this file.
pub const TARGETS: [Target; 7] = [
    ("segment_header", segment_header),
    ("envelope", envelope),
    ("control_record", control_record),
    ("index_value", index_value),
    ("membership_file", membership_file),
    ("pressure", pressure),
    ("journal_copy", journal_copy),
];

/// Bytes of the fields of a segment's header, its sum the last four.
const FIELDS_BYTES: usize = 64;

/// A segment's header as it comes, and once more with magic, version, reserved bytes and sum put
/// right.
pub fn segment_header(bytes: &[u8]) {
    segment_header_of(bytes);
    if let Some(first) = bytes.first_chunk::<FIELDS_BYTES>() {
        let mut mended = *first;
        mended[..8].copy_from_slice(&SEGMENT_MAGIC);
        mended[8..10].copy_from_slice(&SEGMENT_VERSION.to_le_bytes());
        mended[10..12].fill(0);
        mended[48..].fill(0);
        sign(&mut mended);
        assert!(segment_header_of(&mended).is_some(), "every other field is free");
    }
}

fn segment_header_of(bytes: &[u8]) -> Option<SegmentHeader> {
    let header = SegmentHeader::decode(bytes).ok()?;
    assert_eq!(header.encode()[..FIELDS_BYTES], bytes[..FIELDS_BYTES]);
    Some(header)
}

/// Puts the sum at the end of `bytes` right.
fn sign(bytes: &mut [u8]) {
    if let Some((content, sum)) = bytes.split_last_chunk_mut::<4>() {
        *sum = crc32c(content).to_le_bytes();
    }
}

/// An envelope as it comes, and once more with magic, kind, reserved bytes and sum put right.
pub fn envelope(bytes: &[u8]) {
    envelope_of(bytes);
    if let Some(first) = bytes.first_chunk::<ENVELOPE_BYTES>() {
        let mut mended = *first;
        mended[..8].copy_from_slice(&ENVELOPE_MAGIC);
        mended[56] = 1 + mended[56] % 4;
        mended[57..].fill(0);
        sign(&mut mended);
        envelope_of(&mended);
    }
}

fn envelope_of(bytes: &[u8]) {
    let Some(envelope) = Envelope::decode_any_salt(bytes) else { return };
    assert_eq!(envelope.encode(), bytes[..ENVELOPE_BYTES]);
    assert!(envelope.payload_bytes <= PAYLOAD_BYTES_MAX);
    assert!(envelope.padded_bytes().is_multiple_of(ALIGN));
    let (salt, offset) = (envelope.salt, envelope.offset);
    assert_eq!(Envelope::decode(bytes, &salt, offset), Some(envelope));
    assert_eq!(Envelope::decode(bytes, &salt, offset ^ ALIGN), None);
}

/// The fragments of a control record.
pub fn control_record(bytes: &[u8]) {
    let Some(ids) = decode_control(bytes) else { return };
    assert!(ids.len() <= CONTROL_IDS_MAX);
    assert_eq!(encode_control(&ids), bytes);
}

/// Every value of the index: entries, accounts, the mark.
pub fn index_value(bytes: &[u8]) {
    if let Some(entry) = Entry::decode(bytes) {
        assert_eq!(entry.encode(), bytes);
        let _ = (entry.class(), entry.padded_bytes());
    }
    if let Some(mark) = Mark::decode(bytes) {
        assert_eq!(mark.encode(), bytes);
    }
    if let Some(account) = SegmentAccount::decode(bytes) {
        assert_eq!(account.encode(), bytes);
        let _ = (account.dead_bytes(), account.used_bytes(), account.is_dead());
    }
}

/// The files `membership`, `root` and `refused`: as they come, and with magic and sum put right.
pub fn membership_file(bytes: &[u8]) {
    membership_of(bytes);
    if let Some(told) = decode_told(bytes) {
        assert_eq!(encode_told(&told), bytes);
    }
    let mut grants = bytes.to_vec();
    if let Some(first) = grants.first_chunk_mut() {
        *first = *b"UsGrnt\x01\x00";
    }
    sign(&mut grants);
    let _ = decode_told(&grants);
    for magic in [b"UsRoot\x01\x00", b"UsJoin\x01\x00", b"UsRefu\x02\x00"] {
        let mut mended = bytes.to_vec();
        if let Some(first) = mended.first_chunk_mut() {
            *first = *magic;
        }
        sign(&mut mended);
        membership_of(&mended);
    }
}

fn membership_of(bytes: &[u8]) {
    if let Some((sequence, root)) = decode_root(bytes) {
        assert_eq!(encode_root(sequence, &root), bytes);
    }
    if let Some(joined) = decode_joined(bytes) {
        assert_eq!(encode_joined(&joined), bytes);
    }
    if let Some(refused) = decode_refused(bytes) {
        assert_eq!(encode_refused(&refused), bytes);
    }
}

/// The kernel's text about pressure.
pub fn pressure(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Some(pressure) = parse_pressure(text)
    {
        assert!(pressure.some_percent.is_finite(), "{pressure:?}");
    }
}

/// A file of the directory's records: its header and its frames, as they come and with their sums put
/// right; and a frame whose content the bytes are.
pub fn journal_copy(bytes: &[u8]) {
    journal_copy_of(bytes);
    let mut mended = bytes.to_vec();
    if mended.len() >= HEADER_BYTES {
        let sum = crc32c(&mended[..HEADER_BYTES - 4]);
        mended[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
        let frame = &mut mended[HEADER_BYTES..];
        if frame.len() >= FRAME_HEADER_BYTES {
            let sealed_bytes = (frame.len() - FRAME_HEADER_BYTES) as u32;
            frame[4..8].copy_from_slice(&sealed_bytes.to_le_bytes());
            frame[8..12].fill(0);
            let sum = crc32c(frame);
            frame[8..12].copy_from_slice(&sum.to_le_bytes());
        }
    }
    journal_copy_of(&mended);
    let sealed = Bytes::copy_from_slice(bytes);
    let last = bytes.len().is_multiple_of(2);
    let part = RecordPart { seq: bytes.len() as u64, part: 3, last, sealed };
    let mut frame = Vec::new();
    encode_frame(&mut frame, &part);
    let end = frame.len();
    assert_eq!(decode_frame(&frame.into(), 0), Some((part, end)));
}

fn journal_copy_of(bytes: &[u8]) {
    if let Some((number, label)) = decode_header(bytes) {
        assert_eq!(encode_header(number, &label), bytes[..HEADER_BYTES]);
    }
    let bytes = Bytes::copy_from_slice(bytes);
    let mut at = HEADER_BYTES.min(bytes.len());
    while let Some((part, end)) = decode_frame(&bytes, at) {
        let mut encoded = Vec::new();
        encode_frame(&mut encoded, &part);
        assert_eq!(encoded, bytes[at..end]);
        at = end;
    }
}
