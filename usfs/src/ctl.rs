//! `usctl`: looks at a cluster through its directory, and acts on it.
//!
//! Exit codes: 0 done (with `status --exit-code`: everything has all its fragments); 1 degraded;
//! 2 some data cannot be read until providers return; 3 data is lost; 4 the directory cannot be
//! reached or refused; 64 the command makes no sense (what it names is not there); 77 the passphrase
//! or key does not open the volume. `fsck` has its own ([`fsck`]).

mod access;
mod act;
mod connect;
mod fsck;
mod json;
pub mod members;
mod place;
mod plan;
mod status;
mod table;
mod trash;
mod volume;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};
use us_core::daemon::cli::CliCommand;
use us_core::daemon::logging::{self, LogArgs};
use us_core::daemon::size::Size;
use us_core::geometry::Code;
use us_core::ids::BlockId;
use us_core::tls::Role;

pub use connect::{Admin, Target, connect};

use crate::unlock;

/// The directory could not be reached, or refused.
pub const EXIT_UNREACHABLE: u8 = 4;
/// The command makes no sense.
pub const EXIT_SENSELESS: u8 = 64;

/// What the command names is not there, or something it needs was not given: asking the directory
/// again would not help.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
struct Senseless(anyhow::Error);

/// Nobody reads what is printed any more (`usctl … | head`): the end, and no error.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads the output")]
struct ReaderGone;

/// Look at an Us cluster and act on it
#[derive(Debug, Parser)]
#[command(
    name = "usctl",
    version,
    after_help = "Exit codes: 0 done; with `status --exit-code`: 0 ok, 1 degraded, 2 some data \
                  cannot be read until providers return, 3 data is lost; 4 the directory cannot \
                  be reached; 64 the command makes no sense; 77 the passphrase or key does not \
                  open the volume. `fsck`, a sum: 0 clean, 1 mended or \
                  given to repair, 4 left as it was, 8 not everything could be looked at.\n\
                  The directory is found by --directory, else US_DIRECTORY, else where this \
                  machine joined (`usctl join`), else the `usfs up` that runs on this machine (or the one whose state US_DATA names)."
)]
pub struct CtlArgs {
    /// The directory to ask
    #[arg(long, global = true, env = "US_DIRECTORY", value_name = "HOST:PORT")]
    #[arg(help_heading = "Connection")]
    directory: Option<String>,
    /// The folder of the certificate to show
    #[arg(long, global = true, env = "US_IDENTITY", value_name = "DIR")]
    #[arg(help_heading = "Connection")]
    identity: Option<PathBuf>,
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Is everything readable, is anything in danger, what is being done about it
    Status(status::StatusArgs),
    /// The providers: state, space, fragments
    Providers(JsonArgs),
    /// The volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Where the bytes of a file lie, and what is missing
    Where {
        /// A file on a mounted volume
        path: PathBuf,
        #[command(flatten)]
        json: JsonArgs,
    },
    /// Where the fragments of one block lie
    Block {
        /// Its id: 32 hexadecimal digits
        id: BlockId,
        #[command(flatten)]
        json: JsonArgs,
    },
    /// Look for what needs repair and try again at once what had failed
    Repair(act::RepairArgs),
    /// Have providers read all they hold, now
    Scrub(act::ScrubArgs),
    /// Empty a provider before it is taken away
    Drain(act::DrainArgs),
    /// Give up a provider that will not come back
    GiveUp(act::GiveUpArgs),
    /// Trust a provider again that was found to claim what it does not have
    Trust(act::TrustArgs),
    /// What could not be read, or would be in danger, without some providers
    WhatIf(act::WhatIfArgs),
    /// Compare what the directory says with what the providers hold, both ways
    Fsck(fsck::FsckArgs),
    /// What was removed and can be had back
    #[command(subcommand)]
    Trash(trash::TrashCommand),
    /// What happened
    Events(act::EventsArgs),
    /// Invite a provider, a client or an administrator: prints a code that works once
    Invite(members::InviteArgs),
    /// Who takes part, and who did
    Members(JsonArgs),
    /// Shut a member out, at once and for ever
    Revoke(members::RevokeArgs),
    /// Become an administrator of a cluster with the code of an invitation
    Join(members::JoinArgs),
    /// Work out what a swarm needs
    #[command(subcommand)]
    Plan(PlanCommand),
    #[command(flatten)]
    Cli(CliCommand),
}

/// How to print.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct JsonArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
enum PlanCommand {
    /// The code and the laziness of repair that reach a target, the least space first
    Code(plan::CodeArgs),
    /// The pseudo-affine lines over so many peers, their number, and the most there can be
    Lines(plan::LinesArgs),
}

