//! TCP and TLS connections, dialled and accepted, and how their sockets are set.
//!
//! Those that carry frames go over [`Records`], all others over rustls' own stream.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::{Accepted, Acceptor, UnbufferedServerConnection};
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{StartHandshake, TlsConnector, TlsStream};

use super::handshake::{Shaken, shake};
use super::records::{Incoming, Records};
use super::{CONNECT_TIMEOUT, ConnectError, TCP_TIMEOUT};
use crate::tls::{ALPN_BULK, ALPN_JOIN, ExpectedPeer, PeerIdentity, SERVER_NAME, TlsError};

/// How long a connection that ends is given to say so to TLS.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Read ahead of TLS: rustls alone reads 4 KiB a system call.
const READ_AHEAD_BYTES: usize = 256 << 10;
/// Sealed records that rustls collects for one system call.
const WRITE_BUFFER_BYTES: usize = 256 << 10;
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;
/// Sent bytes that nobody acknowledges for this time end the connection.
const UNACKNOWLEDGED_TIMEOUT_MS: u32 = 30_000;

/// A TLS connection of either side that carries frames.
pub(super) type Framed = Records<TcpStream>;
/// Any other TLS connection of either side.
pub(crate) type Secured = TlsStream<BufReader<TcpStream>>;

/// No delay for small frames, and a dead peer is noticed on an idle connection too.
pub(super) fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED_TIMEOUT_MS)?;
    Ok(())
}

fn buffered(stream: TcpStream) -> BufReader<TcpStream> {
    BufReader::with_capacity(READ_AHEAD_BYTES, stream)
}

fn too_long(address: &str, after: Duration) -> ConnectError {
    ConnectError::Timeout { address: address.to_owned(), after }
}

/// A TCP connection to `address`, set as all are.
pub(super) async fn dial_tcp(address: &str) -> Result<TcpStream, ConnectError> {
    let tcp = timeout(TCP_TIMEOUT, TcpStream::connect(address)).await;
    let tcp = tcp.map_err(|_| too_long(address, TCP_TIMEOUT))?;
    let tcp = tcp.and_then(|tcp| tune(&tcp).map(|()| tcp));
    tcp.map_err(|source| ConnectError::Tcp { address: address.to_owned(), source })
}

fn server_name() -> ServerName<'static> {
    ServerName::try_from(SERVER_NAME).expect("it is a DNS name")
}

/// What is left of the time for connecting is for a handshake.
async fn in_time<T>(
    address: &str,
    connecting: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    timeout(CONNECT_TIMEOUT, connecting).await.map_err(|_| too_long(address, CONNECT_TIMEOUT))?
}

/// Whether the one who answers is the one who was meant.
fn checked(
    address: &str,
    peer: Result<PeerIdentity, TlsError>,
    expected: ExpectedPeer,
) -> Result<PeerIdentity, ConnectError> {
    let peer =
        peer.map_err(|source| ConnectError::Identity { address: address.to_owned(), source })?;
    expected.check(&peer).map_err(|source| ConnectError::Peer {
        address: address.to_owned(),
        source: Box::new(source),
    })?;
    Ok(peer)
}

/// Dials `address` and checks who answers.
pub(super) async fn dial(
    address: &str,
    config: Arc<ClientConfig>,
    expected: ExpectedPeer,
) -> Result<(Secured, PeerIdentity), ConnectError> {
    let connecting = async {
        let tcp = dial_tcp(address).await?;
        let tls = TlsConnector::from(config).connect(server_name(), buffered(tcp)).await;
        tls.map_err(|source| ConnectError::Handshake { address: address.to_owned(), source })
    };
    let mut tls = in_time(address, connecting).await?;
    let (_, session) = tls.get_mut();
    session.set_buffer_limit(Some(WRITE_BUFFER_BYTES));
    let peer = PeerIdentity::from_chain(session.peer_certificates());
    Ok((tls.into(), checked(address, peer, expected)?))
}

