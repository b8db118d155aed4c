//! The real way to providers: framed connections, made when needed and kept.
//!
//! ```text
//! put -> one of the provider's connections -> the reply when it is durable
//! get -> the provider's queue -> one Get while another is in flight gathers what comes meanwhile
//! ```
//!
//! What it owns: the table of providers (who has which number, where it is, which key it must
//! show), up to two connections each, and a bounded queue of gets each. A provider that cannot be
//! reached is left alone for a while that grows with each failure; meanwhile requests fail at once,
//! so that readers turn to others. The directory's word that it is back ends the wait.
//!
//! Called by the pipeline through [`FragmentTransport`]; the session feeds the table.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use us_proto::v1::{self, FragmentStatus, GetItem, GetReply, GetRequest, PutRequest};

use super::{FragmentFailure, FragmentTransport, SlotRange};
use crate::daemon::logging::RequestId;
use crate::fragment::FragmentRecord;
use crate::ids::ProviderId;
use crate::tls::{ExpectedPeer, Identity, KeyHash, Role};
use crate::wire::{BulkClient, BulkError, BulkLimits, GET_ITEMS_MAX};

/// Limits of [`ProviderLinks`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinksConfig {
    /// Connections to one provider: one for small requests, the others for puts.
    pub connections_max: usize,
    /// Gets that wait for one provider; more fail as busy.
    pub gets_queued_max: usize,
    /// Get requests on the wire to one provider at once. Meanwhile further reads gather into the
    /// next.
    pub gets_inflight_max: usize,
    /// Bytes one Get asks for at most, so that the connection does not fill with one reader's.
    pub get_bytes_max: usize,
    /// How long an unreachable provider is left alone at first, and at most.
    pub backoff: (Duration, Duration),
    /// Limits of each connection.
    pub bulk: BulkLimits,
}

impl Default for LinksConfig {
    fn default() -> Self {
        Self {
            connections_max: 2,
            gets_queued_max: 4096,
            gets_inflight_max: 4,
            get_bytes_max: 8 << 20,
            backoff: (Duration::from_millis(200), Duration::from_secs(10)),
            bulk: BulkLimits::default(),
        }
    }
}

/// Where a provider is, as the directory says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProviderAddress {
    /// "host:port".
    pub address: String,
    /// The key it must show.
    pub key_hash: KeyHash,
    /// Whether its stream with the directory is up.
    pub reachable: bool,
}

/// The connections to all providers. Clones share them.
#[derive(Clone)]
pub struct ProviderLinks {
    inner: Arc<Inner>,
}

struct Inner {
    identity: Identity,
    config: LinksConfig,
    grant: RwLock<Bytes>,
    links: RwLock<HashMap<ProviderId, Arc<Link>>>,
}

/// One provider.
struct Link {
    address: RwLock<ProviderAddress>,
    /// One lane for each connection; the first also carries the gets.
    lanes: Vec<Lane>,
    trouble: Mutex<Trouble>,
    gets: mpsc::Sender<Waiting>,
}

/// One connection, or none.
#[derive(Default)]
struct Lane {
    client: Mutex<Option<BulkClient>>,
    /// Held while connecting, so that only one does.
    connecting: tokio::sync::Mutex<()>,
}

/// What went wrong lately.
#[derive(Default)]
struct Trouble {
    failures: u32,
    /// Not tried again before.
    until: Option<Instant>,
}

/// A get in a provider's queue.
struct Waiting {
    slots: SlotRange,
    deadline: Instant,
    /// Whom it is for.
    request: RequestId,
    answer: oneshot::Sender<Result<Bytes, FragmentFailure>>,
}

impl ProviderLinks {
    /// Links that show `identity`; the table is empty.
    pub fn new(identity: Identity, config: LinksConfig) -> Self {
        let (grant, links) = (RwLock::default(), RwLock::default());
        Self { inner: Arc::new(Inner { identity, config, grant, links }) }
    }

    /// The grant that requests carry from now on.
    pub fn set_grant(&self, grant: Bytes) {
        *self.inner.grant.write() = grant;
    }

