//! Our records against rustls' and against each other: cut into any pieces, across key updates, with
//! bytes changed on the way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::tls::{
    ALPN_BULK, CertificateAuthority, Role, SERVER_NAME, client_config, server_config,
};
use crate::wire::handshake::shake;

const NEVER: usize = usize::MAX;

/// A pipe's end that gives what it reads in pieces, late, and with one bit changed.
struct Line {
    io: DuplexStream,
    piece: usize,
    /// Polls before a read that give nothing.
    pause: usize,
    paused: usize,
    /// Bytes until the one that is changed; it counts from when it is set.
    spoil: Arc<AtomicUsize>,
}

impl Line {
    fn new(io: DuplexStream, piece: usize, pause: usize) -> Self {
        Self { io, piece, pause, paused: 0, spoil: Arc::new(AtomicUsize::new(NEVER)) }
    }
}

impl AsyncRead for Line {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.paused < this.pause {
            this.paused += 1;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let mut bytes = vec![0; buffer.remaining().min(this.piece)];
        let mut piece = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut this.io).poll_read(cx, &mut piece))?;
        this.paused = 0;
        let (read, until) = (piece.filled().len(), this.spoil.load(Ordering::SeqCst));
        if until != NEVER {
            if let Some(spoilt) = bytes[..read].get_mut(until) {
                *spoilt ^= 1;
            }
            let left = until.checked_sub(read).unwrap_or(NEVER);
            this.spoil.store(left, Ordering::SeqCst);
        }
        buffer.put_slice(&bytes[..read]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Line {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        Pin::new(&mut this.io).poll_write(cx, &bytes[..bytes.len().min(this.piece)])
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

fn configs() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let ca = CertificateAuthority::create().unwrap();
    let client = ca.issue(Role::Client, "laptop").unwrap();
    let server = ca.issue(Role::Provider, "kitchen").unwrap();
    let client = client_config(&client, &[ALPN_BULK]).unwrap();
    (client, server_config(&server, &[ALPN_BULK]).unwrap())
}

fn name() -> ServerName<'static> {
    ServerName::try_from(SERVER_NAME).unwrap()
}

async fn our_client(config: Arc<ClientConfig>, line: Line) -> Records<Line> {
    let connection = UnbufferedClientConnection::new(config, name()).unwrap();
    let shaken = shake(connection, line, Incoming::new()).await.unwrap();
    assert_eq!(shaken.peer.unwrap().name, "kitchen");
    assert_eq!(shaken.alpn.as_deref(), Some(ALPN_BULK));
    shaken.records
}

async fn our_server(config: Arc<ServerConfig>, line: Line) -> Records<Line> {
    let connection = UnbufferedServerConnection::new(config).unwrap();
    let shaken = shake(connection, line, Incoming::new()).await.unwrap();
    assert_eq!(shaken.peer.unwrap().name, "laptop");
    shaken.records
}

async fn ours(piece: usize, pause: usize) -> (Records<Line>, Records<Line>) {
    let (near, far) = duplex(1 << 20);
    let (client, server) = configs();
    tokio::join!(
        our_client(client, Line::new(near, piece, 0)),
        our_server(server, Line::new(far, piece, pause)),
    )
}

fn message(number: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 31 + number * 7) as u8).collect()
}

/// Writes messages, closes, and reads all that comes.
async fn talk<IO: AsyncRead + AsyncWrite + Unpin>(io: IO, sizes: &[usize]) -> Vec<u8> {
    let (mut reading, mut writing) = tokio::io::split(io);
    let write = async {
        for (number, bytes) in sizes.iter().enumerate() {
            writing.write_all(&message(number, *bytes)).await.unwrap();
            writing.flush().await.unwrap();
        }
        writing.shutdown().await.unwrap();
    };
    let mut read = Vec::new();
    let (_, ended) = tokio::join!(write, reading.read_to_end(&mut read));
    // The other end of a pipe may be gone behind its farewell.
    ended.unwrap();
    read
}

