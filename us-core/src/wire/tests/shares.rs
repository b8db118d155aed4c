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
    let deadline = soon();
    loop {
        let again = dial(&cluster, &cluster.client).await;
        if works(&again).await {
            break;
        }
        assert!(Instant::now() < deadline, "the place is never given back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_reads_holds_its_share_and_no_more() {
    const ITEM: u32 = 1 << 20;
    let share = ShareLimits {
        connections_max: 8,
        gets_served_max: 4,
        received_bytes_max: 8 << 20,
        queued_bytes_max: 8 << 20,
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
    let deadline = soon();
    let (address, identity) = (&cluster.address, &cluster.client);
    loop {
        let limits = BulkLimits::default();
        let again = BulkClient::connect(address, identity, ExpectedPeer::default(), limits).await;
        if let Ok(again) = again
            && works(&again).await
        {
            break;
        }
        assert!(Instant::now() < deadline, "the places are never given back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
