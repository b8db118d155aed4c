//! `usfs up` as a newcomer meets it: one command, a disk; its processes one by one; the state found
//! again at the next start.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use us_tests::cluster::{PATIENCE, fuse_is_here, is_mounted, programs};
use us_tests::poll;
use us_tests::tree::noise;

struct Up {
    child: Child,
    root: PathBuf,
    log: PathBuf,
}

impl Up {
    fn start(root: &Path) -> Self {
        let starts = fs::read_dir(root).unwrap().count();
        let log_path = root.join(format!("log{starts}"));
        let log = fs::File::create_new(&log_path).unwrap();
        let child = Command::new(programs().join("usfs"))
            .args(["up", root.join("disk").to_str().unwrap(), "--providers", "6", "--code", "4+2"])
            .args(["--data", root.join("data").to_str().unwrap(), "--capacity", "4G"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut up = Self { child, root: root.to_path_buf(), log: log_path };
        poll::until("the disk", PATIENCE, || {
            if let Some(status) = up.child.try_wait().unwrap() {
                panic!("usfs up ended with {status}:\n{}", up.log());
            }
            // A stale mount of a killed predecessor does not count: it must say so itself.
            let said = up.log().contains(&format!("Your disk is at {}", up.disk().display()));
            (said && is_mounted(&up.disk())).then_some(()).ok_or_else(|| up.log())
        });
        up
    }

    fn disk(&self) -> PathBuf {
        self.root.join("disk")
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn usctl(&self, arguments: &[&str]) -> std::process::Output {
        Command::new(programs().join("usctl"))
            .args(arguments)
            .env("US_DATA", self.root.join("data"))
            .output()
            .unwrap()
    }

    fn status(&self) -> Result<serde_json::Value, String> {
        let output = self.usctl(&["status", "--json"]);
        serde_json::from_slice(&output.stdout)
            .map_err(|error| format!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
    }

    /// The process ids of its children, by name.
    fn pids(&self) -> BTreeMap<String, i32> {
        let text = fs::read(self.root.join("data/pids")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
        let status = poll::until("usfs up to end", PATIENCE, || {
            self.child.try_wait().unwrap().ok_or_else(|| "it still runs".to_string())
        });
        assert!(status.success(), "usfs up ended with {status}:\n{}", self.log());
        assert!(!is_mounted(&self.disk()));
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = rustix::mount::unmount(self.disk(), rustix::mount::UnmountFlags::DETACH);
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[test]
fn one_command_gives_a_disk_that_survives() {
    if !fuse_is_here() {
        return;
    }
    let root = tempfile::Builder::new().prefix("us-up-").tempdir().unwrap();
    let up = Up::start(root.path());
    let bytes = noise(5, 12_000_000);
    fs::write(up.disk().join("file"), &bytes).unwrap();
    fs::File::open(up.disk().join("file")).unwrap().sync_all().unwrap();
    // Settled as well: a block bears the loss of two once its last fragment is durable.
    let status = poll::until("a healthy and settled status", PATIENCE, || {
        let healthy = up.usctl(&["status", "--exit-code"]).status.success();
        let status = up.status()?;
        let settled = status["blocks"]["unsettled"] == 0;
        if healthy && settled { Ok(status) } else { Err(status.to_string()) }
    });
    assert_eq!(status["health"], "ok");
    assert!(status["blocks"]["total"].as_u64().unwrap() > 0);
    assert!(status["blocks"]["by_redundancy"]["2"].as_u64().unwrap() > 0, "{status}");
    assert_eq!(status["providers"].as_array().unwrap().len(), 6);
    let place = up.usctl(&["where", up.disk().join("file").to_str().unwrap()]);
    assert!(place.status.success(), "{}", String::from_utf8_lossy(&place.stderr));

    // Two of its provider processes are killed: reading and writing go on, and status says it.
    let providers: Vec<_> =
        up.pids().into_iter().filter(|(name, _)| name.starts_with("provider")).collect();
    assert_eq!(providers.len(), 6, "{providers:?}");
    for (_, pid) in providers.iter().take(2) {
        kill_process(Pid::from_raw(*pid).unwrap(), Signal::KILL).unwrap();
    }
    poll::until("status to notice", PATIENCE, || {
        let code = up.usctl(&["status", "--exit-code"]).status.code();
        (code == Some(1)).then_some(()).ok_or(format!("{code:?}: {:?}", up.status()))
    });
    let more = noise(6, 12_000_000);
    fs::write(up.disk().join("more"), &more).unwrap();
    fs::File::open(up.disk().join("more")).unwrap().sync_all().unwrap();
    assert!(fs::read(up.disk().join("file")).unwrap() == bytes);
    up.stop();

    // The state is found again.
    let up = Up::start(root.path());
    assert!(fs::read(up.disk().join("file")).unwrap() == bytes);
    assert!(fs::read(up.disk().join("more")).unwrap() == more);
    // A second `up` on the same state is told so.
    let second = Command::new(programs().join("usfs"))
        .args(["up", root.path().join("other").to_str().unwrap()])
        .args(["--data", root.path().join("data").to_str().unwrap()])
        .output()
        .unwrap();
    assert!(!second.status.success());
    // The plug: everything is killed, and a new start heals the stale mount point.
    let pids = up.pids();
    kill_process(Pid::from_child(&up.child), Signal::KILL).unwrap();
    poll::until("the children to follow", PATIENCE, || {
        let alive: Vec<_> = pids
            .iter()
            .filter(|(_, pid)| Path::new(&format!("/proc/{pid}/exe")).exists())
            .collect();
        alive.is_empty().then_some(()).ok_or(format!("{alive:?}"))
    });
    let mut up = up;
    up.child.wait().unwrap();
    let again = Up::start(root.path());
    assert!(fs::read(again.disk().join("more")).unwrap() == more);
    again.stop();
}
