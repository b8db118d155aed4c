//! The file systems under test: how each is mounted, mounted again, and where it keeps its bytes.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::mount::UnmountFlags;
use us_tests::cluster::{Cluster, Mount, Shape, is_mounted};

use crate::machine;

const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Of usfs and of GlusterFS.
pub(crate) const PROVIDERS: usize = 6;
/// As `usfs up` has it, half of what is free is shared among the providers, if it is not less.
const CAPACITY_MIN_MIB: u64 = 4096;

/// One of the file systems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    Local,
    PassThrough,
    Gluster,
    Usfs,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Local, Self::PassThrough, Self::Gluster, Self::Usfs];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::PassThrough => "pass-through",
            Self::Gluster => "gluster",
            Self::Usfs => "usfs",
        }
    }
}

/// A mounted file system.
pub(crate) enum Disk {
    Local(PathBuf),
    PassThrough(PassThrough),
    Gluster(Gluster),
    Usfs(Box<Usfs>),
}

impl Disk {
    /// Starts one, with everything it stores below `root`.
    pub(crate) fn start(kind: Kind, root: &Path) -> Result<Self> {
        Ok(match kind {
            Kind::Local => {
                let folder = root.join("local");
                fs::create_dir(&folder)?;
                Self::Local(folder)
            }
            Kind::PassThrough => Self::PassThrough(PassThrough::start(root)?),
            Kind::Gluster => Self::Gluster(Gluster::start(root)?),
            Kind::Usfs => Self::Usfs(Box::new(Usfs::start(root)?)),
        })
    }

    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Local(_) => Kind::Local,
            Self::PassThrough(_) => Kind::PassThrough,
            Self::Gluster(_) => Kind::Gluster,
            Self::Usfs(_) => Kind::Usfs,
        }
    }

    /// Where files are made.
    pub(crate) fn folder(&self) -> &Path {
        match self {
            Self::Local(folder) => folder,
            Self::PassThrough(disk) => &disk.point,
            Self::Gluster(disk) => &disk.point,
            Self::Usfs(disk) => &disk.point,
        }
    }

    /// The folders of the bytes stored.
    pub(crate) fn stores(&self) -> Vec<PathBuf> {
        match self {
            Self::Local(folder) => vec![folder.clone()],
            Self::PassThrough(disk) => vec![disk.source.clone()],
            Self::Gluster(disk) => disk.bricks.clone(),
            Self::Usfs(disk) => (0..PROVIDERS).map(|n| disk.cluster.provider_data(n)).collect(),
        }
    }

    /// Unmounts and mounts again: the client forgets everything. The local file system stays.
    pub(crate) fn remount(&mut self) -> Result<()> {
        match self {
            Self::Local(_) => Ok(()),
            Self::PassThrough(disk) => {
                disk.unmount()?;
                disk.mount()
            }
            Self::Gluster(disk) => {
                unmount(&disk.point)?;
                disk.mount()
            }
            Self::Usfs(disk) => {
                disk.unmount();
                disk.mount();
                Ok(())
            }
        }
    }

    /// Unmounts for good.
    pub(crate) fn end(&mut self) -> Result<()> {
        match self {
            Self::Local(_) => Ok(()),
            Self::PassThrough(disk) => disk.unmount(),
            Self::Gluster(disk) => unmount(&disk.point),
            Self::Usfs(disk) => {
                disk.unmount();
                Ok(())
            }
        }
    }
}

fn wait(what: &str, mut until: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !until()? {
        ensure!(begun.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

fn unmount(point: &Path) -> Result<()> {
    wait("an unmount", || match rustix::mount::unmount(point, UnmountFlags::empty()) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::BUSY) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("unmount {}", point.display())),
    })
}

/// Our own pass-through, or the program of `US_PASSTHROUGH`.
pub(crate) struct PassThrough {
    source: PathBuf,
    point: PathBuf,
    process: Option<Child>,
}

impl PassThrough {
    fn start(root: &Path) -> Result<Self> {
        let (source, point) = (root.join("pass-through-source"), root.join("pass-through"));
        fs::create_dir(&source)?;
        fs::create_dir(&point)?;
        let mut disk = Self { source, point, process: None };
        disk.mount()?;
        Ok(disk)
    }

