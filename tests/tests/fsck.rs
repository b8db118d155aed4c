//! `usctl fsck` on real processes: no false alarm beside running writes; what was taken away is found
//! and made again; what nothing names is found and goes to the trash.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use us_tests::admin::is_whole;
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
    // Nothing is garbage before it is an hour old.
    let mut cluster = Cluster::start(Shape::default());
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

/// Makes orphans at provider 4: its fragments become those of before four files were deleted.
fn forget_deletions(cluster: &mut Cluster) {
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
    forget_deletions(&mut cluster);
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

#[test]
fn retain_lists_collect_what_nothing_names_whoever_is_killed() {
    if !fuse_is_here() {
        return;
    }
    let directory = &["--garbage-age-ms", "2000", "--retain-every-ms", "4000"];
    let mut cluster = Cluster::start(Shape { directory, ..Shape::default() });
    let mount = cluster.mount();
    fill(mount.path());
    cluster.wait_settled();
    mount.unmount();
    forget_deletions(&mut cluster);
    for round in 0..2 {
        // Repairs and lists are cut off in the middle, wherever that is.
        cluster.stop_provider(1);
        let data = cluster.provider_data(1);
        let address = fs::read(data.join("address")).unwrap();
        fs::remove_dir_all(&data).unwrap();
        fs::create_dir(&data).unwrap();
        fs::write(data.join("address"), address).unwrap();
        cluster.start_provider(1);
        cluster.wait_online(6);
        thread::park_timeout(Duration::from_millis(300 + 700 * round));
        cluster.kill_directory();
        cluster.kill_provider(1);
        cluster.start_directory();
        cluster.start_provider(1);
        cluster.wait_online(6);
    }
    poll::until("nothing but what is named, by itself", HEALED, || {
        let (code, said) = fsck(&cluster, &[]);
        (code == 0).then_some(()).ok_or(said["found"].to_string())
    });
    let mount = cluster.mount();
    for number in 4..8 {
        let read = fs::read(mount.path().join(format!("file{number}"))).unwrap();
        assert!(read == noise(number, 3 << 20), "file{number}: wrong bytes");
    }
    mount.unmount();
}

#[test]
fn a_provider_leaves_through_a_crash_and_is_one_no_more() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape { providers: 7, ..Shape::default() });
    let mount = cluster.mount();
    fill(mount.path());
    cluster.wait_settled();
    let data = cluster.provider_data(4);
    let leave = || {
        let mut command =
            std::process::Command::new(us_tests::cluster::programs().join("us-provider"));
        command.args(["leave", "--data"]).arg(&data).output().unwrap()
    };
    thread::scope(|scope| {
        let first = scope.spawn(leave);
        poll::until("its leaving to begin", PATIENCE, || {
            fs::read(data.join("leaving")).map(drop).map_err(|error| error.to_string())
        });
        cluster.kill_provider(4);
        let said = first.join().unwrap();
        assert!(!said.status.success(), "{said:?}");
        cluster.start_provider(4);
    });
    cluster.wait_online(7);
    // The directory crashes too; then it goes on by itself.
    cluster.kill_directory();
    cluster.start_directory();
    cluster.wait_online(7);
    let said = leave();
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.status.success() && text.contains("this provider has left"), "{said:?}");
    let again = leave();
    assert!(again.status.success(), "{again:?}");
    let status = cluster.status().unwrap();
    assert_eq!(status["providers"].as_array().unwrap().len(), 6);
    let events = cluster.usctl(&["events"]);
    assert!(events.contains("provider-left"), "{events}");
    // All is there without it, and whole: two others may go.
    wait_clean(&cluster);
    fs::remove_dir_all(&data).unwrap();
    cluster.kill_provider(0);
    cluster.kill_provider(1);
    check(mount.path());
    mount.unmount();
}

/// A provider whose whole data folder is that of yesterday: a snapshot brought back, a disk cloned. It has
/// the cookie of a connect that was not its last, so that nothing it should have is believed before it was
/// asked after each; what it lacks is made again.
#[test]
fn an_old_copy_of_a_disk_is_recognised() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(shape());
    let mount = cluster.mount();
    cluster.stop_provider(3);
    let (data, old) = (cluster.provider_data(3), cluster.at("old"));
    copy_folder(&data, Path::new(&old));
    cluster.start_provider(3);
    cluster.wait_online(6);
    let suspects = |cluster: &Cluster| {
        let said = cluster.usctl(&["events", "--last", "1000"]);
        said.lines().filter(|line| line.contains("provider-suspect")).count()
    };
    assert_eq!(suspects(&cluster), 0, "a start is no suspicion");
    fill(mount.path());
    cluster.wait_settled();
    wait_clean(&cluster);
    // Its first report says that it keeps the cookie of this connect.
    poll::until("the provider to report what it stored", PATIENCE, || {
        let status = cluster.status()?;
        let providers = status["providers"].as_array().ok_or("no providers")?;
        let own = providers.iter().find(|one| one["name"] == "provider3").ok_or("no provider3")?;
        let used = own["used_bytes"].as_u64();
        used.filter(|used| *used > 8 << 19).map(drop).ok_or(own.to_string())
    });
    cluster.stop_provider(3);
    let address = fs::read(data.join("address")).unwrap();
    fs::remove_dir_all(&data).unwrap();
    copy_folder(Path::new(&old), &data);
    fs::write(data.join("address"), address).unwrap();
    cluster.start_provider(3);
    cluster.wait_online(6);
    assert_eq!(suspects(&cluster), 1);
    wait_clean(&cluster);
    let mut admin = cluster.admin();
    poll::until("what it lacks is made again", HEALED, || is_whole(&admin.status()?, 2));
    // Its fragments are needed when two others go.
    cluster.kill_provider(0);
    cluster.kill_provider(1);
    mount.unmount();
    let mount = cluster.mount();
    check(mount.path());
    mount.unmount();
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
