//! Sealing and opening the pages of a block, and inline data.

use std::fmt;

use aws_lc_rs::aead::{Aad, LessSafeKey, NONCE_LEN, Nonce};

use super::key::{KEY_BYTES, aead_key};
use super::{SealError, VolumeKey};
use crate::geometry::{BlockGeometry, TAG_BYTES};
use crate::ids::{BlockId, VolumeId};

/// The most plaintext bytes that are sealed as one inline page.
pub const INLINE_BYTES_MAX: usize = 32 << 10;

/// Begins the `info` from which a block's key is derived.
const BLOCK_LABEL: &[u8] = b"us block 1";

/// A block id that nothing was sealed with yet.
///
/// Neither `Clone` nor `Copy`, and only [`FreshBlockId::generate`] makes one:
/// ```compile_fail,E0423
/// # use us_core::{ids::BlockId, seal::FreshBlockId};
/// let again = FreshBlockId(BlockId::generate()); // no such constructor
/// ```
#[derive(Debug)]
pub struct FreshBlockId(BlockId);

impl FreshBlockId {
    /// An id from the system's clock and randomness.
    ///
    /// # Panics
    /// When the system has no randomness to give.
    pub fn generate() -> Self {
        Self(BlockId::generate())
    }

    /// The id, for looking at: it cannot be sealed with.
    pub const fn id(&self) -> BlockId {
        self.0
    }
}

/// Seals one block, once.
///
/// ```compile_fail,E0382
/// # use us_core::{geometry::*, ids::VolumeId, seal::*};
/// # fn twice(key: VolumeKey, volume: VolumeId, one: &[u8], other: &[u8]) {
/// let sealer = BlockSealer::new(&key, volume, FreshBlockId::generate());
/// let first = sealer.seal_inline(&[one]);
/// let second = sealer.seal_inline(&[other]); // the sealer is gone
/// # }
/// ```
pub struct BlockSealer(PageKey);

impl BlockSealer {
    /// Takes `id`: nothing else will be sealed with it.
    pub fn new(volume_key: &VolumeKey, volume: VolumeId, id: FreshBlockId) -> Self {
        Self(PageKey::derive(volume_key, volume, id.0))
    }

    /// The block's id.
    pub const fn block(&self) -> BlockId {
        self.0.block
    }

    /// Seals the concatenation of `plaintext` into `sealed`: the s data fragments one after the
    /// other, padding zeroed. A page that lies whole in one slice is encrypted straight from it;
    /// a page of several is first gathered where it will lie. Nothing else is copied.
    ///
    /// # Errors
    /// [`SealError::Length`] unless the slices together are `geometry.plaintext_bytes()` long and
    /// `sealed` is s x `geometry.fragment_bytes()`. Nothing is sealed then, but the id is spent.
    pub fn seal_block(
        self,
        geometry: &BlockGeometry,
        plaintext: &[&[u8]],
        sealed: &mut [u8],
    ) -> Result<BlockId, SealError> {
        let found = plaintext.iter().map(|slice| slice.len()).sum();
        check_length("plaintext", geometry.plaintext_bytes(), found)?;
        let sealed_bytes = geometry.code().s() * geometry.fragment_bytes();
        check_length("sealed block", sealed_bytes, sealed.len())?;

        let mut source = Gather { slices: plaintext, start: 0 };
        // Fragments hold whole slots and lie one after the other, so page i is slot i of them all.
        let (slots, padding) = sealed.split_at_mut(geometry.pages() * geometry.slot_bytes());
        for (page, slot) in slots.chunks_exact_mut(geometry.slot_bytes()).enumerate() {
            let (content, rest) = slot.split_at_mut(geometry.page_plaintext_bytes(page));
            let (tag, slot_padding) = rest.split_at_mut(TAG_BYTES);
            self.0.seal(page, &mut source, content, tag);
            slot_padding.fill(0);
        }
        padding.fill(0);
        Ok(self.block())
    }

