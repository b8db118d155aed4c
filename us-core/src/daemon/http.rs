//! `/metrics` (Prometheus) and `/healthz` of every daemon, on an address of its own: over TLS with both
//! certificates, or in plain HTTP on a Unix socket. There is no plain HTTP on the network.
//!
//! Over TLS the peer must be a client, an administrator or the directory itself: what it reads here is
//! less than `usctl status` tells them. Each connection answers one request, so that a key that is
//! revoked reads nothing more.
//!
//! Names of metrics start with `us_` and are listed in docs/metrics.md. The recorder belongs to the
//! process: whoever asks first installs it.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::FutureExt;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use rustls::ServerConfig;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::shutdown::Shutdown;
use crate::tls::{ALPN_HTTP1, Identity, PeerIdentity, Role, server_config};
use crate::wire::admission::Admission;
use crate::wire::{MemberStream, accept_member};

/// Handshakes at once, and how long each may take.
const HANDSHAKES_MAX: usize = 16;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// After a failed accept (no file descriptors left) the next try waits this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Mode of a socket in the file system.
const SOCKET_MODE: u32 = 0o660;
/// How often idle histogram samples are folded, so that an unscraped daemon does not grow.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// Says whether the daemon can do its work: `Err` says, for people, why not. Called for every
/// request to `/healthz`; must not block.
pub type HealthCheck = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The process's metrics. The first call installs the recorder; before it, metrics go nowhere.
///
/// # Panics
/// When another library has installed a recorder of its own.
pub fn metrics_handle() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        PrometheusBuilder::new()
            .install_recorder()
            .expect("nobody but this function installs a recorder")
    })
}

/// The two routes, to be merged with a daemon's own (the directory's dashboard).
pub fn router(health: HealthCheck) -> Router {
    let handle = metrics_handle();
    let metrics = move || async move {
        record_process();
        ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], handle.render())
    };
    let healthz = move || {
        let answer = health();
        async move {
            match answer {
                Ok(()) => (StatusCode::OK, "ok\n".to_owned()).into_response(),
                Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
            }
        }
    };
    Router::new().route("/metrics", get(metrics)).route("/healthz", get(healthz))
}

/// Where `/metrics` and `/healthz` are served: `unix:PATH`, or `IP:PORT` for TLS.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MetricsAddress {
    /// A socket in the file system, made with mode 0660.
    Unix(PathBuf),
    /// TLS on a port; port 0 takes any.
    Tls(SocketAddr),
}

/// A text that is no [`MetricsAddress`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no address for metrics: write unix:PATH, or IP:PORT for TLS")]
pub struct MetricsAddressError {
    text: String,
}

impl FromStr for MetricsAddress {
    type Err = MetricsAddressError;

    fn from_str(text: &str) -> Result<Self, MetricsAddressError> {
        match text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            Some(path) => Ok(Self::Unix(path.into())),
            None => {
                let wrong = |_| MetricsAddressError { text: text.to_owned() };
                text.parse().map(Self::Tls).map_err(wrong)
            }
        }
    }
}

impl TryFrom<String> for MetricsAddress {
    type Error = MetricsAddressError;

    fn try_from(text: String) -> Result<Self, MetricsAddressError> {
        text.parse()
    }
}

impl From<MetricsAddress> for String {
    fn from(address: MetricsAddress) -> Self {
        address.to_string()
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tls(address) => address.fmt(f),
        }
    }
}

