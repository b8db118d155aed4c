//! The fingerprints of a block's fragments: what repair checks a rebuilt fragment against.
//!
//! The list of all f fingerprints lies in the trailer of every fragment. The block's commit holds
//! the hash of the list, so no provider can change a list unseen. The kind says how strong one
//! fingerprint is. New blocks have the strongest; older kinds are read and repaired for ever.

use aws_lc_rs::digest::{self, SHA256};

use super::{FragmentError, FragmentSums, crc32c};
use crate::geometry::{Code, FRAGMENTS_MAX};

/// The most bytes one fingerprint of any kind may take.
pub const FINGERPRINT_BYTES_MAX: usize = 32;

/// How a fingerprint is made.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum FingerprintKind {
    /// CRC-32C of the fragment's whole body: finds accidents, not malice.
    Crc32c = 1,
    /// The first 16 bytes of BLAKE3 of the fragment's whole body: nobody can make other bytes that
    /// have it.
    Blake3 = 2,
}

impl FingerprintKind {
    /// The kind with this number.
    ///
    /// # Errors
    /// [`FragmentError::FingerprintKind`] for a kind of another version.
    pub const fn from_byte(byte: u8) -> Result<Self, FragmentError> {
        match byte {
            1 => Ok(Self::Crc32c),
            2 => Ok(Self::Blake3),
            found => Err(FragmentError::FingerprintKind { found }),
        }
    }

    /// Bytes of one fingerprint.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Crc32c => 4,
            Self::Blake3 => 16,
        }
    }

    /// The fingerprint of a body whose sums are known. Where those tell it, no byte is read again.
    fn of(self, body: &[u8], sums: &FragmentSums) -> Fingerprint {
        match self {
            Self::Crc32c => Fingerprint::Crc32c(sums.body.to_le_bytes()),
            Self::Blake3 => Self::blake3(body),
        }
    }

    fn blake3(body: &[u8]) -> Fingerprint {
        let hash = blake3::hash(body);
        let (short, _) = hash.as_bytes().split_first_chunk().expect("32 bytes");
        Fingerprint::Blake3(*short)
    }
}

/// One fingerprint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fingerprint {
    Crc32c([u8; 4]),
    Blake3([u8; 16]),
}

impl Fingerprint {
    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Crc32c(bytes) => bytes,
            Self::Blake3(bytes) => bytes,
        }
    }
}

/// The fingerprints of all fragments of one block, in the order of their indexes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FingerprintList {
    kind: FingerprintKind,
    bytes: Vec<u8>,
}

impl FingerprintList {
    /// The list of these CRC-32C sums, one a fragment body.
    ///
    /// # Panics
    /// When there are more than 255: no code has them.
    pub fn of_crcs(crcs: impl IntoIterator<Item = u32>) -> Self {
        let bytes: Vec<u8> = crcs.into_iter().flat_map(u32::to_le_bytes).collect();
        assert!(bytes.len() / 4 <= FRAGMENTS_MAX, "{} sums", bytes.len() / 4);
        Self { kind: FingerprintKind::Crc32c, bytes }
    }

    /// The list of these bodies, in the order of their indexes, each with its sums.
    ///
    /// # Panics
    /// When there are more than 255: no code has them.
    pub fn of_bodies<'a>(
        kind: FingerprintKind,
        bodies: impl IntoIterator<Item = (&'a [u8], &'a FragmentSums)>,
    ) -> Self {
        let mut bytes = Vec::new();
        for (body, sums) in bodies {
            bytes.extend_from_slice(kind.of(body, sums).as_bytes());
        }
        let list = Self { kind, bytes };
        assert!(list.count() <= FRAGMENTS_MAX, "{} bodies", list.count());
        list
    }

    /// The list stored as `bytes`, for a block of this code.
    ///
    /// # Errors
    /// [`FragmentError::Length`] when the bytes hold another number of fingerprints.
    pub fn decode(kind: FingerprintKind, code: Code, bytes: &[u8]) -> Result<Self, FragmentError> {
        let expected = kind.bytes() * code.fragments();
        if bytes.len() != expected {
            let found = bytes.len();
            return Err(FragmentError::Length { part: "fingerprint list", expected, found });
        }
        Ok(Self { kind, bytes: bytes.to_vec() })
    }

    /// The list with another body in the place of fragment `index`: what a forger would show.
    ///
    /// # Panics
    /// When the block has no such fragment.
    pub fn with(&self, index: u8, body: &[u8], sums: &FragmentSums) -> Self {
        let mut list = self.clone();
        let place = list.bytes.chunks_exact_mut(self.kind.bytes()).nth(index.into());
        let place = place.expect("a fragment of the block");
        place.copy_from_slice(self.kind.of(body, sums).as_bytes());
        list
    }

    /// What the fingerprints are.
    pub const fn kind(&self) -> FingerprintKind {
        self.kind
    }

    /// How many fingerprints there are: f.
    pub const fn count(&self) -> usize {
        self.bytes.len() / self.kind.bytes()
    }

    /// The fingerprints, one after the other.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The fingerprint of fragment `index`; `None` when the block has no such fragment.
    pub fn get(&self, index: u8) -> Option<&[u8]> {
        self.bytes.chunks_exact(self.kind.bytes()).nth(index.into())
    }

    /// What the block's commit holds: SHA-256 over the kind, the count (one byte each) and the
    /// list.
    pub fn hash(&self) -> [u8; 32] {
        let mut context = digest::Context::new(&SHA256);
        context.update(&[self.kind as u8, self.count() as u8]);
        context.update(&self.bytes);
        let mut hash = [0u8; 32];
        hash.copy_from_slice(context.finish().as_ref());
        hash
    }

    /// Checks the whole body of fragment `index`.
    ///
    /// # Errors
    /// [`FragmentError::Fingerprint`] when it is not the body the writer made.
    pub fn check(&self, index: u8, body: &[u8]) -> Result<(), FragmentError> {
        let found = match self.kind {
            FingerprintKind::Crc32c => Fingerprint::Crc32c(crc32c(body).to_le_bytes()),
            FingerprintKind::Blake3 => FingerprintKind::blake3(body),
        };
        self.compare(index, &found)
    }

    /// Checks a whole body whose sums are already known.
    ///
    /// # Errors
    /// As [`FingerprintList::check`].
    pub fn check_summed(
        &self,
        index: u8,
        body: &[u8],
        sums: &FragmentSums,
    ) -> Result<(), FragmentError> {
        self.compare(index, &self.kind.of(body, sums))
    }

    /// Checks a fragment of which only the CRC-32C of its body is known. It says something where
    /// the fingerprint is one; stronger ones are not taken at each put and scrub.
    ///
    /// # Errors
    /// As [`FingerprintList::check`].
    pub(super) fn check_crc(&self, index: u8, body_crc: u32) -> Result<(), FragmentError> {
        match self.kind {
            FingerprintKind::Crc32c => {
                self.compare(index, &Fingerprint::Crc32c(body_crc.to_le_bytes()))
            }
            FingerprintKind::Blake3 => Ok(()),
        }
    }

    fn compare(&self, index: u8, found: &Fingerprint) -> Result<(), FragmentError> {
        let is_the_writers = self.get(index) == Some(found.as_bytes());
        is_the_writers.then_some(()).ok_or(FragmentError::Fingerprint { index })
    }
}