#[derive(Debug, Subcommand)]
enum VolumeCommand {
    /// Make a volume
    Create {
        /// Its name
        name: String,
        /// Its code: S data and R parity fragments a block, for ever
        #[arg(long, value_name = "S+R", default_value = "4+2")]
        code: Code,
        /// The most it may hold
        #[arg(long, value_name = "SIZE")]
        quota: Option<Size>,
        /// Repair a block when no more than this many of its fragments can be lost; the default is
        /// as soon as one is
        #[arg(long, value_name = "R0")]
        repair_at: Option<u32>,
        /// Keep what is removed for so many hours; 0: do not keep it; the default is 7 days
        #[arg(long, value_name = "N")]
        trash_hours: Option<u32>,
        #[command(flatten)]
        private: volume::keys::PrivateArgs,
        #[command(flatten)]
        json: JsonArgs,
    },
    /// What opens a private volume: passphrases, key files, recovery keys
    Keys(volume::keys::KeysArgs),
    /// Change a volume's settings; its code stays for ever
    Set {
        /// Its name
        name: String,
        /// Repair a block when no more than this many of its fragments can be lost
        #[arg(long, value_name = "R0", required_unless_present_any = ["quota", "trash_hours"])]
        repair_at: Option<u32>,
        /// The most it may hold; 0: no limit
        #[arg(long, value_name = "SIZE")]
        quota: Option<Size>,
        /// Keep what is removed for so many hours; 0: not at all, and what was kept goes
        #[arg(long, value_name = "N")]
        trash_hours: Option<u32>,
        #[command(flatten)]
        json: JsonArgs,
    },
    /// Give a client access; a volume that was open to every client is closed then
    Allow(access::AllowArgs),
    /// Take a client's access away: its mounts end at once
    Deny(access::DenyArgs),
    /// A volume, and who may use it
    Show(access::ShowArgs),
    /// List the volumes
    List(JsonArgs),
}

