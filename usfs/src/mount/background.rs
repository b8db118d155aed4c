//! `usfs mount --background`: the same program again, in a session of its own, with its words in a
//! log; this one waits until the volume is mounted.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};

use super::{MountArgs, point};
use crate::places;

/// The line by which the detached process says that the volume is mounted.
pub(super) const READY: &str = "ready";

/// Starts the mount of `args` in the background and waits until it is there.
pub(super) fn start(args: &MountArgs) -> anyhow::Result<ExitCode> {
    let mountpoint = point::absolute(&args.mountpoint)
        .with_context(|| format!("no folder for {}", args.mountpoint.display()))?;
    let log_path = log_path(&mountpoint)?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log_path)
        .with_context(|| format!("cannot write the log {}", log_path.display()))?;
    let log_start = log.metadata().map_or(0, |meta| meta.len());
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command.arg("mount").arg(&args.source).arg(&mountpoint).arg("--detached");
    if let Some(identity) = &args.identity {
        command.arg("--identity").arg(std::path::absolute(identity)?);
    }
    for options in &args.options {
        command.arg("-o").arg(options);
    }
    if args.log.log_json {
        command.arg("--log-json");
    }
    if let Some(filter) = &args.log.log {
        command.args(["--log", filter]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).current_dir("/");
    let mut child = command.spawn().context("start the mount in the background")?;
    let output = child.stdout.take().context("the child's output")?;
    for line in BufReader::new(output).lines() {
        if line.context("read what the mount says")? == READY {
            println!("{} is mounted (process {}).", mountpoint.display(), child.id());
            return Ok(ExitCode::SUCCESS);
        }
    }
    let status = child.wait().context("wait for the mount")?;
    let mut said = String::new();
    let mut log = File::open(&log_path)?;
    log.seek(SeekFrom::Start(log_start))?;
    log.read_to_string(&mut said)?;
    let last = said.trim().lines().next_back().unwrap_or("it said nothing");
    bail!("{} ({status}; the log is {})", last.trim_start_matches("usfs: "), log_path.display());
}

fn log_path(mountpoint: &Path) -> anyhow::Result<PathBuf> {
    let folder = places::mount_data_dir().join("logs");
    places::make_private_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
    let name = mountpoint.to_string_lossy().trim_matches('/').replace('/', "-");
    Ok(folder.join(format!("mount-{name}.log")))
}
