//! The daemon: what lies in its data directory, how it starts and how it ends.
//!
//! ```text
//! DIR/lock          held while it runs
//! DIR/ca/           the certificate authority: whoever reads its key owns the cluster
//! DIR/identity/     the directory's own certificate and key
//! DIR/store/        journal and checkpoint
//! DIR/recovery.key  what a restore needs; its owner keeps a copy elsewhere (docs/restore.md)
//! DIR/address       where it listens, written when it does
//! ```
//! The end, in order: refuse connections, let calls finish, sync the journal, exit. When the store
//! fails the daemon ends with an error: what it has not synced was never called durable.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use us_core::daemon::files::{Access, DirLock, write_atomic};
use us_core::daemon::http;
use us_core::daemon::shutdown::Shutdown;
use us_core::geometry::Code;
use us_core::tls::{CertificateAuthority, Identity, Role};
use us_core::wire::{Server, ServerLimits};

use crate::audit::AuditJob;
use crate::engine::presence::Clocks;
use crate::engine::repair::RepairLimits;
use crate::engine::{EngineConfig, Event};
use crate::enroll::EnrollService;
use crate::image::job::ImageJob;
use crate::recovery::RecoveryKit;
use crate::service::Service;
use crate::shell::{Directory, DurableMark};
use crate::store::embedded::{EmbeddedOptions, EmbeddedStore};

/// Members must have the time to renew.
const CERTIFICATE_LIFE_MS_MIN: u64 = 5_000;
/// Members that connect and wait to be noted.
const MET_MAX: usize = 256;
/// The most copies of the journal.
const COPIES_MAX: usize = 2;
/// The least time a grant is good for.
const GRANT_MS_MIN: u64 = 1000;
/// How long calls under way may take at the end.
const DRAIN: Duration = Duration::from_secs(10);

/// The directory's configuration: a TOML file, `US_DIRECTORY_*` and flags set the same keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where everything is kept.
    pub data: PathBuf,
    /// Where mounts, providers and administrators connect; port 0 takes any.
    pub listen: SocketAddr,
    /// Where `/metrics` and `/healthz` are served, `unix:PATH` or `IP:PORT` for TLS; empty: nowhere.
    pub metrics: String,
    /// How long a lease is good for without renewal.
    pub lease_ms: u64,
    /// After how long a silent mount is shut out when another wants what it holds.
    pub fence_ms: u64,
    /// How long fragments may be on their way before their provider is asked.
    pub settle_ms: u64,
    /// How long ago a block's place must have been leased for fragments that nothing names to be
    /// garbage.
    pub garbage_age_ms: u64,
    /// How often each provider is told what to keep, so that what nothing names is found; 0: never.
    pub retain_every_ms: u64,
    /// How often each provider is asked for a fragment at random, on average; 0: never.
    pub audit_every_ms: u64,
    /// KiB a second read so from all providers together; 0: no limit.
    pub audit_kib_per_s: u64,
    /// How often providers report.
    pub report_every_ms: u64,
    /// Files that are removed younger than this do not go to the trash: programs make many for
    /// themselves.
    pub trash_age_ms: u64,
    /// How long a block is let alone by the cleaner after something of it died.
    pub clean_after_ms: u64,
    /// How long a grant is good for: so long providers may serve one whose access was taken away, and
    /// so long, less a third, mounts go on without a directory.
    pub grant_ms: u64,
    /// How long a silent provider is absent before it counts as asleep.
    pub absent_ms: u64,
    /// How long a provider may be silent beyond what was expected before it is given up.
    pub dead_ms: u64,
    /// How long one may whose hours are not known yet; at least `dead_ms`.
    pub newcomer_ms: u64,
    /// The share of the providers, or of a site's, that must fall silent within an hour to be taken
    /// for an evening and not for deaths, in percent.
    pub brake_percent: u32,
    /// How long providers that fell silent together are not given up.
    pub brake_ms: u64,
    /// The mean time to a provider's death, for estimates.
    pub mttf_ms: u64,
    /// Blocks repaired at once.
    pub repair_jobs: usize,
    /// Blocks one provider rebuilds at once.
    pub repair_target_jobs: usize,
    /// Fragments one provider is asked to send for repairs at once.
    pub repair_sends: usize,
    /// KiB a second one provider is asked to send for repairs; 0: no limit.
    pub repair_kib_per_s: u64,
    /// Percent of the uplink that a provider's owner states which repairs may take.
    pub repair_uplink_percent: u64,
    /// Memory for pages of the checkpoint, in MiB.
    pub cache_mib: usize,
    /// A journal of this many MiB is written into the checkpoint.
    pub journal_mib: u64,
    /// Copies of the journal on providers, where there are three or more: 0 to 2.
    pub copies: usize,
    /// How long a provider may take to store a record of the journal before another takes its place.
    pub copy_ack_ms: u64,
    /// This many MiB of journal since the last image of the state start another; 0: as journal_mib.
    pub image_mib: u64,
    /// The code of the image's blocks, S+R.
    pub image_code: String,
    /// How long a certificate is good without renewal, by the cluster's own clock.
    pub certificate_life_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        let engine = EngineConfig::default();
        Self {
            data: PathBuf::from("/var/lib/us/directory"),
            listen: SocketAddr::from(([0, 0, 0, 0], 7460)),
            metrics: String::new(),
            lease_ms: engine.lease_ms,
            fence_ms: engine.fence_ms,
            settle_ms: engine.settle_ms,
            garbage_age_ms: engine.garbage_age_ms,
            retain_every_ms: engine.retain_every_ms,
            audit_every_ms: engine.audit_every_ms,
            audit_kib_per_s: engine.audit_kib_per_s,
            report_every_ms: engine.report_every_ms,
            trash_age_ms: engine.trash_age_ms,
            clean_after_ms: engine.clean_after_ms,
            grant_ms: engine.grant_ms,
            absent_ms: engine.clocks.absent_ms,
            dead_ms: engine.clocks.dead_ms,
            newcomer_ms: engine.clocks.newcomer_ms,
            brake_percent: engine.clocks.brake_percent,
            brake_ms: engine.clocks.brake_ms,
            mttf_ms: engine.clocks.mttf_ms,
            repair_jobs: engine.repair.jobs_max,
            repair_target_jobs: engine.repair.target_jobs_max,
            repair_sends: engine.repair.sends_max,
            repair_kib_per_s: engine.repair.send_bytes_per_s_max >> 10,
            repair_uplink_percent: engine.repair.uplink_percent_max,
            cache_mib: 64,
            journal_mib: 64,
            copies: engine.copies,
            copy_ack_ms: engine.copy_ack_ms,
            image_mib: 0,
            image_code: format!("{}+{}", engine.image_code.0, engine.image_code.1),
            certificate_life_ms: engine.certificate_life_ms,
        }
    }
}

