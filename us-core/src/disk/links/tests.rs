//! Links against a real server on loopback, with certificates.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use us_proto::v1::{GetReply, GetRequest, ProviderEntry, ProviderTable, PutReply};

use super::*;
use crate::fragment::{FingerprintKind, records_of_block};
use crate::geometry::{BlockGeometry, Code};
use crate::ids::{Birth, BlockId, FragmentId, VolumeId};
use crate::tls::CertificateAuthority;
use crate::wire::{BulkService, Server, ServerLimits};

/// Keeps records in memory and counts requests.
#[derive(Default)]
struct Keeper {
    records: Mutex<HashMap<Vec<u8>, FragmentRecord>>,
    gets: AtomicUsize,
    /// The grant that counts; empty: any.
    grant: Mutex<Bytes>,
}

impl Keeper {
    fn takes(&self, grant: &Bytes) -> bool {
        let wanted = self.grant.lock();
        wanted.is_empty() || *wanted == *grant
    }
}

impl BulkService for Keeper {
    async fn put(&self, _peer: &PeerIdentity, request: PutRequest) -> PutReply {
        let status = match FragmentRecord::decode(request.record) {
            Ok(_) if !self.takes(&request.grant) => FragmentStatus::NoGrant,
            Ok(record) => {
                self.records.lock().insert(record.header.id().to_key().to_vec(), record);
                FragmentStatus::Ok
            }
            Err(_) => FragmentStatus::Invalid,
        };
        PutReply { status: status.into(), ..PutReply::default() }
    }

    fn get(&self, _peer: &PeerIdentity, request: GetRequest) -> BoxStream<'static, GetReply> {
        self.gets.fetch_add(1, Ordering::SeqCst);
        let records = self.records.lock();
        let replies: Vec<GetReply> = request
            .items
            .iter()
            .enumerate()
            .map(|(item, wanted)| {
                if !self.takes(&request.grant) {
                    let status = FragmentStatus::NoGrant.into();
                    return GetReply { item: item as u32, status, ..GetReply::default() };
                }
                let id = wanted.fragment.as_ref().unwrap();
                let key = [&id.block[..], &[id.index as u8]].concat();
                let Some(record) = records.get(&key) else {
                    let status = FragmentStatus::NotFound.into();
                    return GetReply { item: item as u32, status, ..GetReply::default() };
                };
                let slot_bytes = record.header.geometry().slot_bytes();
                let start = wanted.first_slot as usize * slot_bytes;
                let data = match wanted.slots {
                    0 => record.body.slice(start..),
                    slots => record.body.slice(start..start + slots as usize * slot_bytes),
                };
                let status = FragmentStatus::Ok.into();
                let reply = GetReply { item: item as u32, status, data, ..GetReply::default() };
                if !wanted.trailer {
                    return reply;
                }
                let parts = record.to_parts();
                let (header, trailer) = (parts.header.to_vec().into(), parts.trailer);
                GetReply { header, trailer, ..reply }
            })
            .collect();
        futures::stream::iter(replies).boxed()
    }
}

struct Serving {
    entry: ProviderEntry,
    stop: CancellationToken,
    served: tokio::task::JoinHandle<()>,
}

impl Serving {
    fn address(&self) -> ProviderAddress {
        ProviderAddress {
            address: self.entry.address.clone(),
            key_hash: KeyHash::from_slice(&self.entry.key_hash).unwrap(),
            reachable: true,
        }
    }
}