    fn mount(&mut self) -> Result<()> {
        let mut command = match std::env::var("US_PASSTHROUGH") {
            Ok(words) => {
                let mut words = words.split_whitespace();
                let mut command = Command::new(words.next().context("US_PASSTHROUGH is empty")?);
                command.args(words);
                command
            }
            Err(_) => {
                let mut command = Command::new(std::env::current_exe()?);
                command.arg(crate::PASS_THROUGH_FLAG);
                command
            }
        };
        command.arg(&self.source).arg(&self.point).stdin(Stdio::null()).stdout(Stdio::null());
        let mut process = command.spawn().context("start the pass-through")?;
        wait("the pass-through", || {
            // One that goes to the background ends well, and is mounted soon.
            let ended = process.try_wait()?;
            ensure!(
                ended.is_none_or(|status| status.success()),
                "the pass-through ended: {ended:?}"
            );
            Ok(is_mounted(&self.point))
        })?;
        self.process = Some(process);
        Ok(())
    }

    fn unmount(&mut self) -> Result<()> {
        unmount(&self.point)?;
        if let Some(mut process) = self.process.take() {
            process.wait()?;
        }
        Ok(())
    }
}

/// A dispersed volume 4+2, its daemons in the namespaces of this bench.
pub(crate) struct Gluster {
    point: PathBuf,
    bricks: Vec<PathBuf>,
}

impl Gluster {
    const HOST: &str = "10.99.0.1";
    const VOLUME: &str = "bench";

    /// Whether it is installed.
    pub(crate) fn is_here() -> bool {
        ["glusterd", "glusterfsd", "gluster", "glusterfs"].into_iter().all(machine::has)
    }

    fn start(root: &Path) -> Result<Self> {
        // The machine's own daemons and their state are not touched.
        for state in ["/var/lib/glusterd", "/var/log/glusterfs", "/run"] {
            fs::create_dir_all(state)?;
            call("mount", ["-t", "tmpfs", "none", state])?;
        }
        fs::create_dir_all("/run/gluster")?;
        call("ip", ["address", "add", &format!("{}/32", Self::HOST), "dev", "lo"])?;
        call("glusterd", None::<&str>)?;
        wait("glusterd", || Ok(gluster(["volume", "list"]).is_ok()))?;
        let folder = root.join("gluster");
        let bricks: Vec<_> = (0..PROVIDERS).map(|n| folder.join(format!("brick{n}"))).collect();
        let mut create: Vec<OsString> =
            ["volume", "create", Self::VOLUME, "disperse", "6", "redundancy", "2"]
                .map(OsString::from)
                .into();
        for brick in &bricks {
            fs::create_dir_all(brick)?;
            create.push(format!("{}:{}", Self::HOST, brick.display()).into());
        }
        create.push("force".into());
        gluster(create)?;
        gluster(["volume", "start", Self::VOLUME])?;
        let point = folder.join("mount");
        fs::create_dir(&point)?;
        let disk = Self { point, bricks };
        disk.mount()?;
        Ok(disk)
    }

    fn mount(&self) -> Result<()> {
        let volume = format!("{}:/{}", Self::HOST, Self::VOLUME);
        let point = self.point.to_str().context("a plain path")?;
        call("mount", ["-t", "glusterfs", &volume, point])?;
        wait("GlusterFS", || Ok(is_mounted(&self.point) && fs::read_dir(&self.point).is_ok()))
    }
}

fn gluster(arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Result<()> {
    let script = OsString::from("--mode=script");
    call("gluster", std::iter::once(script).chain(arguments.into_iter().map(Into::into)))
}

/// Runs a program to its end; what it said is the error.
pub(crate) fn call(
    program: &str,
    arguments: impl IntoIterator<Item = impl Into<OsString>>,
) -> Result<()> {
    let mut command = Command::new(program);
    command.args(arguments.into_iter().map(Into::into)).stdin(Stdio::null());
    let output = command.output().with_context(|| format!("start {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} ended with {}: {}", output.status, said.trim());
    Ok(())
}

/// A directory, six providers, 4+2, TLS, everything else as shipped.
pub(crate) struct Usfs {
    mount: Option<Mount>,
    pub(crate) cluster: Cluster,
    point: PathBuf,
}

impl Usfs {
    fn start(root: &Path) -> Result<Self> {
        let space = rustix::fs::statvfs(root)?;
        let free_mib = space.f_bavail * space.f_frsize / (1 << 20);
        let share = (free_mib / 2 / PROVIDERS as u64).max(CAPACITY_MIN_MIB);
        let capacity = format!("{share}M");
        let shape = Shape { providers: PROVIDERS, capacity, as_shipped: true, ..Shape::default() };
        let cluster = Cluster::start(shape);
        let point = PathBuf::from(cluster.at("mount"));
        fs::create_dir(&point)?;
        let mut disk = Self { mount: None, cluster, point };
        disk.mount();
        Ok(disk)
    }

    fn mount(&mut self) {
        self.mount = Some(self.cluster.mount_at(&self.point, "mount"));
    }

    fn unmount(&mut self) {
        if let Some(mount) = self.mount.take() {
            mount.unmount();
        }
    }
}
