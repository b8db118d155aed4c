//! Grants: what the directory signs so that providers move a client's fragments.
//!
//! ```text
//!  0          8         24        40        56        88      96    104    112    120      128
//!  | "USGRNT1\n" | cluster | volume | block | holder  | incarn.| from | until | serial | r 0 | ...
//!    8 bytes       16        16       16      32        u64      u64    u64     u64      u8 7
//!                                                                                  128: signature, 64
//! ```
//! Little-endian. A grant is for one volume, or for one block of it where `block` is not zeros, and
//! for one holder: the SHA-256 of the public key in its certificate. It is good from one *period* of
//! the directory's to another, both included; a period is a number that only grows, and says nothing
//! of the wall clock. The signature is Ed25519 over the first 128 bytes, by a key that follows from
//! the cluster's recovery secret: a restored directory signs with the same.
//!
//! Pure: whoever knows the present period and the directory's public key can judge a grant. The
//! directory signs (`us-directory::engine::grants`), providers judge (`us-provider::grants`), mounts
//! and rebuilders only carry the bytes.

use std::fmt;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use bytes::Bytes;

use crate::ids::{BlockId, ClusterId, VolumeId};
use crate::seal::Secret;
use crate::tls::KeyHash;

/// Bytes of a grant.
pub const GRANT_BYTES: usize = SIGNED_BYTES + SIGNATURE_BYTES;
/// Bytes of the public key that judges grants.
pub const GRANT_KEY_BYTES: usize = 32;

const MAGIC: [u8; 8] = *b"USGRNT1\n";
const SIGNED_BYTES: usize = 128;
const SIGNATURE_BYTES: usize = 64;
const READ: u8 = 1;
const WRITE: u8 = 2;
/// Names the key's use among all that follows from the recovery secret.
const KEY_LABEL: &[u8] = b"us grant key 1";

/// What a grant's holder may do with the fragments it speaks of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Rights {
    /// Get and combine.
    Read,
    /// And put.
    ReadWrite,
}

impl Rights {
    const fn to_byte(self) -> u8 {
        match self {
            Self::Read => READ,
            Self::ReadWrite => READ | WRITE,
        }
    }

    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            READ => Some(Self::Read),
            3 => Some(Self::ReadWrite),
            _ => None,
        }
    }

    /// Whether they suffice for this.
    pub const fn allow(self, wanted: Self) -> bool {
        matches!((self, wanted), (Self::ReadWrite, _) | (_, Self::Read))
    }
}

/// A grant's content.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Grant {
    /// The cluster it is of.
    pub cluster: ClusterId,
    /// The volume it is for.
    pub volume: VolumeId,
    /// The one block it is for; `None`: all of the volume.
    pub block: Option<BlockId>,
    /// Whose it is.
    pub holder: KeyHash,
    /// What its holder may do.
    pub rights: Rights,
    /// The incarnation of the directory that signed it.
    pub incarnation: u64,
    /// The period it was signed in.
    pub from: u64,
    /// The last period it is good in.
    pub until: u64,
    /// Its number among the directory's grants of this run, for logs.
    pub serial: u64,
}

/// Why bytes are no grant of this directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GrantError {
    /// Not [`GRANT_BYTES`] bytes that begin as a grant does, or a field that cannot be.
    #[error("this is no grant")]
    Form,
    /// The directory's key did not sign these bytes.
    #[error("the grant is not signed by this cluster's directory, or was altered")]
    Signature,
}

impl Grant {
    /// The bytes that are signed.
    fn signed_bytes(&self) -> [u8; SIGNED_BYTES] {
        let mut bytes = [0; SIGNED_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..24].copy_from_slice(self.cluster.as_bytes());
        bytes[24..40].copy_from_slice(self.volume.as_bytes());
        if let Some(block) = &self.block {
            bytes[40..56].copy_from_slice(block.as_bytes());
        }
        bytes[56..88].copy_from_slice(self.holder.as_bytes());
        let numbers = [self.incarnation, self.from, self.until, self.serial];
        for (place, number) in bytes[88..120].chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes[120] = self.rights.to_byte();
        bytes
    }

