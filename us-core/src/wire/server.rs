//! The one port of a daemon.

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tracing::{debug, info, warn};

use super::admission::{Admission, FAREWELL};
use super::dial::{self, Caller, Framed, Secured, Shown};
use super::frame_io::byte_limit;
use super::grpc::{self, Http2Windows, Whom, WithCaller};
use super::served::serve_frames;
use super::shares::{Handshakes, Share, ShareLimits, Shares};
use super::{BulkLimits, BulkService, CONNECT_TIMEOUT};
use crate::tls::{
    ALPN_BULK, ALPN_H2, Identity, PeerIdentity, TlsError, join_server_config, server_config,
};

/// After a failed accept (no file descriptors left) the next try waits this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Newcomers at once, how long each may stay, and its calls at once.
const NEWCOMERS_MAX: usize = 16;
const NEWCOMER_STAY: Duration = Duration::from_secs(30);
const NEWCOMER_STREAMS_MAX: u32 = 2;

/// What a server holds at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// Connections at once; further ones wait in the system's queue.
    pub connections_max: usize,
    /// A peer that has not finished its TLS handshake by then is dropped.
    pub handshake_timeout: Duration,
    /// After a shutdown, requests under way get this long to finish.
    pub drain_timeout: Duration,
    /// Bytes of bodies received on all framed connections together and not yet consumed.
    pub received_bytes_max: usize,
    /// Windows of each gRPC connection.
    pub http2: Http2Windows,
    /// Limits of each framed connection.
    pub bulk: BulkLimits,
    /// What one identity may hold.
    pub share: ShareLimits,
    /// TLS handshakes under way of one address, or network of IPv6; more are dropped unread.
    pub handshakes_address_max: usize,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections_max: 1024,
            handshake_timeout: CONNECT_TIMEOUT,
            drain_timeout: Duration::from_secs(10),
            received_bytes_max: 256 << 20,
            http2: Http2Windows::default(),
            bulk: BulkLimits::default(),
            share: ShareLimits::default(),
            handshakes_address_max: 128,
        }
    }
}

type BoxFuture = Pin<Box<dyn Future<Output = ()> + Send>>;
type ServeFrames =
    dyn Fn(Framed, Arc<PeerIdentity>, Arc<Share>, CancellationToken) -> BoxFuture + Send + Sync;

/// Serves gRPC and frames on one port, to peers of the same cluster.
pub struct Server {
    identity: Identity,
    limits: ServerLimits,
    grpc: Option<Routes>,
    bulk: Option<Arc<ServeFrames>>,
    join: Option<Routes>,
    admission: Admission,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("identity", &self.identity).finish_non_exhaustive()
    }
}

struct Port {
    grpc: Option<Routes>,
    bulk: Option<Arc<ServeFrames>>,
    join: Option<Routes>,
    newcomers: Semaphore,
    admission: Admission,
    shutdown: CancellationToken,
    limits: ServerLimits,
    shares: Shares,
    handshakes: Arc<Handshakes>,
}

/// The TLS configurations, made again when the certificate was renewed.
struct Showing {
    identity: Identity,
    alpn: Vec<&'static [u8]>,
    joins: bool,
    renewals: u64,
    shown: Shown,
}

impl Showing {
    fn new(identity: Identity, alpn: Vec<&'static [u8]>, joins: bool) -> Result<Self, TlsError> {
        let renewals = identity.renewals();
        let members = server_config(&identity, &alpn)?;
        let newcomers = joins.then(|| join_server_config(&identity)).transpose()?;
        Ok(Self { identity, alpn, joins, renewals, shown: Shown { members, newcomers } })
    }

    fn now(&mut self) -> Shown {
        if self.identity.renewals() != self.renewals {
            match Self::new(self.identity.clone(), self.alpn.clone(), self.joins) {
                Ok(renewed) => *self = renewed,
                // `Identity::renew` has looked at it; the old one is still good.
                Err(error) => warn!(%error, "the renewed certificate is not shown"),
            }
        }
        self.shown.clone()
    }
}

impl Server {
    /// A server that speaks nothing yet.
    pub fn new(identity: &Identity, limits: ServerLimits) -> Self {
        let admission = Admission::default();
        Self { identity: identity.clone(), limits, grpc: None, bulk: None, join: None, admission }
    }

