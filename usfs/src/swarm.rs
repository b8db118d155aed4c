//! The way to the providers: one framed connection to each that is needed, dialled when it is, by
//! the addresses and keys that the directory's table gives.
//!
//! Invariants:
//! - a connection is used only with the provider whose key the table names;
//! - a provider that could not be dialled is not dialled again for [`DIAL_AGAIN`], so that reads go
//!   to others at once; a changed entry of the table ends that pause.
//!
//! Called by the block pipeline (as [`FragmentTransport`]) and by the session (as [`SwarmNews`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};
use us_core::daemon::logging::RequestId;
use us_core::disk::{FragmentFailure, FragmentTransport, SlotRange};
use us_core::fragment::FragmentRecord;
use us_core::ids::{FragmentId, ProviderId};
use us_core::tls::{ExpectedPeer, Identity, KeyHash, Role};
use us_core::wire::{BulkClient, BulkError, BulkLimits};
use us_proto::v1;

use crate::fs::SwarmNews;

/// How long a provider that could not be dialled is left alone.
const DIAL_AGAIN: Duration = Duration::from_secs(1);

type Dial = Shared<BoxFuture<'static, Result<BulkClient, Arc<str>>>>;

/// The providers of a cluster, as this mount reaches them. Cheap to clone.
#[derive(Clone)]
pub struct Swarm {
    inner: Arc<Inner>,
}

struct Inner {
    identity: Identity,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    grant: Bytes,
    providers: HashMap<ProviderId, Peer>,
}

struct Peer {
    address: String,
    key: KeyHash,
    /// The directory says so.
    reachable: bool,
    dial: Option<(Dial, Instant)>,
}

impl Peer {
    fn failed_lately(&self) -> bool {
        self.dial.as_ref().is_some_and(|(dial, dialled)| {
            dialled.elapsed() < DIAL_AGAIN && matches!(dial.peek(), Some(Err(_)))
        })
    }
}

impl Swarm {
    /// No providers yet: the session brings them. `identity` is who we are.
    pub fn new(identity: Identity) -> Self {
        Self { inner: Arc::new(Inner { identity, state: Mutex::default() }) }
    }
}

impl SwarmNews for Swarm {
    fn on_providers(&self, table: &v1::ProviderTable) {
        let mut state = self.inner.state.lock();
        if table.whole {
            let named = |id: &ProviderId| table.providers.iter().any(|one| one.provider == id.0);
            state.providers.retain(|id, _| named(id));
        }
        for entry in &table.providers {
            let Some(key) = KeyHash::from_slice(&entry.key_hash) else {
                tracing::warn!(provider = entry.provider, "the directory names it without a key");
                continue;
            };
            let id = ProviderId(entry.provider);
            let same = state
                .providers
                .get_mut(&id)
                .filter(|peer| peer.address == entry.address && peer.key == key);
            match same {
                Some(peer) => {
                    let came_back = entry.reachable && !peer.reachable;
                    if came_back && peer.failed_lately() {
                        peer.dial = None;
                    }
                    peer.reachable = entry.reachable;
                }
                None => {
                    let (address, reachable) = (entry.address.clone(), entry.reachable);
                    state.providers.insert(id, Peer { address, key, reachable, dial: None });
                }
            }
        }
    }

    fn on_grant(&self, grant: &Bytes) {
        self.inner.state.lock().grant = grant.clone();
    }
}

impl Inner {
    /// The connection to a provider, dialled if there is none, and the grant to show.
    async fn client(
        &self,
        provider: ProviderId,
        deadline: Instant,
    ) -> Result<(BulkClient, Bytes), FragmentFailure> {
        let (dial, grant) = {
            let mut state = self.state.lock();
            let grant = state.grant.clone();
            let peer =
                state.providers.get_mut(&provider).ok_or(FragmentFailure::UnknownProvider)?;
            (self.dial(peer), grant)
        };
        let asked = Instant::now();
        match timeout_at(deadline, dial).await {
            Ok(Ok(client)) => Ok((client, grant)),
            Ok(Err(detail)) => Err(FragmentFailure::Unreachable { detail: detail.to_string() }),
            Err(_elapsed) => Err(timed_out(asked)),
        }
    }

