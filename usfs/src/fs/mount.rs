//! Bringing a mount up, and down.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::time::Instant;
use us_core::disk::{Acknowledge, DiskConfig, FragmentTransport, SealedPages, VirtualDisk};
use us_core::geometry::{Code, GeometryError};
use us_core::ids::{Ino, SessionId, VolumeId};
use us_core::name::NameKey;
use us_core::seal::VolumeKey;
use us_proto::v1;
use us_proto::v1::session_up::Event as Up;

use super::blocks::Blocks;
use super::notify::Forget;
use super::shared::{Parts, Shared, now};
use super::writeback::{flush_file, store_all};
use super::{Fs, FsError};
use crate::core::{Core, CoreConfig, FlushReason};
use crate::session::stream::{OpenStream, margin};
use crate::session::{DirectoryLink, SessionError, stream};
use crate::unlock::PrivateKey;

/// How long an unmount waits while nothing more becomes durable.
const FLUSH_PATIENCE: Duration = Duration::from_secs(120);
/// The patience of [`MountOptions::store_patience`]: providers that died are noticed within seconds,
/// and their fragments go elsewhere.
const STORE_PATIENCE: Duration = Duration::from_secs(30);
/// How often is looked whether something has.
const FLUSH_LOOK: Duration = Duration::from_millis(250);
/// How long the directory may take to say goodbye.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long an unmount waits for fragments beyond the write margin.
const SETTLING_TIMEOUT: Duration = Duration::from_secs(5);
/// How often inodes nobody uses are looked for.
const EVICT_EVERY: Duration = Duration::from_secs(5);
/// Names the kernel is asked to forget at once.
const FORGET_AT_ONCE: usize = 16 << 10;
/// How long the kernel may take to forget some names, before others are tried.
const RELIEF_PATIENCE: Duration = Duration::from_secs(1);
/// Inodes cached without being used.
const NODES_MAX: usize = 256 << 10;

/// What a mount is asked for.
#[derive(Debug)]
pub struct MountOptions {
    /// The volume's name or id.
    pub volume: String,
    /// This machine, for people.
    pub host: String,
    /// Nothing may be changed.
    pub read_only: bool,
    /// Memory for data: dirty, on its way, and cached.
    pub memory_bytes: usize,
    /// Answer writes only when every fragment is durable.
    pub acknowledge_full: bool,
    /// Where pages that were read are kept, sealed, for the next time.
    pub sealed_pages: Option<SealedPages>,
    /// The key of a private volume. Where it is given nothing else is mounted: neither another
    /// volume nor one whose key the directory has.
    pub key: Option<PrivateKey>,
    /// Where a rescue file would go.
    pub rescue_dir: PathBuf,
    /// Sessions of mounts that are known to be dead, to be ended at once (at most 64).
    pub replaces: Vec<SessionId>,
    /// Reading changes no access time.
    pub no_atime: bool,
    /// How long an unmount waits while nothing more becomes durable; what is not goes into a rescue
    /// file then.
    pub flush_patience: Duration,
    /// For how long data that cannot be stored is only tried again before a program is told; eight
    /// times that where the providers are full of what was deleted.
    pub store_patience: Duration,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            volume: String::new(),
            host: String::new(),
            read_only: false,
            memory_bytes: 512 << 20,
            acknowledge_full: false,
            sealed_pages: None,
            key: None,
            rescue_dir: std::env::temp_dir(),
            replaces: Vec::new(),
            no_atime: false,
            flush_patience: FLUSH_PATIENCE,
            store_patience: STORE_PATIENCE,
        }
    }
}

/// News about the swarm that come on the session's stream and are for the way to providers.
pub trait SwarmNews: Send + Sync + 'static {
    /// Where providers are.
    fn on_providers(&self, table: &v1::ProviderTable);
    /// A fresh grant to show to providers.
    fn on_grant(&self, grant: &Bytes);
    /// Waits until a provider has refused the present grant; for ever where nobody judges them.
    fn grant_wanted(&self) -> BoxFuture<'_, ()> {
        futures::future::pending().boxed()
    }
}

/// Why a volume was not mounted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MountError {
    /// No session with the directory.
    #[error("cannot mount")]
    Session(#[from] SessionError),
    /// The directory's answer makes no sense.
    #[error("cannot mount: the directory's answer has no valid {field}")]
    Answer {
        /// Which part.
        field: &'static str,
    },
    /// The volume's code is impossible.
    #[error("cannot mount: the volume's code is impossible")]
    Code(#[from] GeometryError),
    /// The volume is private.
    #[error("volume {volume} is private: its key or passphrase is needed")]
    KeyNeeded {
        /// The volume.
        volume: String,
    },
    /// The directory opened another volume than the one whose key was opened, or gave a key for it.
    #[error(
        "the directory opened another volume as {volume} than it gave the key ring of: refused"
    )]
    OtherVolume {
        /// The volume.
        volume: String,
    },
}

