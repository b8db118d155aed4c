//! The children's side: the same program, started again as a directory or a provider. It ends with
//! its parent, however that dies.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use us_core::daemon::heap;
use us_core::daemon::logging::{self, LogArgs};
use us_core::daemon::runtime::{Program, runtime};
use us_core::daemon::shutdown::Shutdown;
use us_core::daemon::size::Size;
use us_provider::config::ProviderConfig;
use us_provider::daemon::Daemon;

/// One process of `usfs up`.
#[derive(Debug, clap::Args)]
pub struct DaemonArgs {
    /// End when this process does
    #[arg(long)]
    parent: Option<i32>,
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, clap::Subcommand)]
enum Role {
    /// us-directory
    Directory(DirectoryFlags),
    /// us-provider
    Provider(ProviderFlags),
}

#[derive(Debug, clap::Args)]
struct DirectoryFlags {
    #[arg(long)]
    data: PathBuf,
    #[arg(long)]
    listen: SocketAddr,
}

#[derive(Debug, clap::Args)]
struct ProviderFlags {
    #[arg(long)]
    data: PathBuf,
    #[arg(long)]
    directory: String,
    #[arg(long)]
    identity: PathBuf,
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    capacity: Size,
}

/// Runs a daemon in this process.
///
/// # Errors
/// What made it end, for the log.
pub fn daemon(args: &DaemonArgs) -> anyhow::Result<ExitCode> {
    if let Some(parent) = args.parent.and_then(Pid::from_raw) {
        set_parent_process_death_signal(Some(Signal::TERM)).context("watch the parent")?;
        // It may have died before we asked to be told.
        if getppid() != Some(parent) {
            return Ok(ExitCode::FAILURE);
        }
    }
    logging::init(&args.log, "info")?;
    heap::keep_large_buffers();
    match &args.role {
        Role::Directory(flags) => {
            let runtime = runtime(Program::Foreground).context("start the runtime")?;
            runtime.block_on(run_directory(flags))?;
        }
        Role::Provider(flags) => {
            let daemon = open_provider(flags)?;
            let runtime = runtime(Program::Guest).context("start the runtime")?;
            runtime.block_on(run_provider(daemon))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn run_directory(flags: &DirectoryFlags) -> anyhow::Result<()> {
    logging::abort_on_panic();
    let config = us_directory::run::Config {
        data: flags.data.clone(),
        listen: flags.listen,
        ..us_directory::run::Config::default()
    };
    let shutdown = Shutdown::on_signals().context("listen to signals")?;
    us_directory::run::run(config, shutdown).await
}

fn open_provider(flags: &ProviderFlags) -> anyhow::Result<Daemon> {
    let config = ProviderConfig {
        data: flags.data.clone(),
        directory: Some(flags.directory.clone()),
        identity: Some(flags.identity.clone()),
        listen: flags.listen,
        capacity: Some(flags.capacity),
        // What it may take was decided for the whole disk, by its owner.
        reserve: Size(0),
        ..ProviderConfig::default()
    };
    Ok(Daemon::open(config)?)
}

async fn run_provider(daemon: Daemon) -> anyhow::Result<()> {
    let shutdown = Shutdown::on_signals().context("listen to signals")?;
    let ready = |address: &str, _store: &_| tracing::info!(address, "serving fragments");
    Ok(daemon.run(shutdown, ready).await?)
}
