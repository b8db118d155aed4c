//! The bytes of a segment file: its header, and the envelope before each record.
//!
//! ```text
//! segment = header (4 KiB) | record | record | ...         each on a multiple of 4 KiB
//! record  = envelope (64 B) | payload | zeros to the next multiple of 4 KiB
//! ```
//! docs/formats.md draws every byte. All numbers are little-endian.
//!
//! Why so: a record is found again after a damaged one by trying every 4 KiB. The segment's random
//! salt in each envelope is what a stored ciphertext cannot know, so bytes that a client chose are
//! never taken for a record. The offset in the envelope does the same for records that a disk wrote
//! to another place.
//!
//! Decoding believes nothing and never panics; it returns what the sums confirm, or `None`/an error.

use us_core::fragment::crc32c;
use us_core::ids::FragmentId;

/// Records begin at multiples of this, and segments hold a whole number of it.
pub const ALIGN: u64 = 4096;
/// Bytes of a segment's header.
pub const SEGMENT_HEADER_BYTES: u64 = ALIGN;
/// Bytes of an envelope.
pub const ENVELOPE_BYTES: usize = 64;
/// How a segment begins.
pub const SEGMENT_MAGIC: [u8; 8] = *b"UsSegm\x01\x00";
/// How an envelope begins.
pub const ENVELOPE_MAGIC: [u8; 8] = *b"UsReco\x01\x00";
/// The version of the format that this program writes and reads.
pub const SEGMENT_VERSION: u16 = 1;
/// The most fragments a control record names.
pub const CONTROL_IDS_MAX: usize = 4096;
/// The most bytes a payload can have: the longest fragment record is below it.
pub const PAYLOAD_BYTES_MAX: u32 = 16 << 20;

/// Bytes of the fixed part of a segment's header; zeros follow.
const HEADER_FIELDS_BYTES: usize = 64;
/// Bytes of a fragment's key in a control record.
const KEY_BYTES: usize = 17;

/// A segment's random mark, in every envelope of that segment.
pub type Salt = [u8; 16];

/// What a segment's header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    /// The store the segment belongs to.
    pub store: [u8; 16],
    /// The number of the segment: its place in the order of writing.
    pub number: u32,
    /// The mark in every envelope.
    pub salt: Salt,
}

/// Why bytes are not the header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentHeaderError {
    /// Fewer bytes than a header has.
    #[error("segment header of {found} bytes")]
    Short {
        /// The bytes there are.
        found: usize,
    },
    /// The bytes do not begin as a segment does.
    #[error("no segment: it begins with {found:02x?}")]
    Magic {
        /// The first eight bytes.
        found: [u8; 8],
    },
    /// The checksum does not hold.
    #[error("segment header damaged: its sum is {found:08x}, its bytes give {computed:08x}")]
    Sum {
        /// The sum stored.
        found: u32,
        /// The sum of the bytes.
        computed: u32,
    },
    /// A format of another time.
    #[error("segment format {found}: this program reads format {SEGMENT_VERSION}")]
    Version {
        /// The version in the header.
        found: u16,
    },
    /// Flags or reserved bytes that this version does not know.
    #[error("segment header holds unknown flags or reserved bytes")]
    Reserved,
}

