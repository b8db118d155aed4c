//! The daemon: store, service, membership, background work and control put together, and taken
//! apart in order.
//!
//! ```text
//! begin: lock and open the store -> listen -> serve -> join
//! end:   say goodbye -> end rebuilding -> refuse and drain requests -> stop background work
//!        -> close the store
//! ```

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use us_core::daemon::files::{Access, write_atomic};
use us_core::daemon::joined::Profile;
use us_core::daemon::shutdown::Shutdown;
use us_core::daemon::{heap, http, logging};
use us_core::tls::{Identity, TlsError};
use us_core::wire::join::keep_renewed;
use us_core::wire::{GRPC_MESSAGE_BYTES_MAX, Server, ServerLimits};
use us_proto::v1::fragments_server::FragmentsServer;
use us_proto::v1::recovery_server::RecoveryServer;

use crate::config::ProviderConfig;
use crate::control::{self, Controlled};
use crate::copies::{Copies, LogError};
use crate::grants::Grants;
use crate::guest::{Pause, ScrubRequests, run_background};
use crate::leave::Leave;
use crate::membership::refused::RefusedList;
use crate::membership::{About, FileError, Hands, LinkConfig, LinkEnd, MembershipFiles};
use crate::rebuild::{PeerLinks, Peers, RebuildLimits, Rebuilder};
use crate::service::{FragmentService, RecoveryService};
use crate::store::{OpenError, Store};

