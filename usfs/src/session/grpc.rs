//! The session's stream over gRPC with mutual TLS.

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryFutureExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use us_core::tls::{ExpectedPeer, Identity};
use us_core::wire::{GRPC_MESSAGE_BYTES_MAX, connect_grpc};
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
            .map_err(|status| unreachable(status.message().to_owned()))
            .await?
            .into_inner()
            .map(move |message| message.map_err(|status| unreachable(status.message().to_owned())));
        Ok(LinkStream { up, down: down.boxed() })
    }
}

impl DirectoryLink for GrpcLink {
    fn connect(&self) -> BoxFuture<'_, Result<LinkStream, SessionError>> {
        self.open().boxed()
    }
}