/// The whole of `usctl`: reads the command line, acts, answers the exit code.
pub fn main() -> ExitCode {
    let args = match CtlArgs::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Nothing can be done where even that cannot be printed.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(EXIT_SENSELESS)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match run(args) {
        Ok(code) => code,
        Err(error) => {
            if error.is::<ReaderGone>() {
                return ExitCode::SUCCESS;
            }
            eprintln!("usctl: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let senseless = error.is::<Senseless>() || unlock::is_senseless(error);
    let other = if senseless { EXIT_SENSELESS } else { EXIT_UNREACHABLE };
    unlock::exit_code(error).unwrap_or(other)
}

fn run(args: CtlArgs) -> anyhow::Result<ExitCode> {
    if let Command::Cli(command) = &args.command {
        command.run(CtlArgs::command())?;
        return Ok(ExitCode::SUCCESS);
    }
    logging::init(&args.log, "warn")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(act(args))
}

async fn act(args: CtlArgs) -> anyhow::Result<ExitCode> {
    let mut target = Target { directory: args.directory, identity: args.identity };
    match args.command {
        Command::Status(status) => return status::run(&target, &status).await,
        Command::Fsck(args) => return Ok(fsck::run(&target, &args).await),
        Command::Providers(json) => {
            let reply = connect(&target).await?.status().await?;
            let pids = status::local_pids();
            print(json, &json::providers(&reply.providers, &pids), || {
                table::providers(&reply.providers, &pids)
            })?;
        }
        Command::Volume(VolumeCommand::Create {
            name,
            code,
            quota,
            repair_at,
            trash_hours,
            private,
            json,
        }) => {
            volume::check_repair_at(repair_at, code.r() as u32)?;
            let request = us_proto::v1::CreateVolumeRequest {
                name,
                s: code.s() as u32,
                r: code.r() as u32,
                quota_bytes: quota.map_or(0, Size::bytes),
                repair_at,
                trash_hours,
                access: Vec::new(),
                ..Default::default()
            };
            volume::create(&target, request, &private, json).await?;
        }
        Command::Volume(VolumeCommand::Keys(args)) => volume::keys::run(&target, args).await?,
        Command::Volume(VolumeCommand::Set { name, repair_at, quota, trash_hours, json }) => {
            let mut admin = connect(&target).await?;
            let known = admin.list_volumes().await?;
            if let Some(known) = known.iter().find(|known| known.name == name) {
                volume::check_repair_at(repair_at, known.r)?;
            }
            let quota_bytes = quota.map(Size::bytes);
            let request =
                us_proto::v1::SetVolumeRequest { name, repair_at, quota_bytes, trash_hours };
            let info = admin.set_volume(request).await?;
            print(json, &json::volume(&info), || volume::changed(&info))?;
        }
        Command::Volume(VolumeCommand::Allow(args)) => access::allow(&target, args).await?,
        Command::Volume(VolumeCommand::Deny(args)) => access::deny(&target, args).await?,
        Command::Volume(VolumeCommand::Show(args)) => access::show(&target, &args).await?,
        Command::Volume(VolumeCommand::List(json)) => {
            let volumes = connect(&target).await?.list_volumes().await?;
            let value = volumes.iter().map(json::volume).collect::<Vec<_>>();
            print(json, &serde_json::Value::Array(value), || table::volumes(&volumes))?;
        }
        Command::Where { path, json } => {
            let file = place::find(&path).map_err(Senseless)?;
            target.directory.get_or_insert_with(|| file.directory.clone());
            let mut admin = connect(&target).await?;
            let providers = admin.status().await?.providers;
            let blocks = admin.where_is(&file.volume, file.ino).await?;
            print(json, &place::to_json(&file, &blocks), || {
                place::to_text(&file, &blocks, &providers)
            })?;
        }
        Command::Block { id, json } => {
            let mut admin = connect(&target).await?;
            let providers = admin.status().await?.providers;
            let block = admin.block(id).await?;
            print(json, &json::block(&block), || place::block_text(&block, &providers))?;
        }
        Command::Repair(args) => act::repair(&target, &args).await?,
        Command::Scrub(args) => act::scrub(&target, &args).await?,
        Command::Drain(args) => act::drain(&target, &args).await?,
        Command::GiveUp(args) => act::give_up(&target, &args).await?,
        Command::Trust(args) => act::trust(&target, &args).await?,
        Command::WhatIf(args) => act::what_if(&target, &args).await?,
        Command::Trash(command) => trash::run(&target, command).await?,
        Command::Invite(args) => members::invite(&target, &args).await?,
        Command::Members(json) => members::members(&target, json).await?,
        Command::Revoke(args) => members::revoke(&target, &args).await?,
        Command::Join(args) => {
            say(&members::join(Role::Admin, target.identity, &args).await?)?;
        }
        Command::Events(args) => act::events(&target, &args).await?,
        Command::Plan(PlanCommand::Code(args)) => plan::code(&args)?,
        Command::Plan(PlanCommand::Lines(args)) => plan::lines(&args)?,
        Command::Cli(_) => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn print(
    json: JsonArgs,
    value: &serde_json::Value,
    text: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let written = if json.json { writeln!(out, "{value:#}") } else { write!(out, "{}", text()) };
    printed(written.and_then(|()| out.flush()))
}

/// Prints a line.
fn say(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    printed(writeln!(out, "{text}").and_then(|()| out.flush()))
}

fn printed(written: std::io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        other => other.context("print"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<CtlArgs, clap::Error> {
        CtlArgs::try_parse_from(std::iter::once(&"usctl").chain(arguments))
    }

    #[test]
    fn the_command_line_is_sound() {
        CtlArgs::command().debug_assert();
        let args = parse(&["--directory", "h:1", "volume", "create", "disk", "--code", "10+4"]);
        let args = args.unwrap();
        assert_eq!(args.directory.as_deref(), Some("h:1"));
        match args.command {
            Command::Volume(VolumeCommand::Create { name, code, quota: None, .. }) => {
                assert_eq!((name.as_str(), code.to_string().as_str()), ("disk", "10+4"));
            }
            other => panic!("{other:?}"),
        }
        assert!(parse(&["status", "--json", "--exit-code", "--directory", "h:1"]).is_ok());
        assert!(parse(&["volume", "create", "disk", "--code", "4"]).is_err());
        assert!(parse(&["block", "xyz"]).is_err());
        assert!(parse(&["what-if", "--without", "1", "provider2"]).is_ok());
        assert!(parse(&["plan", "lines", "--peers", "25", "--fragments", "5"]).is_ok());
        assert!(parse(&["plan", "lines", "--peers", "0", "--fragments", "5"]).is_err());
        assert!(parse(&["plan", "lines", "--peers", "9", "--fragments", "256"]).is_err());
        assert!(parse(&["what-if"]).is_err() && parse(&["drain"]).is_err());
        assert!(parse(&["trash", "list"]).is_ok());
        assert!(parse(&["trash", "restore", "disk", "7", "docs/a", "--to", "out"]).is_ok());
        assert!(parse(&["trash", "restore", "disk"]).is_err());
        assert!(parse(&["trash", "purge", "disk", "--older-than", "24", "--yes"]).is_ok());
        assert!(parse(&["trash", "purge", "disk"]).is_err(), "everything only when asked for");
        assert!(parse(&["trash", "purge", "disk", "7", "--all"]).is_err());
        assert!(parse(&["volume", "set", "disk", "--trash-hours", "0"]).is_ok());
        assert!(parse(&["volume", "set", "disk"]).is_err());
        assert!(parse(&["snapshot"]).is_err(), "what is not built is not there");
        assert!(parse(&["completions", "bash"]).is_ok() && parse(&["man"]).is_ok());
    }

    /// Every error exited with 4, "the directory cannot be reached".
    #[test]
    fn what_is_not_there_is_not_an_unreachable_directory() {
        let gone = place::find(std::path::Path::new("/no/such/file")).map_err(Senseless);
        assert_eq!(exit_code(&gone.unwrap_err().into()), EXIT_SENSELESS);
        assert_eq!(exit_code(&anyhow::anyhow!("no answer")), EXIT_UNREACHABLE);
        let closed = printed(Err(std::io::ErrorKind::BrokenPipe.into()));
        assert!(closed.unwrap_err().is::<ReaderGone>());
    }

    #[test]
    fn every_flag_is_documented() {
        let doc = include_str!("../../docs/configuration.md");
        for name in us_core::daemon::cli::settings(&CtlArgs::command()) {
            assert!(doc.contains(&format!("`{name}`")), "{name} is not in docs/configuration.md");
        }
    }
}
