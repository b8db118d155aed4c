//! `usfs mount` and `usfs umount`: one volume at one mount point, from session to last flush.
//!
//! The end, in order: the kernel lets go (nobody can ask for more), requests under way end, the file
//! system flushes and closes its session. A mount that is in use is waited for a little, then hidden
//! from sight; who still uses it keeps what is durable.

mod background;
pub mod options;
mod pins;
pub mod point;
mod registry;
mod sessions;
mod volume;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use us_core::daemon::heap;
use us_core::daemon::logging::{self, LogArgs};
use us_core::daemon::runtime::{Program, runtime};
use us_core::daemon::shutdown::Shutdown;
use us_core::tls::Role;

pub use self::options::{Ack, Options};
pub use self::volume::{VolumeMount, VolumeSpec};
use crate::fuse::kernel::{self, FILE_SYSTEM_TYPE};
use crate::places::{self, UpRecord};

/// How long a mount keeps memory that is free.
pub(crate) const GIVE_BACK_EVERY: Duration = Duration::from_secs(5);

/// Flags of `usfs mount`.
#[derive(Debug, clap::Args)]
pub struct MountArgs {
    /// What to mount: HOST:PORT/VOLUME
    #[arg(value_name = "DIRECTORY/VOLUME")]
    pub(super) source: String,
    /// Where: an empty folder, made if it is not there
    pub(super) mountpoint: PathBuf,
    /// The folder of the certificate to show
    #[arg(long, env = "US_IDENTITY", value_name = "DIR")]
    pub(super) identity: Option<PathBuf>,
    /// Mount options, separated by commas: ro, allow_other, suid, dev, noexec, noatime, sync,
    /// ack=full (fsync waits for every fragment, not only for the write margin), identity=DIR,
    /// memory=SIZE, cache=DIR, cache_size=SIZE; of a private volume passphrase_file=FILE, key_file=FILE
    /// or recovery_key_file=FILE, and private where no other volume will do; remount changes what is
    /// mounted there, as far as the kernel decides it
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub(super) options: Vec<String>,
    /// Stay in the foreground (as it does anyhow)
    #[arg(short, long, conflicts_with = "background")]
    foreground: bool,
    /// Return when it is mounted, and go on in the background
    #[arg(short, long)]
    background: bool,
    /// This is the background process.
    #[arg(long, hide = true)]
    detached: bool,
    #[command(flatten)]
    pub(super) log: LogArgs,
}

/// Flags of `usfs umount`.
#[derive(Debug, clap::Args)]
pub struct UmountArgs {
    /// Where it is mounted
    mountpoint: PathBuf,
    /// Return only when everything written is durable
    #[arg(long)]
    flush: bool,
    /// Hide it at once, even while it is in use
    #[arg(long)]
    lazy: bool,
}

/// "host:port/volume" in its two parts.
fn split_source(source: &str) -> anyhow::Result<(&str, &str)> {
    match source.rsplit_once('/') {
        Some((directory, volume)) if !directory.is_empty() && !volume.is_empty() => {
            Ok((directory, volume))
        }
        _ => {
            bail!("{source:?} names no volume: write HOST:PORT/VOLUME, as in us.example:7460/disk")
        }
    }
}