    /// Reads a grant without judging who signed it.
    ///
    /// # Errors
    /// [`GrantError::Form`].
    pub fn decode(bytes: &[u8]) -> Result<Self, GrantError> {
        Self::parse(bytes).ok_or(GrantError::Form)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; GRANT_BYTES] = bytes.try_into().ok()?;
        let number = |at: usize| Some(u64::from_le_bytes(*bytes[at..].first_chunk()?));
        if bytes[..8] != MAGIC || bytes[121..SIGNED_BYTES] != [0; 7] {
            return None;
        }
        let block = BlockId::from_slice(&bytes[40..56])?;
        Some(Self {
            cluster: ClusterId::from_slice(&bytes[8..24])?,
            volume: VolumeId::from_slice(&bytes[24..40])?,
            block: (*block.as_bytes() != [0; 16]).then_some(block),
            holder: KeyHash::from_slice(&bytes[56..88])?,
            incarnation: number(88)?,
            from: number(96)?,
            until: number(104)?,
            serial: number(112)?,
            rights: Rights::from_byte(bytes[120])?,
        })
    }

    /// Reads a grant that the owner of `key` signed.
    ///
    /// # Errors
    /// [`GrantError`].
    pub fn open(bytes: &[u8], key: &[u8; GRANT_KEY_BYTES]) -> Result<Self, GrantError> {
        let grant = Self::decode(bytes)?;
        let (signed, signature) = bytes.split_at(SIGNED_BYTES);
        let key = UnparsedPublicKey::new(&ED25519, key);
        key.verify(signed, signature).map_err(|_| GrantError::Signature)?;
        Ok(grant)
    }

    /// Whether it speaks of this block of this volume.
    pub fn covers(&self, volume: VolumeId, block: BlockId) -> bool {
        self.volume == volume && self.may_cover(block)
    }

    /// Whether it can speak of this block, whatever volume that is of.
    pub fn may_cover(&self, block: BlockId) -> bool {
        self.block.is_none_or(|own| own == block)
    }
}

/// The directory's key: it signs grants.
pub struct GrantKey(Ed25519KeyPair);

impl fmt::Debug for GrantKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GrantKey(secret)")
    }
}

impl GrantKey {
    /// The key of the cluster with this recovery secret.
    ///
    /// # Panics
    /// Never: any 32 bytes are a seed.
    pub fn of(secret: &Secret, cluster: ClusterId) -> Self {
        let seed = secret.derive(&[KEY_LABEL, cluster.as_bytes()]);
        Self(Ed25519KeyPair::from_seed_unchecked(&*seed).expect("a seed is any 32 bytes"))
    }

    /// The key that providers judge grants with.
    ///
    /// # Panics
    /// Never: an Ed25519 key has 32 bytes.
    pub fn public(&self) -> [u8; GRANT_KEY_BYTES] {
        let public = self.0.public_key().as_ref();
        public.try_into().expect("an Ed25519 key has 32 bytes")
    }