impl SegmentHeader {
    /// The header's bytes, padded with zeros to [`SEGMENT_HEADER_BYTES`].
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0u8; SEGMENT_HEADER_BYTES as usize];
        bytes[0..8].copy_from_slice(&SEGMENT_MAGIC);
        bytes[8..10].copy_from_slice(&SEGMENT_VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.store);
        bytes[32..48].copy_from_slice(&self.salt);
        let sum = crc32c(&bytes[..HEADER_FIELDS_BYTES - 4]);
        bytes[HEADER_FIELDS_BYTES - 4..HEADER_FIELDS_BYTES].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads the header at the start of `bytes`.
    ///
    /// # Errors
    /// [`SegmentHeaderError`] for bytes that no writer of this version makes.
    pub fn decode(bytes: &[u8]) -> Result<Self, SegmentHeaderError> {
        let fields: &[u8; HEADER_FIELDS_BYTES] =
            bytes.first_chunk().ok_or(SegmentHeaderError::Short { found: bytes.len() })?;
        let magic = array(fields, 0);
        if magic != SEGMENT_MAGIC {
            return Err(SegmentHeaderError::Magic { found: magic });
        }
        let found = u32::from_le_bytes(array(fields, HEADER_FIELDS_BYTES - 4));
        let computed = crc32c(&fields[..HEADER_FIELDS_BYTES - 4]);
        if found != computed {
            return Err(SegmentHeaderError::Sum { found, computed });
        }
        let version = u16::from_le_bytes(array(fields, 8));
        if version != SEGMENT_VERSION {
            return Err(SegmentHeaderError::Version { found: version });
        }
        let reserved = [&fields[10..12], &fields[48..HEADER_FIELDS_BYTES - 4]];
        if reserved.into_iter().flatten().any(|byte| *byte != 0) {
            return Err(SegmentHeaderError::Reserved);
        }
        Ok(Self {
            number: u32::from_le_bytes(array(fields, 12)),
            store: array(fields, 16),
            salt: array(fields, 32),
        })
    }
}

/// What a record is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum RecordKind {
    /// A fragment; the payload is its record as `us_core::fragment` draws it.
    Fragment = 1,
    /// Was a fragment. Its header still says which; the rest may be a hole.
    Tombstone = 2,
    /// Names fragments that went to the trash.
    Trash = 3,
    /// Names fragments that came back from the trash.
    Restore = 4,
}

impl RecordKind {
    /// The kind with this number; `None` for a kind of another version.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Fragment),
            2 => Some(Self::Tombstone),
            3 => Some(Self::Trash),
            4 => Some(Self::Restore),
            _ => None,
        }
    }

    /// Whether the payload begins with a fragment's header.
    pub const fn names_one_fragment(self) -> bool {
        match self {
            Self::Fragment | Self::Tombstone => true,
            Self::Trash | Self::Restore => false,
        }
    }
}

/// What lies before each payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Envelope {
    /// The salt of the segment.
    pub salt: Salt,
    /// The record's number in the store; of two records of one fragment the higher one counts.
    pub seq: u64,
    /// Where the record begins in its segment.
    pub offset: u64,
    /// Unix seconds at which the fragments went to the trash. 0: not in the trash.
    pub trashed_at_s: u64,
    /// Bytes of the payload.
    pub payload_bytes: u32,
    /// CRC-32C of the payload of a control record. 0 before a fragment: it carries its own sums.
    pub payload_sum: u32,
    /// What the record is.
    pub kind: RecordKind,
}

impl Envelope {
    /// Bytes the whole record takes in its segment.
    pub const fn padded_bytes(&self) -> u64 {
        padded_bytes(self.payload_bytes)
    }

