//! `usfs up`: everything on this machine, as real processes: a directory, N providers, and in this
//! process the mount.
//!
//! The start, in order: what could be in the way is looked at first (FUSE, the mount point, the
//! state's lock), then directory, providers, volume, mount. The end: unmount and flush, providers,
//! directory.

mod children;
mod daemon;
mod state;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use us_core::daemon::heap;
use us_core::daemon::logging::{self, LogArgs};
use us_core::daemon::runtime::{Program, runtime};
use us_core::daemon::shutdown::Shutdown;
use us_core::daemon::size::Size;
use us_core::geometry::Code;
use us_core::tls::{Identity, Role};
use us_proto::v1;

use self::children::{ChildSpec, Children, Exit};
use self::state::{State, VOLUME};
use crate::cli::say;
use crate::ctl::{Target, connect};
use crate::fuse;
use crate::mount::{Ack, Options, VolumeMount, VolumeSpec, point};
use crate::places::{self, UpRecord};

pub use self::daemon::{DaemonArgs, daemon};

/// How long the directory, then all providers, may take to be there.
const READY: Duration = Duration::from_secs(60);
/// How often is looked.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// The pause before what could not be started is tried again.
const START_AGAIN: Duration = Duration::from_secs(10);

/// Flags of `usfs up`.
#[derive(Debug, Default, clap::Args)]
pub struct UpArgs {
    /// Where the disk appears: an empty folder, made if it is not there
    #[arg(default_value = "/mnt/usfs")]
    mountpoint: PathBuf,
    /// Providers to run [default: 6, or as many as before]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=255))]
    providers: Option<u16>,
    /// The code: S data and R parity fragments a block [default: 4+2]
    #[arg(long, value_name = "S+R")]
    code: Option<Code>,
    /// Where everything is kept [default: /var/lib/us/up as root, else ~/.local/share/us/up]
    #[arg(long, env = "US_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
    /// What each provider may take [default: half of the free space, shared]
    #[arg(long, value_name = "SIZE")]
    capacity: Option<Size>,
    /// Start a process again when it dies
    #[arg(long)]
    restart: bool,
    /// When fsync may return: margin (any w providers may then vanish) or full (any r)
    /// [default: margin]
    #[arg(long, value_enum, value_name = "WHEN", hide_possible_values = true)]
    ack: Option<Ack>,
    /// Mount options, as for `usfs mount`
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    #[command(flatten)]
    log: LogArgs,
}

/// Runs `usfs up`.
///
/// # Errors
/// What made it end, for people.
pub fn up(args: &UpArgs) -> anyhow::Result<ExitCode> {
    logging::init(&args.log, "warn")?;
    logging::abort_on_panic();
    let mut options = Options::parse(&args.options)?;
    options.ack = args.ack.unwrap_or(options.ack);
    fuse::check()?;
    let dir = args.data.clone().unwrap_or_else(places::up_data_dir);
    let state = State::open(&dir, args)?;
    let mountpoint = point::prepare(&args.mountpoint)?;
    heap::keep_large_buffers();
    let runtime = runtime(Program::Foreground).context("start the runtime")?;
    let disk = Disk { state, children: Children::new(), mountpoint, options };
    runtime.block_on(disk.run(args.restart))
}

/// Everything that runs.
struct Disk {
    state: State,
    children: Children,
    mountpoint: PathBuf,
    options: Options,
}

impl Disk {
    async fn run(mut self, restart: bool) -> anyhow::Result<ExitCode> {
        let shutdown = Shutdown::on_signals().context("listen to signals")?;
        tokio::spawn(heap::give_back_every(
            crate::mount::GIVE_BACK_EVERY,
            shutdown.token().clone(),
        ));
        // Cancel-safe: what was started so far is in `self.children`, and stopped below.
        let started = tokio::select! {
            started = self.start() => started.map(Some),
            () = shutdown.requested() => Ok(None),
        };
        let ended = match started {
            Ok(Some((mounted, record))) => {
                let ended = self.supervise(mounted, &shutdown, restart).await;
                record.withdraw();
                ended.map(|()| ExitCode::SUCCESS)
            }
            Ok(None) => Ok(ExitCode::from(130)),
            Err(error) => Err(error),
        };
        self.children.stop("provider").await;
        self.children.stop("directory").await;
        let _ = self.state.write_pids(&self.children.pids());
        ended
    }

