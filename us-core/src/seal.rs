//! The seal: encryption and integrity of every byte that leaves the client.
//!
//! ```text
//! block key = HKDF-SHA256(no salt, volume key, info = "us block 1" || block id)
//! page      = AES-256-GCM(block key, nonce = page index, AAD = block id || volume id)
//! ```
//! docs/formats.md draws the bytes.
//!
//! **Invariant (rule 11.1): sealing consumes an id.** AES-GCM falls when two plaintexts are sealed
//! with one key and nonce, and both follow from the block id. So an id can be sealed with once
//! only: [`BlockSealer`] takes a [`FreshBlockId`], which nothing but the system's randomness makes
//! and nothing copies, and is itself consumed by the one block it seals. A retry sends the bytes
//! that were sealed, or starts with another id. No constructor makes a `FreshBlockId` of given
//! bytes, not even for tests.
//!
//! Who calls it: the write pipeline seals, readers and the cleaner open. Everything here is CPU
//! work without I/O; the caller keeps it off the async runtime. What may fail: only opening, and
//! it never shows a byte that the seal does not vouch for.

mod block;
mod key;
mod secret;

#[cfg(test)]
mod tests;

pub use block::{BlockOpener, BlockSealer, FreshBlockId, INLINE_BYTES_MAX};
pub(crate) use key::aead_key;
pub use key::{KEY_BYTES, VolumeKey};
pub use secret::{PieceKey, PieceNumber, Secret};

use crate::ids::BlockId;

/// Why a block was not sealed, or a page not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// A page's bytes are not those that were sealed as this page of this block and volume.
    #[error("page {page} of block {block} fails its seal: wrong or changed bytes, or a wrong key")]
    PageTampered {
        /// The block.
        block: BlockId,
        /// The page in the block.
        page: usize,
    },
    /// Inline data is not what was sealed under this id.
    #[error("inline block {block} fails its seal: wrong or changed bytes, or a wrong key")]
    InlineTampered {
        /// The block.
        block: BlockId,
    },
    /// The block has no such page.
    #[error("page {page} of block {block}, which has {pages}")]
    NoSuchPage {
        /// The block.
        block: BlockId,
        /// The page asked for.
        page: usize,
        /// Pages of the block.
        pages: usize,
    },
    /// A buffer or a plaintext is not as long as the geometry says.
    #[error("{what} of {found} bytes where {expected} were expected")]
    Length {
        /// What was measured: "plaintext", "sealed block", "slot" or "page".
        what: &'static str,
        /// The bytes the geometry asks for.
        expected: usize,
        /// The bytes found.
        found: usize,
    },
    /// Inline data must hold something, and only little.
    #[error("{bytes} bytes inline: 1 to {INLINE_BYTES_MAX} are possible")]
    InlineBytes {
        /// The bytes found.
        bytes: usize,
    },
}
