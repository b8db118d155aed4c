//! CRC-32C of slots and bodies, each byte read once.
//!
//! The sum of a body follows from the sums of its slots: advancing a CRC over n bytes is a
//! multiplication by x^8n in GF(2)[x] / P (the method of zlib's `crc32_combine`). All slots of a
//! block have one length, so the multiplier is a constant. `crc_fast::checksum_combine` builds its
//! matrices anew at each call, which takes longer than reading the slot's bytes again.

use crate::geometry::{BlockGeometry, PAGE_SIZES, TAG_BYTES};

/// The polynomial of CRC-32C, its bits reflected as the checksum's are.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// The polynomial 1 in reflected bits.
const ONE: u32 = 1 << 31;
/// The polynomial x in reflected bits.
const X: u32 = 1 << 30;

/// CRC-32C (also known as CRC-32/ISCSI), the one checksum of Us.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// The sums of one fragment's body.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FragmentSums {
    /// CRC-32C of each slot, in order.
    pub slots: Vec<u32>,
    /// CRC-32C of the whole body.
    pub body: u32,
}

impl FragmentSums {
    /// The sums of `body`, a fragment of a block of this geometry. Reads each byte once.
    ///
    /// # Panics
    /// When the body is not `geometry.fragment_bytes()` long.
    pub fn of(geometry: &BlockGeometry, body: &[u8]) -> Self {
        assert_eq!(body.len(), geometry.fragment_bytes(), "a whole fragment");
        let slots: Vec<u32> = body.chunks_exact(geometry.slot_bytes()).map(crc32c).collect();
        let body = body_sum(geometry.slot_bytes(), &slots);
        Self { slots, body }
    }
}

/// The sum of the slots' concatenation, from the sums of the slots.
pub(super) fn body_sum(slot_bytes: usize, slots: &[u32]) -> u32 {
    let advance = slot_advance(slot_bytes);
    slots.iter().copied().reduce(|sum, slot| multiply(sum, advance) ^ slot).unwrap_or(0)
}

/// x^(8 slot_bytes) mod P.
fn slot_advance(slot_bytes: usize) -> u32 {
    const KNOWN: [u32; PAGE_SIZES.len()] = [
        advance(PAGE_SIZES[0] + TAG_BYTES),
        advance(PAGE_SIZES[1] + TAG_BYTES),
        advance(PAGE_SIZES[2] + TAG_BYTES),
    ];
    PAGE_SIZES
        .iter()
        .position(|page_bytes| page_bytes + TAG_BYTES == slot_bytes)
        .map_or_else(|| advance(slot_bytes), |known| KNOWN[known])
}

/// x^(8 bytes) mod P, by squaring.
const fn advance(bytes: usize) -> u32 {
    let mut exponent = 8 * bytes as u64;
    let mut square = X;
    let mut product = ONE;
    while exponent != 0 {
        if exponent & 1 == 1 {
            product = multiply(product, square);
        }
        square = multiply(square, square);
        exponent >>= 1;
    }
    product
}

/// The product of two polynomials mod P, in reflected bits, without branches.
const fn multiply(a: u32, b: u32) -> u32 {
    let (mut a, mut b, mut product) = (a, b, 0);
    let mut bit = 0;
    while bit < 32 {
        product ^= b & 0u32.wrapping_sub(a >> 31);
        a <<= 1;
        b = (b >> 1) ^ (POLYNOMIAL & 0u32.wrapping_sub(b & 1));
        bit += 1;
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;
    use crc_fast::{CrcAlgorithm::Crc32Iscsi, checksum_combine};
    use proptest::prelude::*;

    #[test]
    fn crc32c_is_the_catalogued_one() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    proptest! {
        #[test]
        fn slots_combine_as_the_library_combines(
            first: u32, second: u32, bytes in 1usize..100_000,
        ) {
            let expected = checksum_combine(Crc32Iscsi, first.into(), second.into(), bytes as u64);
            prop_assert_eq!(u64::from(multiply(first, advance(bytes)) ^ second), expected);
        }

        #[test]
        fn body_sum_is_the_sum_of_the_body(body in prop::collection::vec(any::<u8>(), 1..2000)) {
            let slot_bytes = body.len().div_ceil(7);
            let whole = body.len() / slot_bytes * slot_bytes;
            let slots: Vec<u32> = body[..whole].chunks(slot_bytes).map(crc32c).collect();
            prop_assert_eq!(body_sum(slot_bytes, &slots), crc32c(&body[..whole]));
        }
    }
}