    async fn start(&mut self) -> anyhow::Result<(VolumeMount, UpRecord)> {
        self.make_identities().await?;
        let directory = self.start_directory().await?;
        let record = UpRecord {
            pid: std::process::id(),
            data: self.state.dir.clone(),
            directory: directory.clone(),
            admin_identity: self.state.identity("admin"),
            client_identity: self.state.identity("client"),
            mount_point: self.mountpoint.clone(),
        };
        record.publish().context("write up.json")?;
        self.start_providers(&directory).await?;
        let info = self.make_volume(&directory).await?;
        let spec = VolumeSpec {
            directory,
            volume: VOLUME.to_owned(),
            identity: record.client_identity.clone(),
            mountpoint: self.mountpoint.clone(),
            data: self.state.dir.clone(),
            options: self.options.clone(),
            detached: false,
        };
        let mounted = VolumeMount::open(&spec).await?;
        self.greet(&info);
        Ok((mounted, record))
    }

    fn greet(&self, info: &v1::VolumeInfo) {
        let at = self.mountpoint.display();
        let (s, r, providers) = (info.s, info.r, self.state.settings.providers);
        say(&format!(
            "Your disk is at {at} — {s}+{r} over {providers} providers. \
             Try: cp -r ~/Documents {at}; usctl status"
        ));
        let kept = if self.state.new { "is kept in" } else { "was found again in" };
        say(&format!("Everything {kept} {}. Ctrl-C unmounts.", self.state.dir.display()));
        let fragments = usize::from(providers);
        if fragments < (s + r) as usize {
            say(&format!(
                "{fragments} providers are fewer than the {} fragments of a block: some share a \
                 provider, and its loss counts more than once.",
                s + r
            ));
        }
    }

    /// The certificate authority at the first start; a certificate for all who have none.
    async fn make_identities(&self) -> anyhow::Result<()> {
        let data = self.state.data("directory");
        let providers = (0..self.state.settings.providers).map(provider_name);
        let providers = providers.map(|name| (Role::Provider, name));
        let people = [(Role::Client, "client".to_owned()), (Role::Admin, "admin".to_owned())];
        let wanted: Vec<_> = providers
            .chain(people)
            .map(|(role, name)| (role, self.state.identity(&name), name))
            .filter(|(_, out, _)| !Identity::exists(out))
            .collect();
        let issuing = tokio::task::spawn_blocking(move || {
            if !us_directory::run::is_initialised(&data) {
                us_directory::run::init(&data).context("begin the directory")?;
            }
            for (role, out, name) in wanted {
                us_directory::run::issue_identity(&data, role, &name, &out)
                    .with_context(|| format!("issue the certificate of {name}"))?;
            }
            Ok(())
        });
        issuing.await?
    }

    async fn start_directory(&mut self) -> anyhow::Result<String> {
        let (data, listen) = (self.state.data("directory"), self.state.listen("directory"));
        let address_file = data.join("address");
        // The file of the last time must not be taken for that of this time.
        let _ = std::fs::remove_file(&address_file);
        let mut arguments = words(["--data"], [data.as_path()]);
        arguments.extend(["--listen", &listen].map(OsString::from));
        self.start_child("directory", "directory", arguments)?;
        let until = Instant::now() + READY;
        loop {
            if let Ok(address) = std::fs::read_to_string(&address_file) {
                let address = address.trim().to_owned();
                if let Ok(mut admin) = connect(&self.target(&address)).await
                    && admin.status().await.is_ok()
                {
                    return Ok(address);
                }
            }
            self.wait_a_little(until, "the directory").await?;
        }
    }

    fn target(&self, directory: &str) -> Target {
        Target {
            directory: Some(directory.to_owned()),
            identity: Some(self.state.identity("admin")),
        }
    }

    async fn start_providers(&mut self, directory: &str) -> anyhow::Result<()> {
        for number in 0..self.state.settings.providers {
            let name = provider_name(number);
            let (data, identity) = (self.state.data(&name), self.state.identity(&name));
            let mut arguments = words(["--data"], [data.as_path()]);
            let listen = self.state.listen(&name);
            let capacity = self.state.settings.capacity.bytes().to_string();
            arguments.extend(["--directory", directory, "--listen", &listen].map(OsString::from));
            arguments.extend(words(["--identity"], [identity.as_path()]));
            arguments.extend(["--capacity", &capacity].map(OsString::from));
            self.start_child(&name, "provider", arguments)?;
        }
        let until = Instant::now() + READY;
        let mut admin = connect(&self.target(directory)).await?;
        let wanted = usize::from(self.state.settings.providers);
        loop {
            let providers = admin.status().await?.providers;
            let online = |one: &&v1::ProviderStatus| one.state() == v1::ProviderState::Online;
            if providers.iter().filter(online).count() >= wanted {
                return Ok(());
            }
            self.wait_a_little(until, "the providers").await?;
        }
    }

