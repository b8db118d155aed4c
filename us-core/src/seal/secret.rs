//! A secret that is not a volume's, and sealing of numbered pieces under keys derived from it: what
//! the directory gives away for safekeeping (docs/formats.md, "Recovery").

use std::fmt;

use aws_lc_rs::aead::{Aad, LessSafeKey, NONCE_LEN, Nonce};
use zeroize::Zeroizing;

use super::VolumeKey;
use super::key::{KEY_BYTES, aead_key};
use crate::geometry::TAG_BYTES;

/// 32 random bytes from which keys follow. It leaves memory when dropped, and does not print.
#[derive(Clone)]
pub struct Secret(VolumeKey);

impl Secret {
    /// A new one from the system's randomness.
    ///
    /// # Panics
    /// When the system has no randomness to give.
    pub fn generate() -> Self {
        Self(VolumeKey::generate())
    }

    /// The secret stored as `bytes`.
    pub fn from_bytes(bytes: Zeroizing<[u8; KEY_BYTES]>) -> Self {
        Self(VolumeKey::from_bytes(bytes))
    }

    /// The bytes, for the one place that stores them.
    pub fn expose(&self) -> &[u8; KEY_BYTES] {
        self.0.expose()
    }

    /// The key of one use. `info` begins with a label that names the use and its version; under one
    /// `info` a piece's number must never be sealed twice with different bytes.
    pub fn pieces(&self, info: &[&[u8]]) -> PieceKey {
        PieceKey(aead_key(&self.0.derive::<KEY_BYTES>(info)))
    }

    /// 32 bytes that follow from the secret, for a key of another kind.
    pub(crate) fn derive(&self, info: &[&[u8]]) -> Zeroizing<[u8; KEY_BYTES]> {
        self.0.derive(info)
    }

    /// A volume's key that follows from the secret.
    pub fn volume_key(&self, info: &[&[u8]]) -> VolumeKey {
        VolumeKey::from_bytes(self.0.derive::<KEY_BYTES>(info))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(secret)")
    }
}

/// Which piece: a number and a part of it. Together they are the nonce.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PieceNumber {
    /// The number.
    pub number: u64,
    /// The part.
    pub part: u32,
}

impl PieceNumber {
    fn nonce(self) -> Nonce {
        let mut nonce = [0; NONCE_LEN];
        nonce[..8].copy_from_slice(&self.number.to_le_bytes());
        nonce[8..].copy_from_slice(&self.part.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Seals and opens numbered pieces: AES-256-GCM, nonce = number ‖ part, little-endian.
pub struct PieceKey(LessSafeKey);

impl fmt::Debug for PieceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PieceKey(secret)")
    }
}

impl PieceKey {
    /// Bytes a seal adds.
    pub const SEAL_BYTES: usize = TAG_BYTES;

    /// Seals a piece, bound to `label`: ciphertext and tag.
    ///
    /// # Panics
    /// When the piece is longer than AES-GCM takes (64 GiB).
    pub fn seal(&self, piece: PieceNumber, label: &[u8], plaintext: &[u8]) -> Vec<u8> {
        let mut sealed = Vec::with_capacity(plaintext.len() + TAG_BYTES);
        sealed.extend_from_slice(plaintext);
        self.0
            .seal_in_place_append_tag(piece.nonce(), Aad::from(label), &mut sealed)
            .expect("a piece is short enough for AES-GCM");
        sealed
    }

    /// Opens a piece; `None` where it is not what was sealed as this piece under this label.
    pub fn open(&self, piece: PieceNumber, label: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        let mut buffer = sealed.to_vec();
        let opened = self.0.open_in_place(piece.nonce(), Aad::from(label), &mut buffer).ok()?.len();
        buffer.truncate(opened);
        Some(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_opens_only_as_what_it_was_sealed() {
        let secret = Secret::generate();
        let key = secret.pieces(&[b"us test 1", &[1; 16]]);
        let piece = PieceNumber { number: 7, part: 1 };
        let sealed = key.seal(piece, b"label", b"plaintext");
        assert_eq!(key.open(piece, b"label", &sealed).as_deref(), Some(&b"plaintext"[..]));
        assert_eq!(key.open(PieceNumber { number: 7, part: 2 }, b"label", &sealed), None);
        assert_eq!(key.open(PieceNumber { number: 8, part: 1 }, b"label", &sealed), None);
        assert_eq!(key.open(piece, b"other", &sealed), None);
        assert_eq!(secret.pieces(&[b"us test 2", &[1; 16]]).open(piece, b"label", &sealed), None);
        assert_eq!(Secret::generate().pieces(&[b"us test 1"]).open(piece, b"label", &sealed), None);
        assert_eq!(format!("{secret:?} {key:?}"), "Secret(secret) PieceKey(secret)");
    }
}
