//! Partial sums: this provider's own part, and what it asks others for.
//!
//! A request is a tree of requests. What is asked of others is bounded before anything is done:
//! depth, items, upstreams, slots; and then by memory and time. Only providers and the directory may
//! have others asked: else a client could make this provider dial at its will.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::stream::{self, StreamExt};
use tokio::time::Instant;
use tonic::Status;
use us_core::code::combine_into;
use us_core::disk::{FragmentFailure, ProviderAddress};
use us_core::fragment::FragmentHeader;
use us_core::geometry::{FRAGMENTS_MAX, PAGE_SIZES, SEALED_BYTES_MAX, TAG_BYTES};
use us_core::grant::Rights;
use us_core::ids::FragmentId;
use us_core::tls::{KeyHash, PeerIdentity, Role};
use us_proto::v1::{self, CombineReply, CombineRequest, FragmentStatus};

use super::status::{failure_status, status_of};
use super::{FragmentService, UNIT_BYTES, id_of, wire_id};
use crate::grants::{Admitted, Denied};
use crate::rebuild::{COMBINE_DEPTH_MAX, COMBINE_UPSTREAMS_MAX};
use crate::store::StoreError;

/// Fragments of this provider in one request.
const ITEMS_MAX: usize = 64;
/// Slots of a request that has others asked.
const SLOTS_MAX: u32 = 64;
/// Bytes of an upstream's address.
const ADDRESS_BYTES_MAX: usize = 261;
/// Upstreams asked at once for one request.
const UPSTREAMS_AT_ONCE: usize = 4;
/// Memory of all requests under way.
pub(super) const SUM_BYTES_MAX: usize = 64 << 20;
/// A request that found no memory after this time is BUSY. Short: those that hold it may wait for
/// others that wait like this one.
const BUSY_AFTER: Duration = Duration::from_secs(1);
/// How long a request may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// An upstream has this much less time, so that who does not answer can still be named.
const NAMING_TIME: Duration = Duration::from_millis(25);

/// A checked request.
struct Sum {
    items: Vec<(FragmentId, u8)>,
    first_slot: usize,
    slots: Option<usize>,
    upstreams: Vec<Upstream>,
}

struct Upstream {
    place: ProviderAddress,
    request: CombineRequest,
    /// All fragments of its tree, its own first.
    members: Vec<FragmentId>,
}

/// Who could not add its part, and why.
struct Failed {
    fragment: FragmentId,
    status: FragmentStatus,
    detail: String,
}

impl From<Failed> for CombineReply {
    fn from(failed: Failed) -> Self {
        let (status, detail) = (failed.status.into(), failed.detail);
        Self { status, detail, data: Bytes::new(), fault: Some(wire_id(failed.fragment)) }
    }
}

impl FragmentService {
    /// Answers a request for a sum.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for one over a limit, `PERMISSION_DENIED` where others are to be asked for
    /// somebody who may not.
    pub(super) async fn sum(
        &self,
        peer: &PeerIdentity,
        mut request: CombineRequest,
    ) -> Result<CombineReply, Status> {
        let asked = Duration::from_millis(request.deadline_ms);
        let patience = if asked.is_zero() { DEADLINE } else { asked.min(DEADLINE) };
        let deadline = Instant::now() + patience;
        let grant = std::mem::take(&mut request.grant);
        let sum = check(request).map_err(Status::invalid_argument)?;
        let may_ask = match peer.role {
            Role::Provider | Role::Directory => true,
            Role::Client | Role::Admin => false,
        };
        if !sum.upstreams.is_empty() && !may_ask {
            return Err(Status::permission_denied(format!("{peer} may not have others asked")));
        }
        let own = sum.items[0].0;
        let admitted = match self.may_sum(peer, &grant, &sum) {
            Ok(admitted) => admitted,
            Err(denied) => {
                let failed = denied_here(own, denied);
                super::count("combine", failed.status);
                return Ok(failed.into());
            }
        };
        let work = self.add_up(peer, admitted, sum, deadline);
        let answer = tokio::time::timeout_at(deadline, work).await;
        let late = |_| {
            let (status, detail) = (FragmentStatus::Busy, "not done in time".to_owned());
            Err(Failed { fragment: own, status, detail })
        };
        match answer.unwrap_or_else(late) {
            Ok(data) => {
                super::count("combine", FragmentStatus::Ok);
                super::count_sent(peer.role, data.len());
                let status = FragmentStatus::Ok.into();
                Ok(CombineReply { status, data, ..CombineReply::default() })
            }
            Err(failed) => {
                super::count("combine", failed.status);
                tracing::debug!(fragment = %failed.fragment, detail = failed.detail, "no sum");
                Ok(failed.into())
            }
        }
    }

