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
//! Called by the pipeline through [`FragmentTransport`], with a table that the session feeds
//! ([`ProviderLinks::update`]); by a rebuilder with [`ProviderLinks::fetch`], which learns each
//! provider from the order that names it ([`ProviderLinks::learn`]).

mod gets;
mod grants;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use us_proto::v1::{self, FragmentStatus, PutRequest};

use super::{FragmentFailure, FragmentTransport, SlotRange};
use crate::daemon::logging::RequestId;
use crate::fragment::FragmentRecord;
use crate::ids::ProviderId;
use crate::tls::{ExpectedPeer, Identity, KeyHash, PeerIdentity, Role};
use crate::wire::{BulkClient, BulkError, BulkLimits, unsecured};
use gets::{Dispatch, Waiting, Wanted};
use grants::Grants;

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
    /// Connections of a provider of which nothing was asked for this time are closed; `None`: they
    /// are kept.
    pub idle: Option<Duration>,
    /// Providers that [`ProviderLinks::learn`] keeps in the table; beyond, the one that was used the
    /// longest ago is forgotten.
    pub learned_max: usize,
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
            idle: None,
            learned_max: 256,
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

/// Slots of a fragment, and what its record says of it.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct FetchedSlots {
    /// The record's header, as stored; empty where it was not asked for.
    pub header: Bytes,
    /// The record's trailer, as stored; empty where it was not asked for.
    pub trailer: Bytes,
    /// The slots.
    pub data: Bytes,
}

/// The connections to all providers. Clones share them.
#[derive(Clone)]
pub struct ProviderLinks {
    inner: Arc<Inner>,
}

struct Inner {
    identity: Identity,
    way: Way,
    config: LinksConfig,
    grants: Grants,
    links: RwLock<HashMap<ProviderId, Arc<Link>>>,
}

/// What connections are made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// TLS with both certificates.
    Tls,
    /// Bare TCP: [`ProviderLinks::unsecured`].
    Plain,
}

/// One provider.
struct Link {
    address: RwLock<ProviderAddress>,
    /// One lane for each connection; the first also carries the gets.
    lanes: Vec<Lane>,
    trouble: Mutex<Trouble>,
    gets: mpsc::Sender<Waiting>,
    /// Get requests that may be on the wire at once.
    turns: Arc<Semaphore>,
    used: Mutex<Instant>,
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

impl ProviderLinks {
    /// Links that show `identity`; the table is empty.
    pub fn new(identity: Identity, config: LinksConfig) -> Self {
        Self::over(Way::Tls, identity, config)
    }

    /// Links without TLS to what [`unsecured`] serves: the limit that the benchmark `tls` compares
    /// with. Whoever answers is believed. No program calls it, and no setting leads to it.
    #[doc(hidden)]
    pub fn unsecured(identity: Identity, config: LinksConfig) -> Self {
        Self::over(Way::Plain, identity, config)
    }

    fn over(way: Way, identity: Identity, config: LinksConfig) -> Self {
        let (grants, links) = (Grants::default(), RwLock::default());
        Self { inner: Arc::new(Inner { identity, way, config, grants, links }) }
    }

    /// The grant that requests carry from now on.
    pub fn set_grant(&self, grant: Bytes) {
        self.inner.grants.set(grant);
    }

