//! What POSIX asks, asked by programs that others wrote for it: pjdfstest (every call, every errno) and
//! fsx (random operations on one file against a copy in memory).

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use us_tests::cluster::{Cluster, PATIENCE, Shape, VOLUME, fuse_is_here, programs};
use us_tests::poll;
use us_tests::tier;
use us_tests::tools::tool;
use us_tests::tree::noise;

/// A file that says which optional parts a file system has: all that Linux knows of.
fn features(other_file_system: &Path, may_remount: bool) -> String {
    format!(
        "[features]\nposix_fallocate = {{}}\nrename_ctime = {{}}\nstat_st_birthtime = {{}}\n\
         utime_now = {{}}\nutimensat = {{}}\nsecondary_fs = {other_file_system:?}\n\
         [settings]\nnaptime = 0.01\nallow_remount = {may_remount}\n\
         [dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"]]\n"
    )
}

/// A `mount` that calls our helper for `-o remount,…`, as mount(8) does where it is installed.
fn mount_program(folder: &Path, programs: &Path, source: &str) {
    fs::create_dir(folder).unwrap();
    let helper = folder.join("mount.fuse.usfs");
    symlink(programs.join("usfs"), &helper).unwrap();
    let script = format!(
        "#!/bin/sh\ncase \"$1 $2\" in\n\
         '-o remount,'*) exec '{}' '{source}' \"$3\" -o \"rw,$2,user_id=0\" ;;\n\
         *) exec /bin/mount \"$@\" ;;\nesac\n",
        helper.display()
    );
    let program = folder.join("mount");
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Runs pjdfstest: how many tests failed, were skipped, and passed.
fn pjdfstest(
    program: &Path,
    folder: &Path,
    config: &Path,
    path: &str,
    pattern: &[&str],
) -> [u32; 3] {
    // It takes some seconds; one that hangs is an answer too.
    let mut command = Command::new("timeout");
    command
        .arg("300")
        .arg(program)
        .arg("-c")
        .arg(config)
        .arg("-p")
        .arg(folder)
        .args(pattern)
        .env("PATH", path);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let summary = text.lines().rfind(|line| line.starts_with("Summary:"));
    let summary = summary.unwrap_or_else(|| panic!("no summary: {text} {output:?}"));
    println!("{pattern:?} {summary}");
    let count = |what: &str| -> u32 {
        let part = summary.split([':', ',']).find(|part| part.trim_end().ends_with(what));
        part.unwrap().split_whitespace().next().unwrap().parse().unwrap()
    };
    let counts = [count("failed"), count("skipped"), count("passed")];
    if counts[0] > 0 {
        println!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
    }
    counts
}

#[test]
fn pjdfstest_passes() {
    let Some(program) = fuse_is_here().then(|| tool("pjdfstest")).flatten() else { return };
    let mut cluster = Cluster::start(Shape::default());
    let (mount, other) = (cluster.mount(), cluster.mount());
    fs::set_permissions(mount.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let root = PathBuf::from(cluster.at("."));
    // Users without rights come by here.
    fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
    let source = format!("{}/{VOLUME}", cluster.directory_address());
    mount_program(&root.join("bin"), programs(), &source);
    let path = format!("{}:{}", root.join("bin").display(), std::env::var("PATH").unwrap());
    let config = root.join("pjdfstest.toml");
    // In one process with all others these cannot be: some of the others leave files open for
    // writing, and nothing that is written to becomes read-only.
    fs::write(&config, features(other.path(), true)).unwrap();
    let [failed, skipped, passed] = pjdfstest(&program, mount.path(), &config, &path, &["erofs"]);
    assert!((failed, skipped) == (0, 0) && passed >= 13, "{failed}, {skipped}, {passed}");
    fs::write(&config, features(other.path(), false)).unwrap();
    let [failed, skipped, passed] = pjdfstest(&program, mount.path(), &config, &path, &[]);
    // Of the kernel's limit of links pathconf(3) knows nothing on FUSE.
    assert!((failed, skipped) == (0, 13 + 1) && passed >= 384, "{failed}, {skipped}, {passed}");
    other.unmount();
    mount.unmount();
}

/// Every kind of operation fsx has; up to `largest` bytes each, in a file of up to `length`.
fn operations(length: u32, largest: u32) -> String {
    format!(
        "nomsyncafterwrite = true\nflen = {length}\n[opsize]\nmin = 1\nmax = {largest}\nalign = 1\n\
         [weights]\nclose_open = 0.5\nread = 10\nwrite = 10\nmapread = 10\nmapwrite = 10\n\
         invalidate = 0.5\ntruncate = 5\nfsync = 0.2\nfdatasync = 0.2\nposix_fallocate = 3\n\
         punch_hole = 5\nsendfile = 5\nposix_fadvise = 2\ncopy_file_range = 1\n"
    )
}

/// fsx at work on a file of a mount; what it says until it differs is in a log.
struct Fsx {
    child: Child,
    log: PathBuf,
}

impl Fsx {
    fn start(program: &Path, file: &Path, config: &Path, seed: u64, count: u32) -> Self {
        let log = config.with_extension("log");
        let output = File::create(&log).unwrap();
        let mut command = Command::new(program);
        command.args(["-q", "-N", &count.to_string(), "-S", &seed.to_string(), "-f"]).arg(config);
        command.arg("-P").arg(config.parent().unwrap()).arg(file);
        command.stdout(output.try_clone().unwrap()).stderr(output).stdin(Stdio::null());
        Self { child: command.spawn().unwrap(), log }
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end, which must be a good one.
    fn check(mut self) {
        let status = poll::until("the end of fsx", PATIENCE * tier::rounds(20, 200, 400), || {
            self.child.try_wait().unwrap().ok_or("it runs".to_owned())
        });
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(60)..].join("\n");
        assert!(status.success(), "fsx: {status}\n{tail}");
    }
}

impl Drop for Fsx {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The files of a round: small ones with small operations, and ones of several blocks.
const SHAPES: [(&str, u32, u32); 2] =
    [("small", 256 << 10, 64 << 10), ("large", 20 << 20, 1 << 20)];

/// Two providers at a time fall silent and come back.
fn die_and_return(cluster: &mut Cluster, folder: &Path, mut is_used: impl FnMut() -> bool) {
    let mut deaths_in_use = 0;
    for victims in [[0, 1], [2, 3], [4, 5]] {
        victims.iter().for_each(|victim| cluster.kill_provider(*victim));
        cluster.wait_online(4);
        // Writing goes on with the four that are left.
        let mut probe = File::create(folder.join("probe")).unwrap();
        probe
            .write_all(&noise(victims[0] as u64, 1 << 20))
            .and_then(|()| probe.sync_all())
            .unwrap();
        deaths_in_use += u32::from(is_used());
        victims.iter().for_each(|victim| cluster.start_provider(*victim));
        cluster.wait_online(6);
        cluster.wait_settled();
    }
    assert!(deaths_in_use > 0, "fsx was done before anybody died");
}

fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

#[test]
fn fsx_finds_no_difference() {
    let Some(program) = fuse_is_here().then(|| tool("fsx")).flatten() else { return };
    let mut cluster = Cluster::start(Shape::default());
    let root = PathBuf::from(cluster.at("."));
    // In CI 200,000 operations in all, in the full tier ten million.
    let rounds = tier::rounds(2, 10, 20);
    let counts = [tier::rounds(80_000, 900_000, 1_500_000), tier::rounds(20_000, 100_000, 200_000)];
    let seed = tier::seed();
    for round in 0..rounds {
        let mount = cluster.mount();
        let running = SHAPES.iter().zip(counts).map(|((name, length, largest), count)| {
            let config = root.join(format!("{name}-{round}.toml"));
            fs::write(&config, operations(*length, *largest)).unwrap();
            let file = mount.path().join(format!("{name}-{round}"));
            Fsx::start(&program, &file, &config, seed + u64::from(round), count)
        });
        let mut running: Vec<Fsx> = running.collect();
        if round % 2 == 1 {
            die_and_return(&mut cluster, mount.path(), || running.iter_mut().any(Fsx::is_running));
        }
        running.into_iter().for_each(Fsx::check);
        let seen = contents(mount.path());
        mount.unmount();
        let mount = cluster.mount();
        assert!(contents(mount.path()) == seen, "another mount sees the same");
        mount.unmount();
    }
}