    async fn make_volume(&self, directory: &str) -> anyhow::Result<v1::VolumeInfo> {
        let mut admin = connect(&self.target(directory)).await?;
        let volumes = admin.list_volumes().await?;
        match volumes.into_iter().find(|volume| volume.name == VOLUME) {
            Some(info) => Ok(info),
            None => {
                let code = self.state.settings.code()?;
                let (s, r) = (code.s() as u32, code.r() as u32);
                let name = VOLUME.to_owned();
                let client = Identity::load(&self.state.identity("client"))?;
                let key_hash = client.own().key_hash.as_bytes().to_vec().into();
                let access = vec![v1::VolumeAccess { key_hash, read_only: false }];
                let request = v1::CreateVolumeRequest { name, s, r, access, ..Default::default() };
                admin.create_volume(request).await
            }
        }
    }

    fn start_child(
        &mut self,
        name: &str,
        role: &'static str,
        arguments: Vec<OsString>,
    ) -> anyhow::Result<()> {
        let log = self.state.log(name);
        self.children.start(ChildSpec { name: name.to_owned(), role, arguments, log })?;
        self.state.write_pids(&self.children.pids())
    }

    /// A pause of the start, in which a child that ends is the end of it all.
    async fn wait_a_little(&mut self, until: Instant, what: &str) -> anyhow::Result<()> {
        if Instant::now() > until {
            let logs = self.state.dir.join("logs");
            bail!("{what} did not come up in {} s: see {}", READY.as_secs(), logs.display());
        }
        if let Ok(exit) = tokio::time::timeout(LOOK_EVERY, self.children.next_exit()).await {
            bail!("{}", self.explain_early_exit(&exit));
        }
        Ok(())
    }

    fn explain_early_exit(&self, exit: &Exit) -> String {
        let log = self.state.log(&exit.name);
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let last = text.trim().lines().next_back().unwrap_or("it said nothing").to_owned();
        format!(
            "{} ended at its start ({}): {last} (log: {})",
            exit.name,
            exit.status,
            log.display()
        )
    }

    /// Waits for the end, and says what dies meanwhile.
    async fn supervise(
        &mut self,
        mut mounted: VolumeMount,
        shutdown: &Shutdown,
        restart: bool,
    ) -> anyhow::Result<()> {
        let mut revivals: Vec<(tokio::time::Instant, ChildSpec)> = Vec::new();
        loop {
            revivals.sort_by_key(|(when, _)| *when);
            let next = revivals.first().map(|(when, _)| *when);
            // Cancel-safe: all four only wait; an exit not taken stays queued.
            tokio::select! {
                () = shutdown.requested() => break,
                () = mounted.ended() => {
                    say("The disk was unmounted by someone: ending.");
                    break;
                }
                exit = self.children.next_exit() => {
                    self.report(&exit, restart);
                    if let Some((spec, pause)) =
                        self.children.spec(&exit.name).filter(|_| restart)
                    {
                        revivals.push((tokio::time::Instant::now() + pause, spec));
                    }
                    self.state.write_pids(&self.children.pids())?;
                }
                () = until(next) => {
                    let (_, spec) = revivals.remove(0);
                    let name = spec.name.clone();
                    match self.children.start(spec.clone()) {
                        Ok(()) => say(&format!("{name} runs again.")),
                        Err(error) => {
                            say(&format!("{name} cannot be started yet: {error:#}"));
                            revivals.push((tokio::time::Instant::now() + START_AGAIN, spec));
                        }
                    }
                    self.state.write_pids(&self.children.pids())?;
                }
            }
        }
        say("Unmounting…");
        // It ends by itself: a flush that stands still is given up, and leaves a rescue file.
        mounted.close().await
    }

    fn report(&self, exit: &Exit, restart: bool) {
        let log = self.state.log(&exit.name);
        let name = &exit.name;
        say(&format!("{name} died ({}); its log is {}.", exit.status, log.display()));
        if restart {
            say("  It is started again in a moment.");
        } else if let Some((spec, _)) = self.children.spec(name) {
            say(&format!("  Bring it back with: {}", spec.by_hand()));
            say("  (or stop and start `usfs up`; with --restart it does so by itself)");
        }
    }
}

/// Waits until `when`; for ever where there is nothing to wait for. Cancel-safe.
async fn until(when: Option<tokio::time::Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

fn provider_name(number: u16) -> String {
    format!("provider{number}")
}

fn words<const N: usize, const M: usize>(text: [&str; N], paths: [&Path; M]) -> Vec<OsString> {
    let text = text.into_iter().map(OsString::from);
    text.chain(paths.into_iter().map(|path| path.as_os_str().to_owned())).collect()
}
