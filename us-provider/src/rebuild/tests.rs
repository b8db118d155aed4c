//! Every path against the writer's records: sources that lie, are missing, hang, are slow, forge
//! checksums, add up wrongly.

mod orders;
mod paths;
mod swarm;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use us_core::code::ErasureCode;
use us_core::disk::ProviderAddress;
use us_core::fragment::{FingerprintKind, FragmentRecord, records_of_block};
use us_core::geometry::{BlockGeometry, Code};
use us_core::ids::{Birth, BlockId, VolumeId};
use us_core::tls::KeyHash;
use us_proto::v1::{RebuildFragments, RebuildPath, RebuildSource};

use crate::store::{Store, StoreOptions};
use swarm::{Fate, Swarm};

/// The rebuilder's own number.
const OWN: u32 = 1000;

/// A block as its writer made it.
struct Block {
    geometry: BlockGeometry,
    records: Vec<FragmentRecord>,
}

impl Block {
    /// With the fingerprints of old blocks.
    fn new(s: usize, r: usize, bytes: usize, seed: u64) -> Self {
        Self::of_kind(FingerprintKind::Crc32c, s, r, bytes, seed)
    }

    fn of_kind(kind: FingerprintKind, s: usize, r: usize, bytes: usize, seed: u64) -> Self {
        let code = Code::new(s, r).unwrap();
        let geometry = BlockGeometry::new(code, bytes.clamp(1, code.block_bytes_max())).unwrap();
        let mut random = StdRng::seed_from_u64(seed);
        let mut bodies = vec![vec![0u8; geometry.fragment_bytes()]; s + r];
        let (data, parity) = bodies.split_at_mut(s);
        data.iter_mut().for_each(|body| random.fill_bytes(body));
        let data: Vec<&[u8]> = data.iter().map(|body| &body[..]).collect();
        let mut parity: Vec<&mut [u8]> = parity.iter_mut().map(|body| &mut body[..]).collect();
        ErasureCode::new(code).encode(&data, &mut parity).unwrap();
        let bodies = bodies.into_iter().map(Bytes::from).collect();
        let (volume, block) = (VolumeId::from_bytes([4; 16]), BlockId::generate());
        let records = records_of_block(kind, volume, block, Birth(seed), geometry, bodies);
        Self { geometry, records }
    }

    /// The order for these fragments; fragment i is with provider i.
    fn order(&self, wanted: &[u8], path: RebuildPath) -> RebuildFragments {
        let (code, header) = (self.geometry.code(), self.records[0].header);
        let indexes = (0..code.fragments() as u8).filter(|index| !wanted.contains(index));
        let source = |index: u8| RebuildSource {
            index: index.into(),
            provider: index.into(),
            address: address(index).address,
            key_hash: address(index).key_hash.as_bytes().to_vec().into(),
            site: format!("site {}", index % 3),
            ..RebuildSource::default()
        };
        RebuildFragments {
            ticket: 1,
            block: header.id().block.as_bytes().to_vec().into(),
            volume: header.volume().as_bytes().to_vec().into(),
            birth: header.birth().0,
            s: code.s() as u32,
            r: code.r() as u32,
            page_bytes: self.geometry.page_bytes() as u32,
            plaintext_bytes: self.geometry.plaintext_bytes() as u32,
            fingerprint_kind: header.fingerprint_kind() as u32,
            fingerprint_hash: self.records[0].trailer.fingerprints.hash().to_vec().into(),
            wanted: wanted.iter().map(|index| u32::from(*index)).collect(),
            sources: indexes.map(source).collect(),
            path: path.into(),
            deadline_ms: 60_000,
            ..RebuildFragments::default()
        }
    }

    /// The order for one fragment that provider `holder` should have itself.
    fn order_copy(&self, wanted: u8, holder: u8) -> RebuildFragments {
        let mut order = self.order(&[wanted], RebuildPath::Star);
        order.holders = vec![RebuildSource {
            index: wanted.into(),
            provider: holder.into(),
            address: address(holder).address,
            key_hash: address(holder).key_hash.as_bytes().to_vec().into(),
            ..RebuildSource::default()
        }];
        order
    }

    /// A swarm in which provider i holds fragment i and behaves as `fates` says.
    fn swarm(&self, fates: &BTreeMap<u8, Fate>) -> Arc<Swarm> {
        let nodes = self.records.iter().zip(0u8..).map(|(record, index)| {
            (address(index).address, record.clone(), fates.get(&index).copied().unwrap_or_default())
        });
        Arc::new(Swarm::new(nodes))
    }
}

fn address(index: u8) -> ProviderAddress {
    let (address, key_hash) = (format!("node:{index}"), KeyHash::from_bytes([index; 32]));
    ProviderAddress { address, key_hash, reachable: true }
}

fn open(dir: &std::path::Path) -> Store {
    let options = StoreOptions { index_cache_bytes: 1 << 20, ..StoreOptions::default() };
    Store::open(dir, options).unwrap()
}

const PATHS: [RebuildPath; 4] =
    [RebuildPath::Star, RebuildPath::RotatedStar, RebuildPath::Chain, RebuildPath::Sites];
