//! A mounted volume: its file system, its session, its mount, from the first to the last.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio_util::sync::{CancellationToken, DropGuard};
use us_core::daemon::size::Size;
use us_core::disk::{LinksConfig, ProviderLinks, SealedPages, SealedPagesError};
use us_core::tls::{ExpectedPeer, Identity, Role};
use us_core::wire::join::keep_renewed;
use us_proto::v1;

use super::background::Starter;
use super::pins::Pin;
use super::sessions::{self, Sessions};
use super::{Ack, Options, point, registry};
use crate::ctl::{Target, connect};
use crate::fs::{Fs, MountOptions, SwarmNews};
use crate::fuse::{self, Mounted};
use crate::places;
use crate::session::grpc::GrpcLink;
use crate::unlock::{NotPrivate, PrivateKey, Prompt, Terminal, unlock};

/// How long a mount in use is waited for before it is hidden.
const USERS_LEAVE: Duration = Duration::from_secs(3);
/// How long the kernel may take to let go of a mount that is hidden.
const KERNEL_LETS_GO: Duration = Duration::from_secs(10);

/// How much is kept in the folder of `-o cache` unless `cache_size` says otherwise.
const CACHE_BYTES: Size = Size(4 << 30);

/// What to mount, and where.
#[derive(Debug, Clone)]
pub struct VolumeSpec {
    /// "host:port" of the directory.
    pub directory: String,
    /// Name of the volume.
    pub volume: String,
    /// The folder of the client's identity.
    pub identity: PathBuf,
    /// Where.
    pub mountpoint: PathBuf,
    /// Where its sessions, and what it could not send, are kept.
    pub data: PathBuf,
    /// How.
    pub options: Options,
    /// Whoever started this process asks for passphrases, and is asked by a line.
    pub detached: bool,
}

/// A volume that is mounted by this process.
pub struct VolumeMount {
    fs: Fs,
    mounted: Mounted,
    registered: Option<registry::Registered>,
    kept: Option<sessions::Kept>,
    /// Ends with the mount.
    _renewing: DropGuard,
}

impl VolumeMount {
    /// Opens a session on the volume and mounts it.
    ///
    /// # Errors
    /// For people: what is wrong with the mount point, the identity, the directory or FUSE.
    pub async fn open(spec: &VolumeSpec) -> anyhow::Result<Self> {
        let mountpoint = spec.mountpoint.clone();
        let at = tokio::task::spawn_blocking(move || point::prepare(&mountpoint)).await??;
        let identity = Identity::load(&spec.identity)
            .with_context(|| format!("cannot use the identity in {}", spec.identity.display()))?;
        let (fs, kept) = open_fs(spec, identity.clone()).await?;
        let renewing = CancellationToken::new();
        let (directory, dir) = (spec.directory.as_str().into(), spec.identity.clone());
        tokio::spawn(keep_renewed(directory, identity, dir, renewing.clone()));
        let renewing = renewing.drop_guard();
        let options = spec.options.for_kernel(format!("{}/{}", spec.directory, spec.volume));
        let (runtime, served) = (Handle::current(), fs.clone());
        let mounting = tokio::task::spawn_blocking(move || {
            let mounted = fuse::mount(served, &at, &options, &runtime)?;
            let registered = registry::Registered::new(&at)
                .inspect_err(|error| tracing::debug!(%error, "umount --flush cannot wait for us"))
                .ok();
            Ok::<_, fuse::MountError>((mounted, registered))
        });
        match mounting.await? {
            Ok((mounted, registered)) => {
                Ok(Self { fs, mounted, registered, kept, _renewing: renewing })
            }
            Err(error) => {
                // Nothing was written yet; the session must not wait for its fence.
                let closed = fs.shutdown().await;
                if let (Ok(()), Some(kept)) = (closed, kept) {
                    kept.closed();
                }
                Err(error.into())
            }
        }
    }

    /// Where it is mounted.
    pub fn point(&self) -> &Path {
        self.mounted.point()
    }

    /// Waits until someone else has unmounted it. Cancel-safe.
    pub async fn ended(&mut self) {
        if let Err(error) = self.mounted.ended().await {
            tracing::error!(%error, "the FUSE session ended");
        }
    }

    /// Unmounts, flushes and closes the session.
    ///
    /// # Errors
    /// When not everything became durable: the text says what and why.
    pub async fn close(mut self) -> anyhow::Result<()> {
        self.take_away().await;
        self.mounted.drain().await;
        let flushed = self.fs.shutdown().await;
        let outcome = flushed.as_ref().err().map(ToString::to_string).unwrap_or_default();
        if let Some(registered) = self.registered.take() {
            registered.finish(&outcome);
        }
        if let (Ok(()), Some(kept)) = (&flushed, self.kept.take()) {
            kept.closed();
        }
        flushed.context("not everything that was written is durable")
    }