    /// What the peer may have added up; of what it asks nothing can be outside.
    fn may_sum(&self, peer: &PeerIdentity, grant: &Bytes, sum: &Sum) -> Result<Admitted, Denied> {
        let admitted = self.grants.admit(peer, grant, Rights::Read)?;
        sum.items.iter().try_for_each(|(id, _)| admitted.may_cover(id.block))?;
        Ok(admitted)
    }

    async fn add_up(
        &self,
        peer: &PeerIdentity,
        admitted: Admitted,
        sum: Sum,
        deadline: Instant,
    ) -> Result<Bytes, Failed> {
        let Sum { items, first_slot, slots, upstreams } = sum;
        let first = items[0].0;
        let at_once = items.len() + 1 + upstreams.len().min(UPSTREAMS_AT_ONCE);
        let units = (slice_bytes(slots) * at_once).div_ceil(UNIT_BYTES);
        let units = units.min(SUM_BYTES_MAX / UNIT_BYTES) as u32;
        let memory = Arc::clone(&self.sums).acquire_many_owned(units);
        let Ok(Ok(_memory)) = tokio::time::timeout(BUSY_AFTER, memory).await else {
            let detail = "too many sums at once".to_owned();
            return Err(Failed { fragment: first, status: FragmentStatus::Busy, detail });
        };
        let own = self.repair_read(peer.role, move |store| {
            let covered = |header: &FragmentHeader| {
                admitted.covers(header.volume(), header.id().block).is_ok()
            };
            store.combine(&items, first_slot, slots, covered)
        });
        let others = upstreams.into_iter().map(|upstream| self.clone().ask(upstream, deadline));
        let others = stream::iter(others.map(FutureExt::boxed).collect::<Vec<_>>());
        let mut others = others.buffer_unordered(UPSTREAMS_AT_ONCE);
        // The own part first: where it cannot be had, nobody else needs to work. Upstreams are asked
        // meanwhile.
        let (own, mut next) = futures::join!(own, others.next());
        let own = own.map_err(|error| failed_here(&error, first))?;
        let Some(own) = own else { return Err(denied_here(first, Denied::Elsewhere)) };
        let mut total: Option<Vec<u8>> = None;
        while let Some(part) = next {
            let (fragment, part) = part?;
            if part.len() != own.len() {
                let detail = format!("{} bytes came, {} were wanted", part.len(), own.len());
                return Err(Failed { fragment, status: FragmentStatus::Damaged, detail });
            }
            let total = total.get_or_insert_with(|| own.to_vec());
            combine_into(&[1], &[&part], total).expect("lengths were compared");
            next = others.next().await;
        }
        Ok(total.map_or(own, Bytes::from))
    }

    /// One upstream's sum, and the fragment that stands for it.
    async fn ask(
        self,
        upstream: Upstream,
        deadline: Instant,
    ) -> Result<(FragmentId, Bytes), Failed> {
        let Upstream { place, mut request, members } = upstream;
        let own = members[0];
        let deadline = deadline.checked_sub(NAMING_TIME).unwrap_or(deadline);
        let left = deadline.saturating_duration_since(Instant::now());
        request.deadline_ms = (left.as_millis() as u64).max(1);
        let failed = |failure: &FragmentFailure| Failed {
            fragment: own,
            status: failure_status(failure),
            detail: format!("{own} at {}: {failure}", place.address),
        };
        let reply = self.peers.combine(&place, request, deadline).await;
        let reply = reply.map_err(|failure| failed(&failure))?;
        match reply.status() {
            FragmentStatus::Ok => Ok((own, reply.data)),
            status => {
                // It can only speak of those it had to ask.
                let named = reply.fault.as_ref().and_then(id_of);
                let fragment = named.filter(|named| members.contains(named)).unwrap_or(own);
                Err(Failed { fragment, status, detail: reply.detail })
            }
        }
    }
}

