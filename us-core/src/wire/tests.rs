mod shares;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::frame::{Frame, Payload, Side};
use super::*;
use crate::ids::ClusterId;
use crate::tls::{CertificateAuthority, ExpectedPeer, Identity, KeyHash, Role};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use us_proto::v1::{FragmentId, FragmentStatus, GetItem};

/// Answers from memory, or waits until it is let go.
#[derive(Default)]
struct Memory {
    puts: AtomicUsize,
    produced: Arc<AtomicUsize>,
    dropped: Arc<AtomicBool>,
    held: AtomicBool,
    go: Notify,
    /// Gets are answered at once.
    at_hand: AtomicBool,
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl BulkService for Memory {
    async fn put(&self, peer: &PeerIdentity, request: PutRequest) -> PutReply {
        self.puts.fetch_add(1, Ordering::SeqCst);
        while self.held.load(Ordering::SeqCst) {
            self.go.notified().await;
        }
        let detail = format!("{} {} {}", peer.name, request.record.len(), request.grant.len());
        PutReply { status: FragmentStatus::Ok.into(), detail, ..PutReply::default() }
    }

    /// Each item is answered with as many bytes as its `slots` say.
    fn get(&self, _peer: &PeerIdentity, request: GetRequest) -> BoxStream<'static, GetReply> {
        let (produced, dropped) = (Arc::clone(&self.produced), SetOnDrop(self.dropped.clone()));
        let replies = request.items.into_iter().enumerate().map(move |(item, wanted)| {
            let _ = &dropped;
            produced.fetch_add(1, Ordering::SeqCst);
            GetReply {
                item: item as u32,
                status: FragmentStatus::Ok.into(),
                header: Bytes::from_static(b"header"),
                data: Bytes::from(vec![item as u8; wanted.slots as usize]),
                ..GetReply::default()
            }
        });
        futures::stream::iter(replies).boxed()
    }

    fn get_now(&self, peer: &PeerIdentity, request: &GetRequest) -> Option<Vec<GetReply>> {
        let at_hand = self.at_hand.load(Ordering::SeqCst);
        at_hand.then(|| self.get(peer, request.clone()).collect::<Vec<_>>().now_or_never())?
    }
}