    /// The grant's bytes, signed.
    pub fn sign(&self, grant: &Grant) -> Bytes {
        let signed = grant.signed_bytes();
        let signature = self.0.sign(&signed);
        Bytes::from([&signed[..], signature.as_ref()].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(byte: u8) -> GrantKey {
        let secret = Secret::from_bytes([byte; 32].into());
        GrantKey::of(&secret, ClusterId::from_bytes(*b"golden cluster 1"))
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    prop_compose! {
        fn grants()(
            ids in any::<([u8; 16], [u8; 16], Option<[u8; 16]>, [u8; 32])>(),
            numbers in any::<[u64; 4]>(),
            writes: bool,
        ) -> Grant {
            let block = ids.2.filter(|id| *id != [0; 16]);
            Grant {
                cluster: ClusterId::from_bytes(ids.0),
                volume: VolumeId::from_bytes(ids.1),
                block: block.map(BlockId::from_bytes),
                holder: KeyHash::from_bytes(ids.3),
                rights: if writes { Rights::ReadWrite } else { Rights::Read },
                incarnation: numbers[0],
                from: numbers[1],
                until: numbers[2],
                serial: numbers[3],
            }
        }
    }

    proptest! {
        #[test]
        fn what_was_signed_is_read_and_nothing_else(grant in grants(), at in 0..GRANT_BYTES * 8) {
            let (ours, theirs) = (key(1), key(2));
            let bytes = ours.sign(&grant);
            prop_assert_eq!(bytes.len(), GRANT_BYTES);
            prop_assert_eq!(Grant::open(&bytes, &ours.public()), Ok(grant.clone()));
            prop_assert_eq!(Grant::open(&bytes, &theirs.public()), Err(GrantError::Signature));
            let mut altered = bytes.to_vec();
            altered[at / 8] ^= 1 << (at % 8);
            prop_assert!(Grant::open(&altered, &ours.public()).is_err());
            prop_assert_eq!(Grant::open(&bytes[..GRANT_BYTES - 1], &ours.public()), Err(GrantError::Form));
            // A decoder that reads its own bytes back has left nothing out.
            let read = Grant::decode(&bytes).unwrap();
            prop_assert_eq!(&read.signed_bytes()[..], &bytes[..SIGNED_BYTES]);
        }
    }

    #[test]
    fn a_grant_for_a_block_covers_no_other() {
        let [volume, other] = [1, 2].map(|byte| VolumeId::from_bytes([byte; 16]));
        let [block, foreign] = [3, 4].map(|byte| BlockId::from_bytes([byte; 16]));
        let whole = Grant {
            cluster: ClusterId::from_bytes([9; 16]),
            volume,
            block: None,
            holder: KeyHash::from_bytes([5; 32]),
            rights: Rights::Read,
            incarnation: 1,
            from: 2,
            until: 3,
            serial: 4,
        };
        assert!(whole.covers(volume, block) && whole.covers(volume, foreign));
        assert!(!whole.covers(other, block));
        let one = Grant { block: Some(block), ..whole };
        assert!(one.covers(volume, block));
        assert!(!one.covers(volume, foreign) && !one.covers(other, block));
        assert!(Rights::ReadWrite.allow(Rights::Read) && Rights::Read.allow(Rights::Read));
        assert!(
            Rights::ReadWrite.allow(Rights::ReadWrite) && !Rights::Read.allow(Rights::ReadWrite)
        );
    }

    /// The key of a cluster, and the bytes of a grant, as the first version made them: a restored
    /// directory must sign with the key that providers have.
    #[test]
    fn the_key_and_the_layout_stay() {
        let key = key(0x42);
        let grant = Grant {
            cluster: ClusterId::from_bytes(*b"golden cluster 1"),
            volume: VolumeId::from_bytes(*b"golden volume id"),
            block: Some(BlockId::from_bytes(*b"golden block id!")),
            holder: KeyHash::from_bytes([0x17; 32]),
            rights: Rights::ReadWrite,
            incarnation: 1,
            from: 0x0203,
            until: 0x0212,
            serial: 7,
        };
        assert_eq!(hex(&key.public()), PUBLIC);
        assert_eq!(hex(&key.sign(&grant)), SIGNED);
    }

    const PUBLIC: &str = "b8c22a084a06a80351d2ab74c64e473d0f9b2df779266401c90aa67c5cddae9c";
    const SIGNED: &str = concat!(
        "555347524e54310a676f6c64656e20636c75737465722031676f6c64656e2076",
        "6f6c756d65206964676f6c64656e20626c6f636b206964211717171717171717",
        "1717171717171717171717171717171717171717171717170100000000000000",
        "0302000000000000120200000000000007000000000000000300000000000000",
        "0799f2db748ec565029081dff09a64b09da9fe696e2fdd66763040cef01af327",
        "beddc459555856f1572f5eed00760ee2bd7f1ee39f3ec3fe54f356e8e616020d",
    );
}
