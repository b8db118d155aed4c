//! Real providers in one process, over TLS on loopback: for tests and examples.

#![allow(dead_code, reason = "each test and example needs another part of it")]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use us_core::code::ErasureCode;
use us_core::fragment::{FingerprintKind, FragmentRecord, records_of_block};
use us_core::geometry::{BlockGeometry, Code};
use us_core::grant::{Grant, GrantKey, Rights};
use us_core::ids::{Birth, BlockId, ClusterId, ProviderId, VolumeId};
use us_core::seal::Secret;
use us_core::tls::{CertificateAuthority, ExpectedPeer, Identity, Role};
use us_core::wire::{
    BulkClient, BulkLimits, BulkService, GRPC_MESSAGE_BYTES_MAX, Server, ServerLimits,
};
use us_proto::v1::fragments_server::{Fragments, FragmentsServer};
use us_proto::v1::{
    CombineReply, CombineRequest, GetReply, GetRequest, InventoryPage, InventoryRequest, PutReply,
    PutRequest, RebuildFragments, RebuildPath, RebuildSource, Rebuilt, VerifyReply, VerifyRequest,
};
use us_provider::grants::{Grants, Told};
use us_provider::guest::{GuestConfig, Pause};
use us_provider::rebuild::{Ended, PeerLinks, Peers, RebuildLimits, Rebuilder, Ticket};
use us_provider::service::FragmentService;
use us_provider::store::{Store, StoreOptions};

/// What a caller of these providers expects at the other end.
pub fn expect_provider() -> ExpectedPeer {
    ExpectedPeer::role(Role::Provider)
}

/// A block as its writer made it.
pub struct SampleBlock {
    /// Its shape.
    pub geometry: BlockGeometry,
    /// All its fragments.
    pub records: Vec<FragmentRecord>,
}

impl SampleBlock {
    /// A block of `bytes` of plaintext, whose bytes depend on the seed.
    pub fn new(s: usize, r: usize, bytes: usize, seed: u64) -> Self {
        let code = Code::new(s, r).expect("a code");
        let geometry = BlockGeometry::new(code, bytes).expect("a block");
        let mut random = StdRng::seed_from_u64(seed);
        let mut bodies = vec![vec![0u8; geometry.fragment_bytes()]; s + r];
        let (data, parity) = bodies.split_at_mut(s);
        data.iter_mut().for_each(|body| random.fill_bytes(body));
        let data: Vec<&[u8]> = data.iter().map(|body| &body[..]).collect();
        let mut parity: Vec<&mut [u8]> = parity.iter_mut().map(|body| &mut body[..]).collect();
        ErasureCode::new(code).encode(&data, &mut parity).expect("bodies of one length");
        let bodies = bodies.into_iter().map(Bytes::from).collect();
        let (volume, block) = (VolumeId::from_bytes([4; 16]), BlockId::generate());
        let records =
            records_of_block(FingerprintKind::Crc32c, volume, block, Birth(seed), geometry, bodies);
        Self { geometry, records }
    }
}

/// A service that may answer sums otherwise than the real one.
#[tonic::async_trait]
pub trait Serving: BulkService + Clone {
    /// What becomes of an answer.
    async fn combine(&self, reply: CombineReply) -> CombineReply;
}

#[tonic::async_trait]
impl Serving for FragmentService {
    async fn combine(&self, reply: CombineReply) -> CombineReply {
        reply
    }
}

/// The gRPC side of a [`Serving`].
struct Front<S> {
    service: FragmentService,
    serving: S,
}

#[tonic::async_trait]
impl<S: Serving> Fragments for Front<S> {
    type PutStream = BoxStream<'static, Result<PutReply, Status>>;
    type GetStream = BoxStream<'static, Result<GetReply, Status>>;
    type InventoryStream = BoxStream<'static, Result<InventoryPage, Status>>;

    async fn put(
        &self,
        request: Request<Streaming<PutRequest>>,
    ) -> Result<Response<Self::PutStream>, Status> {
        Fragments::put(&self.service, request).await
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        Fragments::get(&self.service, request).await
    }

    async fn combine(
        &self,
        request: Request<CombineRequest>,
    ) -> Result<Response<CombineReply>, Status> {
        let reply = Fragments::combine(&self.service, request).await?.into_inner();
        Ok(Response::new(self.serving.combine(reply).await))
    }

    async fn inventory(
        &self,
        request: Request<InventoryRequest>,
    ) -> Result<Response<Self::InventoryStream>, Status> {
        self.service.inventory(request).await
    }