fn someone(name: &str) -> PeerIdentity {
    PeerIdentity {
        role: Role::Client,
        name: name.to_owned(),
        cluster: ClusterId::from_bytes([1; 16]),
        key_hash: KeyHash::from_bytes([2; 32]),
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn put_of(request: u64, bytes: usize) -> PutRequest {
    PutRequest {
        request,
        grant: Bytes::from_static(b"grant"),
        record: vec![7; bytes].into(),
        trace: 5,
    }
}

fn get_of(items: usize, bytes: u32) -> GetRequest {
    let fragment = Some(FragmentId { block: vec![3; 16].into(), index: 1 });
    let item = GetItem { fragment, first_slot: 0, slots: bytes, trailer: false, trace: 5 };
    GetRequest { request: 77, items: vec![item; items], ..GetRequest::default() }
}

/// A client whose server runs in a task, over an in-memory pipe.
fn pair(
    service: &Arc<Memory>,
    limits: BulkLimits,
    shutdown: &CancellationToken,
) -> (BulkClient, tokio::task::JoinHandle<CloseCause>) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let served = tokio::spawn(unsecured::serve_plain(
        Arc::clone(service),
        someone("laptop"),
        far,
        limits,
        shutdown.clone(),
    ));
    (unsecured::connect_plain(near, someone("kitchen"), limits), served)
}

/// A client with the other end of its pipe, for a peer that misbehaves.
fn against(limits: BulkLimits) -> (BulkClient, DuplexStream) {
    let (near, far) = tokio::io::duplex(64 << 10);
    (unsecured::connect_plain(near, someone("kitchen"), limits), far)
}

/// A server with the other end of its pipe, for a peer that misbehaves.
fn serving(limits: BulkLimits) -> (DuplexStream, tokio::task::JoinHandle<CloseCause>) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let (service, peer) = (Arc::new(Memory::default()), someone("laptop"));
    let stop = CancellationToken::new();
    (near, tokio::spawn(unsecured::serve_plain(service, peer, far, limits, stop)))
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = soon();
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn cause_of(error: &BulkError) -> &CloseCause {
    match error {
        BulkError::Closed { cause, .. } => cause,
        BulkError::Deadline { .. } | BulkError::Request(_) => panic!("{error}"),
    }
}

#[tokio::test]
async fn puts_and_gets_travel_together() {
    let (service, stop) = (Arc::new(Memory::default()), CancellationToken::new());
    let (client, _served) = pair(&service, BulkLimits::default(), &stop);
    let puts = (0..100u64).map(|n| {
        let (client, bytes) = (client.clone(), n as usize * 10_000);
        async move {
            let reply = client.put(put_of(n, bytes), soon()).await.unwrap();
            assert_eq!(reply.request, n);
            assert_eq!(reply.detail, format!("laptop {bytes} 5"));
        }
    });
    let gets = (0..100u32).map(|n| {
        let client = client.clone();
        async move {
            let replies = client.get(get_of(5, n * 5_000), soon()).await.unwrap();
            let replies = replies.all().await.unwrap();
            assert_eq!(replies.len(), 5);
            for (item, reply) in replies.into_iter().enumerate() {
                assert_eq!((reply.request, reply.item), (77, item as u32));
                assert_eq!(reply.header, "header");
                assert_eq!(reply.data, vec![item as u8; n as usize * 5_000]);
            }
        }
    });
    let (puts, gets) = (futures::future::join_all(puts), futures::future::join_all(gets));
    tokio::join!(puts, gets);
    assert!(!client.is_closed());
}

/// The first benchmark hung: with more queued than one round writes, a task that had caught up
/// returned without having asked to be woken for the next request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_puts_in_numbers_never_stall() {
    let cluster = cluster(ServerLimits::default()).await;
    let expected = ExpectedPeer::default();
    let limits = BulkLimits::default();
    let client =
        BulkClient::connect(&cluster.address, &cluster.client, expected, limits).await.unwrap();
    let workers = (0..8).map(|_| {
        let client = client.clone();
        tokio::spawn(async move {
            for n in 0..50 {
                client.put(put_of(n, 1 << 20), soon()).await.unwrap();
                let get = client.get(get_of(1, 1 << 20), soon()).await.unwrap();
                assert_eq!(get.all().await.unwrap().len(), 1);
            }
        })
    });
    futures::future::try_join_all(workers).await.unwrap();
}

#[tokio::test]
async fn a_lost_server_fails_everything_under_way() {
    let service = Arc::new(Memory { held: true.into(), ..Memory::default() });
    let (client, served) = pair(&service, BulkLimits::default(), &CancellationToken::new());
    let puts: Vec<_> = (0..20)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move { client.put(put_of(n, 100_000), soon()).await })
        })
        .collect();
    eventually("the puts arrive", || service.puts.load(Ordering::SeqCst) == 20).await;
    served.abort();
    for put in puts {
        let error = put.await.unwrap().unwrap_err();
        assert!(matches!(cause_of(&error), CloseCause::PeerClosed), "{error}");
        assert_eq!(error.retry(), Retry::SamePeerLater);
    }
    client.closed().await;
    assert!(client.is_closed());
    assert!(client.put(put_of(1, 1), soon()).await.is_err());
    assert!(client.get(get_of(1, 1), soon()).await.is_err());
}

