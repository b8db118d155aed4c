//! What the fuzzer, and the ordinary tests, do with bytes nobody vouches for: one function for each
//! decoder of `us-directory`. Each must return, whatever the bytes: no panic, no overflow, no large
//! allocation. What decodes must encode to the same again.
//!
//! `us-directory/tests/decoders.rs` runs each over its seeds and random bytes; the targets in
//! `fuzz_targets/` run them under libFuzzer.

use std::path::Path;

use bytes::Bytes;
use prost::Message;
use us_core::fragment::crc32c;
use us_core::seal::Secret;
use us_directory::image::ImageReader;
use us_directory::keys;
use us_directory::records::{self, *};
use us_directory::recovery::{Manifest, RecoveryKit, open_root, seal_root};
use us_directory::store::journal::{
    FILE_HEADER_BYTES, FileTag, decode_body, decode_header, encode_body, encode_header,
    encode_record, replay,
};
use us_directory::store::{KEY_BYTES_MAX, VALUE_BYTES_MAX, WriteBatch};

/// A decoder's target, by the name under which its seeds lie in `fuzz/seeds/`.
pub type Target = (&'static str, fn(&[u8]));

/// All targets of this file.
pub const TARGETS: [Target; 8] = [
    ("journal_header", journal_header),
    ("journal_body", journal_body),
    ("journal_file", journal_file),
    ("directory_record", directory_record),
    ("directory_key", directory_key),
    ("image_stream", image_stream),
    ("recovery_key", recovery_key),
    ("root", root),
];

/// A journal file's header.
pub fn journal_header(bytes: &[u8]) {
    if let Some((tag, first_seq)) = decode_header(bytes) {
        let encoded = encode_header(tag, first_seq);
        assert_eq!(decode_header(&encoded), Some((tag, first_seq)));
    }
    if let Some((tag, first_seq)) = numbers(bytes) {
        assert_eq!(decode_header(&encode_header(tag, first_seq)), Some((tag, first_seq)));
    }
}

/// A file's tag and first record out of the first 24 bytes.
fn numbers(bytes: &[u8]) -> Option<(FileTag, u64)> {
    let ([a, b, c], _) = bytes.first_chunk::<24>()?.as_chunks::<8>().0.split_first_chunk()?;
    let [incarnation, salt, first_seq] = [a, b, c].map(|number| u64::from_le_bytes(*number));
    // Numbers are counted up from 1.
    Some((FileTag { incarnation, salt }, first_seq.min(u64::MAX >> 1)))
}

/// The body of a record.
pub fn journal_body(bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    let Some(batch) = decode_body(&bytes) else { return };
    assert_eq!(encode_body(&batch), bytes);
    for (key, value) in batch.iter() {
        assert!(key.len() <= KEY_BYTES_MAX);
        assert!(value.as_ref().is_none_or(|value| value.len() <= VALUE_BYTES_MAX));
    }
}

/// A whole file: as it comes; with a header that holds; and behind a record that holds, whose body
/// the bytes are.
pub fn journal_file(bytes: &[u8]) {
    let whole = Bytes::copy_from_slice(bytes);
    let Some((tag, first_seq)) = numbers(bytes) else { return };
    for last in [true, false] {
        let _ = replay(&whole, Path::new("journal"), first_seq, first_seq, last);
    }
    let mut file = encode_header(tag, first_seq).to_vec();
    file.extend_from_slice(bytes);
    file_of(file, first_seq);
    let mut file = encode_header(tag, first_seq).to_vec();
    encode_record(&mut file, tag, first_seq, 0, &encode_body(&WriteBatch::new()));
    encode_record(&mut file, tag, first_seq + 1, first_seq, bytes);
    file.extend_from_slice(bytes);
    file_of(file, first_seq);
}

fn file_of(file: Vec<u8>, first_seq: u64) {
    let file = Bytes::from(file);
    for last in [true, false] {
        let read = replay(&file, Path::new("journal"), first_seq, first_seq, last);
        let Ok(read) = read else { continue };
        assert!(read.good_bytes >= FILE_HEADER_BYTES as u64);
        assert_eq!(read.good_bytes + read.torn_bytes, file.len() as u64);
        assert!(last || read.torn_bytes == 0, "only the last file has a torn tail");
        for ((seq, _), expected) in read.batches.iter().zip(first_seq..) {
            assert_eq!(*seq, expected);
        }
    }
}

/// Every kind of value in the store.
pub fn directory_record(bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    fn again<T: prost::Message + Default + PartialEq + std::fmt::Debug>(
        bytes: &Bytes,
    ) -> Option<T> {
        let record: T = records::decode(b"key", bytes).ok()?;
        let encoded = records::encode(&record);
        assert_eq!(records::decode::<T>(b"key", &encoded).ok().as_ref(), Some(&record));
        Some(record)
    }
    again::<InodeRecord>(&bytes);
    again::<EntryRecord>(&bytes);
    again::<CookieRecord>(&bytes);
    again::<ReferenceRecord>(&bytes);
    again::<HoldingRecord>(&bytes);
    again::<GraveRecord>(&bytes);
    again::<UsageRecord>(&bytes);
    again::<SessionRecord>(&bytes);
    again::<VolumeRecord>(&bytes);
    again::<ProviderRecord>(&bytes);
    again::<ClusterRecord>(&bytes);
    again::<JoinedRecord>(&bytes);
    again::<InviteRecord>(&bytes);
    again::<RegistryRecord>(&bytes);
    if let Some(chunk) = again::<ChunkRecord>(&bytes) {
        for extent in &chunk.extents {
            assert!(extent.end() >= extent.offset);
            let _ = us_core::ids::BlockId::from_slice(&extent.block);
        }
    }
    if let Some(block) = again::<BlockRecord>(&bytes) {
        let _ = (block.is_inline(), block.is_settled());
        assert!(!records::bit(&block.durable, usize::MAX));
    }
    let _ = records::volume_id(&bytes);
}

/// What is read out of keys.
pub fn directory_key(bytes: &[u8]) {
    let _ = keys::last_number(bytes);
    if let Some(block) = keys::last_block(bytes) {
        assert!(bytes.ends_with(block.as_bytes()));
    }
}

/// An image of the state, or a backup's content: all at once and byte by byte say the same.
pub fn image_stream(bytes: &[u8]) {
    let mut whole = ImageReader::new();
    let Ok(batches) = whole.push(bytes) else { return };
    let mut slow = ImageReader::new();
    let again = bytes.chunks(7).map(|piece| slow.push(piece).expect("as the whole"));
    assert_eq!(again.map(|some| some.len()).sum::<usize>(), batches.len());
    assert_eq!(whole.end().ok(), slow.end().ok());
}

/// A recovery key's file: as it comes, and with its sum put right.
pub fn recovery_key(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    recovery_key_of(text);
    if let Some((head, rest)) = text.split_once("\nsum ")
        && let Some((_, content)) = rest.split_once('\n')
    {
        let sum = crc32c(content.as_bytes());
        recovery_key_of(&format!("{head}\nsum {sum:08x}\n{content}"));
    }
}

fn recovery_key_of(text: &str) {
    if let Ok(kit) = RecoveryKit::from_text(text) {
        let again = RecoveryKit::from_text(&kit.to_text()).expect("its own text");
        assert_eq!(again.cluster(), kit.cluster());
    }
}

/// What a provider says was the root that it keeps for the directory: sealed, and the content once it
/// is open.
pub fn root(bytes: &[u8]) {
    let secret = Secret::from_bytes([7; 32].into());
    assert!(open_root(&secret, bytes).is_none(), "nobody has this secret");
    let sealed = seal_root(&secret, [3; 16], bytes);
    assert_eq!(open_root(&secret, &sealed).as_deref(), Some(bytes));
    let Ok(manifest) = Manifest::decode(bytes) else { return };
    for run in &manifest.runs {
        for block in &run.blocks {
            let _ = block.info();
        }
    }
}