    /// Seals the concatenation of `plaintext` as a block of one page: ciphertext, then tag.
    ///
    /// # Errors
    /// [`SealError::InlineBytes`] for nothing or more than [`INLINE_BYTES_MAX`]. The id is spent.
    pub fn seal_inline(self, plaintext: &[&[u8]]) -> Result<Vec<u8>, SealError> {
        let bytes = plaintext.iter().map(|slice| slice.len()).sum();
        if bytes == 0 || bytes > INLINE_BYTES_MAX {
            return Err(SealError::InlineBytes { bytes });
        }
        let mut sealed = vec![0; bytes + TAG_BYTES];
        let (content, tag) = sealed.split_at_mut(bytes);
        self.0.seal(0, &mut Gather { slices: plaintext, start: 0 }, content, tag);
        Ok(sealed)
    }
}

impl fmt::Debug for BlockSealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockSealer({})", self.block())
    }
}

/// Opens pages of one block. Making one costs a key derivation, so readers keep it.
pub struct BlockOpener(PageKey);

impl BlockOpener {
    /// The opener of `block`.
    pub fn new(volume_key: &VolumeKey, volume: VolumeId, block: BlockId) -> Self {
        Self(PageKey::derive(volume_key, volume, block))
    }

    /// The block's id.
    pub const fn block(&self) -> BlockId {
        self.0.block
    }

    /// Opens page `page` where it lies and returns its plaintext, the start of `slot`. The slot
    /// may come without its padding, which is never looked at.
    ///
    /// # Errors
    /// [`SealError::PageTampered`] when the seal does not hold (the page is zeroed then),
    /// [`SealError::NoSuchPage`], or [`SealError::Length`] for a slot that is too short or long.
    pub fn open_page<'slot>(
        &self,
        geometry: &BlockGeometry,
        page: usize,
        slot: &'slot mut [u8],
    ) -> Result<&'slot mut [u8], SealError> {
        let bytes = self.page_bytes(geometry, page, slot.len())?;
        let (content, rest) = slot.split_at_mut(bytes);
        let tag = &rest[..TAG_BYTES];
        let (nonce, aad) = (page_nonce(page), Aad::from(self.0.aad));
        let opened = self.0.key.open_in_place_separate_tag(nonce, aad, tag, content).is_ok();
        believe(opened, content).ok_or(self.tampered(page))
    }

    /// Opens page `page` from shared bytes straight into `plaintext`: one pass, no copy.
    ///
    /// # Errors
    /// As [`BlockOpener::open_page`]; [`SealError::Length`] also unless `plaintext` is
    /// `geometry.page_plaintext_bytes(page)` long.
    pub fn open_page_into(
        &self,
        geometry: &BlockGeometry,
        page: usize,
        slot: &[u8],
        plaintext: &mut [u8],
    ) -> Result<(), SealError> {
        let bytes = self.page_bytes(geometry, page, slot.len())?;
        check_length("page", bytes, plaintext.len())?;
        self.open_from(page, &slot[..bytes + TAG_BYTES], plaintext).ok_or(self.tampered(page))
    }

    /// Opens inline data sealed by [`BlockSealer::seal_inline`].
    ///
    /// # Errors
    /// [`SealError::InlineTampered`] when the seal does not hold, [`SealError::InlineBytes`] for a
    /// length that no writer makes.
    pub fn open_inline(&self, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        let bytes = sealed.len().saturating_sub(TAG_BYTES);
        if bytes == 0 || bytes > INLINE_BYTES_MAX {
            return Err(SealError::InlineBytes { bytes });
        }
        let mut plaintext = vec![0; bytes];
        let tampered = SealError::InlineTampered { block: self.block() };
        self.open_from(0, sealed, &mut plaintext).ok_or(tampered)?;
        Ok(plaintext)
    }

    /// Plaintext bytes of the page, once it is clear that a slot of `slot_bytes` holds them.
    fn page_bytes(
        &self,
        geometry: &BlockGeometry,
        page: usize,
        slot_bytes: usize,
    ) -> Result<usize, SealError> {
        let pages = geometry.pages();
        if page >= pages {
            return Err(SealError::NoSuchPage { block: self.block(), page, pages });
        }
        let bytes = geometry.page_plaintext_bytes(page);
        if slot_bytes < bytes + TAG_BYTES || slot_bytes > geometry.slot_bytes() {
            check_length("slot", bytes + TAG_BYTES, slot_bytes)?;
        }
        Ok(bytes)
    }

    /// Opens ciphertext and tag into a plaintext of just the ciphertext's length.
    fn open_from(&self, page: usize, sealed: &[u8], plaintext: &mut [u8]) -> Option<()> {
        let (content, tag) = sealed.split_at(plaintext.len());
        let (nonce, aad) = (page_nonce(page), Aad::from(self.0.aad));
        let opened = self.0.key.open_separate_gather(nonce, aad, content, tag, plaintext).is_ok();
        believe(opened, plaintext).map(|_| ())
    }

    const fn tampered(&self, page: usize) -> SealError {
        SealError::PageTampered { block: self.block(), page }
    }
}