#[tokio::test]
async fn a_server_that_dies_inside_a_frame_is_noticed() {
    let (client, mut far) = against(BulkLimits::default());
    let get = {
        let client = client.clone();
        tokio::spawn(async move { client.get(get_of(1, 9), soon()).await?.all().await })
    };
    far.read_u8().await.unwrap();
    far.write_all(b"USB1\x04\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\x09\0\0\0 half").await.unwrap();
    drop(far);
    let error = get.await.unwrap().unwrap_err();
    // What was sent and not read may make the system report a reset instead.
    assert!(
        matches!(cause_of(&error), CloseCause::Frame(FrameError::Truncated) | CloseCause::Io(_)),
        "{error}"
    );
}

#[tokio::test]
async fn a_shutdown_answers_what_is_under_way() {
    let service = Arc::new(Memory { held: true.into(), ..Memory::default() });
    let stop = CancellationToken::new();
    let (near, far) = tokio::io::duplex(64 << 10);
    let limits = BulkLimits::default();
    let peer = someone("laptop");
    let serve = unsecured::serve_plain(Arc::clone(&service), peer, far, limits, stop.clone());
    let served = tokio::spawn(serve);
    let client = unsecured::connect_plain(near, someone("kitchen"), limits);
    let put = {
        let client = client.clone();
        tokio::spawn(async move { client.put(put_of(5, 10), soon()).await })
    };
    eventually("the put arrives", || service.puts.load(Ordering::SeqCst) == 1).await;
    stop.cancel();
    // From the goodbye on the client starts nothing new.
    let error = client.closed().await;
    assert!(matches!(cause_of(&error), CloseCause::PeerGoodbye { .. }), "{error}");
    assert!(client.put(put_of(6, 10), soon()).await.is_err());
    service.held.store(false, Ordering::SeqCst);
    service.go.notify_waiters();
    assert!(matches!(served.await.unwrap(), CloseCause::Local));
    assert_eq!(put.await.unwrap().unwrap().request, 5);
    assert_eq!(service.puts.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_silent_server_meets_the_deadline_then_the_watchdog() {
    let progress_timeout = Duration::from_millis(300);
    let (client, _far) = against(BulkLimits { progress_timeout, ..BulkLimits::default() });
    let deadline = Instant::now() + Duration::from_millis(10);
    let error = client.put(put_of(1, 10), deadline).await.unwrap_err();
    assert!(matches!(error, BulkError::Deadline { .. }), "{error}");
    let deadline = Instant::now() + Duration::from_millis(10);
    let mut replies = client.get(get_of(1, 10), deadline).await.unwrap();
    assert!(matches!(replies.next().await, Some(Err(BulkError::Deadline { .. }))));
    assert!(replies.next().await.is_none());
    let error = client.closed().await;
    assert!(matches!(cause_of(&error), CloseCause::Silent { .. }), "{error}");
}

/// What is at hand is answered in the order in which it was asked, and what is not beside it.
#[tokio::test]
async fn what_is_at_hand_is_answered_by_the_connection_itself() {
    let (service, stop) = (Arc::new(Memory::default()), CancellationToken::new());
    let (client, _served) = pair(&service, BulkLimits::default(), &stop);
    for round in 0..6 {
        service.at_hand.store(round % 3 != 0, Ordering::SeqCst);
        let replies = client.get(get_of(3, 5000), soon()).await.unwrap().all().await.unwrap();
        assert_eq!(replies.len(), 3);
        for (item, reply) in replies.iter().enumerate() {
            assert_eq!((reply.item, reply.request, reply.data.len()), (item as u32, 77, 5000));
        }
    }
    // More than may be queued: a task answers it, however much of it is at hand.
    service.at_hand.store(true, Ordering::SeqCst);
    let replies = client.get(get_of(64, 1 << 20), soon()).await.unwrap().all().await.unwrap();
    assert_eq!(replies.len(), 64);
    client.put(put_of(1, 10), soon()).await.unwrap();
}

/// A server that answers each get with one byte more than the one before.
async fn answer_gets(mut far: DuplexStream, gets: usize) -> DuplexStream {
    let mut reader =
        frame_io::FrameReader::new(Side::Server, frame_io::Admission::new(1 << 20, None));
    for get in 0..gets {
        let next = std::future::poll_fn(|cx| reader.poll_next(&mut far, cx)).await;
        let request = next.unwrap().unwrap().frame.request;
        let mut out = frame_io::FrameWriter::new();
        let data = Bytes::from(vec![1; get + 1]);
        let reply = GetReply { data, status: FragmentStatus::Ok.into(), ..GetReply::default() };
        out.push(Frame { request, payload: Payload::GetReply(reply) }, None).unwrap();
        out.push(Frame { request, payload: Payload::GetEnd }, None).unwrap();
        std::future::poll_fn(|cx| out.poll_write(&mut far, cx)).await.unwrap();
    }
    far
}

/// On one thread: the connection's task cannot run while the caller does.
#[tokio::test]
async fn a_request_on_a_quiet_connection_is_written_by_its_caller_and_watched() {
    let progress_timeout = Duration::from_millis(300);
    let (client, far) = against(BulkLimits { progress_timeout, ..BulkLimits::default() });
    // The first goes through the channel: nobody watches yet.
    let answering = tokio::spawn(answer_gets(far, 1));
    let replies = client.get(get_of(1, 1), soon()).await.unwrap().all().await.unwrap();
    assert_eq!(replies[0].data.len(), 1);
    let mut far = answering.await.unwrap();
    let get = client.get(get_of(1, 1), soon()).now_or_never();
    let mut replies = get.expect("it waits for nobody").unwrap();
    let mut sent = [0; HEADER_BYTES];
    far.read_exact(&mut sent).now_or_never().expect("it is written").unwrap();
    // No answer comes: the connection ends long before the request's deadline.
    let error = replies.next().await.unwrap().unwrap_err();
    assert!(matches!(cause_of(&error), CloseCause::Silent { .. }), "{error}");
}

#[tokio::test]
async fn an_idle_connection_stays() {
    let progress_timeout = Duration::from_millis(100);
    let limits = BulkLimits { progress_timeout, ..BulkLimits::default() };
    let (service, stop) = (Arc::new(Memory::default()), CancellationToken::new());
    let (client, _served) = pair(&service, limits, &stop);
    client.put(put_of(1, 10), soon()).await.unwrap();
    // Not to synchronise: being idle for longer than the timeout is what is tested.
    tokio::time::sleep(progress_timeout * 5).await;
    client.put(put_of(2, 10), soon()).await.unwrap();
}

#[tokio::test]
async fn a_slow_reader_holds_the_server_back() {
    let limits = BulkLimits { received_bytes_max: 0, queued_bytes_max: 0, ..BulkLimits::default() };
    let (service, stop) = (Arc::new(Memory::default()), CancellationToken::new());
    let (client, _served) = pair(&service, limits, &stop);
    // 256 MiB asked for; both limits are at their least, 8 MiB (one frame).
    let mut replies = client.get(get_of(256, 1 << 20), soon()).await.unwrap();
    eventually("the server begins", || service.produced.load(Ordering::SeqCst) > 16).await;
    // Nobody takes anything: what may be made is what fits the limits, the pipe and two hands.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let produced = service.produced.load(Ordering::SeqCst);
    assert!(produced <= 8 + 8 + 3, "{produced} MiB are in memory");
    for _ in 0..256 {
        assert_eq!(replies.next().await.unwrap().unwrap().data.len(), 1 << 20);
    }
    assert!(replies.next().await.is_none());
}

#[tokio::test]
async fn a_dropped_get_is_cancelled_at_the_server() {
    let limits = BulkLimits { received_bytes_max: 0, queued_bytes_max: 0, ..BulkLimits::default() };
    let (service, stop) = (Arc::new(Memory::default()), CancellationToken::new());
    let (client, _served) = pair(&service, limits, &stop);
    let mut replies = client.get(get_of(256, 1 << 20), soon()).await.unwrap();
    replies.next().await.unwrap().unwrap();
    drop(replies);
    eventually("the service is told", || service.dropped.load(Ordering::SeqCst)).await;
    assert!(service.produced.load(Ordering::SeqCst) < 200);
    // The connection goes on.
    client.put(put_of(1, 1 << 20), soon()).await.unwrap();
}

#[tokio::test]
async fn the_server_reads_no_more_than_it_may_work_on() {
    let limits = BulkLimits { requests_inflight_max: 4, ..BulkLimits::default() };
    let service = Arc::new(Memory { held: true.into(), ..Memory::default() });
    let (near, far) = tokio::io::duplex(64 << 10);
    let serve = unsecured::serve_plain(
        Arc::clone(&service),
        someone("laptop"),
        far,
        limits,
        CancellationToken::new(),
    );
    tokio::spawn(serve);
    // This client would send many more.
    let client = unsecured::connect_plain(near, someone("kitchen"), BulkLimits::default());
    let puts: Vec<_> = (0..40)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move { client.put(put_of(n, 1000), soon()).await })
        })
        .collect();
    eventually("four arrive", || service.puts.load(Ordering::SeqCst) == 4).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(service.puts.load(Ordering::SeqCst), 4);
    service.held.store(false, Ordering::SeqCst);
    service.go.notify_waiters();
    for put in puts {
        put.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_server_says_why_it_hangs_up() {
    let oversized = [&b"USB1\x01\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0"[..], &u32::MAX.to_le_bytes()];
    let (mut near, served) = serving(BulkLimits::default());
    near.write_all(&oversized.concat()).await.unwrap();
    let cause = served.await.unwrap();
    assert!(matches!(cause, CloseCause::Frame(FrameError::TooLarge { .. })), "{cause}");
    let mut farewell = Vec::new();
    near.read_to_end(&mut farewell).await.unwrap();
    assert_eq!(farewell[4], Kind::Error as u8);
    assert!(String::from_utf8_lossy(&farewell).contains("too large"));

    let (mut near, served) = serving(BulkLimits::default());
    near.write_all(b"GET / HTTP/1.1\r\nHost: us\r\n\r\n").await.unwrap();
    let cause = served.await.unwrap();
    assert!(matches!(cause, CloseCause::Frame(FrameError::Magic { .. })), "{cause}");
}

#[tokio::test]
async fn a_client_reports_what_the_server_said() {
    let (client, mut far) = against(BulkLimits::default());
    far.write_all(b"USB1\x08\0\0\0\0\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0why").await.unwrap();
    let error = client.closed().await;
    assert!(
        matches!(cause_of(&error), CloseCause::PeerRefused { detail } if detail == "why"),
        "{error}"
    );
    assert_eq!(error.retry(), Retry::AnotherPeer);
}

#[tokio::test]
async fn unasked_replies_close_the_connection() {
    for kind in [Kind::PutReply, Kind::GetReply, Kind::GetEnd] {
        let (client, mut far) = against(BulkLimits::default());
        let mut frame = *b"USB1\0\0\0\0\x63\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        frame[4] = kind as u8;
        far.write_all(&frame).await.unwrap();
        let error = client.closed().await;
        let expected = FrameError::Unasked { kind, request: 0x63 };
        assert!(matches!(cause_of(&error), CloseCause::Frame(found) if *found == expected));
    }
}

#[tokio::test]
async fn impossible_requests_are_not_sent() {
    let (service, stop) = (Arc::new(Memory::default()), CancellationToken::new());
    let (client, _served) = pair(&service, BulkLimits::default(), &stop);
    let error = client.put(put_of(1, FRAME_BYTES_MAX), soon()).await.unwrap_err();
    assert!(matches!(error, BulkError::Request(FrameError::TooLarge { .. })));
    assert_eq!(error.retry(), Retry::Never);
    assert!(client.get(get_of(0, 1), soon()).await.is_err());
    client.put(put_of(1, FRAME_BYTES_MAX - 1000), soon()).await.unwrap();
}

mod arbitrary {
    use super::super::frame::tests::frame;
    use super::super::frame::{Frame, Payload, Side};
    use super::super::frame_io::{Admission, FrameReader, FrameWriter};
    use super::*;
    use proptest::prelude::*;

    fn read_all(wire: &[u8], side: Side) -> (Vec<Frame>, Option<CloseCause>) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut reader = FrameReader::new(side, Admission::new(0, None));
            let (mut io, mut frames) = (wire, Vec::new());
            loop {
                match std::future::poll_fn(|cx| reader.poll_next(&mut io, cx)).await {
                    Ok(Some(received)) => frames.push(received.frame),
                    Ok(None) => return (frames, None),
                    Err(cause) => return (frames, Some(cause)),
                }
            }
        })
    }

    proptest! {
        #[test]
        fn a_stream_of_frames_comes_back(frames in prop::collection::vec(frame(), 0..20)) {
            let for_server = |frame: &&Frame| matches!(
                frame.payload, Payload::Put(_) | Payload::Get(_) | Payload::Cancel
            );
            for side in [Side::Server, Side::Client] {
                let sent: Vec<Frame> = frames.iter()
                    .filter(|frame| for_server(frame) == (side == Side::Server))
                    .cloned().collect();
                let mut writer = FrameWriter::new();
                for frame in &sent {
                    writer.push(frame.clone(), None).unwrap();
                }
                let mut wire = std::io::Cursor::new(Vec::new());
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                runtime.block_on(std::future::poll_fn(|cx| writer.poll_write(&mut wire, cx)))
                    .unwrap();
                prop_assert!(writer.is_idle());
                let (received, cause) = read_all(wire.get_ref(), side);
                prop_assert!(cause.is_none());
                prop_assert_eq!(received, sent);
            }
        }

        #[test]
        fn no_bytes_make_a_reader_panic(
            noise in prop::collection::vec(any::<u8>(), 0..2000),
            frames in prop::collection::vec(frame(), 0..4),
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        ) {
            let mut wire = bytes::BytesMut::new();
            for frame in frames {
                let (front, body) = frame.encode(&mut bytes::BytesMut::new()).unwrap();
                wire.extend_from_slice(&front);
                wire.extend_from_slice(&body);
            }
            wire.extend_from_slice(&noise);
            for (at, value) in flips {
                if !wire.is_empty() {
                    let at = at.index(wire.len());
                    wire[at] ^= value;
                }
            }
            read_all(&wire, Side::Server);
            read_all(&wire, Side::Client);
        }
    }
}