    async fn verify(
        &self,
        request: Request<VerifyRequest>,
    ) -> Result<Response<VerifyReply>, Status> {
        self.service.verify(request).await
    }
}

/// One provider.
pub struct Provider {
    /// Its number.
    pub number: u32,
    /// Where it answers.
    pub address: String,
    /// What it holds.
    pub store: Store,
    identity: Identity,
    service: FragmentService,
    rebuilder: Rebuilder,
    endings: mpsc::Receiver<Ended>,
    stop: CancellationToken,
    served: std::sync::Mutex<Option<JoinHandle<()>>>,
    _dir: tempfile::TempDir,
}

impl Provider {
    async fn start(number: u32, identity: Identity) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let options = StoreOptions { index_cache_bytes: 4 << 20, ..StoreOptions::default() };
        let store = Store::open(dir.path(), options).expect("a store");
        let pause = Pause::load(dir.path());
        let peers: Arc<dyn Peers> = Arc::new(PeerLinks::new(identity.clone()));
        let grants = Grants::load(dir.path());
        grants.told(told(identity.own().cluster)).expect("a disk");
        let (kept, peered) = (store.clone(), Arc::clone(&peers));
        let service = FragmentService::new(kept, grants, pause.clone(), peered);
        // Tests run on busy machines.
        let guest = GuestConfig {
            repair_cpu_pressure_percent_max: 1000.0,
            repair_io_pressure_percent_max: 1000.0,
            ..GuestConfig::default()
        };
        let limits = RebuildLimits::default();
        let (rebuilder, endings) = Rebuilder::new(store.clone(), pause, guest, peers, limits);
        let mut provider = Self {
            number,
            address: String::new(),
            store,
            identity,
            service: service.clone(),
            rebuilder,
            endings,
            stop: CancellationToken::new(),
            served: std::sync::Mutex::new(None),
            _dir: dir,
        };
        provider.serve(service).await;
        provider
    }

    async fn serve<S: Serving + Send + Sync + 'static>(&mut self, serving: S) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        self.address = listener.local_addr().expect("an address").to_string();
        let front = Front { service: self.service.clone(), serving: serving.clone() };
        let fragments = FragmentsServer::new(front)
            .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX);
        let limits = ServerLimits { drain_timeout: Duration::ZERO, ..ServerLimits::default() };
        let server = Server::new(&self.identity, limits)
            .grpc(Routes::new(fragments))
            .bulk(Arc::new(serving));
        let stop = self.stop.clone();
        let served = tokio::spawn(async move {
            server.serve(listener, stop).await.expect("a usable identity");
        });
        *self.served.lock().expect("nobody panicked") = Some(served);
    }

    /// Ends serving.
    pub async fn stop(&self) {
        self.stop.cancel();
        let served = self.served.lock().expect("nobody panicked").take();
        if let Some(served) = served {
            served.await.expect("it ends well");
        }
    }

    /// The hash of its key, as orders name it.
    pub fn key_hash(&self) -> Bytes {
        self.identity.own().key_hash.as_bytes().to_vec().into()
    }

    /// A grant that it could show to others.
    pub fn grant(&self, volume: VolumeId) -> Bytes {
        grant_for(&self.identity, volume, None)
    }

    /// Carries one order out here.
    pub async fn rebuild(&mut self, order: &RebuildFragments) -> Rebuilt {
        self.rebuild_all(std::slice::from_ref(order)).await.remove(0)
    }

    /// Carries orders out here, as many at once as it allows.
    pub async fn rebuild_all(&mut self, orders: &[RebuildFragments]) -> Vec<Rebuilt> {
        for (ticket, order) in (1..).zip(orders) {
            let volume = VolumeId::from_slice(&order.volume).expect("a volume");
            let grant = grant_for(&self.identity, volume, BlockId::from_slice(&order.block));
            let order = RebuildFragments { ticket, grant, ..order.clone() };
            let ticket = Ticket { stream: 1, ticket };
            let refused = self.rebuilder.start(ticket, ProviderId(self.number), order);
            assert_eq!(refused, None);
        }
        let mut ended = Vec::with_capacity(orders.len());
        for _ in orders {
            ended.push(self.endings.recv().await.expect("each order is answered").rebuilt);
        }
        ended
    }
}

/// The key that signs the grants of this cluster.
fn grant_key(cluster: ClusterId) -> GrantKey {
    GrantKey::of(&Secret::from_bytes([7; 32].into()), cluster)
}

