//! The first 128 bytes of a record: which fragment this is and how long its parts are.
//!
//! ```text
//!   0  magic "UsFrag\x01\x00"     48  birth            u64
//!   8  version         u16        56  page_bytes       u32
//!  10  flags           u16 = 0    60  plaintext_bytes  u32 (of the block)
//!  12  index           u8         64  fragment_bytes   u32
//!  13  s               u8         68  trailer_bytes    u32
//!  14  r               u8         72  zeros            52 B
//!  15  fingerprint kind u8       124  CRC-32C of bytes 0..124
//!  16  volume          16 B
//!  32  block           16 B
//! ```
//! The two lengths follow from the geometry; they are stored so that a reader which knows no codes
//! can still walk the records of a segment, and checked so that the two never disagree.

use super::{FingerprintKind, FragmentError, crc32c};
use crate::geometry::{BlockGeometry, Code};
use crate::ids::{Birth, BlockId, FragmentId, VolumeId};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 128;
/// How a record begins.
pub const MAGIC: [u8; 8] = *b"UsFrag\x01\x00";
/// The version of the format that this program writes and reads.
pub const FORMAT_VERSION: u16 = 1;

/// Where the header's own checksum lies.
const SUM_AT: usize = HEADER_BYTES - 4;
/// Where the reserved zeros lie.
const RESERVED: std::ops::Range<usize> = 72..SUM_AT;

/// What a fragment's record says about it. Values of this type are always consistent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FragmentHeader {
    volume: VolumeId,
    id: FragmentId,
    birth: Birth,
    geometry: BlockGeometry,
    fingerprint_kind: FingerprintKind,
}

impl FragmentHeader {
    /// The header of fragment `id` of a block of this geometry.
    ///
    /// # Errors
    /// [`FragmentError::Index`] when the code has no such fragment.
    pub fn new(
        volume: VolumeId,
        id: FragmentId,
        birth: Birth,
        geometry: BlockGeometry,
        fingerprint_kind: FingerprintKind,
    ) -> Result<Self, FragmentError> {
        let fragments = geometry.code().fragments();
        if usize::from(id.index) >= fragments {
            return Err(FragmentError::Index { index: id.index, fragments });
        }
        Ok(Self { volume, id, birth, geometry, fingerprint_kind })
    }

    /// The volume the block belongs to.
    pub const fn volume(&self) -> VolumeId {
        self.volume
    }

    /// Which fragment this is.
    pub const fn id(&self) -> FragmentId {
        self.id
    }

    /// The birth number of the lease under which the block was placed.
    pub const fn birth(&self) -> Birth {
        self.birth
    }

    /// The shape of the block.
    pub const fn geometry(&self) -> BlockGeometry {
        self.geometry
    }

    /// What the fingerprints in the trailer are.
    pub const fn fingerprint_kind(&self) -> FingerprintKind {
        self.fingerprint_kind
    }

    /// Slots of the body.
    pub const fn slots(&self) -> usize {
        self.geometry.fragment_slots()
    }

    /// Bytes of the body.
    pub const fn fragment_bytes(&self) -> usize {
        self.geometry.fragment_bytes()
    }

    /// Bytes of the trailer: slot sums, fingerprints, its own sum.
    pub const fn trailer_bytes(&self) -> usize {
        4 * self.slots() + self.fingerprint_kind.bytes() * self.geometry.code().fragments() + 4
    }

    /// Bytes of the whole record.
    pub const fn record_bytes(&self) -> usize {
        HEADER_BYTES + self.fragment_bytes() + self.trailer_bytes()
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let code = self.geometry.code();
        let mut bytes = [0u8; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[12] = self.id.index;
        bytes[13] = code.s() as u8;
        bytes[14] = code.r() as u8;
        bytes[15] = self.fingerprint_kind as u8;
        bytes[16..32].copy_from_slice(self.volume.as_bytes());
        bytes[32..48].copy_from_slice(self.id.block.as_bytes());
        bytes[48..56].copy_from_slice(&self.birth.0.to_le_bytes());
        let lengths = [
            self.geometry.page_bytes(),
            self.geometry.plaintext_bytes(),
            self.fragment_bytes(),
            self.trailer_bytes(),
        ];
        for (field, length) in bytes[56..72].chunks_exact_mut(4).zip(lengths) {
            field.copy_from_slice(&(length as u32).to_le_bytes());
        }
        let sum = crc32c(&bytes[..SUM_AT]);
        bytes[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads the header at the start of `bytes`; what follows it is ignored.
    ///
    /// # Errors
    /// [`FragmentError`] for bytes that no writer of this version makes.
    pub fn decode(bytes: &[u8]) -> Result<Self, FragmentError> {
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(FragmentError::Length {
            part: "header",
            expected: HEADER_BYTES,
            found: bytes.len(),
        })?;
        let magic: [u8; 8] = field(bytes, 0);
        if magic != MAGIC {
            return Err(FragmentError::Magic { found: magic });
        }
        let version = u16::from_le_bytes(field(bytes, 8));
        if version != FORMAT_VERSION {
            return Err(FragmentError::Version { found: version });
        }
        let (found, computed) = (u32_at(bytes, SUM_AT), crc32c(&bytes[..SUM_AT]));
        if found != computed {
            return Err(FragmentError::HeaderSum { found, computed });
        }
        if bytes[10..12] != [0; 2] || bytes[RESERVED].iter().any(|byte| *byte != 0) {
            return Err(FragmentError::Reserved);
        }
        let header = Self::decode_fields(bytes)?;
        for (part, at, expected) in
            [("body", 64, header.fragment_bytes()), ("trailer", 68, header.trailer_bytes())]
        {
            let found = u32_at(bytes, at) as usize;
            if found != expected {
                return Err(FragmentError::Length { part, expected, found });
            }
        }
        Ok(header)
    }

    /// The fields of a header whose sum holds.
    fn decode_fields(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FragmentError> {
        let code = Code::new(bytes[13].into(), bytes[14].into())?;
        let geometry =
            BlockGeometry::with_page(code, u32_at(bytes, 60) as usize, u32_at(bytes, 56) as usize)?;
        let id = FragmentId { block: BlockId::from_bytes(field(bytes, 32)), index: bytes[12] };
        Self::new(
            VolumeId::from_bytes(field(bytes, 16)),
            id,
            Birth(u64::from_le_bytes(field(bytes, 48))),
            geometry,
            FingerprintKind::from_byte(bytes[15])?,
        )
    }
}

/// The `N` bytes at `at`, which is inside the header wherever this module asks.
fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut value = [0u8; N];
    value.copy_from_slice(&bytes[at..at + N]);
    value
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}