/// Serves `router` on `address` until the shutdown, as tasks of `shutdown`; over TLS as `identity`, to
/// whom `admission` lets in. Returns the address bound.
///
/// # Errors
/// When the address cannot be bound, or the identity cannot be used.
pub async fn serve(
    address: &MetricsAddress,
    identity: &Identity,
    admission: Admission,
    router: Router,
    shutdown: &Shutdown,
) -> io::Result<MetricsAddress> {
    let router = router.layer(axum::middleware::map_response(close));
    let ended = shutdown.token().clone().cancelled_owned();
    let bound = match address {
        MetricsAddress::Unix(path) => {
            let listener = bind_socket(path)?;
            let served = axum::serve(listener, router).with_graceful_shutdown(ended);
            shutdown.tasks().spawn(served.into_future().map(|served| report(&served)));
            address.clone()
        }
        MetricsAddress::Tls(address) => {
            let listener = TcpListener::bind(address).await?;
            let bound = listener.local_addr()?;
            let (ready, finished) = mpsc::channel(HANDSHAKES_MAX);
            let config = server_config(identity, &[ALPN_HTTP1]).map_err(io::Error::other)?;
            let handshakes = Handshakes { identity: identity.clone(), config, admission, ready };
            shutdown.tasks().spawn(handshakes.run(listener, shutdown.token().clone()));
            let finished = Finished { finished, bound };
            let served = axum::serve(finished, router).with_graceful_shutdown(ended);
            shutdown.tasks().spawn(served.into_future().map(|served| report(&served)));
            MetricsAddress::Tls(bound)
        }
    };
    let token = shutdown.token().clone();
    shutdown.tasks().spawn(async move {
        // Cancel-safe: the sleep has no state worth keeping, and a dropped upkeep is done later.
        while token.run_until_cancelled(tokio::time::sleep(UPKEEP_EVERY)).await.is_some() {
            metrics_handle().run_upkeep();
        }
    });
    Ok(bound)
}

fn report(served: &io::Result<()>) {
    if let Err(error) = served {
        tracing::error!(%error, "the metrics server ended");
    }
}

async fn close(mut response: Response) -> Response {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Takes the place of a socket that a killed daemon left.
fn bind_socket(path: &Path) -> io::Result<UnixListener> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
    Ok(listener)
}

/// Accepts and shakes hands, each peer by itself, so that a slow one holds up nobody.
struct Handshakes {
    identity: Identity,
    config: Arc<ServerConfig>,
    admission: Admission,
    ready: mpsc::Sender<(MemberStream, SocketAddr)>,
}

