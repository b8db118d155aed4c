//! The command line of `usfs`.
//!
//! Exit codes: 0 done; 1 failed, and said why; 64 the command makes no sense; 77 the passphrase or key
//! does not open the volume; 130 interrupted before the disk was there.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use us_core::daemon::cli::CliCommand;
use us_core::daemon::runtime::{Program, runtime};
use us_core::tls::Role;

use crate::ctl::members;
use crate::{mount, unlock, up};

/// An encrypted, erasure-coded disk that lies on other machines
#[derive(Debug, Parser)]
#[command(
    name = "usfs",
    version,
    after_help = "Begin with `usfs up`: it makes a disk of this machine alone, to try.\n\
                  Exit codes: 0 done; 1 failed, and said why; 64 the command makes no sense; 77 the \
                  passphrase or key does not open the volume; 130 interrupted before the disk was \
                  there."
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Everything on this machine: directory, providers, a volume, mounted; kept for the next time
    Up(up::UpArgs),
    /// Mount a volume
    Mount(mount::MountArgs),
    /// Unmount a volume
    Umount(mount::UmountArgs),
    /// Become a client of a cluster with the code of an invitation; then `usfs mount`
    Join(ClientJoinArgs),
    /// One process of `usfs up`
    #[command(hide = true)]
    Daemon(up::DaemonArgs),
    #[command(flatten)]
    Cli(CliCommand),
}

/// The whole of `usfs`: reads the command line, acts, answers the exit code.
pub fn main() -> ExitCode {
    let Some(arguments) = arguments(std::env::args_os().collect()) else {
        return ExitCode::SUCCESS;
    };
    let args = match Args::try_parse_from(arguments) {
        Ok(args) => args,
        Err(error) => {
            // Nothing can be done where even that cannot be printed.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS };
        }
    };
    let done = match args.command {
        Command::Up(args) => up::up(&args),
        Command::Mount(args) => mount::mount(&args),
        Command::Umount(args) => mount::umount(&args),
        Command::Join(args) => join(&args),
        Command::Daemon(args) => up::daemon(&args),
        Command::Cli(command) => {
            command.run(Args::command()).map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
    };
    done.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "usfs: {error:#}");
        unlock::exit_code(&error).map_or(ExitCode::FAILURE, ExitCode::from)
    })
}

/// Flags of `usfs join`.
#[derive(Debug, clap::Args)]
struct ClientJoinArgs {
    #[command(flatten)]
    join: members::JoinArgs,
    /// The folder for the certificate
    #[arg(long, env = "US_IDENTITY", value_name = "DIR")]
    identity: Option<PathBuf>,
}

fn join(args: &ClientJoinArgs) -> anyhow::Result<ExitCode> {
    let runtime = runtime(Program::Foreground)?;
    say(&runtime.block_on(members::join(Role::Client, args.identity.clone(), &args.join))?);
    Ok(ExitCode::SUCCESS)
}

/// `mount` calls this program by the name `mount.usfs`, with a command line of its own.
fn arguments(given: Vec<OsString>) -> Option<Vec<OsString>> {
    let called = given.first().map(Path::new).and_then(Path::file_name);
    match called.and_then(|name| name.to_str()) {
        Some("mount.usfs" | "mount.fuse.usfs") => mount::from_mount_helper(&given[1..]),
        _ => Some(given),
    }
}

/// Prints a line; whoever no longer reads does not end us.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
        let parse = |text: &str| Args::try_parse_from(text.split(' '));
        assert!(parse("usfs up").is_ok());
        assert!(parse("usfs up /mnt/a --providers 6 --code 4+2 --data /d --capacity 4G").is_ok());
        assert!(parse("usfs up /mnt/a --code 4").is_err());
        assert!(parse("usfs up --providers 0").is_err());
        assert!(parse("usfs up --ack full -o ack=margin").is_ok());
        let error = parse("usfs up --ack most").unwrap_err().to_string();
        assert!(error.contains("margin") && error.contains("full"), "{error}");
        assert!(parse("usfs mount h:1/disk /mnt/a -o ro --identity /i -f").is_ok());
        assert!(parse("usfs mount h:1/disk /mnt/a -f --background").is_err());
        assert!(parse("usfs umount /mnt/a --flush").is_ok());
        assert!(parse("usfs completions zsh").is_ok() && parse("usfs man").is_ok());
        assert!(parse("usfs daemon --parent 1 directory --data /x --listen 127.0.0.1:0").is_ok());
    }

    #[test]
    fn every_flag_is_documented() {
        let doc = include_str!("../../docs/configuration.md");
        for name in us_core::daemon::cli::settings(&Args::command()) {
            assert!(doc.contains(&format!("`{name}`")), "{name} is not in docs/configuration.md");
        }
    }

    #[test]
    fn mount_usfs_is_usfs_mount() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let given = arguments(words("/sbin/mount.usfs h:1/d /mnt -o rw"));
        assert_eq!(given, Some(words("usfs mount --background h:1/d /mnt -o rw")));
        assert_eq!(arguments(words("usfs up")), Some(words("usfs up")));
    }
}
