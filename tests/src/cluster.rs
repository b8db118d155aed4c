//! A cluster of real processes on loopback: one directory, some providers, any number of mounts.
//!
//! Every process it starts is ended, by pid, when the cluster is dropped, and every mount with it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use us_core::tls::Identity;

use crate::admin::Admin;
use crate::netns::Net;
use crate::poll;

/// How long a process may take to be ready or to end; generous, for a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Short leases, so that a fence takes seconds.
const LEASE_MS: &str = "3000";
const FENCE_MS: &str = "5000";
/// What a mount that ended did not report, the directory asks of providers this soon.
const SETTLE_MS: &str = "3000";
/// How long the slowest path to "settled" may take.
const SETTLED: Duration = Duration::from_secs(180);

/// The folder of the programs under test: `US_TEST_PROGRAMS` where it is set (installed ones), else
/// those of this workspace, built first, once a test process.
///
/// # Panics
/// When they do not build.
pub fn programs() -> &'static Path {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        if let Some(folder) = std::env::var_os("US_TEST_PROGRAMS") {
            return PathBuf::from(folder);
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        build.args(["build", "--quiet", "--workspace", "--bins"]);
        if cfg!(debug_assertions) {
            // That is what `cargo test --workspace` has built already: without the tests features
            // differ, and half the workspace would be compiled once more.
            build.arg("--tests");
        } else {
            build.arg("--release");
        }
        let status = build
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .status()
            .expect("cargo starts");
        assert!(status.success(), "the programs do not build");
        let test = std::env::current_exe().expect("the test knows its own path");
        let folder = test.ancestors().find(|folder| folder.join("usfs").is_file());
        folder.expect("the programs lie beside the tests").to_path_buf()
    })
}

/// Says loudly that a test cannot run here, and whether it may go on.
///
/// # Panics
/// In CI, where /dev/fuse is part of what must hold.
pub fn fuse_is_here() -> bool {
    let here = Path::new("/dev/fuse").exists() && rustix::process::geteuid().is_root();
    if !here {
        let message = "NOT TESTED: this test needs /dev/fuse and root";
        assert!(std::env::var_os("CI").is_none(), "{message}");
        eprintln!("\n{message}\n");
    }
    here
}

/// What a cluster starts with.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Providers.
    pub providers: usize,
    /// The volume's code, "S+R".
    pub code: &'static str,
    /// Each provider's capacity, as its command line takes it.
    pub capacity: String,
    /// More arguments of the directory.
    pub directory: &'static [&'static str],
    /// More arguments of every provider.
    pub provider: &'static [&'static str],
    /// Sites: provider n is in site n modulo so many, or in none.
    pub sites: usize,
    /// Where the providers run, each on the node of its number; else on loopback.
    pub net: Option<Arc<Net>>,
    /// Leases, fences and the providers' gates for busy machines as shipped: for measurements. Else
    /// short ones, so that a fence takes seconds, and no gates.
    pub as_shipped: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            providers: 6,
            code: "4+2",
            capacity: "8G".into(),
            directory: &[],
            provider: &[],
            sites: 0,
            net: None,
            as_shipped: false,
        }
    }
}

/// A running program whose output goes to a log.
struct Running {
    child: Child,
    name: String,
}

impl Running {
    fn start(name: &str, mut command: Command, log: &Path) -> Self {
        let output = File::options().create(true).append(true).open(log).expect("a log");
        let errors = output.try_clone().expect("a log");
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let child =
            command.spawn().unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        Self { child, name: name.into() }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        // It may have ended by itself; then there is nobody to tell.
        let _ = kill_process(pid, signal);
    }

    fn kill(mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }

    fn stop(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        let name = self.name.clone();
        let child = &mut self.child;
        poll::until(&format!("{name} to end"), PATIENCE, || {
            child.try_wait().expect("its own child").ok_or_else(|| "it still runs".to_string())
        })
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("its own child")
    }
}

/// A mounted volume. Unmounted when dropped.
pub struct Mount {
    running: Option<Running>,
    path: PathBuf,
}

impl Mount {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unmounts as a user would, and waits for the program to have flushed and ended.
    ///
    /// # Panics
    /// When it does not end well.
    pub fn unmount(mut self) {
        let running = self.running.take().expect("mounted");
        let status = running.stop();
        assert!(status.success(), "the mount ended with {status}");
        assert!(!is_mounted(&self.path), "{} is still mounted", self.path.display());
    }