impl fmt::Debug for BlockOpener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockOpener({})", self.block())
    }
}

/// The key of one block, and what its pages are bound to.
struct PageKey {
    key: LessSafeKey,
    block: BlockId,
    /// Block id, then volume id.
    aad: [u8; 32],
}

impl PageKey {
    fn derive(volume_key: &VolumeKey, volume: VolumeId, block: BlockId) -> Self {
        let key = volume_key.derive::<KEY_BYTES>(&[BLOCK_LABEL, block.as_bytes()]);
        let mut aad = [0; 32];
        aad[..16].copy_from_slice(block.as_bytes());
        aad[16..].copy_from_slice(volume.as_bytes());
        Self { key: aead_key(&key), block, aad }
    }

    /// Seals the next `content.len()` bytes of `source`.
    fn seal(&self, page: usize, source: &mut Gather<'_>, content: &mut [u8], tag: &mut [u8]) {
        let (nonce, aad) = (page_nonce(page), Aad::from(self.aad));
        let sealed = match source.take_whole(content.len()) {
            Some(page) => self.key.seal_out_of_place_scatter(nonce, aad, page, content, &[], tag),
            None => {
                source.take_into(content);
                self.key.seal_in_place_scatter(nonce, aad, content, &[], tag)
            }
        };
        sealed.expect("AES-GCM seals up to 64 GiB");
    }
}

/// The plaintext if its seal held; else nobody sees what decryption left there.
fn believe(opened: bool, plaintext: &mut [u8]) -> Option<&mut [u8]> {
    if opened {
        return Some(plaintext);
    }
    plaintext.fill(0);
    None
}

/// The page index as a little-endian number of 96 bits.
fn page_nonce(page: usize) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[..8].copy_from_slice(&(page as u64).to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

fn check_length(what: &'static str, expected: usize, found: usize) -> Result<(), SealError> {
    if expected == found { Ok(()) } else { Err(SealError::Length { what, expected, found }) }
}

/// Reads many slices as one run of bytes.
struct Gather<'a> {
    slices: &'a [&'a [u8]],
    /// Where in the first slice the next byte lies.
    start: usize,
}

impl<'a> Gather<'a> {
    /// The next `bytes`, if they lie in one slice.
    fn take_whole(&mut self, bytes: usize) -> Option<&'a [u8]> {
        while let Some((slice, rest)) = self.slices.split_first() {
            if self.start < slice.len() {
                let whole = slice.get(self.start..self.start + bytes)?;
                self.start += bytes;
                return Some(whole);
            }
            (self.slices, self.start) = (rest, 0);
        }
        None
    }

    /// Copies the next bytes until `target` is full. The caller knows that there are enough.
    fn take_into(&mut self, mut target: &mut [u8]) {
        while !target.is_empty() {
            let (slice, rest) =
                self.slices.split_first().expect("the plaintext's length was checked");
            let available = &slice[self.start..];
            let bytes = available.len().min(target.len());
            target[..bytes].copy_from_slice(&available[..bytes]);
            target = &mut target[bytes..];
            self.start += bytes;
            if self.start == slice.len() {
                (self.slices, self.start) = (rest, 0);
            }
        }
    }
}