/// Runs `usfs mount`.
///
/// # Errors
/// What made it end, for people.
pub fn mount(args: &MountArgs) -> anyhow::Result<ExitCode> {
    let (directory, volume) = split_source(&args.source)?;
    let options = Options::parse(&args.options)?;
    if options.remount {
        let at = point::absolute(&args.mountpoint)?;
        let there = kernel::mount_at(&at)?.filter(|entry| entry.kind == FILE_SYSTEM_TYPE);
        let there = there.with_context(|| format!("no usfs is mounted at {}", at.display()))?;
        let changed = Options::of_mount(&there.options)?.changed_by(&args.options)?;
        kernel::remount(&at, &changed.for_kernel(args.source.clone()))
            .with_context(|| format!("remount {}", at.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.background {
        return background::start(args);
    }
    if args.detached {
        // Fails only for a leader of a process group, which a child is not.
        let _ = rustix::process::setsid();
    }
    logging::init(&args.log, "info")?;
    logging::abort_on_panic();
    let identity = args.identity.clone().or_else(|| options.identity.clone());
    let identity = match identity {
        Some(identity) => identity,
        None => local_identity(directory)?,
    };
    let spec = VolumeSpec {
        directory: directory.to_owned(),
        volume: volume.to_owned(),
        identity,
        mountpoint: args.mountpoint.clone(),
        data: places::mount_data_dir(),
        options,
        detached: args.detached,
    };
    let ready = if args.detached { background::READY.to_owned() } else { String::new() };
    heap::keep_large_buffers();
    let runtime = runtime(Program::Foreground).context("start the runtime")?;
    runtime.block_on(serve(spec, ready))
}

async fn serve(spec: VolumeSpec, ready: String) -> anyhow::Result<ExitCode> {
    let shutdown = Shutdown::on_signals().context("listen to signals")?;
    tokio::spawn(heap::give_back_every(GIVE_BACK_EVERY, shutdown.token().clone()));
    // Cancel-safe: whatever of the mount was begun ends with the process.
    let mut mounted = tokio::select! {
        mounted = VolumeMount::open(&spec) => mounted?,
        () = shutdown.requested() => return Ok(ExitCode::from(130)),
    };
    if ready.is_empty() {
        crate::cli::say(&format!("{} is mounted at {}", spec.volume, mounted.point().display()));
    } else {
        crate::cli::say(&ready);
    }
    // Cancel-safe: both only wait.
    tokio::select! {
        () = shutdown.requested() => {}
        () = mounted.ended() => {}
    }
    mounted.close().await?;
    Ok(ExitCode::SUCCESS)
}

/// The identity of the `usfs up` of this machine, where it is that directory, else the one this machine
/// joined with.
fn local_identity(directory: &str) -> anyhow::Result<PathBuf> {
    let of_up = UpRecord::find().filter(|up| up.directory == directory);
    let of_up = of_up.map(|up| up.client_identity);
    let joined = || places::joined(Role::Client);
    of_up.or_else(|| joined().map(|(_, dir)| dir)).with_context(|| {
        format!(
            "join with `usfs join`, or give --identity DIR (or -o identity=DIR) for {directory}"
        )
    })
}

/// Runs `usfs umount`.
///
/// # Errors
/// What made it fail, for people.
pub fn umount(args: &UmountArgs) -> anyhow::Result<ExitCode> {
    let at = point::absolute(&args.mountpoint)?;
    if kernel::mount_at(&at)?.is_none() {
        bail!("nothing is mounted at {}", at.display());
    }
    let server = args.flush.then(|| registry::Server::find(&at));
    match kernel::unmount(&at, args.lazy) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let users = point::users(&at);
            let by = if users.is_empty() { "someone".to_owned() } else { users.join(", ") };
            bail!("{} is in use by {by}: end that, or use --lazy", at.display());
        }
        Err(error) => return Err(error).with_context(|| format!("unmount {}", at.display())),
    }
    match server {
        None => {}
        Some(Err(error)) => bail!(
            "unmounted; but it cannot be told whether all is flushed, because its process does \
             not say so on this account ({error})"
        ),
        Some(Ok(server)) => {
            if let Err(reason) = server.wait() {
                bail!("unmounted; but not everything is durable: {reason}");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The command line of `mount.usfs`, which `mount` calls for fstab's lines, as that of `usfs`.
/// `None`: it was asked only to pretend.
pub fn from_mount_helper(arguments: &[OsString]) -> Option<Vec<OsString>> {
    let mut out: Vec<OsString> = vec!["usfs".into(), "mount".into(), "--background".into()];
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.to_str() {
            Some("-o") => {
                out.push("-o".into());
                out.extend(rest.next().cloned());
            }
            Some("-N" | "-t") => {
                let _ = rest.next();
            }
            Some(flags) if flags.starts_with('-') && flags.len() > 1 => {
                if flags.contains('f') {
                    return None;
                }
            }
            _ => out.push(argument.clone()),
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_have_two_parts() {
        assert_eq!(split_source("127.0.0.1:70/disk").unwrap(), ("127.0.0.1:70", "disk"));
        assert_eq!(split_source("[::1]:70/a").unwrap(), ("[::1]:70", "a"));
        assert!(split_source("disk").is_err());
        assert!(split_source("host:1/").is_err());
    }

    #[test]
    fn mount_calls_its_helper() {
        let call = |text: &str| {
            let arguments: Vec<OsString> = text.split(' ').map(Into::into).collect();
            from_mount_helper(&arguments)
        };
        let wanted = "usfs mount --background h:1/disk /mnt/us -o rw,identity=/etc/us";
        let wanted: Vec<OsString> = wanted.split(' ').map(Into::into).collect();
        assert_eq!(call("h:1/disk /mnt/us -n -o rw,identity=/etc/us"), Some(wanted.clone()));
        assert_eq!(call("h:1/disk /mnt/us -s -t usfs -o rw,identity=/etc/us"), Some(wanted));
        assert_eq!(call("h:1/disk /mnt/us -f"), None);
    }
}
