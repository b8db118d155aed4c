//! The processes of `usfs up`: started, watched, ended in order.
//!
//! They are started from the main thread only: the kernel's promise that a child hears of its
//! parent's death counts the thread that started it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::process::Command;
use tokio::sync::mpsc;

/// How long a child may take to end when asked to.
const END: Duration = Duration::from_secs(20);
/// Ends of children not yet looked at.
const EXITS_MAX: usize = 64;
/// The pause before a child is started again, doubled each time it ends soon.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A child that has run this long has recovered.
const RECOVERED: Duration = Duration::from_secs(60);

/// This program. Its file may have been replaced since it was started: then it is run from what is
/// left of it, the same version as ours.
fn this_program() -> PathBuf {
    let found = std::env::current_exe().ok().filter(|path| path.exists());
    found.unwrap_or_else(|| PathBuf::from("/proc/self/exe"))
}

/// A process to run: `usfs daemon ROLE ARGUMENTS`.
#[derive(Debug, Clone)]
pub(super) struct ChildSpec {
    pub name: String,
    pub role: &'static str,
    pub arguments: Vec<OsString>,
    pub log: PathBuf,
}

impl ChildSpec {
    /// The command by which a person starts it again.
    pub fn by_hand(&self) -> String {
        let mut words = vec!["usfs".to_owned(), "daemon".to_owned(), self.role.to_owned()];
        words.extend(self.arguments.iter().map(|word| word.to_string_lossy().into_owned()));
        words.join(" ")
    }
}

/// A child ended.
#[derive(Debug)]
pub(super) struct Exit {
    pub name: String,
    pub status: ExitStatus,
    life: u64,
}

#[derive(Debug)]
struct Running {
    spec: ChildSpec,
    pid: i32,
    /// The process itself, whatever its number is given to later.
    process: OwnedFd,
    /// Which start of this child it is.
    life: u64,
    alive: bool,
    started: Instant,
    pause: Duration,
}

/// The children, by name.
#[derive(Debug)]
pub(super) struct Children {
    running: BTreeMap<String, Running>,
    lives: u64,
    exits: mpsc::Receiver<Exit>,
    exit_sender: mpsc::Sender<Exit>,
}

impl Children {
    pub fn new() -> Self {
        let (exit_sender, exits) = mpsc::channel(EXITS_MAX);
        Self { running: BTreeMap::new(), lives: 0, exits, exit_sender }
    }

    /// Starts a child, or starts it again. On the main thread only.
    pub fn start(&mut self, spec: ChildSpec) -> anyhow::Result<()> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&spec.log)
            .with_context(|| format!("cannot write {}", spec.log.display()))?;
        let mut command = Command::new(this_program());
        command.args(["daemon", "--parent", &std::process::id().to_string(), spec.role]);
        command.args(&spec.arguments);
        // A process group of its own: Ctrl-C is for us, who end the children in order.
        command.process_group(0).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        let mut child = command.spawn().with_context(|| format!("start {}", spec.name))?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).context("its process id")?;
        let process = Pid::from_raw(pid)
            .context("its process id")
            .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?))
            .with_context(|| format!("watch {}", spec.name))?;
        self.lives += 1;
        let (name, life, exits) = (spec.name.clone(), self.lives, self.exit_sender.clone());
        let pause = self.running.get(&name).map_or(PAUSE_MIN, Running::next_pause);
        tokio::spawn({
            let name = name.clone();
            async move {
                if let Ok(status) = child.wait().await {
                    // Nobody listens only when the whole program ends.
                    let _ = exits.send(Exit { name, status, life }).await;
                }
            }
        });
        let started = Instant::now();
        let running = Running { spec, pid, process, life, alive: true, started, pause };
        self.running.insert(name, running);
        Ok(())
    }

    /// The next child that ends. Cancel-safe: an end not returned stays queued.
    pub async fn next_exit(&mut self) -> Exit {
        loop {
            // A sender lives in self, so there is always another.
            let Some(exit) = self.exits.recv().await else { std::future::pending().await };
            let running = self.running.get_mut(&exit.name);
            if let Some(running) = running.filter(|running| running.life == exit.life) {
                running.alive = false;
                return exit;
            }
        }
    }

    /// Process ids of those that run.
    pub fn pids(&self) -> BTreeMap<String, i32> {
        let alive = self.running.iter().filter(|(_, running)| running.alive);
        alive.map(|(name, running)| (name.clone(), running.pid)).collect()
    }

    /// How a child is started, and after which pause it should be.
    pub fn spec(&self, name: &str) -> Option<(ChildSpec, Duration)> {
        let running = self.running.get(name)?;
        Some((running.spec.clone(), running.next_pause()))
    }

    /// Asks all of a role to end, and waits; who does not end is killed.
    pub async fn stop(&mut self, role: &str) {
        self.signal(role, Signal::TERM);
        if tokio::time::timeout(END, self.all_gone(role)).await.is_err() {
            tracing::warn!(role, "did not end in {} s: killed", END.as_secs());
            self.signal(role, Signal::KILL);
            self.all_gone(role).await;
        }
    }

    fn signal(&self, role: &str, signal: Signal) {
        for running in self.running.values().filter(|one| one.alive && one.spec.role == role) {
            // It may have ended this moment.
            let _ = pidfd_send_signal(&running.process, signal);
        }
    }

    async fn all_gone(&mut self, role: &str) {
        while self.running.values().any(|one| one.alive && one.spec.role == role) {
            self.next_exit().await;
        }
    }
}

impl Running {
    fn next_pause(&self) -> Duration {
        if self.started.elapsed() > RECOVERED { PAUSE_MIN } else { (self.pause * 2).min(PAUSE_MAX) }
    }
}
