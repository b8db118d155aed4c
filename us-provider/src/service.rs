//! What a provider serves: fragments, over frames and gRPC from the same functions.
//!
//! Who may do what: clients, providers and the directory put and read; the directory and
//! administrators list and verify. Nobody deletes here: deletion comes with membership.
//!
//! Invariants: the bytes of puts and of reads under way are bounded, whoever asks; a put refused for
//! that reason is BUSY after a short wait, never queued without bound.

mod recovery;
mod status;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Response, Status, Streaming};
use us_core::ids::{BlockId, FragmentId};
use us_core::tls::{PeerIdentity, Role};
use us_core::wire::{BulkService, grpc_get, grpc_put, peer_of};
use us_proto::v1;
use us_proto::v1::fragments_server::Fragments;

use crate::guest::Pause;
use crate::store::{IDS_MAX, ReadRequest, Store, StoreError};
pub use recovery::RecoveryService;
pub use status::{status_of, wire_id};

/// Bytes of puts that are waiting or being written, over all connections.
const PUT_BYTES_MAX: usize = 192 << 20;
/// Reads from the disk at once, each of at most one fragment.
const READS_MAX: usize = 32;
/// Items of one request read ahead of the peer.
const READS_AHEAD: usize = 4;
/// A request that found no room after this time is BUSY.
const BUSY_AFTER: Duration = Duration::from_secs(5);
/// Fragments summed in one request.
const COMBINE_ITEMS_MAX: usize = 64;
/// Fragments a page of the inventory.
const PAGE_ITEMS: usize = 4096;
/// Bytes a permit of puts stands for.
const UNIT_BYTES: usize = 4096;

/// The service. Cheap to clone.
#[derive(Clone, Debug)]
pub struct FragmentService {
    store: Store,
    pause: Pause,
    puts: Arc<Semaphore>,
    reads: Arc<Semaphore>,
}

impl FragmentService {
    /// Serves this store; while `pause` is on, puts are BUSY.
    pub fn new(store: Store, pause: Pause) -> Self {
        Self {
            store,
            pause,
            puts: Arc::new(Semaphore::new(PUT_BYTES_MAX / UNIT_BYTES)),
            reads: Arc::new(Semaphore::new(READS_MAX)),
        }
    }

    async fn put_one(
        &self,
        peer: &PeerIdentity,
        request: v1::PutRequest,
    ) -> (v1::FragmentStatus, String) {
        if !moves_fragments(peer.role) {
            return refused(peer);
        }
        if self.pause.is_on() {
            return (v1::FragmentStatus::Busy, "paused by its owner".to_owned());
        }
        let units = request.record.len().div_ceil(UNIT_BYTES).clamp(1, PUT_BYTES_MAX / UNIT_BYTES);
        let Some(_permit) = acquire(&self.puts, units as u32).await else {
            return (v1::FragmentStatus::Busy, "too many puts at once".to_owned());
        };
        let (begun, bytes) = (Instant::now(), request.record.len());
        let result = self.store.put(request.record).await;
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

    async fn get_one(self, item: u32, asked: v1::GetItem) -> v1::GetReply {
        let reply = v1::GetReply { item, ..v1::GetReply::default() };
        let fail = |(status, detail): (v1::FragmentStatus, String)| v1::GetReply {
            status: status.into(),
            detail,
            ..reply.clone()
        };
        let Some(id) = asked.fragment.as_ref().and_then(id_of) else {
            return fail((v1::FragmentStatus::Invalid, "no such fragment id".to_owned()));
        };
        let request = ReadRequest {
            id,
            first_slot: asked.first_slot as usize,
            slots: (asked.slots != 0).then_some(asked.slots as usize),
        };
        let begun = Instant::now();
        let result = self.blocking(move |store| store.read(request)).await;
        metrics::histogram!("us_provider_get_seconds").record(begun.elapsed().as_secs_f64());
        match result {
            Ok(read) => {
                metrics::counter!("us_provider_get_bytes_total").increment(read.data.len() as u64);
                count("get", v1::FragmentStatus::Ok);
                let (header, trailer) = if asked.trailer {
                    (read.header.encode().to_vec().into(), read.trailer)
                } else {
                    Default::default()
                };
                let status = v1::FragmentStatus::Ok.into();
                v1::GetReply { status, header, trailer, data: read.data, ..reply }
            }
            Err(error) => fail(failed("get", &error)),
        }
    }

    /// Runs a read of the store outside the runtime's workers.
    async fn blocking<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let Some(permit) = acquire(&self.reads, 1).await else {
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
        if !moves_fragments(peer.role) {
            let (status, detail) = refused(peer);
            let reply = move |(item, _)| v1::GetReply {
                item,
                status: status.into(),
                detail: detail.clone(),
                ..v1::GetReply::default()
            };
            return items.map(reply).boxed();
        }
        let service = self.clone();
        items
            .map(move |(item, asked)| service.clone().get_one(item, asked))
            .buffer_unordered(READS_AHEAD)
            .boxed()
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
        allow(&request, moves_fragments)?;
        let request = request.into_inner();
        if request.items.is_empty() || request.items.len() > COMBINE_ITEMS_MAX {
            return Err(Status::invalid_argument("1 to 64 fragments can be summed at once"));
        }
        let items = request.items.iter().map(|item| {
            let id = item.fragment.as_ref().and_then(id_of)?;
            Some((id, u8::try_from(item.coefficient).ok()?))
        });
        let items: Option<Vec<_>> = items.collect();
        let items =
            items.ok_or_else(|| Status::invalid_argument("no such fragment id or coefficient"))?;
        let first_slot = request.first_slot as usize;
        let slots = (request.slots != 0).then_some(request.slots as usize);
        let sum = self.blocking(move |store| store.combine(&items, first_slot, slots)).await;
        let reply = match sum {
            Ok(data) => {
                count("combine", v1::FragmentStatus::Ok);
                let status = v1::FragmentStatus::Ok.into();
                v1::CombineReply { status, detail: String::new(), data }
            }
            Err(error) => {
                let (status, detail) = failed("combine", &error);
                let status = status.into();
                v1::CombineReply { status, detail, ..v1::CombineReply::default() }
            }
        };
        Ok(Response::new(reply))
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
                    let items = lines.iter().map(status::inventory_item).collect();
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

fn moves_fragments(role: Role) -> bool {
    match role {
        Role::Client | Role::Directory | Role::Provider => true,
        Role::Admin => false,
    }
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

fn refused(peer: &PeerIdentity) -> (v1::FragmentStatus, String) {
    (v1::FragmentStatus::Refused, format!("{peer} may not move fragments"))
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