    /// The envelope's bytes.
    pub fn encode(&self) -> [u8; ENVELOPE_BYTES] {
        let mut bytes = [0u8; ENVELOPE_BYTES];
        bytes[0..8].copy_from_slice(&ENVELOPE_MAGIC);
        bytes[8..24].copy_from_slice(&self.salt);
        bytes[24..32].copy_from_slice(&self.seq.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.offset.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.trashed_at_s.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[52..56].copy_from_slice(&self.payload_sum.to_le_bytes());
        bytes[56] = self.kind as u8;
        let sum = crc32c(&bytes[..ENVELOPE_BYTES - 4]);
        bytes[ENVELOPE_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads the envelope at the start of `bytes`, which lie at `offset` of a segment with `salt`.
    /// `None` unless every field is one that a writer puts there.
    pub fn decode(bytes: &[u8], salt: &Salt, offset: u64) -> Option<Self> {
        let envelope = Self::decode_any_salt(bytes)?;
        (envelope.salt == *salt && envelope.offset == offset).then_some(envelope)
    }

    /// As [`Envelope::decode`], whatever the salt: for a segment whose header is lost.
    pub fn decode_any_salt(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; ENVELOPE_BYTES] = bytes.first_chunk()?;
        if array(bytes, 0) != ENVELOPE_MAGIC
            || u32::from_le_bytes(array(bytes, ENVELOPE_BYTES - 4))
                != crc32c(&bytes[..ENVELOPE_BYTES - 4])
            || bytes[57..ENVELOPE_BYTES - 4] != [0; 3]
        {
            return None;
        }
        let payload_bytes = u32::from_le_bytes(array(bytes, 48));
        (payload_bytes <= PAYLOAD_BYTES_MAX).then_some(Self {
            salt: array(bytes, 8),
            seq: u64::from_le_bytes(array(bytes, 24)),
            offset: u64::from_le_bytes(array(bytes, 32)),
            trashed_at_s: u64::from_le_bytes(array(bytes, 40)),
            payload_bytes,
            payload_sum: u32::from_le_bytes(array(bytes, 52)),
            kind: RecordKind::from_byte(bytes[56])?,
        })
    }
}

/// Bytes a record with a payload of `payload_bytes` takes in its segment.
pub const fn padded_bytes(payload_bytes: u32) -> u64 {
    (ENVELOPE_BYTES as u64 + payload_bytes as u64).next_multiple_of(ALIGN)
}

/// The payload of a control record: the fragments it names.
pub fn encode_control(ids: &[FragmentId]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.to_key()).collect()
}

/// Reads the payload of a control record; `None` unless it is a whole number of keys, at most
/// [`CONTROL_IDS_MAX`] of them.
pub fn decode_control(payload: &[u8]) -> Option<Vec<FragmentId>> {
    if !payload.len().is_multiple_of(KEY_BYTES) || payload.len() > CONTROL_IDS_MAX * KEY_BYTES {
        return None;
    }
    payload.chunks_exact(KEY_BYTES).map(FragmentId::from_key).collect()
}

/// The `N` bytes at `at`, which every caller keeps inside `bytes`.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut value = [0u8; N];
    value.copy_from_slice(&bytes[at..at + N]);
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use us_core::ids::BlockId;

    fn envelope() -> Envelope {
        Envelope {
            salt: [7; 16],
            seq: 9,
            offset: 8192,
            trashed_at_s: 0,
            payload_bytes: 4033,
            payload_sum: 5,
            kind: RecordKind::Trash,
        }
    }

    #[test]
    fn an_envelope_belongs_to_its_segment_and_place() {
        let bytes = envelope().encode();
        assert_eq!(Envelope::decode(&bytes, &[7; 16], 8192), Some(envelope()));
        assert_eq!(Envelope::decode(&bytes, &[8; 16], 8192), None);
        assert_eq!(Envelope::decode(&bytes, &[7; 16], 4096), None);
        assert_eq!(Envelope::decode(&bytes[..63], &[7; 16], 8192), None);
        assert_eq!(envelope().padded_bytes(), 8192);
        assert_eq!(padded_bytes(4032), 4096);
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let bytes = envelope().encode();
        for bit in 0..ENVELOPE_BYTES * 8 {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Envelope::decode(&bytes, &[7; 16], 8192), None, "bit {bit}");
        }
        let header = SegmentHeader { store: [1; 16], number: 2, salt: [3; 16] };
        let bytes = header.encode();
        assert_eq!(SegmentHeader::decode(&bytes), Ok(header));
        for bit in 0..HEADER_FIELDS_BYTES * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHeader::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn decoders_survive_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = SegmentHeader::decode(&bytes);
            let _ = Envelope::decode_any_salt(&bytes);
            let _ = decode_control(&bytes);
        }

        #[test]
        fn any_signed_bytes_decode_without_panic(mut bytes: [u8; 64]) {
            bytes[..8].copy_from_slice(&ENVELOPE_MAGIC);
            let sum = crc32c(&bytes[..60]);
            bytes[60..].copy_from_slice(&sum.to_le_bytes());
            if let Some(envelope) = Envelope::decode_any_salt(&bytes) {
                prop_assert!(envelope.padded_bytes() >= ALIGN);
            }
        }

        #[test]
        fn control_records_come_back(ids in prop::collection::vec(any::<([u8; 16], u8)>(), 0..50)) {
            let ids: Vec<_> = ids
                .into_iter()
                .map(|(block, index)| FragmentId { block: BlockId::from_bytes(block), index })
                .collect();
            prop_assert_eq!(decode_control(&encode_control(&ids)), Some(ids));
        }
    }
}
