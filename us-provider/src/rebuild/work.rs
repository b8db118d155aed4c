//! One order being carried out: from sources to records that are the writer's, or a reason.
//!
//! ```text
//! copy           take a wanted fragment whole from who has it -> check, else one of these:
//! star           pull s whole fragments, each checked as it comes -> compute -> check
//! rotated star   pull a share of each                             -> compute -> check, else star
//! chain, sites   ask for sums                                     -> add up  -> check, else star,
//!                                                                    and find out who lied
//! ```
//! Invariant: no record leaves whose body is not the one that a fingerprint list with the order's
//! hash speaks of.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use us_core::code::{CodeError, ErasureCode};
use us_core::disk::FragmentFailure;
use us_core::fragment::{FingerprintList, FragmentRecord, FragmentTrailer};
use us_core::ids::ProviderId;
use us_proto::v1::{FragmentStatus, Pulled, SourceFault};

use super::order::{Order, Path};
use super::pace::{Bucket, Patience};
use super::peers::Peers;
use crate::service::failure_status;
use crate::store::Store;

/// Why a source was of no use.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Fault {
    pub status: FragmentStatus,
    pub detail: String,
}

impl Fault {
    pub fn new(status: FragmentStatus, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into() }
    }

    pub fn damaged(detail: impl Into<String>) -> Self {
        Self::new(FragmentStatus::Damaged, detail)
    }

    /// Whether it says something about the fragment, and not only about its provider's day.
    pub fn concerns_bytes(&self) -> bool {
        matches!(self.status, FragmentStatus::Damaged | FragmentStatus::NotFound)
    }
}

impl From<FragmentFailure> for Fault {
    fn from(failure: FragmentFailure) -> Self {
        Self::new(failure_status(&failure), failure.to_string())
    }
}

/// Too few sources gave right bytes.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{detail}")]
pub(super) struct Short {
    pub detail: String,
}

impl Short {
    pub fn new(detail: impl Into<String>) -> Self {
        Self { detail: detail.into() }
    }
}

/// Slots and, for each of them, the fragments that are here: index and bytes.
pub(super) type Slices = Vec<(Range<usize>, Vec<(usize, Bytes)>)>;

/// One order under way.
pub(super) struct Work {
    pub order: Arc<Order>,
    pub store: Store,
    pub peers: Arc<dyn Peers>,
    pub code: ErasureCode,
    /// The fragments to be made.
    pub missing: Vec<u8>,
    pub deadline: Instant,
    pub bucket: Bucket,
    pub patience: Patience,
    /// By the source's position in the order.
    pub faults: BTreeMap<usize, Fault>,
    /// Of those who should have had wanted fragments themselves.
    pub holder_faults: Vec<SourceFault>,
    /// The fingerprints of the block, once somebody has shown them.
    pub list: Option<FingerprintList>,
    pub received_bytes: u64,
    /// What each provider sent, and from when to when.
    sent: BTreeMap<ProviderId, Sent>,
}

#[derive(Clone, Copy)]
struct Sent {
    bytes: u64,
    begun: Instant,
    ended: Instant,
}

impl Work {
    pub fn new(
        order: Arc<Order>,
        store: Store,
        peers: Arc<dyn Peers>,
        missing: Vec<u8>,
        deadline: Instant,
    ) -> Self {
        let now = Instant::now();
        Self {
            code: ErasureCode::new(order.geometry.code()),
            bucket: Bucket::new(now, order.bytes_per_s_max),
            patience: Patience::new(deadline.saturating_duration_since(now), order.patience),
            order,
            store,
            peers,
            missing,
            deadline,
            faults: BTreeMap::new(),
            holder_faults: Vec::new(),
            list: None,
            received_bytes: 0,
            sent: BTreeMap::new(),
        }
    }

    /// The records of the missing fragments.
    ///
    /// # Errors
    /// [`Short`]; what is known of the sources is in `faults` in any case.
    pub async fn run(&mut self) -> Result<Vec<FragmentRecord>, Short> {
        let mut records = self.copies().await;
        if self.missing.is_empty() {
            return Ok(records);
        }
        if self.order.sources.len() < self.code.code().s() {
            return Err(Short::new("no holder gave it right, and there are too few sources"));
        }
        records.extend(match self.order.path {
            Path::Star => self.star().await?.records,
            Path::RotatedStar => self.rotated_star().await?,
            Path::Chain | Path::Sites => self.summed().await?,
        });
        Ok(records)
    }

    /// A source could not be used. The first thing known about its bytes stands.
    pub fn fault(&mut self, source: usize, fault: Fault) {
        let known = self.faults.entry(source).or_insert_with(|| fault.clone());
        if !known.concerns_bytes() {
            *known = fault;
        }
    }

    /// Bytes of a provider came, `elapsed` after they were asked for.
    pub fn note_sent(&mut self, provider: ProviderId, bytes: usize, elapsed: Duration) {
        let ended = Instant::now();
        let begun = ended.checked_sub(elapsed).unwrap_or(ended);
        let sent = self.sent.entry(provider).or_insert(Sent { bytes: 0, begun, ended });
        sent.bytes += bytes as u64;
        sent.begun = sent.begun.min(begun);
        sent.ended = ended;
    }

