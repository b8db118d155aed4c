//! The adapter between the kernel's FUSE requests and [`crate::fs`]. It owns the mount itself, and
//! nothing of the file system.
//!
//! ```text
//! kernel --> 4 threads, each its own clone of /dev/fuse --> poll once --> answered
//!                                                             '--> waits: a task on the runtime
//! kernel <-- notifications, from the file system's own notifier thread
//! ```
//!
//! Known exceptions, because fuser 0.18 lacks what they need (docs/semantics.md has them all):
//! no INTERRUPT, so the file system bounds every wait; no way to tell flock from fcntl locks, so flock
//! stays with each machine's kernel; no O_TMPFILE, syncfs, statx birth time; FATTR_KILL_SUIDGID is
//! not shown, so a truncation by anyone but root drops set-user-id; setting a file's time to -2^63
//! seconds makes fuser panic, which ends the process.
//!
//! Who calls: `usfs mount` and `usfs up`. What may fail: see [`MountError`].

mod adapter;
mod convert;
pub mod kernel;
mod serve;

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuser::{Config, INodeNo, MountOption, Notifier, Session, SessionACL};
use parking_lot::Mutex;
use tokio::runtime::Handle as Runtime;
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;
use us_core::ids::Ino;

use crate::fs::{Fs, KernelNotifier};
use serve::{Adapter, Writers};

/// Threads that read requests.
const THREADS: usize = 4;
/// Read-ahead of the mount: the kernel keeps this much in flight for a sequential reader.
const READ_AHEAD_KIB: u32 = 4096;
/// How long requests that still wait may take to end after the mount is gone.
const REQUESTS_END: Duration = Duration::from_secs(5);

/// How a volume is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// What the table of mounts shows as source: "directory/volume".
    pub source: String,
    /// Nothing can be changed.
    pub read_only: bool,
    /// Users other than the mounting one may use it.
    pub allow_other: bool,
    /// Set-user-id bits count.
    pub suid: bool,
    /// Device files work.
    pub dev: bool,
    /// Programs cannot be started from it.
    pub no_exec: bool,
    /// Reading does not change access times.
    pub no_atime: bool,
    /// Every write is synchronous.
    pub sync: bool,
}

/// Why a mount did not come about.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel has no FUSE, or this container does not show it.
    #[error(
        "/dev/fuse is not here: load it with `modprobe fuse`; in a container start that with \
         `--device /dev/fuse --cap-add SYS_ADMIN`"
    )]
    NoFuse,
    /// /dev/fuse is here, but not for us.
    #[error("no permission to use /dev/fuse: run as root, or ask for mode 0666 on it")]
    FuseForbidden,
    /// Only root mounts without the helper.
    #[error(
        "mounting as a user needs the program fusermount3: install the package fuse3, or run this \
         as root, which needs nothing"
    )]
    NoHelper,
    /// `allow_other` of a user who is not root.
    #[error(
        "other users cannot be let in: /etc/fuse.conf lacks the line user_allow_other; add it as \
         root, or leave out -o allow_other"
    )]
    AllowOther,
    /// The system refused.
    #[error("cannot mount at {}", point.display())]
    System {
        /// Where.
        point: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A mounted file system. Dropping it does not unmount: [`Mounted::unmount`] does.
#[derive(Debug)]
pub struct Mounted {
    point: PathBuf,
    /// `None` once the session has ended.
    ended: Option<oneshot::Receiver<io::Result<()>>>,
    waiting: TaskTracker,
}

/// Tells the kernel through fuser.
struct Caches(Notifier);

impl KernelNotifier for Caches {
    fn invalidate_inode(&self, ino: Ino, offset: i64, length: i64) {
        if let Err(error) = self.0.inval_inode(INodeNo(ino.0), offset, length) {
            tracing::debug!(%error, %ino, "the kernel did not forget an inode");
        }
    }

    fn invalidate_entry(&self, parent: Ino, name: &[u8]) {
        if let Err(error) = self.0.inval_entry(INodeNo(parent.0), OsStr::from_bytes(name)) {
            tracing::debug!(%error, %parent, "the kernel did not forget a name");
        }
    }
}

/// Whether FUSE can be used at all, asked before anything is begun.
///
/// # Errors
/// [`MountError::NoFuse`], [`MountError::FuseForbidden`].
pub fn check() -> Result<(), MountError> {
    match kernel::open_device() {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(MountError::FuseForbidden)
        }
        Err(_) => Err(MountError::NoFuse),
    }
}