impl Fs {
    /// Opens a session and mounts the volume (without a kernel).
    ///
    /// # Errors
    /// [`MountError`].
    pub async fn mount(
        options: MountOptions,
        link: Arc<dyn DirectoryLink>,
        transport: Arc<dyn FragmentTransport>,
        swarm: Arc<dyn SwarmNews>,
    ) -> Result<Self, MountError> {
        let open = v1::OpenSession {
            volume: options.volume.clone(),
            session: 0,
            incarnation: 0,
            host: options.host.clone(),
            read_only: options.read_only,
            replaces: options.replaces.iter().map(|session| session.0).collect(),
            durable: 0,
        };
        let opened = stream::open(&*link, open.clone(), || now().boot).await?;
        let (volume, key) = volume_and_key(&options, &opened.opened)?;
        let code = Code::new(opened.opened.s as usize, opened.opened.r as usize)?;
        let blocks = Arc::new(Blocks::default());
        let disk_config = disk_config(&options);
        let names = NameKey::new(&key);
        let directory = Arc::clone(&blocks);
        let disk = VirtualDisk::new(volume, key, code, disk_config, directory, transport);
        let disk = match options.sealed_pages {
            Some(sealed) => disk.keeping(sealed),
            None => disk,
        };
        let dirty_bytes_max = options.memory_bytes / 2;
        let mut core = Core::new(CoreConfig {
            names,
            code,
            read_only: options.read_only,
            no_atime: options.no_atime,
            dirty_bytes_max,
            nodes_max: NODES_MAX,
        });
        let lease = Duration::from_millis(u64::from(opened.opened.lease_ms));
        core.trust_until(opened.asked_at + lease - margin(lease));
        if !options.read_only {
            core.ask_inodes();
        }
        let shared = Arc::new(Shared::new(Parts {
            core,
            disk,
            blocks: Arc::clone(&blocks),
            swarm,
            rescue_dir: options.rescue_dir,
            volume_name: opened.opened.volume_name.clone(),
            session: SessionId(opened.opened.session),
            dirty_bytes_max,
            flush_patience: options.flush_patience,
            store_patience: options.store_patience,
        }));
        blocks.connect(&shared);
        shared.new_grant(&opened.opened.grant);
        start(&shared, link, opened, open, dirty_bytes_max);
        Ok(Self { shared })
    }

    /// The session's number with the directory.
    pub fn session(&self) -> SessionId {
        self.shared.session
    }

    /// Flushes everything, waits until it is durable, and closes the session, which returns all
    /// leases. Operations that come later fail.
    ///
    /// # Errors
    /// What could not be made durable; it lies in the rescue file then.
    pub async fn shutdown(&self) -> Result<(), FsError> {
        let shared = &self.shared;
        shared.closing.store(true, Ordering::Relaxed);
        if shared.lock().core.ended().is_some() {
            self.stop().await;
            return Err(self.ended());
        }
        let flushed = match self.flush_while_it_moves().await {
            Ok(()) => {
                shared.lock().core.send(Up::Close(v1::CloseSession {}));
                shared.outgoing.notify_one();
                self.wait_end().await;
                Ok(())
            }
            Err(error @ FsError::SessionEnded(_)) => Err(error),
            Err(error) => {
                Err(FsError::TimedOut(shared.session_ended(&format!("unmounted: {error}")).await))
            }
        };
        shared.end("unmounted".to_owned());
        self.stop().await;
        flushed
    }

    /// Flushes all, however long it takes while there is less and less left to do.
    async fn flush_while_it_moves(&self) -> Result<(), FsError> {
        let shared = &self.shared;
        let left = || {
            let mut state = shared.lock();
            state.core.uncommitted_bytes() + state.core.log().bytes() as u64
        };
        let flushing = self.flush_all();
        tokio::pin!(flushing);
        let (mut least, mut since) = (left(), Instant::now());
        // Cancel-safe: the flush stays where it is and goes on.
        loop {
            if let Ok(flushed) = tokio::time::timeout(FLUSH_LOOK, &mut flushing).await {
                return flushed;
            }
            let now_left = left();
            if now_left < least {
                (least, since) = (now_left, Instant::now());
            } else if since.elapsed() >= shared.flush_patience {
                let mut state = shared.lock();
                let files = state.core.uncommitted_files().len();
                let bytes = state.core.log().bytes();
                return Err(FsError::TimedOut(format!(
                    "the data of {files} files is not stored, and {bytes} bytes of changes are not \
                     durable"
                )));
            }
        }
    }

    /// Stops at once, as a crash would: nothing is flushed, the session stays open at the directory.
    pub async fn abandon(&self) {
        self.shared.lock().core.end("abandoned".to_owned());
        self.stop().await;
    }