    /// What the directory says about providers: the whole table, or only what changed. Entries that
    /// make no sense are left out.
    pub fn update(&self, table: &v1::ProviderTable) {
        let mut links = self.inner.links.write();
        if table.whole {
            let listed: Vec<u32> = table.providers.iter().map(|entry| entry.provider).collect();
            links.retain(|provider, _| listed.contains(&provider.0));
        }
        for entry in &table.providers {
            let Some(key_hash) = KeyHash::from_slice(&entry.key_hash) else { continue };
            let (address, reachable) = (entry.address.clone(), entry.reachable);
            let address = ProviderAddress { address, key_hash, reachable };
            match links.get(&ProviderId(entry.provider)) {
                Some(link) => link.moved(address),
                None => {
                    let link = Link::start(&self.inner, address);
                    links.insert(ProviderId(entry.provider), link);
                }
            }
        }
    }

    /// The providers known, and where they are.
    pub fn addresses(&self) -> Vec<(ProviderId, ProviderAddress)> {
        let links = self.inner.links.read();
        links.iter().map(|(provider, link)| (*provider, link.address.read().clone())).collect()
    }

    fn link(&self, provider: ProviderId) -> Result<Arc<Link>, FragmentFailure> {
        let links = self.inner.links.read();
        links.get(&provider).cloned().ok_or(FragmentFailure::UnknownProvider)
    }
}

impl FragmentTransport for ProviderLinks {
    fn put(
        &self,
        provider: ProviderId,
        record: FragmentRecord,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<(), FragmentFailure>> {
        let (inner, link) = (Arc::clone(&self.inner), self.link(provider));
        let request = RequestId::current();
        async move {
            let link = link?;
            let lane = link.lanes.len() - 1;
            let client = link.client(&inner, lane, deadline).await?;
            let grant = inner.grant.read().clone();
            let (id, trace) = (record.header.id(), request.0);
            let put = PutRequest { request: 0, grant, record: contiguous(&record), trace };
            drop(record);
            let reply = client.put(put, deadline).await.map_err(|error| link.broke(&error));
            let result = reply.and_then(|reply| status_result(reply.status(), reply.detail));
            tracing::debug!(%request, %provider, fragment = %id, ?result, "put");
            result
        }
        .boxed()
    }

    fn get(
        &self,
        provider: ProviderId,
        slots: SlotRange,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes, FragmentFailure>> {
        let link = self.link(provider);
        let request = RequestId::current();
        async move {
            let link = link?;
            link.check_trouble()?;
            let started = Instant::now();
            let (answer, answered) = oneshot::channel();
            let waiting = Waiting { slots, deadline, request, answer };
            link.gets.try_send(waiting).map_err(|_| FragmentFailure::Busy)?;
            let result = match timeout_at(deadline, answered).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(FragmentFailure::UnknownProvider),
                Err(_) => Err(FragmentFailure::Timeout {
                    waited_ms: started.elapsed().as_millis() as u64,
                }),
            };
            let failure = result.as_ref().err();
            tracing::debug!(%request, %provider, fragment = %slots.fragment, ?failure, "get");
            result
        }
        .boxed()
    }

    fn is_reachable(&self, provider: ProviderId) -> bool {
        self.link(provider)
            .is_ok_and(|link| link.address.read().reachable && link.check_trouble().is_ok())
    }
}

impl Link {
    fn start(inner: &Arc<Inner>, address: ProviderAddress) -> Arc<Self> {
        let (gets, queue) = mpsc::channel(inner.config.gets_queued_max);
        let link = Arc::new(Self {
            address: RwLock::new(address),
            lanes: (0..inner.config.connections_max.max(1)).map(|_| Lane::default()).collect(),
            trouble: Mutex::default(),
            gets,
        });
        // Ends with the link: the queue's only sender is in it.
        let dispatch = Dispatch { inner: Arc::clone(inner), link: Arc::downgrade(&link), queue };
        tokio::spawn(dispatch.run());
        link
    }

