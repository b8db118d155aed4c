//! `usfs mount --background`: the same program again, in a session of its own, with its words in a
//! log; this one waits until the volume is mounted, and asks for a passphrase where one is needed: the
//! other has no terminal. It asks by a line, and reads the answer from its standard input.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};
use zeroize::Zeroizing;

use super::options::with_absolute_paths;
use super::{MountArgs, point};
use crate::places;
use crate::unlock::{EXIT_WRONG_SECRET, Prompt, Terminal, read_line};

/// The line by which the detached process says that the volume is mounted.
pub(super) const READY: &str = "ready";

/// The line by which it asks starts so.
const QUESTION: &str = "ask ";

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
    let here = std::env::current_dir().context("find the current folder")?;
    for options in &args.options {
        command.arg("-o").arg(with_absolute_paths(options, &here));
    }
    if args.log.log_json {
        command.arg("--log-json");
    }
    if let Some(filter) = &args.log.log {
        command.args(["--log", filter]);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).current_dir("/");
    let mut child = command.spawn().context("start the mount in the background")?;
    let output = child.stdout.take().context("the child's output")?;
    let mut input = child.stdin.take();
    for line in BufReader::new(output).lines() {
        let line = line.context("read what the mount says")?;
        if line == READY {
            println!("{} is mounted (process {}).", mountpoint.display(), child.id());
            return Ok(ExitCode::SUCCESS);
        }
        if let Some(question) = line.strip_prefix(QUESTION) {
            // Once asked its input is at its end: what is not answered then never will be.
            let answer = Terminal.ask(question).context("ask for the passphrase")?;
            if let (Some(answer), Some(mut input)) = (answer, input.take()) {
                let told = input.write_all(&answer).and_then(|()| input.write_all(b"\n"));
                told.context("tell the mount its passphrase")?;
            }
        }
    }
    let status = child.wait().context("wait for the mount")?;
    let mut said = String::new();
    let mut log = File::open(&log_path)?;
    log.seek(SeekFrom::Start(log_start))?;
    log.read_to_string(&mut said)?;
    let last = said.trim().lines().next_back().unwrap_or("it said nothing");
    let last = last.trim_start_matches("usfs: ");
    if status.code() == Some(EXIT_WRONG_SECRET.into()) {
        // The same exit code as in the foreground.
        eprintln!("usfs: {last} (the log is {})", log_path.display());
        return Ok(ExitCode::from(EXIT_WRONG_SECRET));
    }
    bail!("{last} ({status}; the log is {})", log_path.display());
}

/// Asks whoever started the mount in the background.
#[derive(Debug, Clone, Copy)]
pub(super) struct Starter;

impl Prompt for Starter {
    fn ask(&self, question: &str) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
        crate::cli::say(&format!("{QUESTION}{question}"));
        read_line(File::from(rustix::stdio::stdin().try_clone_to_owned()?))
    }
}

fn log_path(mountpoint: &Path) -> anyhow::Result<PathBuf> {
    let folder = places::mount_data_dir().join("logs");
    places::make_private_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
    let name = mountpoint.to_string_lossy().trim_matches('/').replace('/', "-");
    Ok(folder.join(format!("mount-{name}.log")))
}
