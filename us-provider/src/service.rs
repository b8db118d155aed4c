//! What a provider serves: fragments, over frames and gRPC from the same functions.
//!
//! Who may do what: clients put and read, and providers read, what a grant of the directory's covers
//! ([`crate::grants`]); the directory puts and reads anything; it and administrators list and verify.
//! Nobody deletes here: deletion comes with membership.
//!
//! Invariants: the bytes of puts and of reads under way are bounded, whoever asks; a put refused for
//! that reason is BUSY after a short wait, never queued without bound. What other providers read
//! for repair has limits of its own, so that it never takes the turn of a reader.

mod combine;
mod recovery;
mod status;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Response, Status, Streaming};
use us_core::daemon::logging::RequestId;
use us_core::fragment::FragmentHeader;
use us_core::geometry::{PAGE_SIZES, TAG_BYTES};
use us_core::grant::Rights;
use us_core::ids::{BlockId, FragmentId};
use us_core::tls::{PeerIdentity, Role};
use us_core::wire::{BulkService, grpc_get, grpc_put, peer_of};
use us_proto::v1;
use us_proto::v1::fragments_server::Fragments;

use crate::grants::{Admitted, Denied, Grants};
use crate::guest::Pause;
use crate::rebuild::Peers;
use crate::store::{IDS_MAX, Read, ReadRequest, Store, StoreError};
pub use recovery::RecoveryService;
pub use status::{failure_status, inventory_item, status_of, wire_id};

/// Bytes of puts that are waiting or being written, over all connections.
const PUT_BYTES_MAX: usize = 192 << 20;
/// Reads from the disk at once, each of at most one fragment.
const READS_MAX: usize = 32;
/// The same for other providers, which read for repair.
const REPAIR_READS_MAX: usize = 8;
/// Items of one request read ahead of the peer.
const READS_AHEAD: usize = 4;
/// A request that found no room after this time is BUSY.
const BUSY_AFTER: Duration = Duration::from_secs(5);
/// Fragments a page of the inventory.
const PAGE_ITEMS: usize = 4096;
/// Slots of up to so many bytes, together, are answered at once where the system has them in memory.
const NOW_BYTES_MAX: usize = 128 << 10;
/// And so many items.
const NOW_ITEMS_MAX: usize = 4;
/// A read on the connection's thread is for disks that answer in this time on average; on slower ones
/// one in so many is tried.
const IN_PLACE_US_MAX: u32 = 400;
const IN_PLACE_AGAIN: u32 = 64;
/// The largest slot.
const SLOT_BYTES_MAX: usize = PAGE_SIZES[0] + TAG_BYTES;
/// Bytes a permit of puts stands for.
const UNIT_BYTES: usize = 4096;

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct FragmentService {
    store: Store,
    grants: Grants,
    pause: Pause,
    /// Asked for what is added to partial sums.
    peers: Arc<dyn Peers>,
    puts: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    repair_reads: Arc<Semaphore>,
    sums: Arc<Semaphore>,
    /// How long a read on a connection's thread took lately, and how many were asked for.
    in_place_us: Arc<AtomicU32>,
    in_place_asked: Arc<AtomicU32>,
}

impl std::fmt::Debug for FragmentService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FragmentService").field("store", &self.store).finish_non_exhaustive()
    }
}

impl FragmentService {
    /// Serves this store to those whom `grants` admits; while `pause` is on, puts are BUSY. Sums that
    /// other providers are to add to are asked of `peers`.
    pub fn new(store: Store, grants: Grants, pause: Pause, peers: Arc<dyn Peers>) -> Self {
        Self {
            store,
            grants,
            pause,
            peers,
            puts: Arc::new(Semaphore::new(PUT_BYTES_MAX / UNIT_BYTES)),
            reads: Arc::new(Semaphore::new(READS_MAX)),
            repair_reads: Arc::new(Semaphore::new(REPAIR_READS_MAX)),
            sums: Arc::new(Semaphore::new(combine::SUM_BYTES_MAX / UNIT_BYTES)),
            in_place_us: Arc::default(),
            in_place_asked: Arc::default(),
        }
    }