struct Cluster {
    authority: CertificateAuthority,
    client: Identity,
    address: String,
    stop: CancellationToken,
    served: tokio::task::JoinHandle<Result<(), TlsError>>,
    provider: PeerIdentity,
    memory: Arc<Memory>,
}

async fn cluster(limits: ServerLimits) -> Cluster {
    let authority = CertificateAuthority::create().unwrap();
    let provider = authority.issue(Role::Provider, "kitchen").unwrap();
    let client = authority.issue(Role::Client, "laptop").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let stop = CancellationToken::new();
    let memory = Arc::new(Memory::default());
    let server = Server::new(&provider, limits)
        .bulk(Arc::clone(&memory))
        .grpc(tonic::service::Routes::default());
    let served = tokio::spawn(server.serve(listener, stop.clone()));
    Cluster { authority, client, address, stop, served, provider: provider.own().clone(), memory }
}

#[tokio::test]
async fn one_port_serves_frames_and_grpc_over_tls() {
    let cluster = cluster(ServerLimits::default()).await;
    let expected = ExpectedPeer::key(Role::Provider, cluster.provider.key_hash);
    let limits = BulkLimits::default();
    let client =
        BulkClient::connect(&cluster.address, &cluster.client, expected, limits).await.unwrap();
    assert_eq!(client.peer(), &cluster.provider);
    let reply = client.put(put_of(9, 3 << 20), soon()).await.unwrap();
    assert_eq!((reply.request, reply.detail.as_str()), (9, "laptop 3145728 5"));
    let replies = client.get(get_of(3, 1 << 20), soon()).await.unwrap().all().await.unwrap();
    assert_eq!(replies.len(), 3);

    let channel = connect_grpc(&cluster.address, &cluster.client, expected).await.unwrap();
    let mut fragments = us_proto::v1::fragments_client::FragmentsClient::new(channel);
    let status = fragments.get(get_of(1, 1)).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unimplemented, "{status}");

    cluster.stop.cancel();
    cluster.served.await.unwrap().unwrap();
    let error = client.closed().await;
    assert!(matches!(cause_of(&error), CloseCause::PeerGoodbye { .. }), "{error}");
    assert_eq!(error.retry(), Retry::SamePeerLater);
}