impl Config {
    fn engine(&self) -> EngineConfig {
        EngineConfig {
            lease_ms: self.lease_ms,
            fence_ms: self.fence_ms,
            settle_ms: self.settle_ms,
            garbage_age_ms: self.garbage_age_ms,
            retain_every_ms: self.retain_every_ms,
            audit_every_ms: self.audit_every_ms,
            audit_kib_per_s: self.audit_kib_per_s,
            report_every_ms: self.report_every_ms,
            trash_age_ms: self.trash_age_ms,
            clean_after_ms: self.clean_after_ms,
            grant_ms: self.grant_ms,
            fetch_wait_ms: self.fence_ms + self.lease_ms / 2,
            clocks: Clocks {
                absent_ms: self.absent_ms,
                dead_ms: self.dead_ms,
                newcomer_ms: self.newcomer_ms,
                brake_percent: self.brake_percent,
                brake_ms: self.brake_ms,
                mttf_ms: self.mttf_ms,
                ..Clocks::default()
            },
            repair: RepairLimits {
                jobs_max: self.repair_jobs,
                target_jobs_max: self.repair_target_jobs,
                sends_max: self.repair_sends,
                send_bytes_per_s_max: self.repair_kib_per_s << 10,
                uplink_percent_max: self.repair_uplink_percent,
                ..RepairLimits::default()
            },
            copies: self.copies,
            copy_ack_ms: self.copy_ack_ms,
            image_bytes: if self.image_mib == 0 { self.journal_mib } else { self.image_mib } << 20,
            certificate_life_ms: self.certificate_life_ms,
            image_code: self.code().map_or((0, 0), |code| (code.s() as u32, code.r() as u32)),
        }
    }

    /// The code of the image's blocks.
    fn code(&self) -> anyhow::Result<Code> {
        let wrong = || format!("image_code {:?} is not S+R, such as 4+2", self.image_code);
        let (s, r) = self.image_code.split_once('+').with_context(wrong)?;
        let (s, r) = (s.trim().parse().with_context(wrong)?, r.trim().parse().with_context(wrong)?);
        Code::new(s, r).with_context(wrong)
    }

