//! The directory's order, checked: which fragments of which block are to be made of which others.
//!
//! Nothing is done for an order that does not fit together; what passes here has indexes inside the
//! code, each once, and a place for every source.

use std::num::NonZeroU64;
use std::time::Duration;

use bytes::Bytes;
use us_core::disk::ProviderAddress;
use us_core::fragment::{FingerprintKind, FragmentError, FragmentHeader};
use us_core::geometry::{BlockGeometry, Code, FRAGMENTS_MAX, GeometryError};
use us_core::ids::{Birth, BlockId, FragmentId, ProviderId, VolumeId};
use us_core::tls::KeyHash;
use us_proto::v1::{RebuildFragments, RebuildPath, RebuildSource};

/// Where an order sets none.
const DEADLINE: Duration = Duration::from_secs(120);
/// No order may take longer, whatever it says.
const DEADLINE_MAX: Duration = Duration::from_secs(3600);

/// Why an order is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// An id, a hash or a key hash of a wrong length.
    #[error("its {field} is not one")]
    Field {
        /// Which.
        field: &'static str,
    },
    /// A code or a block that no writer makes.
    #[error("it describes an impossible block: {0}")]
    Geometry(#[from] GeometryError),
    /// A kind of fingerprints that this program does not know, or an index outside the code.
    #[error("it describes an impossible fragment: {0}")]
    Fragment(#[from] FragmentError),
    /// No fragment wanted, or more than the block can do without.
    #[error("it wants {wanted} fragments, of a block with {parity} to spare")]
    Wanted {
        /// How many.
        wanted: usize,
        /// r.
        parity: usize,
    },
    /// Fewer sources than any rebuilding needs.
    #[error("it names {found} sources: {needed} are needed")]
    Sources {
        /// How many.
        found: usize,
        /// s.
        needed: usize,
    },
    /// An index outside the code, or named twice.
    #[error("it names fragment {index} where it cannot")]
    Index {
        /// The index.
        index: u32,
    },
}

/// A fragment that may be asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source {
    /// Its index.
    pub index: u8,
    /// Who has it.
    pub provider: ProviderId,
    /// Where that is; `None`: here.
    pub place: Option<ProviderAddress>,
    /// The site of its provider; may be empty.
    pub site: String,
    /// What it shows to others whose sums it adds.
    pub grant: Bytes,
}

/// How the bytes come here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Path {
    /// s whole fragments.
    Star,
    /// Of every source the same share.
    RotatedStar,
    /// One sum, handed from source to source.
    Chain,
    /// One sum for each site.
    Sites,
}

/// A checked order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Order {
    /// The directory's number for it.
    pub ticket: u64,
    /// The block's volume.
    pub volume: VolumeId,
    /// The block.
    pub block: BlockId,
    /// The birth number of its placement.
    pub birth: Birth,
    /// Its shape.
    pub geometry: BlockGeometry,
    /// What its fingerprints are.
    pub kind: FingerprintKind,
    /// The hash of their list.
    pub list_hash: [u8; 32],
    /// The fragments to be made, in rising order.
    pub wanted: Vec<u8>,
    /// Who has wanted fragments themselves.
    pub holders: Vec<Source>,
    /// What they may be made of; the first are preferred.
    pub sources: Vec<Source>,
    /// How.
    pub path: Path,
    /// How long it may take from its receipt.
    pub deadline: Duration,
    /// No source is late before.
    pub patience: Duration,
    /// Bytes to be received in a second at most.
    pub bytes_per_s_max: Option<NonZeroU64>,
    /// What is shown to those who are asked.
    pub grant: Bytes,
}

