//! gRPC: dialling it, knowing the caller in a handler, and serving a [`BulkService`] over it.

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::http::{self, Request, Uri};
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status, Streaming};
use tower::{Service, service_fn};
use us_proto::v1::{GetReply, GetRequest, PutReply, PutRequest};

use super::admission::{Admission, REFUSED};
use super::frame::check_items;
use super::shares::Share;
use super::{BulkService, CONNECT_TIMEOUT, ConnectError, dial};
use crate::tls::{ALPN_H2, ExpectedPeer, Identity, PeerIdentity, client_config};

/// Calls at once on one connection.
pub(super) const STREAMS_MAX: u32 = 256;
pub(super) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
pub(super) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Puts of one gRPC stream that the service works on at once.
const PUTS_INFLIGHT_MAX: usize = 16;

/// How much HTTP/2 lets travel unacknowledged. Larger windows cost memory a connection, smaller ones
/// cost waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Http2Windows {
    /// Of one call.
    pub stream_bytes: u32,
    /// Of all calls of a connection.
    pub connection_bytes: u32,
    /// The largest HTTP/2 frame taken.
    pub frame_bytes: u32,
}

impl Default for Http2Windows {
    fn default() -> Self {
        Self { stream_bytes: 2 << 20, connection_bytes: 8 << 20, frame_bytes: 256 << 10 }
    }
}

impl Http2Windows {
    /// What HTTP/2 and tonic do when they are not told otherwise.
    pub const STANDARD: Self =
        Self { stream_bytes: 65_535, connection_bytes: 65_535, frame_bytes: 16_384 };
}

/// A gRPC channel to `address` ("host:port"), where `expected` must answer. The first connection is
/// made at once; when it is lost the channel makes another with the next call.
///
/// # Errors
/// [`ConnectError`].
pub async fn connect_grpc(
    address: &str,
    identity: &Identity,
    expected: ExpectedPeer,
) -> Result<Channel, ConnectError> {
    connect_grpc_with(address, identity, expected, Http2Windows::default()).await
}

/// [`connect_grpc`] with other windows.
///
/// # Errors
/// [`ConnectError`].
pub async fn connect_grpc_with(
    address: &str,
    identity: &Identity,
    expected: ExpectedPeer,
    windows: Http2Windows,
) -> Result<Channel, ConnectError> {
    let wrong = |source| ConnectError::Identity { address: address.to_owned(), source };
    client_config(identity, &[ALPN_H2]).map_err(wrong)?;
    let (target, identity): (Arc<str>, _) = (address.into(), identity.clone());
    let connector = service_fn(move |_: Uri| {
        // Made anew for each connection: the certificate may have been renewed.
        let (target, config) = (Arc::clone(&target), client_config(&identity, &[ALPN_H2]));
        async move {
            let config = config.map_err(io::Error::other)?;
            let dialled = dial::dial(&target, config, expected).await;
            dialled.map(|(stream, _)| TokioIo::new(stream)).map_err(io::Error::other)
        }
    });
    // The name is for HTTP/2's authority only: the connector knows where to dial.
    Endpoint::from_static("http://us")
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(windows.stream_bytes)
        .initial_connection_window_size(windows.connection_bytes)
        .max_frame_size(windows.frame_bytes)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
        .map_err(|error| ConnectError::Grpc {
            address: address.to_owned(),
            detail: innermost(&error),
        })
}