    fn store(&self) -> EmbeddedOptions {
        EmbeddedOptions {
            cache_bytes: self.cache_mib << 20,
            journal_file_bytes: self.journal_mib << 20,
            ..EmbeddedOptions::default()
        }
    }

    /// Refuses times that cannot work together.
    ///
    /// # Errors
    /// Which of them.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.lease_ms == 0 || self.report_every_ms == 0 || self.settle_ms == 0 {
            bail!("lease_ms, settle_ms and report_every_ms must be more than 0");
        }
        if self.copies > COPIES_MAX || self.copy_ack_ms == 0 {
            bail!("copies must be 0 to {COPIES_MAX}, and copy_ack_ms more than 0");
        }
        self.code()?;
        if self.certificate_life_ms < CERTIFICATE_LIFE_MS_MIN {
            bail!("certificate_life_ms must be at least {CERTIFICATE_LIFE_MS_MIN}");
        }
        if self.grant_ms < GRANT_MS_MIN {
            bail!("grant_ms must be at least {GRANT_MS_MIN}: mounts have to renew their grants");
        }
        if self.fence_ms <= self.lease_ms {
            bail!(
                "fence_ms ({}) must be more than lease_ms ({}): a mount is shut out only after it \
                 has stopped trusting its leases",
                self.fence_ms,
                self.lease_ms
            );
        }
        Ok(())
    }
}

/// Where the authority lies in a data directory.
pub(crate) fn authority_dir(data: &Path) -> PathBuf {
    data.join("ca")
}

/// Where the directory's own identity lies in a data directory.
pub(crate) fn identity_dir(data: &Path) -> PathBuf {
    data.join("identity")
}

/// Where the recovery key lies in a data directory.
pub fn recovery_key(data: &Path) -> PathBuf {
    data.join("recovery.key")
}

/// The recovery key of a data directory, made where there is none.
fn kit(data: &Path) -> anyhow::Result<RecoveryKit> {
    let path = recovery_key(data);
    if path.exists() {
        return Ok(RecoveryKit::load(&path)?);
    }
    let kit = RecoveryKit::new(CertificateAuthority::load(&authority_dir(data))?);
    kit.save(&path)?;
    tracing::info!(path = %path.display(), "a recovery key was made: keep a copy elsewhere");
    Ok(kit)
}

/// Makes a new cluster in `data`: its certificate authority and the directory's own identity.
///
/// # Errors
/// When there is one already, or the disk fails.
pub fn init(data: &Path) -> anyhow::Result<String> {
    std::fs::create_dir_all(data).with_context(|| format!("making {}", data.display()))?;
    let _lock = DirLock::take(data)?;
    let authority_dir = authority_dir(data);
    if Identity::exists(&identity_dir(data)) {
        bail!("{} holds a directory already", data.display());
    }
    let authority = if CertificateAuthority::exists(&authority_dir) {
        // An init that was interrupted half-way is finished.
        CertificateAuthority::load(&authority_dir)?
    } else {
        let authority = CertificateAuthority::create()?;
        authority.save(&authority_dir)?;
        authority
    };
    kit(data)?;
    authority.issue(Role::Directory, "directory")?.save(&identity_dir(data))?;
    Ok(authority.cluster().to_string())
}

/// Whether `data` holds a cluster.
pub fn is_initialised(data: &Path) -> bool {
    Identity::exists(&identity_dir(data))
}

/// Issues a certificate and writes it, its key and the authority's certificate to `out`.
///
/// # Errors
/// When there is no cluster in `data`, the name cannot be used, or the disk fails.
pub fn issue_identity(data: &Path, role: Role, name: &str, out: &Path) -> anyhow::Result<()> {
    let authority = CertificateAuthority::load(&authority_dir(data))
        .with_context(|| format!("{}: run `us-directory init` first", data.display()))?;
    authority.issue(role, name)?.save(out)?;
    Ok(())
}

