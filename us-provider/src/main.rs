//! `us-provider`: the daemon on an idle desktop, and its owner's commands.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, CommandFactory, Parser, Subcommand};
use serde::Serialize;
use us_core::daemon::cli::CliCommand;
use us_core::daemon::config::{Layers, load};
use us_core::daemon::heap;
use us_core::daemon::http::MetricsAddress;
use us_core::daemon::joined::{machine_name, read_code};
use us_core::daemon::logging::{self, LogArgs};
use us_core::daemon::runtime::{Program, runtime};
use us_core::daemon::shutdown::Shutdown;
use us_core::daemon::size::{Size, human_duration};
use us_core::tls::Role;
use us_core::wire::join::join as wire_join;
use us_provider::config::{ENVIRONMENT_PREFIX, ProviderConfig, default_data};
use us_provider::control::{self, Answer, Request, Status};
use us_provider::daemon::{Daemon, DaemonError, ready_line};
use us_provider::guest::lower_priority;
use us_provider::leave::{Leave, Progress};

/// How often the daemon is asked how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Keep fragments of Us volumes on this machine's idle disk.
///
/// Exit codes: 0 done; 1 failed; 2 wrong usage; 3 the directory refuses this provider; 4 another
/// process uses the data folder; 5 it has left for good.
#[derive(Parser, Debug)]
#[command(name = "us-provider", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the daemon
    Run(Box<RunArgs>),
    /// Join a cluster with the code of an invitation; then `us-provider run`
    Join(JoinArgs),
    /// Show how the daemon is
    Status(StatusArgs),
    /// Take no new fragments and rest, until resumed; what is stored stays readable
    Pause(DataArgs),
    /// End a pause
    Resume(DataArgs),
    /// Leave for good: everything is moved elsewhere first. Waits, and can be run again
    Leave(LeaveArgs),
    #[command(flatten)]
    Cli(CliCommand),
}

#[derive(Args, Debug)]
struct RunArgs {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE", env = "US_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// Flags of the same names as the configuration's keys. None given says nothing.
#[derive(Args, Debug, Serialize)]
struct Settings {
    /// Folder of the store [default: /var/lib/us/provider as root, else in the user's data folder]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Address of the directory
    #[arg(long, value_name = "HOST:PORT", help_heading = "Network")]
    directory: Option<String>,
    /// Folder of the certificate [default: identity in the data folder]
    #[arg(long, value_name = "DIR", help_heading = "Network")]
    identity: Option<PathBuf>,
    /// Address to listen on; port 0 takes any [default: 0.0.0.0:7602]
    #[arg(long, value_name = "IP:PORT", help_heading = "Network")]
    listen: Option<std::net::SocketAddr>,
    /// What clients dial, where it differs from the address listened on
    #[arg(long, value_name = "HOST:PORT", help_heading = "Network")]
    advertise: Option<String>,
    /// Serve /metrics and /healthz here: unix:PATH, or IP:PORT for TLS with both certificates
    #[arg(long, value_name = "ADDRESS", help_heading = "Network")]
    metrics: Option<MetricsAddress>,
    /// The most that fragments may take, for example 100G [default: what the reserve leaves]
    #[arg(long, value_name = "SIZE", help_heading = "Space")]
    capacity: Option<Size>,
    /// What stays free on the disk [default: 5G]
    #[arg(long, value_name = "SIZE", help_heading = "Space")]
    reserve: Option<Size>,
    /// Where this machine stands, for example campus/building/room
    #[arg(long, value_name = "PATH", help_heading = "Space")]
    site: Option<String>,
    /// What the line can send, in KiB a second; repairs take a share of it [default: not said]
    #[arg(long, value_name = "KIB", help_heading = "Network")]
    uplink_kib_per_s: Option<u64>,
    /// What the line can receive, in KiB a second [default: not said]
    #[arg(long, value_name = "KIB", help_heading = "Network")]
    downlink_kib_per_s: Option<u64>,
}

#[derive(Args, Debug)]
struct JoinArgs {
    /// The code that `usctl invite` printed; without it, or with -, it is read from standard input
    #[arg(value_name = "CODE")]
    code: Option<String>,
    /// Folder of the store the daemon will run on
    #[arg(long, value_name = "DIR", env = "US_PROVIDER_DATA")]
    data: Option<PathBuf>,
    /// Folder of the certificate [default: identity in the data folder]
    #[arg(long, value_name = "DIR", env = "US_PROVIDER_IDENTITY")]
    identity: Option<PathBuf>,
    /// What this machine is called, where the invitation does not say [default: its host name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

#[derive(Args, Debug)]
struct DataArgs {
    /// Folder of the store the daemon runs on
    #[arg(long, value_name = "DIR", env = "US_PROVIDER_DATA")]
    data: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct LeaveArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Stay after all
    #[arg(long)]
    undo: bool,
}

#[derive(Args, Debug)]
struct StatusArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = logging::init(&cli.log, "info") {
        eprintln!("us-provider: {error}");
        return ExitCode::FAILURE;
    }
    let result = match cli.command {
        Command::Run(args) => run(*args),
        Command::Join(args) => join(&args),
        Command::Status(args) => {
            ask(&args.data, Request::Status).and_then(|status| show(&status, args.json))
        }
        Command::Pause(args) => ask(&args, Request::Pause).map(|_| {
            println!("paused: no new fragments; what is stored stays readable");
        }),
        Command::Leave(args) => leave(&args),
        Command::Resume(args) => ask(&args, Request::Resume).map(|_| println!("resumed")),
        Command::Cli(command) => command.run(Cli::command()).map_err(Into::into),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("us-provider: {error:#}");
            let code = error.downcast_ref::<DaemonError>().map_or(1, DaemonError::exit_code);
            ExitCode::from(code)
        }
    }
}

