//! Sealing records and roots for providers.

use us_core::seal::{PieceKey, PieceNumber, Secret};
use us_proto::v1::{RecordPart, StoreRecords};

use crate::store::Seq;

/// The most plaintext in one part of a record.
pub const PART_BYTES_MAX: usize = 1 << 20;
const SALT_BYTES: usize = 16;
const ROOT_MAGIC: [u8; 8] = *b"USROOT\x01\x00";

/// Which run of the directory sealed a record: every start is a run of its own, because a record
/// that a crash tore off may be followed by another of the same number.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct RunLabel {
    /// Of the state; grows when it is restored.
    pub incarnation: u64,
    /// The start.
    pub run: u64,
    /// The first commit of the run: records of earlier runs from here on are void.
    pub first_seq: Seq,
    /// Random.
    pub salt: [u8; SALT_BYTES],
}

impl RunLabel {
    /// The run that a message's records belong to; `None` for one that makes no sense.
    pub fn of(records: &StoreRecords) -> Option<Self> {
        Some(Self {
            incarnation: records.incarnation,
            run: records.run,
            first_seq: records.run_first_seq,
            salt: records.salt[..].try_into().ok()?,
        })
    }

    /// A message of the run, without records.
    pub fn message(&self) -> StoreRecords {
        StoreRecords {
            incarnation: self.incarnation,
            run: self.run,
            run_first_seq: self.first_seq,
            salt: self.salt.to_vec().into(),
            parts: Vec::new(),
        }
    }

    fn bytes(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&self.incarnation.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.run.to_le_bytes());
        bytes[16..].copy_from_slice(&self.first_seq.to_le_bytes());
        bytes
    }
}

/// Seals and opens the records of one run.
#[derive(Debug)]
pub struct RunSeal {
    label: RunLabel,
    key: PieceKey,
}

impl RunSeal {
    /// The seal of a run.
    pub fn new(secret: &Secret, label: RunLabel) -> Self {
        let key = secret.pieces(&[b"us records 1", &label.bytes(), &label.salt]);
        Self { label, key }
    }

    /// Whose records.
    pub fn label(&self) -> &RunLabel {
        &self.label
    }

    /// A record's body as sealed parts; an empty body has one.
    pub fn seal(&self, seq: Seq, body: &[u8]) -> Vec<RecordPart> {
        let parts = body.len().div_ceil(PART_BYTES_MAX).max(1);
        let part = |index: usize| {
            let piece = &body[index * PART_BYTES_MAX..body.len().min((index + 1) * PART_BYTES_MAX)];
            let last = index + 1 == parts;
            let number = PieceNumber { number: seq, part: index as u32 };
            let sealed = self.key.seal(number, &self.bound(last), piece).into();
            RecordPart { seq, part: index as u32, last, sealed }
        };
        (0..parts).map(part).collect()
    }

    /// The plaintext of a part; `None` where it fails its seal.
    pub fn open(&self, part: &RecordPart) -> Option<Vec<u8>> {
        let number = PieceNumber { number: part.seq, part: part.part };
        self.key.open(number, &self.bound(part.last), &part.sealed)
    }

    fn bound(&self, last: bool) -> [u8; 25] {
        let mut bound = [0; 25];
        bound[..24].copy_from_slice(&self.label.bytes());
        bound[24] = u8::from(last);
        bound
    }
}

/// Seals a root's manifest: magic, salt, ciphertext, tag.
pub fn seal_root(secret: &Secret, salt: [u8; SALT_BYTES], manifest: &[u8]) -> Vec<u8> {
    let key = secret.pieces(&[b"us root 1", &salt]);
    let sealed = key.seal(PieceNumber { number: 0, part: 0 }, &ROOT_MAGIC, manifest);
    [&ROOT_MAGIC[..], &salt, &sealed].concat()
}

/// Opens a root; `None` where it is none, or was sealed with another key.
pub fn open_root(secret: &Secret, root: &[u8]) -> Option<Vec<u8>> {
    let rest = root.strip_prefix(&ROOT_MAGIC)?;
    let (salt, sealed) = rest.split_at_checked(SALT_BYTES)?;
    let key = secret.pieces(&[b"us root 1", salt]);
    key.open(PieceNumber { number: 0, part: 0 }, &ROOT_MAGIC, sealed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_records_are_sealed_in_parts_and_none_passes_for_another() {
        let secret = Secret::generate();
        let label = RunLabel { incarnation: 1, run: 3, first_seq: 70, salt: [9; 16] };
        let seal = RunSeal::new(&secret, label.clone());
        let body: Vec<u8> = (0..PART_BYTES_MAX * 2 + 5).map(|at| at as u8).collect();
        let parts = seal.seal(80, &body);
        assert_eq!(parts.len(), 3);
        assert_eq!(parts.iter().map(|part| part.last).collect::<Vec<_>>(), [false, false, true]);
        let opened: Vec<u8> = parts.iter().flat_map(|part| seal.open(part).unwrap()).collect();
        assert!(opened == body);
        assert_eq!(seal.open(&RecordPart { last: true, ..parts[0].clone() }), None, "cut short");
        assert_eq!(seal.open(&RecordPart { seq: 81, ..parts[0].clone() }), None);
        let other = RunSeal::new(&secret, RunLabel { run: 4, ..label });
        assert_eq!(other.open(&parts[0]), None);
        assert_eq!(seal.seal(1, &[]).len(), 1);
        let root = seal_root(&secret, [3; 16], b"manifest");
        assert_eq!(open_root(&secret, &root).as_deref(), Some(&b"manifest"[..]));
        assert_eq!(open_root(&Secret::generate(), &root), None);
        assert_eq!(open_root(&secret, b"short"), None);
    }
}