fn all(sizes: &[usize]) -> Vec<u8> {
    let messages = sizes.iter().enumerate();
    messages.flat_map(|(number, bytes)| message(number, *bytes)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// rustls at one end, at the other, at none: whatever the pieces, both sides read what was written,
    /// over many keys, and the end is an end.
    #[test]
    fn it_is_tls_to_everybody(
        up in prop::collection::vec(0usize..70_000, 1..6),
        down in prop::collection::vec(0usize..70_000, 1..6),
        piece in prop_oneof![1usize..40, 1_000usize..300_000],
        records_a_key in prop_oneof![1u64..4, Just(RECORDS_A_KEY)],
        theirs in 0u8..3,
    ) {
        // Small pieces of little: each is a poll.
        let small = |sizes: Vec<usize>| match piece {
            0..40 => sizes.into_iter().map(|size| size / 100).collect(),
            _ => sizes,
        };
        let (up, down): (Vec<usize>, Vec<usize>) = (small(up), small(down));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (sent_up, sent_down) = runtime.block_on(async {
            // Less than is under way: writing waits for reading.
            let (near, far) = duplex(piece.clamp(64, 30_000));
            let (client, server) = configs();
            let (near, far) = (Line::new(near, piece, 0), Line::new(far, piece, 0));
            match theirs {
                0 => {
                    let acceptor = TlsAcceptor::from(server);
                    let (near, far) = tokio::join!(our_client(client, near), acceptor.accept(far));
                    let near = near.with_records_a_key(records_a_key);
                    tokio::join!(talk(near, &up), talk(far.unwrap(), &down))
                }
                1 => {
                    let connecting = TlsConnector::from(client).connect(name(), near);
                    let (near, far) = tokio::join!(connecting, our_server(server, far));
                    let far = far.with_records_a_key(records_a_key);
                    tokio::join!(talk(near.unwrap(), &up), talk(far, &down))
                }
                _ => {
                    let (near, far) =
                        tokio::join!(our_client(client, near), our_server(server, far));
                    let far = far.with_records_a_key(records_a_key);
                    tokio::join!(talk(near, &up), talk(far, &down))
                }
            }
        });
        prop_assert!(sent_up == all(&down) && sent_down == all(&up));
    }

    #[test]
    fn looking_into_anything_ends(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let _ = look_into(&bytes);
        let _ = inner(&bytes);
        let _ = after_handshake(&bytes);
    }
}

/// The first request often comes in one segment with the last of the handshake.
#[tokio::test]
async fn what_comes_with_the_handshake_is_not_lost() {
    for pause in [0, 50] {
        for piece in [3, 100, 1 << 20] {
            let (near, far) = duplex(1 << 20);
            let (client, server) = configs();
            let asking = async {
                let mut client = our_client(client, Line::new(near, 1 << 20, 0)).await;
                client.write_all(&message(1, 40_000)).await.unwrap();
                client.write_all(b"and this").await.unwrap();
                client.flush().await.unwrap();
                client
            };
            let answering = async {
                let mut server = our_server(server, Line::new(far, piece, pause)).await;
                let is_early = !server.incoming.filled().is_empty();
                let mut read = vec![0; 40_008];
                server.read_exact(&mut read).await.unwrap();
                assert!(read[..40_000] == message(1, 40_000) && read[40_000..] == *b"and this");
                is_early
            };
            let (_client, is_early) = tokio::join!(asking, answering);
            assert!(is_early || piece < 1 << 20, "it came with the handshake: {pause}");
        }
    }
}

#[tokio::test]
async fn a_key_update_of_theirs_is_followed_and_answered_once() {
    let (near, far) = duplex(1 << 20);
    let (client, server) = configs();
    let connecting = TlsConnector::from(client).connect(name(), near);
    let (client, server) = tokio::join!(connecting, our_server(server, Line::new(far, 1 << 20, 0)));
    let (mut client, mut server) = (client.unwrap(), server);
    let mut read = [0; 5];
    let mut most = 0;
    for round in 0..300 {
        client.get_mut().1.refresh_traffic_keys().unwrap();
        client.write_all(b"hello").await.unwrap();
        client.flush().await.unwrap();
        server.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"hello");
        // One answer waits for what is written next.
        most = most.max(server.outgoing.len());
        if round % 7 == 0 {
            server.write_all(b"hello").await.unwrap();
            server.flush().await.unwrap();
            client.read_exact(&mut read).await.unwrap();
        }
    }
    assert!((1..64).contains(&most), "{most}");
    // Without data between them they are not followed for ever.
    for round in 0..=IDLE_RECORDS_MAX {
        client.get_mut().1.refresh_traffic_keys().unwrap();
        client.flush().await.unwrap();
        if round == IDLE_RECORDS_MAX - 1 {
            let nothing = tokio::time::timeout(Duration::ZERO, server.read(&mut read)).await;
            assert!(nothing.is_err(), "so many are taken");
        }
    }
    assert_eq!(server.read(&mut read).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    // And the peer hears why.
    server.shutdown().await.unwrap();
    let error = client.read(&mut read).await.unwrap_err();
    let told = rustls::Error::AlertReceived(AlertDescription::UnexpectedMessage);
    assert!(error.to_string().contains(&told.to_string()), "{error}");
}

/// A key update that the peer wants, in one segment with the end of the handshake and data behind it.
#[tokio::test]
async fn a_key_update_right_behind_the_handshake_is_followed() {
    let (near, far) = duplex(1 << 20);
    let (client, server) = configs();
    let asking = async {
        let mut client = TlsConnector::from(client).connect(name(), near).await.unwrap();
        client.get_mut().1.refresh_traffic_keys().unwrap();
        client.write_all(b"hello").await.unwrap();
        client.shutdown().await.unwrap();
        let mut read = Vec::new();
        client.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"hello yourself");
    };
    let answering = async {
        let mut server = our_server(server, Line::new(far, 1 << 20, 50)).await;
        assert!(!server.incoming.filled().is_empty(), "it came with the handshake");
        let mut read = Vec::new();
        server.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"hello");
        server.write_all(b"hello yourself").await.unwrap();
        server.shutdown().await.unwrap();
        assert!(server.write_all(b"more").await.is_err());
    };
    tokio::join!(asking, answering);
}

