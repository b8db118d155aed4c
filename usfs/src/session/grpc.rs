//! The session's stream over gRPC with mutual TLS.

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryFutureExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use us_core::tls::{ExpectedPeer, Identity};
use us_core::wire::{GRPC_MESSAGE_BYTES_MAX, connect_grpc};
use us_proto::v1;
use us_proto::v1::sessions_client::SessionsClient;

use super::{DirectoryLink, LinkStream, SessionError, UP_QUEUE_MAX};

/// A directory somewhere else.
pub struct GrpcLink {
    address: String,
    identity: Identity,
    expected: ExpectedPeer,
}

impl GrpcLink {
    /// The directory at `address` (host:port), where `identity` is who we are.
    pub const fn new(address: String, identity: Identity, expected: ExpectedPeer) -> Self {
        Self { address, identity, expected }
    }

    async fn open(&self) -> Result<LinkStream, SessionError> {
        let unreachable = |detail: String| SessionError::Unreachable { detail };
        let channel = connect_grpc(&self.address, &self.identity, self.expected)
            .map_err(|error| unreachable(error.to_string()))
            .await?;
        let mut client = SessionsClient::new(channel)
            .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX);
        let (up, queue) = mpsc::channel(UP_QUEUE_MAX);
        let down = client
            .open(ReceiverStream::new(queue))
            .map_err(failure)
            .await?
            .into_inner()
            .map(|message| message.map_err(failure));
        Ok(LinkStream { up, down: down.boxed() })
    }
}

/// Who is told that its certificate is refused need not try again.
fn failure(status: tonic::Status) -> SessionError {
    let detail = status.message().to_owned();
    match status.code() {
        tonic::Code::Unauthenticated => {
            SessionError::Ended { reason: v1::EndReason::Revoked.as_str_name(), detail }
        }
        _ => SessionError::Unreachable { detail },
    }
}

impl DirectoryLink for GrpcLink {
    fn connect(&self) -> BoxFuture<'_, Result<LinkStream, SessionError>> {
        self.open().boxed()
    }
}