/// What the cluster's directory would say of grants.
pub fn told(cluster: ClusterId) -> Told {
    let key = grant_key(cluster).public();
    Told { key, cluster, incarnation: 1, period: 100, period_ms: 60_000 }
}

/// A grant of all rights for a volume, or for one block of it.
pub fn grant_for(holder: &Identity, volume: VolumeId, block: Option<BlockId>) -> Bytes {
    let own = holder.own();
    grant_key(own.cluster).sign(&Grant {
        cluster: own.cluster,
        volume,
        block,
        holder: own.key_hash,
        rights: Rights::ReadWrite,
        incarnation: 1,
        from: 100,
        until: 160,
        serial: 1,
    })
}

/// Providers of one cluster.
pub struct Swarm {
    authority: CertificateAuthority,
    /// They, by number.
    pub providers: Vec<Provider>,
}

impl Swarm {
    /// Starts providers 0 to `count` - 1.
    pub async fn start(count: u32) -> Self {
        let authority = CertificateAuthority::create().expect("an authority");
        let mut swarm = Self { authority, providers: Vec::new() };
        for number in 0..count {
            let provider = Provider::start(number, swarm.provider_identity()).await;
            swarm.providers.push(provider);
        }
        swarm
    }

    /// A provider that holds nothing and that orders name nowhere.
    pub async fn newcomer(&self) -> Provider {
        Provider::start(1000, self.provider_identity()).await
    }

    /// Who issues its certificates.
    pub fn authority(&self) -> &CertificateAuthority {
        &self.authority
    }

    /// A certificate of a provider.
    pub fn provider_identity(&self) -> Identity {
        self.authority.issue(Role::Provider, "attic").expect("a certificate")
    }

    /// A certificate of a mount.
    pub fn client_identity(&self) -> Identity {
        self.authority.issue(Role::Client, "laptop").expect("a certificate")
    }

    /// A mount's connection to a provider.
    pub async fn client_of(&self, number: usize, identity: &Identity) -> BulkClient {
        let address = &self.providers[number].address;
        let client =
            BulkClient::connect(address, identity, expect_provider(), BulkLimits::default());
        client.await.expect("a connection")
    }

    /// Has a provider serve otherwise, at a new address.
    pub async fn replace<S: Serving + Send + Sync + 'static>(
        &mut self,
        number: usize,
        serving: impl FnOnce(FragmentService) -> S,
    ) {
        let provider = &mut self.providers[number];
        provider.stop().await;
        provider.stop = CancellationToken::new();
        let serving = serving(provider.service.clone());
        provider.serve(serving).await;
    }

    /// Puts fragment i to provider i, as `held` says.
    pub async fn put(
        &self,
        block: &SampleBlock,
        held: impl Fn(u8, &FragmentRecord) -> Option<FragmentRecord>,
    ) {
        for ((record, provider), index) in block.records.iter().zip(&self.providers).zip(0u8..) {
            if let Some(record) = held(index, record) {
                provider.store.put(record.to_bytes()).await.expect("there is room");
            }
        }
    }

    /// The order to make these fragments of all others, in three sites.
    pub fn order(&self, block: &SampleBlock, wanted: &[u8], path: RebuildPath) -> RebuildFragments {
        let (code, header) = (block.geometry.code(), block.records[0].header);
        let indexes = (0..code.fragments() as u8).filter(|index| !wanted.contains(index));
        let source = |index: u8| {
            let provider = &self.providers[usize::from(index)];
            RebuildSource {
                index: index.into(),
                provider: provider.number,
                address: provider.address.clone(),
                key_hash: provider.key_hash(),
                site: format!("site {}", index % 3),
                grant: grant_for(&provider.identity, header.volume(), Some(header.id().block)),
            }
        };
        RebuildFragments {
            ticket: 0,
            block: header.id().block.as_bytes().to_vec().into(),
            volume: header.volume().as_bytes().to_vec().into(),
            birth: header.birth().0,
            s: code.s() as u32,
            r: code.r() as u32,
            page_bytes: block.geometry.page_bytes() as u32,
            plaintext_bytes: block.geometry.plaintext_bytes() as u32,
            fingerprint_kind: 1,
            fingerprint_hash: block.records[0].trailer.fingerprints.hash().to_vec().into(),
            wanted: wanted.iter().map(|index| u32::from(*index)).collect(),
            sources: indexes.map(source).collect(),
            path: path.into(),
            deadline_ms: 60_000,
            bytes_per_s_max: 0,
            patience_ms: 0,
            holders: Vec::new(),
            grant: Bytes::new(),
        }
    }
}
