//! The bytes of the files of records. docs/formats.md draws them.
//!
//! ```text
//! header (64)  0 magic "UsRecs\x01\x00"  8 version u16 = 1  10 flags u16 = 0  12 number u32
//!              16 incarnation u64  24 run u64  32 first seq of the run u64  40 salt (16)
//!              56 zero u32  60 CRC-32C of bytes 0..60
//! frame        0 magic "UsRF"  4 sealed bytes u32  8 CRC-32C of the frame with this field zero
//!              12 part u32, its highest bit: the record's last  16 seq u64  24 sealed
//! ```

use bytes::Bytes;
use us_core::fragment::crc32c;
use us_proto::v1::{RecordPart, StoreRecords};

/// Bytes of a file's header.
pub const HEADER_BYTES: usize = 64;
/// Bytes of a frame before what is sealed.
pub const FRAME_HEADER_BYTES: usize = 24;
/// The most sealed bytes of a part.
pub const SEALED_BYTES_MAX: usize = (1 << 20) + 64;
const FILE_MAGIC: [u8; 8] = *b"UsRecs\x01\x00";
const FRAME_MAGIC: [u8; 4] = *b"UsRF";
const VERSION: u16 = 1;
const LAST_BIT: u32 = 1 << 31;

/// Whose records a file holds. Later runs compare greater.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Label {
    /// Of the directory's state.
    pub incarnation: u64,
    /// The directory's start.
    pub run: u64,
    /// Records of earlier runs from here on are void.
    pub first_seq: u64,
    /// Random.
    pub salt: [u8; 16],
}

impl Label {
    /// The label of a message; `None` for one that makes no sense.
    pub fn of(records: &StoreRecords) -> Option<Self> {
        Some(Self {
            incarnation: records.incarnation,
            run: records.run,
            first_seq: records.run_first_seq,
            salt: records.salt[..].try_into().ok()?,
        })
    }

    /// A message of these records.
    pub fn message(&self, parts: Vec<RecordPart>) -> StoreRecords {
        StoreRecords {
            incarnation: self.incarnation,
            run: self.run,
            run_first_seq: self.first_seq,
            salt: self.salt.to_vec().into(),
            parts,
        }
    }
}

/// A file's header.
pub fn encode_header(number: u32, label: &Label) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&FILE_MAGIC);
    header[8..10].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&number.to_le_bytes());
    header[16..24].copy_from_slice(&label.incarnation.to_le_bytes());
    header[24..32].copy_from_slice(&label.run.to_le_bytes());
    header[32..40].copy_from_slice(&label.first_seq.to_le_bytes());
    header[40..56].copy_from_slice(&label.salt);
    let sum = crc32c(&header[..60]);
    header[60..].copy_from_slice(&sum.to_le_bytes());
    header
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}

/// The number and the label in a header; `None` for other bytes.
pub fn decode_header(bytes: &[u8]) -> Option<(u32, Label)> {
    let header = bytes.get(..HEADER_BYTES)?;
    let plain = header[..8] == FILE_MAGIC
        && header[8..10] == VERSION.to_le_bytes()
        && header[10..12] == [0; 2]
        && header[56..60] == [0; 4];
    if !plain || u32_at(header, 60)? != crc32c(&header[..60]) {
        return None;
    }
    let label = Label {
        incarnation: u64_at(header, 16)?,
        run: u64_at(header, 24)?,
        first_seq: u64_at(header, 32)?,
        salt: header[40..56].try_into().ok()?,
    };
    Some((u32_at(header, 12)?, label))
}

/// Appends a frame to `out`.
pub fn encode_frame(out: &mut Vec<u8>, part: &RecordPart) {
    let start = out.len();
    out.extend_from_slice(&FRAME_MAGIC);
    out.extend_from_slice(&(part.sealed.len() as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    let number = part.part | if part.last { LAST_BIT } else { 0 };
    out.extend_from_slice(&number.to_le_bytes());
    out.extend_from_slice(&part.seq.to_le_bytes());
    out.extend_from_slice(&part.sealed);
    let sum = crc32c(&out[start..]);
    out[start + 8..start + 12].copy_from_slice(&sum.to_le_bytes());
}

/// The frame that begins at `at`, and where it ends; `None` where none holds.
pub fn decode_frame(bytes: &Bytes, at: usize) -> Option<(RecordPart, usize)> {
    let header = bytes.get(at..at + FRAME_HEADER_BYTES)?;
    let sealed_bytes = u32_at(header, 4)? as usize;
    if header[..4] != FRAME_MAGIC || sealed_bytes > SEALED_BYTES_MAX {
        return None;
    }
    let end = at + FRAME_HEADER_BYTES + sealed_bytes;
    let mut whole = bytes.get(at..end)?.to_vec();
    whole[8..12].fill(0);
    if crc32c(&whole) != u32_at(header, 8)? {
        return None;
    }
    let number = u32_at(header, 12)?;
    let sealed = bytes.slice(at + FRAME_HEADER_BYTES..end);
    let (part, last) = (number & !LAST_BIT, number & LAST_BIT != 0);
    Some((RecordPart { seq: u64_at(header, 16)?, part, last, sealed }, end))
}