/// Dials `address` for frames, which `config` offers alone, and checks who answers.
pub(super) async fn dial_framed(
    address: &str,
    config: Arc<ClientConfig>,
    expected: ExpectedPeer,
) -> Result<(Framed, PeerIdentity), ConnectError> {
    let handshake = |source| ConnectError::Handshake { address: address.to_owned(), source };
    let connecting = async {
        let tcp = dial_tcp(address).await?;
        let connection = UnbufferedClientConnection::new(config, server_name());
        let connection = connection.map_err(|error| handshake(io::Error::other(error)))?;
        shake(connection, tcp, Incoming::new()).await.map_err(handshake)
    };
    let Shaken { records, peer, alpn } = in_time(address, connecting).await?;
    let peer = checked(address, peer, expected)?;
    match alpn.as_deref() {
        Some(ALPN_BULK) => Ok((records, peer)),
        _ => Err(handshake(io::Error::other("the peer speaks no frames"))),
    }
}

/// What a server shows, and to whom.
#[derive(Clone)]
pub(super) struct Shown {
    /// To members: they must show a certificate too.
    pub members: Arc<ServerConfig>,
    /// To those who ask for joining and nothing else; `None`: there is no joining here.
    pub newcomers: Option<Arc<ServerConfig>>,
}

/// The server's side of a handshake with a member, outside of a [`Server`](super::Server).
pub(crate) async fn accept_member(
    tcp: TcpStream,
    config: Arc<ServerConfig>,
) -> io::Result<(Secured, PeerIdentity)> {
    match accept(tcp, Shown { members: config, newcomers: None }).await? {
        Caller::Member(stream, peer, _) => Ok((stream, peer)),
        Caller::Framed(..) | Caller::Newcomer(_) => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// Who has connected.
pub(super) enum Caller {
    /// A member that offers frames as its one protocol.
    Framed(Box<Framed>, PeerIdentity),
    /// Any other member, and the protocol it wants.
    Member(Secured, PeerIdentity, Option<Vec<u8>>),
    /// Somebody without certificate, who may only join.
    Newcomer(Secured),
}

/// A client's first message, and all bytes that were read for it.
async fn hello(tcp: &mut TcpStream) -> io::Result<(Accepted, Incoming)> {
    let (mut acceptor, mut incoming) = (Acceptor::default(), Incoming::new());
    loop {
        let fresh = poll_fn(|cx| incoming.poll_fill(tcp, cx).map_ok(<[u8]>::to_vec)).await?;
        if fresh.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut unread = &fresh[..];
        while !unread.is_empty() {
            acceptor.read_tls(&mut unread)?;
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => return Ok((accepted, incoming)),
            Ok(None) => {}
            Err((error, mut alert)) => {
                let mut farewell = Vec::new();
                alert.write_all(&mut farewell)?;
                tcp.write_all(&farewell).await?;
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
        }
    }
}

/// The server's side of a handshake. Only who offers joining as its one protocol is let in without a
/// certificate, and TLS then agrees on nothing but joining.
pub(super) async fn accept(mut tcp: TcpStream, shown: Shown) -> io::Result<Caller> {
    tune(&tcp)?;
    let (accepted, incoming) = hello(&mut tcp).await?;
    let offers_only = |protocol: &[u8]| {
        let mut offered = accepted.client_hello().alpn().into_iter().flatten();
        offered.next() == Some(protocol) && offered.next().is_none()
    };
    if offers_only(ALPN_BULK) {
        let connection = UnbufferedServerConnection::new(shown.members);
        let connection = connection.map_err(io::Error::other)?;
        // The first message once more, from its bytes.
        let Shaken { records, peer, alpn } = shake(connection, tcp, incoming).await?;
        // A first message that was sent again may have offered something else.
        if alpn.as_deref() != Some(ALPN_BULK) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no frames were agreed upon"));
        }
        return Ok(Caller::Framed(Box::new(records), peer.map_err(invalid)?));
    }
    drop(incoming);
    let newcomers = shown.newcomers.filter(|_| offers_only(ALPN_JOIN));
    let is_newcomer = newcomers.is_some();
    let start = StartHandshake::from_parts(accepted, buffered(tcp));
    let mut tls = start.into_stream(newcomers.unwrap_or(shown.members)).await?;
    let (_, session) = tls.get_mut();
    session.set_buffer_limit(Some(WRITE_BUFFER_BYTES));
    let alpn = session.alpn_protocol().map(<[u8]>::to_vec);
    if is_newcomer {
        return Ok(Caller::Newcomer(tls.into()));
    }
    let peer = PeerIdentity::from_chain(session.peer_certificates()).map_err(invalid)?;
    Ok(Caller::Member(tls.into(), peer, alpn))
}

fn invalid(error: TlsError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