    async fn stop(&self) {
        let shared = &self.shared;
        shared.stop.cancel();
        shared.signal();
        shared.durable.send_modify(|_| {});
        shared.tasks.close();
        // Stores under way end by their own deadline; nobody waits for them any more.
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, shared.tasks.wait()).await;
        shared.kernel.stop();
        shared.disk.close().await;
    }

    async fn flush_all(&self) -> Result<(), FsError> {
        let shared = &self.shared;
        store_all(shared).await;
        loop {
            let dirty: Vec<Ino> = shared.lock().core.uncommitted_files();
            if dirty.is_empty() {
                break;
            }
            for ino in dirty {
                if let Err(error) = flush_file(shared, ino, FlushReason::Commit).await {
                    tracing::warn!(%ino, %error, "cannot flush yet; trying again");
                    if let FsError::SessionEnded(_) = error {
                        return Err(error);
                    }
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
        }
        // Fragments still on their way: what is not reported now the directory asks of their
        // providers later, and status would say "unsettled" until then.
        shared.settling.close();
        let _ = tokio::time::timeout(SETTLING_TIMEOUT, shared.settling.wait()).await;
        self.wait_durable().await
    }

    async fn wait_end(&self) {
        let mut progress = self.shared.progress.subscribe();
        let ended = async {
            while self.shared.lock().core.ended().is_none() && progress.changed().await.is_ok() {}
        };
        // A directory that is gone keeps the session until it is fenced; that harms nobody.
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, ended).await;
    }
}

fn volume_and_key(
    options: &MountOptions,
    opened: &v1::SessionOpened,
) -> Result<(VolumeId, VolumeKey), MountError> {
    let volume = VolumeId::from_slice(&opened.volume);
    let volume = volume.ok_or(MountError::Answer { field: "volume id" })?;
    let volume_name = opened.volume_name.clone();
    match (&options.key, opened.volume_key.is_empty()) {
        (None, true) => return Err(MountError::KeyNeeded { volume: volume_name }),
        (Some(private), true) if private.volume == volume => {
            return Ok((volume, private.key.clone()));
        }
        (Some(_), _) => return Err(MountError::OtherVolume { volume: volume_name }),
        (None, false) => {}
    }
    let bytes: [u8; 32] =
        opened.volume_key[..].try_into().map_err(|_| MountError::Answer { field: "volume key" })?;
    Ok((volume, VolumeKey::from_bytes(bytes.into())))
}

fn disk_config(options: &MountOptions) -> DiskConfig {
    DiskConfig {
        acknowledge: match options.acknowledge_full {
            true => Acknowledge::Full,
            false => Acknowledge::Margin,
        },
        store_bytes_max: options.memory_bytes / 6,
        read_bytes_max: options.memory_bytes / 6,
        cache_bytes: options.memory_bytes / 6,
        ahead_bytes: options.memory_bytes / 10,
        ..DiskConfig::default()
    }
}

fn start(
    shared: &Arc<Shared>,
    link: Arc<dyn DirectoryLink>,
    opened: OpenStream,
    open: v1::OpenSession,
    dirty_bytes_max: usize,
) {
    let stop = shared.stop.clone();
    shared.tasks.spawn(stream::run(Arc::clone(shared), link, opened, open, stop));
    shared.tasks.spawn(super::recall::run(Arc::clone(shared)));
    shared.tasks.spawn(super::writeback::run(Arc::clone(shared), dirty_bytes_max));
    shared.tasks.spawn(super::trust::run(Arc::clone(shared)));
    shared.tasks.spawn(evict(Arc::clone(shared)));
}

/// Lets go of inodes nobody uses while there are too many.
async fn evict(shared: Arc<Shared>) {
    loop {
        // Cancel-safe: sleeping.
        tokio::select! {
            () = tokio::time::sleep(EVICT_EVERY) => {}
            () = shared.stop.cancelled() => return,
        }
        let now = shared.now();
        if shared.lock().core.evict(now) {
            shared.outgoing.notify_one();
        }
        relieve(&shared).await;
    }
}

/// Has the kernel forget what nobody uses, while it holds so much that leases run short.
async fn relieve(shared: &Shared) {
    loop {
        let names = shared.lock().core.names_to_forget(FORGET_AT_ONCE);
        if names.is_empty() {
            return;
        }
        let forget = |(dir, name)| Forget { ino: dir, names: vec![name], inode: false };
        let forgotten = shared.kernel.forget(names.into_iter().map(forget).collect());
        // Not for ever: a request in flight can hold it up.
        let _ = tokio::time::timeout(RELIEF_PATIENCE, forgotten).await;
        let now = shared.now();
        let evicted = shared.lock().core.evict(now);
        shared.outgoing.notify_one();
        if !evicted {
            return;
        }
    }
}
