//! Fragment records for tests, benchmarks and examples: the same number gives the same bytes.

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use us_core::fragment::{FingerprintKind, records_of_block};
use us_core::geometry::{BlockGeometry, Code};
use us_core::ids::{Birth, BlockId, FragmentId, VolumeId};

/// The id of [`sample`]'s fragment.
pub fn sample_id(number: u64) -> FragmentId {
    let mut block = [0u8; 16];
    block[8..].copy_from_slice(&number.to_be_bytes());
    FragmentId { block: BlockId::from_bytes(block), index: 0 }
}

/// The volume of all samples.
pub fn sample_volume() -> VolumeId {
    VolumeId::from_bytes([3; 16])
}

/// The record of fragment 0 of block `number`, whose plaintext has `bytes`; other seeds, other
/// bytes.
pub fn sample(number: u64, bytes: usize, seed: u64) -> (FragmentId, Bytes) {
    let geometry = BlockGeometry::new(Code::new(1, 1).expect("a code"), bytes).expect("a block");
    (sample_id(number), record(number, geometry, seed))
}

fn record(number: u64, geometry: BlockGeometry, seed: u64) -> Bytes {
    let mut random = StdRng::seed_from_u64(number << 8 | seed);
    let bodies = (0..2).map(|_| {
        let mut body = vec![0u8; geometry.fragment_bytes()];
        random.fill_bytes(&mut body);
        Bytes::from(body)
    });
    let (volume, id) = (sample_volume(), sample_id(number));
    let records = records_of_block(
        FingerprintKind::Crc32c,
        volume,
        id.block,
        Birth(number),
        geometry,
        bodies.collect(),
    );
    records[0].to_parts().slices().concat().into()
}
