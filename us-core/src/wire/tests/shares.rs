//! One identity that takes all it can get, beside others that only want to work; over real sockets.

use super::super::ShareLimits;
use super::*;

fn limits(share: ShareLimits) -> ServerLimits {
    ServerLimits { share, drain_timeout: Duration::ZERO, ..ServerLimits::default() }
}

async fn dial(cluster: &Cluster, identity: &Identity) -> BulkClient {
    let (expected, limits) = (ExpectedPeer::default(), BulkLimits::default());
    BulkClient::connect(&cluster.address, identity, expected, limits).await.unwrap()
}

async fn works(client: &BulkClient) -> bool {
    let got = client.get(get_of(3, 100_000), soon()).await;
    let Ok(replies) = got else { return false };
    replies.all().await.is_ok_and(|replies| replies.len() == 3)
}

/// Asks until it is so.
async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let mut ticks = tokio::time::interval(Duration::from_millis(5));
    let deadline = soon();
    while !is_so().await {
        assert!(Instant::now() < deadline, "never: {what}");
        ticks.tick().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_beyond_the_share_are_closed_and_others_are_served() {
    let share = ShareLimits { connections_max: 3, ..ShareLimits::default() };
    let cluster = cluster(limits(share)).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        let client = dial(&cluster, &cluster.client).await;
        assert!(works(&client).await);
        held.push(client);
    }
    // A hundred more of the same key: none lives.
    for _ in 0..100 {
        let expected = ExpectedPeer::default();
        let more =
            BulkClient::connect(&cluster.address, &cluster.client, expected, BulkLimits::default());
        if let Ok(more) = more.await {
            assert!(!works(&more).await);
        }
    }
    let neighbour = cluster.authority.issue(Role::Client, "neighbour").unwrap();
    assert!(works(&dial(&cluster, &neighbour).await).await);
    for client in &held {
        assert!(works(client).await, "what was there before goes on");
    }
    // A place that was given back is taken again.
    held.pop();
    let works_again = async || works(&dial(&cluster, &cluster.client).await).await;
    eventually("the place is given back", works_again).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_reads_holds_its_share_and_no_more() {
    const ITEM: u32 = 1 << 20;
    let share = ShareLimits {
        connections_max: 8,
        gets_served_max: 4,
        received_bytes_max: 8 << 20,
        queued_bytes_max: 8 << 20,
        ..ShareLimits::default()
    };
    let cluster = cluster(limits(share)).await;
    let mut unread = Vec::new();
    for _ in 0..8 {
        // The client's own end takes one frame's worth, and then nothing more.
        let bulk = BulkLimits { received_bytes_max: 1, ..BulkLimits::default() };
        let expected = ExpectedPeer::default();
        let client = BulkClient::connect(&cluster.address, &cluster.client, expected, bulk);
        let client = client.await.unwrap();
        for _ in 0..16 {
            unread.push(client.get(get_of(16, ITEM), soon()).await.unwrap());
        }
    }
    let neighbour = cluster.authority.issue(Role::Client, "neighbour").unwrap();
    let neighbour = dial(&cluster, &neighbour).await;
    for _ in 0..50 {
        assert!(works(&neighbour).await, "a neighbour is not starved");
    }
    let produced = cluster.memory.produced.load(Ordering::SeqCst) as u64;
    let asked = unread.len() as u64 * 16;
    // Eight clients' frames, what the system's sockets take, and the share.
    assert!(produced < asked / 4, "{produced} of {asked} MiB were read for one that reads nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_never_end_keep_nobody_out_who_is_in() {
    let limits = ServerLimits { handshakes_address_max: 4, ..limits(ShareLimits::default()) };
    let cluster = cluster(limits).await;
    let inside = dial(&cluster, &cluster.client).await;
    assert!(works(&inside).await);
    let mut idle = Vec::new();
    for _ in 0..4 {
        idle.push(tokio::net::TcpStream::connect(&cluster.address).await.unwrap());
    }
    // One more is dropped unread: at once an end or a reset.
    let mut more = tokio::net::TcpStream::connect(&cluster.address).await.unwrap();
    let mut nothing = Vec::new();
    let _ = more.read_to_end(&mut nothing).await;
    assert!(nothing.is_empty() && works(&inside).await);
    // Garbage instead of a handshake ends it, and gives its place back.
    for tcp in &mut idle {
        tcp.write_all(&[0xff; 512]).await.unwrap();
    }
    let (address, identity) = (&cluster.address, &cluster.client);
    let works_again = async || {
        let limits = BulkLimits::default();
        let again = BulkClient::connect(address, identity, ExpectedPeer::default(), limits).await;
        match again {
            Ok(again) => works(&again).await,
            Err(_) => false,
        }
    };
    eventually("the places are given back", works_again).await;
}

/// A server of one streaming method, whose calls never end.
async fn endless(limits: ServerLimits) -> Cluster {
    let mut cluster = cluster(limits).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    cluster.address = listener.local_addr().unwrap().to_string();
    let identity = cluster.authority.issue(Role::Provider, "kitchen").unwrap();
    let service = us_proto::v1::membership_server::MembershipServer::new(Endless);
    let server = Server::new(&identity, limits).grpc(tonic::service::Routes::new(service));
    cluster.served = tokio::spawn(server.serve(listener, cluster.stop.clone()));
    cluster
}

struct Endless;

#[tonic::async_trait]
impl us_proto::v1::membership_server::Membership for Endless {
    type JoinStream = BoxStream<'static, Result<us_proto::v1::ProviderDown, tonic::Status>>;

    async fn join(
        &self,
        request: tonic::Request<tonic::Streaming<us_proto::v1::ProviderUp>>,
    ) -> Result<tonic::Response<Self::JoinStream>, tonic::Status> {
        let unread = request.into_inner();
        let answers = futures::stream::once(async { Ok(Default::default()) });
        let endless = futures::stream::pending().map(move |never| {
            let _ = &unread;
            never
        });
        Ok(tonic::Response::new(answers.chain(endless).boxed()))
    }
}

/// gRPC was bounded for a connection only: an identity with 64 connections had 16,384 calls, each with a
/// message.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_of_one_identity_are_bounded_over_all_its_connections() {
    type Client = us_proto::v1::membership_client::MembershipClient<tonic::transport::Channel>;
    let share = ShareLimits { calls_max: 5, ..ShareLimits::default() };
    let cluster = endless(limits(share)).await;
    let dial = async |identity: &Identity| {
        let channel = connect_grpc(&cluster.address, identity, ExpectedPeer::default()).await;
        Client::new(channel.unwrap())
    };
    // The call ends with both: its answer, and what ends its own messages.
    let call = async |client: &mut Client| {
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let up = futures::stream::pending::<us_proto::v1::ProviderUp>().take_until(ended);
        client.join(up).await.map(|answer| (answer.into_inner(), end))
    };
    let (mut one, mut other) = (dial(&cluster.client).await, dial(&cluster.client).await);
    let mut held = Vec::new();
    for at in 0..5 {
        let client = if at % 2 == 0 { &mut one } else { &mut other };
        let mut called = call(client).await.unwrap();
        assert!(called.0.message().await.unwrap().is_some());
        held.push(called);
    }
    for client in [&mut one, &mut other] {
        let refused = call(client).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused}");
    }
    let mut third = dial(&cluster.client).await;
    assert!(call(&mut third).await.is_err(), "a fresh connection changes nothing");
    let neighbour = cluster.authority.issue(Role::Client, "neighbour").unwrap();
    assert!(call(&mut dial(&neighbour).await).await.is_ok());
    // A call that has ended gives its place back.
    held.pop();
    let works_again = async || call(&mut third).await.is_ok();
    eventually("the place is given back", works_again).await;
}