async fn serve(identity: &Identity, keeper: &Arc<Keeper>, address: &str) -> Serving {
    let listener = TcpListener::bind(address).await.unwrap();
    let entry = ProviderEntry {
        provider: 7,
        address: listener.local_addr().unwrap().to_string(),
        key_hash: identity.own().key_hash.as_bytes().to_vec().into(),
        reachable: true,
    };
    let stop = CancellationToken::new();
    let limits = ServerLimits { drain_timeout: Duration::ZERO, ..ServerLimits::default() };
    let server = Server::new(identity, limits).bulk(Arc::clone(keeper));
    let token = stop.clone();
    let served = tokio::spawn(async move { server.serve(listener, token).await.unwrap() });
    Serving { entry, stop, served }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

const AT: ProviderId = ProviderId(7);

fn some_records(geometry: BlockGeometry) -> Vec<FragmentRecord> {
    let body = |byte: u8| Bytes::from(vec![byte; geometry.fragment_bytes()]);
    let bodies = (0..geometry.code().fragments() as u8).map(body).collect();
    records_of_block(
        FingerprintKind::Crc32c,
        VolumeId::generate(),
        BlockId::generate(),
        Birth(1),
        geometry,
        bodies,
    )
}

#[tokio::test]
async fn puts_and_gets_survive_a_restart_of_the_provider() {
    let authority = CertificateAuthority::create().unwrap();
    let identity = authority.issue(Role::Provider, "attic").unwrap();
    let keeper = Arc::new(Keeper::default());
    let serving = serve(&identity, &keeper, "127.0.0.1:0").await;
    let backoff = (Duration::from_millis(20), Duration::from_millis(50));
    let config = LinksConfig { backoff, ..LinksConfig::default() };
    let links = ProviderLinks::new(authority.issue(Role::Client, "laptop").unwrap(), config);
    let geometry = BlockGeometry::new(Code::new(1, 1).unwrap(), 1 << 20).unwrap();
    let records = some_records(geometry);
    let slots = |fragment: FragmentId, first_slot| SlotRange {
        fragment,
        first_slot,
        slots: 1,
        slot_bytes: geometry.slot_bytes() as u32,
    };
    let unknown = links.put(AT, records[0].clone(), soon()).await;
    assert_eq!(unknown, Err(FragmentFailure::UnknownProvider));

    links.update(&ProviderTable { providers: vec![serving.entry.clone()], whole: true });
    for record in &records {
        links.put(AT, record.clone(), soon()).await.unwrap();
    }
    // Many small reads at once travel in few requests.
    let id = records[1].header.id();
    let gets = (0..500).map(|at| links.get(AT, slots(id, at % 60), soon()));
    for answer in futures::future::join_all(gets).await {
        assert_eq!(answer.unwrap(), vec![1; geometry.slot_bytes()]);
    }
    let requests = keeper.gets.load(Ordering::SeqCst);
    assert!(requests < 100, "{requests} requests for 500 reads");
    let absent = FragmentId { block: BlockId::generate(), index: 0 };
    assert_eq!(links.get(AT, slots(absent, 0), soon()).await, Err(FragmentFailure::NotFound));

    serving.stop.cancel();
    serving.served.await.unwrap();
    let deadline = soon();
    while links.get(AT, slots(id, 0), soon()).await.is_ok() {
        assert!(Instant::now() < deadline, "the server is gone");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let gone = links.get(AT, slots(id, 0), soon()).await;
    assert!(matches!(gone, Err(FragmentFailure::Unreachable { .. })), "{gone:?}");

    let _again = serve(&identity, &keeper, &serving.entry.address).await;
    while links.get(AT, slots(id, 0), soon()).await.is_err() {
        assert!(Instant::now() < deadline, "the server is back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(links.is_reachable(AT));
}

/// A mount wakes with a grant that has ended: nobody who reads or writes sees it, and the directory is
/// asked once.
#[tokio::test]
async fn a_refused_grant_is_renewed_and_the_request_made_again() {
    let authority = CertificateAuthority::create().unwrap();
    let identity = authority.issue(Role::Provider, "attic").unwrap();
    let keeper = Arc::new(Keeper::default());
    let serving = serve(&identity, &keeper, "127.0.0.1:0").await;
    let client = authority.issue(Role::Client, "laptop").unwrap();
    let links = ProviderLinks::new(client, LinksConfig::default());
    links.update(&ProviderTable { providers: vec![serving.entry.clone()], whole: true });
    let geometry = BlockGeometry::new(Code::new(1, 1).unwrap(), 1 << 20).unwrap();
    let records = some_records(geometry);
    links.set_grant(Bytes::from_static(b"ended"));
    *keeper.grant.lock() = Bytes::from_static(b"fresh");
    let (session, wishes) = (links.clone(), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&wishes);
    let renewing = tokio::spawn(async move {
        loop {
            session.grant_wanted().await;
            counted.fetch_add(1, Ordering::SeqCst);
            session.set_grant(Bytes::from_static(b"fresh"));
        }
    });
    links.put(AT, records[0].clone(), soon()).await.unwrap();
    *keeper.grant.lock() = Bytes::from_static(b"denied");
    renewing.abort();
    // Nobody renews it: the reader hears why, and not only at its deadline.
    let slots = SlotRange {
        fragment: records[0].header.id(),
        first_slot: 0,
        slots: 1,
        slot_bytes: geometry.slot_bytes() as u32,
    };
    let soon_over = Instant::now() + Duration::from_millis(200);
    let denied = links.get(AT, slots, soon_over).await;
    assert!(matches!(denied, Err(FragmentFailure::NoGrant { .. })), "{denied:?}");
    assert!(!denied.unwrap_err().is_damage());
    // Many readers at once: one wish.
    *keeper.grant.lock() = Bytes::from_static(b"newest");
    let session = links.clone();
    let wish = tokio::spawn(async move {
        session.grant_wanted().await;
        session.set_grant(Bytes::from_static(b"newest"));
    });
    let gets = (0..200).map(|_| links.get(AT, slots, soon()));
    for answer in futures::future::join_all(gets).await {
        assert!(answer.is_ok(), "{answer:?}");
    }
    wish.await.unwrap();
    assert_eq!(wishes.load(Ordering::SeqCst), 1);
    let more = tokio::time::timeout(Duration::from_millis(50), links.grant_wanted()).await;
    assert!(more.is_err(), "nobody wants another");
}

/// Links as programs have them never fall back to bare TCP, and a server as programs have it answers
/// nobody who comes without TLS.
#[tokio::test]
async fn bare_tcp_and_tls_do_not_mix() {
    let authority = CertificateAuthority::create().unwrap();
    let keeper = Arc::new(Keeper::default());
    let identity = authority.issue(Role::Provider, "attic").unwrap();
    let serving = serve(&identity, &keeper, "127.0.0.1:0").await;
    let client = authority.issue(Role::Client, "laptop").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let bare = ProviderAddress {
        address: listener.local_addr().unwrap().to_string(),
        ..serving.address()
    };
    let (kept, peer) = (Arc::clone(&keeper), client.own().clone());
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (kept, peer) = (Arc::clone(&kept), peer.clone());
            let (limits, stop) = (BulkLimits::default(), CancellationToken::new());
            tokio::spawn(unsecured::serve_plain(kept, peer, tcp, limits, stop));
        }
    });
    let geometry = BlockGeometry::new(Code::new(1, 0).unwrap(), 100).unwrap();
    let record = &some_records(geometry)[0];
    let links = |unsecured: bool| match unsecured {
        true => ProviderLinks::unsecured(client.clone(), LinksConfig::default()),
        false => ProviderLinks::new(client.clone(), LinksConfig::default()),
    };
    for (is_unsecured, place) in [(false, &bare), (true, &serving.address())] {
        let links = links(is_unsecured);
        links.learn(AT, place.clone());
        let put = links.put(AT, record.clone(), soon()).await;
        assert!(matches!(put, Err(FragmentFailure::Unreachable { .. })), "{put:?}");
        assert!(keeper.records.lock().is_empty());
    }
    for (is_unsecured, place) in [(true, bare), (false, serving.address())] {
        let links = links(is_unsecured);
        links.learn(AT, place);
        links.put(AT, record.clone(), soon()).await.unwrap();
        assert_eq!(std::mem::take(&mut *keeper.records.lock()).len(), 1);
    }
}

#[tokio::test]
async fn another_key_at_the_address_is_refused() {
    let authority = CertificateAuthority::create().unwrap();
    let identity = authority.issue(Role::Provider, "attic").unwrap();
    let serving = serve(&identity, &Arc::default(), "127.0.0.1:0").await;
    let links = ProviderLinks::new(
        authority.issue(Role::Client, "laptop").unwrap(),
        LinksConfig::default(),
    );
    let entry = ProviderEntry { key_hash: vec![1; 32].into(), ..serving.entry.clone() };
    links.update(&ProviderTable { providers: vec![entry], whole: true });
    let geometry = BlockGeometry::new(Code::new(1, 0).unwrap(), 100).unwrap();
    let put = links.put(AT, some_records(geometry)[0].clone(), soon()).await;
    assert!(matches!(put, Err(FragmentFailure::Unreachable { .. })), "{put:?}");
    // Left alone for a while; the directory's correction ends that at once.
    links.update(&ProviderTable { providers: vec![serving.entry], whole: false });
    links.put(AT, some_records(geometry)[0].clone(), soon()).await.unwrap();
}

#[tokio::test]
async fn an_orders_providers_are_learnt_and_whole_records_fetched() {
    let authority = CertificateAuthority::create().unwrap();
    let identity = authority.issue(Role::Provider, "attic").unwrap();
    let keeper = Arc::new(Keeper::default());
    let serving = serve(&identity, &keeper, "127.0.0.1:0").await;
    let geometry = BlockGeometry::new(Code::new(2, 1).unwrap(), 1 << 20).unwrap();
    let records = some_records(geometry);
    for record in &records {
        keeper.records.lock().insert(record.header.id().to_key().to_vec(), record.clone());
    }
    let idle = Some(Duration::from_millis(30));
    let config = LinksConfig { idle, learned_max: 2, ..LinksConfig::default() };
    let links = ProviderLinks::new(authority.issue(Role::Provider, "cellar").unwrap(), config);
    let slots = |index: usize, first_slot, slots| SlotRange {
        fragment: records[index].header.id(),
        first_slot,
        slots,
        slot_bytes: geometry.slot_bytes() as u32,
    };
    let all = geometry.fragment_slots() as u32;
    assert_eq!(links.fetch(AT, Bytes::new(), slots(0, 0, all), soon()).await.unwrap_err(), {
        FragmentFailure::UnknownProvider
    });
    links.learn(AT, serving.address());
    let whole = (0..3).map(|index| links.fetch(AT, Bytes::new(), slots(index, 0, all), soon()));
    for (record, fetched) in records.iter().zip(futures::future::join_all(whole).await) {
        let FetchedSlots { header, trailer, data } = fetched.unwrap();
        assert!([header, data, trailer].concat() == record.to_bytes());
    }
    assert!(keeper.gets.load(Ordering::SeqCst) < 3, "gets of one provider travel together");
    // From the end on: header and trailer alone.
    let ends = links.fetch(AT, Bytes::new(), slots(1, all, 0), soon()).await.unwrap();
    assert_eq!((ends.data.len(), &ends.trailer[..]), (0, &records[1].to_parts().trailer[..]));
    // Nothing is asked for: the connection ends, and comes again with the next request.
    let link = links.link(AT).unwrap();
    let deadline = soon();
    while link.open_client(0).is_some() {
        assert!(Instant::now() < deadline, "an idle connection is closed");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    links.fetch(AT, Bytes::new(), slots(1, 0, 1), soon()).await.unwrap();
    // The table is bounded: who was used the longest ago is forgotten.
    links.learn(ProviderId(8), serving.address());
    links.fetch(AT, Bytes::new(), slots(1, 0, 1), soon()).await.unwrap();
    links.learn(ProviderId(9), serving.address());
    assert!(links.link(ProviderId(8)).is_err() && links.link(AT).is_ok());
}