/// Runs the directory until `shutdown`. Prints `listening on ADDRESS` when it answers.
///
/// # Errors
/// When it cannot start, or its store fails.
pub async fn run(config: Config, shutdown: Shutdown) -> anyhow::Result<()> {
    config.check()?;
    let data = config.data.clone();
    let _lock = DirLock::take(&data)?;
    let identity = Identity::load(&identity_dir(&data))
        .with_context(|| format!("{}: run `us-directory init` first", data.display()))?;
    let kit = kit(&data)?;
    let cluster = *identity.own().cluster.as_bytes();
    if kit.cluster() != identity.own().cluster {
        bail!("{}: it is the key of another cluster", recovery_key(&data).display());
    }
    let (mark, sink) = DurableMark::new();
    let (store_dir, options) = (data.join("store"), config.store());
    let opened = std::time::Instant::now();
    let store = tokio::task::spawn_blocking(move || EmbeddedStore::open(&store_dir, options, sink))
        .await??;
    let (directory, engine) = {
        let secret = Some(kit.secret().clone());
        Directory::start(Box::new(store), mark, config.engine(), cluster, secret)?
    };
    tracing::info!(elapsed_ms = opened.elapsed().as_millis() as u64, "store opened");
    let listener = tokio::net::TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listening on {}", config.listen))?;
    let address = listener.local_addr()?;
    serve_metrics(&config, &identity, &directory, &shutdown).await?;
    let clock = directory.clone();
    let ticking = shutdown.token().child_token();
    tokio::spawn(async move { clock.run_clock(ticking).await });
    let images = ImageJob {
        directory: directory.clone(),
        identity: identity.clone(),
        secret: kit.secret().clone(),
        code: config.code()?,
    };
    let imaging = tokio::spawn(images.run(shutdown.token().child_token()));
    let audits = AuditJob { directory: directory.clone(), identity: identity.clone() };
    let auditing = tokio::spawn(audits.run(shutdown.token().child_token()));
    let mut failed = directory.failed();
    let service = Service::new(directory.clone(), identity.clone());
    let authority = std::sync::Arc::new(CertificateAuthority::load(&authority_dir(&data))?);
    let enroll = EnrollService::new(service.clone(), authority);
    let (met, mut meeting) = tokio::sync::mpsc::channel(MET_MAX);
    let registrar = directory.clone();
    tokio::spawn(async move {
        while let Some(peer) = meeting.recv().await {
            if registrar.event(Event::Met { peer }).await.is_err() {
                return;
            }
        }
    });
    let limits = ServerLimits { drain_timeout: DRAIN, ..ServerLimits::default() };
    let server = Server::new(&identity, limits)
        .admission(directory.door().admission().telling(met))
        .grpc(enroll.members(service.routes()))
        .join(enroll.newcomers());
    let serving = tokio::spawn(server.serve(listener, shutdown.token().clone()));
    let text = format!("{address}\n");
    write_atomic(&data.join("address"), text.as_bytes(), Access::Public)
        .with_context(|| format!("writing {}", data.join("address").display()))?;
    announce(address)?;
    // Cancel-safe: both only wait.
    let failure = tokio::select! {
        () = shutdown.requested() => None,
        stopped = failed.wait_for(Option::is_some) => stopped.ok().and_then(|why| why.clone()),
    };
    shutdown.request();
    let _late = tokio::time::timeout(DRAIN, imaging).await;
    let _late = tokio::time::timeout(DRAIN, auditing).await;
    directory.end_streams();
    let served = tokio::time::timeout(DRAIN, serving).await;
    directory.stop().await;
    let joined = tokio::task::spawn_blocking(move || engine.join());
    let _late = tokio::time::timeout(DRAIN, joined).await;
    if let Some(failure) = failure {
        bail!("the store has failed, the directory cannot go on: {failure}");
    }
    match served {
        Ok(Ok(served)) => served.context("serving"),
        Ok(Err(panicked)) => Err(panicked.into()),
        Err(_elapsed) => Ok(()),
    }
}

/// The one line a supervisor waits for.
fn announce(address: SocketAddr) -> anyhow::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    writeln!(out, "listening on {address}")?;
    Ok(out.flush()?)
}

async fn serve_metrics(
    config: &Config,
    identity: &Identity,
    directory: &Directory,
    shutdown: &Shutdown,
) -> anyhow::Result<()> {
    http::metrics_handle();
    if config.metrics.is_empty() {
        return Ok(());
    }
    let address: http::MetricsAddress = config.metrics.parse()?;
    let failed = directory.failed();
    let health: http::HealthCheck =
        std::sync::Arc::new(move || failed.borrow().clone().map_or(Ok(()), Err));
    let (admission, router) = (directory.door().admission(), http::router(health));
    let serving = http::serve(&address, identity, admission, router, shutdown);
    let bound = serving.await.with_context(|| format!("serving metrics on {address}"))?;
    tracing::info!(%bound, "metrics");
    Ok(())
}