/// How often the figures of /metrics are brought up to date.
const GAUGES_EVERY: Duration = Duration::from_secs(2);
/// How long the memory of a busy time is kept for the next.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(60);
/// Requests under way get this long at the end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the daemon does not run, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A setting is missing.
    #[error("{setting} is not set: join with `us-provider join`, or give --{setting}")]
    Setting {
        /// Its name.
        setting: &'static str,
    },
    /// The certificate cannot be used.
    #[error("no usable identity in {}: {source}", dir.display())]
    Identity {
        /// Where it was looked for.
        dir: PathBuf,
        /// What is wrong.
        #[source]
        source: TlsError,
    },
    /// The store does not open.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The copies of the directory's journal do not open.
    #[error(transparent)]
    Copies(#[from] LogError),
    /// An address, a file or the system refuses.
    #[error("cannot {action}")]
    Io {
        /// What was being done.
        action: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// TLS refuses the identity.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// It is a provider no more.
    #[error(
        "this provider has left for good; to join again with what is in {}, remove {}",
        data.display(), data.join("leaving").display()
    )]
    HasLeft {
        /// The data folder.
        data: PathBuf,
    },
    /// What it keeps of the directory cannot be read.
    #[error(transparent)]
    Files(#[from] FileError),
    /// Membership ended for good.
    #[error(transparent)]
    Membership(#[from] LinkEnd),
}

impl DaemonError {
    fn io(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }

    /// The exit code: 3 refused by the directory, 4 the store is in use, 5 it has left, 1 all else.
    pub fn exit_code(&self) -> u8 {
        use us_core::daemon::files::LockError;
        match self {
            Self::Membership(LinkEnd::Refused { .. }) => 3,
            Self::HasLeft { .. } => 5,
            Self::Store(OpenError::Lock(LockError::InUse { .. })) => 4,
            Self::Setting { .. }
            | Self::Identity { .. }
            | Self::Store(_)
            | Self::Copies(_)
            | Self::Io { .. }
            | Self::Tls(_)
            | Self::Files(_)
            | Self::Membership(LinkEnd::Files(_) | LinkEnd::Left) => 1,
        }
    }
}

/// A daemon that has its store and has not begun to serve.
#[derive(Debug)]
pub struct Daemon {
    config: ProviderConfig,
    directory: String,
    identity: Identity,
    store: Store,
    copies: Copies,
    leave: Leave,
    refused: RefusedList,
}

impl Daemon {
    /// Checks the configuration and opens the store. Blocks; call it before there is a runtime.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub fn open(config: ProviderConfig) -> Result<Self, DaemonError> {
        let mut config = config;
        let dir = config.identity_dir();
        let profile = Profile::load(&dir)
            .map_err(DaemonError::io("read what joining left"))?
            .unwrap_or_default();
        let joined = Some(profile.directory).filter(|joined| !joined.is_empty());
        let directory = config.directory.clone().or(joined);
        let directory = directory.ok_or(DaemonError::Setting { setting: "directory" })?;
        if config.site.is_empty() {
            config.site = profile.site;
        }
        let leave = Leave::load(&config.data);
        if leave.has_left() {
            return Err(DaemonError::HasLeft { data: config.data });
        }
        let identity =
            Identity::load(&dir).map_err(|source| DaemonError::Identity { dir, source })?;
        let store = Store::open(&config.data, config.store_options())?;
        let recovery = store.recovery();
        tracing::info!(
            data = %config.data.display(), fragments = store.state().fragments,
            took_ms = recovery.took.as_millis(), rebuilt = recovery.rebuilt,
            walked = recovery.records, cut = recovery.cut_bytes, damaged = recovery.damaged,
            "store open"
        );
        if recovery.has_lost_something() {
            tracing::error!("fragments may be missing: the directory will check them all");
            // A damaged file has no cookie to forget.
            if let Err(error) = MembershipFiles::new(&config.data).forget_cookie() {
                tracing::error!(%error, "the membership is not kept");
            }
        }
        let refused = RefusedList::load(MembershipFiles::new(&config.data))?;
        rebuild_after_panic(&store);
        let copies = Copies::start(&config.data, config.directory_copies.bytes())?;
        Ok(Self { config, directory, identity, store, copies, leave, refused })
    }

    /// Serves until `shutdown`; calls `ready` with the address once requests are answered.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub async fn run(
        self,
        shutdown: Shutdown,
        ready: impl FnOnce(&str, &Store),
    ) -> Result<(), DaemonError> {
        let pause = Pause::load(&self.config.data);
        let listener = TcpListener::bind(self.config.listen)
            .await
            .map_err(DaemonError::io(format!("listen on {}", self.config.listen)))?;
        let bound = listener.local_addr().map_err(DaemonError::io("learn the own address"))?;
        let address = match &self.config.advertise {
            Some(address) => address.clone(),
            None => reachable(bound, &self.directory).to_string(),
        };
        self.serve_metrics(&shutdown).await?;
        let (serving_stop, background_stop) = (CancellationToken::new(), CancellationToken::new());
        let peers: Arc<dyn Peers> = Arc::new(PeerLinks::new(self.identity.clone()));
        let grants = Grants::load(&self.config.data);
        tokio::spawn(grants.clone().keep_counted(background_stop.clone()));
        let (store, peered) = (self.store.clone(), Arc::clone(&peers));
        let service = FragmentService::new(store, grants.clone(), pause.clone(), peered);
        let recovery = RecoveryService::new(&self.config.data);
        let serving = tokio::spawn(
            server(&self.identity, service, recovery)
                .admission(self.refused.door().admission())
                .serve(listener, serving_stop.clone()),
        );
        write_atomic(&self.config.data.join("address"), address.as_bytes(), Access::Public)
            .map_err(DaemonError::io("write the file of the address"))?;
        self.serve_control(&pause, &address, &background_stop);
        let scrub = ScrubRequests::default();
        let background = tokio::spawn(run_background(
            self.store.clone(),
            self.config.guest,
            pause.clone(),
            scrub.clone(),
            background_stop.clone(),
        ));
        let gauges = tokio::spawn(keep_gauges(self.store.clone(), background_stop.clone()));
        let memory = tokio::spawn(heap::give_back_every(GIVE_BACK_EVERY, background_stop.clone()));
        let about = About {
            address: address.clone(),
            site: self.config.site.clone(),
            store: self.store.id(),
            line: (
                self.config.uplink_kib_per_s.saturating_mul(1024),
                self.config.downlink_kib_per_s.saturating_mul(1024),
            ),
        };
        let link = LinkConfig {
            directory: self.directory.clone(),
            identity: self.identity.clone(),
            about,
        };
        let renewing = keep_renewed(
            self.directory.as_str().into(),
            self.identity.clone(),
            self.config.identity_dir(),
            background_stop.clone(),
        );
        tokio::spawn(renewing);
        ready(&address, &self.store);
        let (store, limits) = (self.store.clone(), RebuildLimits::default());
        let (rebuilder, endings) =
            Rebuilder::new(store, pause.clone(), self.config.guest, peers, limits);
        let hands = Hands {
            store: self.store.clone(),
            grants,
            pause,
            guest: self.config.guest,
            leave: self.leave.clone(),
            rebuilder: rebuilder.clone(),
            endings,
            scrub,
            copies: self.copies.clone(),
            refused: self.refused.clone(),
        };
        // On a thread that waits for the network: the directory waits for its journal's copies.
        let membership = crate::membership::run(link, hands, shutdown.token().clone());
        let joined = match tokio::spawn(membership).await {
            Ok(joined) => joined,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        // From here on the end, in order. The goodbye is said.
        shutdown.request();
        let rebuilding = tokio::spawn(async move { rebuilder.close().await });
        ended("rebuilding", DRAIN_TIMEOUT, rebuilding).await;
        serving_stop.cancel();
        ended("requests", DRAIN_TIMEOUT, serving).await;
        background_stop.cancel();
        ended("background work", DRAIN_TIMEOUT, background).await;
        ended("figures", DRAIN_TIMEOUT, gauges).await;
        ended("memory", DRAIN_TIMEOUT, memory).await;
        let copies = self.copies;
        ended(
            "copies of the journal",
            DRAIN_TIMEOUT,
            tokio::task::spawn_blocking(move || copies.close()),
        )
        .await;
        let store = self.store.clone();
        ended("store", Duration::from_secs(60), tokio::task::spawn_blocking(move || store.close()))
            .await;
        let _ = std::fs::remove_file(control::socket_path(&self.config.data));
        match joined {
            Err(LinkEnd::Left) => {
                tracing::info!("this provider has left");
                Ok(())
            }
            joined => Ok(joined?),
        }
    }

    async fn serve_metrics(&self, shutdown: &Shutdown) -> Result<(), DaemonError> {
        let Some(address) = &self.config.metrics else { return Ok(()) };
        let store = self.store.clone();
        let health = move || store.state().trouble.map_or(Ok(()), Err);
        let router = http::router(Arc::new(health));
        let admission = self.refused.door().admission();
        let bound = http::serve(address, &self.identity, admission, router, shutdown)
            .await
            .map_err(DaemonError::io(format!("serve metrics on {address}")))?;
        tracing::info!(%bound, "metrics");
        Ok(())
    }

    /// Without the socket the daemon works; its owner only cannot talk to it.
    fn serve_control(&self, pause: &Pause, address: &str, stop: &CancellationToken) {
        match control::bind(&self.config.data) {
            Ok(listener) => {
                let controlled = Controlled {
                    store: self.store.clone(),
                    pause: pause.clone(),
                    leave: self.leave.clone(),
                    address: address.to_owned(),
                    directory: self.directory.clone(),
                };
                tokio::spawn(control::serve(listener, controlled, stop.clone()));
            }
            Err(error) => tracing::warn!(%error, "no control socket: status and pause do not work"),
        }
    }
}