    fn dial(&self, peer: &mut Peer) -> Dial {
        if let Some((dial, dialled)) = &peer.dial {
            let usable = match dial.peek() {
                None => true,
                Some(Ok(client)) => !client.is_closed(),
                Some(Err(_)) => dialled.elapsed() < DIAL_AGAIN,
            };
            if usable {
                return dial.clone();
            }
        }
        let (address, identity) = (peer.address.clone(), self.identity.clone());
        let expected = ExpectedPeer::key(Role::Provider, peer.key);
        let dial = async move {
            let limits = BulkLimits::default();
            let dialled = BulkClient::connect(&address, &identity, expected, limits).await;
            dialled.map_err(|error| Arc::from(error.to_string()))
        };
        let dial = dial.boxed().shared();
        peer.dial = Some((dial.clone(), Instant::now()));
        dial
    }

    /// Runs one request; once more on a new connection where the old one turned out to be dead.
    async fn ask<T, F>(
        &self,
        provider: ProviderId,
        deadline: Instant,
        request: impl Fn(BulkClient, Bytes) -> F,
    ) -> Result<T, FragmentFailure>
    where
        F: Future<Output = Result<T, BulkError>>,
    {
        let asked = Instant::now();
        for last in [false, true] {
            let (client, grant) = self.client(provider, deadline).await?;
            match request(client, grant).await {
                Ok(answer) => return Ok(answer),
                Err(BulkError::Closed { .. }) if !last => {}
                Err(error @ BulkError::Closed { .. }) => {
                    return Err(FragmentFailure::Unreachable { detail: error.to_string() });
                }
                Err(BulkError::Deadline { .. }) => return Err(timed_out(asked)),
                Err(BulkError::Request(error)) => {
                    return Err(FragmentFailure::Invalid { detail: error.to_string() });
                }
            }
        }
        Err(timed_out(asked))
    }
}

fn timed_out(asked: Instant) -> FragmentFailure {
    FragmentFailure::Timeout { waited_ms: asked.elapsed().as_millis() as u64 }
}

fn request_number() -> u64 {
    RequestId::current().unwrap_or_else(RequestId::next).0
}

/// A provider's status as a result.
fn check(status: v1::FragmentStatus, detail: String) -> Result<(), FragmentFailure> {
    use v1::FragmentStatus as Status;
    match status {
        Status::Ok => Ok(()),
        Status::NotFound => Err(FragmentFailure::NotFound),
        Status::Damaged => Err(FragmentFailure::Damaged { detail }),
        Status::Refused => Err(FragmentFailure::Refused { detail }),
        Status::NoSpace => Err(FragmentFailure::NoSpace),
        Status::Io => Err(FragmentFailure::Io { detail }),
        Status::Busy => Err(FragmentFailure::Busy),
        Status::Invalid | Status::Unspecified => Err(FragmentFailure::Invalid { detail }),
    }
}

/// The record in one piece, as the frame's body has it.
fn contiguous(record: &FragmentRecord) -> Bytes {
    let parts = record.to_parts();
    let mut bytes = BytesMut::with_capacity(parts.record_bytes());
    parts.slices().into_iter().for_each(|slice| bytes.extend_from_slice(slice));
    bytes.freeze()
}

fn wire_id(fragment: FragmentId) -> v1::FragmentId {
    let block = Bytes::copy_from_slice(fragment.block.as_bytes());
    v1::FragmentId { block, index: u32::from(fragment.index) }
}

