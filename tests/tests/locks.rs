//! Byte-range locks across two mounts, with other processes as their owners: who has one keeps it
//! until it closes or dies, and nobody is kept out after that.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use us_tests::cluster::{Cluster, PATIENCE, Shape, fuse_is_here};
use us_tests::poll;

/// A program that opens, closes and locks files as it is told, a line a step.
const LOCKER: &str = r#"
import fcntl, os, struct, sys
files = {}
for line in sys.stdin:
    step, name, *rest = line.split()
    try:
        if step == "open":
            files[name] = os.open(rest[0], os.O_RDWR)
        elif step == "close":
            os.close(files.pop(name))
        elif step == "posix":
            fcntl.lockf(files[name], fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif step == "posix-unlock":
            fcntl.lockf(files[name], fcntl.LOCK_UN)
        elif step == "range":
            start, bytes = map(int, rest)
            fcntl.lockf(files[name], fcntl.LOCK_EX | fcntl.LOCK_NB, bytes, start)
        elif step == "ofd":
            whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            fcntl.fcntl(files[name], fcntl.F_OFD_SETLK, whole)
        elif step == "flock":
            fcntl.flock(files[name], fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("ok", flush=True)
    except BlockingIOError:
        print("locked", flush=True)
    except OSError as error:
        print(error, flush=True)
"#;

struct Locker {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Locker {
    fn start() -> Self {
        let mut command = Command::new("python3");
        command.args(["-u", "-c", LOCKER]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("python3 is here");
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, input, output: BufReader::new(output) }
    }

    fn step(&mut self, step: &str) -> String {
        writeln!(self.input, "{step}").unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }

    fn open(&mut self, name: &str, path: &Path) {
        assert_eq!(self.step(&format!("open {name} {}", path.display())), "ok");
    }

    fn takes(&mut self, step: &str) {
        assert_eq!(self.step(step), "ok", "{step}");
    }

    fn is_kept_out(&mut self, step: &str) {
        assert_eq!(self.step(step), "locked", "{step}");
    }

    /// What was released is there soon.
    fn gets(&mut self, step: &str) {
        poll::until(step, PATIENCE, || match self.step(step).as_str() {
            "ok" => Ok(()),
            answer => Err(answer.to_owned()),
        });
    }

    /// kill -9.
    fn die(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        // It may have died already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An OFD lock was never released by a close: its owner is the open file, of which the directory
/// heard nothing, so that whoever exited with one kept all others out until its mount ended.
#[test]
fn locks_hold_across_mounts_and_end_with_their_owners() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let (left, right) = (cluster.mount(), cluster.mount());
    std::fs::write(left.path().join("file"), b"locked").unwrap();
    let (here, there) = (left.path().join("file"), right.path().join("file"));

    // POSIX: until any descriptor of the file is closed, or the process dies.
    let (mut one, mut two) = (Locker::start(), Locker::start());
    one.open("a", &here);
    two.open("b", &there);
    one.takes("posix a");
    two.is_kept_out("posix b");
    one.open("c", &here);
    one.takes("close c");
    two.gets("posix b");
    one.is_kept_out("posix a");
    two.takes("posix-unlock b");
    one.gets("posix a");
    two.is_kept_out("posix b");
    one.die();
    two.gets("posix b");
    two.takes("close b");

    // OFD: until the open file is closed, whatever else the process closes, or it dies.
    let mut one = Locker::start();
    one.open("a", &here);
    two.open("b", &there);
    one.takes("ofd a");
    two.is_kept_out("ofd b");
    one.open("c", &here);
    one.is_kept_out("ofd c");
    one.takes("close c");
    two.is_kept_out("ofd b");
    one.takes("close a");
    two.gets("ofd b");
    one.open("a", &here);
    one.is_kept_out("ofd a");
    two.die();
    one.gets("ofd a");
    one.takes("close a");

    // flock: between processes of one mount; each mount's kernel keeps its own.
    let (mut two, mut third) = (Locker::start(), Locker::start());
    one.open("a", &here);
    two.open("b", &here);
    third.open("c", &there);
    one.takes("flock a");
    two.is_kept_out("flock b");
    third.takes("flock c");
    one.die();
    two.gets("flock b");
    drop((two, third));
    left.unmount();
    right.unmount();
}

/// A program that counts up in a file: which counter is drawn, the counter's bytes are locked, read,
/// written, released. Its manifest: how often it has counted up which.
const COUNTER: &str = r#"
import fcntl, os, random, struct, sys
path, seed, rounds, counters = sys.argv[1], *map(int, sys.argv[2:5])
draw, done, file = random.Random(seed), [0] * counters, os.open(path, os.O_RDWR)
for _ in range(rounds):
    which = draw.randrange(counters)
    fcntl.lockf(file, fcntl.LOCK_EX, 8, 8 * which)
    value, = struct.unpack("<q", os.pread(file, 8, 8 * which))
    os.pwrite(file, struct.pack("<q", value + 1), 8 * which)
    done[which] += 1
    fcntl.lockf(file, fcntl.LOCK_UN, 8, 8 * which)
print(*done)
"#;

/// Programs of two mounts count up in one file, all over each other and in ranges next to each other.
#[test]
fn what_is_counted_under_locks_of_two_mounts_is_never_lost() {
    const COUNTERS: usize = 4;
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let (left, right) = (cluster.mount(), cluster.mount());
    std::fs::write(left.path().join("counters"), [0; 8 * COUNTERS]).unwrap();
    let count_in = |number: usize| {
        let mount = [&left, &right][number % 2];
        let mut command = Command::new("python3");
        command.args(["-c", COUNTER]).arg(mount.path().join("counters"));
        command.args([number.to_string(), "40".to_owned(), COUNTERS.to_string()]);
        command.stdout(Stdio::piped()).spawn().expect("python3 is here")
    };
    let programs: Vec<Child> = (0..6).map(count_in).collect();
    let mut manifest = [0i64; COUNTERS];
    for program in programs {
        let output = program.wait_with_output().unwrap();
        assert!(output.status.success());
        let counted = String::from_utf8(output.stdout).unwrap();
        let counted = counted.split_whitespace().map(|number| number.parse::<i64>().unwrap());
        manifest.iter_mut().zip(counted).for_each(|(sum, number)| *sum += number);
    }
    assert_eq!(manifest.iter().sum::<i64>(), 6 * 40);
    for mount in [&left, &right] {
        let bytes = std::fs::read(mount.path().join("counters")).unwrap();
        let counters = bytes.chunks(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()));
        assert_eq!(counters.collect::<Vec<_>>(), manifest);
    }
    left.unmount();
    right.unmount();
}

/// How many messages about locks the directory has had, as its metrics on a Unix socket say.
fn lock_messages(socket: &Path) -> u64 {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    let line = page.lines().find_map(|line| line.strip_prefix("us_directory_lock_messages_total "));
    line.map_or(0, |number| number.trim().parse().unwrap())
}

const TRANSACTIONS: &str = r#"
import sqlite3, sys
base = sqlite3.connect(sys.argv[1], isolation_level=None)
base.execute("pragma synchronous = off")
base.execute("create table if not exists t (x)")
for number in range(int(sys.argv[2])):
    base.execute("insert into t values (?)", (number,))
print(base.execute("select count(*) from t").fetchone()[0])
"#;

/// Each of sqlite's transactions takes and gives back half a dozen locks, and the directory was asked
/// for every one.
#[test]
fn a_mount_that_alone_locks_a_file_hardly_asks_the_directory() {
    if !fuse_is_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("metrics");
    let metrics: &'static str = Box::leak(format!("unix:{}", socket.display()).into_boxed_str());
    let directory: &'static [&'static str] = Box::leak(Box::new(["--metrics", metrics]));
    let mut cluster = Cluster::start(Shape { directory, ..Shape::default() });
    let (left, right) = (cluster.mount(), cluster.mount());
    let transact = |mount: &Path, count: u64| {
        let mut command = Command::new("python3");
        command.args(["-c", TRANSACTIONS]).arg(mount.join("base")).arg(count.to_string());
        let output = command.output().expect("python3 is here");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().parse::<u64>().unwrap()
    };
    assert_eq!(transact(left.path(), 1_000), 1_000);
    let alone = lock_messages(&socket);
    eprintln!("1,000 transactions: {alone} messages about locks");
    assert!((1..20).contains(&alone), "{alone} messages");
    // Nothing is left of it: another mount goes on at once, and is alone in its turn.
    assert_eq!(transact(right.path(), 500), 1_500);
    assert_eq!(transact(left.path(), 500), 2_000);
    let both = lock_messages(&socket) - alone;
    assert!(both < 40, "{both} messages");
    left.unmount();
    right.unmount();
}

/// The directory forgot all locks when it was started again.
#[test]
fn locks_outlive_the_directory() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let (left, right) = (cluster.mount(), cluster.mount());
    let (mut one, mut two) = (Locker::start(), Locker::start());
    for name in ["alone", "both"] {
        std::fs::write(left.path().join(name), b"locked").unwrap();
        one.open(name, &left.path().join(name));
        two.open(name, &right.path().join(name));
    }
    one.takes("posix alone");
    one.takes("range both 0 2");
    two.takes("range both 4 2");
    cluster.kill_directory();
    cluster.start_directory();
    two.is_kept_out("posix alone");
    two.is_kept_out("range both 0 1");
    one.is_kept_out("range both 5 1");
    one.takes("posix-unlock alone");
    two.gets("posix alone");
    one.takes("close both");
    two.gets("posix both");
    one.is_kept_out("posix alone");
    drop((one, two));
    left.unmount();
    right.unmount();
}

/// What a dead mount had locked at the directory was locked as long as nobody wanted its leases.
#[test]
fn locks_of_a_mount_that_dies_end_with_the_fence() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let (mut left, right) = (cluster.mount(), cluster.mount());
    let (mut one, mut two) = (Locker::start(), Locker::start());
    for name in ["kept", "both"] {
        std::fs::write(left.path().join(name), b"locked").unwrap();
        one.open(name, &left.path().join(name));
        two.open(name, &right.path().join(name));
    }
    // The first lock is asked for, the second is known to nobody else.
    one.takes("range kept 0 2");
    one.takes("range kept 4 2");
    two.takes("range both 4 2");
    one.takes("range both 0 2");
    left.kill();
    two.gets("range both 0 6");
    two.gets("range kept 4 2");
    two.takes("range kept 0 2");
    let log = cluster.log("directory");
    assert!(log.contains("session fenced"), "{log}");
    one.die();
    drop(two);
    drop(left);
    right.unmount();
}