    /// Pulls the plug: kill -9. The dead mount stays over its folder until it is dropped: a load
    /// that goes on meets errors, not the folder below.
    pub fn kill(&mut self) {
        self.running.take().expect("mounted").kill();
    }

    /// Holds the program still (SIGSTOP): what asks the mount waits.
    pub fn freeze(&self) {
        self.running.as_ref().expect("mounted").signal(Signal::STOP);
    }

    /// Lets a mount that was held still go on.
    pub fn thaw(&self) {
        self.running.as_ref().expect("mounted").signal(Signal::CONT);
    }

    /// The program's process id.
    pub fn pid(&self) -> u32 {
        self.running.as_ref().expect("mounted").child.id()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        detach(&self.path);
        if let Some(running) = self.running.take() {
            running.kill();
        }
        if !std::thread::panicking() {
            // Else what was written there was not written to the disk, and proves nothing.
            let below = fs::read_dir(&self.path).expect("the folder of a mount").count();
            assert_eq!(below, 0, "a load wrote into {} below the mount", self.path.display());
        }
    }
}

fn detach(path: &Path) {
    // Nothing is mounted there if the program had not come so far.
    let _ = rustix::mount::unmount(path, UnmountFlags::DETACH);
}

/// Whether something is mounted at `path`.
pub fn is_mounted(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("Linux");
    table.lines().any(|line| line.split(' ').nth(4) == path.to_str())
}

/// A directory and its providers.
pub struct Cluster {
    root: TempDir,
    shape: Shape,
    directory: Option<Running>,
    /// Where the directory listened last: others look for it there.
    listen: Option<String>,
    providers: Vec<Option<Running>>,
    mounts_made: usize,
    log_filter: String,
}

/// The one volume of a test cluster.
pub const VOLUME: &str = "disk";

impl Cluster {
    /// Starts everything and makes the volume; ready when every provider is online.
    pub fn start(shape: Shape) -> Self {
        Self::start_logging(shape, &std::env::var("US_LOG").unwrap_or_else(|_| "info".into()))
    }

    /// [`Cluster::start`] with programs that log what `log_filter` says.
    pub fn start_logging(shape: Shape, log_filter: &str) -> Self {
        let root =
            tempfile::Builder::new().prefix("us-test-").tempdir().expect("a temporary folder");
        let mut cluster = Self {
            root,
            providers: Vec::new(),
            directory: None,
            listen: None,
            mounts_made: 0,
            shape,
            log_filter: log_filter.to_string(),
        };
        cluster.run_to_end("us-directory", &["init", "--data", &cluster.at("directory")]);
        // As its owner is told to.
        fs::copy(cluster.at("directory/recovery.key"), cluster.at("recovery.key")).expect("a key");
        cluster.start_directory();
        cluster.issue("client", "client");
        cluster.issue("admin", "admin");
        for number in 0..cluster.shape.providers {
            cluster.issue("provider", &format!("provider{number}"));
            cluster.providers.push(None);
            cluster.start_provider(number);
        }
        cluster.wait_online(cluster.shape.providers);
        cluster.usctl(&["volume", "create", VOLUME, "--code", cluster.shape.code]);
        cluster.usctl(&["volume", "allow", VOLUME, &cluster.key_of("client")]);
        cluster
    }

    /// The hash of an identity's key, as `usctl volume allow` takes it.
    pub fn key_of(&self, name: &str) -> String {
        let identity = Identity::load(Path::new(&self.at(&format!("identity-{name}"))));
        identity.expect("it was issued").own().key_hash.to_string()
    }

    /// A path in the cluster's folder, as text.
    pub fn at(&self, name: &str) -> String {
        self.root.path().join(name).to_str().expect("a plain path").to_string()
    }

    /// The folder of provider `number`'s store.
    pub fn provider_data(&self, number: usize) -> PathBuf {
        self.root.path().join(format!("store{number}"))
    }

