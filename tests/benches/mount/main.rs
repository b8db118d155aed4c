//! The disk as its user meets it, beside its limits and its rival: usfs (six provider processes, 4+2,
//! TLS, everything as shipped), the local file system its stores lie on, a FUSE pass-through on that,
//! and GlusterFS dispersed 4+2 where it is installed. All in one run, taking turns row by row; the
//! ratios are of usfs to the pass-through.
//!
//!     cargo bench -p us-tests --bench mount [-- --size-mib 1024 --rounds 3 --only WORDS --on DIR]
//!
//! Needs root, /dev/fuse and util-linux; sqlite3, git and tar for their rows. Everything runs in
//! namespaces of its own, which end with it: no mount, daemon or address stays. docs/performance.md
//! says what is measured and how.

mod bed;
mod disks;
mod extras;
mod machine;
mod passthrough;
mod report;
mod rows;
mod sources;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use us_tests::cluster::{fuse_is_here, programs};

use self::bed::{Bed, Data, Sample, Shared};
use self::disks::{Disk, Gluster, Kind, call};
use self::report::Samples;
use self::rows::{ROWS, Row};
use self::sources::Sources;

/// Before the source and the mount point of a pass-through: this program started again.
pub(crate) const PASS_THROUGH_FLAG: &str = "--pass-through";
/// A row that takes a file system longer is taken once.
const ROW_SECONDS_FOR_MORE_ROUNDS: f64 = 30.0;
/// What a timed part may take of memory that was in use just before.
const RESERVE_BYTES: usize = 4 << 30;
/// A pass-through holds a descriptor for each name the kernel knows: trees, copies, small files.
const DESCRIPTORS_MIN: u64 = 16_384;

/// Measures usfs beside the local file system, a FUSE pass-through and GlusterFS.
#[derive(Debug, Parser)]
struct Arguments {
    /// MiB of the large file
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..))]
    size_mib: u64,
    /// Rounds; the figures are medians
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only rows with one of these in their names, for example "seq|sqlite"; also: space, degraded
    #[arg(long, default_value = "")]
    only: String,
    /// Leave these rows and file systems out, for example "gluster|space"
    #[arg(long, default_value = "")]
    skip: String,
    /// Below this folder, named from the root, everything is stored [default: the folder for
    /// temporary files]
    #[arg(long, value_name = "DIR")]
    on: Option<PathBuf>,
    /// The source tree for tar, cp and rm [default: one made up]
    #[arg(long, value_name = "FILE")]
    tar: Option<PathBuf>,
    /// The repository to clone [default: one made of the source tree]
    #[arg(long, value_name = "REPO")]
    git: Option<PathBuf>,
    /// Wait at most so many seconds for the machine to be quiet before each timed part
    #[arg(long, default_value_t = 10, value_name = "SECONDS")]
    settle: u64,
    /// Set by this program, inside its namespaces.
    #[arg(long, hide = true, value_name = "DIR")]
    inside: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Arguments {
    /// Whether something of this name is to be done.
    fn wants(&self, name: &str) -> bool {
        let has = |words: &str| {
            let mut words = words.split(['|', ',']).filter(|word| !word.is_empty());
            words.any(|word| name.contains(word))
        };
        (self.only.is_empty() || has(&self.only)) && !has(&self.skip)
    }
}

