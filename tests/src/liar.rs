//! Makes a provider lie: changes what lies in its segments so that its store finds nothing wrong. The
//! process that serves it is the real one; only whoever has the key, or compares fragments with each
//! other, can tell.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use us_core::fragment::{FragmentRecord, FragmentSums, FragmentTrailer, HEADER_BYTES};
use us_provider::store::format::{
    ALIGN, ENVELOPE_BYTES, Envelope, RecordKind, SEGMENT_HEADER_BYTES, SegmentHeader,
};

/// How a lie is covered up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lie {
    /// Other bytes, with the slots' sums and the own fingerprint made to fit: the record holds, but its
    /// list of fingerprints is no more the one that the block's commit speaks of.
    OwnSums,
    /// Other bytes that have the same CRC-32C sums: by its record all is well, and by the block's
    /// fingerprints too where they are CRC-32C.
    SameSums,
}

/// Changes every fragment in the store at `data`, whose process does not run. How many there were.
///
/// # Panics
/// When something is not as a store leaves it.
pub fn lie(data: &Path, lie: Lie) -> usize {
    let mut pending = vec![data.to_path_buf()];
    let mut changed = 0;
    while let Some(folder) = pending.pop() {
        for entry in fs::read_dir(folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|ending| ending == "seg") {
                changed += lie_in(&path, lie);
            }
        }
    }
    assert!(changed > 0, "nothing to lie about in {}", data.display());
    changed
}

fn lie_in(segment: &Path, lie: Lie) -> usize {
    let bytes = fs::read(segment).expect("a segment");
    let file = OpenOptions::new().write(true).open(segment).expect("a segment");
    let header = SegmentHeader::decode(&bytes).expect("a segment's header");
    let (mut at, mut changed) = (SEGMENT_HEADER_BYTES as usize, 0);
    while at + ENVELOPE_BYTES < bytes.len() {
        let Some(envelope) = Envelope::decode(&bytes[at..], &header.salt, at as u64) else {
            at += ALIGN as usize;
            continue;
        };
        let start = at + ENVELOPE_BYTES;
        let payload = start..start + envelope.payload_bytes as usize;
        if envelope.kind == RecordKind::Fragment && payload.end <= bytes.len() {
            let payload = bytes[payload].to_vec();
            if let Ok(record) = FragmentRecord::decode(payload.into()) {
                let forged = forged(&record, lie).to_bytes();
                assert_eq!(forged[..HEADER_BYTES], record.to_bytes()[..HEADER_BYTES]);
                file.write_all_at(&forged, start as u64).expect("a write");
                changed += 1;
            }
        }
        at += envelope.padded_bytes() as usize;
    }
    changed
}

fn forged(record: &FragmentRecord, lie: Lie) -> FragmentRecord {
    let (header, geometry) = (record.header, record.header.geometry());
    let mut body = record.body.to_vec();
    for slot in body.chunks_exact_mut(geometry.slot_bytes()) {
        match lie {
            Lie::OwnSums => slot[100] ^= 0x40,
            Lie::SameSums => add_polynomial(&mut slot[100..105]),
        }
    }
    let sums = FragmentSums::of(&geometry, &body);
    let list = match lie {
        Lie::OwnSums => record.trailer.fingerprints.with(header.id().index, &body, &sums),
        Lie::SameSums => record.trailer.fingerprints.clone(),
    };
    let trailer = FragmentTrailer { slot_sums: sums.slots, fingerprints: list };
    assert!(lie == Lie::OwnSums || trailer == record.trailer, "the sums are the same");
    let forged = FragmentRecord { header, body: body.into(), trailer };
    forged.verify_body().expect("a record that holds");
    forged
}

/// Adds the polynomial of CRC-32C: a multiple of it changes no sum.
fn add_polynomial(bytes: &mut [u8]) {
    const POLYNOMIAL: u64 = 0x1_1EDC_6F41;
    for bit in (0..33).filter(|bit| POLYNOMIAL >> (32 - bit) & 1 == 1) {
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}