#[tokio::test]
async fn strangers_get_nothing() {
    let cluster = cluster(ServerLimits::default()).await;
    let limits = BulkLimits::default();
    let stranger = CertificateAuthority::create().unwrap().issue(Role::Client, "laptop").unwrap();
    let error = BulkClient::connect(&cluster.address, &stranger, ExpectedPeer::default(), limits)
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::Handshake { .. }), "{error}");
    let error = connect_grpc(&cluster.address, &stranger, ExpectedPeer::default()).await;
    assert!(matches!(error, Err(ConnectError::Grpc { .. })));

    // The stranger trusts our authority; only the server can refuse it.
    let forged = Identity::from_pem(
        cluster.authority.ca_pem().to_owned(),
        stranger.cert_pem().to_string(),
        stranger.key_pem().clone(),
    )
    .unwrap();
    let client =
        BulkClient::connect(&cluster.address, &forged, ExpectedPeer::default(), limits).await;
    if let Ok(client) = client {
        // TLS 1.3 tells a client at its first read.
        client.put(put_of(1, 1), soon()).await.unwrap_err();
    }

    // Somebody else lives at the address now.
    let other = ExpectedPeer::key(Role::Provider, KeyHash::from_bytes([0; 32]));
    let error =
        BulkClient::connect(&cluster.address, &cluster.client, other, limits).await.unwrap_err();
    assert!(matches!(error, ConnectError::Peer { .. }), "{error}");
    assert_eq!(error.retry(), Retry::AnotherPeer);
}