    async fn take_away(&mut self) {
        let until = tokio::time::Instant::now() + USERS_LEAVE;
        let mut told = false;
        while !self.mounted.has_ended() {
            let Err(error) = self.mounted.unmount(false).await else { break };
            match error.raw_os_error() {
                // Someone was faster.
                Some(libc::EINVAL | libc::ENOENT) => break,
                Some(libc::EBUSY) if tokio::time::Instant::now() < until => {
                    if !std::mem::replace(&mut told, true) {
                        let users = point::users(self.point());
                        tracing::warn!(?users, "the mount is in use; waiting a little");
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                _ => {
                    tracing::warn!(%error, "hiding the mount from sight while it is in use");
                    if let Err(error) = self.mounted.unmount(true).await {
                        tracing::error!(%error, "the mount stays");
                    }
                    break;
                }
            }
        }
        if tokio::time::timeout(KERNEL_LETS_GO, self.ended()).await.is_err() {
            tracing::warn!("programs still use the mount; they will see errors from now on");
        }
    }
}

impl SwarmNews for ProviderLinks {
    fn on_providers(&self, table: &v1::ProviderTable) {
        self.update(table);
    }

    fn on_grant(&self, grant: &Bytes) {
        self.set_grant(grant.clone());
    }

    fn grant_wanted(&self) -> BoxFuture<'_, ()> {
        ProviderLinks::grant_wanted(self).boxed()
    }
}

async fn open_fs(
    spec: &VolumeSpec,
    identity: Identity,
) -> anyhow::Result<(Fs, Option<sessions::Kept>)> {
    let data = &spec.data;
    let rescue_dir = data.join("rescue");
    places::make_private_dir(&rescue_dir)
        .with_context(|| format!("make {}", rescue_dir.display()))?;
    let sessions =
        Sessions::of(data, &spec.directory, &spec.volume).context("remember sessions")?;
    let dead = sessions.dead();
    let pin = Pin::of(data, identity.own().cluster, &spec.directory, &spec.volume);
    let key = unlocked(spec, &pin).await?;
    let mut options = MountOptions {
        volume: spec.volume.clone(),
        key: key.clone(),
        host: host_name(),
        read_only: spec.options.read_only,
        no_atime: spec.options.no_atime,
        acknowledge_full: spec.options.ack == Ack::Full,
        rescue_dir,
        replaces: dead.clone(),
        ..MountOptions::default()
    };
    if let Some(dir) = spec.options.cache.clone() {
        let bytes = spec.options.cache_size.unwrap_or(CACHE_BYTES).bytes();
        let opened = tokio::task::spawn_blocking(move || SealedPages::open(&dir, bytes)).await?;
        options.sealed_pages = match opened {
            Ok(sealed) => Some(sealed),
            // A disk that fails costs speed, nothing else.
            Err(error @ SealedPagesError::Io { .. }) => {
                tracing::warn!(%error, "mounted without the cache on disk");
                None
            }
            Err(error) => return Err(anyhow::Error::new(error).context("mount option cache")),
        };
    }
    if let Some(memory) = spec.options.memory {
        options.memory_bytes = usize::try_from(memory.bytes()).unwrap_or(usize::MAX);
    }
    let expected = ExpectedPeer::role(Role::Directory);
    let link = GrpcLink::new(spec.directory.clone(), identity.clone(), expected);
    let swarm = Arc::new(ProviderLinks::new(identity, LinksConfig::default()));
    let fs = Fs::mount(options, Arc::new(link), Arc::clone(&swarm) as _, swarm)
        .await
        .with_context(|| format!("open volume {} of {}", spec.volume, spec.directory))?;
    if let Some(key) = &key {
        pin.set(key.volume).context("remember that the volume is private")?;
    }
    sessions.forget(&dead);
    let kept = sessions.keep(fs.session());
    let kept = kept.inspect_err(|error| tracing::warn!(%error, "a kill will cost a fence"));
    Ok((fs, kept.ok()))
}

/// The key of the volume, if it is private. One that was private when this machine mounted it last is
/// so for ever.
async fn unlocked(spec: &VolumeSpec, pin: &Pin) -> anyhow::Result<Option<PrivateKey>> {
    let known = pin.get()?;
    let directory = Some(spec.directory.clone());
    let target = Target { directory, identity: Some(spec.identity.clone()) };
    let demanded = spec.options.private || known.is_some();
    let prompt: &dyn Prompt = if spec.detached { &Starter } else { &Terminal };
    let mut admin = connect(&target).await?;
    let opening = unlock(&mut admin, &spec.volume, &spec.options.secret, demanded, prompt);
    let key = opening.await.map_err(|error| match known.is_some() && error.is::<NotPrivate>() {
        true => error.context(pin.explained()),
        false => error,
    })?;
    match (&key, known) {
        (Some(key), Some(known)) if key.volume != known => bail!(pin.explained()),
        _ => Ok(key),
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
