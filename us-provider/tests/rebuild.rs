//! Rebuilding between real providers in this process, over TLS on loopback: every path, with one
//! that lies, one that hangs, one that adds up wrongly.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../samples/swarm.rs"]
mod swarm;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use us_core::fragment::{FragmentRecord, FragmentSums};
use us_core::tls::PeerIdentity;
use us_core::wire::{BulkService, connect_grpc};
use us_proto::v1::fragments_client::FragmentsClient;
use us_proto::v1::{
    CombineItem, CombineReply, CombineRequest, CombineUpstream, FragmentStatus, GetReply,
    GetRequest, PutReply, PutRequest, RebuildPath, RebuildStatus,
};
use us_provider::service::{FragmentService, wire_id};

use swarm::{Provider, SampleBlock, Serving, Swarm, expect_provider, grant_for};

const PATHS: [RebuildPath; 4] =
    [RebuildPath::Star, RebuildPath::RotatedStar, RebuildPath::Chain, RebuildPath::Sites];

/// A service that answers nothing, or adds up wrongly.
#[derive(Clone)]
struct Bad {
    service: FragmentService,
    hangs: bool,
}

impl BulkService for Bad {
    async fn put(&self, peer: &PeerIdentity, request: PutRequest) -> PutReply {
        self.service.put(peer, request).await
    }

    fn get(&self, peer: &PeerIdentity, request: GetRequest) -> BoxStream<'static, GetReply> {
        if self.hangs {
            return futures::stream::pending().boxed();
        }
        self.service.get(peer, request)
    }
}

#[tonic::async_trait]
impl Serving for Bad {
    async fn combine(&self, reply: CombineReply) -> CombineReply {
        if self.hangs {
            std::future::pending::<()>().await;
        }
        let mut data = reply.data.to_vec();
        if let Some(byte) = data.first_mut() {
            *byte ^= 1;
        }
        CombineReply { data: data.into(), ..reply }
    }
}

fn hanging(service: FragmentService) -> Bad {
    Bad { service, hangs: true }
}

fn miscounting(service: FragmentService) -> Bad {
    Bad { service, hangs: false }
}

/// The record with another byte, and sums and fingerprints that fit it: a store takes it.
fn altered(record: &FragmentRecord) -> FragmentRecord {
    let mut record = record.clone();
    let mut body = record.body.to_vec();
    body[99] ^= 8;
    record.body = body.into();
    let sums = FragmentSums::of(&record.header.geometry(), &record.body);
    let own = record.header.id().index;
    let fingerprints = record.trailer.fingerprints.with(own, &record.body, &sums);
    record.trailer.slot_sums = sums.slots;
    record.trailer.fingerprints = fingerprints;
    record
}