/// The reason below all wrappers: the connector's own error says all that matters.
pub(super) fn innermost(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Who calls.
///
/// # Errors
/// `UNAUTHENTICATED` for a request that did not come through [`Server`](super::Server).
pub fn peer_of<T>(request: &tonic::Request<T>) -> Result<&PeerIdentity, Status> {
    let peer = request.extensions().get::<PeerIdentity>();
    peer.ok_or_else(|| Status::unauthenticated("the connection has no peer certificate"))
}

/// `Fragments.Put` by a [`BulkService`].
///
/// # Errors
/// `UNAUTHENTICATED` as [`peer_of`]; what happens to a put is in its reply.
pub fn grpc_put<S: BulkService>(
    service: Arc<S>,
    request: tonic::Request<Streaming<PutRequest>>,
) -> Result<Response<BoxStream<'static, Result<PutReply, Status>>>, Status> {
    let peer = Arc::new(peer_of(&request)?.clone());
    let replies = request.into_inner().map(move |put| {
        let (service, peer) = (Arc::clone(&service), Arc::clone(&peer));
        async move {
            let put = put?;
            let request = put.request;
            Ok(PutReply { request, ..service.put(&peer, put).await })
        }
    });
    Ok(Response::new(replies.buffer_unordered(PUTS_INFLIGHT_MAX).boxed()))
}

/// `Fragments.Get` by a [`BulkService`].
///
/// # Errors
/// `UNAUTHENTICATED` as [`peer_of`]; `INVALID_ARGUMENT` for too many items.
pub fn grpc_get<S: BulkService>(
    service: &S,
    request: tonic::Request<GetRequest>,
) -> Result<Response<BoxStream<'static, Result<GetReply, Status>>>, Status> {
    let peer = peer_of(&request)?.clone();
    let get = request.into_inner();
    check_items(&get).map_err(|error| Status::invalid_argument(error.to_string()))?;
    let request = get.request;
    let replies = service.get(&peer, get).map(move |reply| Ok(GetReply { request, ..reply }));
    Ok(Response::new(replies.boxed()))
}

/// The address somebody without certificate calls from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallerAddress(pub SocketAddr);

/// Who is at the other end of a connection.
#[derive(Debug)]
pub(super) enum Whom {
    /// A member, and what it may have under way; asked for each call whether it still is one.
    Member(Arc<PeerIdentity>, Admission, Arc<Share>),
    /// Somebody without certificate.
    Newcomer(SocketAddr),
}

/// What a member hears that has as many calls under way as it may.
const TOO_MANY_CALLS: &str =
    "this certificate has as many calls under way as it may, over all its connections";

/// Routes whose handlers find who calls among the request's extensions: the [`PeerIdentity`] of a
/// member, the [`CallerAddress`] of a newcomer. A member that is refused is told so, whatever it asks, and
/// so is one with too many calls; a call is under way until its answer's body ends.
#[derive(Clone, Debug)]
pub(super) struct WithCaller {
    pub(super) routes: Routes,
    pub(super) whom: Arc<Whom>,
}

impl<B> Service<Request<B>> for WithCaller
where
    Routes: Service<Request<B>, Response = http::Response<Body>>,
    <Routes as Service<Request<B>>>::Future: Send + 'static,
    <Routes as Service<Request<B>>>::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = <Routes as Service<Request<B>>>::Error;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.routes.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let answer = |status: Status| -> Self::Future {
            Box::pin(std::future::ready(Ok(status.into_http())))
        };
        let turn = match &*self.whom {
            Whom::Member(peer, admission, _) if admission.refuses(peer) => {
                return answer(Status::unauthenticated(REFUSED));
            }
            Whom::Member(peer, _, share) => {
                let Ok(turn) = Arc::clone(&share.calls).try_acquire_owned() else {
                    metrics::counter!("us_calls_refused_total").increment(1);
                    return answer(Status::resource_exhausted(TOO_MANY_CALLS));
                };
                request.extensions_mut().insert(PeerIdentity::clone(peer));
                Some(turn)
            }
            Whom::Newcomer(address) => {
                request.extensions_mut().insert(CallerAddress(*address));
                None
            }
        };
        let answered = self.routes.call(request);
        Box::pin(async move {
            let hold = |body: Body| {
                Body::new(body.map_frame(move |frame| {
                    let _held = &turn;
                    frame
                }))
            };
            Ok(answered.await?.map(hold))
        })
    }
}