impl Order {
    /// Checks an order for the provider `own`.
    ///
    /// # Errors
    /// [`OrderError`] for one that makes no sense.
    pub fn check(order: &RebuildFragments, own: ProviderId) -> Result<Self, OrderError> {
        let field = |field| OrderError::Field { field };
        let code = Code::new(order.s as usize, order.r as usize)?;
        let (plaintext_bytes, page_bytes) = (order.plaintext_bytes, order.page_bytes);
        let geometry =
            BlockGeometry::with_page(code, plaintext_bytes as usize, page_bytes as usize)?;
        let kind = u8::try_from(order.fingerprint_kind).map_err(|_| field("fingerprint kind"))?;
        let Named { wanted, holders, sources } = indexes(order, code, own)?;
        let path = match order.path() {
            RebuildPath::Unspecified | RebuildPath::Star => Path::Star,
            RebuildPath::RotatedStar => Path::RotatedStar,
            RebuildPath::Chain => Path::Chain,
            RebuildPath::Sites => Path::Sites,
        };
        let deadline = match order.deadline_ms {
            0 => DEADLINE,
            asked => Duration::from_millis(asked).min(DEADLINE_MAX),
        };
        let list_hash = &order.fingerprint_hash[..];
        Ok(Self {
            ticket: order.ticket,
            volume: VolumeId::from_slice(&order.volume).ok_or(field("volume"))?,
            block: BlockId::from_slice(&order.block).ok_or(field("block"))?,
            birth: Birth(order.birth),
            geometry,
            kind: FingerprintKind::from_byte(kind)?,
            list_hash: list_hash.try_into().map_err(|_| field("fingerprint hash"))?,
            wanted,
            holders,
            sources,
            path,
            deadline,
            patience: Duration::from_millis(order.patience_ms),
            bytes_per_s_max: NonZeroU64::new(order.bytes_per_s_max),
            grant: order.grant.clone(),
        })
    }

    /// The id of a fragment of the block.
    pub fn id(&self, index: u8) -> FragmentId {
        FragmentId { block: self.block, index }
    }

    /// The header that the record of a fragment of the block has.
    pub fn header(&self, index: u8) -> FragmentHeader {
        FragmentHeader::new(self.volume, self.id(index), self.birth, self.geometry, self.kind)
            .expect("indexes were checked with the order")
    }

    /// The most memory that carrying it out takes.
    pub fn memory_bytes(&self) -> usize {
        (self.sources.len() + 3 * self.wanted.len()) * self.geometry.fragment_bytes()
    }
}

/// The fragments an order names.
struct Named {
    wanted: Vec<u8>,
    holders: Vec<Source>,
    sources: Vec<Source>,
}

/// Wanted fragments, who has them, and sources: all inside the code, none named twice.
fn indexes(order: &RebuildFragments, code: Code, own: ProviderId) -> Result<Named, OrderError> {
    if order.wanted.is_empty() || order.wanted.len() > code.r() {
        let (wanted, parity) = (order.wanted.len(), code.r());
        return Err(OrderError::Wanted { wanted, parity });
    }
    let mut seen = [false; FRAGMENTS_MAX];
    let mut take = |index: u32| -> Result<u8, OrderError> {
        let seen = seen[..code.fragments()].get_mut(index as usize);
        let seen = seen.filter(|seen| !**seen).ok_or(OrderError::Index { index })?;
        *seen = true;
        Ok(index as u8)
    };
    let mut wanted =
        order.wanted.iter().map(|index| take(*index)).collect::<Result<Vec<_>, _>>()?;
    wanted.sort_unstable();
    let named = |source: &RebuildSource, index: u8| {
        let provider = ProviderId(source.provider);
        let place = if provider == own { None } else { Some(place(source)?) };
        let (site, grant) = (source.site.clone(), source.grant.clone());
        Ok(Source { index, provider, place, site, grant })
    };
    let sources = order.sources.iter().map(|source| named(source, take(source.index)?));
    let sources = sources.collect::<Result<Vec<_>, OrderError>>()?;
    let mut holders: Vec<Source> = Vec::with_capacity(wanted.len());
    for holder in &order.holders {
        let index = wanted.iter().copied().find(|index| u32::from(*index) == holder.index);
        let index = index.filter(|index| holders.iter().all(|known| known.index != *index));
        holders.push(named(holder, index.ok_or(OrderError::Index { index: holder.index })?)?);
    }
    if sources.len() < code.s() && holders.len() < wanted.len() {
        return Err(OrderError::Sources { found: sources.len(), needed: code.s() });
    }
    Ok(Named { wanted, holders, sources })
}

