//! The mount's one stream with the directory: opening and resuming it, keeping it alive, and moving
//! messages between it and the core.
//!
//! [`log`] is the pure part. [`DirectoryLink`] is the way to a directory: gRPC in a real mount, the
//! directory's engine itself in tests. The task in `stream` owns the connection: it sends what the
//! core has queued, hands every answer to the core, renews the session, and after a disconnect
//! connects again, resumes, reclaims and replays. It holds no lock while it waits.
//!
//! What may fail: the directory is unreachable (the task tries for ever, operations run into their
//! deadlines), or it ends the session ([`SessionError::Ended`]): then the rescue file is written.

pub mod grpc;
pub mod log;
pub(crate) mod rescue;
pub(crate) mod stream;

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::sync::mpsc;
use us_proto::v1;

/// Messages that may wait for the connection.
pub const UP_QUEUE_MAX: usize = 16;

/// Why there is no session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// No connection, or it broke.
    #[error("no connection with the directory: {detail}")]
    Unreachable {
        /// What happened.
        detail: String,
    },
    /// The directory did not answer in time.
    #[error("the directory did not answer within {waited_ms} ms")]
    Timeout {
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// The directory ended the session, or refused to open one.
    #[error("the directory ended the session ({reason}): {detail}")]
    Ended {
        /// Its reason.
        reason: &'static str,
        /// Its words.
        detail: String,
    },
    /// The directory's answer makes no sense.
    #[error("the directory answered something unexpected: {detail}")]
    Protocol {
        /// What.
        detail: String,
    },
}

impl SessionError {
    /// Whether another try can help.
    pub const fn is_final(&self) -> bool {
        match self {
            Self::Ended { .. } | Self::Protocol { .. } => true,
            Self::Unreachable { .. } | Self::Timeout { .. } => false,
        }
    }
}

/// One connection with a directory: messages up, messages down, in order. Dropping it disconnects.
pub struct LinkStream {
    /// To the directory.
    pub up: mpsc::Sender<v1::SessionUp>,
    /// From the directory; its end is a disconnect.
    pub down: BoxStream<'static, Result<v1::SessionDown, SessionError>>,
}

/// The way to a directory.
pub trait DirectoryLink: Send + Sync + 'static {
    /// A new connection.
    fn connect(&self) -> BoxFuture<'_, Result<LinkStream, SessionError>>;
}
