//! The directory's program. `us-directory --help` says what it does.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use serde::Serialize;
use us_core::daemon::cli::CliCommand;
use us_core::daemon::config::{Layers, load};
use us_core::daemon::heap;
use us_core::daemon::logging::{self, LogArgs};
use us_core::daemon::runtime::{Program, runtime};
use us_core::daemon::shutdown::Shutdown;
use us_core::tls::Role;
use us_directory::backup::backup;
use us_directory::restore::{RestoreOptions, Source, restore, spoken};
use us_directory::run::{Config, init, issue_identity, recovery_key, run};

/// The directory of an Us cluster: who takes part, what the files are, where their bytes lie.
#[derive(Debug, Parser)]
#[command(name = "us-directory", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a new cluster: its certificate authority and the directory's identity
    Init {
        /// Where everything is kept
        #[arg(long)]
        data: PathBuf,
    },
    /// Write the whole state to a file, sealed with the recovery key
    Backup {
        /// The directory's data; it may be running
        #[arg(long)]
        data: PathBuf,
        /// The file to write; it must not exist
        #[arg(long)]
        out: PathBuf,
    },
    /// Rebuild a directory that has lost its disk
    Restore(RestoreArgs),
    /// Run the directory
    Run(Box<RunArgs>),
    /// Issue a certificate for a provider, a client or an administrator
    Identity {
        /// The directory's data
        #[arg(long)]
        data: PathBuf,
        /// What the certificate allows: provider, client or admin
        #[arg(long)]
        role: Role,
        /// The name in it
        #[arg(long)]
        name: String,
        /// Where ca.pem, cert.pem and key.pem are written
        #[arg(long)]
        out: PathBuf,
    },
    #[command(flatten)]
    Cli(CliCommand),
}

#[derive(Debug, Args)]
struct RestoreArgs {
    /// The data directory to make; it must be empty
    #[arg(long)]
    data: PathBuf,
    /// The recovery key: DATA/recovery.key of the lost directory
    #[arg(long)]
    recovery_key: PathBuf,
    /// Providers to begin with, HOST:PORT[,HOST:PORT...]: they know of the others
    #[arg(
        long,
        value_delimiter = ',',
        required_unless_present = "backup",
        conflicts_with = "backup"
    )]
    from: Vec<String>,
    /// A file made by `us-directory backup`, instead of providers
    #[arg(long)]
    backup: Option<PathBuf>,
    /// Restore although records are known to be missing
    #[arg(long)]
    accept_loss: bool,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// A TOML file with the same keys as the flags
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
}