    async fn put_one(
        &self,
        peer: &PeerIdentity,
        request: v1::PutRequest,
    ) -> (v1::FragmentStatus, String) {
        if let Err(denied) = self.may_put(peer, &request) {
            return refused("put", denied);
        }
        if self.pause.is_on() {
            return (v1::FragmentStatus::Busy, "paused by its owner".to_owned());
        }
        let units = request.record.len().div_ceil(UNIT_BYTES).clamp(1, PUT_BYTES_MAX / UNIT_BYTES);
        let Some(_permit) = acquire(&self.puts, units as u32).await else {
            return (v1::FragmentStatus::Busy, "too many puts at once".to_owned());
        };
        let (begun, bytes) = (Instant::now(), request.record.len());
        let trace = RequestId(request.trace);
        let fragment = tracing::enabled!(tracing::Level::DEBUG).then(|| named(&request.record));
        let result = self.store.put(request.record).await;
        if let Some(fragment) = fragment {
            tracing::debug!(request = %trace, fragment, bytes, ?result, "put");
        }
        metrics::histogram!("us_provider_put_seconds").record(begun.elapsed().as_secs_f64());
        match result {
            Ok(_) => {
                metrics::counter!("us_provider_put_bytes_total").increment(bytes as u64);
                count("put", v1::FragmentStatus::Ok);
                (v1::FragmentStatus::Ok, String::new())
            }
            Err(error) => failed("put", &error),
        }
    }

    /// Whether the peer may store this; what is no record at all the store refuses.
    fn may_put(&self, peer: &PeerIdentity, request: &v1::PutRequest) -> Result<(), Denied> {
        let admitted = self.grants.admit(peer, &request.grant, Rights::ReadWrite)?;
        match FragmentHeader::decode(&request.record) {
            Ok(header) => admitted.covers(header.volume(), header.id().block),
            Err(_) => Ok(()),
        }
    }

    async fn get_one(
        self,
        role: Role,
        admitted: Admitted,
        item: u32,
        asked: v1::GetItem,
    ) -> v1::GetReply {
        let Some(request) = read_request(&asked) else {
            let failure = (v1::FragmentStatus::Invalid, "no such fragment id".to_owned());
            return failed_reply(item, failure);
        };
        // Nothing is read for one who may not have it.
        if let Err(denied) = admitted.may_cover(request.id.block) {
            return failed_reply(item, refused("get", denied));
        }
        let begun = Instant::now();
        let result = self.repair_read(role, move |store| store.read(request)).await;
        let read = result.as_ref().ok();
        if let Some(Err(denied)) = read.map(|read| covered(&admitted, read)) {
            return failed_reply(item, refused("get", denied));
        }
        reply_of(role, item, &asked, request.id, result, begun)
    }

    /// Reads from the disk on the connection's thread, for a peer that asks one thing at a time: two
    /// changes of threads fewer. Not where the disk is slow, and others would wait.
    fn read_in_place(&self, request: ReadRequest) -> Option<Read> {
        let runtime = Handle::try_current().ok()?;
        let may_block = runtime.runtime_flavor() == RuntimeFlavor::MultiThread;
        let average = self.in_place_us.load(Ordering::Relaxed);
        // Now and then it is tried anyway: a disk that was busy is quick again.
        let asked = self.in_place_asked.fetch_add(1, Ordering::Relaxed);
        let tried = asked.is_multiple_of(IN_PLACE_AGAIN);
        if !may_block || (average > IN_PLACE_US_MAX && !tried) {
            return None;
        }
        let begun = Instant::now();
        let read = tokio::task::block_in_place(|| self.store.read(request)).ok();
        let took = begun.elapsed().as_micros().min(1_000_000) as u32;
        self.in_place_us.store((average * 7 + took) / 8, Ordering::Relaxed);
        read
    }

    /// The replies to small reads that need not wait; `None` where one must.
    fn get_all_now(
        &self,
        peer: &PeerIdentity,
        request: &v1::GetRequest,
    ) -> Option<Vec<v1::GetReply>> {
        let role = peer.role;
        if role != Role::Client || request.items.len() > NOW_ITEMS_MAX {
            return None;
        }
        let admitted = self.grants.admit(peer, &request.grant, Rights::Read).ok()?;
        let begun = Instant::now();
        let alone = request.items.len() == 1;
        let mut bytes = 0;
        let mut found = Vec::with_capacity(request.items.len());
        for asked in &request.items {
            let request = read_request(asked).filter(|request| request.slots.is_some())?;
            bytes += request.slots? * SLOT_BYTES_MAX;
            if bytes > NOW_BYTES_MAX {
                return None;
            }
            let read = match self.store.read_now(request) {
                None if alone => self.read_in_place(request),
                read => read,
            };
            let read = read.filter(|read| covered(&admitted, read).is_ok())?;
            found.push((asked, request.id, read));
        }
        let replies = (0u32..)
            .zip(found)
            .map(|(item, (asked, id, read))| reply_of(role, item, asked, id, Ok(read), begun));
        Some(replies.collect())
    }

