//! What is known of one block, and conversions from and to the wire's messages.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use us_proto::v1;

use super::LateFragments;
use crate::geometry::{BlockGeometry, Code, FRAGMENTS_MAX};
use crate::ids::{Birth, BlockId, FragmentId, ProviderId};

/// A set of fragments of one block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct FragmentBits([u64; FRAGMENTS_MAX.div_ceil(64)]);

impl FragmentBits {
    /// No fragment.
    pub const EMPTY: Self = Self([0; FRAGMENTS_MAX.div_ceil(64)]);

    /// Fragments 0 to `fragments` - 1.
    pub fn all(fragments: usize) -> Self {
        let mut bits = Self::EMPTY;
        (0..fragments).for_each(|index| bits.insert(index));
        bits
    }

    /// Adds fragment `index`.
    pub const fn insert(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    /// Removes fragment `index`.
    pub const fn remove(&mut self, index: usize) {
        self.0[index / 64] &= !(1 << (index % 64));
    }

    /// Whether fragment `index` is in the set.
    pub const fn contains(&self, index: usize) -> bool {
        self.0[index / 64] >> (index % 64) & 1 == 1
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The fragments in order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..FRAGMENTS_MAX).filter(|index| self.contains(*index))
    }

    /// The wire's bitmap: bit 0 of byte 0 is fragment 0.
    pub fn to_bytes(&self, fragments: usize) -> Vec<u8> {
        let bytes = self.0.iter().flat_map(|word| word.to_le_bytes());
        bytes.take(fragments.div_ceil(8)).collect()
    }

    /// The inverse of [`FragmentBits::to_bytes`]; what lies beyond 255 fragments is dropped.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut bits = Self::EMPTY;
        for index in 0..FRAGMENTS_MAX.min(bytes.len() * 8) {
            if bytes[index / 8] >> (index % 8) & 1 == 1 {
                bits.insert(index);
            }
        }
        bits
    }
}

impl fmt::Debug for FragmentBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// A block and where it lies: all a reader needs. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockInfo {
    /// Its id.
    pub id: BlockId,
    /// Its shape. An inline block has a geometry only formally (code 1+0).
    pub geometry: BlockGeometry,
    /// The provider of each fragment; empty for an inline block.
    pub providers: Arc<[ProviderId]>,
    /// Which fragments are known to be durable.
    pub durable: FragmentBits,
    /// The kind of its fingerprints; 0 for an inline block.
    pub fingerprint_kind: u32,
    /// The hash of its fingerprint list; zeros for an inline block.
    pub fingerprint_hash: [u8; 32],
    /// The sealed page of an inline block.
    pub inline: Option<Bytes>,
}

impl BlockInfo {
    /// The block in the directory's answer; `None` where the message makes no sense.
    pub fn from_proto(message: &v1::BlockInfo) -> Option<Self> {
        let id = BlockId::from_slice(&message.block)?;
        let plaintext_bytes = message.plaintext_bytes as usize;
        if !message.inline.is_empty() {
            return InlineBlock::info(id, plaintext_bytes, message.inline.clone());
        }
        let code = Code::new(message.s as usize, message.r as usize).ok()?;
        let page_bytes = message.page_bytes as usize;
        let geometry = BlockGeometry::with_page(code, plaintext_bytes, page_bytes).ok()?;
        (message.providers.len() == code.fragments()).then_some(())?;
        Some(Self {
            id,
            geometry,
            providers: message.providers.iter().copied().map(ProviderId).collect(),
            durable: FragmentBits::from_bytes(&message.durable),
            fingerprint_kind: message.fingerprint_kind,
            fingerprint_hash: message.fingerprint_hash[..].try_into().ok()?,
            inline: None,
        })
    }

    /// Plaintext bytes of the block.
    pub fn plaintext_bytes(&self) -> usize {
        self.geometry.plaintext_bytes()
    }

    /// Fragment `index` of the block.
    pub(super) fn fragment(&self, index: usize) -> FragmentId {
        FragmentId { block: self.id, index: index as u8 }
    }
}

/// A block that is acknowledged: its margin holds.
#[derive(Debug)]
pub struct StoredBlock {
    /// The block, readable from now on.
    pub info: BlockInfo,
    /// The birth its fragments carry.
    pub birth: Birth,
    /// Fragments that become durable later. Dropping it does not stop them.
    pub late: LateFragments,
}

impl StoredBlock {
    /// What the directory must be told, as of the acknowledgement.
    pub fn to_commit(&self) -> v1::BlockCommit {
        let geometry = &self.info.geometry;
        let code = geometry.code();
        v1::BlockCommit {
            block: self.info.id.as_bytes().to_vec().into(),
            s: code.s() as u32,
            r: code.r() as u32,
            page_bytes: geometry.page_bytes() as u32,
            plaintext_bytes: geometry.plaintext_bytes() as u32,
            birth: self.birth.0,
            providers: self.info.providers.iter().map(|provider| provider.0).collect(),
            durable: self.info.durable.to_bytes(code.fragments()).into(),
            fingerprint_kind: self.info.fingerprint_kind,
            fingerprint_hash: self.info.fingerprint_hash.to_vec().into(),
            inline: Bytes::new(),
        }
    }
}

/// Little data, sealed as one page that lies in the directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InlineBlock {
    /// The block, readable from now on.
    pub info: BlockInfo,
}

impl InlineBlock {
    /// `None` for no bytes.
    pub(super) fn info(id: BlockId, plaintext_bytes: usize, sealed: Bytes) -> Option<BlockInfo> {
        let code = Code::new(1, 0).ok()?;
        Some(BlockInfo {
            id,
            geometry: BlockGeometry::new(code, plaintext_bytes).ok()?,
            providers: Arc::from([]),
            durable: FragmentBits::EMPTY,
            fingerprint_kind: 0,
            fingerprint_hash: [0; 32],
            inline: Some(sealed),
        })
    }

    /// What the directory must be told.
    pub fn to_commit(&self) -> v1::BlockCommit {
        v1::BlockCommit {
            block: self.info.id.as_bytes().to_vec().into(),
            s: 1,
            r: 0,
            page_bytes: self.info.geometry.page_bytes() as u32,
            plaintext_bytes: self.info.plaintext_bytes() as u32,
            birth: 0,
            providers: Vec::new(),
            durable: Bytes::new(),
            fingerprint_kind: 0,
            fingerprint_hash: Bytes::new(),
            inline: self.info.inline.clone().unwrap_or_default(),
        }
    }
}
