//! The volume key and what is derived from it.

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, LessSafeKey, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use zeroize::Zeroizing;

/// Bytes of a volume key and of every key derived from it.
pub const KEY_BYTES: usize = 32;

/// The secret of one volume. All its other keys follow from it; whoever holds it reads everything.
///
/// It leaves memory when dropped, and does not print.
#[derive(Clone)]
pub struct VolumeKey {
    bytes: Zeroizing<[u8; KEY_BYTES]>,
    extracted: Prk,
}

impl VolumeKey {
    /// A new key from the system's randomness.
    ///
    /// # Panics
    /// When the system has no randomness to give: no safe key exists then.
    pub fn generate() -> Self {
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        getrandom::fill(&mut *bytes).expect("the system gives randomness");
        Self::from_bytes(bytes)
    }

    /// The key stored as `bytes`.
    pub fn from_bytes(bytes: Zeroizing<[u8; KEY_BYTES]>) -> Self {
        let extracted = Salt::none(HKDF_SHA256).extract(&*bytes);
        Self { bytes, extracted }
    }

    /// The secret itself, for the one place that stores or wraps it.
    pub fn expose(&self) -> &[u8; KEY_BYTES] {
        &self.bytes
    }

    /// HKDF-SHA256 without salt. Every `info` begins with a label that names its use and version.
    pub(crate) fn derive<const N: usize>(&self, info: &[&[u8]]) -> Zeroizing<[u8; N]> {
        let mut derived = Zeroizing::new([0; N]);
        self.extracted
            .expand(info, Length(N))
            .and_then(|material| material.fill(&mut *derived))
            .expect("HKDF-SHA256 gives up to 8160 bytes");
        derived
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VolumeKey(secret)")
    }
}

/// The AES-256-GCM key with these bytes.
pub(crate) fn aead_key(bytes: &[u8; KEY_BYTES]) -> LessSafeKey {
    let key = UnboundKey::new(&AES_256_GCM, bytes).expect("AES-256 takes 32 bytes");
    LessSafeKey::new(key)
}

/// How many bytes HKDF shall give.
struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}