impl Handshakes {
    async fn run(mut self, listener: TcpListener, stop: CancellationToken) {
        let turns = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        let mut renewals = self.identity.renewals();
        loop {
            let accepting = async {
                let turn = Arc::clone(&turns).acquire_owned().await.ok()?;
                Some((listener.accept().await, turn))
            };
            // Cancel-safe: a turn not used is given back, accept loses no connection.
            let Some(Some((accepted, turn))) = stop.run_until_cancelled(accepting).await else {
                return;
            };
            let (tcp, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if self.identity.renewals() != renewals {
                renewals = self.identity.renewals();
                // `Identity::renew` has looked at it.
                if let Ok(renewed) = server_config(&self.identity, &[ALPN_HTTP1]) {
                    self.config = renewed;
                }
            }
            let (config, admission) = (Arc::clone(&self.config), self.admission.clone());
            let ready = self.ready.clone();
            tokio::spawn(async move {
                let _turn = turn;
                match tokio::time::timeout(HANDSHAKE_TIMEOUT, accept_member(tcp, config)).await {
                    Ok(Ok((stream, peer))) if may_read(&peer) && !admission.refuses(&peer) => {
                        // The server has ended where nobody takes it.
                        let _ended = ready.send((stream, address)).await;
                    }
                    Ok(Ok((_, peer))) => tracing::info!(%address, %peer, "may not read metrics"),
                    Ok(Err(error)) => tracing::info!(%address, %error, "TLS handshake refused"),
                    Err(_elapsed) => tracing::info!(%address, "TLS handshake took too long"),
                }
            });
        }
    }
}

fn may_read(peer: &PeerIdentity) -> bool {
    match peer.role {
        Role::Admin | Role::Client | Role::Directory => true,
        Role::Provider => false,
    }
}

/// Connections whose handshake is done.
struct Finished {
    finished: mpsc::Receiver<(MemberStream, SocketAddr)>,
    bound: SocketAddr,
}

impl axum::serve::Listener for Finished {
    type Io = MemberStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (MemberStream, SocketAddr) {
        match self.finished.recv().await {
            Some(accepted) => accepted,
            // The shutdown ends the server.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.bound)
    }
}

fn record_process() {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return };
    let resident = status.lines().find_map(|line| {
        line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    if let Some(kib) = resident {
        metrics::gauge!("process_resident_memory_bytes").set((kib << 10) as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use crate::tls::{CertificateAuthority, ExpectedPeer, client_config};
    use crate::wire::admission::{Door, RefusedKeys};
    use tokio::io::{AsyncRead, AsyncWrite};

    async fn ask(
        mut stream: impl AsyncRead + AsyncWrite + Unpin,
        path: &str,
    ) -> io::Result<String> {
        // Kept alive, if it were for the caller.
        let request = format!("GET {path} HTTP/1.1\r\nHost: us\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    fn well() -> HealthCheck {
        Arc::new(|| Ok(()))
    }

    #[test]
    fn addresses_are_texts() {
        for text in ["unix:/run/us/metrics", "127.0.0.1:9460", "[::1]:0"] {
            assert_eq!(text.parse::<MetricsAddress>().unwrap().to_string(), text);
        }
        for text in ["", "unix:", "9460", "http://h"] {
            assert!(text.parse::<MetricsAddress>().is_err(), "{text}");
        }
    }

    /// Who may read over TLS: members but providers, and nobody whose key is refused. Plain HTTP gets no
    /// answer.
    #[tokio::test]
    async fn metrics_over_tls_are_for_members() {
        let ca = CertificateAuthority::create().unwrap();
        let own = ca.issue(Role::Provider, "attic").unwrap();
        let door = Door::new(RefusedKeys::default());
        let (shutdown, any) = (Shutdown::new(), "127.0.0.1:0".parse().unwrap());
        let bound = serve(&any, &own, door.admission(), router(well()), &shutdown).await.unwrap();
        let MetricsAddress::Tls(address) = bound else { panic!("{bound}") };
        let fetch = async |identity: &Identity| {
            let config = client_config(identity, &[ALPN_HTTP1]).unwrap();
            let expected = ExpectedPeer::key(Role::Provider, own.own().key_hash);
            let dialled = crate::wire::dial(&address.to_string(), config, expected).await;
            ask(dialled.unwrap(), "/healthz").await.unwrap_or_default()
        };
        for role in [Role::Client, Role::Admin, Role::Directory] {
            let answer = fetch(&ca.issue(role, "reader").unwrap()).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{role}: {answer}");
        }
        assert_eq!(fetch(&ca.issue(Role::Provider, "other").unwrap()).await, "");
        let revoked = ca.issue(Role::Client, "reader").unwrap();
        assert!(fetch(&revoked).await.starts_with("HTTP/1.1 200"));
        door.refuse([revoked.own().key_hash].into_iter().collect());
        assert_eq!(fetch(&revoked).await, "");
        let plain = tokio::net::TcpStream::connect(address).await.unwrap();
        let answer = ask(plain, "/healthz").await.unwrap_or_default();
        assert!(!answer.contains("HTTP"), "{answer:?}");
        shutdown.request();
        shutdown.drain("http", Duration::from_secs(5)).await.unwrap();
    }

    #[tokio::test]
    async fn health_and_metrics_are_served_until_the_end() {
        let well = Arc::new(AtomicBool::new(true));
        let health: HealthCheck = Arc::new({
            let well = Arc::clone(&well);
            move || if well.load(Ordering::Relaxed) { Ok(()) } else { Err("disk full".into()) }
        });
        let shutdown = Shutdown::new();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics");
        // One that was killed left its socket.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let own = CertificateAuthority::create().unwrap().issue(Role::Provider, "attic").unwrap();
        let address = MetricsAddress::Unix(path.clone());
        let admission = Admission::default();
        serve(&address, &own, admission.clone(), router(health), &shutdown).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        let second = serve(&address, &own, admission, router(self::well()), &shutdown).await;
        assert!(second.is_err(), "one that runs is not pushed aside");
        let fetch = async |path: &str| {
            let stream = tokio::net::UnixStream::connect(dir.path().join("metrics")).await.unwrap();
            ask(stream, path).await.unwrap()
        };
        metrics::counter!("us_test_total").increment(3);
        assert!(fetch("/healthz").await.starts_with("HTTP/1.1 200"));
        let metrics = fetch("/metrics").await;
        assert!(metrics.contains("us_test_total 3"), "{metrics}");
        assert!(metrics.contains("process_resident_memory_bytes"), "{metrics}");
        well.store(false, Ordering::Relaxed);
        let sick = fetch("/healthz").await;
        assert!(sick.starts_with("HTTP/1.1 503") && sick.contains("disk full"), "{sick}");
        shutdown.request();
        shutdown.drain("http", Duration::from_secs(5)).await.unwrap();
    }
}