fn failed_here(error: &StoreError, first: FragmentId) -> Failed {
    let fragment = match error {
        StoreError::NotFound { id } | StoreError::Damaged { id, .. } => *id,
        _ => first,
    };
    Failed { fragment, status: status_of(error), detail: error.to_string() }
}

fn denied_here(fragment: FragmentId, denied: Denied) -> Failed {
    let (status, detail) = super::refusal(denied);
    Failed { fragment, status, detail }
}

/// Bytes of the slots asked for, at most.
fn slice_bytes(slots: Option<usize>) -> usize {
    let slot_bytes = PAGE_SIZES[0] + TAG_BYTES;
    slots.map_or(SEALED_BYTES_MAX, |slots| slots.saturating_mul(slot_bytes).min(SEALED_BYTES_MAX))
}

/// Holds a request against the limits.
fn check(request: CombineRequest) -> Result<Sum, &'static str> {
    let items = items_of(&request)?;
    let slots = (request.slots != 0).then_some(request.slots as usize);
    let first_slot = request.first_slot as usize;
    if request.upstreams.is_empty() {
        return Ok(Sum { items, first_slot, slots, upstreams: Vec::new() });
    }
    if request.slots == 0 || request.slots > SLOTS_MAX {
        return Err("1 to 64 slots can be summed over several providers at once");
    }
    let mut seen = HashSet::new();
    if !items.iter().all(|(id, _)| id.block == items[0].0.block && seen.insert(*id)) {
        return Err("a sum over several providers is of one block, each fragment once");
    }
    let (first, slots_asked) = (request.first_slot, request.slots);
    let mut upstreams = Vec::new();
    check_count(&request.upstreams)?;
    for upstream in request.upstreams {
        let place = place_of(&upstream)?;
        let request = upstream.request.ok_or("an upstream without a request")?;
        let mut members = Vec::new();
        check_tree(&request, 2, &mut members)?;
        if !members.iter().all(|id| id.block == items[0].0.block && seen.insert(*id)) {
            return Err("a sum over several providers is of one block, each fragment once");
        }
        if seen.len() > FRAGMENTS_MAX {
            return Err("at most 255 fragments in all");
        }
        let request = CombineRequest { first_slot: first, slots: slots_asked, ..request };
        upstreams.push(Upstream { place, request, members });
    }
    Ok(Sum { items, first_slot, slots, upstreams })
}

/// Walks the requests below one; `members` grows by their fragments. `depth` is that of `request`.
fn check_tree(
    request: &CombineRequest,
    depth: usize,
    members: &mut Vec<FragmentId>,
) -> Result<(), &'static str> {
    if depth > COMBINE_DEPTH_MAX {
        return Err("at most 32 requests inside each other");
    }
    members.extend(items_of(request)?.into_iter().map(|(id, _)| id));
    if members.len() > FRAGMENTS_MAX {
        return Err("at most 255 fragments in all");
    }
    check_count(&request.upstreams)?;
    for upstream in &request.upstreams {
        place_of(upstream)?;
        let request = upstream.request.as_ref().ok_or("an upstream without a request")?;
        check_tree(request, depth + 1, members)?;
    }
    Ok(())
}

fn check_count(upstreams: &[v1::CombineUpstream]) -> Result<(), &'static str> {
    if upstreams.len() > COMBINE_UPSTREAMS_MAX {
        return Err("at most 64 upstreams a request");
    }
    Ok(())
}

fn items_of(request: &CombineRequest) -> Result<Vec<(FragmentId, u8)>, &'static str> {
    if request.items.is_empty() || request.items.len() > ITEMS_MAX {
        return Err("1 to 64 fragments can be summed at once");
    }
    let items = request.items.iter().map(|item| {
        let id = item.fragment.as_ref().and_then(id_of)?;
        Some((id, u8::try_from(item.coefficient).ok()?))
    });
    items.collect::<Option<_>>().ok_or("no such fragment id or coefficient")
}