    /// Runs a read of the store outside the runtime's workers.
    async fn blocking<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.limited(&self.reads, read).await
    }

    /// As [`FragmentService::blocking`], in the turn of those with this role.
    async fn repair_read<T: Send + 'static>(
        &self,
        role: Role,
        read: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let turns = match role {
            Role::Provider => &self.repair_reads,
            Role::Client | Role::Directory | Role::Admin => &self.reads,
        };
        self.limited(turns, read).await
    }

    async fn limited<T: Send + 'static>(
        &self,
        turns: &Arc<Semaphore>,
        read: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let Some(permit) = acquire(turns, 1).await else {
            return Err(StoreError::Busy);
        };
        let store = self.store.clone();
        let task = tokio::task::spawn_blocking(move || {
            let result = read(&store);
            drop(permit);
            result
        });
        // It ends without a result only when the runtime stops.
        task.await.unwrap_or(Err(StoreError::Closed))
    }
}

fn read_request(asked: &v1::GetItem) -> Option<ReadRequest> {
    Some(ReadRequest {
        id: asked.fragment.as_ref().and_then(id_of)?,
        first_slot: asked.first_slot as usize,
        slots: (asked.slots != 0).then_some(asked.slots as usize),
    })
}

fn covered(admitted: &Admitted, read: &Read) -> Result<(), Denied> {
    admitted.covers(read.header.volume(), read.header.id().block)
}

fn failed_reply(item: u32, (status, detail): (v1::FragmentStatus, String)) -> v1::GetReply {
    v1::GetReply { item, status: status.into(), detail, ..v1::GetReply::default() }
}

/// The reply to what was asked, and what is counted and logged of it.
fn reply_of(
    role: Role,
    item: u32,
    asked: &v1::GetItem,
    id: FragmentId,
    result: Result<Read, StoreError>,
    begun: Instant,
) -> v1::GetReply {
    let failure = result.as_ref().err();
    tracing::debug!(request = %RequestId(asked.trace), fragment = %id, ?failure, "get");
    metrics::histogram!("us_provider_get_seconds").record(begun.elapsed().as_secs_f64());
    let read = match result {
        Ok(read) => read,
        Err(error) => return failed_reply(item, failed("get", &error)),
    };
    metrics::counter!("us_provider_get_bytes_total").increment(read.data.len() as u64);
    count("get", v1::FragmentStatus::Ok);
    count_sent(role, read.data.len());
    let (header, trailer) = if asked.trailer {
        (read.header.encode().to_vec().into(), read.trailer)
    } else {
        Default::default()
    };
    let status = v1::FragmentStatus::Ok.into();
    v1::GetReply { item, status, header, trailer, data: read.data, ..v1::GetReply::default() }
}

impl BulkService for FragmentService {
    async fn put(&self, peer: &PeerIdentity, request: v1::PutRequest) -> v1::PutReply {
        let number = request.request;
        let (status, detail) = self.put_one(peer, request).await;
        v1::PutReply { request: number, status: status.into(), detail }
    }

    fn get(
        &self,
        peer: &PeerIdentity,
        request: v1::GetRequest,
    ) -> BoxStream<'static, v1::GetReply> {
        let items = stream::iter((0u32..).zip(request.items));
        let admitted = match self.grants.admit(peer, &request.grant, Rights::Read) {
            Ok(admitted) => admitted,
            Err(denied) => {
                let failure = refused("get", denied);
                return items.map(move |(item, _)| failed_reply(item, failure.clone())).boxed();
            }
        };
        let (service, role) = (self.clone(), peer.role);
        items
            .map(move |(item, asked)| service.clone().get_one(role, admitted.clone(), item, asked))
            .buffer_unordered(READS_AHEAD)
            .boxed()
    }

    fn get_now(&self, peer: &PeerIdentity, request: &v1::GetRequest) -> Option<Vec<v1::GetReply>> {
        self.get_all_now(peer, request)
    }
}

#[tonic::async_trait]
impl Fragments for FragmentService {
    type PutStream = BoxStream<'static, Result<v1::PutReply, Status>>;
    type GetStream = BoxStream<'static, Result<v1::GetReply, Status>>;
    type InventoryStream = BoxStream<'static, Result<v1::InventoryPage, Status>>;

    async fn put(
        &self,
        request: Request<Streaming<v1::PutRequest>>,
    ) -> Result<Response<Self::PutStream>, Status> {
        grpc_put(Arc::new(self.clone()), request)
    }

    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<Self::GetStream>, Status> {
        grpc_get(self, request)
    }

    async fn combine(
        &self,
        request: Request<v1::CombineRequest>,
    ) -> Result<Response<v1::CombineReply>, Status> {
        let peer = peer_of(&request)?.clone();
        Ok(Response::new(self.sum(&peer, request.into_inner()).await?))
    }