async fn check(target: &Provider, block: &SampleBlock, wanted: &[u8]) {
    for index in wanted {
        let record = &block.records[usize::from(*index)];
        let found = target.store.read_record(record.header.id()).unwrap();
        assert!(found == record.to_bytes(), "fragment {index}");
    }
    assert_eq!(target.store.state().fragments, wanted.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_path_between_real_providers() {
    for path in PATHS {
        let swarm = Swarm::start(8).await;
        let block = SampleBlock::new(5, 3, 2_000_000, 1);
        swarm.put(&block, |_, record| Some(record.clone())).await;
        let wanted = [2u8, 7];
        let mut target = swarm.newcomer().await;
        let rebuilt = target.rebuild(&swarm.order(&block, &wanted, path)).await;
        assert_eq!(rebuilt.status(), RebuildStatus::Ok, "{path:?} {}", rebuilt.detail);
        assert_eq!(rebuilt.faults, []);
        check(&target, &block, &wanted).await;
        let fragment = block.geometry.fragment_bytes() as u64;
        match path {
            RebuildPath::Chain => assert_eq!(rebuilt.received_bytes, 2 * fragment),
            RebuildPath::Sites => assert!(rebuilt.received_bytes <= 2 * 3 * fragment),
            _ => assert_eq!(rebuilt.received_bytes, 5 * fragment),
        }
        let again = target.rebuild(&swarm.order(&block, &wanted, path)).await;
        assert_eq!((again.status(), again.received_bytes), (RebuildStatus::Ok, 0));
        // One of the sources may be here: it is read from the own disk, and is not asked for again.
        let mut helper = swarm.newcomer().await;
        helper.store.put(block.records[0].to_bytes()).await.unwrap();
        let mut order = swarm.order(&block, &wanted, path);
        order.sources[0].provider = helper.number;
        let rebuilt = helper.rebuild(&order).await;
        assert_eq!(rebuilt.status(), RebuildStatus::Ok, "{path:?} {}", rebuilt.detail);
        match path {
            RebuildPath::Star => assert_eq!(rebuilt.received_bytes, 4 * fragment),
            RebuildPath::Chain => assert_eq!(rebuilt.received_bytes, 2 * fragment),
            _ => assert!(rebuilt.received_bytes < 5 * 2 * fragment),
        }
        check(&helper, &block, &[0, 2, 7]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_lies_and_who_hangs_are_named_and_gone_around() {
    for path in PATHS {
        let mut swarm = Swarm::start(7).await;
        swarm.replace(3, hanging).await;
        let block = SampleBlock::new(4, 3, 1_000_000, 2);
        let lie = |index: u8, record: &FragmentRecord| match index {
            1 => Some(altered(record)),
            _ => Some(record.clone()),
        };
        swarm.put(&block, lie).await;
        let mut target = swarm.newcomer().await;
        let mut order = swarm.order(&block, &[5], path);
        order.deadline_ms = 16_000;
        let rebuilt = target.rebuild(&order).await;
        assert_eq!(rebuilt.status(), RebuildStatus::Ok, "{path:?} {}", rebuilt.detail);
        check(&target, &block, &[5]).await;
        let named: Vec<_> = rebuilt
            .faults
            .iter()
            .map(|fault| (fault.index, fault.provider, fault.status()))
            .collect();
        assert!(named.contains(&(1, 1, FragmentStatus::Damaged)), "{path:?} {named:?}");
        assert!(named.contains(&(3, 3, FragmentStatus::Unspecified)), "{path:?} {named:?}");
        assert_eq!(named.len(), 2, "{path:?} {named:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_adds_up_wrongly_is_found() {
    for path in [RebuildPath::Chain, RebuildPath::Sites] {
        let mut swarm = Swarm::start(6).await;
        swarm.replace(2, miscounting).await;
        let block = SampleBlock::new(4, 2, 500_000, 3);
        swarm.put(&block, |_, record| Some(record.clone())).await;
        let mut target = swarm.newcomer().await;
        let rebuilt = target.rebuild(&swarm.order(&block, &[4], path)).await;
        assert_eq!(rebuilt.status(), RebuildStatus::Ok, "{path:?} {}", rebuilt.detail);
        check(&target, &block, &[4]).await;
        let [fault] = &rebuilt.faults[..] else { panic!("{path:?} {:?}", rebuilt.faults) };
        assert_eq!((fault.index, fault.status()), (2, FragmentStatus::Damaged));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_one_right_source_too_few_nothing_is_stored() {
    for path in PATHS {
        let swarm = Swarm::start(6).await;
        let block = SampleBlock::new(4, 2, 300_000, 4);
        let lie = |index: u8, record: &FragmentRecord| match index {
            0 => None,
            4 => Some(altered(record)),
            _ => Some(record.clone()),
        };
        swarm.put(&block, lie).await;
        let mut target = swarm.newcomer().await;
        let rebuilt = target.rebuild(&swarm.order(&block, &[5], path)).await;
        assert_eq!(rebuilt.status(), RebuildStatus::Sources, "{path:?} {}", rebuilt.detail);
        let named: Vec<_> =
            rebuilt.faults.iter().map(|fault| (fault.index, fault.status())).collect();
        let expected = [(0, FragmentStatus::NotFound), (4, FragmentStatus::Damaged)];
        assert_eq!(named, expected, "{path:?}");
        assert_eq!(target.store.state().fragments, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sum_says_who_could_not_add_and_clients_have_nobody_asked() {
    let swarm = Swarm::start(3).await;
    let block = SampleBlock::new(2, 1, 100_000, 5);
    swarm.put(&block, |index, record| (index != 2).then(|| record.clone())).await;
    let volume = block.records[0].header.volume();
    let request = |index: u8, grant: Bytes| {
        let fragment = Some(wire_id(block.records[usize::from(index)].header.id()));
        let items = vec![CombineItem { fragment, coefficient: 1 }];
        CombineRequest { items, slots: 1, grant, ..CombineRequest::default() }
    };
    let by = |index: usize| swarm.providers[index].grant(volume);
    let below = |index: u8, request| CombineUpstream {
        address: swarm.providers[usize::from(index)].address.clone(),
        key_hash: swarm.providers[usize::from(index)].key_hash(),
        request: Some(request),
    };
    let inner =
        CombineRequest { upstreams: vec![below(2, request(2, by(1)))], ..request(1, by(0)) };
    let chain = CombineRequest { upstreams: vec![below(1, inner)], ..request(0, Bytes::new()) };
    let ask = |identity| {
        let grant = grant_for(&identity, volume, None);
        let address = swarm.providers[0].address.clone();
        let chain = CombineRequest { grant, ..chain.clone() };
        async move {
            let channel = connect_grpc(&address, &identity, expect_provider()).await.unwrap();
            FragmentsClient::new(channel).combine(chain).await
        }
    };
    let reply = ask(swarm.provider_identity()).await.unwrap().into_inner();
    assert_eq!(reply.status(), FragmentStatus::NotFound);
    assert_eq!(reply.fault, Some(wire_id(block.records[2].header.id())));
    let refused = ask(swarm.client_identity()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    // Nobody answers at the end of the chain.
    swarm.providers[2].stop().await;
    let reply = ask(swarm.provider_identity()).await.unwrap().into_inner();
    assert_eq!(reply.status(), FragmentStatus::Unspecified, "{}", reply.detail);
    assert_eq!(reply.fault, Some(wire_id(block.records[2].header.id())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn normal_gets_go_on_beside_rebuilding() {
    let swarm = Swarm::start(6).await;
    let blocks: Vec<_> = (0..12).map(|seed| SampleBlock::new(4, 2, 2_000_000, 10 + seed)).collect();
    for block in &blocks {
        swarm.put(block, |_, record| Some(record.clone())).await;
    }
    let target = Arc::new(tokio::sync::Mutex::new(swarm.newcomer().await));
    let orders: Vec<_> =
        blocks.iter().map(|block| swarm.order(block, &[5], RebuildPath::Star)).collect();
    let rebuilding = tokio::spawn({
        let target = Arc::clone(&target);
        async move {
            let mut target = target.lock().await;
            target.rebuild_all(&orders).await
        }
    });
    let identity = swarm.client_identity();
    let (client, grant) = (
        swarm.client_of(0, &identity).await,
        grant_for(&identity, blocks[0].records[0].header.volume(), None),
    );
    let mut gets = 0;
    while !rebuilding.is_finished() {
        let id = wire_id(blocks[gets % blocks.len()].records[0].header.id());
        let item = us_proto::v1::GetItem { fragment: Some(id), slots: 1, ..Default::default() };
        let grant = grant.clone();
        let request = GetRequest { items: vec![item], grant, ..GetRequest::default() };
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        let replies = client.get(request, deadline).await.unwrap().all().await.unwrap();
        assert_eq!(replies[0].status(), FragmentStatus::Ok);
        gets += 1;
    }
    for rebuilt in rebuilding.await.unwrap() {
        assert_eq!(rebuilt.status(), RebuildStatus::Ok, "{}", rebuilt.detail);
    }
    assert!(gets > 0);
    assert_eq!(target.lock().await.store.state().fragments, 12);
}
