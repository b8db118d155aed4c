//! TCP and TLS connections, dialled and accepted, and how their sockets are set.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::BufReader;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, TlsStream};

use super::{CONNECT_TIMEOUT, ConnectError, TCP_TIMEOUT};
use crate::tls::{ALPN_JOIN, ExpectedPeer, PeerIdentity, SERVER_NAME};

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

/// A TLS connection of either side.
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

/// Dials `address` and checks who answers.
pub(super) async fn dial(
    address: &str,
    config: Arc<ClientConfig>,
    expected: ExpectedPeer,
) -> Result<(Secured, PeerIdentity), ConnectError> {
    let connecting = async {
        let tcp = dial_tcp(address).await?;
        let name = ServerName::try_from(SERVER_NAME).expect("it is a DNS name");
        let tls = TlsConnector::from(config).connect(name, buffered(tcp)).await;
        tls.map_err(|source| ConnectError::Handshake { address: address.to_owned(), source })
    };
    let mut tls = timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| too_long(address, CONNECT_TIMEOUT))??;
    let (_, session) = tls.get_mut();
    session.set_buffer_limit(Some(WRITE_BUFFER_BYTES));
    let peer = PeerIdentity::from_chain(session.peer_certificates())
        .map_err(|source| ConnectError::Identity { address: address.to_owned(), source })?;
    expected.check(&peer).map_err(|source| ConnectError::Peer {
        address: address.to_owned(),
        source: Box::new(source),
    })?;
    Ok((tls.into(), peer))
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
        (stream, Caller::Member(peer, _)) => Ok((stream, peer)),
        (_, Caller::Newcomer) => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// Who has connected.
pub(super) enum Caller {
    /// A member, and the protocol it wants.
    Member(PeerIdentity, Option<Vec<u8>>),
    /// Somebody without certificate, who may only join.
    Newcomer,
}

/// The server's side of a handshake. Only who offers joining as its one protocol is let in without a
/// certificate, and TLS then agrees on nothing but joining.
pub(super) async fn accept(tcp: TcpStream, shown: Shown) -> io::Result<(Secured, Caller)> {
    tune(&tcp)?;
    let acceptor = rustls::server::Acceptor::default();
    let start = LazyConfigAcceptor::new(acceptor, buffered(tcp)).await?;
    let joins = start.client_hello().alpn().is_some_and(|names| names.eq([ALPN_JOIN]));
    let newcomers = shown.newcomers.filter(|_| joins);
    let is_newcomer = newcomers.is_some();
    let mut tls = start.into_stream(newcomers.unwrap_or(shown.members)).await?;
    let (_, session) = tls.get_mut();
    session.set_buffer_limit(Some(WRITE_BUFFER_BYTES));
    let alpn = session.alpn_protocol().map(<[u8]>::to_vec);
    if is_newcomer {
        return Ok((tls.into(), Caller::Newcomer));
    }
    let peer = PeerIdentity::from_chain(session.peer_certificates())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok((tls.into(), Caller::Member(peer, alpn)))
}