    /// What each provider sent, as it is reported.
    pub fn wire_pulled(&self) -> Vec<Pulled> {
        let pulled = self.sent.iter().map(|(provider, sent)| Pulled {
            provider: provider.0,
            bytes: sent.bytes,
            took_us: sent.ended.duration_since(sent.begun).as_micros() as u64,
        });
        pulled.collect()
    }

    /// A source gave right bytes: that it was slow or busy before is forgotten.
    pub fn pardon(&mut self, source: usize) {
        if self.faults.get(&source).is_some_and(|fault| !fault.concerns_bytes()) {
            self.faults.remove(&source);
        }
    }

    /// The faults as they are reported.
    pub fn wire_faults(&self) -> Vec<SourceFault> {
        let faults = self.faults.iter().map(|(source, fault)| {
            let source = &self.order.sources[*source];
            SourceFault {
                index: source.index.into(),
                provider: source.provider.0,
                status: fault.status.into(),
                detail: fault.detail.clone(),
            }
        });
        faults.chain(self.holder_faults.iter().cloned()).collect()
    }

    /// Sources in their order, those with a fault last.
    pub fn ranked(&self) -> Vec<usize> {
        let mut ranked: Vec<usize> = (0..self.order.sources.len()).collect();
        ranked.sort_by_key(|source| self.faults.contains_key(source));
        ranked
    }

    /// The missing fragments computed from slices; `None` where they are not the writer's.
    pub async fn compute(&self, slices: Slices) -> Option<Vec<FragmentRecord>> {
        let (order, code) = (Arc::clone(&self.order), self.code.clone());
        let (missing, list) = (self.missing.clone(), self.list.clone()?);
        let computed = off_runtime(move || {
            let bodies = reconstruct(&code, &order, &missing, &slices).ok()?;
            records(&order, &missing, bodies, &list)
        });
        computed.await?
    }
}

/// Runs CPU work outside the runtime's workers; `None` when the runtime stops.
pub(super) async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Some(result),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_stopped) => None,
    }
}

/// The bodies of `wanted`, slice by slice, each from the first s fragments of the slice.
pub(super) fn reconstruct(
    code: &ErasureCode,
    order: &Order,
    wanted: &[u8],
    slices: &Slices,
) -> Result<Vec<Vec<u8>>, CodeError> {
    let slot_bytes = order.geometry.slot_bytes();
    let mut bodies = vec![vec![0u8; order.geometry.fragment_bytes()]; wanted.len()];
    for (slots, present) in slices {
        let present: Vec<(usize, &[u8])> =
            present.iter().map(|(index, bytes)| (*index, &bytes[..])).collect();
        let range = slots.start * slot_bytes..slots.end * slot_bytes;
        let mut outputs: Vec<(usize, &mut [u8])> = wanted
            .iter()
            .zip(&mut bodies)
            .map(|(index, body)| (usize::from(*index), &mut body[range.clone()]))
            .collect();
        code.reconstruct(&present, &mut outputs)?;
    }
    Ok(bodies)
}

/// The records of these bodies, if every one is the writer's.
pub(super) fn records(
    order: &Order,
    wanted: &[u8],
    bodies: Vec<Vec<u8>>,
    list: &FingerprintList,
) -> Option<Vec<FragmentRecord>> {
    let records = wanted.iter().zip(bodies).map(|(index, body)| {
        FragmentRecord::rebuilt(order.header(*index), body.into(), list.clone()).ok()
    });
    records.collect()
}

/// What a source's header and trailer are worth.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Shown {
    /// The fingerprint list of the block.
    List(FingerprintList),
    /// Not what the writer put; the slots may be right all the same.
    Doubtful(String),
}

/// Looks at what came of fragment `index`: header and trailer first, then the slots as far as they
/// can be checked: whole fragments against their fingerprint, others against their sums.
///
/// # Errors
/// What is wrong with the slots.
pub(super) fn examine(
    order: &Order,
    index: u8,
    slots: &Range<usize>,
    header: &[u8],
    trailer: &[u8],
    data: &[u8],
) -> Result<Shown, String> {
    let expected = slots.len() * order.geometry.slot_bytes();
    if data.len() != expected {
        return Err(format!("{} bytes came where {expected} were asked for", data.len()));
    }
    let own = order.header(index);
    if *header != own.encode() {
        return Ok(Shown::Doubtful("its header is not the block's".to_owned()));
    }
    let trailer = match FragmentTrailer::decode_listed(&own, &order.list_hash, trailer) {
        Ok(trailer) => trailer,
        Err(error) => return Ok(Shown::Doubtful(error.to_string())),
    };
    if *slots == (0..order.geometry.fragment_slots()) {
        trailer.fingerprints.check(index, data).map_err(|error| error.to_string())?;
    } else {
        trailer.verify_slots(&own, slots.start, data).map_err(|error| error.to_string())?;
    }
    Ok(Shown::List(trailer.fingerprints))
}
