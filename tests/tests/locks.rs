//! Byte-range locks across two mounts, with other processes as their owners: who has one keeps it
//! until it closes or dies, and nobody is kept out after that.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::io::{BufRead, BufReader, Write};
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