/// Flags that set a key of the configuration; what is not given says nothing.
#[derive(Debug, Args, Serialize)]
struct Flags {
    /// Where everything is kept
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<PathBuf>,
    /// Where to listen; port 0 takes any (written to DATA/address)
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<String>,
    /// Where to serve /metrics and /healthz: unix:PATH, or IP:PORT for TLS with both certificates
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics: Option<String>,
    /// How long a lease is good for without renewal
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    lease_ms: Option<u64>,
    /// After how long a silent mount is shut out when another wants what it holds
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    fence_ms: Option<u64>,
    /// How long fragments may be on their way before their provider is asked
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    settle_ms: Option<u64>,
    /// How long ago a block's place must have been leased for fragments that nothing names to be
    /// garbage
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    garbage_age_ms: Option<u64>,
    /// How often each provider is told what to keep; 0: never
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    retain_every_ms: Option<u64>,
    /// How often each provider is asked for a fragment at random, on average; 0: never
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    audit_every_ms: Option<u64>,
    /// KiB a second that audits read from all providers together; 0: no limit
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    audit_kib_per_s: Option<u64>,
    /// How often providers report
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    report_every_ms: Option<u64>,
    /// Files that are removed younger than this do not go to the trash
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    trash_age_ms: Option<u64>,
    /// How long a block is let alone by the cleaner after something of it died
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    clean_after_ms: Option<u64>,
    /// How long a grant is good for: providers serve a client whose access was taken away no longer
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    grant_ms: Option<u64>,
    /// How long a silent provider is absent before it counts as asleep
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    absent_ms: Option<u64>,
    /// How long a provider may be silent beyond what was expected before it is given up
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    dead_ms: Option<u64>,
    /// How long one may whose hours are not known yet; at least dead-ms
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    newcomer_ms: Option<u64>,
    /// Percent of providers that fall silent together and are not taken for dead
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    brake_percent: Option<u32>,
    /// How long providers that fell silent together are not given up
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    brake_ms: Option<u64>,
    /// The mean time to a provider's death, for estimates
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    mttf_ms: Option<u64>,
    /// Blocks repaired at once
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    repair_jobs: Option<usize>,
    /// Blocks one provider rebuilds at once
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    repair_target_jobs: Option<usize>,
    /// Fragments one provider is asked to send for repairs at once
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    repair_sends: Option<usize>,
    /// KiB a second one provider is asked to send for repairs; 0: no limit
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    repair_kib_per_s: Option<u64>,
    /// Percent of the uplink that a provider's owner states which repairs may take
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    repair_uplink_percent: Option<u64>,
    /// Memory for pages of the checkpoint, in MiB
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_mib: Option<usize>,
    /// A journal of this many MiB is written into the checkpoint
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    journal_mib: Option<u64>,
    /// Copies of the journal on providers, where there are three or more: 0 to 2
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    copies: Option<usize>,
    /// How long a provider may take to store a record before another takes its place
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    copy_ack_ms: Option<u64>,
    /// This many MiB of journal since the last image of the state start another
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    image_mib: Option<u64>,
    /// The code of the image's blocks, S+R
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    image_code: Option<String>,
    /// How long a certificate is good without renewal, by the cluster's own clock
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate_life_ms: Option<u64>,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    logging::init(&cli.log, "info")?;
    match cli.command {
        Command::Init { data } => {
            let cluster = init(&data)?;
            println!("cluster {cluster}");
            println!(
                "keep a copy of {} elsewhere: with it the directory can be rebuilt",
                recovery_key(&data).display()
            );
            Ok(())
        }
        Command::Cli(command) => Ok(command.run(Cli::command())?),
        Command::Identity { data, role, name, out } => issue_identity(&data, role, &name, &out),
        Command::Backup { data, out } => {
            let made = start_runtime()?.block_on(backup(&data, &out))?;
            let of = if made.running { "the running directory" } else { "the stopped directory" };
            println!("{} holds the state of {of}, {} bytes", out.display(), made.bytes);
            println!("to use it, the recovery key is needed too");
            Ok(())
        }
        Command::Restore(args) => restore_and_report(args),
        Command::Run(args) => {
            let layers = Layers {
                file: args.config.as_deref(),
                environment_prefix: Some("US_DIRECTORY_"),
                flags: &args.flags,
            };
            let config: Config = load(&layers)?;
            heap::keep_large_buffers();
            logging::abort_on_panic();
            start_runtime()?.block_on(async { run(config, Shutdown::on_signals()?).await })
        }
    }
}

fn start_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    runtime(Program::Foreground).context("start the runtime")
}

fn restore_and_report(args: RestoreArgs) -> anyhow::Result<()> {
    let data = args.data.clone();
    let source = args.backup.map_or(Source::Providers(args.from), Source::Backup);
    let from_backup = matches!(source, Source::Backup(_));
    let options = RestoreOptions {
        data: args.data,
        recovery_key: args.recovery_key,
        source,
        accept_loss: args.accept_loss,
    };
    let restored = start_runtime()?.block_on(restore(&options))?;
    let rebuilt = &restored.rebuilt;
    println!("{} holds the directory again:", data.display());
    println!("  {} commits in its image, {} after it", restored.image_seq, restored.records);
    println!(
        "  {} volumes, {} providers, {} sessions that may go on",
        rebuilt.volumes, rebuilt.providers, rebuilt.sessions
    );
    if !from_backup {
        println!("  {}", spoken(&restored.reached, &restored.unreached));
    }
    if let Some(gap) = restored.gap {
        println!("  LOST: {gap}. Mounts must be made anew.");
    } else if from_backup {
        println!("  what changed after the backup is not in it. Mounts must be made anew.");
    } else if restored.unreached.is_empty() {
        println!("  nothing that was acknowledged is missing");
    } else {
        println!(
            "  complete, unless every provider that kept the last records is among those that did \
             not answer"
        );
    }
    println!("start it as before: us-directory run --data {}", data.display());
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
        assert!(Cli::try_parse_from(["us-directory", "completions", "bash"]).is_ok());
    }
}