impl FragmentTransport for Swarm {
    fn put(
        &self,
        provider: ProviderId,
        record: FragmentRecord,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<(), FragmentFailure>> {
        let inner = Arc::clone(&self.inner);
        let number = request_number();
        async move {
            let record = contiguous(&record);
            let put = |client: BulkClient, grant: Bytes| {
                let put = v1::PutRequest { request: number, grant, record: record.clone() };
                async move { client.put(put, deadline).await }
            };
            let reply = inner.ask(provider, deadline, put).await?;
            check(reply.status(), reply.detail)
        }
        .boxed()
    }

    fn get(
        &self,
        provider: ProviderId,
        slots: SlotRange,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes, FragmentFailure>> {
        let inner = Arc::clone(&self.inner);
        let number = request_number();
        async move {
            let get = |client: BulkClient, grant: Bytes| {
                let item = v1::GetItem {
                    fragment: Some(wire_id(slots.fragment)),
                    first_slot: slots.first_slot,
                    slots: slots.slots,
                    trailer: false,
                };
                let get = v1::GetRequest { request: number, grant, items: vec![item] };
                async move { client.get(get, deadline).await?.next().await.transpose() }
            };
            let Some(reply) = inner.ask(provider, deadline, get).await? else {
                let detail = "it gave no reply to the item".to_owned();
                return Err(FragmentFailure::Io { detail });
            };
            check(reply.status(), reply.detail)?;
            let (expected, found) = (slots.bytes(), reply.data.len());
            if found == expected {
                Ok(reply.data)
            } else {
                Err(FragmentFailure::Length { expected, found })
            }
        }
        .boxed()
    }

    fn is_reachable(&self, provider: ProviderId) -> bool {
        let state = self.inner.state.lock();
        state.providers.get(&provider).is_some_and(|peer| peer.reachable && !peer.failed_lately())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use us_core::ids::BlockId;
    use us_core::tls::CertificateAuthority;

    fn swarm() -> Swarm {
        let authority = CertificateAuthority::create().unwrap();
        Swarm::new(authority.issue(Role::Client, "test").unwrap())
    }

    fn entry(provider: u32, address: &str, reachable: bool) -> v1::ProviderEntry {
        let (address, key_hash) = (address.to_owned(), Bytes::from_static(&[7; 32]));
        v1::ProviderEntry { provider, address, key_hash, reachable }
    }

    fn table(whole: bool, providers: Vec<v1::ProviderEntry>) -> v1::ProviderTable {
        v1::ProviderTable { providers, whole }
    }

    fn slots() -> SlotRange {
        let fragment = FragmentId { block: BlockId::generate(), index: 0 };
        SlotRange { fragment, first_slot: 0, slots: 1, slot_bytes: 16 }
    }

    #[test]
    fn the_table_is_kept_as_it_changes() {
        let swarm = swarm();
        let reachable = |id| swarm.is_reachable(ProviderId(id));
        assert!(!reachable(1));
        swarm.on_providers(&table(true, vec![entry(1, "h:1", true), entry(2, "h:2", true)]));
        assert!(reachable(1) && reachable(2));
        swarm.on_providers(&table(false, vec![entry(2, "h:2", false)]));
        assert!(reachable(1) && !reachable(2));
        swarm.on_providers(&table(true, vec![entry(2, "h:3", true)]));
        assert!(!reachable(1) && reachable(2));
    }

    #[tokio::test]
    async fn a_provider_that_is_not_there_fails_at_once_and_is_left_alone() {
        let swarm = swarm();
        let deadline = Instant::now() + Duration::from_secs(5);
        let unknown = swarm.get(ProviderId(1), slots(), deadline).await;
        assert_eq!(unknown, Err(FragmentFailure::UnknownProvider));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        swarm.on_providers(&table(true, vec![entry(1, &address, true)]));
        let failure = swarm.get(ProviderId(1), slots(), deadline).await.unwrap_err();
        assert!(matches!(failure, FragmentFailure::Unreachable { .. }), "{failure:?}");
        assert!(!swarm.is_reachable(ProviderId(1)), "left alone for a while");
        // It went, and came back: the pause is over.
        swarm.on_providers(&table(false, vec![entry(1, &address, false)]));
        swarm.on_providers(&table(false, vec![entry(1, &address, true)]));
        assert!(swarm.is_reachable(ProviderId(1)));
    }
}