#[tokio::test]
async fn who_does_not_shake_hands_is_dropped() {
    let limits =
        ServerLimits { handshake_timeout: Duration::from_millis(50), ..ServerLimits::default() };
    let cluster = cluster(limits).await;
    let mut idle = tokio::net::TcpStream::connect(&cluster.address).await.unwrap();
    let mut nothing = Vec::new();
    // The server closes: at once an end or a reset, never an answer.
    let _ = idle.read_to_end(&mut nothing).await;
    assert!(nothing.is_empty());
}

#[tokio::test]
async fn nobody_home_is_a_clear_error() {
    let cluster = cluster(ServerLimits::default()).await;
    cluster.stop.cancel();
    cluster.served.await.unwrap().unwrap();
    let limits = BulkLimits::default();
    let error =
        BulkClient::connect(&cluster.address, &cluster.client, ExpectedPeer::default(), limits)
            .await
            .unwrap_err();
    assert!(matches!(error, ConnectError::Tcp { .. }));
    assert!(error.to_string().contains(&cluster.address));
    assert_eq!(error.retry(), Retry::SamePeerLater);
    let error = connect_grpc(&cluster.address, &cluster.client, ExpectedPeer::default()).await;
    assert!(error.unwrap_err().to_string().contains("refused"));
}