    /// Asks this who is refused.
    #[must_use]
    pub fn admission(mut self, admission: Admission) -> Self {
        self.admission = admission;
        self
    }

    /// Serves these gRPC services, and nothing else, to callers without certificate.
    #[must_use]
    pub fn join(mut self, routes: Routes) -> Self {
        self.join = Some(routes.prepare());
        self
    }

    /// Serves these gRPC services; their handlers find the [`PeerIdentity`] with
    /// [`peer_of`](super::peer_of).
    #[must_use]
    pub fn grpc(mut self, routes: Routes) -> Self {
        self.grpc = Some(routes.prepare());
        self
    }

    /// Serves fragments in frames.
    #[must_use]
    pub fn bulk<S: BulkService>(mut self, service: Arc<S>) -> Self {
        let received = byte_limit(self.limits.received_bytes_max);
        let limits = self.limits.bulk;
        self.bulk = Some(Arc::new(move |stream, peer, share, shutdown| {
            let (service, received) = (Arc::clone(&service), Arc::clone(&received));
            Box::pin(async move {
                let name = peer.to_string();
                let served =
                    serve_frames(service, peer, stream, limits, &share, received, shutdown);
                let cause = served.await;
                debug!(peer = name, %cause, "framed connection ended");
            })
        }));
        self
    }

    /// Accepts connections until `shutdown`; then refuses new ones, lets those under way finish for
    /// the drain timeout, and returns.
    ///
    /// # Errors
    /// [`TlsError`] when the identity makes no TLS configuration. What happens on a connection ends
    /// that connection only.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: CancellationToken,
    ) -> Result<(), TlsError> {
        let mut alpn = Vec::new();
        alpn.extend(self.grpc.is_some().then_some(ALPN_H2));
        alpn.extend(self.bulk.is_some().then_some(ALPN_BULK));
        let mut showing = Showing::new(self.identity, alpn, self.join.is_some())?;
        let limits = self.limits;
        let port = Arc::new(Port {
            grpc: self.grpc,
            bulk: self.bulk,
            join: self.join,
            newcomers: Semaphore::new(NEWCOMERS_MAX),
            admission: self.admission,
            shutdown: shutdown.clone(),
            limits,
            shares: Shares::new(limits.share),
            handshakes: Handshakes::new(limits.handshakes_address_max),
        });
        let connections = Arc::new(Semaphore::new(limits.connections_max));
        let (tracker, abort) = (TaskTracker::new(), CancellationToken::new());
        loop {
            let (tcp, address, permit) = tokio::select! {
                // Cancel-safe: a token stays cancelled.
                () = shutdown.cancelled() => break,
                // Cancel-safe: a permit not used is given back, accept loses no connection.
                accepted = accept(&listener, &connections) => match accepted {
                    Some(accepted) => accepted,
                    None => break,
                },
            };
            let (port, shown, abort) = (Arc::clone(&port), showing.now(), abort.clone());
            tracker.spawn(async move {
                let _permit = permit;
                tokio::select! {
                    // Cancel-safe: dropped only after the drain timeout.
                    () = port.connection(tcp, address, shown) => {}
                    // Cancel-safe: a token stays cancelled.
                    () = abort.cancelled() => {}
                }
            });
        }
        drop(listener);
        tracker.close();
        if timeout(limits.drain_timeout, tracker.wait()).await.is_err() {
            warn!(connections = tracker.len(), "requests still under way at shutdown are dropped");
            abort.cancel();
            tracker.wait().await;
        }
        Ok(())
    }
}