fn server(identity: &Identity, service: FragmentService, recovery: RecoveryService) -> Server {
    let fragments = FragmentsServer::new(service.clone())
        .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX);
    let recovery = RecoveryServer::new(recovery)
        .max_encoding_message_size(crate::membership::MESSAGE_BYTES_MAX);
    Server::new(identity, ServerLimits::default())
        .grpc(Routes::new(fragments).add_service(recovery))
        .bulk(Arc::new(service))
}

/// Waits for a part to end, not for ever.
async fn ended<T>(part: &'static str, deadline: Duration, task: JoinHandle<T>) {
    match tokio::time::timeout(deadline, task).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::warn!(part, %error, "ended badly"),
        Err(_elapsed) => tracing::warn!(part, "still runs; left behind"),
    }
}

/// The index is not believed after a panic: it may have been the index's.
fn rebuild_after_panic(store: &Store) {
    logging::abort_on_panic();
    let store = store.clone();
    let abort = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        store.distrust_index();
        abort(panic);
    }));
}

async fn keep_gauges(store: Store, stop: CancellationToken) {
    // Cancel-safe: a dropped sleep loses nothing.
    while stop.run_until_cancelled(tokio::time::sleep(GAUGES_EVERY)).await.is_some() {
        let state = store.state();
        let gauges = [
            ("us_provider_capacity_bytes", state.capacity_bytes),
            ("us_provider_used_bytes", state.used_bytes),
            ("us_provider_free_bytes", state.free_bytes),
            ("us_provider_fragments", state.fragments),
            ("us_provider_trashed_fragments", state.trashed),
            ("us_provider_trashed_bytes", state.trashed_bytes),
            ("us_provider_damaged_fragments", state.damaged),
            ("us_provider_segments", state.segments),
            ("us_provider_write_trouble", state.trouble.is_some().into()),
        ];
        for (name, value) in gauges {
            metrics::gauge!(name).set(value as f64);
        }
    }
}

/// What others dial: the address bound or, where that is every address of the machine, the one that
/// the way to the directory starts from.
fn reachable(bound: SocketAddr, directory: &str) -> SocketAddr {
    if !bound.ip().is_unspecified() {
        return bound;
    }
    let any: SocketAddr = match bound.ip() {
        IpAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        IpAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    // Connecting a datagram socket sends nothing; it only chooses the way.
    let own = UdpSocket::bind(any).and_then(|socket| {
        socket.connect(directory)?;
        socket.local_addr()
    });
    match own {
        Ok(own) => SocketAddr::new(own.ip(), bound.port()),
        Err(error) => {
            tracing::warn!(%error, "cannot tell the own address: set --advertise");
            bound
        }
    }
}

/// A line for people and for programs, printed when the daemon is ready.
pub fn ready_line(address: &str, store: &Store, data: &Path) -> String {
    let state = store.state();
    format!(
        "us-provider ready address={address} fragments={} free={} data={}",
        state.fragments,
        state.free_bytes,
        data.display()
    )
}
