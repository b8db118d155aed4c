//! The file `grants`: what a provider was told last and the period it has counted to since, so that it
//! can judge before its directory is back.
//!
//! ```text
//! 0          8     40        56      64       72          80
//! | "UsGrnt" | key | cluster | inc.  | period | period_ms | CRC-32C |
//!   8          32    16        u64     u64      u64         u32
//! ```
//! Little-endian.

use us_core::fragment::crc32c;
use us_core::ids::ClusterId;

use super::Told;

const MAGIC: [u8; 8] = *b"UsGrnt\x01\x00";
const CONTENT_BYTES: usize = 80;

/// The bytes of the file.
pub fn encode_told(told: &Told) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&told.key);
    bytes.extend_from_slice(told.cluster.as_bytes());
    for number in [told.incarnation, told.period, told.period_ms] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    let sum = crc32c(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    bytes
}

/// The inverse of [`encode_told`]; `None` for other bytes.
pub fn decode_told(bytes: &[u8]) -> Option<Told> {
    let (content, sum) = bytes.split_last_chunk()?;
    if content.len() != CONTENT_BYTES || crc32c(content) != u32::from_le_bytes(*sum) {
        return None;
    }
    let number = |at: usize| Some(u64::from_le_bytes(*content[at..].first_chunk()?));
    let told = Told {
        key: *content[8..].first_chunk()?,
        cluster: ClusterId::from_slice(&content[40..56])?,
        incarnation: number(56)?,
        period: number(64)?,
        period_ms: number(72)?,
    };
    (content[..8] == MAGIC && told.period_ms > 0).then_some(told)
}
