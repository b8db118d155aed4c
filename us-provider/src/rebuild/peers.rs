//! The way to other providers: their fragments in frames, their sums over gRPC.
//!
//! Connections are made when needed and used again. They are closed when nothing was asked of a
//! provider for a while, and there are never more than a bound.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};
use tonic::transport::Channel;
use us_core::disk::{
    FetchedSlots, FragmentFailure, LinksConfig, ProviderAddress, ProviderLinks, SlotRange,
};
use us_core::ids::ProviderId;
use us_core::tls::{ExpectedPeer, Identity, KeyHash, Role};
use us_core::wire::{GRPC_MESSAGE_BYTES_MAX, connect_grpc};
use us_proto::v1::fragments_client::FragmentsClient;
use us_proto::v1::{CombineReply, CombineRequest};

/// Connections of which nothing was asked for this time are closed.
const IDLE: Duration = Duration::from_secs(30);
/// gRPC connections kept.
const CHANNELS_MAX: usize = 64;

/// What rebuilding asks of other providers. A trait, so that tests can stand in for them.
pub trait Peers: Send + Sync + 'static {
    /// Reads slots with the header and trailer of their record ([`ProviderLinks::fetch`]); shows
    /// `grant`.
    fn fetch(
        &self,
        provider: ProviderId,
        place: &ProviderAddress,
        grant: Bytes,
        slots: SlotRange,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<FetchedSlots, FragmentFailure>>;

    /// Asks for a partial sum. A reply with any status is an answer.
    fn combine(
        &self,
        place: &ProviderAddress,
        request: CombineRequest,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<CombineReply, FragmentFailure>>;
}

/// The real providers. Cheap to clone.
#[derive(Clone)]
pub struct PeerLinks {
    links: ProviderLinks,
    channels: Arc<Channels>,
}

impl std::fmt::Debug for PeerLinks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerLinks").finish_non_exhaustive()
    }
}

struct Channels {
    identity: Identity,
    open: Mutex<HashMap<(String, KeyHash), Open>>,
}

struct Open {
    channel: Channel,
    used: Instant,
}

impl PeerLinks {
    /// Links that show `identity`. Call it in a runtime.
    pub fn new(identity: Identity) -> Self {
        let config = LinksConfig { idle: Some(IDLE), ..LinksConfig::default() };
        let links = ProviderLinks::new(identity.clone(), config);
        let channels = Arc::new(Channels { identity, open: Mutex::default() });
        tokio::spawn(close_idle(Arc::downgrade(&channels)));
        Self { links, channels }
    }
}

impl Channels {
    async fn channel(&self, place: &ProviderAddress) -> Result<Channel, FragmentFailure> {
        let key = (place.address.clone(), place.key_hash);
        if let Some(open) = self.open.lock().get_mut(&key) {
            open.used = Instant::now();
            return Ok(open.channel.clone());
        }
        let expected = ExpectedPeer::key(Role::Provider, place.key_hash);
        let channel = connect_grpc(&place.address, &self.identity, expected).await;
        let channel =
            channel.map_err(|error| FragmentFailure::Unreachable { detail: error.to_string() })?;
        let mut open = self.open.lock();
        if open.len() >= CHANNELS_MAX {
            let oldest = open.iter().min_by_key(|(_, open)| open.used);
            let oldest = oldest.map(|(key, _)| key.clone());
            oldest.map(|key| open.remove(&key));
        }
        // Two that dialled at once: the later one stays, the other ends with its call.
        open.insert(key, Open { channel: channel.clone(), used: Instant::now() });
        Ok(channel)
    }

    async fn combine(
        &self,
        place: &ProviderAddress,
        request: CombineRequest,
    ) -> Result<CombineReply, FragmentFailure> {
        let mut client = FragmentsClient::new(self.channel(place).await?)
            .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX);
        match client.combine(request).await {
            Ok(reply) => Ok(reply.into_inner()),
            Err(status) => Err(match status.code() {
                tonic::Code::InvalidArgument | tonic::Code::Unimplemented => {
                    FragmentFailure::Invalid { detail: status.message().to_owned() }
                }
                tonic::Code::PermissionDenied | tonic::Code::Unauthenticated => {
                    FragmentFailure::Refused { detail: status.message().to_owned() }
                }
                _ => FragmentFailure::Unreachable { detail: status.to_string() },
            }),
        }
    }
}

/// Closes what nobody uses, as long as there is anybody who could.
async fn close_idle(channels: Weak<Channels>) {
    loop {
        tokio::time::sleep(IDLE / 2).await;
        let Some(channels) = channels.upgrade() else { return };
        channels.open.lock().retain(|_, open| open.used.elapsed() < IDLE);
    }
}

impl Peers for PeerLinks {
    fn fetch(
        &self,
        provider: ProviderId,
        place: &ProviderAddress,
        grant: Bytes,
        slots: SlotRange,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<FetchedSlots, FragmentFailure>> {
        self.links.learn(provider, place.clone());
        self.links.fetch(provider, grant, slots, deadline)
    }

    fn combine(
        &self,
        place: &ProviderAddress,
        request: CombineRequest,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<CombineReply, FragmentFailure>> {
        let (channels, place) = (Arc::clone(&self.channels), place.clone());
        async move {
            let begun = Instant::now();
            let answer = timeout_at(deadline, channels.combine(&place, request)).await;
            answer.unwrap_or_else(|_| {
                let waited_ms = begun.elapsed().as_millis() as u64;
                Err(FragmentFailure::Timeout { waited_ms })
            })
        }
        .boxed()
    }
}
