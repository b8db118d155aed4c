//! The self-describing record in which a fragment is stored and travels.
//!
//! ```text
//! record = header (128 B) | body (k slots of page + 16 B) | trailer
//! trailer = k x slot CRC-32C | f x fingerprint | CRC-32C of the trailer
//! ```
//! docs/formats.md draws every byte. All numbers are little-endian.
//!
//! Who trusts what: a provider checks the header, the trailer and the slot sums before it stores a
//! record, and on every scrub. A reader that holds the volume's key needs none of it, because each
//! page carries its own seal. Repair and audits, which hold no key, check a fragment against the
//! fingerprint list, and the list against the hash that the block's commit holds.
//!
//! The sums guard against accidents, not against malice: anyone can make a CRC match. Fingerprints
//! of the kind that new blocks have guard against malice too.
//!
//! Decoding believes nothing: whatever the bytes, it returns a record whose every length agrees
//! with its geometry, or an error. It copies no body bytes.

mod fingerprint;
mod header;
mod record;
mod sums;
mod trailer;

#[cfg(test)]
mod tests;

pub use fingerprint::{FINGERPRINT_BYTES_MAX, FingerprintKind, FingerprintList};
pub use header::{FORMAT_VERSION, FragmentHeader, HEADER_BYTES, MAGIC};
pub use record::{FragmentRecord, RecordParts, records_of_block};
pub use sums::{FragmentSums, crc32c};
pub use trailer::FragmentTrailer;

use crate::geometry::GeometryError;
use crate::ids::FragmentId;

/// Why bytes are not a fragment record, or not the fragment they claim to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FragmentError {
    /// Fewer or more bytes than the format says.
    #[error("{part} of {found} bytes: {expected} expected")]
    Length {
        /// What was measured: "header", "record", "trailer", "body" or "slots".
        part: &'static str,
        /// The bytes the format asks for.
        expected: usize,
        /// The bytes found.
        found: usize,
    },
    /// The bytes do not begin as a fragment record does.
    #[error("no fragment record: it begins with {found:02x?}")]
    Magic {
        /// The first eight bytes.
        found: [u8; 8],
    },
    /// A format of another time.
    #[error("fragment format {found}: this program reads format {FORMAT_VERSION}")]
    Version {
        /// The version in the header.
        found: u16,
    },
    /// The header's checksum does not hold: its other fields cannot be believed.
    #[error("fragment header damaged: its sum is {found:08x}, its bytes give {computed:08x}")]
    HeaderSum {
        /// The sum stored.
        found: u32,
        /// The sum of the bytes.
        computed: u32,
    },
    /// Flags or reserved bytes that this version does not know.
    #[error("fragment header holds unknown flags or reserved bytes")]
    Reserved,
    /// A kind of fingerprint that this version does not know.
    #[error("unknown fingerprint kind {found}")]
    FingerprintKind {
        /// The kind byte.
        found: u8,
    },
    /// A code, page size or block size that no writer makes.
    #[error("fragment header describes an impossible block")]
    Geometry(#[from] GeometryError),
    /// An index outside the code.
    #[error("fragment {index} of a code of {fragments} fragments")]
    Index {
        /// The index found.
        index: u8,
        /// The fragments of the code.
        fragments: usize,
    },
    /// The trailer's checksum does not hold.
    #[error(
        "trailer of fragment {id} damaged: its sum is {found:08x}, \
         its bytes give {computed:08x}"
    )]
    TrailerSum {
        /// The fragment, as its header names it.
        id: FragmentId,
        /// The sum stored.
        found: u32,
        /// The sum of the bytes.
        computed: u32,
    },
    /// A slot's bytes are not those that were written.
    #[error(
        "slot {slot} of fragment {id} damaged: its sum is {found:08x}, \
         its bytes give {computed:08x}"
    )]
    SlotSum {
        /// The fragment.
        id: FragmentId,
        /// The slot in the fragment.
        slot: usize,
        /// The sum stored.
        found: u32,
        /// The sum of the bytes.
        computed: u32,
    },
    /// Slots were asked for that the fragment does not have.
    #[error("slots {first_slot}..{end_slot} of fragment {id}, which has {slots}")]
    NoSuchSlot {
        /// The fragment.
        id: FragmentId,
        /// First slot asked for.
        first_slot: usize,
        /// End of the slots asked for.
        end_slot: usize,
        /// Slots the fragment has.
        slots: usize,
    },
    /// A fingerprint list that is not the one the block's commit speaks of.
    #[error("the fingerprints of fragment {id} are not the block's")]
    OtherList {
        /// The fragment.
        id: FragmentId,
    },
    /// A fragment's bytes are not those its fingerprint was taken of.
    #[error("fragment {index} does not match its fingerprint")]
    Fingerprint {
        /// The fragment's index in its block.
        index: u8,
    },
}