/// Every byte of a handshake, changed, either way: it fails or was of no account, and nothing panics.
#[tokio::test(start_paused = true)]
async fn a_changed_handshake_comes_to_nothing() {
    let patience = Duration::from_secs(10);
    let mut failed = 0;
    for (at, at_client) in (0..3_000).step_by(5).flat_map(|at| [(at, true), (at, false)]) {
        let (near, far) = duplex(1 << 20);
        let (client, server) = configs();
        let (near, far) = (Line::new(near, 700, 0), Line::new(far, 700, 0));
        (if at_client { &near } else { &far }).spoil.store(at, Ordering::SeqCst);
        let client = UnbufferedClientConnection::new(client, name()).unwrap();
        let server = UnbufferedServerConnection::new(server).unwrap();
        let (client, server) = tokio::join!(
            tokio::time::timeout(patience, shake(client, near, Incoming::new())),
            tokio::time::timeout(patience, shake(server, far, Incoming::new())),
        );
        let is_whole = matches!((client, server), (Ok(Ok(_)), Ok(Ok(_))));
        failed += usize::from(!is_whole);
    }
    assert!(failed > 200, "{failed}");
}

/// Every byte of two records, changed: what is read is a part of what was written, and the reader hears
/// of it. Cut off there, the same.
#[tokio::test]
async fn a_changed_byte_is_never_read_and_a_cut_is_no_end() {
    let (first, second) = (message(1, 60), message(2, 40));
    let whole = [first.clone(), second.clone()].concat();
    let on_the_wire = whole.len() + 2 * (HEADER_BYTES + 1 + TAG_BYTES);
    for at in 0..=on_the_wire {
        let (mut client, mut server) = ours(1 << 20, 0).await;
        server.io.spoil.store(at, Ordering::SeqCst);
        client.write_all(&first).await.unwrap();
        client.write_all(&second).await.unwrap();
        client.flush().await.unwrap();
        let mut read = Vec::new();
        drop(client);
        let error = server.read_to_end(&mut read).await.unwrap_err();
        let is_spoilt = at < on_the_wire;
        assert!(whole.starts_with(&read) && (read.len() < whole.len()) == is_spoilt, "{at}");
        let kinds = [io::ErrorKind::InvalidData, io::ErrorKind::UnexpectedEof];
        assert!(kinds.contains(&error.kind()), "{at}: {error}");
        assert_eq!(error.kind() == io::ErrorKind::UnexpectedEof && !is_spoilt, !is_spoilt);
        assert!(server.read_to_end(&mut read).await.is_err(), "{at}: it stays an error");
    }
}

