//! What travels between machines: one TCP port a daemon, TLS on every connection, and the protocol
//! chosen by ALPN.
//!
//! ```text
//!   TCP accept -> TLS 1.3, both certificates -> ALPN "h2"         -> gRPC (Server::grpc)
//!                                            -> ALPN "us-bulk/1"  -> records -> frames (Server::bulk)
//!              no certificate of the caller  -> ALPN "us-join/1"  -> joining (Server::join)
//! ```
//! gRPC carries control; fragments travel in frames (`docs/wire.md` draws them,
//! `docs/adr/0001-bulk-transport.md` says why). Both carry the same messages: a provider implements
//! [`BulkService`] once and serves it with [`Server::bulk`] and, over gRPC, with [`grpc_put`] and
//! [`grpc_get`].
//!
//! Invariants:
//! - Nothing is read from or sent to a peer before its certificate was verified and, where the
//!   caller said whom it means, compared.
//! - The memory a peer can make this process hold of bulk frames is bounded by [`ShareLimits`] over all
//!   its connections, and by [`BulkLimits`] on each, whatever it sends and however slowly it reads: whoever
//!   is over a limit is not read from. Of gRPC it is bounded for each connection: calls, and bytes a call.
//! - No bytes of a peer make this process panic: a malformed frame closes its connection.
//!
//! Callers: `us-provider` and `us-directory` serve; the block pipeline and the programs dial.

pub mod admission;
mod client;
mod dial;
mod frame;
mod frame_io;
mod grpc;
mod handshake;
pub mod join;
mod records;
mod served;
mod server;
mod shares;
mod watchdog;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use us_proto::v1::{GetReply, GetRequest, PutReply, PutRequest};

use crate::disk::Retry;
use crate::tls::{PeerIdentity, TlsError, UnexpectedPeer};

pub(crate) use dial::{Secured as MemberStream, accept_member};

pub use client::{BulkClient, GetReplies};
pub use frame::{FRAME_BYTES_MAX, FrameError, GET_ITEMS_MAX, HEAD_BYTES_MAX, HEADER_BYTES, Kind};
pub use grpc::{
    CallerAddress, Http2Windows, connect_grpc, connect_grpc_with, grpc_get, grpc_put, peer_of,
};
pub use server::{Server, ServerLimits};
pub use shares::{ShareLimits, network_of};

#[doc(hidden)]
pub mod unsecured {
    //! The framed protocol without TLS: the limit that the benchmarks `wire` and `tls` compare with.
    //! It is reached from code alone; a test sees to it that the code of no program does.
    pub use super::client::{connect_plain, dial_plain};
    pub use super::served::serve_plain;
}

/// Dials outside of gRPC and frames.
#[cfg(test)]
pub(crate) async fn dial(
    address: &str,
    config: Arc<rustls::ClientConfig>,
    expected: crate::tls::ExpectedPeer,
) -> Result<MemberStream, ConnectError> {
    dial::dial(address, config, expected).await.map(|(stream, _)| stream)
}

#[doc(hidden)]
pub mod decoders {
    //! The frame codec and what TLS records hold, for the fuzzer: no program calls it from outside.
    pub use super::frame::reencode;
    pub use super::records::{RecordError, look_into};
}

/// The largest gRPC message: a whole fragment and what goes with it.
pub const GRPC_MESSAGE_BYTES_MAX: usize = FRAME_BYTES_MAX;
/// A peer must have taken a TCP connection after this time.
pub const TCP_TIMEOUT: Duration = Duration::from_secs(10);
/// The connection and its TLS handshake must be complete after this time. A handshake's answer waits
/// behind what else goes up a line of 128 kb/s: ten seconds are not enough there.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// The fragments a machine serves: what `Fragments.Put` and `Fragments.Get` mean. Implemented by the
/// provider once, for frames and gRPC both.
pub trait BulkService: Send + Sync + 'static {
    /// Stores one fragment and answers once it is durable. Dropped (at an await) when the connection
    /// ends before: the fragment may then be stored or not. `request.request` need not be copied
    /// into the reply; whoever calls does.
    fn put(
        &self,
        peer: &PeerIdentity,
        request: PutRequest,
    ) -> impl Future<Output = PutReply> + Send;

    /// Reads fragments: exactly one reply for each item, in any order. Pulled only as fast as the
    /// peer reads; dropped when the peer cancels or its connection ends. `request` of the replies
    /// need not be set.
    fn get(&self, peer: &PeerIdentity, request: GetRequest) -> BoxStream<'static, GetReply>;

    /// The same replies where they are at hand: called on the connection's task, which serves nobody
    /// else meanwhile. `None`: ask [`BulkService::get`].
    fn get_now(&self, _peer: &PeerIdentity, _request: &GetRequest) -> Option<Vec<GetReply>> {
        None
    }
}

