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
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::{CONNECT_TIMEOUT, ConnectError, TCP_TIMEOUT};
use crate::tls::{ExpectedPeer, PeerIdentity, SERVER_NAME};

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
pub(super) type Secured = TlsStream<BufReader<TcpStream>>;

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

/// Dials `address` and checks who answers.
pub(super) async fn dial(
    address: &str,
    config: Arc<ClientConfig>,
    expected: ExpectedPeer,
) -> Result<(Secured, PeerIdentity), ConnectError> {
    let too_long = |after| ConnectError::Timeout { address: address.to_owned(), after };
    let connecting = async {
        let tcp = timeout(TCP_TIMEOUT, TcpStream::connect(address)).await;
        let tcp = tcp.map_err(|_| too_long(TCP_TIMEOUT))?;
        let tcp = tcp.and_then(|tcp| tune(&tcp).map(|()| tcp));
        let tcp =
            tcp.map_err(|source| ConnectError::Tcp { address: address.to_owned(), source })?;
        let name = ServerName::try_from(SERVER_NAME).expect("it is a DNS name");
        let tls = TlsConnector::from(config).connect(name, buffered(tcp)).await;
        tls.map_err(|source| ConnectError::Handshake { address: address.to_owned(), source })
    };
    let mut tls =
        timeout(CONNECT_TIMEOUT, connecting).await.map_err(|_| too_long(CONNECT_TIMEOUT))??;
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

/// The server's side of a handshake.
pub(super) async fn accept(
    tcp: TcpStream,
    config: Arc<ServerConfig>,
) -> io::Result<(Secured, PeerIdentity, Option<Vec<u8>>)> {
    tune(&tcp)?;
    let mut tls = TlsAcceptor::from(config).accept(buffered(tcp)).await?;
    let (_, session) = tls.get_mut();
    session.set_buffer_limit(Some(WRITE_BUFFER_BYTES));
    let alpn = session.alpn_protocol().map(<[u8]>::to_vec);
    let peer = PeerIdentity::from_chain(session.peer_certificates())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok((tls.into(), peer, alpn))
}
