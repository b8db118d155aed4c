//! The fingerprints of a block's fragments: what repair checks a rebuilt fragment against.
//!
//! The list of all f fingerprints lies in the trailer of every fragment. The block's commit holds
//! the hash of the list, so no provider can change a list unseen. The kind says how strong one
//! fingerprint is; kinds stronger than CRC-32C fit into the same places.

use aws_lc_rs::digest::{self, SHA256};

use super::{FragmentError, crc32c};
use crate::geometry::{Code, FRAGMENTS_MAX};

/// The most bytes one fingerprint of any kind may take.
pub const FINGERPRINT_BYTES_MAX: usize = 32;

/// How a fingerprint is made.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum FingerprintKind {
    /// CRC-32C of the fragment's whole body: finds accidents, not malice.
    Crc32c = 1,
}

impl FingerprintKind {
    /// The kind with this number.
    ///
    /// # Errors
    /// [`FragmentError::FingerprintKind`] for a kind of another version.
    pub const fn from_byte(byte: u8) -> Result<Self, FragmentError> {
        match byte {
            1 => Ok(Self::Crc32c),
            found => Err(FragmentError::FingerprintKind { found }),
        }
    }

    /// Bytes of one fingerprint.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Crc32c => 4,
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
        match self.kind {
            FingerprintKind::Crc32c => self.check_crc(index, crc32c(body)),
        }
    }

    /// Checks a body whose CRC-32C is already known.
    ///
    /// # Errors
    /// [`FragmentError::Fingerprint`] when it is not the body the writer made.
    pub fn check_crc(&self, index: u8, body_crc: u32) -> Result<(), FragmentError> {
        match self.kind {
            FingerprintKind::Crc32c if self.get(index) == Some(&body_crc.to_le_bytes()) => Ok(()),
            FingerprintKind::Crc32c => Err(FragmentError::Fingerprint { index }),
        }
    }
}