/// What one end of a framed connection holds at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BulkLimits {
    /// Requests a client keeps unanswered on one connection; a server reads no further frame while
    /// it works on as many.
    pub requests_inflight_max: usize,
    /// Gets that a server answers at once on one connection; each may hold one fragment.
    pub gets_served_max: usize,
    /// Bytes of bodies received on one connection and not yet consumed: by the service (server), by
    /// the caller who reads the replies (client).
    pub received_bytes_max: usize,
    /// Bytes of bodies queued for sending on one connection.
    pub queued_bytes_max: usize,
    /// A connection with work under way on which no byte moved for this time is closed.
    pub progress_timeout: Duration,
}

impl Default for BulkLimits {
    fn default() -> Self {
        Self {
            requests_inflight_max: 256,
            gets_served_max: 32,
            received_bytes_max: 32 << 20,
            queued_bytes_max: 16 << 20,
            progress_timeout: Duration::from_secs(30),
        }
    }
}

/// Why a connection came not to be.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No TCP connection.
    #[error("connect to {address}: {source}")]
    Tcp {
        /// The address dialled.
        address: String,
        /// The system's reason.
        source: io::Error,
    },
    /// TLS failed: another cluster, a refused certificate, no common protocol.
    #[error("TLS with {address}: {source}")]
    Handshake {
        /// The address dialled.
        address: String,
        /// The reason.
        source: io::Error,
    },
    /// Not connected after [`TCP_TIMEOUT`] or [`CONNECT_TIMEOUT`].
    #[error("connect to {address}: no answer in {} s", after.as_secs())]
    Timeout {
        /// The address dialled.
        address: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The peer's certificate cannot be read, or our own identity is broken.
    #[error("connect to {address}: {source}")]
    Identity {
        /// The address dialled.
        address: String,
        /// What is wrong.
        source: TlsError,
    },
    /// Somebody else answered.
    #[error("connect to {address}: {source}")]
    Peer {
        /// The address dialled.
        address: String,
        /// Who, and who was meant.
        source: Box<UnexpectedPeer>,
    },
    /// HTTP/2 over the TLS connection failed, or the address is not one.
    #[error("gRPC with {address}: {detail}")]
    Grpc {
        /// The address dialled.
        address: String,
        /// The reasons, outermost first.
        detail: String,
    },
}

impl ConnectError {
    /// Whether it helps to try again.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Tcp { .. } | Self::Timeout { .. } | Self::Grpc { .. } => Retry::SamePeerLater,
            Self::Handshake { .. } | Self::Identity { .. } | Self::Peer { .. } => {
                Retry::AnotherPeer
            }
        }
    }
}

/// Why a framed connection ended.
#[derive(Debug, thiserror::Error)]
pub enum CloseCause {
    /// This end closed it.
    #[error("closed by this side")]
    Local,
    /// The peer closed it without a word: it stopped, or was killed.
    #[error("the peer closed the connection")]
    PeerClosed,
    /// The peer is shutting down.
    #[error("the peer is going away: {detail}")]
    PeerGoodbye {
        /// In its words.
        detail: String,
    },
    /// The peer says that this end broke the protocol.
    #[error("the peer reports a protocol error: {detail}")]
    PeerRefused {
        /// In its words.
        detail: String,
    },
    /// The peer broke the protocol.
    #[error("protocol error of the peer: {0}")]
    Frame(#[from] FrameError),
    /// No byte moved for too long while there was work.
    #[error("no progress for {} s", silence.as_secs())]
    Silent {
        /// For how long.
        silence: Duration,
    },
    /// The network failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Why a put or a get over frames has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BulkError {
    /// The connection ended; a put may have been stored or not.
    #[error("connection to {peer} lost: {cause}")]
    Closed {
        /// The address and name of the peer.
        peer: Arc<str>,
        /// Why it ended.
        cause: Arc<CloseCause>,
    },
    /// No answer at the deadline; a put may have been stored or not.
    #[error("no answer from {peer} in time")]
    Deadline {
        /// The address and name of the peer.
        peer: Arc<str>,
    },
    /// The request does not fit into the protocol; nothing was sent.
    #[error("request refused before sending: {0}")]
    Request(FrameError),
}

impl BulkError {
    /// Whether it helps to try again.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Closed { cause, .. } => match **cause {
                CloseCause::Local
                | CloseCause::PeerClosed
                | CloseCause::PeerGoodbye { .. }
                | CloseCause::Silent { .. }
                | CloseCause::Io(_) => Retry::SamePeerLater,
                CloseCause::PeerRefused { .. } | CloseCause::Frame(_) => Retry::AnotherPeer,
            },
            Self::Deadline { .. } => Retry::AnotherPeer,
            Self::Request(_) => Retry::Never,
        }
    }
}

#[cfg(test)]
mod tests;