    /// The log of a process: "directory", "provider0" …, "mount0" ….
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.at(&format!("{name}.log"))).unwrap_or_default()
    }

    /// One of the programs, logging as the others do.
    pub fn program(&self, name: &str) -> Command {
        let mut command = Command::new(programs().join(name));
        command.env("US_LOG", &self.log_filter);
        command
    }

    /// `us-provider` where provider `number` runs.
    fn program_at(&self, number: usize) -> Command {
        let Some(net) = &self.shape.net else { return self.program("us-provider") };
        let mut command = net.command(number, &programs().join("us-provider"));
        command.env("US_LOG", &self.log_filter);
        command
    }

    fn host_of(&self, number: usize) -> String {
        self.shape.net.as_ref().map_or("127.0.0.1".to_owned(), |net| net.address(number))
    }

    fn run_to_end(&self, name: &str, arguments: &[&str]) -> String {
        let output = self.program(name).args(arguments).output().expect("it starts");
        assert!(
            output.status.success(),
            "{name} {arguments:?} ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("text")
    }

    /// Issues a certificate; it lies in the folder `identity-NAME`.
    ///
    /// # Panics
    /// When the program fails.
    pub fn issue(&self, role: &str, name: &str) {
        let data = self.at("directory");
        let out = self.at(&format!("identity-{name}"));
        self.run_to_end(
            "us-directory",
            &["identity", "--data", &data, "--role", role, "--name", name, "--out", &out],
        );
    }

    /// Where the directory listens.
    pub fn directory_address(&self) -> String {
        fs::read_to_string(self.at("directory/address")).expect("it was ready").trim().to_string()
    }

    /// Starts the directory, again on the port it had before.
    pub fn start_directory(&mut self) {
        assert!(self.directory.is_none(), "it runs");
        let address_file = self.at("directory/address");
        let own = || self.shape.net.as_ref().map_or("127.0.0.1".to_owned(), |net| net.host());
        let listen = self.listen.clone().unwrap_or_else(|| format!("{}:0", own()));
        let mut command = self.program("us-directory");
        command.args(["run", "--data", &self.at("directory"), "--listen", &listen]);
        if !self.shape.as_shipped {
            command.args(["--lease-ms", LEASE_MS, "--fence-ms", FENCE_MS]);
            command.args(["--settle-ms", SETTLE_MS]);
        }
        command.args(self.shape.directory);
        let log = self.at("directory.log");
        let mut running = Running::start("us-directory", command, Path::new(&log));
        poll::until("the directory to listen", PATIENCE, || {
            if let Some(status) = running.ended() {
                panic!("us-directory ended with {status}:\n{}", self.log("directory"));
            }
            let address = fs::read_to_string(&address_file).map_err(|error| error.to_string())?;
            std::net::TcpStream::connect(address.trim()).map_err(|error| error.to_string())
        });
        self.directory = Some(running);
        self.listen = Some(self.directory_address());
    }

    /// kill -9 of the directory, and its disk is gone.
    pub fn lose_directory(&mut self) {
        self.kill_directory();
        fs::remove_dir_all(self.at("directory")).expect("it can be removed");
    }

    /// Runs `us-directory` with these arguments to its end: whether it succeeded, and what it said.
    pub fn us_directory(&self, arguments: &[&str]) -> (bool, String) {
        let output = self.program("us-directory").args(arguments).output().expect("it starts");
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).expect("text"))
    }

    /// Rebuilds the directory's data with the key its owner kept, from a provider.
    ///
    /// # Panics
    /// When it does not work.
    pub fn restore_directory(&self, from: usize) -> String {
        let (data, key) = (self.at("directory"), self.at("recovery.key"));
        let from = self.provider_address(from);
        let (ok, said) = self.us_directory(&[
            "restore",
            "--data",
            &data,
            "--recovery-key",
            &key,
            "--from",
            &from,
        ]);
        assert!(ok, "restore: {said}");
        said
    }

    /// Where provider `number` listens.
    pub fn provider_address(&self, number: usize) -> String {
        let file = self.provider_data(number).join("address");
        fs::read_to_string(file).expect("it was ready").trim().to_string()
    }

    /// Waits until the journal has this many copies on providers; gives the providers' places in
    /// this cluster.
    pub fn wait_copies(&self, wanted: usize) -> Vec<usize> {
        poll::until(&format!("{wanted} copies of the journal"), PATIENCE, || {
            let status = self.status()?;
            let journal = &status["journal"];
            let holders = journal["holders"].as_array().ok_or("no holders")?;
            let providers = status["providers"].as_array().ok_or("no providers")?;
            let place = |holder: &serde_json::Value| {
                let known = providers.iter().find(|one| &one["provider"] == holder)?;
                known["name"].as_str()?.strip_prefix("provider")?.parse().ok()
            };
            let places: Option<Vec<usize>> = holders.iter().map(place).collect();
            places.filter(|places| places.len() == wanted).ok_or(journal.to_string())
        })
    }

    /// kill -9 of the directory.
    pub fn kill_directory(&mut self) {
        self.directory.take().expect("it runs").kill();
    }

    /// Starts provider `number`, again on the port it had before.
    pub fn start_provider(&mut self, number: usize) {
        assert!(self.providers[number].is_none(), "it runs");
        let data = self.provider_data(number);
        let listen = fs::read_to_string(data.join("address"))
            .map_or_else(|_| format!("{}:0", self.host_of(number)), |text| text.trim().to_string());
        let mut command = self.program_at(number);
        command.arg("run").arg("--data").arg(&data);
        let directory = self.listen.clone().expect("a directory was there");
        command.args(["--directory", &directory, "--listen", &listen]);
        command.args(["--identity", &self.at(&format!("identity-provider{number}"))]);
        command.args(["--capacity", &self.shape.capacity, "--reserve", "0"]);
        command.args(self.shape.provider);
        if self.shape.sites > 0 {
            command.args(["--site", &format!("site{}", number % self.shape.sites)]);
        }
        if !self.shape.as_shipped {
            // The machine that runs all of this is busy; its owner does not mind.
            command.env("US_PROVIDER_GUEST__REPAIR_CPU_PRESSURE_PERCENT_MAX", "1000.0");
            command.env("US_PROVIDER_GUEST__REPAIR_IO_PRESSURE_PERCENT_MAX", "1000.0");
            command.env("US_PROVIDER_GUEST__CPU_PRESSURE_PERCENT_MAX", "1000.0");
            command.env("US_PROVIDER_GUEST__IO_PRESSURE_PERCENT_MAX", "1000.0");
        }
        let log = self.at(&format!("provider{number}.log"));
        let running = Running::start("us-provider", command, Path::new(&log));
        self.providers[number] = Some(running);
    }

    /// CPU seconds that the directory and the providers that run have taken so far; with them those
    /// of a provider that was ended do not count.
    pub fn cpu_seconds(&self) -> f64 {
        /// Of times in /proc, on every Linux.
        const TICKS_A_SECOND: f64 = 100.0;
        let running = self.directory.iter().chain(self.providers.iter().flatten());
        let ticks = running.map(|running| {
            let stat = fs::read_to_string(format!("/proc/{}/stat", running.child.id()));
            let stat = stat.unwrap_or_default();
            // The name, in brackets, may hold blanks; user and system time are fields 14 and 15.
            let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
            fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum::<u64>()
        });
        ticks.sum::<u64>() as f64 / TICKS_A_SECOND
    }

    /// How provider `number` ended, if it did so by itself.
    pub fn provider_ended(&mut self, number: usize) -> Option<ExitStatus> {
        self.providers[number].as_mut().and_then(Running::ended)
    }

    /// kill -9 of provider `number`.
    pub fn kill_provider(&mut self, number: usize) {
        self.providers[number].take().expect("it runs").kill();
    }

    /// Holds provider `number` still (SIGSTOP): its connections stay, and nothing answers.
    pub fn freeze_provider(&self, number: usize) {
        self.providers[number].as_ref().expect("it runs").signal(Signal::STOP);
    }

    /// Lets a provider that was held still go on.
    pub fn thaw_provider(&self, number: usize) {
        self.providers[number].as_ref().expect("it runs").signal(Signal::CONT);
    }

    /// Ends provider `number` as a shutdown would.
    pub fn stop_provider(&mut self, number: usize) {
        let status = self.providers[number].take().expect("it runs").stop();
        assert!(status.success(), "us-provider ended with {status}");
    }

    /// Mounts the volume at a place of its own.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn mount(&mut self) -> Mount {
        self.mount_with(&[])
    }

    /// [`Cluster::mount`] with more arguments to `usfs mount`.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn mount_with(&mut self, arguments: &[&str]) -> Mount {
        self.mount_volume(VOLUME, arguments)
    }

    /// Mounts another volume than the usual one.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn mount_volume(&mut self, volume: &str, arguments: &[&str]) -> Mount {
        let name = format!("mount{}", self.mounts_made);
        self.mounts_made += 1;
        let path = self.root.path().join(&name);
        fs::create_dir(&path).expect("a mount point");
        self.mount_volume_at(volume, &path, &name, arguments)
    }

    /// Mounts the volume again where it was.
    pub fn mount_at(&self, path: &Path, name: &str) -> Mount {
        self.mount_volume_at(VOLUME, path, name, &[])
    }

    fn mount_volume_at(&self, volume: &str, path: &Path, name: &str, arguments: &[&str]) -> Mount {
        let identity = self.at("identity-client");
        let mut arguments = arguments.to_vec();
        if !arguments.contains(&"--identity") {
            arguments.extend(["--identity", &identity]);
        }
        // Each mount keeps its own state in the cluster's folder.
        self.mount_volume_as(volume, path, name, &self.at("data"), &arguments)
    }

    /// Mounts the usual volume as whoever the folder `data` (or `arguments`) says.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn mount_as(&self, path: &Path, name: &str, data: &str, arguments: &[&str]) -> Mount {
        self.mount_volume_as(VOLUME, path, name, data, arguments)
    }

    fn mount_volume_as(
        &self,
        volume: &str,
        path: &Path,
        name: &str,
        data: &str,
        arguments: &[&str],
    ) -> Mount {
        let mut command = self.program("usfs");
        command.arg("mount").arg(format!("{}/{volume}", self.directory_address())).arg(path);
        command.args(arguments).env("XDG_DATA_HOME", data).env("US_DATA", data);
        let log = self.at(&format!("{name}.log"));
        let mut running = Running::start("usfs mount", command, Path::new(&log));
        poll::until("the mount", PATIENCE, || {
            if let Some(status) = running.ended() {
                panic!("usfs mount ended with {status}:\n{}", self.log(name));
            }
            is_mounted(path).then_some(()).ok_or_else(|| self.log(name))?;
            fs::metadata(path).map(drop).map_err(|error| error.to_string())
        });
        Mount { running: Some(running), path: path.to_path_buf() }
    }

    /// A `usfs` command for tests that expect something else than a mount. Nobody is at a terminal.
    pub fn usfs(&self, arguments: &[&str]) -> Command {
        let mut command = self.program("usfs");
        command.args(arguments).stdin(Stdio::null());
        command.env("XDG_DATA_HOME", self.at("data")).env("US_DATA", self.at("data"));
        command.env("US_IDENTITY", self.at("identity-client"));
        command
    }

    /// The directory's Admin service.
    pub fn admin(&self) -> Admin {
        Admin::new(self.directory_address(), Path::new(&self.at("identity-admin")))
    }

    /// A `usctl` command.
    pub fn usctl_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.program("usctl");
        command.args(["--directory", &self.directory_address()]);
        command.args(["--identity", &self.at("identity-admin")]).args(arguments);
        command.stdin(Stdio::null());
        command
    }

    /// Runs `usctl` and gives what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub fn usctl(&self, arguments: &[&str]) -> String {
        let output = self.usctl_command(arguments).output().expect("usctl starts");
        assert!(
            output.status.success(),
            "usctl {arguments:?} ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("text")
    }

    /// Runs `usctl`: its exit code, and what it printed.
    ///
    /// # Panics
    /// When it does not end by itself.
    pub fn usctl_code(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.usctl_command(arguments).output().expect("usctl starts");
        let code = output.status.code().expect("it ended by itself");
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        (code, String::from_utf8(output.stdout).expect("text"))
    }

    /// `usctl status --exit-code`.
    pub fn status_code(&self) -> i32 {
        let output = self.usctl_command(&["status", "--exit-code"]).output().expect("usctl starts");
        output.status.code().expect("it ended by itself")
    }

    /// `usctl status --json`, parsed.
    pub fn status(&self) -> Result<serde_json::Value, String> {
        let output = self.usctl_command(&["status", "--json"]).output().expect("usctl starts");
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
    }

    /// Waits until this many providers are online.
    pub fn wait_online(&self, wanted: usize) {
        poll::until(&format!("{wanted} providers online"), PATIENCE, || {
            let status = self.status()?;
            let providers = status["providers"].as_array().ok_or("no providers")?;
            let online = providers.iter().filter(|one| one["state"] == "online").count();
            (online == wanted).then_some(()).ok_or(format!("{online} online"))
        });
    }

    /// Waits until `status` says that every fragment of every block is durable.
    pub fn wait_settled(&self) {
        poll::until("status to say settled", SETTLED, || {
            let status = self.status()?;
            let settled = status["counting"] == false && status["blocks"]["unsettled"] == 0;
            settled.then_some(()).ok_or(status["blocks"].to_string())
        });
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let kept = self.root.path().to_path_buf();
            for entry in fs::read_dir(&kept).into_iter().flatten().flatten() {
                if entry.path().extension().is_some_and(|ending| ending == "log") {
                    let text = fs::read_to_string(entry.path()).unwrap_or_default();
                    let tail: Vec<_> = text.lines().rev().take(40).collect();
                    eprintln!("--- {}", entry.file_name().to_string_lossy());
                    tail.iter().rev().for_each(|line| eprintln!("{line}"));
                }
            }
        }
        for provider in self.providers.iter_mut().filter_map(Option::take) {
            provider.kill();
        }
        if let Some(directory) = self.directory.take() {
            directory.kill();
        }
    }
}