#[test]
fn records_open_once_and_in_their_order() {
    let secrets = || {
        let key = rustls::crypto::cipher::AeadKey::from([7; 32]);
        ConnectionTrafficSecrets::Aes256Gcm { key, iv: [9; NONCE_LEN].into() }
    };
    let mut sending = Half::new((5, secrets())).unwrap();
    let mut records = [Vec::new(), Vec::new()];
    for (record, text) in records.iter_mut().zip([b"one", b"two"]) {
        record.extend_from_slice(&[0; HEADER_BYTES]);
        record.extend_from_slice(text);
        record.push(DATA);
        sending.seal(record, 0).unwrap();
    }
    assert_eq!(sealed_bytes(&records[0]), Ok(Some(4 + TAG_BYTES)));
    let open = |order: &[usize]| {
        let mut receiving = Half::new((5, secrets())).unwrap();
        let opened = order.iter().map(|at| {
            let mut record = records[*at].clone();
            receiving.open(&mut record).map(|opened| opened.to_vec())
        });
        opened.collect::<Result<Vec<_>, _>>()
    };
    assert_eq!(open(&[0, 1]).unwrap(), [b"one\x17", b"two\x17"]);
    for order in [&[1][..], &[0, 0], &[1, 0]] {
        assert_eq!(open(order), Err(RecordError::Seal), "{order:?}");
    }
}

#[test]
fn what_records_may_hold() {
    let data = |bytes: usize| [vec![1; bytes], vec![DATA, 0, 0]].concat();
    assert_eq!(inner(&data(0)), Ok(Inner::Data(0)));
    assert_eq!(inner(&data(PLAIN_BYTES_MAX)), Ok(Inner::Data(PLAIN_BYTES_MAX)));
    let too_long = PLAIN_BYTES_MAX + 1;
    assert_eq!(inner(&data(too_long)), Err(RecordError::Length(too_long)));
    assert_eq!(inner(&[0, 0]), Err(RecordError::Message("it has no type")));
    assert_eq!(inner(&[1, 0, ALERT]), Ok(Inner::Closed));
    assert_eq!(inner(&[1, USER_CANCELED, ALERT]), Ok(Inner::Nothing));
    let refused = AlertDescription::BadCertificate;
    assert_eq!(inner(&[2, 42, ALERT]), Err(RecordError::Alert(refused)));
    assert!(inner(&[2, ALERT]).is_err() && inner(&[1, 1, 20]).is_err());
    let ticket = [NEW_SESSION_TICKET, 0, 0, 2, 8, 8];
    let update = |wanted| [KEY_UPDATE, 0, 0, 1, wanted];
    let handshake = |parts: &[&[u8]]| inner(&[parts.concat(), vec![HANDSHAKE]].concat());
    assert_eq!(handshake(&[&ticket, &ticket]), Ok(Inner::Nothing));
    assert_eq!(handshake(&[&update(0)]), Ok(Inner::KeyUpdate { wanted: false }));
    assert_eq!(handshake(&[&ticket, &update(1)]), Ok(Inner::KeyUpdate { wanted: true }));
    let wrong: [&[&[u8]]; 6] = [
        &[],
        &[&update(2)],
        &[&update(1), &ticket],
        &[&ticket[..5]],
        &[&ticket, &[1, 0, 0]],
        &[&[1, 0, 0, 0]],
    ];
    wrong.iter().for_each(|parts| assert!(handshake(parts).is_err(), "{parts:?}"));
    assert_eq!(sealed_bytes(&[DATA, 3, 3, 0]), Ok(None));
    assert_eq!(sealed_bytes(&[ALERT, 3, 3, 0, 2]), Err(RecordError::Kind(ALERT)));
    for (high, low) in [(0, 16), (0x41, 1)] {
        assert!(matches!(sealed_bytes(&[DATA, 3, 3, high, low]), Err(RecordError::Length(_))));
    }
}