    /// Waits until a provider has refused the present grant, so that a fresh one is wanted.
    pub async fn grant_wanted(&self) {
        self.inner.grants.wanted().await;
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

    /// Where a provider is, as somebody says who may: requests name it by its number from then on.
    pub fn learn(&self, provider: ProviderId, address: ProviderAddress) {
        let mut links = self.inner.links.write();
        if let Some(link) = links.get(&provider) {
            return link.moved(address);
        }
        if links.len() >= self.inner.config.learned_max.max(1) {
            let oldest = links.iter().min_by_key(|(_, link)| *link.used.lock());
            let oldest = oldest.map(|(provider, _)| *provider);
            oldest.map(|provider| links.remove(&provider));
        }
        links.insert(provider, Link::start(&self.inner, address));
    }

    /// Reads slots of a fragment with the header and trailer of its record, showing `grant`; gives up
    /// at `deadline`. Travels together with the other gets of the provider. No slots from the fragment's end on
    /// bring header and trailer alone.
    ///
    /// # Errors
    /// [`FragmentFailure`]; [`FragmentFailure::Length`] also where more or fewer bytes come.
    pub fn fetch(
        &self,
        provider: ProviderId,
        grant: Bytes,
        slots: SlotRange,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<FetchedSlots, FragmentFailure>> {
        let (this, request) = (self.clone(), RequestId::current());
        let wanted = Wanted { slots, record: true, deadline, request, grant };
        async move { this.queue(provider, wanted).await }.boxed()
    }

    async fn queue(
        &self,
        provider: ProviderId,
        wanted: Wanted,
    ) -> Result<FetchedSlots, FragmentFailure> {
        let link = self.link(provider)?;
        link.check_trouble()?;
        let (request, fragment) = (wanted.request, wanted.slots.fragment);
        let result = match link.turn() {
            Some((client, _turn)) => gets::ask(&link, &client, &wanted).await,
            None => link.wait_for(wanted).await,
        };
        let failure = result.as_ref().err();
        tracing::debug!(%request, %provider, %fragment, ?failure, "get");
        result
    }

    /// The providers known, and where they are.
    pub fn addresses(&self) -> Vec<(ProviderId, ProviderAddress)> {
        let links = self.inner.links.read();
        links.iter().map(|(provider, link)| (*provider, link.address.read().clone())).collect()
    }

    fn link(&self, provider: ProviderId) -> Result<Arc<Link>, FragmentFailure> {
        let links = self.inner.links.read();
        let link = links.get(&provider).cloned().ok_or(FragmentFailure::UnknownProvider)?;
        *link.used.lock() = Instant::now();
        Ok(link)
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
            let (id, trace) = (record.header.id(), request.0);
            let bytes = record.to_bytes();
            drop(record);
            let mut shown = inner.grants.show(deadline);
            let result = loop {
                let client = link.client(&inner, lane, deadline).await?;
                let (grant, record) = (shown.grant.clone(), bytes.clone());
                let put = PutRequest { request: 0, grant, record, trace };
                let reply = client.put(put, deadline).await.map_err(|error| link.broke(&error));
                let result = reply.and_then(|reply| status_result(reply.status(), reply.detail));
                if !shown.is_renewed(&result).await {
                    break result;
                }
            };
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
        let (this, request) = (self.clone(), RequestId::current());
        async move {
            let mut shown = this.inner.grants.show(deadline);
            loop {
                let grant = shown.grant.clone();
                let wanted = Wanted { slots, record: false, deadline, request, grant };
                let result = this.queue(provider, wanted).await;
                if !shown.is_renewed(&result).await {
                    return Ok(result?.data);
                }
            }
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
        let turns = Arc::new(Semaphore::new(inner.config.gets_inflight_max.max(1)));
        let link = Arc::new(Self {
            address: RwLock::new(address),
            lanes: (0..inner.config.connections_max.max(1)).map(|_| Lane::default()).collect(),
            trouble: Mutex::default(),
            gets,
            turns: Arc::clone(&turns),
            used: Mutex::new(Instant::now()),
        });
        // Ends with the link: the queue's only sender is in it.
        let (inner, weak) = (Arc::clone(inner), Arc::downgrade(&link));
        let dispatch = Dispatch { inner, link: weak, turns, queue };
        tokio::spawn(dispatch.run());
        link
    }

    /// The connection and a turn on it, for a get that need not wait: it passes by the queue, which
    /// saves waking the queue's task.
    fn turn(&self) -> Option<(BulkClient, OwnedSemaphorePermit)> {
        if self.gets.capacity() < self.gets.max_capacity() {
            return None;
        }
        let client = self.open_client(0)?;
        let turn = Arc::clone(&self.turns).try_acquire_owned().ok()?;
        Some((client, turn))
    }

    /// Has the get sent together with others that wait.
    async fn wait_for(&self, wanted: Wanted) -> Result<FetchedSlots, FragmentFailure> {
        let (started, deadline) = (Instant::now(), wanted.deadline);
        let (answer, answered) = oneshot::channel();
        self.gets.try_send(Waiting { wanted, answer }).map_err(|_| FragmentFailure::Busy)?;
        match timeout_at(deadline, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(FragmentFailure::UnknownProvider),
            Err(_) => {
                Err(FragmentFailure::Timeout { waited_ms: started.elapsed().as_millis() as u64 })
            }
        }
    }

    /// The directory says where the provider is now.
    fn moved(&self, address: ProviderAddress) {
        let mut current = self.address.write();
        if current.address != address.address || current.key_hash != address.key_hash {
            self.disconnect();
        }
        if *current != address && address.reachable {
            *self.trouble.lock() = Trouble::default();
        }
        *current = address;
    }

    /// Ends the connections as soon as what is under way on them is over.
    fn disconnect(&self) {
        self.lanes.iter().for_each(|lane| *lane.client.lock() = None);
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
            let dialled = match inner.way {
                Way::Tls => BulkClient::connect(&address, &inner.identity, expected, bulk).await,
                Way::Plain => {
                    let own = inner.identity.own().clone();
                    let believed = PeerIdentity { role: Role::Provider, key_hash, ..own };
                    unsecured::dial_plain(&address, believed, bulk).await
                }
            };
            match dialled {
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

/// What a provider's status means.
fn status_result(status: FragmentStatus, detail: String) -> Result<(), FragmentFailure> {
    match status {
        FragmentStatus::Ok => Ok(()),
        FragmentStatus::NotFound => Err(FragmentFailure::NotFound),
        FragmentStatus::Damaged => Err(FragmentFailure::Damaged { detail }),
        FragmentStatus::Refused => Err(FragmentFailure::Refused { detail }),
        FragmentStatus::NoGrant => Err(FragmentFailure::NoGrant { detail }),
        FragmentStatus::NoSpace => Err(FragmentFailure::NoSpace),
        FragmentStatus::Io => Err(FragmentFailure::Io { detail }),
        FragmentStatus::Invalid | FragmentStatus::Unspecified => {
            Err(FragmentFailure::Invalid { detail })
        }
        FragmentStatus::Busy => Err(FragmentFailure::Busy),
    }
}

#[cfg(test)]
mod tests;
