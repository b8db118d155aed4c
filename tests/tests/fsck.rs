//! `usctl fsck` on real processes: no false alarm beside running writes; what was taken away is found
//! and made again; what nothing names is found and goes to the trash.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use us_tests::cluster::{Cluster, PATIENCE, Shape, fuse_is_here};
use us_tests::manifest::Manifest;
use us_tests::poll;
use us_tests::tree::noise;

/// How long the slowest repair of a test may take.
const HEALED: Duration = Duration::from_secs(240);

/// Garbage is garbage after two seconds.
fn shape() -> Shape {
    Shape { directory: &["--garbage-age-ms", "2000"], ..Shape::default() }
}

fn fill(folder: &Path) {
    for number in 0..8 {
        let path = folder.join(format!("file{number}"));
        fs::write(&path, noise(number, 3 << 20)).unwrap();
        fs::File::open(&path).unwrap().sync_all().unwrap();
    }
}

fn check(folder: &Path) {
    for number in 0..8 {
        let read = fs::read(folder.join(format!("file{number}"))).unwrap();
        assert!(read == noise(number, 3 << 20), "file{number}: wrong bytes");
    }
}

/// The exit code and what was printed.
fn fsck(cluster: &Cluster, arguments: &[&str]) -> (i32, serde_json::Value) {
    let arguments: Vec<&str> = ["fsck", "--json"].iter().chain(arguments).copied().collect();
    let (code, text) = cluster.usctl_code(&arguments);
    let value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    (code, value)
}

fn wait_clean(cluster: &Cluster) {
    poll::until("a clean check", HEALED, || {
        let (code, said) = fsck(cluster, &[]);
        (code == 0).then_some(()).ok_or(said["found"].to_string())
    });
}

#[test]
fn work_that_goes_on_is_no_finding() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(shape());
    let mount = cluster.mount();
    fill(mount.path());
    let stop = AtomicBool::new(false);
    let work = mount.path().join("work");
    fs::create_dir(&work).unwrap();
    thread::scope(|scope| {
        let (stop, work) = (&stop, &work);
        let worker = scope.spawn(move || {
            let mut manifest = Manifest::default();
            manifest.work(work, stop);
            manifest
        });
        for _ in 0..8 {
            let (code, said) = fsck(&cluster, &["--repair"]);
            assert_eq!(code, 0, "{said}");
        }
        stop.store(true, Ordering::Relaxed);
        let mut manifest = worker.join().unwrap();
        manifest.check(work);
    });
    check(mount.path());
    mount.unmount();
    let (_, said) = fsck(&cluster, &[]);
    assert!(said["fragments"].as_u64() > Some(0) && said["blocks"].as_u64() > Some(0), "{said}");
}

#[test]
fn fragments_that_vanished_are_found_and_made_again() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(shape());
    let mount = cluster.mount();
    fill(mount.path());
    cluster.wait_settled();
    wait_clean(&cluster);
    // Somebody tidies up: the segments are gone, the store's name and its cookie are there.
    cluster.stop_provider(2);
    let (code, said) = fsck(&cluster, &[]);
    assert_eq!(code, 8, "one could not be asked: {said}");
    let segments = cluster.provider_data(2).join("segments");
    for entry in fs::read_dir(&segments).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    cluster.start_provider(2);
    cluster.wait_online(6);
    let (code, said) = fsck(&cluster, &[]);
    assert_eq!(code, 4, "{said}");
    let missing = said["found"]["missing-fragment"]["left"].as_u64().unwrap();
    assert!(missing > 0 && !said["findings"].as_array().unwrap().is_empty());
    let (code, said) = fsck(&cluster, &["--repair"]);
    assert_eq!(code, 1, "{said}");
    assert_eq!(said["found"]["missing-fragment"]["fed"], missing);
    wait_clean(&cluster);
    // What was made is needed when two others go.
    cluster.wait_settled();
    cluster.kill_provider(0);
    cluster.kill_provider(1);
    check(mount.path());
    mount.unmount();
}

#[test]
fn what_nothing_names_goes_to_the_trash() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(shape());
    let mount = cluster.mount();
    fill(mount.path());
    cluster.wait_settled();
    mount.unmount();
    // A provider's store from before these files are deleted comes back in its old state, as far as
    // its fragments go: the deletions it did are forgotten with the last segments.
    let data = cluster.provider_data(4);
    let before = cluster.at("before");
    cluster.stop_provider(4);
    copy_folder(&data, Path::new(&before));
    cluster.start_provider(4);
    cluster.wait_online(6);
    let mount = cluster.mount();
    for number in 0..4 {
        fs::remove_file(mount.path().join(format!("file{number}"))).unwrap();
    }
    mount.unmount();
    poll::until("the deletions", PATIENCE, || {
        let left = cluster.status()?["pending_deletes"].clone();
        (left == 0).then_some(()).ok_or(left.to_string())
    });
    cluster.stop_provider(4);
    // Only fragments and their index are old; who it is to the directory is of today.
    for part in ["segments", "index"] {
        fs::remove_dir_all(data.join(part)).unwrap();
        copy_folder(&Path::new(&before).join(part), &data.join(part));
    }
    cluster.start_provider(4);
    cluster.wait_online(6);
    let orphans = poll::until("orphans to be old", PATIENCE, || {
        let (_, said) = fsck(&cluster, &[]);
        let found = said["found"]["orphan-fragment"]["left"].as_u64();
        found.filter(|found| *found > 0).ok_or(said.to_string())
    });
    let (_, said) = fsck(&cluster, &[]);
    let trashed = said["trashed"].as_u64().unwrap();
    let (code, said) = fsck(&cluster, &["--repair"]);
    assert_eq!((code, &said["found"]["orphan-fragment"]["mended"]), (1, &orphans.into()), "{said}");
    wait_clean(&cluster);
    let (_, said) = fsck(&cluster, &[]);
    assert_eq!(said["trashed"].as_u64().unwrap(), trashed + orphans, "in the trash, not away");
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy_folder(&path, &target),
            kind if kind.is_file() => drop(fs::copy(&path, &target).unwrap()),
            _ => {}
        }
    }
}