fn run(args: RunArgs) -> anyhow::Result<()> {
    let layers = Layers {
        file: args.config.as_deref(),
        environment_prefix: Some(ENVIRONMENT_PREFIX),
        flags: args.settings,
    };
    let config: ProviderConfig = load(&layers).context("configuration")?;
    heap::keep_large_buffers();
    // Threads inherit it, so it comes before the first.
    if let Err(error) = lower_priority(&config.guest) {
        tracing::warn!(%error, "the priority stays as it is");
    }
    let data = config.data.clone();
    let daemon = Daemon::open(config)?;
    let runtime = runtime(Program::Guest).context("start the runtime")?;
    let result = runtime.block_on(async {
        let shutdown = Shutdown::on_signals().context("handle signals")?;
        let ready = |address: &str, store: &_| println!("{}", ready_line(address, store, &data));
        daemon.run(shutdown, ready).await.map_err(anyhow::Error::from)
    });
    // A read that hangs in the disk must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn join(args: &JoinArgs) -> anyhow::Result<()> {
    let code = read_code(args.code.as_deref())?;
    let data = args.data.clone().unwrap_or_else(default_data);
    let dir = args.identity.clone().unwrap_or_else(|| data.join("identity"));
    let name = args.name.clone().unwrap_or_else(machine_name);
    let runtime = runtime(Program::Foreground).context("start the runtime")?;
    let identity = runtime.block_on(wire_join(&code, Role::Provider, &name, &dir))?;
    println!("joined {} as {}", code.address, identity.own());
    println!("key and certificate are in {}; next: us-provider run", dir.display());
    Ok(())
}

/// Asks the daemon to leave, and shows how far it is until it has.
fn leave(args: &LeaveArgs) -> anyhow::Result<()> {
    let data = args.data.data.clone().unwrap_or_else(default_data);
    if Leave::load(&data).has_left() {
        if args.undo {
            let mark = data.join("leaving");
            bail!("this provider has left already: to join again, remove {}", mark.display());
        }
        println!("this provider has left");
        return Ok(());
    }
    if args.undo {
        ask(&args.data, Request::Stay)?;
        println!("it stays");
        return Ok(());
    }
    let mut status = ask(&args.data, Request::Leave)?;
    let mut shown = String::new();
    loop {
        let Some(progress) = status.leaving else {
            bail!("somebody else said that it stays after all");
        };
        let line = leave_line(&progress);
        if line != shown {
            println!("{line}");
            shown = line;
        }
        std::thread::sleep(LOOK_EVERY);
        status = match ask(&args.data, Request::Status) {
            Ok(status) => status,
            Err(_) if Leave::load(&data).has_left() => {
                println!("this provider has left; its data folder can be removed");
                return Ok(());
            }
            Err(error) => {
                return Err(error.context("it has not left yet; when it runs it goes on leaving"));
            }
        };
        if Leave::load(&data).has_left() {
            println!("this provider has left; its data folder can be removed");
            return Ok(());
        }
    }
}

fn leave_line(progress: &Progress) -> String {
    match progress.fragments_left {
        None => "telling the directory".to_owned(),
        Some(0) => {
            let left = human_duration(Duration::from_secs(progress.left_s));
            format!("nothing is left; for {left} readers may still ask for what was here")
        }
        Some(left) if progress.left_s > 0 => {
            let time = human_duration(Duration::from_secs(progress.left_s));
            format!("{left} fragments left, {time} at this rate")
        }
        Some(left) => format!("{left} fragments left"),
    }
}

fn ask(args: &DataArgs, request: Request) -> anyhow::Result<Box<Status>> {
    let data = args.data.clone().unwrap_or_else(default_data);
    match control::ask(&data, request).with_context(|| not_running(&data))? {
        Answer::Ok(status) => Ok(status),
        Answer::Error { message } => bail!(message),
    }
}

fn not_running(data: &Path) -> String {
    format!(
        "no provider answers in {}: start it with us-provider run, or say where it runs with --data",
        data.display()
    )
}

fn show(status: &Status, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(status)?);
        return Ok(());
    }
    let state = if status.accepts_puts { "taking fragments" } else { status.note.as_str() };
    let size = |bytes| Size(bytes).to_string();
    println!("state      {state}");
    if let Some(progress) = &status.leaving {
        println!("leaving    {}", leave_line(progress));
    }
    println!("address    {}   directory {}", status.address, status.directory);
    println!(
        "space      {} used of {}, {} free",
        size(status.used_bytes),
        size(status.capacity_bytes),
        size(status.free_bytes)
    );
    println!(
        "fragments  {} kept, {} in the trash, {} damaged",
        status.fragments, status.trashed, status.damaged
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_is_documented() {
        Cli::command().debug_assert();
        let doc = include_str!("../../docs/configuration.md");
        for name in us_core::daemon::cli::settings(&Cli::command()) {
            assert!(doc.contains(&format!("`{name}`")), "{name} is not in docs/configuration.md");
        }
        assert!(Cli::try_parse_from(["us-provider", "completions", "bash"]).is_ok());
    }
}