/// Mounts `fs` at `point` (absolute, without symbolic links) and serves it from threads of its own.
/// Blocks until the kernel has it; call it off the runtime's workers.
///
/// # Errors
/// [`MountError`]; nothing is mounted then.
pub fn mount(
    fs: Fs,
    point: &Path,
    options: &MountOptions,
    runtime: &Runtime,
) -> Result<Mounted, MountError> {
    let waiting = TaskTracker::new();
    let notifier = Arc::new(Mutex::new(None));
    let adapter = Adapter {
        fs: fs.clone(),
        runtime: runtime.clone(),
        writers: Writers::default(),
        waiting: waiting.clone(),
        notifier: Arc::clone(&notifier),
    };
    let session = open_session(adapter, point, options)?;
    *notifier.lock() = Some(session.notifier());
    fs.set_notifier(Box::new(Caches(session.notifier())));
    let (sender, ended) = oneshot::channel();
    let served = std::thread::Builder::new().name("fuse".into()).spawn(move || {
        // Nobody may listen any more: then nobody wants to know.
        let _ = sender.send(session.run());
    });
    if let Err(source) = served {
        let _ = kernel::unmount(point, true);
        return Err(MountError::System { point: point.to_owned(), source });
    }
    if let Err(error) = kernel::raise_read_ahead(point, READ_AHEAD_KIB) {
        tracing::debug!(%error, "read-ahead stays as it is: only root may raise it");
    }
    Ok(Mounted { point: point.to_owned(), ended: Some(ended), waiting })
}

fn open_session(
    adapter: Adapter,
    point: &Path,
    options: &MountOptions,
) -> Result<Session<Adapter>, MountError> {
    let mut config = Config::default();
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    config.mount_options = fuser_options(options);
    let system = |source| MountError::System { point: point.to_owned(), source };
    match kernel::mount(point, options) {
        Ok(device) => {
            let session = Session::from_fd(adapter, device, config.acl, config);
            session.map_err(|source| {
                let _ = kernel::unmount(point, true);
                system(source)
            })
        }
        Err(error) if Path::new("/dev/fuse").exists() => {
            if error.raw_os_error() != Some(libc::EPERM) {
                let forbidden = error.kind() == io::ErrorKind::PermissionDenied;
                return Err(if forbidden { MountError::FuseForbidden } else { system(error) });
            }
            Session::new(adapter, point, &config).map_err(|error| explain_helper(error, point))
        }
        Err(_) => Err(MountError::NoFuse),
    }
}

fn explain_helper(error: io::Error, point: &Path) -> MountError {
    let said = error.to_string();
    if error.kind() == io::ErrorKind::NotFound {
        MountError::NoHelper
    } else if said.contains("user_allow_other") {
        MountError::AllowOther
    } else {
        MountError::System { point: point.to_owned(), source: error }
    }
}

fn fuser_options(options: &MountOptions) -> Vec<MountOption> {
    let mut list = vec![
        MountOption::FSName(options.source.clone()),
        MountOption::Subtype("usfs".into()),
        MountOption::DefaultPermissions,
    ];
    for (wanted, option) in [
        (options.read_only, MountOption::RO),
        (options.suid, MountOption::Suid),
        (options.dev, MountOption::Dev),
        (options.no_exec, MountOption::NoExec),
        (options.no_atime, MountOption::NoAtime),
        (options.sync, MountOption::Sync),
    ] {
        if wanted {
            list.push(option);
        }
    }
    list
}

impl Mounted {
    /// Where it is mounted.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Whether [`Mounted::ended`] has said so.
    pub fn has_ended(&self) -> bool {
        self.ended.is_none()
    }

    /// Waits until the kernel is done with the file system: someone unmounted it, and nobody uses
    /// it any more. Cancel-safe.
    ///
    /// # Errors
    /// What ended the session otherwise.
    pub async fn ended(&mut self) -> io::Result<()> {
        let Some(ended) = &mut self.ended else { return Ok(()) };
        let result = ended.await;
        self.ended = None;
        // The thread sends, or the process has aborted.
        result.unwrap_or(Ok(()))
    }

    /// Takes the mount away; `detach` even while it is in use.
    ///
    /// # Errors
    /// EBUSY while it is in use, and what else the system says.
    pub async fn unmount(&self, detach: bool) -> io::Result<()> {
        let point = self.point.clone();
        let done = tokio::task::spawn_blocking(move || kernel::unmount(&point, detach)).await;
        done.unwrap_or_else(|failed| Err(io::Error::other(failed)))
    }

    /// Waits for the requests that still wait for something, but not for ever.
    pub async fn drain(&self) {
        // What is left is answered EIO when the runtime ends; drain logs that.
        let _ = us_core::daemon::shutdown::drain("requests", &self.waiting, REQUESTS_END).await;
    }
}
