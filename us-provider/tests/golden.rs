//! A segment of format 1, byte by byte: it must load for ever, and be written as it was.
//!
//! `US_UPDATE_GOLDEN=1 cargo test -p us-provider --test golden` writes the sample of a new format.

use std::path::{Path, PathBuf};

use us_core::fragment::crc32c;
use us_proto::v1::RecordPart;
use us_provider::copies::format::{
    Label, decode_frame, decode_header, encode_frame, encode_header,
};
use us_provider::copies::{Reading, RecordLog};
use us_provider::store::format::{
    Envelope, RecordKind, SegmentHeader, encode_control, padded_bytes,
};
use us_provider::store::{ReadRequest, Store, StoreError, StoreOptions};

#[path = "../samples/record.rs"]
mod record;
use record::{sample, sample_id};

const STORE: [u8; 16] = *b"the store's id..";
const SALT: [u8; 16] = *b"sixteen salt by.";
const TRASHED_AT_S: u64 = 1_700_000_000;

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/segment-1.bin")
}

/// Fragment 1; 2, which went to the trash; 3, which was deleted and purged; 4, which went to the
/// trash and came back.
fn segment() -> Vec<u8> {
    let mut bytes = SegmentHeader { store: STORE, number: 5, salt: SALT }.encode();
    let mut seq = 100;
    let mut push = |kind, payload: &[u8], trashed_at_s| {
        let control = matches!(kind, RecordKind::Trash | RecordKind::Restore);
        let envelope = Envelope {
            salt: SALT,
            seq,
            offset: bytes.len() as u64,
            trashed_at_s,
            payload_bytes: payload.len() as u32,
            payload_sum: if control { crc32c(payload) } else { 0 },
            kind,
        };
        seq += 1;
        let end = bytes.len() + padded_bytes(payload.len() as u32) as usize;
        bytes.extend_from_slice(&envelope.encode());
        bytes.extend_from_slice(payload);
        bytes.resize(end, 0);
    };
    push(RecordKind::Fragment, &sample(1, 100, 0).1, 0);
    push(RecordKind::Fragment, &sample(2, 5000, 0).1, 0);
    push(RecordKind::Tombstone, &sample(3, 100, 0).1, 0);
    push(RecordKind::Fragment, &sample(4, 100, 0).1, 0);
    push(RecordKind::Trash, &encode_control(&[sample_id(2), sample_id(4)]), TRASHED_AT_S);
    push(RecordKind::Restore, &encode_control(&[sample_id(4)]), 0);
    bytes
}

#[test]
fn segments_are_written_as_they_were() {
    if std::env::var_os("US_UPDATE_GOLDEN").is_some() {
        std::fs::write(path(), segment()).unwrap();
    }
    assert!(segment() == std::fs::read(path()).unwrap(), "the format changed: give it a version");
}

#[test]
fn segments_of_format_1_load() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("segments")).unwrap();
    std::fs::copy(path(), dir.path().join("segments/00000005.seg")).unwrap();
    let options = StoreOptions {
        clock: std::sync::Arc::new(|| TRASHED_AT_S + 10),
        ..StoreOptions::default()
    };
    // The store takes its id from the segment.
    let store = Store::open(dir.path(), options).unwrap();
    assert_eq!(store.id(), STORE);
    let recovery = store.recovery();
    assert_eq!((recovery.damaged, recovery.cut_bytes, recovery.unreadable_bytes), (0, 0, 0));
    for (number, bytes) in [(1, 100), (2, 5000), (4, 100)] {
        assert_eq!(store.read_record(sample_id(number)).unwrap(), sample(number, bytes, 0).1);
    }
    let purged = store.read(ReadRequest { id: sample_id(3), first_slot: 0, slots: None });
    assert!(matches!(purged, Err(StoreError::NotFound { .. })));
    let trashed = store.inventory(None, 10).unwrap();
    let trashed: Vec<_> = trashed.iter().map(|line| line.entry.trashed_at_s).collect();
    assert_eq!(trashed, [0, TRASHED_AT_S, 0]);
}

fn records_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/records-1.bin")
}

fn parts() -> Vec<RecordPart> {
    let part = |seq, part, last, bytes: usize| {
        let sealed = (0..bytes).map(|at| at as u8).collect::<Vec<_>>().into();
        RecordPart { seq, part, last, sealed }
    };
    vec![part(70, 0, true, 16), part(71, 0, false, 300), part(71, 1, true, 33)]
}

fn records() -> Vec<u8> {
    let label = Label { incarnation: 2, run: 9, first_seq: 70, salt: SALT };
    let mut bytes = encode_header(4, &label).to_vec();
    parts().iter().for_each(|part| encode_frame(&mut bytes, part));
    bytes
}

#[test]
fn records_of_the_directory_are_written_and_read_as_they_were() {
    if std::env::var_os("US_UPDATE_GOLDEN").is_some() {
        std::fs::write(records_path(), records()).unwrap();
    }
    assert!(records() == std::fs::read(records_path()).unwrap(), "the format changed");
    let data = tempfile::tempdir().unwrap();
    let dir = data.path().join("directory");
    std::fs::create_dir(&dir).unwrap();
    std::fs::copy(records_path(), dir.join("00000004.records")).unwrap();
    let held = RecordLog::open(&dir, 1 << 20).unwrap().held().unwrap();
    assert_eq!((held.incarnation, held.run, held.first_seq, held.last_seq), (2, 9, 70, 71));
    let message = Reading::new(data.path()).unwrap().next_message().unwrap().unwrap();
    assert_eq!((message.parts, message.run_first_seq), (parts(), 70));
}

/// Whatever the bytes, decoding ends with something or nothing.
#[test]
fn decoders_of_records_survive_any_change() {
    let bytes = records();
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x81;
        let changed = bytes::Bytes::from(changed);
        let _ = decode_header(&changed);
        let mut next = 64;
        while let Some((_, end)) = decode_frame(&changed, next) {
            next = end;
        }
        assert!(next <= changed.len());
        for cut in [at / 2, at] {
            let _ = decode_frame(&changed.slice(..cut), 64.min(cut));
        }
    }
}