/// The next connection, when there is room for one. `None` never happens: the semaphore stays open.
async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let permit = Arc::clone(connections).acquire_owned().await.ok()?;
    loop {
        match listener.accept().await {
            Ok((tcp, address)) => return Some((tcp, address, permit)),
            Err(error) => {
                warn!(%error, "accept failed");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// What a member wants to speak.
enum Wish {
    Frames(Box<Framed>),
    Grpc(Box<Secured>),
}

impl Port {
    async fn connection(&self, tcp: TcpStream, address: SocketAddr, shown: Shown) {
        let Some(shaking) = self.handshakes.begin(address.ip()) else {
            return debug!(%address, "too many handshakes under way from there");
        };
        let handshake = timeout(self.limits.handshake_timeout, dial::accept(tcp, shown));
        let caller = match handshake.await {
            Ok(Ok(caller)) => caller,
            Ok(Err(error)) => return info!(%address, %error, "TLS handshake refused"),
            Err(_) => return info!(%address, "TLS handshake took too long"),
        };
        drop(shaking);
        match caller {
            Caller::Newcomer(stream) => self.newcomer(stream, address).await,
            Caller::Framed(stream, peer) => {
                self.member(Wish::Frames(stream), Arc::new(peer), address).await;
            }
            Caller::Member(stream, peer, Some(alpn)) if alpn == ALPN_H2 => {
                self.member(Wish::Grpc(Box::new(stream)), Arc::new(peer), address).await;
            }
            Caller::Member(_, peer, _) => {
                info!(%address, %peer, "the peer asked for no protocol that is served here");
            }
        }
    }

    async fn member(&self, wish: Wish, peer: Arc<PeerIdentity>, address: SocketAddr) {
        debug!(%address, %peer, "connected");
        let Some((share, _place)) = self.shares.enter(&peer) else {
            metrics::counter!("us_connections_refused_total").increment(1);
            return warn!(%address, %peer, "it has too many connections already");
        };
        self.admission.met(&peer);
        let cut_off = || info!(%address, %peer, "refused: it is a member no more");
        match (wish, &self.bulk, &self.grpc) {
            (Wish::Frames(stream), Some(bulk), _) => tokio::select! {
                // Before anything is read: it may be refused already.
                biased;
                // Cancel-safe: it only waits.
                () = self.admission.refused(&peer) => cut_off(),
                // Cancel-safe: a connection that is cut loses what is under way, as it is to.
                () = bulk(*stream, Arc::clone(&peer), share, self.shutdown.clone()) => {}
            },
            (Wish::Grpc(stream), _, Some(routes)) => {
                let whom = Whom::Member(Arc::clone(&peer), self.admission.clone(), share);
                let farewell = async {
                    self.admission.refused(&peer).await;
                    // Meanwhile every call hears why.
                    sleep(FAREWELL).await;
                };
                let serving = self.http2(*stream, routes.clone(), whom, grpc::STREAMS_MAX);
                tokio::select! {
                    // Cancel-safe, both: as above.
                    () = farewell => cut_off(),
                    served = serving => if let Err(error) = served {
                        debug!(%address, %error, "gRPC connection ended");
                    },
                }
            }
            _ => info!(%address, "the peer asked for no protocol that is served here"),
        }
    }

    async fn newcomer(&self, stream: Secured, address: SocketAddr) {
        let Some(routes) = self.join.clone() else { return };
        let Ok(_turn) = self.newcomers.try_acquire() else {
            return info!(%address, "too many newcomers at once: this one is to try again");
        };
        let whom = Whom::Newcomer(address);
        let joining = self.http2(stream, routes, whom, NEWCOMER_STREAMS_MAX);
        if timeout(NEWCOMER_STAY, joining).await.is_err() {
            debug!(%address, "a newcomer took too long");
        }
    }

    async fn http2(
        &self,
        stream: Secured,
        routes: Routes,
        whom: Whom,
        streams_max: u32,
    ) -> Result<(), io::Error> {
        let windows = self.limits.http2;
        let mut builder = auto::Builder::new(TokioExecutor::new()).http2_only();
        builder
            .http2()
            .timer(TokioTimer::new())
            .initial_stream_window_size(windows.stream_bytes)
            .initial_connection_window_size(windows.connection_bytes)
            .max_frame_size(windows.frame_bytes)
            .max_concurrent_streams(streams_max)
            .keep_alive_interval(grpc::KEEPALIVE_INTERVAL)
            .keep_alive_timeout(grpc::KEEPALIVE_TIMEOUT);
        let service = TowerToHyperService::new(WithCaller { routes, whom: Arc::new(whom) });
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        let ended = tokio::select! {
            // Cancel-safe: polled on below.
            ended = connection.as_mut() => ended,
            // Cancel-safe: a token stays cancelled.
            () = self.shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        ended.map_err(io::Error::other)
    }
}