fn place(source: &RebuildSource) -> Result<ProviderAddress, OrderError> {
    let key_hash = KeyHash::from_slice(&source.key_hash);
    let key_hash = key_hash.ok_or(OrderError::Field { field: "source's key hash" })?;
    if source.address.is_empty() {
        return Err(OrderError::Field { field: "source's address" });
    }
    Ok(ProviderAddress { address: source.address.clone(), key_hash, reachable: true })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn order() -> RebuildFragments {
        let source = |index: u32| RebuildSource {
            index,
            provider: 10 + index,
            address: format!("host:{index}"),
            key_hash: vec![1; 32].into(),
            ..RebuildSource::default()
        };
        RebuildFragments {
            ticket: 3,
            block: vec![1; 16].into(),
            volume: vec![2; 16].into(),
            s: 4,
            r: 2,
            page_bytes: 4096,
            plaintext_bytes: 20_000,
            fingerprint_kind: 1,
            fingerprint_hash: vec![3; 32].into(),
            wanted: vec![5, 1],
            sources: [0, 2, 3, 4].map(source).to_vec(),
            ..RebuildFragments::default()
        }
    }

    #[test]
    fn an_order_that_fits_together_passes() {
        let checked = Order::check(&order(), ProviderId(12)).unwrap();
        assert_eq!((checked.wanted.as_slice(), checked.path), (&[1, 5][..], Path::Star));
        assert_eq!((checked.deadline, checked.bytes_per_s_max), (DEADLINE, None));
        assert!(checked.sources[1].place.is_none(), "provider 12 is this one");
        assert_eq!(checked.sources[0].place.as_ref().unwrap().address, "host:0");
        assert_eq!(checked.header(5).id().index, 5);
    }

    #[test]
    fn an_order_that_does_not_is_refused() {
        let spoil: [fn(&mut RebuildFragments); 16] = [
            |order| order.holders = vec![order.sources[0].clone()],
            |order| {
                let holder = RebuildSource { index: 1, ..order.sources[0].clone() };
                order.holders = vec![holder.clone(), holder];
            },
            |order| order.block = vec![1; 15].into(),
            |order| order.volume = vec![].into(),
            |order| order.fingerprint_hash = vec![1; 31].into(),
            |order| order.fingerprint_kind = 3,
            |order| order.fingerprint_kind = 257,
            |order| order.s = 0,
            |order| order.page_bytes = 4000,
            |order| order.plaintext_bytes = 0,
            |order| order.wanted.clear(),
            |order| order.wanted = vec![1, 5, 0],
            |order| order.wanted = vec![6],
            |order| order.wanted = vec![0],
            |order| drop(order.sources.pop()),
            |order| order.sources[3].key_hash = vec![0; 31].into(),
        ];
        for (number, spoil) in spoil.into_iter().enumerate() {
            let mut order = order();
            spoil(&mut order);
            assert!(Order::check(&order, ProviderId(1)).is_err(), "{number}");
        }
    }

    proptest! {
        #[test]
        fn any_numbers_are_an_order_or_an_error(
            s: u32, r in 0u32..300, page_bytes: u32, plaintext_bytes: u32, kind: u32,
            wanted in prop::collection::vec(any::<u32>(), 0..4), index: u32,
        ) {
            let mut order = RebuildFragments {
                s, r, page_bytes, plaintext_bytes, fingerprint_kind: kind, wanted, ..order()
            };
            order.sources[0].index = index;
            let _ = Order::check(&order, ProviderId(1));
        }
    }
}