    async fn inventory(
        &self,
        request: Request<v1::InventoryRequest>,
    ) -> Result<Response<Self::InventoryStream>, Status> {
        allow(&request, administers)?;
        let request = request.into_inner();
        let after = match &request.after[..] {
            [] => None,
            key => Some(
                FragmentId::from_key(key)
                    .ok_or_else(|| Status::invalid_argument("not a fragment key: 17 bytes"))?,
            ),
        };
        let left = if request.limit == 0 { usize::MAX } else { request.limit as usize };
        let begin = Some((self.clone(), after, left));
        let pages = stream::unfold(begin, |state| async move {
            let (service, after, left) = state?;
            let limit = left.min(PAGE_ITEMS);
            match service.blocking(move |store| store.inventory(after, limit)).await {
                Ok(lines) => {
                    let last = lines.last().map(|line| line.id)?;
                    let left = left - lines.len();
                    let more = (lines.len() == limit && left > 0)
                        .then(|| (service.clone(), Some(last), left));
                    let items = lines.iter().map(inventory_item).collect();
                    Some((Ok(v1::InventoryPage { items }), more))
                }
                Err(error) => Some((Err(Status::unavailable(error.to_string())), None)),
            }
        });
        Ok(Response::new(pages.boxed()))
    }

    async fn verify(
        &self,
        request: Request<v1::VerifyRequest>,
    ) -> Result<Response<v1::VerifyReply>, Status> {
        allow(&request, administers)?;
        let fragments = request.into_inner().fragments;
        if fragments.len() > IDS_MAX {
            return Err(Status::invalid_argument("at most 4096 fragments at once"));
        }
        let statuses = self.blocking(move |store| {
            Ok(fragments.iter().map(|id| verify_one(store, id).into()).collect())
        });
        let statuses = statuses.await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(v1::VerifyReply { statuses }))
    }
}

/// The fragment that a record says it is, for the log.
fn named(record: &[u8]) -> String {
    let header = FragmentHeader::decode(record);
    header.map_or_else(|_| "damaged".to_owned(), |header| header.id().to_string())
}

fn verify_one(store: &Store, id: &v1::FragmentId) -> v1::FragmentStatus {
    match id_of(id).map(|id| store.verify(id)) {
        Some(Ok(())) => v1::FragmentStatus::Ok,
        Some(Err(error)) => status_of(&error),
        None => v1::FragmentStatus::Invalid,
    }
}

/// Reads an id off the wire; `None` for one that cannot be.
pub fn id_of(id: &v1::FragmentId) -> Option<FragmentId> {
    let block = BlockId::from_slice(&id.block)?;
    Some(FragmentId { block, index: u8::try_from(id.index).ok()? })
}

async fn acquire(semaphore: &Arc<Semaphore>, units: u32) -> Option<OwnedSemaphorePermit> {
    let permit = Arc::clone(semaphore).acquire_many_owned(units);
    tokio::time::timeout(BUSY_AFTER, permit).await.ok()?.ok()
}

fn administers(role: Role) -> bool {
    match role {
        Role::Directory | Role::Admin => true,
        Role::Client | Role::Provider => false,
    }
}

fn allow<T>(request: &Request<T>, allowed: impl Fn(Role) -> bool) -> Result<(), Status> {
    let peer = peer_of(request)?;
    if allowed(peer.role) {
        return Ok(());
    }
    Err(Status::permission_denied(format!("{peer} may not ask this of a provider")))
}

fn refused(operation: &'static str, denied: Denied) -> (v1::FragmentStatus, String) {
    let (status, detail) = refusal(denied);
    count(operation, status);
    (status, detail)
}

fn refusal(denied: Denied) -> (v1::FragmentStatus, String) {
    let status = match denied {
        Denied::Role { .. } => v1::FragmentStatus::Refused,
        // Its directory says it with the welcome.
        Denied::NotTold => v1::FragmentStatus::Busy,
        _ => v1::FragmentStatus::NoGrant,
    };
    let reason = denied.label();
    metrics::counter!("us_provider_grants_refused_total", "reason" => reason).increment(1);
    (status, denied.to_string())
}

fn failed(operation: &'static str, error: &StoreError) -> (v1::FragmentStatus, String) {
    let status = status_of(error);
    count(operation, status);
    tracing::debug!(operation, %error, "refused");
    (status, error.to_string())
}

fn count(operation: &'static str, status: v1::FragmentStatus) {
    let labels = [("operation", operation), ("status", status::label(status))];
    metrics::counter!("us_provider_requests_total", &labels).increment(1);
}

/// Bytes of fragments sent; those to other providers are for repair.
fn count_sent(role: Role, bytes: usize) {
    if role == Role::Provider {
        metrics::counter!("us_provider_rebuild_sent_bytes_total").increment(bytes as u64);
    }
}