fn main() -> Result<ExitCode> {
    let words: Vec<_> = std::env::args_os().collect();
    if let [_, flag, source, point] = &words[..]
        && flag == PASS_THROUGH_FLAG
    {
        passthrough::serve(Path::new(source), Path::new(point))?;
        return Ok(ExitCode::SUCCESS);
    }
    let arguments = Arguments::parse();
    match &arguments.inside {
        Some(root) => inside(&arguments, root).map(|()| ExitCode::SUCCESS),
        None if fuse_is_here() => outside(&arguments),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Starts this program again in namespaces of its own, and removes what it stored.
#[tokio::main(flavor = "current_thread")]
async fn outside(arguments: &Arguments) -> Result<ExitCode> {
    for tool in ["unshare", "setpriv", "ip"] {
        ensure!(machine::has(tool), "`{tool}` is needed (util-linux, iproute2)");
    }
    let on = arguments.on.clone().unwrap_or_else(std::env::temp_dir);
    ensure!(on.is_absolute(), "--on {} is not named from the root", on.display());
    let on = on.canonicalize().with_context(|| on.display().to_string())?;
    let root = tempfile::Builder::new().prefix("us-bench-").tempdir_in(on)?;
    // Namespaces and all in them end with the first process inside, and that one with us.
    let mut command = tokio::process::Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--fork"]);
    command.args(["--kill-child", "--mount-proc", "--"]).arg(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1)).arg("--inside").arg(root.path());
    command.env("US_TEST_PROGRAMS", programs()).env("TMPDIR", root.path());
    let (mut interrupted, mut ended) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut child = command.kill_on_drop(true).spawn()?;
    // Cancel-safe: all only wait, and the child is killed and waited for below.
    let status = tokio::select! {
        status = child.wait() => Some(status?),
        _ = interrupted.recv() => None,
        _ = ended.recv() => None,
    };
    if status.is_none() {
        child.kill().await?;
    }
    let done = status.is_some_and(|status| status.success());
    Ok(if done { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn inside(arguments: &Arguments, root: &Path) -> Result<()> {
    call("ip", ["link", "set", "lo", "up"])?;
    allow_open_files()?;
    let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(|kind| is_here(*kind, arguments)).collect();
    let rows: Vec<&Row> = ROWS.iter().filter(|row| can_run(row, arguments)).collect();
    let needs_sources = rows.iter().any(|row| ["tar", "cp", "rm", "clone"].contains(&row.name));
    let sources = needs_sources
        .then(|| Sources::new(root, arguments.tar.as_deref(), arguments.git.as_deref()));
    let shared = Shared {
        data: Data::new(),
        sources: sources.transpose().context("the source tree")?,
        size_mib: arguments.size_mib,
        settle: Duration::from_secs(arguments.settle),
        reserve: RefCell::new(machine::Reserve::new(RESERVE_BYTES)),
        scratch: root.to_path_buf(),
    };
    let start = |kind: &Kind| {
        Disk::start(*kind, root).map(Bed::new).with_context(|| format!("start {}", kind.name()))
    };
    let mut beds: Vec<Bed> = kinds.iter().map(start).collect::<Result<_>>()?;
    println!("{} MiB, {} rounds, on {}", shared.size_mib, arguments.rounds, root.display());

    let space = arguments.wants("space").then(|| extras::space(&mut beds, &shared));
    let mut samples = Samples::new();
    for round in 0..arguments.rounds {
        for row in &rows {
            take(row, round, &mut beds, &shared, &mut samples);
        }
    }
    report::rows(&samples, &kinds);
    report::cpu(&samples, &kinds);
    if let Some(factors) = space {
        report::space(&factors, &kinds);
    }
    if arguments.wants("degraded")
        && let Some(bed) = beds.iter_mut().find(|bed| bed.disk.kind() == Kind::Usfs)
    {
        extras::degraded(bed, &shared, arguments.rounds)?;
    }
    beds.iter_mut().try_for_each(|bed| bed.disk.end())
}

/// Lets this process and all it starts hold as many files open as the machine allows.
fn allow_open_files() -> Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let most = getrlimit(Resource::Nofile).maximum;
    let enough = most.is_none_or(|most| most >= DESCRIPTORS_MIN);
    ensure!(enough, "{most:?} open files are too few: {DESCRIPTORS_MIN} are needed (ulimit -Hn)");
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })
        .context("allow many open files")
}

/// Whether a file system takes part.
fn is_here(kind: Kind, arguments: &Arguments) -> bool {
    let skipped = arguments.skip.split(['|', ',']).any(|word| word == kind.name());
    let here = kind != Kind::Gluster || Gluster::is_here();
    if !here && !skipped {
        eprintln!("GlusterFS is not installed (glusterfs-server): no comparison");
    }
    here && !skipped
}

/// Whether a row is wanted, and its program is there.
fn can_run(row: &Row, arguments: &Arguments) -> bool {
    let wanted = arguments.wants(row.name);
    let needed: &[&str] = match row.name {
        "tar" | "cp" | "rm" | "clone" => &["tar", "git"],
        "sqlite-journal" | "sqlite-wal" => &["sqlite3"],
        _ => &[],
    };
    let missing = needed.iter().find(|program| !machine::has(program));
    if let Some(program) = missing.filter(|_| wanted) {
        eprintln!("`{program}` is not installed: no row {}", row.name);
    }
    wanted && missing.is_none()
}

/// Takes a row on every file system in turn, another first in each round.
fn take(row: &Row, round: u32, beds: &mut [Bed], shared: &Shared, samples: &mut Samples) {
    let count = beds.len();
    for turn in 0..count {
        let bed = &mut beds[(turn + round as usize) % count];
        let kind = bed.disk.kind();
        let so_far = samples.entry((row.name, kind)).or_default();
        let seconds: f64 = so_far.iter().map(|sample| sample.cost.seconds).sum();
        if seconds > ROW_SECONDS_FOR_MORE_ROUNDS {
            continue;
        }
        match (row.take)(bed, shared) {
            Ok(sample) => {
                tell(row, kind, &sample);
                so_far.push(sample);
            }
            Err(error) => eprintln!("{}, {}: FAILED: {error:#}", row.name, kind.name()),
        }
    }
}

fn tell(row: &Row, kind: Kind, sample: &Sample) {
    let (value, unit) = (row.unit.value(sample), row.unit.name());
    let (name, kind, cost) = (row.name, kind.name(), sample.cost);
    let (cpu, after) = (cost.cpu_seconds, sample.cpu_seconds_after);
    eprintln!("{name:<14} {kind:<13} {value:>10.2} {unit:<9} CPU {cpu:.2} + {after:.2} s");
}