fn place_of(upstream: &v1::CombineUpstream) -> Result<ProviderAddress, &'static str> {
    if upstream.address.is_empty() || upstream.address.len() > ADDRESS_BYTES_MAX {
        return Err("an upstream without a possible address");
    }
    let key_hash = KeyHash::from_slice(&upstream.key_hash).ok_or("an upstream without a key")?;
    Ok(ProviderAddress { address: upstream.address.clone(), key_hash, reachable: true })
}

#[cfg(test)]
mod tests {
    use super::*;
    use us_core::ids::BlockId;
    use us_proto::v1::{CombineItem, CombineUpstream};

    fn request(index: u32) -> CombineRequest {
        let block = BlockId::from_bytes([1; 16]).as_bytes().to_vec().into();
        let item = CombineItem { fragment: Some(v1::FragmentId { block, index }), coefficient: 3 };
        CombineRequest { items: vec![item], slots: 2, ..CombineRequest::default() }
    }

    fn below(request: CombineRequest) -> CombineUpstream {
        CombineUpstream {
            address: "host:1".into(),
            key_hash: vec![1; 32].into(),
            request: Some(request),
        }
    }

    fn chain(length: u32) -> CombineRequest {
        (1..length).rev().fold(request(length), |inner, index| CombineRequest {
            upstreams: vec![below(inner)],
            ..request(index)
        })
    }

    #[test]
    fn a_tree_within_the_limits_passes() {
        let sum = check(chain(COMBINE_DEPTH_MAX as u32))
            .map_err(str::to_owned)
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(sum.upstreams[0].members.len(), COMBINE_DEPTH_MAX - 1);
        let wide =
            CombineRequest { upstreams: (2..66).map(request).map(below).collect(), ..request(1) };
        assert!(check(wide).is_ok());
        // The inner request's slots do not count.
        let inner = CombineRequest { first_slot: 9, slots: 7, ..request(2) };
        let sum = check(CombineRequest { upstreams: vec![below(inner)], ..request(1) });
        let sum = sum.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((sum.upstreams[0].request.first_slot, sum.upstreams[0].request.slots), (0, 2));
    }

    #[test]
    fn the_deepest_tree_travels() {
        use prost::Message;
        let deepest = chain(COMBINE_DEPTH_MAX as u32);
        let bytes = deepest.encode_to_vec();
        assert!(CombineRequest::decode(&bytes[..]).unwrap() == deepest);
    }

    #[test]
    fn hostile_trees_are_refused() {
        let with = |upstreams| CombineRequest { upstreams, ..request(1) };
        let other_block = {
            let mut other = request(2);
            other.items[0].fragment.as_mut().unwrap().block = vec![9; 16].into();
            other
        };
        let many = |index: u32| {
            let own: Vec<_> = (0..60).map(|at| request(index + at).items.remove(0)).collect();
            CombineRequest { items: own, ..request(1) }
        };
        let hostile = [
            chain(COMBINE_DEPTH_MAX as u32 + 1),
            with((2..67).map(request).map(below).collect()),
            with(vec![below(request(1))]),
            with(vec![below(request(2)), below(request(2))]),
            with(vec![below(other_block)]),
            with((0..5).map(|at| below(many(2 + 60 * at))).collect()),
            with(vec![CombineUpstream { request: None, ..below(request(2)) }]),
            with(vec![CombineUpstream { address: String::new(), ..below(request(2)) }]),
            with(vec![CombineUpstream { key_hash: vec![1; 31].into(), ..below(request(2)) }]),
            with(vec![below(CombineRequest::default())]),
            CombineRequest { slots: 0, ..with(vec![below(request(2))]) },
            CombineRequest { slots: 65, ..with(vec![below(request(2))]) },
            CombineRequest::default(),
        ];
        for (number, hostile) in hostile.into_iter().enumerate() {
            assert!(check(hostile).is_err(), "{number}");
        }
    }
}