    /// The directory says where the provider is now.
    fn moved(&self, address: ProviderAddress) {
        let mut current = self.address.write();
        if current.address != address.address || current.key_hash != address.key_hash {
            self.lanes.iter().for_each(|lane| *lane.client.lock() = None);
        }
        if *current != address && address.reachable {
            *self.trouble.lock() = Trouble::default();
        }
        *current = address;
    }

    /// Fails while an unreachable provider is left alone.
    fn check_trouble(&self) -> Result<(), FragmentFailure> {
        match self.trouble.lock().until {
            Some(until) if Instant::now() < until => Err(FragmentFailure::Unreachable {
                detail: "it could not be reached a moment ago".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn failed(&self, config: &LinksConfig) {
        let mut trouble = self.trouble.lock();
        let (first, most) = config.backoff;
        let wait = first.saturating_mul(1 << trouble.failures.min(16)).min(most);
        trouble.failures = trouble.failures.saturating_add(1);
        trouble.until = Some(Instant::now() + wait);
    }

    /// What a broken or silent connection means for a fragment. The client says by itself that it
    /// is closed, so the next request makes another.
    fn broke(&self, error: &BulkError) -> FragmentFailure {
        match error {
            BulkError::Closed { .. } => FragmentFailure::Unreachable { detail: error.to_string() },
            BulkError::Deadline { .. } => FragmentFailure::Timeout { waited_ms: 0 },
            BulkError::Request(_) => FragmentFailure::Invalid { detail: error.to_string() },
        }
    }

    fn open_client(&self, lane: usize) -> Option<BulkClient> {
        let client = self.lanes[lane].client.lock();
        client.as_ref().filter(|client| !client.is_closed()).cloned()
    }

    /// The lane's connection, made where there is none.
    async fn client(
        &self,
        inner: &Inner,
        lane: usize,
        deadline: Instant,
    ) -> Result<BulkClient, FragmentFailure> {
        if let Some(client) = self.open_client(lane) {
            return Ok(client);
        }
        self.check_trouble()?;
        let connecting = async {
            let _turn = self.lanes[lane].connecting.lock().await;
            if let Some(client) = self.open_client(lane) {
                return Ok(client);
            }
            self.check_trouble()?;
            let ProviderAddress { address, key_hash, .. } = self.address.read().clone();
            let expected = ExpectedPeer::key(Role::Provider, key_hash);
            let bulk = inner.config.bulk;
            match BulkClient::connect(&address, &inner.identity, expected, bulk).await {
                Ok(client) => {
                    *self.trouble.lock() = Trouble::default();
                    *self.lanes[lane].client.lock() = Some(client.clone());
                    Ok(client)
                }
                Err(error) => {
                    self.failed(&inner.config);
                    tracing::debug!(%address, %error, "provider unreachable");
                    Err(FragmentFailure::Unreachable { detail: error.to_string() })
                }
            }
        };
        let late = |_| FragmentFailure::Timeout { waited_ms: 0 };
        timeout_at(deadline, connecting).await.map_err(late)?
    }
}

/// Takes gets from a provider's queue and sends them together.
struct Dispatch {
    inner: Arc<Inner>,
    link: std::sync::Weak<Link>,
    queue: mpsc::Receiver<Waiting>,
}

impl Dispatch {
    async fn run(mut self) {
        let config = self.inner.config;
        let inflight = Arc::new(tokio::sync::Semaphore::new(config.gets_inflight_max.max(1)));
        let mut held: Option<Waiting> = None;
        loop {
            let first = match held.take() {
                Some(waiting) => waiting,
                None => match self.queue.recv().await {
                    Some(waiting) => waiting,
                    None => return,
                },
            };
            // While all are in flight, what comes meanwhile gathers in the queue.
            let Ok(permit) = Arc::clone(&inflight).acquire_owned().await else { return };
            let mut bytes = first.slots.bytes();
            let mut batch = vec![first];
            while batch.len() < GET_ITEMS_MAX {
                let Ok(next) = self.queue.try_recv() else { break };
                if next.answer.is_closed() {
                    continue;
                }
                if bytes + next.slots.bytes() > config.get_bytes_max {
                    held = Some(next);
                    break;
                }
                bytes += next.slots.bytes();
                batch.push(next);
            }
            let Some(link) = self.link.upgrade() else { return };
            let inner = Arc::clone(&self.inner);
            tokio::spawn(async move {
                fetch(&inner, &link, batch).await;
                drop(permit);
            });
        }
    }
}

/// Sends one Get for all of `batch` and gives each its answer as it comes.
async fn fetch(inner: &Inner, link: &Link, mut batch: Vec<Waiting>) {
    batch.retain(|waiting| !waiting.answer.is_closed());
    let Some(deadline) = batch.iter().map(|waiting| waiting.deadline).max() else { return };
    let items = batch.iter().map(|waiting| GetItem {
        fragment: Some(v1::FragmentId {
            block: waiting.slots.fragment.block.as_bytes().to_vec().into(),
            index: waiting.slots.fragment.index.into(),
        }),
        first_slot: waiting.slots.first_slot,
        slots: waiting.slots.slots,
        trailer: false,
        trace: waiting.request.0,
    });
    let grant = inner.grant.read().clone();
    let request = GetRequest { request: 0, grant, items: items.collect() };
    let mut waiting: Vec<Option<Waiting>> = batch.into_iter().map(Some).collect();
    let result = exchange(inner, link, request, deadline, &mut waiting).await;
    let failure = result.err().unwrap_or_else(|| FragmentFailure::Unreachable {
        detail: "it left the item unanswered".to_owned(),
    });
    for waiting in waiting.into_iter().flatten() {
        // Refused only where the reader is gone.
        let _ = waiting.answer.send(Err(failure.clone()));
    }
}

async fn exchange(
    inner: &Inner,
    link: &Link,
    request: GetRequest,
    deadline: Instant,
    waiting: &mut [Option<Waiting>],
) -> Result<(), FragmentFailure> {
    let client = link.client(inner, 0, deadline).await?;
    let mut replies = client.get(request, deadline).await.map_err(|error| link.broke(&error))?;
    while let Some(reply) = replies.next().await {
        let reply = reply.map_err(|error| link.broke(&error))?;
        let Some(waiting) = waiting.get_mut(reply.item as usize).and_then(Option::take) else {
            continue;
        };
        let result = reply_result(reply, &waiting.slots);
        let _ = waiting.answer.send(result);
    }
    Ok(())
}

fn reply_result(reply: GetReply, slots: &SlotRange) -> Result<Bytes, FragmentFailure> {
    status_result(reply.status(), reply.detail)?;
    let (expected, found) = (slots.bytes(), reply.data.len());
    if expected == found {
        Ok(reply.data)
    } else {
        Err(FragmentFailure::Length { expected, found })
    }
}

/// What a provider's status means.
fn status_result(status: FragmentStatus, detail: String) -> Result<(), FragmentFailure> {
    match status {
        FragmentStatus::Ok => Ok(()),
        FragmentStatus::NotFound => Err(FragmentFailure::NotFound),
        FragmentStatus::Damaged => Err(FragmentFailure::Damaged { detail }),
        FragmentStatus::Refused => Err(FragmentFailure::Refused { detail }),
        FragmentStatus::NoSpace => Err(FragmentFailure::NoSpace),
        FragmentStatus::Io => Err(FragmentFailure::Io { detail }),
        FragmentStatus::Invalid | FragmentStatus::Unspecified => {
            Err(FragmentFailure::Invalid { detail })
        }
        FragmentStatus::Busy => Err(FragmentFailure::Busy),
    }
}

/// The record as one run of bytes, which is what a frame carries.
fn contiguous(record: &FragmentRecord) -> Bytes {
    let parts = record.to_parts();
    let mut bytes = BytesMut::with_capacity(parts.record_bytes());
    parts.slices().into_iter().for_each(|slice| bytes.extend_from_slice(slice));
    bytes.freeze()
}

#[cfg(test)]
mod tests;
